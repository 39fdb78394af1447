//! Servers of protocols that active checks speak: Redis, nginx, aiosmtpd, pyftpdlib and Prosody, each in a temporary folder.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{Process, connect, until};

/// Debian's, whatever else is in `PATH`: its packages are installed there.
const PYTHON: &str = "/usr/bin/python3";

/// Its command line has no TLS. Arguments: address, port, certificate, key, folder.
const FTP_WITH_TLS: &str = "
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import TLS_FTPHandler as Handler
from pyftpdlib.servers import FTPServer
host, port, Handler.certfile, Handler.keyfile, folder = sys.argv[1:]
Handler.authorizer = DummyAuthorizer()
Handler.authorizer.add_anonymous(folder)
FTPServer((host, int(port)), Handler).serve_forever()
";

/// A server. It and its folder go when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    // Before the folder: it writes there.
    process: Process,
    _folder: TempDir,
}

impl Server {
    /// Redis, which keeps nothing.
    ///
    /// # Panics
    /// When it is not installed or does not start.
    #[track_caller]
    pub fn redis() -> Self {
        Self::start("redis-server", |address, folder| {
            let mut command = Command::new("redis-server");
            command.args(["--bind", &address.ip().to_string(), "--port", &address.port().to_string()]);
            command.args(["--save", "", "--appendonly", "no", "--dir"]).arg(folder);
            command
        })
    }

    /// nginx, which answers everything by 200 and `well`; with a certificate and its key, within TLS.
    ///
    /// # Panics
    /// As [`Self::redis`].
    #[track_caller]
    pub fn nginx(tls: Option<(&Path, &Path)>) -> Self {
        Self::start("nginx", |address, folder| {
            let (ssl, certificate) = tls.map_or_else(Default::default, |(certificate, key)| {
                let (certificate, key) = (certificate.display(), key.display());
                (" ssl", format!("ssl_certificate {certificate}; ssl_certificate_key {key};"))
            });
            let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|path| format!("{path}_temp_path {0}/{path};", folder.display()))
                .concat();
            let text = format!(
                "daemon off; master_process off; pid {0}/pid; error_log stderr; events {{ }}\n\
                 http {{ access_log off; {paths}\n\
                 server {{ listen {address}{ssl}; {certificate} location / {{ return 200 well; }} }} }}\n",
                folder.display()
            );
            let file = folder.join("nginx.conf");
            std::fs::write(&file, text).expect("our own folder");
            let mut command = Command::new("/usr/sbin/nginx");
            command.arg("-c").arg(file).arg("-p").arg(folder).args(["-e", "stderr"]);
            command
        })
    }

    /// aiosmtpd, which forgets every message; with a certificate and its key, it has STARTTLS and wants it.
    ///
    /// # Panics
    /// As [`Self::redis`].
    #[track_caller]
    pub fn smtp(tls: Option<(&Path, &Path)>) -> Self {
        Self::start("aiosmtpd", |address, _| {
            let mut command = Command::new(PYTHON);
            command.args([
                "-m",
                "aiosmtpd",
                "-n",
                "-c",
                "aiosmtpd.handlers.Sink",
                "-l",
                &address.to_string(),
            ]);
            if let Some((certificate, key)) = tls {
                command.arg("--tlscert").arg(certificate).arg("--tlskey").arg(key);
            }
            command
        })
    }

    /// pyftpdlib, of its folder; with a certificate and its key, it has AUTH TLS.
    ///
    /// # Panics
    /// As [`Self::redis`].
    #[track_caller]
    pub fn ftp(tls: Option<(&Path, &Path)>) -> Self {
        Self::start("pyftpdlib", |address, folder| {
            let mut command = Command::new(PYTHON);
            if let Some((certificate, key)) = tls {
                command.args(["-c", FTP_WITH_TLS, &address.ip().to_string(), &address.port().to_string()]);
                command.arg(certificate).arg(key).arg(folder);
                return command;
            }
            command.args(["-m", "pyftpdlib", "-i", &address.ip().to_string()]);
            command.args(["-p", &address.port().to_string(), "-d"]).arg(folder);
            command
        })
    }

    /// Prosody, of the domain `example.test`; with a certificate and its key, it has STARTTLS and wants it.
    ///
    /// # Panics
    /// As [`Self::redis`].
    #[track_caller]
    pub fn prosody(tls: Option<(&Path, &Path)>) -> Self {
        Self::start("prosody", |address, folder| {
            let (modules, ssl) = tls.map_or_else(Default::default, |(certificate, key)| {
                let (certificate, key) = (certificate.display(), key.display());
                (", \"tls\"", format!("ssl = {{ certificate = \"{certificate}\", key = \"{key}\" }}\n"))
            });
            let text = format!(
                "run_as_root = true\npidfile = \"{0}/pid\"\ndata_path = \"{0}\"\n\
                 interfaces = {{ \"{1}\" }}\nc2s_ports = {{ {2} }}\nmodules_disabled = {{ \"s2s\" }}\n\
                 modules_enabled = {{ \"saslauth\"{modules} }}\n{ssl}c2s_require_encryption = {3}\n\
                 log = {{ {{ levels = {{ min = \"info\" }}, to = \"console\" }} }}\n\
                 VirtualHost \"example.test\"\n",
                folder.display(),
                address.ip(),
                address.port(),
                tls.is_some()
            );
            let file = folder.join("prosody.cfg.lua");
            std::fs::write(&file, text).expect("our own folder");
            let mut command = Command::new("prosody");
            command.arg("-F").arg("--config").arg(file);
            command
        })
    }

    #[track_caller]
    fn start(name: &str, command: impl FnOnce(SocketAddr, &Path) -> Command) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = crate::loopback();
        let command = command(address, folder.path());
        let mut whole = Command::new("setpriv");
        whole.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        let mut process = Process::start(name, &mut whole);
        until(&format!("{name} answers"), || {
            assert!(process.is_running(), "{name} ended: {}", process.stderr());
            connect(address).ok()
        });
        Self { address, process, _folder: folder }
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it where it is: the kernel still takes connections for it.
    pub fn freeze(&mut self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        self.process.signal(Signal::CONT);
    }
}
