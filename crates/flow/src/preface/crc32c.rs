//! CRC-32C (Castagnoli), as RFC 9260 appendix B and the PROXY protocol's §2.2.4 use it.

/// Reflected 0x1EDC6F41.
const POLYNOMIAL: u32 = 0x82F6_3B78;

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// A checksum that is being made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crc32c(u32);

impl Crc32c {
    pub(super) const fn new() -> Self {
        Self(u32::MAX)
    }

    pub(super) fn add(self, bytes: &[u8]) -> Self {
        let step = |crc: u32, byte: &u8| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)];
        Self(bytes.iter().fold(self.0, step))
    }

    pub(super) const fn finish(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_what_the_rfc_checks() {
        let of = |bytes: &[u8]| Crc32c::new().add(bytes).finish();
        assert_eq!(of(b"123456789"), 0xE306_9283, "the catalogue's check value");
        // RFC 3720, appendix B.4.
        assert_eq!(of(&[0; 32]), 0x8A91_36AA);
        assert_eq!(of(&[0xFF; 32]), 0x62A8_AB43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(of(&ascending), 0x46DD_794E);
        assert_eq!(Crc32c::new().add(b"1234").add(b"56789").finish(), 0xE306_9283, "in parts");
    }
}
