//! One run: a fleet, balancers of one policy, and flows, from the first arrival to the last ending.

use std::collections::VecDeque;

use super::balancer::{Balancer, Conditions, Contender, Ending, How};
use super::event::{Agenda, Event, Time};
use super::random::{Random, Stream};
use super::server::{Change, Meter, Plan, Server};

/// How much work a flow is, in seconds on a server of speed 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Work {
    /// Exponential with this mean.
    Exponential(f64),
    /// Normal with this mean and as large a deviation, and 0 where it is negative; so its mean is 1.083 times as much.
    ClampedNormal(f64),
}

/// Mean of a [`Work::ClampedNormal`] over its parameter.
pub(crate) const CLAMPED_MEAN: f64 = 1.083_315;

impl Work {
    fn draw(self, random: &mut Random) -> f64 {
        match self {
            Self::Exponential(mean) => mean * random.exponential(),
            Self::ClampedNormal(mean) => (mean * (1.0 + random.normal())).max(0.0),
        }
    }
}

/// Everything that makes a run but the policy and the seed.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// By server. Those that join later come last.
    pub(crate) plans: Vec<Plan>,
    /// How utilization is measured.
    pub(crate) meter: Meter,
    /// Flows a second, from these seconds on.
    pub(crate) load: Vec<(f64, f64)>,
    /// Flows that arrive all at once at the start.
    pub(crate) prefill: usize,
    /// Work of a flow.
    pub(crate) work: Work,
    /// Balancers that share the fleet.
    pub(crate) balancers: usize,
    /// Seconds between two reports of a server.
    pub(crate) report_interval: f64,
    /// Part of the reports that is lost on the way to a balancer.
    pub(crate) loss: f64,
    /// Seconds after which a client goes away; none: never.
    pub(crate) timeout: Option<f64>,
    /// Seconds before anything is measured.
    pub(crate) warm_up: f64,
    /// Seconds that are measured.
    pub(crate) seconds: f64,
}

/// A second of a run, by server.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Second {
    /// Flows that it got.
    pub(crate) opened: Vec<u32>,
    /// Part of its places that were busy.
    pub(crate) busy: Vec<f64>,
    /// Flows in it at the end.
    pub(crate) held: Vec<u32>,
}

/// What a run gave. Flows that arrived in the warm-up are in `seconds` only.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Run {
    /// Of each flow since its arrival, in microseconds; of one that failed, the timeout.
    pub(crate) latencies_us: Vec<u32>,
    pub(crate) answered: u64,
    pub(crate) timed_out: u64,
    pub(crate) reset: u64,
    /// No server could be selected.
    pub(crate) refused: u64,
    /// Every second from the start on.
    pub(crate) seconds: Vec<Second>,
}

impl Run {
    /// Flows that were not answered.
    pub(crate) fn failed(&self) -> u64 {
        self.timed_out + self.reset + self.refused
    }
}

#[derive(Debug, Clone, Copy)]
struct Flow {
    arrived: Time,
    work: f64,
    service: f64,
    server: u32,
    balancer: u32,
    rif_at_arrival: u32,
    /// Its client has gone.
    dead: bool,
    /// Told from an earlier flow in the same place.
    number: u64,
}

/// Simulates one policy with one seed.
pub(crate) fn run(setup: &Setup, contender: Contender, seed: u64) -> Run {
    let mut world = World::new(setup, contender, seed);
    world.plan_all();
    world.prefill();
    while world.step() {}
    world.run
}

struct World<'a> {
    setup: &'a Setup,
    servers: Vec<Server>,
    joined: usize,
    balancers: Vec<Box<dyn Balancer>>,
    arrivals: Random,
    reports: Vec<Random>,
    agenda: Agenda,
    next_arrival: Time,
    /// Place in the load of the rate that holds.
    phase: usize,
    flows: Vec<Flow>,
    free: Vec<u32>,
    flow_number: u64,
    deadlines: VecDeque<(Time, u32, u64)>,
    end: Time,
    measured_from: Time,
    opened: Vec<u32>,
    busy: Vec<f64>,
    run: Run,
}

