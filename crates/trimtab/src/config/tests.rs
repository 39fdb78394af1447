use std::collections::BTreeSet;

use super::*;

const EXAMPLE: &str = include_str!("../../../../deploy/trimtab.example.toml");

/// What a file's errors print.
fn errors(file: &str) -> String {
    match Config::parse(file.as_bytes()) {
        Ok(config) => panic!("accepted as {config:?}"),
        Err(errors) => errors.render("f"),
    }
}

/// A file in which all that is needed stands after `head`.
fn with_a_listener(head: &str) -> String {
    format!(
        "{head}\n[[pool]]\nname = \"sql\"\n[[listener]]\nbind = \"tcp://127.0.0.1:5432\"\npool = \"sql\"\n"
    )
}

#[test]
fn the_least_file_takes_every_default() {
    let config = Config::parse(with_a_listener("").as_bytes()).expect("the least file");
    let loopback =
        |port| EndpointConfig { listen: SocketAddr::from(([127, 0, 0, 1], port)), insecure: false };
    assert_eq!(
        config,
        Config {
            control: loopback(7400),
            http: loopback(7480),
            dataplane: DataplaneConfig::default(),
            decisions: DecisionsConfig::default(),
            pools: vec![PoolConfig::new("sql".parse().unwrap(), Policy::Adaptive)],
            listeners: vec![ListenerConfig {
                bind: "tcp://127.0.0.1:5432".parse().unwrap(),
                pool: "sql".parse().unwrap(),
                requires: Requirements::default(),
            }],
        }
    );
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let least = Config::parse(with_a_listener("").as_bytes()).expect("the least file");
    assert_eq!(Config::parse(EXAMPLE.as_bytes()).expect("the example"), least);

    // Keys without a default stand in comments.
    let is_key = |line: &str| {
        line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', '-']))
    };
    let uncommented = |line: &str| match line.strip_prefix("# ") {
        Some(rest) if is_key(rest) => format!("{rest}\n"),
        _ => format!("{line}\n"),
    };
    let all: String = EXAMPLE.lines().map(uncommented).collect();
    let document = DeTable::parse(&all).expect("the example is TOML with every key in it");
    let mut reader = Reader::new(&all, &[]);
    Config::read(&mut reader, document.get_ref());
    let mut present = BTreeSet::new();
    add_keys("", document.get_ref(), &mut present);
    assert_eq!(&present, reader.asked());
}

/// Full names of all keys of a table, and of the first of each list of tables.
fn add_keys(path: &str, table: &DeTable<'_>, present: &mut BTreeSet<String>) {
    for (key, value) in table {
        let name =
            if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
        let inner = value.get_ref().as_table();
        let inner = inner.or_else(|| value.get_ref().as_array()?.first()?.get_ref().as_table());
        if let Some(inner) = inner {
            add_keys(&name, inner, present);
        }
        present.insert(name);
    }
}

#[test]
fn every_value_can_be_changed() {
    let file = r#"
        [control]
        listen = "0.0.0.0:0"
        insecure = true
        [http]
        listen = "[::1]:80"
        [dataplane]
        workers = 3
        engine = "uring"
        flows_max = 1_000
        buffers_max = 0x100
        connect_retries = 0
        source_addresses = ["10.0.0.9", "::1"]
        connect_timeout = "250ms"
        idle_timeout = "0s"
        keepalive = "0s"
        drain_timeout = "2m"
        pool = []
    "#
    .replace("pool = []", "")
        + "[[pool]]\nname = \"a\"\npolicy = \"random\"\nflows_max_per_resource = 7\n[[pool]]\nname = \"b\"\n"
        + "[[listener]]\nbind = \"tcp://0.0.0.0:0\"\npool = \"b\"\n[[listener]]\nbind = \"tcp://0.0.0.0:0\"\npool = \"b\"\n";
    let config = Config::parse(file.as_bytes()).expect("a good file");
    assert!(config.control.insecure);
    assert_eq!(config.http.listen.to_string(), "[::1]:80");
    assert_eq!(
        config.dataplane,
        DataplaneConfig {
            workers: 3,
            engine: Engine::Uring,
            flows_max: 1000,
            buffers_max: 256,
            connect_retries: 0,
            source_addresses: vec!["10.0.0.9".parse().unwrap(), "::1".parse().unwrap()],
            connect_timeout: Duration::from_millis(250),
            idle_timeout: None,
            keepalive: None,
            drain_timeout: Duration::from_secs(120),
        }
    );
    assert_eq!((config.pools[0].policy, config.pools[0].flows_max_default), (Policy::Random, 7));
    assert_eq!(config.listeners.len(), 2);
}

