//! `[[pool]]`: how a pool allocates, and what its listeners require.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use allocation::{Policy, PoolName, ProbeKnobs};
use checks::{CheckConfig, ProxyHeader};
use dataplane::{Connecting, PoolKnobs};
use flow::preface::proxy::Version;
use registry::{CRITERIA_MAX, Criterion, Knobs, PoolConfig, Requirements, SplitBy, SplitConfig, TABLES_MAX};
use toml::Spanned;

use super::reader::{Section, decimal, integer, text, texts};
use super::{ListenerConfig, check, limits, or, parse_policy, pool_name, tcp};
use crate::problem::Problem;
use crate::units::{duration_text, parse_duration};

/// A longer time in one of the knobs is a slip of the keyboard.
const KNOB_MAX: Duration = Duration::from_secs(24 * 3600);
/// Forecasts look ahead by at most so much.
const FORECAST_MAX: Duration = Duration::from_secs(6 * 3600);

/// What the dataplane is told of a pool, and how control checks its resources actively.
pub(super) type Told = ((Connecting, PoolKnobs), Option<CheckConfig>);

/// The pools, or `None` when the name of one is unknown (then a listener may name it); and what else is told of each.
pub(super) fn read(root: &mut Section<'_, '_>) -> Option<(Vec<PoolConfig>, Vec<Told>)> {
    let mut pools = Some((Vec::new(), Vec::new()));
    let mut lines: HashMap<PoolName, usize> = HashMap::new();
    let all = root.list("pool", |mut section| {
        let name = section.required("name", "\"sql\"", text(pool_name));
        if let Some(name) = &name {
            let line = section.reader().line(name.span().start);
            if let Some(first) = lines.insert(name.get_ref().clone(), line) {
                let hint = format!("the first is in line {first}; rename one or merge them");
                let message = format!("there are two pools named {:?}", name.get_ref().as_str());
                section.reader().report(name.span().start, Problem::new(message, hint));
            }
        }
        let known = name.map(Spanned::into_inner);
        // Read on without a name: every problem is found in one pass.
        let unnamed = || "unnamed".parse::<PoolName>().ok();
        let told = (tcp::read_pool(&mut section), limits::of_pool(&mut section));
        let proxy = told.0.proxy.map(|version| match version {
            Version::V1 => ProxyHeader::V1,
            Version::V2 => ProxyHeader::V2,
        });
        // Another port is another service, which nobody said to expect a header.
        let check = check::read(section.section("check")).map(|check| {
            let own = check.address.is_none() && check.port.is_none();
            CheckConfig { proxy: proxy.filter(|_| own), ..check }
        });
        let read = known.clone().or_else(unnamed).map(|name| read_one(&mut section, name));
        match read.map(|pool| PoolConfig { checked: check.is_some(), ..pool }) {
            Some(pool) if known.is_some() => {
                if let Some((pools, all)) = &mut pools {
                    pools.push(pool);
                    all.push((told, check));
                }
            }
            _ => pools = None,
        }
        section.finish(&[]);
    });
    pools.filter(|_| all)
}

/// The pools whose resources are sent a header of this version.
pub(super) fn with_header_of<'p>(
    version: Version,
    pools: Option<&'p [PoolConfig]>,
    told: Option<&[Told]>,
) -> Vec<&'p PoolName> {
    let all = pools.unwrap_or_default().iter().zip(told.unwrap_or_default());
    all.filter(|(_, ((connecting, _), _))| connecting.proxy == Some(version))
        .map(|(pool, _)| &pool.name)
        .collect()
}

