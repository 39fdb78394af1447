//! Containers as resources: a real Docker Engine and its swarm, followed by the balancer.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use e2e::{Balancer, BalancerConfig, Clients, Docker, IMAGE, PATIENCE, ask, until, within};

/// The service of every container.
const GREETER: &str = env!("CARGO_BIN_EXE_greeter");
/// Clients that connect again and again.
const CLIENTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(5);
/// What must take seconds may take so long on a machine that is busy with other things.
const GENEROUS: Duration = Duration::from_secs(15);

/// A balancer that follows the engine that answers there, and the listener of its pool `web`.
fn balancer(endpoint: &str) -> (Balancer, SocketAddr) {
    let mut config = BalancerConfig::default();
    let listener = config.add_pool("web", "");
    config.further += &format!(
        "[[provider]]\nkind = \"docker\"\nendpoint = \"{endpoint}\"\npools = [\"web\"]\nreport_interval = \"500ms\"\n"
    );
    let balancer = Balancer::start(config);
    until("the engine is followed", || (up(&balancer) == 1.0).then_some(()));
    (balancer, listener)
}

fn up(balancer: &Balancer) -> f64 {
    balancer.metrics().sum("trimtab_provider_up", &[("provider", "docker")])
}

/// Ids of the resources that get new flows.
fn ready(balancer: &Balancer) -> BTreeSet<String> {
    let all = balancer.resources();
    all.into_iter().filter(|(_, resource)| resource["state"] == "ready").map(|(id, _)| id).collect()
}

#[track_caller]
fn wait_until_ready(balancer: &Balancer, count: usize) -> (BTreeSet<String>, Duration) {
    within(PATIENCE, &format!("{count} resources are ready"), || {
        Some(ready(balancer)).filter(|ready| ready.len() == count)
    })
}

/// Every connection that began since then, which must all have been served; says by how many hosts.
#[track_caller]
fn all_served(clients: &Clients, since: Instant, what: &str) -> usize {
    let asked = clients.since(since);
    let failed: Vec<_> = asked.iter().filter(|asked| asked.outcome.is_err()).collect();
    let hosts: BTreeSet<_> = asked.iter().filter_map(|asked| asked.outcome.clone().ok()).collect();
    println!("{what}: {} connections, {} failed, {} hosts", asked.len(), failed.len(), hosts.len());
    assert!(!asked.is_empty(), "{what}: nobody connected");
    assert!(failed.is_empty(), "{what}: {failed:?}");
    hosts.len()
}

/// Waits until clients have made so many more connections.
#[track_caller]
fn let_clients_connect(clients: &Clients, count: usize) {
    let since = Instant::now();
    until("clients connect", || (clients.since(since).len() >= count).then_some(()));
}