impl<'a> World<'a> {
    fn new(setup: &'a Setup, contender: Contender, seed: u64) -> Self {
        let count = setup.plans.len();
        let joined = setup.plans.iter().filter(|plan| !plan.joins()).count();
        let server = |(number, plan): (usize, &Plan)| Server::new(plan.clone(), setup.meter, seed, number);
        let balancer = |number| {
            contender.balancer(Conditions {
                servers: joined,
                balancers: setup.balancers,
                report_interval: setup.report_interval,
                random: Random::new(seed, Stream::Balancer(number)),
            })
        };
        Self {
            setup,
            servers: setup.plans.iter().enumerate().map(server).collect(),
            joined,
            balancers: (0..setup.balancers).map(balancer).collect(),
            arrivals: Random::new(seed, Stream::Arrivals),
            reports: (0..count).map(|number| Random::new(seed, Stream::Reports(number))).collect(),
            agenda: Agenda::default(),
            next_arrival: Time::default(),
            phase: 0,
            flows: Vec::new(),
            free: Vec::new(),
            flow_number: 0,
            deadlines: VecDeque::new(),
            end: Time::from_seconds(setup.warm_up + setup.seconds),
            measured_from: Time::from_seconds(setup.warm_up),
            opened: vec![0; count],
            busy: vec![0.0; count],
            run: Run::default(),
        }
    }

    fn plan_all(&mut self) {
        for (number, server) in (0_u32..).zip(&mut self.servers) {
            if let Some(seconds) = server.next_redraw() {
                self.agenda.plan(Time::from_seconds(seconds), Event::Redraw { server: number });
            }
            for change in 0..server.changes() {
                let at = Time::from_seconds(server.change(change).0);
                self.agenda.plan(at, Event::Change { server: number, change: change as u32 });
            }
            if (number as usize) < self.joined {
                let phase = self.reports[number as usize].unit() * self.setup.report_interval;
                self.agenda.plan(Time::from_seconds(phase), Event::Report { server: number });
            }
        }
        self.agenda.plan(Time::from_seconds(1.0), Event::Second);
        self.next_arrival = self.arrival_after(Time::default());
    }

    fn prefill(&mut self) {
        for _ in 0..self.setup.prefill {
            self.arrive(Time::default());
        }
    }

    /// Poisson; where the rate changes, the rest of the gap is drawn anew, as an exponential one may be.
    fn arrival_after(&mut self, now: Time) -> Time {
        let mut from = now;
        loop {
            let (_, rate) = self.setup.load[self.phase];
            let until =
                self.setup.load.get(self.phase + 1).map_or(Time::NEVER, |next| Time::from_seconds(next.0));
            let at = from.after(self.arrivals.exponential() / rate);
            if at < until {
                return if at < self.end { at } else { Time::NEVER };
            }
            from = until;
            self.phase += 1;
        }
    }

    /// Whatever is next; false: nothing is left.
    fn step(&mut self) -> bool {
        let deadline = self.deadlines.front().map_or(Time::NEVER, |(at, ..)| *at);
        let planned = self.agenda.next_at();
        if planned <= deadline && planned <= self.next_arrival && planned < Time::NEVER {
            if let Some((now, event)) = self.agenda.pop() {
                self.happen(now, event);
            }
        } else if deadline <= self.next_arrival && deadline < Time::NEVER {
            if let Some((now, flow, number)) = self.deadlines.pop_front() {
                self.time_out(flow, number, now);
            }
        } else if self.next_arrival < Time::NEVER {
            let now = self.next_arrival;
            self.arrive(now);
            self.next_arrival = self.arrival_after(now);
        } else {
            return false;
        }
        true
    }

    fn happen(&mut self, now: Time, event: Event) {
        match event {
            Event::Served { server, flow } => self.served(server as usize, flow, now),
            Event::Second => self.second(now),
            // What repeats ends with the arrivals: then only flows are waited for.
            _ if now >= self.end => {}
            Event::Redraw { server } => {
                if let Some(seconds) = self.servers[server as usize].redraw() {
                    self.agenda.plan(now.after(seconds), event);
                }
            }
            Event::Report { server } => {
                self.report(server as usize, now);
                self.agenda.plan(now.after(self.setup.report_interval), event);
            }
            Event::Change { server, change } => self.change(server as usize, change as usize, now),
        }
    }

