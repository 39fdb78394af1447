//! The smallest proxy: `cargo run --release -p trimtab-dataplane --example proxy LISTEN BACKEND…` (one worker).

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;

use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Publisher};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let addresses: Vec<SocketAddr> =
        std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let (bind, backends) = addresses.split_first().ok_or("usage: proxy LISTEN BACKEND…")?;
    let backend = |address: &SocketAddr| -> Result<Backend, Box<dyn std::error::Error>> {
        let live = Arc::new(LiveFacts::default());
        Ok(Backend { id: address.to_string().parse()?, address: *address, flows_max: 0, live })
    };
    let members = Members::new(backends.iter().map(backend).collect::<Result<_, _>>()?);
    let weights = vec![1.0; members.backends().len()];
    let table = AllocationTable::new(1, Policy::Adaptive, Arc::new(members), weights);
    let listener = dataplane::ListenerConfig::new(*bind, "example".parse()?, Publisher::new(table));
    let mut config = dataplane::Config::new(vec![listener]);
    config.workers = 1;
    let bound = dataplane::bind(config).map_err(|errors| format!("{errors:?}"))?;
    let running = bound.start()?;
    println!("listening on {:?}; end of input stops it", running.addresses());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    running.stop();
    running.join()?;
    Ok(())
}