#[test]
fn every_error_is_found_at_once_in_order() {
    let file = r#"[control]
listn = "127.0.0.1:7400"
listen = "0.0.0.0:7400"
[control.tls]
cert = "x"
[http]
listen = 7480
[dataplane]
workers = -1
engine = "epoll"
connect_timeout = "0s"
idle_timeout = "5"
connect_retries = 8
[store]
path = "x"
[[pool]]
name = "sql"
policy = "roundrobin"
[[pool]]
name = "sql"
policy = "leastconn"
[[listener]]
bind = "udp://127.0.0.1:53"
pool = "slq"
[[listener]]
pool = "web"
"#;
    let expected = r#"f:2:1: error: there is no key `control.listn`
  hint: did you mean `listen`?
f:3:10: error: `control.listen`: 0.0.0.0:7400 is open to other hosts, in clear text and to anyone
  hint: write "127.0.0.1:7400", or add insecure = true to [control] if the network is trusted
f:4:10: error: `control.tls` is not supported by this version
  hint: remove it; it comes in a later release
f:7:10: error: `http.listen`: this is an integer, not a text
  hint: write it in quotes: "7480"
f:9:11: error: `dataplane.workers`: -1 is out of range
  hint: write a whole number from 0 to 1024, without quotes
f:10:10: error: `dataplane.engine`: the engine "epoll" is not supported by this version
  hint: write "auto" or "uring"; the others come in a later release
f:11:19: error: `dataplane.connect_timeout`: "0s" leaves no time
  hint: write at least "1ms"
f:12:16: error: `dataplane.idle_timeout`: "5" is not a duration
  hint: write a whole number with its unit: "250ms", "5s", "10m", "1h" or "1d"
f:13:19: error: `dataplane.connect_retries`: 8 is out of range
  hint: write a whole number from 0 to 7, without quotes
f:14:2: error: `store` is not supported by this version
  hint: remove it; it comes in a later release
f:18:10: error: `pool.policy`: there is no policy "roundrobin"
  hint: did you mean "round-robin"?
f:20:8: error: there are two pools named "sql"
  hint: the first is in line 17; rename one or merge them
f:21:10: error: `pool.policy`: there is no policy "leastconn"
  hint: there are adaptive, least-connections, p2c, peak-ewma, weighted-round-robin, round-robin, random, first, utilization, maglev, prequal, criteria
f:23:8: error: `listener.bind`: "udp://127.0.0.1:53": UDP is not supported by this version
  hint: write tcp://…; udp:// comes in a later release
f:24:8: error: `listener.pool`: there is no pool "slq"
  hint: did you mean "sql"?
f:25:1: error: `listener.bind` is missing
  hint: add bind = "tcp://0.0.0.0:5432"
f:26:8: error: `listener.pool`: there is no pool "web"
  hint: add [[pool]] with name = "web"
"#;
    assert_eq!(errors(file), expected);
}

#[test]
fn syntax_errors_come_with_the_others_and_without_what_follows_from_them() {
    let file = "[control]\nlisten = \"127.0.0.1:7400\n[http]\nlisten = hello\n[dataplane]\nworkers = \"2\"\n";
    let expected = r#"f:2:25: error: invalid basic string, expected `"`
  hint: a text stands in quotes, on one line: key = "text"
f:4:10: error: string values must be quoted, expected literal string
  hint: a text stands in quotes, on one line: key = "text"
f:6:11: error: `dataplane.workers`: this is a text, not an integer
  hint: write a whole number from 0 to 1024, without quotes
"#;
    assert_eq!(errors(file), expected);
}

