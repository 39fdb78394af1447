//! What the outside asks of the process: signals, and for a child of `demo` the end of its stdin.
//!
//! Each signal writes into a socket of its own and [`Signals::wait`] polls them: no runtime and no thread is needed, so
//! that an idle `proxy` is its workers and one sleeping thread.

use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// To stop, by this signal; the end of stdin stands for SIGTERM.
    Stop(i32),
    /// To read the configuration again.
    Reload,
    /// Nothing, for as long as was waited.
    Nothing,
}

/// The signals of this process. While it lives they do not end the process by themselves.
#[derive(Debug)]
pub struct Signals {
    sources: Vec<(UnixStream, Asked)>,
    /// Whether stdin is watched, too.
    parent: bool,
}

impl Signals {
    /// Takes SIGTERM, SIGINT and SIGHUP; with `with_parent` the end of stdin counts as a SIGTERM.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn install(with_parent: bool) -> io::Result<Self> {
        let mut sources = Vec::new();
        // In this order when several are there: a stop ends the waiting.
        let asked = [(SIGHUP, Asked::Reload), (SIGTERM, Asked::Stop(SIGTERM)), (SIGINT, Asked::Stop(SIGINT))];
        for (signal, asked) in asked {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, write)?;
            sources.push((read, asked));
        }
        Ok(Self { sources, parent: with_parent })
    }

    /// Waits for the next thing that is asked, at most so long.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub fn wait(&mut self, at_most: Duration) -> io::Result<Asked> {
        let stdin = io::stdin();
        let mut watched: Vec<_> =
            self.sources.iter().map(|(read, _)| PollFd::new(read, PollFlags::IN)).collect();
        if self.parent {
            watched.push(PollFd::new(&stdin, PollFlags::IN));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(at_most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(at_most.subsec_nanos()),
        };
        match poll(&mut watched, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = watched.iter().map(|fd| !fd.revents().is_empty()).collect();
        for ((source, asked), _) in self.sources.iter_mut().zip(&ready).filter(|(_, ready)| **ready) {
            // One byte for each signal; those that came meanwhile ask for something each.
            if source.read(&mut [0])? > 0 {
                return Ok(*asked);
            }
        }
        if self.parent && ready.last() == Some(&true) && io::stdin().read(&mut [0; 64]).unwrap_or(0) == 0 {
            self.parent = false;
            return Ok(Asked::Stop(SIGTERM));
        }
        Ok(Asked::Nothing)
    }

    /// A future that ends at the first request to stop; a second one ends the process at once, with the code of
    /// [`Failure::SecondSignal`](crate::failure::Failure::SecondSignal).
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn into_future(mut self) -> io::Result<impl Future<Output = ()> + Send> {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            let mut stop = Some(stop);
            loop {
                match self.wait(Duration::from_secs(3600)) {
                    Ok(Asked::Stop(signal)) => match stop.take() {
                        Some(stop) => drop(stop.send(())),
                        None => std::process::exit(128 + signal),
                    },
                    Ok(Asked::Reload) => tracing::warn!("SIGHUP: there is nothing to reload"),
                    Ok(Asked::Nothing) => {}
                    // Without signals it could not be stopped any more: stop it.
                    Err(_) => return,
                }
            }
        })?;
        Ok(async {
            let _ = stopped.await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_asks_for_its_own() {
        let mut signals = Signals::install(false).unwrap();
        assert_eq!(signals.wait(Duration::from_millis(1)).unwrap(), Asked::Nothing);
        signal_hook::low_level::raise(SIGHUP).unwrap();
        assert_eq!(signals.wait(Duration::from_secs(5)).unwrap(), Asked::Reload);
        signal_hook::low_level::raise(SIGINT).unwrap();
        assert_eq!(signals.wait(Duration::from_secs(5)).unwrap(), Asked::Stop(SIGINT));
        assert_eq!(signals.wait(Duration::from_millis(1)).unwrap(), Asked::Nothing);
    }
}
