//! What a line says. Pure: records and names in, text out.

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{AccessLogFormat, Chosen, Names, Protocol, Record};

impl Protocol {
    const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Adds the line of a flow that ended at `at`.
pub(super) fn flow(
    out: &mut String,
    format: AccessLogFormat,
    names: &Names,
    at: SystemTime,
    record: &Record,
) {
    let (listener, pools) = match names.get(usize::from(record.listener)) {
        Some((listener, pools)) => (listener.as_str(), pools.as_slice()),
        None => ("", [].as_slice()),
    };
    let pool = pools.get(usize::from(record.target)).map_or("", String::as_str);
    let line = Line { at: Utc(at), listener, pool, record };
    // Writing to a String does not fail.
    let _ = match format {
        AccessLogFormat::Json => line.json(out),
        AccessLogFormat::Line => line.words(out),
    };
}

/// Adds that so many lines were lost before this moment.
pub(super) fn lost(out: &mut String, format: AccessLogFormat, at: SystemTime, count: u64) {
    let at = Utc(at);
    let _ = match format {
        AccessLogFormat::Json => writeln!(out, "{{\"time\":\"{at}\",\"lost\":{count}}}"),
        AccessLogFormat::Line => writeln!(out, "{at} lost={count}"),
    };
}

struct Line<'a> {
    at: Utc,
    listener: &'a str,
    pool: &'a str,
    record: &'a Record,
}

impl Line<'_> {
    fn json(&self, out: &mut String) -> fmt::Result {
        let Self { at, record, .. } = self;
        write!(out, "{{\"time\":\"{at}\",\"protocol\":\"{}\",\"listener\":", record.protocol.name())?;
        json_text(out, self.listener)?;
        out.push_str(",\"pool\":");
        json_text(out, self.pool)?;
        write!(out, ",\"route\":{},\"client\":", record.target)?;
        json_option(out, record.client, |out, client| write!(out, "\"{client}\""))?;
        out.push_str(",\"resource\":");
        json_option(out, record.chosen.as_ref(), |out, chosen| json_text(out, chosen.id.as_str()))?;
        out.push_str(",\"backend\":");
        json_option(out, record.chosen.as_ref(), |out, chosen| write!(out, "\"{}\"", chosen.address))?;
        out.push_str(",\"policy\":");
        json_option(out, record.chosen.as_ref(), |out, chosen| write!(out, "\"{}\"", chosen.policy))?;
        out.push_str(",\"affinity\":");
        let kept = record.chosen.as_ref().and_then(|chosen| chosen.kept);
        json_option(out, kept, |out, kept| write!(out, "\"{}\"", kept.label()))?;
        out.push_str(",\"generation\":");
        json_option(out, record.chosen.as_ref(), |out, chosen| write!(out, "{}", chosen.generation))?;
        out.push_str(",\"cost\":");
        json_option(out, record.chosen.as_ref().and_then(Chosen::finite_cost), |out, cost| {
            write!(out, "{cost}")
        })?;
        write!(
            out,
            ",\"retries\":{},\"bytes_to_backend\":{},\"bytes_to_client\":{},\"queue_seconds\":{},\"connect_seconds\":",
            record.retries,
            record.to_backend,
            record.to_client,
            Seconds(record.queue_micros)
        )?;
        json_option(out, record.connect_micros, |out, micros| write!(out, "{}", Seconds(micros)))?;
        out.push_str(",\"first_byte_seconds\":");
        json_option(out, record.first_byte_micros, |out, micros| write!(out, "{}", Seconds(micros)))?;
        write!(out, ",\"seconds\":{},\"end\":\"{}\",\"shed\":", Seconds(record.total_micros), record.end)?;
        json_option(out, record.shed, |out, shed| write!(out, "\"{shed}\""))?;
        writeln!(out, ",\"worker\":{}}}", record.worker)
    }

    fn words(&self, out: &mut String) -> fmt::Result {
        let Self { at, listener, pool, record } = self;
        write!(out, "{at} {} {listener} ", record.protocol.name())?;
        match record.client {
            Some(client) => write!(out, "{client} -> ")?,
            None => out.push_str("- -> "),
        }
        match &record.chosen {
            Some(chosen) => {
                write!(out, "{pool}/{} {} by={}", chosen.id, chosen.address, chosen.policy)?;
                if let Some(kept) = chosen.kept {
                    write!(out, ",{}", kept.label())?;
                }
                write!(out, " generation={}", chosen.generation)?;
                if let Some(cost) = chosen.finite_cost() {
                    write!(out, " cost={cost}")?;
                }
            }
            None => write!(out, "{pool}/- -")?,
        }
        write!(
            out,
            " route={} retries={} to_backend={} to_client={} queue={}",
            record.target,
            record.retries,
            record.to_backend,
            record.to_client,
            Seconds(record.queue_micros)
        )?;
        for (name, micros) in [("connect", record.connect_micros), ("first_byte", record.first_byte_micros)] {
            match micros {
                Some(micros) => write!(out, " {name}={}", Seconds(micros))?,
                None => write!(out, " {name}=-")?,
            }
        }
        write!(out, " total={} end={}", Seconds(record.total_micros), record.end)?;
        if let Some(shed) = record.shed {
            write!(out, ",{shed}")?;
        }
        out.push('\n');
        Ok(())
    }
}