    fn arrive(&mut self, now: Time) {
        let balancer = self.arrivals.below(self.balancers.len());
        let work = self.setup.work.draw(&mut self.arrivals);
        let Some(chosen) = self.balancers[balancer].select(now, &self.servers) else {
            if now >= self.measured_from {
                self.run.refused += 1;
                self.run.latencies_us.push(self.failure_us());
            }
            return;
        };
        self.opened[chosen] += 1;
        let server = &mut self.servers[chosen];
        self.flow_number += 1;
        let flow = Flow {
            arrived: now,
            work,
            service: 0.0,
            server: chosen as u32,
            balancer: balancer as u32,
            rif_at_arrival: server.rif(),
            dead: false,
            number: self.flow_number,
        };
        if server.failing {
            server.reset();
            self.ended(&flow, How::Reset, now);
            return;
        }
        let id = self.keep(flow);
        if let Some(timeout) = self.setup.timeout {
            self.deadlines.push_back((now.after(timeout), id, flow.number));
        }
        if self.servers[chosen].arrive(id) {
            self.serve(id, now);
        }
    }

    fn keep(&mut self, flow: Flow) -> u32 {
        if let Some(id) = self.free.pop() {
            self.flows[id as usize] = flow;
            return id;
        }
        self.flows.push(flow);
        (self.flows.len() - 1) as u32
    }

    fn serve(&mut self, id: u32, now: Time) {
        let flow = &mut self.flows[id as usize];
        flow.service = self.servers[flow.server as usize].serve(flow.work, now);
        self.agenda.plan(now.after(flow.service), Event::Served { server: flow.server, flow: id });
    }

    fn served(&mut self, server: usize, id: u32, now: Time) {
        let flow = self.flows[id as usize];
        self.free.push(id);
        self.servers[server].served(flow.work, now);
        if !flow.dead {
            self.servers[server].answered(flow.rif_at_arrival, now.since(flow.arrived));
            self.flows[id as usize].number = 0;
            self.ended(&flow, How::Answered, now);
        }
        while let Some(next) = self.servers[server].next_waiting() {
            // Its client closed the connection while it waited: nothing is done for it.
            if self.flows[next as usize].dead {
                self.free.push(next);
            } else {
                self.serve(next, now);
            }
        }
    }

    fn time_out(&mut self, id: u32, number: u64, now: Time) {
        let flow = &mut self.flows[id as usize];
        if flow.number != number {
            return;
        }
        flow.dead = true;
        let flow = *flow;
        self.servers[flow.server as usize].abandoned();
        self.ended(&flow, How::TimedOut, now);
    }

    fn ended(&mut self, flow: &Flow, how: How, now: Time) {
        let latency = now.since(flow.arrived);
        let queue = self.servers[flow.server as usize].rif();
        let ending = Ending { how, latency, service: flow.service, queue };
        self.balancers[flow.balancer as usize].done(flow.server as usize, now, &ending);
        if flow.arrived < self.measured_from {
            return;
        }
        let failure_us = self.failure_us();
        let (count, us) = match how {
            How::Answered => (&mut self.run.answered, (latency * 1e6) as u32),
            How::TimedOut => (&mut self.run.timed_out, failure_us),
            How::Reset => (&mut self.run.reset, failure_us),
        };
        *count += 1;
        self.run.latencies_us.push(us);
    }

    /// The latency that a failure counts as.
    fn failure_us(&self) -> u32 {
        (self.setup.timeout.unwrap_or(60.0) * 1e6) as u32
    }

    fn report(&mut self, server: usize, now: Time) {
        let report = self.servers[server].report(now);
        for balancer in &mut self.balancers {
            // Drawn whether it matters or not: a loss must not change who loses later.
            let lost = self.reports[server].unit() < self.setup.loss;
            if !lost {
                balancer.report(server, &report, now);
            }
        }
    }

    fn change(&mut self, number: usize, change: usize, now: Time) {
        match self.servers[number].change(change).1 {
            Change::Faster(factor) => self.servers[number].be_faster(factor),
            Change::Fail => self.servers[number].failing = true,
            Change::Join => {
                for balancer in &mut self.balancers {
                    balancer.join(number, now);
                }
                let phase = self.reports[number].unit() * self.setup.report_interval;
                self.agenda.plan(now.after(phase), Event::Report { server: number as u32 });
            }
        }
    }

    fn second(&mut self, now: Time) {
        for balancer in &mut self.balancers {
            balancer.tick(now);
        }
        let mut second = Second::default();
        for (server, before) in self.servers.iter_mut().zip(&mut self.busy) {
            let busy = server.busy_until(now);
            second.busy.push((busy - *before) / f64::from(server.places()));
            second.held.push(server.rif());
            *before = busy;
        }
        second.opened = self.opened.clone();
        self.opened.fill(0);
        self.run.seconds.push(second);
        if now < self.end {
            self.agenda.plan(now.after(1.0), Event::Second);
        }
    }
}
