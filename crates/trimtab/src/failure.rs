//! How the process ends when it does not end well: whose fault it is, what to do, and the exit code.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::ConfigErrors;
use crate::problem::Problem;

/// Why a command did not do what it was asked. Codes are those of `sysexits.h`, where it has one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The command line asks for what cannot be; the caller's to mend.
    #[error("{0}")]
    Usage(Problem),
    /// A file cannot be read; the caller's to mend.
    #[error("cannot read {}: {source}", file.display())]
    Unreadable {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration file is wrong; the operator's to mend.
    #[error("{errors}")]
    Config {
        /// Which file.
        file: PathBuf,
        /// Everything that is wrong with it.
        errors: ConfigErrors,
    },
    /// The system, or who configured it, refuses what is needed to start: each line says what and what to do.
    #[error("cannot start")]
    Start(Vec<String>),
    /// Nobody, or nobody who is a trimtab balancer, answers at the control address.
    #[error(
        "the balancer does not answer at {control}: {reason}\n  \
         is `trimtab serve` running? its address is set with --control URL or TRIMTAB_CONTROL"
    )]
    Unreachable {
        /// The address tried.
        control: String,
        /// Why.
        reason: String,
    },
    /// The balancer answered no.
    #[error("the balancer at {control} says: {reason}")]
    Refused {
        /// Who.
        control: String,
        /// What it said.
        reason: String,
    },
    /// Output could not be written.
    #[error("cannot write: {0}")]
    Output(io::Error),
    /// A part of this process failed that never should; ours to mend.
    #[error("{0:#}\n  this is a fault of trimtab: please report it with the log above")]
    Fault(anyhow::Error),
    /// A second signal came before all was drained: what the operator wanted.
    #[error("left at once at a second signal")]
    SecondSignal(i32),
}

impl Failure {
    /// The exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Refused { .. } => 1,
            Self::Usage(_) => 64,
            Self::Unreadable { .. } => 66,
            Self::Unreachable { .. } => 69,
            Self::Fault(_) => 70,
            Self::Start(_) => 71,
            Self::Output(_) => 74,
            Self::Config { .. } => 78,
            // As a shell says it of a process that the signal killed.
            Self::SecondSignal(signal) => 128 + u8::try_from(*signal).unwrap_or(0),
        }
    }

    /// Says it on stderr, once, and gives the exit code.
    pub fn report(&self) -> ExitCode {
        match self {
            Self::Config { file, errors } => eprint!("{}", errors.render(&file.display().to_string())),
            Self::Start(reasons) => {
                for reason in reasons {
                    eprintln!("trimtab: error: {reason}");
                }
            }
            Self::Usage(Problem { message, hint }) => eprintln!("trimtab: error: {message}\n  hint: {hint}"),
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => eprintln!("trimtab: error: {other}"),
        }
        ExitCode::from(self.code())
    }

    /// A start that fails for one reason.
    pub fn start(reason: impl ToString) -> Self {
        Self::Start(vec![reason.to_string()])
    }
}

/// Reads a file, or says which one and why not.
pub fn read_file(file: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(file).map_err(|source| Failure::Unreadable { file: file.to_owned(), source })
}

/// What clap says of a command line, with the codes of `sysexits.h`: help and version are what was asked for.
pub fn report_usage(error: &clap::Error) -> ExitCode {
    // Nothing can be said if stderr or stdout is closed.
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { 64 } else { 0 })
}
