use std::collections::BTreeSet;

use flow::preface::proxy::Version;

use super::*;

const EXAMPLE: &str = include_str!("../../../../deploy/trimtab.example.toml");

/// What a file's errors print.
fn errors(file: &str) -> String {
    match Config::parse(file.as_bytes()) {
        Ok(config) => panic!("accepted as {config:?}"),
        Err(errors) => errors.render("f"),
    }
}

/// A file in which all that is needed stands after `head`.
fn with_a_listener(head: &str) -> String {
    format!(
        "{head}\n[[pool]]\nname = \"sql\"\n[[listener]]\nbind = \"tcp://127.0.0.1:5432\"\npool = \"sql\"\n"
    )
}

#[test]
fn the_least_file_takes_every_default() {
    let config = Config::parse(with_a_listener("").as_bytes()).expect("the least file");
    let loopback =
        |port| EndpointConfig { listen: SocketAddr::from(([127, 0, 0, 1], port)), insecure: false };
    assert_eq!(
        config,
        Config {
            control: loopback(7400),
            pull: control::PullConfig::default(),
            security: control::SecurityConfig::default(),
            http: loopback(7480),
            dataplane: DataplaneConfig::default(),
            decisions: DecisionsConfig::default(),
            access_log: None,
            notices: NoticesConfig::default(),
            store: None,
            pools: vec![PoolConfig::new("sql".parse().unwrap(), Policy::Adaptive)],
            connecting: vec![dataplane::Connecting::default()],
            pool_knobs: vec![dataplane::PoolKnobs::default()],
            checks: vec![None],
            listeners: vec![ListenerConfig {
                bind: "tcp://127.0.0.1:5432".parse().unwrap(),
                last_port: None,
                proxy_protocol: None,
                routes: Vec::new(),
                further: Vec::new(),
                pool: "sql".parse().unwrap(),
                requires: Requirements::default(),
                tcp: dataplane::ListenerTcp::default(),
                limits: dataplane::ListenerLimits::default(),
                udp: dataplane::UdpConfig::default(),
            }],
            upstreams: Vec::new(),
            providers: Vec::new(),
            dns: Vec::new(),
        }
    );
}

#[test]
fn a_store_has_a_path_or_is_none() {
    let store = |lines: &str| Config::parse(with_a_listener(lines).as_bytes()).expect("a file").store;
    let path = "/var/lib/trimtab/trimtab.db";
    assert_eq!(store(&format!("[store]\npath = \"{path}\"\n")), Some(path.into()));
    assert_eq!(store("[store]\npath = \"\"\n"), None);
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let least = Config::parse(with_a_listener("").as_bytes()).expect("the least file");
    assert_eq!(Config::parse(EXAMPLE.as_bytes()).expect("the example"), least);

    // Keys without a default stand in comments.
    let is_key = |line: &str| {
        line.starts_with('[') || line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', '-']))
    };
    let uncommented = |line: &str| match line.strip_prefix("# ") {
        Some(rest) if is_key(rest) => format!("{rest}\n"),
        _ => format!("{line}\n"),
    };
    let all: String = EXAMPLE.lines().map(uncommented).collect();
    let document = DeTable::parse(&all).expect("the example is TOML with every key in it");
    let mut reader = Reader::new(&all, &[]);
    Config::read(&mut reader, document.get_ref());
    let mut present = BTreeSet::new();
    add_keys("", document.get_ref(), &mut present);
    assert_eq!(&present, reader.asked());
}

#[test]
fn limits_queues_affinity_and_the_access_log() {
    let file = "[access_log]\npath = \"-\"\nformat = \"line\"\n\
        [[pool]]\nname = \"sql\"\nflows_max = 100\naffinity = \"client\"\naffinity_for = \"10m\"\n\
        [pool.queue]\ndeadline = \"2s\"\n\
        [[pool]]\nname = \"web\"\naffinity_for = \"1d\"\n[pool.queue]\nlength = 0\n\
        [[listener]]\nbind = \"tcp://127.0.0.1:5432\"\npool = \"sql\"\n[listener.limits]\nflows = 7\n\
        flows_per_client = 5\nnew_flows_per_second = 1000\nnew_flows_per_client_per_second = 10\n";
    let config = Config::parse(file.as_bytes()).expect("a good file");
    let queue = dataplane::QueueKnobs { length: 1_000, deadline: Duration::from_secs(2) };
    let affinity = Some(Duration::from_secs(600));
    assert_eq!(
        config.pool_knobs,
        [
            dataplane::PoolKnobs { flows_max: 100, queue: Some(queue), affinity },
            dataplane::PoolKnobs::default()
        ]
    );
    let limits = dataplane::ListenerLimits {
        flows: 7,
        flows_per_client: 5,
        new_flows_per_second: 1_000,
        new_flows_per_client_per_second: 10,
    };
    assert_eq!(config.listeners[0].limits, limits);
    let log = config.access_log.expect("a log");
    assert_eq!((log.to, log.format), (dataplane::AccessLogTo::Stdout, dataplane::AccessLogFormat::Line));

    let wrong = "[access_log]\nformat = \"xml\"\nrotate = 1\n[[pool]]\nname = \"sql\"\naffinity = \"cookie\"\n\
        affinity_for = \"0s\"\n[pool.queue]\ndeadline = \"2h\"\n[[listener]]\nbind = \"tcp://127.0.0.1:5432\"\n\
        pool = \"sql\"\n[listener.limits]\nnew_flows_per_second = 1_000_001\nflows_per_clients = 1\n";
    let errors = errors(wrong);
    for expected in [
        "f:2:10: error: `access_log.format`: there is no format \"xml\"\n  hint: write \"json\" or \"line\"",
        "f:3:1: error: there is no key `access_log.rotate`",
        "f:6:12: error: `pool.affinity`: there is no affinity \"cookie\"\n  hint: write \"off\" or \"client\"",
        "f:7:16: error: `pool.affinity_for`: \"0s\" is out of range\n  hint: write \"1s\" to \"30d\"",
        "f:9:12: error: `pool.queue.deadline`: \"2h\" is out of range\n  hint: write \"1ms\" to \"1h\"",
        "f:14:24: error: `listener.limits.new_flows_per_second`: 1000001 is out of range",
        "f:15:1: error: there is no key `listener.limits.flows_per_clients`\n  hint: did you mean `flows_per_client`?",
    ] {
        assert!(errors.contains(expected), "{expected}\n{errors}");
    }
}

#[test]
fn listeners_of_datagrams() {
    let file = |lines: &str| {
        format!(
            "[[pool]]\nname = \"dns\"\n[[listener]]\nbind = \"tcp://127.0.0.1:53\"\npool = \"dns\"\n{lines}"
        )
    };
    let udp = "[[listener]]\nbind = \"udp://127.0.0.1:53\"\npool = \"dns\"\n[listener.udp]\nidle_timeout = \"5s\"\nresponses = 1\n\
        requests = 2\nflows_max = 3\nquic = true\nquic_server_id = \"id:4\"\nproxy_header = \"every\"\n";
    let config = Config::parse(file(udp).as_bytes()).expect("connections and datagrams share a port");
    let expected = dataplane::UdpConfig {
        idle_timeout: Duration::from_secs(5),
        responses: 1,
        requests: 2,
        flows_max: 3,
        quic: true,
        quic_server_id: Some(dataplane::ServerIdForm::Id(4)),
        quic_keys: None,
        proxy_header: dataplane::ProxyHeader::Every,
    };
    assert_eq!(config.listeners[1].udp, expected);
    for (lines, expected) in [
        (
            "[listener.udp]\nresponses = 1\n",
            "f:6:1: error: `listener.udp` is for listeners of datagrams\n  hint: write bind = \"udp://…\", or remove \
             [listener.udp]",
        ),
        (
            "[[listener]]\nbind = \"udp://127.0.0.1:53\"\npool = \"dns\"\n[listener.udp]\nidle_timeout = \"0s\"\n",
            "f:10:16: error: `listener.udp.idle_timeout`: \"0s\" leaves no time\n  hint: a flow of datagrams has no other \
             end: write at least \"1ms\"",
        ),
        (
            "[[listener]]\nbind = \"udp://127.0.0.1:53\"\npool = \"dns\"\n[listener.udp]\nquic_server_id = \"ipv4\"\n",
            "f:10:18: error: `listener.udp.quic_server_id` without quic = true\n  hint: add quic = true before it",
        ),
        (
            "[[listener]]\nbind = \"udp://127.0.0.1:53\"\npool = \"dns\"\n[listener.udp]\nquic = true\nquic_server_id = \"id:16\"\n",
            "f:11:18: error: `listener.udp.quic_server_id`: \"id:16\" is no form of a server id\n  hint: write \"ipv4\", \
             \"ipv4-port\", or \"id:4\" for resources whose ids are 4 octets in hexadecimal",
        ),
        (
            "[[listener]]\nbind = \"tcp://127.0.0.1:53\"\npool = \"dns\"\n",
            "f:7:8: error: `listener.bind`: 127.0.0.1:53 is taken already\n  hint: `listener.bind` has it (line 4); give \
             one of them another port",
        ),
    ] {
        assert_eq!(errors(&file(lines)), format!("{expected}\n"), "for {lines}");
    }
}

