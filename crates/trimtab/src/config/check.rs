//! `[pool.check]`: how the balancer asks the pool's resources whether they work.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use checks::{
    CheckConfig, CommandLine, Dialogue, DnsName, DnsQuery, Grpc, Http, Method, MySql, PostgreSql, Rcode,
    RecordType, SendExpect, Smtp, Statuses, StreamKind, Timing, TlsConfig, Transport, Udp, Xmpp,
};
use toml::Spanned;

use super::or;
use super::pool::within;
use super::reader::{Section, boolean, integer, text, texts};
use crate::problem::{Problem, nearest};
use crate::units::parse_address;

/// More often it would be load, less often no check.
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(3600);
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(1);
/// Results in a row that change a state.
const COUNTS: RangeInclusive<u64> = 1..=100;
/// Longest text that is said to a service or looked for in its answer, in bytes.
const TEXT_BYTES_MAX: usize = 1024;
/// Most arguments of a program.
const ARGUMENTS_MAX: usize = 64;

/// Keys that belong to some kinds alone.
const KEYS: [(&str, &[&str]); 19] = [
    ("user", &["postgresql", "mysql"]),
    ("database", &["postgresql", "mysql"]),
    ("send", &["send_expect", "udp"]),
    ("expect", &["send_expect", "udp", "http"]),
    ("goodbye", &["send_expect"]),
    ("method", &["http"]),
    ("path", &["http"]),
    ("host", &["http", "grpc"]),
    ("status", &["http"]),
    ("service", &["grpc"]),
    ("helo", &["smtp"]),
    ("domain", &["xmpp"]),
    ("stream", &["xmpp"]),
    ("name", &["dns"]),
    ("record", &["dns"]),
    ("rcode", &["dns"]),
    ("transport", &["dns"]),
    ("command", &["command"]),
    (
        "tls",
        &["tls", "send_expect", "http", "grpc", "postgresql", "mysql", "redis", "smtp", "ftp", "xmpp", "dns"],
    ),
];

/// `None`: the pool has no check, or one that is reported as wrong.
pub(super) fn read(mut section: Section<'_, '_>) -> Option<CheckConfig> {
    let is_there = section.is_there();
    let kind = section.required("kind", "\"tcp\"", text(kind));
    let name = kind.as_ref().map(|kind| *kind.get_ref());
    let at = section.start();
    let default = Timing::default();
    let interval = or(section.value("interval", text(within(INTERVALS))), default.interval);
    let fast = section.value("fast_interval", text(within(INTERVALS)));
    let timing = Timing {
        interval,
        fast_interval: or(fast.clone(), default.fast_interval.min(interval)),
        rise: or(section.value("rise", integer(COUNTS)), default.rise),
        fall: or(section.value("fall", integer(COUNTS)), default.fall),
    };
    if let Some(fast) = fast.filter(|fast| *fast.get_ref() > interval) {
        let problem = Problem::new(
            "`pool.check.fast_interval` is longer than `pool.check.interval`",
            "write a shorter one: it is for when a state may be about to change",
        );
        section.reader().report(fast.span().start, problem);
    }
    let timeout = or(section.value("timeout", text(within(TIMEOUTS))), TIMEOUT_DEFAULT);
    let address = section.value("address", text(parse_target)).map(Spanned::into_inner);
    let port = section.value("port", integer(1..=65_535)).map(Spanned::into_inner);
    let texts = Texts::read(&mut section);
    if let Some(name) = name {
        let strange = |(key, kinds): &&(&str, &[&str])| section.has(key) && !kinds.contains(&name);
        for (key, kinds) in KEYS.iter().filter(strange).collect::<Vec<_>>() {
            let problem = Problem::new(
                format!("`pool.check.{key}` does nothing for the kind \"{name}\""),
                format!("remove it; it is for {}", kinds.join(", ")),
            );
            section.reader().report(at, problem);
        }
    }
    let tls = read_tls(section.section("tls"));
    let is_reported = texts.is_wrong;
    let dialogue = name.map(|name| texts.dialogue(name));
    if let Some(Err(problem)) = dialogue.as_ref().filter(|_| !is_reported) {
        section.reader().report(at, problem.clone());
    }
    let dialogue = dialogue.and_then(Result::ok);
    if let (Some(dialogue), Some(TlsConfig { starttls: true, .. })) = (&dialogue, &tls)
        && !dialogue.has_starttls()
    {
        let hint = match dialogue {
            Dialogue::PostgreSql(_) | Dialogue::MySql(_) => {
                "remove it: TLS is always asked for in its own protocol"
            }
            _ => "remove it, and TLS begins at once; STARTTLS is for smtp, ftp, xmpp",
        };
        let message = format!("`pool.check.tls.starttls` does nothing for the kind \"{}\"", dialogue.kind());
        section.reader().report(at, Problem::new(message, hint));
    }
    if let (Some(Dialogue::Dns(DnsQuery { transport: Transport::Udp, .. })), Some(_)) = (&dialogue, &tls) {
        let hint = "write transport = \"tcp\" for DNS over TLS, or remove [pool.check.tls]";
        section.reader().report(at, Problem::new("there is no DNS over TLS by datagrams", hint));
    }
    section.finish(&[]);
    dialogue.filter(|_| is_there).map(|dialogue| CheckConfig {
        dialogue,
        timing,
        timeout,
        address,
        port,
        tls,
        proxy: None,
    })
}

