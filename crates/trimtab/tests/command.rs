//! The command as a shell sees it: exit codes, what goes to stdout and what to stderr.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Runs the command to its end, without what the caller's environment says.
fn trimtab(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trimtab"))
        .args(args)
        .env_remove("RUST_LOG")
        .env_remove("TRIMTAB_CONTROL")
        .output()
        .expect("the command was built")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it ended by itself")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("UTF-8")
}

fn file(folder: &tempfile::TempDir, name: &str, content: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).expect("a writable temporary folder");
    path
}

#[test]
fn check_accepts_the_example() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/trimtab.example.toml");
    let output = trimtab(&["check", "-c", example]);
    assert_eq!((code(&output), stdout(&output)), (0, &*format!("{example}: ok (1 listener, 1 pool)\n")));
    assert_eq!(stderr(&output), "");
}

#[test]
fn check_says_everything_and_exits_78() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bad =
        file(&folder, "bad.toml", "[http]\nlisten = 1\n[[listener]]\nbind = \"tcp://:1\"\npool = \"sql\"\n");
    for command in ["check", "serve"] {
        let output = trimtab(&[command, "-c", bad.to_str().unwrap()]);
        assert_eq!(code(&output), 78, "{command}");
        let expected = "\
FILE:2:10: error: `http.listen`: this is an integer, not a text
  hint: write an IP address and a port: \"127.0.0.1:5432\" or \"[::1]:5432\"
FILE:4:8: error: `listener.bind`: \":1\" is not an address
  hint: write \"0.0.0.0:1\" for every IPv4 address or \"127.0.0.1:1\" for this host alone
FILE:5:8: error: `listener.pool`: there is no pool \"sql\"
  hint: add [[pool]] with name = \"sql\"
";
        assert_eq!(stderr(&output), expected.replace("FILE", bad.to_str().unwrap()), "{command}");
        assert_eq!(stdout(&output), "", "{command}");
    }
}

#[test]
fn a_file_that_is_not_there_exits_66() {
    let output = trimtab(&["check", "-c", "/nonexistent/trimtab.toml"]);
    assert_eq!(code(&output), 66);
    assert_eq!(
        stderr(&output),
        "trimtab: error: cannot read /nonexistent/trimtab.toml: No such file or directory (os error 2)\n"
    );
}

#[test]
fn a_wrong_command_line_exits_64() {
    for line in [
        &["serve"][..],
        &["nonsense"],
        &[],
        &["proxy", "--listen", "sctp://127.0.0.1:1", "--to", "127.0.0.1:2"],
        &["proxy", "--listen", "tcp://127.0.0.1:0", "--to", "0.0.0.0:1"],
        &["proxy", "--listen", "tcp://127.0.0.1:0", "--to", "127.0.0.1:1", "--engine", "kqueue"],
        &["resources", "--control", "ftp://127.0.0.1:1"],
        &["check", "-c", "x", "--log-level", "a=b=c"],
    ] {
        let output = trimtab(line);
        assert_eq!(code(&output), 64, "{line:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{line:?}");
        assert!(!stderr(&output).is_empty(), "{line:?}");
    }
}

#[test]
fn help_tells_the_commands_and_the_exit_codes() {
    let output = trimtab(&["--help"]);
    assert_eq!(code(&output), 0);
    for word in [
        "proxy",
        "serve",
        "check",
        "agent",
        "resources",
        "pools",
        "explain",
        "drain",
        "ready",
        "demo",
        "Exit codes:",
        "78   the configuration file is wrong",
    ] {
        assert!(stdout(&output).contains(word), "{word} is missing in\n{}", stdout(&output));
    }
    assert!(!stdout(&output).contains("demo-service"));
    assert!(!stdout(&trimtab(&["agent", "--help"])).contains("with-parent"));
    assert!(stdout(&trimtab(&["--version"])).starts_with("trimtab "));
}

#[test]
fn no_balancer_exits_69_and_says_where_it_looked() {
    // Free a moment ago; the kernel hands out other ports first.
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("its address").port()
    };
    let control = format!("http://127.0.0.1:{port}");
    for line in [&["resources"][..], &["pools"], &["explain", "sql"], &["drain", "pg1"], &["ready", "pg1"]] {
        let output = trimtab(&[line, &["--control", &control, "-o", "json"]].concat());
        assert_eq!(code(&output), 69, "{line:?}");
        assert_eq!(
            stderr(&output),
            format!(
                "trimtab: error: the balancer does not answer at {control}: Connection refused (os error 111)\n  \
                 is `trimtab serve` running? its address is set with --control URL or TRIMTAB_CONTROL\n"
            ),
            "{line:?}"
        );
        assert_eq!(stdout(&output), "", "{line:?}");
    }
}