#[test]
fn single_errors() {
    for (head, expected) in [
        (
            "colour = 1",
            "f:1:1: error: there is no key `colour`\n  hint: there are control, http, dataplane, decisions, pool, listener\n",
        ),
        (
            "[[control]]",
            "f:1:1: error: `control` is a list, not a table\n  hint: write [control] on a line of its own, and its keys below it\n",
        ),
        (
            "control = 1",
            "f:1:11: error: `control` is an integer, not a table\n  hint: write [control] on a line of its own, and its keys below it\n",
        ),
        (
            "[control]\ninsecure = \"yes\"",
            "f:2:12: error: `control.insecure`: this is a text, not true or false\n  hint: write true or false, without quotes\n",
        ),
        (
            "[http]\nlisten = \"127.0.0.1:5432\"",
            "f:6:8: error: `listener.bind`: 127.0.0.1:5432 is taken already\n  hint: `http.listen` has it (line 2); give one of them another port\n",
        ),
        (
            "[dataplane]\nkeepalive = \"1500ms\"",
            "f:2:13: error: `dataplane.keepalive`: \"1500ms\" is not in whole seconds\n  hint: write \"60s\"; \"0s\" switches keepalive off\n",
        ),
        (
            "[dataplane]\nflows_max = 4294967296",
            "f:2:13: error: `dataplane.flows_max`: 4294967296 is out of range\n  hint: write a whole number from 0 to 4294967295, without quotes\n",
        ),
        (
            "[[pool]]\nname = \"a b\"",
            "f:2:8: error: `pool.name`: \"a b\" is not a name: it has the character ' '; a name takes A-Z a-z 0-9 . _ : / -\n  hint: write a short name, as \"sql\"\n",
        ),
        (
            "[http]\nlisten = 1\nlisten = \"127.0.0.1:1\"",
            "f:2:10: error: `http.listen`: this is an integer, not a text\n  hint: write it in quotes: \"1\"\nf:3:1: error: duplicate key\n  hint: remove one of the two; each entry of a list needs its own [[…]] line\n",
        ),
    ] {
        assert_eq!(errors(&with_a_listener(head)), expected, "for {head:?}");
    }
}

#[test]
fn nothing_to_balance_is_an_error() {
    let expected = "f:1:1: error: there is no listener, so nothing would be balanced\n  hint: add [[pool]] with a name, and [[listener]] with bind = \"tcp://0.0.0.0:5432\" and that pool\n";
    assert_eq!(errors(""), expected);
    assert_eq!(
        errors("[pool]\nname = \"sql\"\n[[listener]]\nbind = \"tcp://127.0.0.1:1\"\npool = \"sql\"\n"),
        "f:1:1: error: `pool` is a table, not a list of tables\n  hint: write [[pool]], with two brackets, for each\n"
    );
}

#[test]
fn bytes_that_are_not_text() {
    let got = Config::parse(b"[control]\nlisten = \"\xff\"\n").unwrap_err().render("f");
    assert_eq!(got, "f:2:11: error: this is not UTF-8 text\n  hint: save the file as UTF-8\n");
}

#[test]
fn columns_count_characters() {
    assert_eq!(
        errors(&with_a_listener("[control]\n\"ключ\" = 1")),
        "f:2:1: error: there is no key `control.ключ`\n  hint: there are insecure, listen\n"
    );
    assert_eq!(
        errors(&with_a_listener("http = { \"ü\" = 1, listen = 2 }")),
        "f:1:10: error: there is no key `http.ü`\n  hint: there are insecure, listen\nf:1:28: error: `http.listen`: this is an integer, not a text\n  hint: write it in quotes: \"2\"\n"
    );
}

proptest::proptest! {
    #[test]
    fn no_file_makes_it_panic(file in "[\\[\\]a-z=\"\\.\n0-9 {}:/#,é'-]{0,200}") {
        let _ = Config::parse(file.as_bytes());
    }

    #[test]
    fn no_damage_to_the_example_makes_it_panic(at in 0..EXAMPLE.len(), byte: u8) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        bytes[at] = byte;
        let _ = Config::parse(&bytes);
    }
}
