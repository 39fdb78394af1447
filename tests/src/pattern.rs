//! Bytes that tell where in a stream they belong, so that what is lost, doubled, moved or changed shows.

use std::io::{self, Read, Write};

/// Bytes made or checked at a time.
const BLOCK_BYTES: usize = 128 * 1024;

/// Sends `length` bytes of the stream named by `seed`.
///
/// # Errors
/// When the other side does not take them.
pub fn send_stream(to: &mut impl Write, seed: u64, length: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    while at < length {
        let bytes = block_of(length - at);
        fill_block(&mut block[..bytes], seed, at);
        to.write_all(&block[..bytes])?;
        at += bytes as u64;
    }
    Ok(())
}

/// Reads `length` bytes and compares each with the stream named by `seed`.
///
/// # Errors
/// When fewer come.
///
/// # Panics
/// At the first that differs.
pub fn check_stream(from: &mut impl Read, seed: u64, length: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    while at < length {
        let bytes = block_of(length - at);
        from.read_exact(&mut block[..bytes])?;
        if let Some(wrong) = first_wrong(&block[..bytes], seed, at) {
            panic!("stream {seed}: byte {wrong} is not what was sent there");
        }
        at += bytes as u64;
    }
    Ok(())
}

fn block_of(left: u64) -> usize {
    usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES))
}

/// Puts what belongs at `at` of the stream named by `seed` into `block`.
pub fn fill_block(block: &mut [u8], seed: u64, at: u64) {
    // A stream may be taken up in the middle of a word.
    let skipped = (at % 8) as usize;
    let head = if skipped == 0 { 0 } else { (8 - skipped).min(block.len()) };
    let (head, rest) = block.split_at_mut(head);
    head.copy_from_slice(&word(seed, at / 8)[skipped..skipped + head.len()]);
    let first = at.div_ceil(8);
    let mut words = rest.chunks_exact_mut(8);
    let mut place = first;
    for whole in &mut words {
        whole.copy_from_slice(&word(seed, place));
        place += 1;
    }
    let tail = words.into_remainder();
    tail.copy_from_slice(&word(seed, place)[..tail.len()]);
}

/// The first byte of `block` that is not what belongs at `at` of the stream named by `seed`, by its place in the stream.
pub fn first_wrong(block: &[u8], seed: u64, at: u64) -> Option<u64> {
    let mut expected = [0; 1024];
    let mut at = at;
    for part in block.chunks(expected.len()) {
        let expected = &mut expected[..part.len()];
        fill_block(expected, seed, at);
        if part != expected {
            let wrong = part.iter().zip(expected.iter()).position(|(is, due)| is != due);
            return Some(at + wrong.unwrap_or_default() as u64);
        }
        at += part.len() as u64;
    }
    None
}

/// Each 8 bytes are a mix of the seed and their place (splitmix64).
fn word(seed: u64, place: u64) -> [u8; 8] {
    let mut x = (seed ^ place.rotate_left(17)).wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(seed: u64, length: u64) -> Vec<u8> {
        let mut sent = Vec::new();
        send_stream(&mut sent, seed, length).expect("a Vec takes all");
        sent
    }

    #[test]
    fn what_was_sent_is_accepted() {
        for length in [0, 1, 7, 8, 9, BLOCK_BYTES as u64, 2 * BLOCK_BYTES as u64 + 3] {
            let sent = stream(7, length);
            assert_eq!(sent.len() as u64, length);
            check_stream(&mut sent.as_slice(), 7, length).expect("all there");
        }
    }

    #[test]
    fn any_part_is_as_in_the_whole() {
        let whole = stream(7, 5_000);
        for (from, to) in [(0, 3), (3, 5), (1, 9), (8, 16), (5, 4_999), (4_990, 5_000)] {
            let mut part = vec![0; to - from];
            fill_block(&mut part, 7, from as u64);
            assert_eq!(part, whole[from..to], "{from} to {to}");
            assert_eq!(first_wrong(&part, 7, from as u64), None);
            part[to - from - 1] ^= 1;
            assert_eq!(first_wrong(&part, 7, from as u64), Some(to as u64 - 1));
        }
    }

    #[test]
    fn too_few_bytes_are_an_error() {
        let error = check_stream(&mut &stream(7, 99)[..], 7, 100).expect_err("one is missing");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    #[should_panic(expected = "byte 200000 is not what was sent there")]
    fn a_changed_byte_is_found() {
        let mut sent = stream(7, 300_000);
        sent[200_000] ^= 1;
        let _ = check_stream(&mut sent.as_slice(), 7, 300_000);
    }

    #[test]
    #[should_panic(expected = "is not what was sent there")]
    fn blocks_in_another_order_are_found() {
        let mut sent = stream(7, 4 * BLOCK_BYTES as u64);
        sent.rotate_left(BLOCK_BYTES);
        let _ = check_stream(&mut sent.as_slice(), 7, 4 * BLOCK_BYTES as u64);
    }
}