fn read_one(section: &mut Section<'_, '_>, name: PoolName) -> PoolConfig {
    let policy = or(section.value("policy", text(parse_policy)), Policy::default());
    let forecast = section.value("forecast", text(within(Duration::ZERO..=FORECAST_MAX)));
    let limit = section.value("flows_max_per_resource", integer(0..=u64::from(u32::MAX)));
    let defaults = PoolConfig::new(name, policy);
    PoolConfig {
        flows_max_default: or(limit, 0),
        knobs: read_knobs(section, defaults.knobs),
        requires: requirements(section),
        criteria: criteria(section, policy),
        // Zero stands for none.
        forecast: forecast.map(Spanned::into_inner).filter(|ahead| !ahead.is_zero()),
        split: read_split(section.section("split")),
        ..defaults
    }
}

fn read_knobs(section: &mut Section<'_, '_>, default: Knobs) -> Knobs {
    let time = || within(Duration::ZERO..=KNOB_MAX);
    let aggression = section.value("slow_start_aggression", decimal(0.1..=10.0));
    let penalty = section.value("error_utilization_penalty", decimal(0.0..=100.0));
    let bounded = section.value("bounded_load", bounded_load);
    Knobs {
        slow_start: or(section.value("slow_start", text(time())), default.slow_start),
        slow_start_aggression: or(aggression, f64::from(default.slow_start_aggression)) as f32,
        blackout: or(section.value("blackout_period", text(time())), default.blackout),
        weight_expiration: or(section.value("weight_expiration", text(time())), default.weight_expiration),
        error_penalty: or(penalty, f64::from(default.error_penalty)) as f32,
        bounded_load: or(bounded, f64::from(default.bounded_load)) as f32,
        probes: read_probes(section.section("probes"), default.probes),
    }
}

/// 0 switches it off; below 1 nobody could take a fair part.
fn bounded_load(value: &toml::de::DeValue<'_>) -> Result<f64, Problem> {
    match decimal(0.0..=100.0)(value)? {
        factor if factor == 0.0 || factor >= 1.0 => Ok(factor),
        factor => Err(Problem::new(
            format!("{factor} is less than a fair part"),
            "write 1.25 (a quarter more than the fair part), or 0 for no bound",
        )),
    }
}

fn read_probes(mut section: Section<'_, '_>, default: ProbeKnobs) -> ProbeKnobs {
    let knobs = ProbeKnobs {
        pool_size: or(section.value("pool_size", integer(2..=256)), default.pool_size),
        age_max: or(
            section.value("age_max", text(within(Duration::from_millis(1)..=Duration::from_secs(60)))),
            default.age_max,
        ),
        per_flow: or(section.value("per_flow", decimal(0.0..=16.0)), default.per_flow),
        remove_per_flow: or(section.value("remove_per_flow", decimal(0.0..=16.0)), default.remove_per_flow),
        delta: or(section.value("delta", decimal(0.0..=16.0)), default.delta),
        quantile: or(section.value("quantile", decimal(0.0..=1.0)), default.quantile),
    };
    section.finish(&[]);
    knobs
}

/// `requires = ["role=writer", "tls", "version>=2"]`, of a pool or a listener.
pub(super) fn requirements(section: &mut Section<'_, '_>) -> Requirements {
    let parse = |text: &str| {
        text.parse().map_err(|error: registry::RequirementError| {
            Problem::new(error.to_string(), "write KEY, KEY=VALUE, KEY!=VALUE or KEY>=NUMBER")
        })
    };
    let all = section.value("requires", texts(parse));
    all.map(|all| all.into_inner().into_iter().collect()).unwrap_or_default()
}

fn criteria(section: &mut Section<'_, '_>, policy: Policy) -> Vec<Criterion> {
    let parse = |text: &str| {
        text.parse::<Criterion>().map_err(|error| {
            let hint = "write least(METRIC) or most(METRIC, 1h), with tolerance N% or spill N% where wanted";
            Problem::new(error.to_string(), hint)
        })
    };
    let example = "[\"least(memory, 10m)\"]";
    let read = match policy {
        Policy::Criteria => section.required("criteria", example, texts(parse)),
        _ => section.value("criteria", texts(parse)),
    };
    let Some(read) = read else { return Vec::new() };
    let (at, criteria) = (read.span().start, read.into_inner());
    let hint = format!("write 1 to {CRITERIA_MAX} criteria: criteria = {example}");
    if policy != Policy::Criteria {
        let message = format!("`pool.criteria` does nothing under the policy \"{policy}\"");
        section.reader().report(at, Problem::new(message, "write policy = \"criteria\", or remove it"));
    } else if criteria.is_empty() || criteria.len() > CRITERIA_MAX {
        let message = format!("`pool.criteria` has {} entries", criteria.len());
        section.reader().report(at, Problem::new(message, hint));
    }
    criteria
}