impl Chosen {
    /// JSON has no infinity, and nobody chooses one.
    fn finite_cost(&self) -> Option<f32> {
        self.cost.is_finite().then_some(self.cost)
    }
}

/// Microseconds as seconds, to the last of them.
struct Seconds(u64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// A moment as RFC 3339 has it, in UTC, with milliseconds.
struct Utc(SystemTime);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
        let millis = since.subsec_millis();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }
}

/// Year, month and day of a day after 1970-01-01, in the Gregorian calendar: counted in years that begin in March, so that
/// the day that leap years have comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    /// From 0000-03-01 to 1970-01-01, and in 400 years.
    const EPOCH: u64 = 719_468;
    const ERA: u64 = 146_097;
    let day = days + EPOCH;
    let (era, of_era) = (day / ERA, day % ERA);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, of_month)
}

fn json_option<T>(
    out: &mut String,
    value: Option<T>,
    write: impl FnOnce(&mut String, T) -> fmt::Result,
) -> fmt::Result {
    match value {
        Some(value) => write(out, value),
        None => out.write_str("null"),
    }
}

/// A JSON text (RFC 8259 §7).
fn json_text(out: &mut String, text: &str) -> fmt::Result {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => write!(out, "\\u{:04x}", u32::from(c))?,
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use allocation::{Kept, Policy};

    fn record() -> Record {
        Record {
            ended_micros: 0,
            worker: 1,
            listener: 0,
            target: 0,
            protocol: Protocol::Tcp,
            client: Some("10.0.0.1:40000".parse().unwrap()),
            chosen: Some(Chosen {
                id: "pg1".parse().unwrap(),
                address: "[2001:db8::1]:5432".parse().unwrap(),
                policy: Policy::Adaptive,
                kept: Some(Kept::Same),
                generation: 12,
                cost: 0.5,
            }),
            retries: 1,
            to_backend: 100,
            to_client: 2_000,
            queue_micros: 0,
            connect_micros: Some(123),
            first_byte_micros: None,
            total_micros: 61_000_001,
            end: "ended",
            shed: None,
        }
    }

    fn text(format: AccessLogFormat, record: &Record) -> String {
        let names = vec![("tcp://127.0.0.1:5432".to_owned(), vec!["sql".to_owned()])];
        let mut out = String::new();
        let at = UNIX_EPOCH + Duration::from_millis(1_795_992_400_123);
        flow(&mut out, format, &names, at, record);
        out
    }

    #[test]
    fn a_line_says_who_where_why_and_how() {
        assert_eq!(
            text(AccessLogFormat::Json, &record()),
            concat!(
                r#"{"time":"2026-11-29T22:46:40.123Z","protocol":"tcp","listener":"tcp://127.0.0.1:5432","pool":"sql","#,
                r#""route":0,"client":"10.0.0.1:40000","resource":"pg1","backend":"[2001:db8::1]:5432","#,
                r#""policy":"adaptive","affinity":"kept","generation":12,"cost":0.5,"retries":1,"#,
                r#""bytes_to_backend":100,"bytes_to_client":2000,"queue_seconds":0.000000,"#,
                r#""connect_seconds":0.000123,"first_byte_seconds":null,"seconds":61.000001,"#,
                r#""end":"ended","shed":null,"worker":1}"#,
                "\n"
            )
        );
        assert_eq!(
            text(AccessLogFormat::Line, &record()),
            concat!(
                "2026-11-29T22:46:40.123Z tcp tcp://127.0.0.1:5432 10.0.0.1:40000 -> sql/pg1 [2001:db8::1]:5432 ",
                "by=adaptive,kept generation=12 cost=0.5 route=0 retries=1 to_backend=100 to_client=2000 ",
                "queue=0.000000 connect=0.000123 first_byte=- total=61.000001 end=ended\n"
            )
        );
        let nobody = Record { client: None, chosen: None, end: "shed", shed: Some("queue_full"), ..record() };
        assert!(
            text(AccessLogFormat::Json, &nobody).contains(r#""client":null,"resource":null,"backend":null"#)
        );
        assert!(text(AccessLogFormat::Json, &nobody).contains(r#""end":"shed","shed":"queue_full""#));
        let words = text(AccessLogFormat::Line, &nobody);
        assert!(
            words.contains(" - -> sql/- - route=0 ") && words.ends_with(" end=shed,queue_full\n"),
            "{words}"
        );
    }

    #[test]
    fn any_text_is_a_json_text() {
        let mut out = String::new();
        json_text(&mut out, "a\"b\\c\nd\u{0}e\u{1f600}").unwrap();
        assert_eq!(out, "\"a\\\"b\\\\c\\u000ad\\u0000e\u{1f600}\"");
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        // Every day follows the one before it, for 400 years and all their leap days.
        let mut before = civil(0);
        for day in 1..=146_097 {
            let now = civil(day);
            let next = match before {
                (y, 12, 31) => (y + 1, 1, 1),
                (y, m, d) if d == days_in(y, m) => (y, m + 1, 1),
                (y, m, d) => (y, m, d + 1),
            };
            assert_eq!(now, next);
            before = now;
        }
        assert_eq!(before, (2370, 1, 1));
    }

    fn days_in(year: u64, month: u64) -> u64 {
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        match month {
            2 => 28 + u64::from(leap),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }
}
