//! The `trimtab` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use trimtab::cli::{Cli, Command};
use trimtab::{admin, check, demo, failure, logging, pki, proxy, register, serve, sidecar};

/// A command line becomes a command; the command runs to its end; how it ended becomes the exit code.
fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::report_usage(&error),
    };
    let ended = logging::start(&cli.log_level).and_then(|()| match cli.command {
        Command::Proxy(args) => proxy::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Agent(args) => sidecar::run(*args),
        Command::Check(args) => check::run(&args),
        Command::Resources(args) => admin::resources(&args),
        Command::Pools(args) => admin::pools(&args),
        Command::Explain(args) => admin::explain(&args),
        Command::Versions(args) => admin::versions(&args),
        Command::Capabilities(args) => admin::capabilities(&args),
        Command::Drain(args) => admin::drain(&args),
        Command::Ready(args) => admin::ready(&args),
        Command::Notify(args) => admin::notify::run(&args),
        Command::Pull(args) => admin::pull(&args),
        Command::Register(args) => register::register(&args),
        Command::Deregister(args) => register::deregister(&args),
        Command::Dns(args) => admin::dns::run(&args),
        Command::Token(args) => admin::tokens::run(&args),
        Command::Pki(args) => pki::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::DemoService(args) => demo::service::run(args),
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