#[test]
fn keys_of_server_ids() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("quic.keys");
    let key = "8f95f09245765f80256934e50c66207f";
    std::fs::write(&path, format!("# old\n0 {key}\n\n6\t00112233445566778899AABBCCDDEEFF # new\n")).unwrap();
    let file = |form: &str, lines: &str| {
        format!(
            "[[pool]]\nname = \"q\"\n[[listener]]\nbind = \"udp://127.0.0.1:443\"\npool = \"q\"\n[listener.udp]\nquic = true\n\
             {form}quic_keys_file = \"{}\"\n{lines}",
            path.display()
        )
    };
    let (ipv4, long) = ("quic_server_id = \"ipv4\"\n", "quic_server_id = \"id:15\"\n");
    for (form, line, nonce) in
        [(ipv4, "", 12), (ipv4, "quic_nonce = 4", 4), (long, "", 4), (ipv4, "quic_nonce = 0", 12)]
    {
        let config = Config::parse(file(form, line).as_bytes()).expect("a good file");
        let mut keys = dataplane::ServerIdKeys::new(nonce);
        for (config, key) in [
            (0, 0x8f95_f092_4576_5f80_2569_34e5_0c66_207f_u128),
            (6, 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128),
        ] {
            let key = key.to_be_bytes();
            keys.insert(config, key, dataplane::aes128(key));
        }
        assert_eq!(config.listeners[0].udp.quic_keys.as_deref(), Some(&keys), "{form}{line}");
        assert!(!format!("{config:?}").contains("143, 149"), "a key is a secret");
    }
    for (form, line, expected) in [
        (
            "",
            "",
            "f:8:18: error: `listener.udp.quic_keys_file` without quic_server_id\n  hint: say what the server ids are: add \
             quic_server_id = \"ipv4\"\n",
        ),
        (
            ipv4,
            "quic_nonce = 3",
            "f:10:14: error: `listener.udp.quic_nonce`: 3 octets do not go with a server id of 4\n  hint: write what the servers \
             have, from 4 to 15\n",
        ),
        (
            long,
            "quic_nonce = 5",
            "f:10:14: error: `listener.udp.quic_nonce`: 5 octets do not go with a server id of 15\n  hint: write what the servers \
             have, from 4 to 4\n",
        ),
    ] {
        assert_eq!(errors(&file(form, line)), expected);
    }
    let hint = "a line is the number of a configuration, 0 to 6, and its key in 32 hexadecimal digits: \
                \"0 00112233445566778899aabbccddeeff\"";
    for (content, said) in [
        ("# none\n".to_owned(), "there is no key in PATH"),
        (format!("0 {key}\n0 {key}\n"), "PATH, line 2: configuration 0 has a key already"),
        (format!("7 {key}"), "PATH, line 1: no configuration and key"),
        (format!("0 {}", &key[1..]), "PATH, line 1: no configuration and key"),
        (format!("0 +{}", &key[1..]), "PATH, line 1: no configuration and key"),
        (key.to_owned(), "PATH, line 1: no configuration and key"),
    ] {
        std::fs::write(&path, content).unwrap();
        let said = said.replace("PATH", &path.display().to_string());
        let expected = format!("f:9:18: error: `listener.udp.quic_keys_file`: {said}\n  hint: {hint}\n");
        assert_eq!(errors(&file(ipv4, "")), expected);
    }
}

#[test]
fn routes_and_headers_of_datagrams() {
    let file = |pool: &str, lines: &str| {
        format!(
            "[[pool]]\nname = \"dns\"\n{pool}\n[[listener]]\nbind = \"udp://127.0.0.1:53-54\"\npool = \"dns\"\n{lines}\n"
        )
    };
    let good = "proxy_protocol = \"any\"\ntrusted = [\"10.0.0.0/8\"]\n[[listener.route]]\npool = \"dns\"\n\
        from = [\"10.0.0.0/8\"]\nports = \"54\"\n[listener.udp]\nproxy_header = \"first\"";
    let config = Config::parse(file("proxy_protocol = \"v2\"", good).as_bytes()).expect("a good file");
    let listener = &config.listeners[0];
    assert_eq!((listener.last_port, listener.routes[0].ports.clone()), (Some(54), Some(54..=54)));
    assert!(listener.proxy_protocol.is_some());
    assert_eq!(listener.udp.proxy_header, dataplane::ProxyHeader::First);
    let both_v1 = "[[listener.route]]\npool = \"dns\"\nports = \"54\"";
    for (pool, lines, expected) in [
        (
            "",
            "proxy_protocol = \"v1\"\ntrusted = [\"10.0.0.1\"]",
            "f:7:18: error: `listener.proxy_protocol`: version 1 has no datagrams\n  hint: write \"v2\", which the proxies in \
             front must send\n",
        ),
        (
            "proxy_protocol = \"v1\"",
            both_v1,
            "f:6:8: error: `listener.pool`: the pool \"dns\" has proxy_protocol = \"v1\", which has no datagrams\n  hint: \
             write \"v2\" there, or give datagrams a pool of their own\nf:8:8: error: `listener.route.pool`: the pool \
             \"dns\" has proxy_protocol = \"v1\", which has no datagrams\n  hint: write \"v2\" there, or give datagrams a \
             pool of their own\n",
        ),
        (
            "",
            "[[listener.route]]\npool = \"dns\"\nsni = [\"a.example\"]\nalpn = [\"h3\"]",
            "f:7:1: error: `listener.route.sni` is read from TLS over TCP: datagrams are routed by `from` and `ports`\n  hint: \
             remove it, or write the listener's bind = \"tcp://…\"\nf:7:1: error: `listener.route.alpn` is read from TLS \
             over TCP: datagrams are routed by `from` and `ports`\n  hint: remove it, or write the listener's bind = \
             \"tcp://…\"\n",
        ),
        (
            "",
            "[listener.udp]\nproxy_header = \"first\"",
            "f:8:16: error: `listener.udp.proxy_header`: no datagram has a PROXY header here\n  hint: add proxy_protocol = \
             \"v2\" and trusted to the listener, or remove it\n",
        ),
        (
            "",
            "[listener.udp]\nproxy_header = \"last\"",
            "f:8:16: error: `listener.udp.proxy_header`: \"last\" does not say which datagrams have a header\n  hint: write \
             \"every\", or \"first\" for proxies that say once for whom they speak\n",
        ),
        (
            "",
            "[listener.tcp]\nbacklog = 5",
            "f:4:1: error: `listener.tcp` is for listeners of connections\n  hint: remove it, or write bind = \"tcp://…\"\n",
        ),
    ] {
        assert_eq!(errors(&file(pool, lines)), expected, "for {lines}");
    }
    // Connections of the same pool may have version 1.
    let connections = file("proxy_protocol = \"v1\"", "").replace("udp:", "tcp:");
    assert!(Config::parse(connections.as_bytes()).is_ok());
}

#[test]
fn where_utilization_scripts_may_point() {
    let file = "[control.pull]\nallow = [\"10.0.0.0/8\", \"fd00::1\", \"Metrics.Example\"]\nat_once = 7\nca = \"ca.pem\"";
    let pull = Config::parse(with_a_listener(file).as_bytes()).expect("a good file").pull;
    let allow: Vec<String> = pull.allow.iter().map(ToString::to_string).collect();
    assert_eq!(allow, ["10.0.0.0/8", "fd00::1/128", "metrics.example"]);
    assert_eq!((pull.at_once, pull.ca), (7, Some("ca.pem".into())));
    let wrong = "[control.pull]\nallow = [\"10.0.0.0/33\"]\nat_once = 0\nca = 1\nredirects = true";
    let errors = errors(&with_a_listener(wrong));
    for expected in [
        "f:2:9: error: `control.pull.allow`: \"10.0.0.0/33\" is neither a network (10.0.0.0/8), an address nor a host name",
        "f:3:11: error: `control.pull.at_once`: 0 is out of range",
        "f:4:6: error: `control.pull.ca`: this is an integer, not a text",
        "f:5:1: error: there is no key `control.pull.redirects`",
    ] {
        assert!(errors.contains(expected), "{expected}\n{errors}");
    }
}

/// Full names of all keys of a table, and of the first of each list of tables.
fn add_keys(path: &str, table: &DeTable<'_>, present: &mut BTreeSet<String>) {
    for (key, value) in table {
        let name =
            if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
        let inner = value.get_ref().as_table();
        let inner = inner.or_else(|| value.get_ref().as_array()?.first()?.get_ref().as_table());
        if let Some(inner) = inner {
            add_keys(&name, inner, present);
        }
        present.insert(name);
    }
}