#[test]
fn a_swarm_service_is_balanced_to_with_no_connection_lost() {
    let docker = Docker::start(GREETER, &[]);
    docker.inside(|| {
        let (balancer, listener) = balancer(&docker.endpoint());
        // The node becomes a manager while it is followed.
        docker.run("swarm init --advertise-addr 127.0.0.1");
        // Each task has an address of its own, which this host reaches.
        docker.run("network create --scope swarm --driver bridge web-net");
        let since = Instant::now();
        // With --init a container ends at SIGTERM at once, as services without manners do.
        docker.run(&format!(
            "service create --init --detach --no-resolve-image --name web --replicas 2 --network web-net \
             --label trimtab.pool=web --label trimtab.label.tier=front {IMAGE}"
        ));
        within(PATIENCE, "the first connection is served", || ask(listener).ok());
        let first = since.elapsed();
        wait_until_ready(&balancer, 2);
        println!(
            "service create: first connection served after {first:?}, both replicas after {:?}",
            since.elapsed()
        );
        assert!(first < GENEROUS, "{first:?}");
        let resources = balancer.resources();
        assert!(resources.values().all(|resource| resource["labels"]["tier"] == "front"), "{resources:?}");
        assert!(resources.values().all(|resource| resource["labels"]["service"] == "web"), "{resources:?}");

        let start = Instant::now();
        let clients = Clients::start(listener, CLIENTS, PAUSE);
        let_clients_connect(&clients, 50);

        let since = Instant::now();
        docker.run("service scale --detach web=4");
        wait_until_ready(&balancer, 4);
        println!("scale 4: four replicas get flows after {:?}", since.elapsed());
        until("all four serve", || {
            let hosts: BTreeSet<_> =
                clients.since(since).into_iter().filter_map(|asked| asked.outcome.ok()).collect();
            (hosts.len() == 4).then_some(())
        });

        let since = Instant::now();
        docker.run("service scale --detach web=1");
        let (left, took) = wait_until_ready(&balancer, 1);
        println!("scale 1: one replica gets flows after {took:?}");
        until("the others have ended", || (docker.containers("web.").len() == 1).then_some(()));
        println!("scale 1: the others have ended after {:?}", since.elapsed());
        assert_eq!(left, [format!("docker:{}", docker.containers("web.")[0])].into());
        let_clients_connect(&clients, 50);
        all_served(&clients, start, "created, scaled to 4 and to 1");

        docker.run("service scale --detach web=2");
        wait_until_ready(&balancer, 2);
        let start = Instant::now();
        let before = ready(&balancer);
        docker.run("service update --detach --force --update-delay 0s web");
        until("every task was replaced", || {
            let now = ready(&balancer);
            (now.len() == 2 && now.is_disjoint(&before)).then_some(())
        });
        println!("a rolling update of two replicas took {:?}", start.elapsed());
        all_served(&clients, start, "updated");

        docker.run("service rm web");
        until("all resources are gone", || balancer.resources().is_empty().then_some(()));
    });
}

#[test]
fn a_killed_container_costs_no_new_connection() {
    let docker = Docker::start(GREETER, &["--host=tcp://127.0.0.1:2375", "--tls=false"]);
    docker.inside(|| {
        let (balancer, listener) = balancer("tcp://127.0.0.1:2375");
        for name in ["web1", "web2", "web3", "web4"] {
            docker.run(&format!(
                "run --init --detach --name {name} --hostname {name} --label trimtab.pool=web {IMAGE}"
            ));
        }
        wait_until_ready(&balancer, 4);
        let clients = Clients::start(listener, CLIENTS, PAUSE);
        let kill: [(&str, &dyn Fn()); 3] = [
            ("docker kill", &|| drop(docker.run("kill web1"))),
            ("kill -9 of its process", &|| docker.kill_process_of("web2")),
            ("docker stop", &|| drop(docker.run("stop web3"))),
        ];
        for (place, (how, kill)) in kill.into_iter().enumerate() {
            let_clients_connect(&clients, 50);
            let before = Instant::now();
            kill();
            let after = Instant::now();
            let (_, took) = wait_until_ready(&balancer, 3 - place);
            let_clients_connect(&clients, 50);
            println!("{how}: out of selection {took:?} after the command had ended");
            all_served(&clients, after, how);
            // Its open flows end with it; so does what was being connected in that moment.
            let cut = clients.since(before).iter().filter(|asked| asked.outcome.is_err()).count();
            println!("{how}: {cut} connections that began before its end were cut");
            assert!(cut <= CLIENTS, "{how}: more than were open");
        }
    });
}

#[test]
fn a_container_is_what_the_engine_says_of_it() {
    // Containers outlive the engine.
    let docker = Docker::start(GREETER, &["--live-restore"]);
    docker.inside(|| {
        let (balancer, listener) = balancer(&docker.endpoint());
        let state = |id: &str| balancer.resources().get(id).map(|resource| resource["state"].to_string());
        let wait_for = |id: &str, wanted: Option<&str>| {
            let wanted = wanted.map(|wanted| format!("\"{wanted}\""));
            until(&format!("{id} is {wanted:?}"), || (state(id) == wanted).then_some(()));
        };
        health_is_readiness(&docker, &wait_for);
        others_are_left_alone(&docker, &balancer, &wait_for);
        utilization_is_reported(&docker, &balancer, &wait_for);

        docker.kill_engine();
        until("the engine is missed", || (up(&balancer) == 0.0).then_some(()));
        let since = Instant::now();
        until("more than a lease of 3 s is over", || {
            ask(listener).expect("the container still serves");
            (since.elapsed() > Duration::from_secs(4)).then_some(())
        });
        assert_eq!(ready(&balancer), ["docker:busy".to_owned()].into());
        docker.start_engine();
        until("the engine is followed again", || (up(&balancer) == 1.0).then_some(()));
        assert_eq!(ready(&balancer), ["docker:busy".to_owned()].into());
        docker.run("stop --time 0 busy");
        wait_for("docker:busy", None);
        assert_eq!(balancer.metrics().sum("trimtab_leases_expired_total", &[]), 0.0);
    });
}

