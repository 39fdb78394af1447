//! Which of a listener's pools a flow goes to: by the name it asks for, the protocols it offers, its network, the port.
//!
//! Owns: the rules, made ready once. Does not own: what a target is; it is a number here, and 0 the default.
//!
//! Invariant: the first route of the list whose every condition is met is taken, however the names are indexed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

use super::hello::ClientHello;

/// A name that a client may ask for: `db.example.com`, or `*.example.com` for every name with one more label.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServerName {
    /// In lower case, without `*.` and without a dot at the end.
    name: Box<str>,
    wildcard: bool,
}

/// Why a text is not a [`ServerName`]. The operator's to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, or longer than the 253 bytes of a name in DNS.
    #[error("a name has 1 to 253 characters")]
    Length,
    /// Not letters, digits, `-` and `_` between dots.
    #[error("a name is of labels of 1 to 63 letters, digits, - and _, with dots between them")]
    Label,
    /// A `*` that is not the first label, or is the only one.
    #[error("a * stands for the first label alone: *.example.com")]
    Wildcard,
    /// Clients ask for names only.
    #[error("an address is never asked for by name (RFC 6066)")]
    Address,
}

impl FromStr for ServerName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.parse::<IpAddr>().is_ok() {
            return Err(NameError::Address);
        }
        let (name, wildcard) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        if name.contains('*') {
            return Err(NameError::Wildcard);
        }
        if name.is_empty() || name.len() > 253 {
            return Err(NameError::Length);
        }
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if !name.split('.').all(is_label) {
            return Err(NameError::Label);
        }
        Ok(Self { name: name.to_ascii_lowercase().into(), wildcard })
    }
}

/// One route. What is empty or `None` is met by everybody.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Route {
    /// Names, of which the client asks for one.
    pub names: Vec<ServerName>,
    /// Protocols, of which the client offers one.
    pub protocols: Vec<Box<[u8]>>,
    /// Networks, of which the client is in one.
    pub networks: Vec<IpNet>,
    /// Ports of the listener.
    pub ports: Option<RangeInclusive<u16>>,
    /// Whoever meets all goes here.
    pub target: u16,
}

/// What is known of a flow.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts<'a> {
    /// Who the client is.
    pub client: Option<IpAddr>,
    /// The port that it connected to.
    pub port: u16,
    /// Its TLS hello.
    pub hello: Option<&'a ClientHello<'a>>,
}

/// Where a flow goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Routed {
    /// By which route, counted from 1; 0: it met none.
    pub route: u16,
    /// To whom.
    pub target: u16,
}

impl Routed {
    /// To the default, by no route.
    pub const DEFAULT: Self = Self { route: 0, target: 0 };
}

/// A listener's routes, made ready.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    routes: Vec<Route>,
    /// Routes with this name, in order.
    exact: HashMap<Box<str>, Vec<u16>>,
    /// Routes with `*.` and this name, in order.
    wildcards: HashMap<Box<str>, Vec<u16>>,
    /// Routes without names, in order.
    nameless: Vec<u16>,
}

impl Routes {
    /// Most routes of a listener.
    pub const MAX: usize = 256;

    /// Of these, in order.
    ///
    /// # Panics
    /// If they are more than [`Self::MAX`]: a configuration is checked before.
    pub fn new(routes: Vec<Route>) -> Self {
        assert!(routes.len() <= Self::MAX, "{} routes", routes.len());
        let mut all = Self { routes, ..Self::default() };
        for (index, route) in (0..).zip(&all.routes) {
            if route.names.is_empty() {
                all.nameless.push(index);
            }
            for name in &route.names {
                let map = if name.wildcard { &mut all.wildcards } else { &mut all.exact };
                let indexes = map.entry(name.name.clone()).or_default();
                // Twice in one route is once.
                if indexes.last() != Some(&index) {
                    indexes.push(index);
                }
            }
        }
        all
    }

    /// Whether everything goes to the default.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// Whether a route looks at the TLS hello.
    pub fn want_hello(&self) -> bool {
        self.routes.iter().any(|route| !route.names.is_empty() || !route.protocols.is_empty())
    }

    /// Whether a route looks at the client's address.
    pub fn want_client(&self) -> bool {
        self.routes.iter().any(|route| !route.networks.is_empty())
    }

    /// By the first route that the flow meets.
    pub fn select(&self, facts: &Facts<'_>) -> Routed {
        let mut lower = [0; 255];
        let name = facts.hello.and_then(|hello| hello.server_name).and_then(|name| {
            let lower = lower.get_mut(..name.len())?;
            lower.copy_from_slice(name.as_bytes());
            lower.make_ascii_lowercase();
            str::from_utf8(lower).ok()
        });
        let exact = name.and_then(|name| self.exact.get(name));
        let parent = name.and_then(|name| name.split_once('.')).filter(|(label, _)| !label.is_empty());
        let wildcard = parent.and_then(|(_, parent)| self.wildcards.get(parent));
        let mut lists = [slice(exact), slice(wildcard), &self.nameless[..]];
        // The three lists are in order: each time the lowest of their heads is next.
        while let Some(index) = lists.iter().filter_map(|list| list.first()).min().copied() {
            for list in &mut lists {
                if let [first, rest @ ..] = *list
                    && *first == index
                {
                    *list = rest;
                }
            }
            let route = &self.routes[usize::from(index)];
            if route.is_met(facts) {
                return Routed { route: index + 1, target: route.target };
            }
        }
        Routed::DEFAULT
    }
}

impl Route {
    /// All but the name.
    fn is_met(&self, facts: &Facts<'_>) -> bool {
        let offers = |hello: &ClientHello<'_>| {
            hello.protocols().any(|offered| self.protocols.iter().any(|protocol| **protocol == *offered))
        };
        let comes_from = |client: IpAddr| {
            let client = client.to_canonical();
            self.networks.iter().any(|network| network.contains(&client))
        };
        (self.protocols.is_empty() || facts.hello.is_some_and(offers))
            && (self.networks.is_empty() || facts.client.is_some_and(comes_from))
            && self.ports.as_ref().is_none_or(|ports| ports.contains(&facts.port))
    }
}

fn slice(list: Option<&Vec<u16>>) -> &[u16] {
    list.map_or(&[], Vec::as_slice)
}