#[test]
fn every_value_can_be_changed() {
    let file = r#"
        [control]
        listen = "0.0.0.0:0"
        insecure = true
        [http]
        listen = "[::1]:80"
        [dataplane]
        workers = 3
        engine = "uring"
        flows_max = 1_000
        buffers_max = 0x100
        connect_retries = 0
        source_addresses = ["10.0.0.9", "::1"]
        connect_timeout = "250ms"
        preface_timeout = "1s"
        idle_timeout = "0s"
        keepalive = "0s"
        drain_timeout = "2m"
        pool = []
    "#
    .replace("pool = []", "")
        + "[[pool]]\nname = \"a\"\npolicy = \"random\"\nflows_max_per_resource = 7\n[[pool]]\nname = \"b\"\n"
        + "[[listener]]\nbind = \"tcp://0.0.0.0:0\"\npool = \"b\"\n[[listener]]\nbind = \"tcp://0.0.0.0:0\"\npool = \"b\"\n";
    let config = Config::parse(file.as_bytes()).expect("a good file");
    assert!(config.control.insecure);
    assert_eq!(config.http.listen.to_string(), "[::1]:80");
    assert_eq!(
        config.dataplane,
        DataplaneConfig {
            workers: 3,
            engine: Engine::Named(dataplane::Engine::Uring),
            flows_max: 1000,
            buffers_max: 256,
            connect_retries: 0,
            source_addresses: vec!["10.0.0.9".parse().unwrap(), "::1".parse().unwrap()],
            connect_timeout: Duration::from_millis(250),
            preface_timeout: Duration::from_secs(1),
            idle_timeout: None,
            keepalive: None,
            drain_timeout: Duration::from_secs(120),
        }
    );
    assert_eq!((config.pools[0].policy, config.pools[0].flows_max_default), (Policy::Random, 7));
    assert_eq!(config.listeners.len(), 2);
}

#[test]
fn every_value_of_a_pool_can_be_changed() {
    let file = r#"
        [decisions]
        log = "/var/log/trimtab.jsonl"
        sample = 1
        [[pool]]
        name = "sql"
        policy = "criteria"
        flows_max_per_resource = 7
        requires = ["tls", "zone!=b"]
        criteria = ["least(bandwidth_cost, spill 80%)", "most(operations, 1h, total, tolerance 20%)"]
        slow_start = "1m"
        slow_start_aggression = 2
        blackout_period = "0s"
        weight_expiration = "1h"
        error_utilization_penalty = 0.5
        bounded_load = 0
        forecast = "2h"
        [pool.probes]
        pool_size = 32
        age_max = "250ms"
        per_flow = 2
        remove_per_flow = 0.5
        delta = 1.5
        quantile = 0.9
        [pool.split]
        versions = ["1.9", "2.0=12.5%", "3=5%"]
        by = "client"
        abort_after = "1m"
        abort_errors = 0.02
        abort_latency = 0.25
        abort_utilization = 1
        abort_flows_min = 500
        [[listener]]
        bind = "tcp://0.0.0.0:0"
        pool = "sql"
        requires = ["version>=16.2", "role=writer"]
        [[listener]]
        bind = "tcp://0.0.0.0:0"
        pool = "sql"
    "#;
    let config = Config::parse(file.as_bytes()).expect("a good file");
    let log = Some(control::DecisionLog::File("/var/log/trimtab.jsonl".into()));
    assert_eq!(config.decisions, DecisionsConfig { log, sample: 1.0 });
    let requires = |texts: &[&str]| Requirements::from_texts(texts).unwrap();
    let writer = requires(&["role=writer", "version>=16.2"]);
    let abort = registry::AbortConfig {
        after: Duration::from_secs(60),
        errors: 0.02,
        latency: 0.25,
        utilization: 1.0,
        flows_min: 500,
    };
    let versions = ["1.9", "2.0=12.5%", "3=5%"];
    let split = registry::SplitConfig::parse(&versions, registry::SplitBy::Client, abort).unwrap();
    let criteria = ["least(bandwidth_cost, spill 80%)", "most(operations, 1h, total, tolerance 20%)"];
    let expected = PoolConfig {
        name: "sql".parse().unwrap(),
        policy: Policy::Criteria,
        flows_max_default: 7,
        knobs: registry::Knobs {
            slow_start: Duration::from_secs(60),
            slow_start_aggression: 2.0,
            blackout: Duration::ZERO,
            weight_expiration: Duration::from_secs(3600),
            error_penalty: 0.5,
            bounded_load: 0.0,
            probes: allocation::ProbeKnobs {
                pool_size: 32,
                age_max: Duration::from_millis(250),
                per_flow: 2.0,
                remove_per_flow: 0.5,
                delta: 1.5,
                quantile: 0.9,
            },
        },
        requires: requires(&["tls", "zone!=b"]),
        tables: vec![writer.clone()],
        criteria: criteria.iter().map(|text| text.parse().unwrap()).collect(),
        checked: false,
        split: Some(split),
        forecast: Some(Duration::from_secs(7200)),
    };
    assert_eq!(config.pools, [expected]);
    let required: Vec<_> = config.listeners.iter().map(|listener| &listener.requires).collect();
    assert_eq!(required, [&writer, &Requirements::default()]);
    for (text, log) in [("", None), ("-", Some(control::DecisionLog::Stdout))] {
        let config = Config::parse(with_a_listener(&format!("[decisions]\nlog = \"{text}\"")).as_bytes());
        assert_eq!(config.expect("a good file").decisions.log, log);
    }
}

#[test]
fn listeners_share_a_table_where_they_require_the_same() {
    let listener =
        |requires: &str| format!("[[listener]]\nbind = \"tcp://0.0.0.0:0\"\npool = \"sql\"\n{requires}\n");
    let same = ["requires = [\"a\", \"b\"]", "requires = [\"b\", \"a\", \"b\"]", "requires = [\"a\"]", ""];
    let file = with_a_listener("") + &same.map(listener).concat();
    let config = Config::parse(file.as_bytes()).expect("a good file");
    let tables: Vec<_> = config.pools[0].tables.iter().map(ToString::to_string).collect();
    assert_eq!(tables, ["a, b", "a"]);

    let many: String = (0..64).map(|n| listener(&format!("requires = [\"k{n}\"]"))).collect();
    let got = errors(&(with_a_listener("") + &many));
    assert!(got.ends_with("the listeners of pool sql have 64 different `requires`\n  hint: a pool takes 63 beyond its own: use another pool\n"), "{got}");
}

#[test]
fn routes_and_headers_as_they_may_be_written() {
    let file = r#"
[[pool]]
name = "a"
proxy_protocol = "v2"
[[pool]]
name = "b"
[[listener]]
bind = "tcp://0.0.0.0:5000-5010"
pool = "a"
requires = ["tls"]
proxy_protocol = "any"
trusted = ["10.0.0.0/8", "192.0.2.7"]
[[listener.route]]
pool = "b"
sni = ["*.Example.com", "db.example.com"]
alpn = ["postgresql"]
from = ["10.1.2.3/8"]
ports = "5000-5004"
[[listener.route]]
pool = "a"
ports = "5005"
[[listener.route]]
pool = "b"
from = ["2001:db8::1"]
"#;
    let config = Config::parse(file.as_bytes()).expect("a good file");
    let proxies: Vec<_> = config.connecting.iter().map(|pool| pool.proxy).collect();
    assert_eq!(proxies, [Some(Version::V2), None]);
    let listener = &config.listeners[0];
    assert_eq!((listener.bind.to_string().as_str(), listener.last_port), ("tcp://0.0.0.0:5000", Some(5_010)));
    let trusted = &listener.proxy_protocol.as_ref().expect("a proxy").trusted;
    assert_eq!(trusted.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "192.0.2.7/32"]);
    assert_eq!(listener.routes.iter().map(|route| route.target).collect::<Vec<_>>(), [1, 0, 1]);
    assert_eq!(listener.routes[0].networks[0].to_string(), "10.0.0.0/8");
    assert_eq!(listener.further.len(), 1);
    // What a listener requires is asked of every pool that it has.
    assert_eq!((config.pools[0].tables.len(), config.pools[1].tables.len()), (1, 1));
}

/// Lines of a listener, from line 7 of a file on, and what is said of them.
const WRONG_ROUTES: &[(&str, &str)] = &[
    (
        "proxy_protocol = \"v3\"",
        "f:7:18: error: `listener.proxy_protocol`: there is no PROXY protocol \"v3\"\n  hint: write \"off\", \"v1\", \"v2\", or \"any\" for both\n",
    ),
    (
        "proxy_protocol = \"any\"",
        "f:7:18: error: `listener.proxy_protocol`: nobody is trusted with a header, so every client would be refused\n  hint: add trusted = [\"10.0.0.0/8\"] with the networks of the proxies in front\n",
    ),
    (
        "trusted = [\"10.0.0.0/8\"]",
        "f:7:11: error: `listener.trusted`: nobody is asked for a PROXY header\n  hint: add proxy_protocol = \"any\" (or \"v1\", \"v2\"), or remove it\n",
    ),
    (
        "[[listener.route]]\npool = \"sql\"",
        "f:7:1: error: `listener.route` has no condition: every flow would go by it\n  hint: add sni, alpn, from or ports, or remove it and name its pool as the listener's\n",
    ),
    (
        "[[listener.route]]\npool = \"web\"\nports = \"5432-5433\"",
        "f:8:8: error: `listener.route.pool`: there is no pool \"web\"\n  hint: add [[pool]] with name = \"web\"\nf:9:9: error: `listener.route.ports`: the listener does not have all of these ports\n  hint: it has 5432 alone\n",
    ),
    (
        "[[listener.route]]\npool = \"sql\"\nsni = [\"10.0.0.1\"]\nalpn = []\nfrom = [\"10.0.0.0/33\"]\nport = \"1\"",
        "f:9:7: error: `listener.route.sni`: \"10.0.0.1\" is not a server name: an address is never asked for by name (RFC 6066)\n  hint: write names as clients ask for them: \"db.example.com\", \"*.example.com\"\nf:10:8: error: `listener.route.alpn`: the list is empty, so nobody would meet it\n  hint: remove the key, or name one at least\nf:11:8: error: `listener.route.from`: \"10.0.0.0/33\" is not a network\n  hint: write networks or addresses: \"10.0.0.0/8\", \"2001:db8::/32\", \"192.0.2.7\"\nf:12:1: error: there is no key `listener.route.port`\n  hint: did you mean `ports`?\n",
    ),
];