type WaitFor<'w> = dyn Fn(&str, Option<&str>) + 'w;

fn health_is_readiness(docker: &Docker, wait_for: &WaitFor<'_>) {
    docker.run(&format!(
        "run --init --detach --name sick --label trimtab.pool=web --health-cmd well --health-interval 200ms \
         --health-retries 1 --health-start-period 60s {IMAGE}"
    ));
    // Nobody knows yet, so it has not joined; its first check that passes lets it in.
    wait_for("docker:sick", None);
    docker.run("exec sick touch /well");
    wait_for("docker:sick", Some("ready"));
    docker.run("exec sick rm /well");
    wait_for("docker:sick", Some("not_ready"));
    docker.run("exec sick touch /well");
    wait_for("docker:sick", Some("ready"));
    docker.run("pause sick");
    wait_for("docker:sick", Some("not_ready"));
    docker.run("unpause sick");
    wait_for("docker:sick", Some("ready"));
    docker.run("kill --signal HUP sick");
    docker.run("rm --force sick");
    wait_for("docker:sick", None);
}

fn others_are_left_alone(docker: &Docker, balancer: &Balancer, wait_for: &WaitFor<'_>) {
    docker.run(&format!("run --init --detach --name none {IMAGE}"));
    docker.run(&format!("run --init --detach --name other --label trimtab.pool=sql {IMAGE}"));
    docker.run(&format!(
        "run --init --detach --name typo --label trimtab.pool=web --label trimtab.prot=1 {IMAGE}"
    ));
    docker.run(&format!("run --init --detach --name well --label trimtab.pool=web {IMAGE}"));
    wait_for("docker:well", Some("ready"));
    let errors = |reason| {
        let labels = [("provider", "docker"), ("reason", reason)];
        until(reason, || {
            (balancer.metrics().sum("trimtab_provider_errors_total", &labels) >= 1.0).then_some(())
        });
    };
    errors("refused");
    errors("labels");
    assert_eq!(balancer.resources().keys().collect::<Vec<_>>(), ["docker:well"]);
    // An agent cannot take its place.
    let mut agent = balancer.agent_of("web", "docker:well", balancer.listener(), &[]);
    agent.wait_for_error_line(PATIENCE, |line| line.contains("belong to the provider docker").then_some(()));
    docker.run("rm --force none other typo well");
    wait_for("docker:well", None);
}

fn utilization_is_reported(docker: &Docker, balancer: &Balancer, wait_for: &WaitFor<'_>) {
    docker.run(&format!("run --init --detach --name busy --cpus 0.2 --label trimtab.pool=web {IMAGE}"));
    wait_for("docker:busy", Some("ready"));
    let ratio = |dimension| {
        let labels = [("resource", "docker:busy"), ("dimension", dimension)];
        balancer.metrics().sum("trimtab_resource_utilization_ratio", &labels)
    };
    until("it is idle and says so", || (ratio("memory") > 0.0 && ratio("cpu") < 0.5).then_some(()));
    docker.run("exec --detach busy busybox yes");
    let cpu = until("all of its processor is used", || Some(ratio("cpu")).filter(|cpu| *cpu > 0.7));
    println!("a busy container with --cpus 0.2: cpu {cpu:.2}, memory {:.6}", ratio("memory"));
    assert!(cpu < 1.6, "of its limit, not of the host: {cpu}");
}
