//! `trimtab demo`: what a new user sees first.

use std::time::Duration;

use e2e::{Process, trimtab_command};

/// New connections of red, green and blue in one second.
fn live_line(line: &str) -> Option<[u64; 3]> {
    let (second, rest) = line.trim_start().split_once("s ")?;
    second.parse::<u64>().ok()?;
    let words: Vec<&str> = rest.split('|').next()?.split_whitespace().collect();
    let ["red", red, "green", green, "blue", blue] = words[..] else { return None };
    Some([red.parse().ok()?, green.parse().ok()?, blue.parse().ok()?])
}

fn demo(arguments: &[&str]) -> (String, Vec<[u64; 3]>) {
    let mut process = Process::start("demo", &mut trimtab_command(&[&["demo"], arguments].concat()));
    let (ended, took) = process.wait(Duration::from_secs(60));
    println!("trimtab demo {arguments:?} took {took:?}:\n{}", ended.stdout);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let lines = ended.stdout.lines().filter_map(live_line).collect();
    assert!(!ended.stdout.contains(" failed"), "no connection fails");
    (ended.stdout, lines)
}

#[test]
fn it_shows_how_connections_are_divided() {
    let (said, lines) = demo(&["--seconds", "6"]);
    assert_eq!(lines.len(), 6, "a line a second");
    for who in 0..3 {
        let total: u64 = lines.iter().map(|line| line[who]).sum();
        assert!(total > 0, "each gets connections");
    }
    for tip in ["nc ", "curl http://", "dig @127.0.0.1 -p ", "resources", "kill "] {
        assert!(said.contains(tip), "it says what to try: {tip}");
    }
}

#[test]
fn stress_moves_connections_away() {
    let (said, lines) = demo(&["--stress", "green", "--stress-seconds", "9", "--seconds", "14"]);
    assert!(said.contains("green gets busy") && said.contains("green is calm again"));
    assert_eq!(lines.len(), 14);
    // It is busy from the 5th second to the 14th. Five seconds later the traffic has moved.
    let share = |lines: &[[u64; 3]]| {
        let all: u64 = lines.iter().flatten().sum();
        lines.iter().map(|line| line[1]).sum::<u64>() as f64 / all as f64
    };
    let (before, busy) = (share(&lines[1..5]), share(&lines[10..13]));
    println!("green's share: {before:.2} before, {busy:.2} while busy");
    assert!(before > 0.2, "about a third: {before}");
    assert!(busy < before / 2.0, "visibly less: {busy}");
}
