//! Random numbers of a run: streams that do not depend on each other, so that what one policy draws changes nothing for
//! another.

/// What a stream is for. Arrivals, noise and reports are alike for every policy that runs with a seed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stream {
    /// When flows arrive, at which balancer, and with how much work.
    Arrivals,
    /// How fast a server is.
    Speed(usize),
    /// When a server reports, and which reports are lost.
    Reports(usize),
    /// What a balancer draws.
    Balancer(usize),
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub(crate) fn new(seed: u64, stream: Stream) -> Self {
        let stream = match stream {
            Stream::Arrivals => 1,
            Stream::Speed(server) => 1 << 32 | server as u64,
            Stream::Reports(server) => 2 << 32 | server as u64,
            Stream::Balancer(balancer) => 3 << 32 | balancer as u64,
        };
        let mut mixed = Self(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ stream.rotate_left(17));
        let begin = mixed.next() ^ mixed.next().rotate_left(32);
        Self(begin)
    }

    /// Any 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 up to but not 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// Evenly between the two.
    pub(crate) fn between(&mut self, (low, high): (f64, f64)) -> f64 {
        low + (high - low) * self.unit()
    }

    /// 0 to `bound` - 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Exponential with mean 1.
    pub(crate) fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }

    /// Normal with mean 0 and deviation 1 (Box and Muller); always two draws.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (2.0 * self.exponential()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}