fn kind(text: &str) -> Result<&'static str, Problem> {
    Dialogue::KINDS.into_iter().find(|known| *known == text).ok_or_else(|| {
        let hint = match nearest(text, Dialogue::KINDS) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => format!("there are {}", Dialogue::KINDS.join(", ")),
        };
        Problem::new(format!("there is no kind of check {text:?}"), hint)
    })
}

fn parse_target(text: &str) -> Result<SocketAddr, Problem> {
    let address = parse_address(text)?;
    if address.ip().is_unspecified() || address.port() == 0 {
        let hint = "write \"10.0.0.1:8008\"; `port` alone asks another port of each resource";
        return Err(Problem::new(format!("nobody can connect to {address}"), hint));
    }
    Ok(address)
}

fn read_tls(mut section: Section<'_, '_>) -> Option<TlsConfig> {
    let is_there = section.is_there();
    let default = TlsConfig::default();
    let tls = TlsConfig {
        server_name: section.value("server_name", text(server_name)).map(Spanned::into_inner),
        verify: or(section.value("verify", boolean), default.verify),
        ca: section.value("ca", text(|path| Ok::<_, Problem>(path.into()))).map(Spanned::into_inner),
        starttls: or(section.value("starttls", boolean), default.starttls),
    };
    section.finish(&[]);
    is_there.then_some(tls)
}

fn server_name(text: &str) -> Result<String, Problem> {
    if checks::is_server_name(text) {
        return Ok(text.to_owned());
    }
    Err(Problem::new(format!("{text:?} is no host name"), "write one, as \"db.example.com\""))
}

/// The values of all kinds.
#[derive(Default)]
struct Texts {
    user: Option<String>,
    database: Option<String>,
    send: Option<Vec<u8>>,
    expect: Option<Vec<u8>>,
    goodbye: Option<Vec<u8>>,
    method: Option<Method>,
    path: Option<http::Uri>,
    host: Option<String>,
    statuses: Option<Statuses>,
    service: Option<String>,
    helo: Option<String>,
    domain: Option<String>,
    stream: Option<StreamKind>,
    name: Option<DnsName>,
    record: Option<RecordType>,
    rcode: Option<Rcode>,
    transport: Option<Transport>,
    command: Option<Vec<String>>,
    /// One that was there is wrong and reported, and so not missing.
    is_wrong: bool,
}

