//! Who this balancer is, across its restarts and unlike any other.

use hickory_proto::rr::rdata::tsig::TsigAlgorithm;

use crate::plan::Owner;

/// Random, made when the machine was set up (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";
/// Hexadecimal characters of the digest that are kept: 64 bits tell the balancers of any zone apart.
const DIGITS: usize = 16;

impl Owner {
    /// From this machine's id, or `host` where it has none, and what tells balancers of one machine apart.
    ///
    /// The id itself stays secret, as machine-id(5) asks for: it is the key of a digest.
    pub fn of_this_machine(host: &str, balancer: &str) -> Self {
        let machine = std::fs::read_to_string(MACHINE_ID).unwrap_or_default();
        let machine = if machine.trim().is_empty() { host } else { machine.trim() };
        Self::of(machine, balancer)
    }

    fn of(machine: &str, balancer: &str) -> Self {
        let text = format!("trimtab dns owner {balancer}");
        let digest = TsigAlgorithm::HmacSha256.mac_data(machine.as_bytes(), text.as_bytes());
        let mut digits = data_encoding::HEXLOWER.encode(&digest.unwrap_or_default());
        digits.truncate(DIGITS);
        Self::made(digits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_for_the_same_and_another_for_others() {
        let owner = Owner::of("machine", "127.0.0.1:7400");
        assert_eq!(owner, Owner::of("machine", "127.0.0.1:7400"));
        assert_ne!(owner, Owner::of("machine", "127.0.0.1:7401"));
        assert_ne!(owner, Owner::of("another", "127.0.0.1:7400"));
        let shown = format!("{owner:?}");
        assert!(shown.len() > DIGITS && !shown.contains("machine"), "{shown}");
    }
}
