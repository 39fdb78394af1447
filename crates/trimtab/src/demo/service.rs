//! One of the demo's services: says hello with its name, echoes lines, and burns a little CPU for each.
//!
//! It stands for a machine with one core. How busy it is, it measures: its own process's CPU time over that core. When
//! it is told to be busy, a thread really burns the core.

use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::cli::DemoServiceArgs;
use crate::failure::Failure;
use crate::output::print;

/// Connections at once, each a thread. The demo's load has a few dozen; people try a few more.
const CONNECTIONS_MAX: usize = 256;
/// Longest line that is echoed.
const LINE_BYTES_MAX: u64 = 4096;
/// How often it says how busy it is; agents report once a second.
const MEASURE_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Shared {
    connections: AtomicUsize,
    lines: AtomicU64,
    busy: AtomicBool,
}

/// Serves until its parent leaves or a signal ends it.
///
/// # Errors
/// When the address is taken.
pub fn run(args: DemoServiceArgs) -> Result<(), Failure> {
    let listener = TcpListener::bind(args.address).map_err(|error| {
        Failure::start(format!("{} cannot listen on {}: {error}", args.name, args.address))
    })?;
    let shared = Arc::new(Shared::default());
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
        let started = thread::Builder::new().name(name.to_owned()).spawn(body);
        started.map_err(|error| Failure::start(format!("cannot start a thread: {error}")))
    };
    spawn(
        "stress",
        Box::new({
            let shared = Arc::clone(&shared);
            move || stress(&shared)
        }),
    )?;
    if let Some(file) = args.utilization_file {
        // Before the agent's first report: without the file it would be about the host that the demo's machines share.
        say_utilization(&file, 0.0, 0.0);
        let shared = Arc::clone(&shared);
        spawn("measure", Box::new(move || measure(&shared, &file)))?;
    }
    if args.with_parent {
        let shared = Arc::clone(&shared);
        spawn("parent", Box::new(move || obey_parent(&shared)))?;
    }
    print("ready\n")?;
    let hello: Arc<str> = format!("hello from {}\n", args.name).into();
    for connection in listener.incoming() {
        let Ok(connection) = connection else {
            // Out of descriptors, or the client has left already: the next one may do better.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        if shared.connections.fetch_add(1, Relaxed) >= CONNECTIONS_MAX {
            shared.connections.fetch_sub(1, Relaxed);
            continue;
        }
        let (shared, hello) = (Arc::clone(&shared), Arc::clone(&hello));
        let of_thread = Arc::clone(&shared);
        let serve = move || {
            // A client that leaves in the middle of a line is no concern of ours.
            let _ = echo(&connection, &hello, args.work, &of_thread);
            of_thread.connections.fetch_sub(1, Relaxed);
        };
        if thread::Builder::new().stack_size(128 << 10).spawn(serve).is_err() {
            shared.connections.fetch_sub(1, Relaxed);
        }
    }
    Ok(())
}

fn echo(mut connection: &TcpStream, hello: &str, work: Duration, shared: &Shared) -> io::Result<()> {
    connection.write_all(hello.as_bytes())?;
    let mut reader = BufReader::new(connection);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        burn(work);
        shared.lines.fetch_add(1, Relaxed);
        connection.write_all(&line)?;
    }
}

/// Uses up CPU time of this thread: as much on a busy machine as on an idle one.
fn burn(work: Duration) {
    let start = cpu_time(ClockId::ThreadCPUTime);
    while cpu_time(ClockId::ThreadCPUTime).saturating_sub(start) < work {
        // A bit of work between two looks at the clock, which is a system call.
        let mut hash = 0_u64;
        for n in 0..2000_u64 {
            hash = std::hint::black_box(hash.rotate_left(5) ^ n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        std::hint::black_box(hash);
    }
}

fn stress(shared: &Shared) {
    loop {
        if shared.busy.load(Relaxed) {
            burn(Duration::from_millis(20));
        } else {
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Writes how busy this process is in the form that `trimtab agent --utilization-file` reads.
fn measure(shared: &Shared, file: &Path) {
    let mut before = (Instant::now(), cpu_time(ClockId::ProcessCPUTime), 0);
    loop {
        thread::sleep(MEASURE_EVERY);
        let now = (Instant::now(), cpu_time(ClockId::ProcessCPUTime), shared.lines.load(Relaxed));
        let elapsed = (now.0 - before.0).as_secs_f64();
        let cpu = now.1.saturating_sub(before.1).as_secs_f64() / elapsed;
        let operations = (now.2 - before.2) as f64 / elapsed;
        before = now;
        say_utilization(file, cpu, operations);
    }
}

fn say_utilization(file: &Path, cpu: f64, operations: f64) {
    // `application` above 0 stands for all that the agent measures of the host.
    let application = cpu.max(0.001);
    let json = format!(
        "{{\"cpu\": {cpu:.4}, \"application\": {application:.4}, \"operations_per_second\": {operations:.1}}}\n"
    );
    if let Err(error) = replace(file, &json) {
        tracing::warn!("cannot write {}: {error}", file.display());
    }
}

/// Writes beside the file and renames: a reader sees the old one or the new one.
fn replace(file: &Path, content: &str) -> io::Result<()> {
    let mut beside = PathBuf::from(file);
    beside.set_extension("new");
    std::fs::write(&beside, content)?;
    std::fs::rename(&beside, file)
}

/// The parent says `busy` or `calm`; when it is gone there is nobody to serve for.
fn obey_parent(shared: &Shared) {
    for line in io::stdin().lock().lines() {
        match line.as_deref() {
            Ok("busy") => shared.busy.store(true, Relaxed),
            Ok("calm") => shared.busy.store(false, Relaxed),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    std::process::exit(0);
}

fn cpu_time(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burning_takes_the_cpu_time_it_says() {
        let start = cpu_time(ClockId::ThreadCPUTime);
        burn(Duration::from_millis(5));
        let took = cpu_time(ClockId::ThreadCPUTime) - start;
        assert!((Duration::from_millis(5)..Duration::from_millis(50)).contains(&took), "{took:?}");
    }
}