impl Texts {
    fn read(section: &mut Section<'_, '_>) -> Self {
        let mut is_wrong = false;
        macro_rules! value {
            ($key:literal, $parse:expr) => {{
                let value = section.value($key, $parse).map(Spanned::into_inner);
                is_wrong |= value.is_none() && section.has($key);
                value
            }};
        }
        let stream = [("client", StreamKind::Client), ("server", StreamKind::Server)];
        let transport = [("udp", Transport::Udp), ("tcp", Transport::Tcp)];
        Self {
            user: value!("user", text(word)),
            database: value!("database", text(word)),
            send: value!("send", text(bytes)),
            expect: value!("expect", text(bytes)),
            goodbye: value!("goodbye", text(bytes)),
            method: value!("method", text(one_of(Method::ALL.map(|method| (method.name(), method))))),
            path: value!("path", text(path)),
            host: value!("host", text(host)),
            statuses: value!("status", text(statuses)),
            service: value!("service", text(word_or_none)),
            helo: value!("helo", text(word)),
            domain: value!("domain", text(word)),
            stream: value!("stream", text(one_of(stream))),
            name: value!("name", text(dns_name)),
            record: value!("record", text(one_of_all(RecordType::ALL, RecordType::name))),
            rcode: value!("rcode", text(one_of_all(Rcode::ALL, Rcode::name))),
            transport: value!("transport", text(one_of(transport))),
            command: value!("command", texts(argument)),
            is_wrong,
        }
    }

    fn dialogue(self, kind: &str) -> Result<Dialogue, Problem> {
        let missing = |key: &str, hint: &str| Problem::new(format!("`pool.check.{key}` is missing"), hint);
        Ok(match kind {
            "tcp" => Dialogue::Tcp,
            "tls" => Dialogue::Tls,
            "redis" => Dialogue::Redis,
            "ftp" => Dialogue::Ftp,
            "postgresql" => Dialogue::PostgreSql(PostgreSql { user: self.user, database: self.database }),
            "mysql" => {
                let hint = "add user = \"trimtab\", and make it without a password: CREATE USER trimtab@'ADDRESS OF THIS \
                            HOST'; a server blocks hosts whose clients do not log in";
                let user = self.user.ok_or_else(|| missing("user", hint))?;
                Dialogue::MySql(MySql { user, database: self.database })
            }
            "send_expect" => {
                let texts = SendExpect {
                    send: self.send.unwrap_or_default(),
                    expect: self.expect.unwrap_or_default(),
                    goodbye: self.goodbye.unwrap_or_default(),
                };
                if texts.send.is_empty() && texts.expect.is_empty() {
                    return Err(missing("expect", "add send, expect or both; kind = \"tcp\" says nothing"));
                }
                Dialogue::SendExpect(texts)
            }
            "http" => {
                let host = self.host.and_then(|host| http::HeaderValue::from_str(&host).ok());
                Dialogue::Http(Http {
                    method: self.method.unwrap_or_default(),
                    path: self.path.unwrap_or_else(|| http::Uri::from_static("/")),
                    host,
                    statuses: self.statuses.unwrap_or_default(),
                    expect: self.expect.unwrap_or_default(),
                })
            }
            "grpc" => {
                Dialogue::Grpc(Grpc { service: self.service.unwrap_or_default(), authority: self.host })
            }
            "smtp" => Dialogue::Smtp(Smtp { helo: self.helo }),
            "xmpp" => {
                let domain = self.domain.ok_or_else(|| missing("domain", "add domain = \"example.com\""))?;
                Dialogue::Xmpp(Xmpp { domain, stream: self.stream.unwrap_or_default() })
            }
            "dns" => Dialogue::Dns(DnsQuery {
                name: self.name.ok_or_else(|| missing("name", "add name = \"example.com\""))?,
                record: self.record.unwrap_or(RecordType::Soa),
                rcode: self.rcode.unwrap_or(Rcode::NoError),
                transport: self.transport.unwrap_or_default(),
            }),
            "udp" => {
                let send = self
                    .send
                    .ok_or_else(|| missing("send", "add what the datagram says: send = \"ping\""))?;
                Dialogue::Udp(Udp { send, expect: self.expect })
            }
            _ => {
                let hint = "add command = [\"/usr/lib/nagios/plugins/check_ldap\", \"-H\", \"{address}\"]";
                let mut words = self.command.unwrap_or_default().into_iter();
                let program = words.next().ok_or_else(|| missing("command", hint))?;
                let arguments: Vec<String> = words.collect();
                if arguments.len() > ARGUMENTS_MAX {
                    let message = format!("`pool.check.command` has {} arguments", arguments.len());
                    return Err(Problem::new(message, format!("keep it to {ARGUMENTS_MAX}: write a script")));
                }
                Dialogue::Command(CommandLine { program, arguments })
            }
        })
    }
}