#[test]
fn routes_and_headers_as_they_may_not_be_written() {
    for (lines, expected) in WRONG_ROUTES {
        assert_eq!(errors(&(with_a_listener("") + lines)), *expected, "{lines}");
    }
}

/// Lines of a pool, from line 6 of a file on, and what is said of them.
#[rustfmt::skip]
const WRONG_POOLS: &[(&str, &str)] = &[
    (r#"requires = ["role=writer", "tls yes"]"#,
     r#"f:6:12: error: `pool.requires`: in the requirement "tls yes" the key is followed by no comparison; write for example tls=writer, with one of = != >= <= > <
  hint: write KEY, KEY=VALUE, KEY!=VALUE or KEY>=NUMBER"#),
    (r#"requires = ["role="]"#,
     r#"f:6:12: error: `pool.requires`: the requirement "role=" has no value; write role if it only has to be there, or role=VALUE
  hint: write KEY, KEY=VALUE, KEY!=VALUE or KEY>=NUMBER"#),
    (r#"requires = "role=writer""#,
     r#"f:6:12: error: `pool.requires`: this is a text, not a list
  hint: write a list of texts: ["…", "…"]"#),
    ("requires = [1]",
     r#"f:6:12: error: `pool.requires`: this is an integer, not a text
  hint: write it in quotes: "1""#),
    (r#"polcy = "maglev""#,
     "f:6:1: error: there is no key `pool.polcy`\n  hint: did you mean `policy`?"),
    (r#"policy = "magleff""#,
     r#"f:6:10: error: `pool.policy`: there is no policy "magleff"
  hint: did you mean "maglev"?"#),
    (r#"policy = "criteria""#,
     r#"f:4:1: error: `pool.criteria` is missing
  hint: add criteria = ["least(memory, 10m)"]"#),
    (r#"policy = "criteria"
criteria = []"#,
     r#"f:7:12: error: `pool.criteria` has 0 entries
  hint: write 1 to 8 criteria: criteria = ["least(memory, 10m)"]"#),
    (r#"policy = "criteria"
criteria = ["memory"]"#,
     r#"f:7:12: error: `pool.criteria`: "memory" is no criterion: write least(METRIC) or most(METRIC), for example least(memory)
  hint: write least(METRIC) or most(METRIC, 1h), with tolerance N% or spill N% where wanted"#),
    (r#"policy = "criteria"
criteria = ["least(memory, 40d)"]"#,
     r#"f:7:12: error: `pool.criteria`: the window "40d" is out of range: write 1ms to 30d, for example least(memory, 10m)
  hint: write least(METRIC) or most(METRIC, 1h), with tolerance N% or spill N% where wanted"#),
    (r#"policy = "criteria"
criteria = ["most(operations, total)"]"#,
     "f:7:12: error: `pool.criteria`: total needs a window: write for example most(operations, 10m, total)\n  hint: write least(METRIC) or most(METRIC, 1h), with tolerance N% or spill N% where wanted"),
    (r#"policy = "criteria"
criteria = ["least(a)", "least(b)", "least(c)", "least(d)", "least(e)", "least(f)", "least(g)", "least(h)", "least(i)"]"#,
     r#"f:7:12: error: `pool.criteria` has 9 entries
  hint: write 1 to 8 criteria: criteria = ["least(memory, 10m)"]"#),
    (r#"policy = "maglev"
criteria = ["least(memory)"]"#,
     r#"f:7:12: error: `pool.criteria` does nothing under the policy "maglev"
  hint: write policy = "criteria", or remove it"#),
    ("bounded_load = 0.5",
     "f:6:16: error: `pool.bounded_load`: 0.5 is less than a fair part\n  hint: write 1.25 (a quarter more than the fair part), or 0 for no bound"),
    (r#"bounded_load = "1.25""#,
     "f:6:16: error: `pool.bounded_load`: this is a text, not a number\n  hint: write a number from 0 to 100, without quotes"),
    ("bounded_load = nan",
     "f:6:16: error: `pool.bounded_load`: nan is out of range\n  hint: write a number from 0 to 100, without quotes"),
    ("bounded_load = 0x100",
     "f:6:16: error: `pool.bounded_load`: 0x100 is out of range\n  hint: write a number from 0 to 100, without quotes"),
    ("slow_start = 10",
     r#"f:6:14: error: `pool.slow_start`: this is an integer, not a text
  hint: write a whole number with its unit: "250ms", "5s", "10m", "1h" or "1d""#),
    (r#"slow_start = "2d""#,
     r#"f:6:14: error: `pool.slow_start`: "2d" is out of range
  hint: write "0s" to "1d""#),
    ("slow_start_aggression = 0",
     "f:6:25: error: `pool.slow_start_aggression`: 0 is out of range\n  hint: write a number from 0.1 to 10, without quotes"),
    ("error_utilization_penalty = -1",
     "f:6:29: error: `pool.error_utilization_penalty`: -1 is out of range\n  hint: write a number from 0 to 100, without quotes"),
    (r#"forecast = "7h""#,
     r#"f:6:12: error: `pool.forecast`: "7h" is out of range
  hint: write "0s" to "6h""#),
    (r#"[pool.probes]
pool_size = 1
quantile = 1.5
age_max = "0s"
qantile = 1"#,
     r#"f:7:13: error: `pool.probes.pool_size`: 1 is out of range
  hint: write a whole number from 2 to 256, without quotes
f:8:12: error: `pool.probes.quantile`: 1.5 is out of range
  hint: write a number from 0 to 1, without quotes
f:9:11: error: `pool.probes.age_max`: "0s" is out of range
  hint: write "1ms" to "1m"
f:10:1: error: there is no key `pool.probes.qantile`
  hint: did you mean `quantile`?"#),
    ("probes = 3",
     "f:6:10: error: `pool.probes` is an integer, not a table\n  hint: write [pool.probes] on a line of its own, and its keys below it"),
    (r#"[pool.split]
versions = ["1", "2=70%", "3=50%"]"#,
     r#"f:7:12: error: `pool.split.versions`: the shares of all but the baseline are 120% together; write at most 100%
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
versions = ["1"]"#,
     r#"f:7:12: error: `pool.split.versions`: a split has 1 versions; write the baseline and one to 7 others, for example 1.9, 2.0=10%
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
versions = ["1=50%", "2=50%"]"#,
     r#"f:7:12: error: `pool.split.versions`: 1 stands first, so it is the baseline and gets what the others leave: write 1 alone
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
versions = ["1", "2"]"#,
     r#"f:7:12: error: `pool.split.versions`: the share of 2 is "": write a percentage from 0% to 100%, for example 2=10%
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
versions = ["1", "2=0.2"]"#,
     r#"f:7:12: error: `pool.split.versions`: the share of 2 is "0.2": write a percentage from 0% to 100%, for example 2=10%
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
versions = ["1", "1=20%"]"#,
     r#"f:7:12: error: `pool.split.versions`: the version 1 is there twice; write it once
  hint: write versions = ["1.9", "2.0=10%"], the baseline first"#),
    (r#"[pool.split]
by = "share"
abort_afte = "1s""#,
     r#"f:6:1: error: `pool.split.versions` is missing
  hint: add versions = ["1.9", "2.0=10%"]
f:8:1: error: there is no key `pool.split.abort_afte`
  hint: did you mean `abort_after`?"#),
    (r#"[pool.split]
versions = ["1", "2=20%"]
by = "source""#,
     r#"f:8:6: error: `pool.split.by`: "source" divides nothing
  hint: write "share" or "client""#),
    (r#"[pool.split]
versions = ["1", "2=20%"]
abort_after = "5"
abort_flows_min = 0
abort_errors = 2"#,
     r#"f:8:15: error: `pool.split.abort_after`: "5" is not a duration
  hint: write a whole number with its unit: "250ms", "5s", "10m", "1h" or "1d"
f:9:19: error: `pool.split.abort_flows_min`: 0 is out of range
  hint: write a whole number from 1 to 1000000, without quotes
f:10:16: error: `pool.split.abort_errors`: 2 is out of range
  hint: write a number from 0 to 1, without quotes"#),
];

/// The same of the beginning of a file.
#[rustfmt::skip]
const WRONG_DECISIONS: &[(&str, &str)] = &[
    ("[decisions]\nsample = 1.5",
     "f:2:10: error: `decisions.sample`: 1.5 is out of range\n  hint: write a number from 0 to 1, without quotes"),
    ("[decisions]\nlog = 1",
     r#"f:2:7: error: `decisions.log`: this is an integer, not a text
  hint: write it in quotes: "1""#),
    (r#"[decisions]
sample = "1%""#,
     "f:2:10: error: `decisions.sample`: this is a text, not a number\n  hint: write a number from 0 to 1, without quotes"),
];

#[test]
fn errors_of_pools_and_decisions() {
    let listener = "[[listener]]\nbind = \"tcp://127.0.0.1:5432\"\npool = \"sql\"";
    for (lines, expected) in WRONG_POOLS {
        let file = format!("{listener}\n[[pool]]\nname = \"sql\"\n{lines}\n");
        assert_eq!(errors(&file), format!("{expected}\n"), "for {lines}");
    }
    for (lines, expected) in WRONG_DECISIONS {
        assert_eq!(errors(&with_a_listener(lines)), format!("{expected}\n"), "for {lines}");
    }
}

#[test]
fn numbers_with_a_base_are_what_they_say() {
    let config =
        Config::parse((with_a_listener("") + "[[pool]]\nname = \"b\"\nbounded_load = 0x10\n").as_bytes());
    assert_eq!(config.expect("a good file").pools[1].knobs.bounded_load, 16.0);
}

#[test]
fn every_error_is_found_at_once_in_order() {
    let file = r#"[control]
listn = "127.0.0.1:7400"
listen = "0.0.0.0:7400"
[control.tls]
cert = "x"
[http]
listen = 7480
[dataplane]
workers = -1
engine = "kqueue"
connect_timeout = "0s"
idle_timeout = "5"
connect_retries = 8
[store]
path = "/var/lib/trimtab/"
file = "x"
[[pool]]
name = "sql"
policy = "roundrobin"
[[pool]]
name = "sql"
policy = "leastconn"
[[listener]]
bind = "sctp://127.0.0.1:53"
pool = "slq"
[[listener]]
pool = "web"
"#;
    let expected = r#"f:2:1: error: there is no key `control.listn`
  hint: did you mean `listen`?
f:4:1: error: `control.tls.key` is missing
  hint: add key = "balancer.key"
f:4:1: error: `control.tls.client_ca` is missing
  hint: add client_ca = "resources-ca.pem"
f:7:10: error: `http.listen`: this is an integer, not a text
  hint: write an IP address and a port: "127.0.0.1:5432" or "[::1]:5432"
f:9:11: error: `dataplane.workers`: -1 is out of range
  hint: write a whole number from 0 to 1024, without quotes
f:10:10: error: `dataplane.engine`: there is no engine "kqueue"
  hint: write "auto" or one of "uring", "tokio-uring", "epoll"
f:11:19: error: `dataplane.connect_timeout`: "0s" leaves no time
  hint: write at least "1ms"
f:12:16: error: `dataplane.idle_timeout`: "5" is not a duration
  hint: write a whole number with its unit: "250ms", "5s", "10m", "1h" or "1d"
f:13:19: error: `dataplane.connect_retries`: 8 is out of range
  hint: write a whole number from 0 to 7, without quotes
f:15:8: error: `store.path`: "/var/lib/trimtab/" is a folder
  hint: name a file in it: "/var/lib/trimtab/trimtab.db"
f:16:1: error: there is no key `store.file`
  hint: there are path
f:19:10: error: `pool.policy`: there is no policy "roundrobin"
  hint: did you mean "round-robin"?
f:21:8: error: there are two pools named "sql"
  hint: the first is in line 18; rename one or merge them
f:22:10: error: `pool.policy`: there is no policy "leastconn"
  hint: there are adaptive, least-connections, p2c, peak-ewma, weighted-round-robin, round-robin, random, first, utilization, maglev, prequal, criteria
f:24:8: error: `listener.bind`: "sctp://127.0.0.1:53": there is no protocol "sctp"
  hint: write "tcp://127.0.0.1:53" or "udp://127.0.0.1:53"
f:25:8: error: `listener.pool`: there is no pool "slq"
  hint: did you mean "sql"?
f:26:1: error: `listener.bind` is missing
  hint: add bind = "tcp://0.0.0.0:5432"
f:27:8: error: `listener.pool`: there is no pool "web"
  hint: add [[pool]] with name = "web"
"#;
    assert_eq!(errors(file), expected);
}

#[test]
fn syntax_errors_come_with_the_others_and_without_what_follows_from_them() {
    let file = "[control]\nlisten = \"127.0.0.1:7400\n[http]\nlisten = hello\n[dataplane]\nworkers = \"2\"\n";
    let expected = r#"f:2:25: error: invalid basic string, expected `"`
  hint: a text stands in quotes, on one line: key = "text"
f:4:10: error: string values must be quoted, expected literal string
  hint: a text stands in quotes, on one line: key = "text"
f:6:11: error: `dataplane.workers`: this is a text, not an integer
  hint: write a whole number from 0 to 1024, without quotes
"#;
    assert_eq!(errors(file), expected);
}

#[test]
fn single_errors() {
    for (head, expected) in [
        (
            "colour = 1",
            "f:1:1: error: there is no key `colour`\n  hint: there are control, http, dataplane, decisions, notices, maintenance, store, access_log, pool, listener, upstream, provider, dns\n",
        ),
        (
            "[[control]]",
            "f:1:1: error: `control` is a list, not a table\n  hint: write [control] on a line of its own, and its keys below it\n",
        ),
        (
            "control = 1",
            "f:1:11: error: `control` is an integer, not a table\n  hint: write [control] on a line of its own, and its keys below it\n",
        ),
        (
            "[control]\ninsecure = \"yes\"",
            "f:2:12: error: `control.insecure`: this is a text, not true or false\n  hint: write true or false, without quotes\n",
        ),
        (
            "[http]\nlisten = \"127.0.0.1:5432\"",
            "f:6:8: error: `listener.bind`: 127.0.0.1:5432 is taken already\n  hint: `http.listen` has it (line 2); give one of them another port\n",
        ),
        (
            "[dataplane]\nkeepalive = \"1500ms\"",
            "f:2:13: error: `dataplane.keepalive`: \"1500ms\" is not in whole seconds\n  hint: write \"60s\"; \"0s\" switches keepalive off\n",
        ),
        (
            "[dataplane]\nflows_max = 4294967296",
            "f:2:13: error: `dataplane.flows_max`: 4294967296 is out of range\n  hint: write a whole number from 0 to 4294967295, without quotes\n",
        ),
        (
            "[[pool]]\nname = \"a b\"",
            "f:2:8: error: `pool.name`: \"a b\" is not a name: it has the character ' '; a name takes A-Z a-z 0-9 . _ : / -\n  hint: write a short name, as \"sql\"\n",
        ),
        (
            "[http]\nlisten = 1\nlisten = \"127.0.0.1:1\"",
            "f:2:10: error: `http.listen`: this is an integer, not a text\n  hint: write an IP address and a port: \"127.0.0.1:5432\" or \"[::1]:5432\"\nf:3:1: error: duplicate key\n  hint: remove one of the two; each entry of a list needs its own [[…]] line\n",
        ),
    ] {
        assert_eq!(errors(&with_a_listener(head)), expected, "for {head:?}");
    }
}

#[test]
fn nothing_to_balance_is_an_error() {
    let expected = "f:1:1: error: there is no listener, so nothing would be balanced\n  hint: add [[pool]] with a name, and [[listener]] with bind = \"tcp://0.0.0.0:5432\" and that pool\n";
    assert_eq!(errors(""), expected);
    assert_eq!(
        errors("[pool]\nname = \"sql\"\n[[listener]]\nbind = \"tcp://127.0.0.1:1\"\npool = \"sql\"\n"),
        "f:1:1: error: `pool` is a table, not a list of tables\n  hint: write [[pool]], with two brackets, for each\n"
    );
}

#[test]
fn bytes_that_are_not_text() {
    let got = Config::parse(b"[control]\nlisten = \"\xff\"\n").unwrap_err().render("f");
    assert_eq!(got, "f:2:11: error: this is not UTF-8 text\n  hint: save the file as UTF-8\n");
}

#[test]
fn columns_count_characters() {
    assert_eq!(
        errors(&with_a_listener("[control]\n\"ключ\" = 1")),
        "f:2:1: error: there is no key `control.ключ`\n  hint: there are pull, addresses, tls, limits, peer, insecure, listen\n"
    );
    assert_eq!(
        errors(&with_a_listener("http = { \"ü\" = 1, listen = 2 }")),
        "f:1:10: error: there is no key `http.ü`\n  hint: there are insecure, listen\nf:1:28: error: `http.listen`: this is an integer, not a text\n  hint: write an IP address and a port: \"127.0.0.1:5432\" or \"[::1]:5432\"\n"
    );
}

proptest::proptest! {
    #[test]
    fn no_file_makes_it_panic(file in "[\\[\\]a-z=\"\\.\n0-9 {}:/#,é'-]{0,200}") {
        let _ = Config::parse(file.as_bytes());
    }

    #[test]
    fn no_damage_to_the_example_makes_it_panic(at in 0..EXAMPLE.len(), byte: u8) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        bytes[at] = byte;
        let _ = Config::parse(&bytes);
    }
}

#[test]
fn a_provider_needs_its_kind_and_no_more() {
    use control::{DockerConfig, DockerEndpoint, ProviderConfig, ProviderKind};
    let docker = |endpoint, address| ProviderKind::Docker(DockerConfig { endpoint, address });
    let least = with_a_listener("[[provider]]\nkind = \"docker\"\n");
    assert_eq!(
        Config::parse(least.as_bytes()).expect("the least provider").providers,
        [ProviderConfig {
            name: "docker".into(),
            pools: Vec::new(),
            report_interval: Duration::from_secs(2),
            keep: Duration::from_secs(600),
            kind: docker(DockerEndpoint::Unix("/var/run/docker.sock".into()), None),
        }]
    );
    let every = with_a_listener(
        "[[provider]]\nkind = \"docker\"\nname = \"rack2\"\nendpoint = \"tcp://10.0.0.2:2375\"\ninsecure = true\n\
         pools = [\"sql\"]\naddress = \"10.0.0.2\"\nreport_interval = \"500ms\"\nkeep = \"0s\"\n\
         [[provider]]\nkind = \"docker\"\nendpoint = \"unix:///run/d.sock\"\n",
    );
    let providers = Config::parse(every.as_bytes()).expect("a good file").providers;
    let tcp =
        docker(DockerEndpoint::Tcp("10.0.0.2:2375".parse().unwrap()), Some("10.0.0.2".parse().unwrap()));
    assert_eq!(
        providers[0],
        ProviderConfig {
            name: "rack2".into(),
            pools: vec!["sql".parse().unwrap()],
            report_interval: Duration::from_millis(500),
            keep: Duration::ZERO,
            kind: tcp,
        }
    );
    assert_eq!(providers[1].name, "docker");
}

#[test]
fn every_problem_of_a_provider_has_its_place_and_a_hint() {
    let file = with_a_listener(
        "[[provider]]\nkind = \"nomad\"\nname = \"a:b\"\nendpoint = \"/run/d.sock\"\npools = [\"sqk\"]\n\
         address = \"host\"\nreport_interval = \"1ms\"\nkeeps = \"1m\"\n\
         [[provider]]\nname = \"docker\"\nendpoint = \"tcp://10.0.0.2:2375\"\n[[provider]]\nkind = \"docker\"\n",
    );
    assert_eq!(
        errors(&file),
        "f:2:8: error: `provider.kind`: there is no provider \"nomad\"\n  hint: write \"docker\"\n\
         f:3:8: error: `provider.name`: \"a:b\" is no name of a provider\n  \
         hint: write a short name of A-Z a-z 0-9 . _ and -, as \"docker\"\n\
         f:4:12: error: `provider.endpoint`: \"/run/d.sock\" is neither unix:// nor tcp://\n  \
         hint: write \"unix:///var/run/docker.sock\" or \"tcp://127.0.0.1:2375\"\n\
         f:5:9: error: `provider.pools`: there is no pool \"sqk\"\n  hint: did you mean \"sql\"?\n\
         f:6:11: error: `provider.address`: \"host\" is not an IP address\n  \
         hint: write an address of the host without a port: \"10.0.0.9\"\n\
         f:7:19: error: `provider.report_interval`: \"1ms\" is out of range\n  hint: write \"500ms\" to \"1m\"\n\
         f:8:1: error: there is no key `provider.keeps`\n  hint: did you mean `keep`?\n\
         f:9:1: error: `provider.kind` is missing\n  hint: add kind = \"docker\"\n\
         f:11:12: error: `provider.endpoint`: 10.0.0.2:2375 is reached over the network in clear text\n  \
         hint: use the Unix socket or a tunnel to loopback, or add insecure = true if the network is trusted\n\
         f:12:1: error: there are two providers named \"docker\"\n  \
         hint: the first is in line 10; give this one a name: name = \"docker2\"\n"
    );
}

/// A key file, and the `[[dns]]` that names it.
fn with_dns(lines: &str) -> (tempfile::NamedTempFile, String) {
    let key = tempfile::NamedTempFile::new().expect("a temporary file");
    let printed = "key \"k\" {\n\talgorithm hmac-sha256;\n\tsecret \"c2VjcmV0LXNlY3JldA==\";\n};\n";
    std::fs::write(key.path(), printed).expect("our own file");
    let file = with_a_listener("").trim_start().to_owned();
    let file = format!("{file}[[dns]]\n{}\n", lines.replace("KEY", &key.path().display().to_string()));
    (key, file)
}

const DNS: &str = "zone = \"example.com\"\nserver = \"10.0.0.53:53\"\nkey_file = \"KEY\"\n";

#[test]
fn dns_as_it_may_be_written() {
    let (_key, file) = with_dns(DNS);
    let config = Config::parse(file.as_bytes()).expect("the least of it");
    let dns = &config.dns[0];
    assert_eq!((dns.zone.to_string(), dns.server.to_string()), ("example.com".into(), "10.0.0.53:53".into()));
    assert_eq!(
        (dns.key.name().as_str(), dns.ttl, dns.priority, dns.weight),
        ("k", Duration::from_secs(10), 10, 100)
    );
    assert_eq!((&dns.name, &dns.owner, dns.port), (&None, &None, None));
    assert!(dns.addresses.is_empty() && dns.services.is_empty());
    // Whatever shows a configuration does not show that.
    assert!(!format!("{config:?}").contains("secret-secret") && !format!("{config:?}").contains("c2Vj"));

    let all = "ttl = \"1m\"\npriority = 0\nweight = 0\nname = \"lb1\"\nowner = \"lb-1\"\n\
               addresses = [\"10.0.0.9\", \"2001:db8::9\"]\nport = 7400\n\
               [[dns.service]]\nname = \"_postgresql._tcp\"\nlistener = \"tcp://127.0.0.1:5432\"\n\
               [[dns.service]]\nname = \"_xmpp-client._tcp\"\nport = 5222\n";
    let (_key, file) = with_dns(&format!("{DNS}{all}"));
    let config = Config::parse(file.as_bytes()).expect("all of it");
    let dns = &config.dns[0];
    assert_eq!((dns.ttl, dns.priority, dns.weight), (Duration::from_secs(60), 0, 0));
    assert_eq!(dns.addresses.len(), 2);
    let services: Vec<_> =
        dns.services.iter().map(|service| (service.service.to_string(), service.at)).collect();
    assert_eq!(
        services,
        [
            ("_postgresql._tcp".into(), ServiceAt::Listener(0)),
            ("_xmpp-client._tcp".into(), ServiceAt::Port(5222))
        ]
    );
}

#[test]
fn dns_as_it_may_not_be_written() {
    let said = |lines: &str| {
        let (key, file) = with_dns(lines);
        errors(&file).replace(&key.path().display().to_string(), "KEY")
    };
    for (lines, wanted) in [
        (
            "",
            "f:6:1: error: `dns.zone` is missing\n  hint: add zone = \"example.com\"\n\
              f:6:1: error: `dns.server` is missing\n  hint: add server = \"10.0.0.53:53\"\n\
              f:6:1: error: `dns.key_file` is missing\n  hint: add key_file = \"/etc/trimtab/tsig.key\"\n",
        ),
        (
            &DNS.replace("example.com", "example..com"),
            "f:7:8: error: `dns.zone`: \"example..com\" is no domain name: labels of letters, digits and -, with dots between them, such as example.com\n  hint: write \"example.com\"\n",
        ),
        (
            &DNS.replace("10.0.0.53:53", "10.0.0.53"),
            "f:8:10: error: `dns.server`: \"10.0.0.53\" is not an address\n  hint: the port is missing: write \"127.0.0.1:5432\" or \"[::1]:5432\"\n",
        ),
        (
            &DNS.replace("10.0.0.53:53", "0.0.0.0:53"),
            "f:8:10: error: `dns.server`: \"0.0.0.0:53\" is not one server's address\n  hint: write the address of the zone's primary: \"10.0.0.53:53\"\n",
        ),
        (
            &DNS.replace("KEY", "/nowhere"),
            "f:9:12: error: `dns.key_file`: cannot read the key file /nowhere: No such file or directory (os error 2)\n  hint: `tsig-keygen NAME` prints a key; save it there, readable for trimtab alone\n",
        ),
        (
            &format!("{DNS}ttl = \"1500ms\""),
            "f:10:7: error: `dns.ttl`: \"1500ms\" is not a time to live\n  hint: write whole seconds from \"1s\" to \"1d\"\n",
        ),
        (
            &format!("{DNS}name = \"lb_1\""),
            "f:10:8: error: `dns.name`: \"lb_1\" is no host name: letters, digits and -, such as lb1\n  hint: write \"lb1\"\n",
        ),
        (
            &format!("{DNS}owner = \"a b\""),
            "f:10:9: error: `dns.owner`: \"a b\" is not an owner\n  hint: write 1 to 100 letters, digits or . _ : / -, the same at every start of this balancer: \"lb-1\"\n",
        ),
        (
            &format!("{DNS}addresses = [\"10.0.0.9:1\"]"),
            "f:10:13: error: `dns.addresses`: \"10.0.0.9:1\" is not an IP address\n  hint: write addresses without a port that others reach this host at: [\"10.0.0.9\"]; without the key they are found out\n",
        ),
        (
            &format!("{DNS}port = 0"),
            "f:10:8: error: `dns.port`: 0 is out of range\n  hint: write a whole number from 1 to 65535, without quotes\n",
        ),
        (
            &format!("{DNS}servr = 1"),
            "f:10:1: error: there is no key `dns.servr`\n  hint: did you mean `server`?\n",
        ),
        (
            &format!("{DNS}[[dns.service]]\nname = \"postgresql\"\nport = 1"),
            "f:11:8: error: `dns.service.name`: \"postgresql\" is no service: two labels with underscores, such as _postgresql._tcp\n  hint: write \"_postgresql._tcp\"\n",
        ),
        (
            &format!("{DNS}[[dns.service]]\nname = \"_a._tcp\""),
            "f:10:1: error: `dns.service.listener` is missing\n  hint: add listener = \"tcp://0.0.0.0:5432\", the bind of a listener, or port = 5432\n",
        ),
        (
            &format!("{DNS}[[dns.service]]\nname = \"_a._tcp\"\nlistener = \"tcp://127.0.0.1:5433\""),
            "f:12:12: error: `dns.service.listener`: no listener is bound to \"tcp://127.0.0.1:5433\"\n  hint: did you mean \"tcp://127.0.0.1:5432\"?\n",
        ),
        (
            &format!(
                "{DNS}[[dns.service]]\nname = \"_a._tcp\"\nport = 1\nlistener = \"tcp://127.0.0.1:5432\""
            ),
            "f:12:8: error: `dns.service.port` and `dns.service.listener` say the same thing twice\n  hint: remove one of them\n",
        ),
        (
            &format!("{DNS}[[dns]]\n{DNS}"),
            "f:11:8: error: `dns.zone`: this zone at this server is there already\n  hint: the first is in line 7; remove one of them\n",
        ),
    ] {
        assert_eq!(said(lines), wanted, "{lines}");
    }
}

/// Lines of security, from line 1 of a file on, and what is said of them.
#[rustfmt::skip]
const WRONG_SECURITY: &[(&str, &str)] = &[
    ("[control]\nlisten = \"0.0.0.0:7400\"",
     "f:2:10: error: `control.listen`: 0.0.0.0:7400 is open to other hosts, in clear text and to anyone\n  hint: write \"127.0.0.1:7400\", give it certificates in [control.tls], or add insecure = true to [control] if the network is trusted\n"),
    ("[control]\naddresses = [\"10.0.0.0/33\"]",
     "f:2:13: error: `control.addresses`: \"10.0.0.0/33\" is not a network\n  hint: write \"10.0.0.0/8\" or \"10.0.0.1\"\n"),
    ("[control.tls]\ncert = \"\"\nkey = 1\nclientca = \"x\"\nrequire_certificate = 1",
     "f:1:1: error: `control.tls.client_ca` is missing\n  hint: add client_ca = \"resources-ca.pem\"\nf:2:8: error: `control.tls.cert`: this names no file\n  hint: write the path of a file in PEM\nf:3:7: error: `control.tls.key`: this is an integer, not a text\n  hint: write it in quotes: \"1\"\nf:4:1: error: there is no key `control.tls.clientca`\n  hint: did you mean `client_ca`?\nf:5:23: error: `control.tls.require_certificate`: this is an integer, not true or false\n  hint: write true or false, without quotes\n"),
    ("[control.limits]\nstreams = 0\nconnection = 1",
     "f:2:11: error: `control.limits.streams`: 0 is out of range\n  hint: write a whole number from 1 to 1000000, without quotes\nf:3:1: error: there is no key `control.limits.connection`\n  hint: did you mean `connections`?\n"),
    ("[[control.peer]]\nsan = \"a.example\"\npools = [\"sql\"]",
     "f:1:1: error: `control.peer` does nothing without `control.tls`\n  hint: add [control.tls] with cert, key and client_ca, or remove it: in clear text nobody has a name\n"),
    ("[control.tls]\ncert = \"a\"\nkey = \"b\"\nclient_ca = \"c\"\n[[control.peer]]\nsan = \"spiffe://*\"\nrole = \"root\"\npools = [\"sqll\"]\naddresses = [\"x\"]\nids = [\"a b\"]",
     "f:6:7: error: `control.peer.san`: \"spiffe://*\" has a * elsewhere than as a DNS name's first label or after a / of a URI's path\n  hint: write \"pg1.example.com\", \"*.example.com\", \"spiffe://example/sql/pg1\" or \"spiffe://example/sql/*\"\nf:7:8: error: `control.peer.role`: there is no role \"root\"\n  hint: write \"resource\" or \"admin\"\nf:8:9: error: `control.peer.pools`: there is no pool \"sqll\"\n  hint: did you mean \"sql\"?\nf:9:13: error: `control.peer.addresses`: \"x\" is not a network\n  hint: write \"10.0.0.0/8\" or \"10.0.0.1\"\nf:10:7: error: `control.peer.ids`: \"a b\" has the character ' '; a name takes A-Z a-z 0-9 . _ : / -\n  hint: write an id, as \"pg1\", or how ids begin, as \"pg-*\"\n"),
    ("[control.tls]\ncert = \"a\"\nkey = \"b\"\nclient_ca = \"c\"\n[[control.peer]]\nsan = \"a\"\n[[control.peer]]\nsan = \"b\"\nrole = \"admin\"\npools = [\"sql\"]",
     "f:5:1: error: `control.peer` names no pool that it may join\n  hint: add pools = [\"sql\"], or role = \"admin\"\nf:7:1: error: `control.peer` is an administrator's, who joins nothing\n  hint: remove pools, addresses and ids, or add a second [[control.peer]] for them\n"),
    ("[[upstream]]\nbalancer = [\"http://10.0.0.1:7400\"]\n[upstream.tls]\nca = \"ca\"\ncert = \"c\"\nserver_name = \"a b\"\ntoken = \"x\"",
     "f:3:1: error: `upstream.tls` has one of cert and key; they go together\n  hint: add the other one\nf:3:1: error: `upstream.balancer`: http://10.0.0.1:7400 is clear text, and `upstream.tls` has certificates\n  hint: write https://HOST:PORT\nf:6:15: error: `upstream.tls.server_name`: \"a b\" is not a name\n  hint: write \"balancer.example.com\"\nf:7:1: error: there is no key `upstream.tls.token`\n  hint: there are ca, cert, key, server_name, token_file\n"),
];

#[test]
fn what_would_let_the_wrong_ones_in_is_refused() {
    for (lines, expected) in WRONG_SECURITY {
        assert_eq!(&errors(&with_a_listener(lines)), expected, "{lines}");
    }
}

#[test]
fn security_can_be_changed() {
    let lines = r#"
        [control]
        listen = "0.0.0.0:7400"
        addresses = ["10.0.0.0/8", "192.0.2.1"]
        [control.tls]
        cert = "a.pem"
        key = "a.key"
        client_ca = "ca.pem"
        require_certificate = true
        [control.limits]
        registrations_per_second = 1
        streams = 2
        connections = 3
        [[control.peer]]
        san = "*.Example.com"
        pools = ["sql"]
        addresses = ["2001:db8::/32"]
        ids = ["pg-*", "one"]
        [[control.peer]]
        san = "spiffe://example/admin"
        role = "admin"
        [[upstream]]
        balancer = ["https://10.0.0.1:7400"]
        [upstream.tls]
        ca = "up.pem"
        cert = "c.pem"
        key = "c.key"
        server_name = "above.example.com"
        token_file = "up.token"
    "#;
    let config = Config::parse(with_a_listener(lines).as_bytes()).expect("a good file");
    assert!(!config.control.insecure, "TLS is enough beyond loopback");
    let transport = agent::Transport {
        ca: Some("up.pem".into()),
        identity: Some(("c.pem".into(), "c.key".into())),
        server_name: Some("above.example.com".into()),
        token: agent::TokenSource::File("up.token".into()),
    };
    assert_eq!(config.upstreams[0].transport, transport);
    let security = config.security;
    let tls = control::TlsConfig {
        cert: "a.pem".into(),
        key: "a.key".into(),
        client_ca: "ca.pem".into(),
        require_certificate: true,
    };
    assert_eq!(security.tls, Some(tls));
    let limits = control::PeerLimits { registrations_per_second: 1, streams: 2, connections: 3 };
    assert_eq!(security.limits, limits);
    let nets: Vec<_> = security.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(nets, ["10.0.0.0/8", "192.0.2.1/32"]);
    let [resource, admin] = &security.peers[..] else { panic!("{:?}", security.peers) };
    assert_eq!(resource.san.to_string(), "*.example.com");
    assert_eq!((resource.role, resource.pools.len(), resource.ids.len()), (control::Role::Resource, 1, 2));
    assert_eq!((admin.role, admin.pools.len()), (control::Role::Admin, 0));
}

#[test]
fn every_knob_of_tcp_can_be_changed() {
    let file = r#"
        [[pool]]
        name = "sql"
        source_addresses = ["10.0.0.9", "fd00::9"]
        [pool.tcp]
        keepalive = "0s"
        user_timeout = "1500ms"
        fast_open = true
        mark = 0xff
        [[pool]]
        name = "other"
        transparent = true
        [[listener]]
        bind = "tcp://0.0.0.0:5432"
        pool = "sql"
        [listener.tcp]
        backlog = 100
        defer_accept = "3s"
        fast_open = 16
        keepalive = "2m"
        keepalive_interval = "10s"
        keepalive_probes = 5
        user_timeout = "30s"
        receive_buffer = 65_536
        send_buffer = 131_072
        mark = 7
        congestion = "bbr"
        dscp = 46
        mptcp = true
    "#;
    let config = Config::parse(file.as_bytes()).expect("a good file");
    let options = dataplane::TcpOptions {
        keepalive: dataplane::KeepaliveOptions {
            time: Some(Duration::from_secs(120)),
            interval: Some(Duration::from_secs(10)),
            probes: Some(5),
        },
        user_timeout: Some(Duration::from_secs(30)),
        receive_buffer: Some(65_536),
        send_buffer: Some(131_072),
        mark: Some(7),
        congestion: Some("bbr".to_owned()),
        dscp: Some(46),
        mptcp: true,
    };
    let tcp = dataplane::ListenerTcp { options, backlog: 100, defer_accept_seconds: 3, fast_open: 16 };
    assert_eq!(config.listeners[0].tcp, tcp);
    let keepalive =
        dataplane::KeepaliveOptions { time: Some(Duration::ZERO), ..dataplane::KeepaliveOptions::default() };
    let options = dataplane::TcpOptions {
        keepalive,
        user_timeout: Some(Duration::from_millis(1500)),
        mark: Some(255),
        ..dataplane::TcpOptions::default()
    };
    let sources = vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()];
    let sql = dataplane::Connecting { proxy: None, options, fast_open: true, sources, transparent: false };
    let other = dataplane::Connecting { transparent: true, ..dataplane::Connecting::default() };
    assert_eq!(config.connecting, [sql, other]);
}

#[test]
fn knobs_of_tcp_that_cannot_be_are_refused() {
    let pool =
        "[[pool]]\nname = \"sql\"\nsource_addresses = [\"10.0.0.9\", \"10.0.0.9\"]\ntransparent = true\n";
    let file = pool.to_owned()
        + "[pool.tcp]\nfast_open = true\nmptcp = true\nreceive_buffer = 100\ncongestion = \"b b\"\nbacklog = 9\n"
        + "[[listener]]\nbind = \"tcp://127.0.0.1:5432\"\npool = \"sql\"\n"
        + "[listener.tcp]\nbacklog = 0\ndefer_accept = \"250ms\"\nuser_timeout = \"2d\"\ndscp = 64\nmark = \"x\"\n"
        + "keepalive_probes = 128\nkeepalive_interval = \"10h\"\n";
    let errors = errors(&file);
    for expected in [
        "f:3:20: error: `pool.source_addresses` has 10.0.0.9 twice\n  hint: remove one of the two",
        "f:4:15: error: `pool.transparent` connects from the client's address, `source_addresses` from yours",
        "f:6:13: error: `pool.tcp.fast_open` does not go with `mptcp`",
        "f:8:18: error: `pool.tcp.receive_buffer`: 100 bytes hold no segment\n  hint: write 4096 or more, or 0 for",
        "f:9:14: error: `pool.tcp.congestion`: \"b b\" is no congestion control\n  hint: write \"cubic\", \"bbr\" or",
        "f:10:1: error: there is no key `pool.tcp.backlog`",
        "f:15:11: error: `listener.tcp.backlog`: 0 is out of range\n  hint: write a whole number from 1 to 65535",
        "f:16:16: error: `listener.tcp.defer_accept`: \"250ms\" is not in whole seconds\n  hint: write \"5s\"",
        "f:17:16: error: `listener.tcp.user_timeout`: \"2d\" is out of range\n  hint: write at most \"1d\"",
        "f:18:8: error: `listener.tcp.dscp`: 64 is out of range",
        "f:19:8: error: `listener.tcp.mark`: this is a text, not an integer",
        "f:20:20: error: `listener.tcp.keepalive_probes`: 128 is out of range",
        "f:21:22: error: `listener.tcp.keepalive_interval`: \"10h\" is out of range",
    ] {
        assert!(errors.contains(expected), "{expected}\n{errors}");
    }
}

#[test]
fn how_pools_are_checked() {
    let of = |lines: &str| {
        let file = format!(
            "[[pool]]\nname = \"sql\"\n[pool.check]\n{lines}\n[[listener]]\nbind = \"tcp://127.0.0.1:1\"\npool = \"sql\"\n"
        );
        Config::parse(file.as_bytes()).map(|config| {
            assert!(config.pools[0].checked);
            config.checks.into_iter().flatten().next().expect("a check")
        })
    };
    let check = of("kind = \"tcp\"").expect("the least check");
    assert_eq!(check.timing, checks::Timing::default());
    assert_eq!((check.timeout, check.port, check.tls), (Duration::from_secs(1), None, None));
    let lines = "kind = \"send_expect\"\ninterval = \"200ms\"\ntimeout = \"90ms\"\nrise = 1\nfall = 1\nport = 7\n\
                 send = 'PING\\r\\n'\nexpect = \"\\\\x00\"\n[pool.check.tls]\nverify = false\nserver_name = \"a.b\"";
    let check = of(lines).expect("a good check");
    assert_eq!(check.timing.fast_interval, Duration::from_millis(200));
    assert_eq!((check.timing.rise, check.timing.fall, check.port), (1, 1, Some(7)));
    let checks::Dialogue::SendExpect(texts) = check.dialogue else { panic!("{:?}", check.dialogue) };
    assert_eq!((texts.send, texts.expect), (b"PING\r\n".to_vec(), vec![0]));
    assert_eq!(check.tls.map(|tls| (tls.verify, tls.server_name)), Some((false, Some("a.b".into()))));
    for (kind, starttls) in [("smtp", true), ("ftp", false), ("xmpp\"\ndomain = \"a.b", true)] {
        let check = of(&format!("kind = \"{kind}\"\n[pool.check.tls]\nstarttls = {starttls}"));
        assert_eq!(check.expect("a good check").tls.map(|tls| tls.starttls), Some(starttls));
    }
    for kind in ["tls", "postgresql", "redis", "smtp", "ftp", "http", "grpc"] {
        assert_eq!(of(&format!("kind = \"{kind}\"")).expect(kind).dialogue.kind(), kind);
    }
    let with_header = |port: &str| {
        let file = format!(
            "[[pool]]\nname = \"sql\"\nproxy_protocol = \"v2\"\n[pool.check]\nkind = \"tcp\"\n{port}[[listener]]\n\
             bind = \"tcp://127.0.0.1:1\"\npool = \"sql\"\n"
        );
        let config = Config::parse(file.as_bytes()).expect("a good file");
        config.checks.into_iter().flatten().next().expect("a check").proxy
    };
    assert_eq!(with_header(""), Some(checks::ProxyHeader::V2), "as flows");
    assert_eq!(with_header("port = 8008\n"), None, "another port is another service");
    for (lines, expected) in [
        ("", "f:3:1: error: `pool.check.kind` is missing"),
        ("kind = \"posgresql\"", "hint: did you mean \"postgresql\"?"),
        ("kind = \"tcp\"\nuser = \"a\"", "f:3:1: error: `pool.check.user` does nothing for the kind \"tcp\""),
        ("kind = \"mysql\"", "f:3:1: error: `pool.check.user` is missing"),
        ("kind = \"mysql\"", "CREATE USER"),
        ("kind = \"dns\"\nname = \"a..b\"", "f:5:8: error: `pool.check.name`: \"a..b\" is no DNS name"),
        ("kind = \"dns\"\nname = \"a\"\n[pool.check.tls]", "there is no DNS over TLS by datagrams"),
        (
            "kind = \"redis\"\n[pool.check.tls]\nstarttls = true",
            "f:3:1: error: `pool.check.tls.starttls` does nothing for the kind \"redis\"",
        ),
        ("kind = \"postgresql\"\n[pool.check.tls]\nstarttls = true", "asked for in its own protocol"),
        ("kind = \"send_expect\"", "`pool.check.expect` is missing"),
        ("kind = \"udp\"\nsend = '\\q'", "there is no escape"),
        (
            "kind = \"http\"\nstatus = \"20\"\npath = \"x\"",
            "f:5:10: error: `pool.check.status`: \"20\" names no statuses",
        ),
        (
            "kind = \"http\"\nstatus = \"200\"\npath = \"x\"",
            "f:6:8: error: `pool.check.path`: \"x\" is no path",
        ),
        ("kind = \"tcp\"\ninterval = \"1s\"\nfast_interval = \"2s\"", "`pool.check.fast_interval` is longer"),
        ("kind = \"tcp\"\nrise = 0\nport = 0", "f:6:8: error: `pool.check.port`: 0 is out of range"),
        ("kind = \"command\"", "`pool.check.command` is missing"),
        ("kind = \"tcp\"\naddress = \"0.0.0.0:1\"", "nobody can connect to 0.0.0.0:1"),
        ("kind = \"tcp\"\nretries = 1", "there is no key `pool.check.retries`"),
    ] {
        let errors = of(lines).expect_err(lines).render("f");
        assert!(errors.contains(expected), "{lines}: {expected}\n{errors}");
    }
}