/// `[pool.split]`.
fn read_split(mut section: Section<'_, '_>) -> Option<SplitConfig> {
    if !section.is_there() {
        section.finish(&[]);
        return None;
    }
    let as_problem = |error: registry::SplitError| {
        let message = format!("`pool.split.versions`: {error}");
        Problem::new(message, "write versions = [\"1.9\", \"2.0=10%\"], the baseline first")
    };
    let versions = section.required("versions", "[\"1.9\", \"2.0=10%\"]", texts(|text| Ok(text.to_owned())));
    let by = section.value("by", text(split_by));
    let time = || within(Duration::ZERO..=KNOB_MAX);
    let default = registry::AbortConfig::default();
    let abort = registry::AbortConfig {
        after: or(section.value("abort_after", text(time())), default.after),
        errors: or(section.value("abort_errors", decimal(0.0..=1.0)), f64::from(default.errors)) as f32,
        latency: or(section.value("abort_latency", decimal(0.0..=100.0)), f64::from(default.latency)) as f32,
        utilization: or(
            section.value("abort_utilization", decimal(0.0..=100.0)),
            f64::from(default.utilization),
        ) as f32,
        flows_min: or(section.value("abort_flows_min", integer(1..=1_000_000)), default.flows_min),
    };
    let split = versions.and_then(|versions| {
        let (at, versions) = (versions.span().start, versions.into_inner());
        let split = SplitConfig::parse(&versions, or(by, SplitBy::default()), abort);
        split.map_err(|error| section.reader().report(at, as_problem(error))).ok()
    });
    section.finish(&[]);
    split
}

fn split_by(text: &str) -> Result<SplitBy, Problem> {
    match text {
        "share" => Ok(SplitBy::Share),
        "client" => Ok(SplitBy::Client),
        _ => Err(Problem::new(format!("{text:?} divides nothing"), "write \"share\" or \"client\"")),
    }
}

/// Gives each pool a table for every requirement of its listeners.
pub(super) fn add_tables(pools: &mut [PoolConfig], listeners: &[ListenerConfig]) {
    for pool in pools {
        let of_pool = listeners.iter().filter(|listener| listener.pools().any(|name| *name == pool.name));
        for requires in of_pool.map(|listener| &listener.requires).filter(|requires| !requires.is_empty()) {
            if !pool.tables.contains(requires) {
                pool.tables.push(requires.clone());
            }
        }
    }
}

/// A pool whose listeners have more different requirements than tables are kept for.
pub(super) fn too_many_tables(pools: &[PoolConfig]) -> Option<Problem> {
    let pool = pools.iter().find(|pool| pool.tables.len() + 1 > TABLES_MAX)?;
    let message =
        format!("the listeners of pool {} have {} different `requires`", pool.name, pool.tables.len());
    Some(Problem::new(message, format!("a pool takes {} beyond its own: use another pool", TABLES_MAX - 1)))
}

pub(super) fn within(range: RangeInclusive<Duration>) -> impl FnOnce(&str) -> Result<Duration, Problem> {
    move |text| {
        let duration = parse_duration(text)?;
        if range.contains(&duration) {
            return Ok(duration);
        }
        let hint =
            format!("write \"{}\" to \"{}\"", duration_text(*range.start()), duration_text(*range.end()));
        Err(Problem::new(format!("{text:?} is out of range"), hint))
    }
}