/// Something printable, of one line.
fn word(text: &str) -> Result<String, Problem> {
    if text.is_empty() || text.len() > 255 || text.chars().any(char::is_control) {
        let message = format!("{text:?} is empty, too long or has control characters in it");
        return Err(Problem::new(message, "write 1 to 255 printable characters"));
    }
    Ok(text.to_owned())
}

fn word_or_none(text: &str) -> Result<String, Problem> {
    if text.is_empty() { Ok(String::new()) } else { word(text) }
}

fn host(text: &str) -> Result<String, Problem> {
    match http::uri::Authority::from_str(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => {
            Err(Problem::new(format!("{text:?} is no host"), "write \"example.com\" or \"example.com:8080\""))
        }
    }
}

fn path(text: &str) -> Result<http::Uri, Problem> {
    let parsed = http::uri::PathAndQuery::from_str(text).ok().filter(|_| text.starts_with('/'));
    parsed.map(http::Uri::from).ok_or_else(|| {
        Problem::new(format!("{text:?} is no path"), "write one that begins with a slash, as \"/healthz\"")
    })
}

fn statuses(text: &str) -> Result<Statuses, Problem> {
    text.parse().map_err(|error: checks::StatusesError| {
        Problem::new(error.to_string(), "write \"200\", \"200-399\" or \"200,204\"")
    })
}

fn dns_name(text: &str) -> Result<DnsName, Problem> {
    text.parse().map_err(|error: checks::DnsNameError| {
        Problem::new(error.to_string(), "write one, as \"example.com\"; \".\" is the root")
    })
}

fn bytes(text: &str) -> Result<Vec<u8>, Problem> {
    let bytes = checks::unescape(text).map_err(|error| {
        Problem::new(
            error.to_string(),
            "in a text of double quotes, TOML wants each backslash twice; 'single quotes' do not",
        )
    })?;
    if bytes.len() > TEXT_BYTES_MAX {
        let message = format!("it has {} bytes", bytes.len());
        return Err(Problem::new(message, format!("keep it to {TEXT_BYTES_MAX}")));
    }
    Ok(bytes)
}

fn argument(text: &str) -> Result<String, Problem> {
    if text.contains('\0') || text.len() > TEXT_BYTES_MAX {
        return Err(Problem::new(
            "this can be no argument of a program",
            "write a shorter one, without \\u0000",
        ));
    }
    Ok(text.to_owned())
}

fn one_of<T: Copy, const N: usize>(all: [(&'static str, T); N]) -> impl FnOnce(&str) -> Result<T, Problem> {
    move |text| {
        all.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
            let names: Vec<String> = all.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            Problem::new(format!("there is no {text:?} here"), format!("write {}", names.join(" or ")))
        })
    }
}

fn one_of_all<T: Copy>(
    all: &'static [T],
    name: fn(T) -> &'static str,
) -> impl FnOnce(&str) -> Result<T, Problem> {
    move |text| {
        all.iter().copied().find(|one| name(*one) == text).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|one| name(*one)).collect();
            Problem::new(format!("there is no {text:?} here"), format!("there are {}", names.join(", ")))
        })
    }
}
