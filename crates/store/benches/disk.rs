//! What the disk makes of it: registrations a second by how many wait for an answer, a second of history of 10,000
//! resources, and how long a start takes. `cargo bench -p trimtab-store`; a folder to write in may follow after `--`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use store::{Chunk, Estimates, Event, EventKind, Kept, Resource, Store, StoreError, Tables, Writer};

/// A registration as an agent makes it.
fn resource(n: usize) -> Resource {
    Resource {
        id: format!("r{n}"),
        pool: "sql".into(),
        incarnation: 1,
        version: "15.2".into(),
        flows_max: 0,
        weight: 1.0,
        report_interval_ms: 1_000,
        address: format!("10.0.{}.{}:5432", n / 250, n % 250),
        probe_address: None,
        labels: BTreeMap::from([("zone".into(), "a".into()), ("role".into(), "writer".into())]),
        scripts: Vec::new(),
        registered_ms: 0,
        owner: None,
    }
}

fn register(tables: &Tables<'_>, n: usize) -> Result<(), StoreError> {
    tables.put_resource(&resource(n))?;
    let kind = EventKind::Registered;
    tables.add_event(&Event {
        at_ms: 0,
        kind,
        resource: Some(format!("r{n}")),
        pool: None,
        detail: String::new(),
    })
}

fn registrations(folder: &Path, in_flight: usize) {
    let writer = open(&folder.join(format!("registrations-{in_flight}.db"))).start().expect("a thread");
    let (mut answers, mut longest) = (std::collections::VecDeque::new(), Duration::ZERO);
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(3) {
        while answers.len() < in_flight {
            let n = count;
            count += 1;
            answers.push_back((Instant::now(), writer.run(move |tables| register(tables, n))));
        }
        if let Some((asked, answer)) = answers.pop_front() {
            answer.blocking_recv().expect("an answer").expect("room");
            longest = longest.max(asked.elapsed());
        }
    }
    let stats = writer.stats();
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{in_flight:>5} in flight: {:>6.0} registrations/s, {:.1} in a commit, {:.2} ms a commit, longest wait {longest:?}",
        stats.changes as f64 / seconds,
        stats.changes as f64 / stats.commits as f64,
        stats.commit_micros as f64 / stats.commits as f64 / 1e3,
    );
}

/// A stretch of eleven dimensions with so many buckets.
fn buckets(count: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for dimension in 0..11 {
        let name = format!("dimension{dimension}");
        bytes.push(name.len() as u8);
        bytes.extend(name.as_bytes());
        bytes.extend([0, count]);
        bytes.extend((0..count).flat_map(|n| [n, 0x3f, n, 0x3f]));
    }
    bytes
}

fn kept(n: usize, chunks: &[(u64, u64, u8)]) -> Kept {
    let chunk = |(tier_ms, start_ms, count): &(u64, u64, u8)| Chunk {
        tier_ms: *tier_ms,
        start_ms: *start_ms,
        buckets: buckets(*count),
    };
    Kept {
        id: format!("r{n}"),
        incarnation: 1,
        ready: true,
        estimates: Estimates {
            reported_ms: 1,
            operations: Some(100.0),
            flows_opened: 1.0,
            flows_open: 1.0,
            errors: 0.0,
            utilization: 0.5,
            log_weight: 0.0,
        },
        history: chunks.iter().map(chunk).collect(),
    }
}

fn history(folder: &Path, resources: usize) {
    let writer = open(&folder.join("history.db")).start().expect("a thread");
    let all = writer.run(move |tables| (0..resources).try_for_each(|n| register(tables, n)));
    all.blocking_recv().expect("an answer").expect("room");
    let (written, began) = (bytes_written(), Instant::now());
    let seconds = 40;
    let before = writer.stats();
    for second in 0..seconds {
        let chunks = [(1_000, second / 10 * 10_000, (second % 10 + 1) as u8)];
        for batch in (0..resources).collect::<Vec<_>>().chunks(128) {
            let batch: Vec<Kept> = batch.iter().map(|n| kept(*n, &chunks)).collect();
            while !writer.keep(batch.clone()) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    let done = settle(&writer);
    let spent = done.commit_micros - before.commit_micros;
    println!(
        "{resources} resources, a second of history: {:.0} ms of the writing thread, {:.1} MB written ({:?} for {seconds})",
        spent as f64 / seconds as f64 / 1e3,
        (bytes_written() - written) as f64 / seconds as f64 / 1e6,
        began.elapsed(),
    );
}

fn settle(writer: &Writer) -> store::Stats {
    while writer.stats().waiting > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    writer.run(|_| Ok(())).blocking_recv().expect("an answer").expect("room");
    writer.stats()
}

fn start(folder: &Path, resources: usize) {
    let path = folder.join("start.db");
    let writer = open(&path).start().expect("a thread");
    let filled = writer.run(move |tables| {
        for n in 0..resources {
            register(tables, n)?;
            let seconds = (0..60).map(|k| (1_000, k * 10_000, 10));
            let minutes = (0..24).map(|k| (60_000, k * 3_600_000, 60));
            let hours = (0..30).map(|k| (3_600_000, k * 86_400_000, 24));
            tables.keep(&kept(n, &seconds.chain(minutes).chain(hours).collect::<Vec<_>>()))?;
        }
        Ok(())
    });
    filled.blocking_recv().expect("an answer").expect("room");
    drop(writer);
    let began = Instant::now();
    let store = open(&path);
    let opened = began.elapsed();
    let contents = store.load().expect("whole");
    println!(
        "{} resources with thirty days of history: {:.0} MB, opened and checked in {opened:?}, read in {:?}",
        contents.resources.len(),
        std::fs::metadata(&path).expect("a file").len() as f64 / 1e6,
        began.elapsed() - opened,
    );
}

fn open(path: &Path) -> Store {
    Store::open(path).unwrap_or_else(|error| panic!("{error}"))
}

/// What this process has given to the disk.
fn bytes_written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

fn main() {
    let given = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).map(PathBuf::from);
    let folder = match given {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let folder = folder.expect("a temporary folder");
    for in_flight in [1, 16, 256, 4_096] {
        registrations(folder.path(), in_flight);
    }
    history(folder.path(), 10_000);
    start(folder.path(), 500);
}
