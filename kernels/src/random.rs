//! Random words that are found by their place: any range can be had alone, on any thread, with the same result.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Words of a block of the stream.
const BLOCK: usize = 16;
/// Blocks that are made beside each other, one for each lane of a vector.
const LANES: usize = 16;
/// Words of so many blocks.
const GROUP: usize = LANES * BLOCK;

/// A stream of independent uniform words.
///
/// They are those of ChaCha8 with a counter of 64 bits and the nonce 0 (Bernstein 2008, ChaCha, a variant of Salsa20), in
/// another order: the word at place `256 g + 16 w + l` is word `w` of block `16 g + l`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words {
    key: [u8; 32],
}

impl Words {
    /// The stream of a key.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// The words from the place `first` on.
    pub fn fill(&self, first: u64, out: &mut [u32]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            let key = avx512::words_of(&self.key);
            // SAFETY: the feature was detected; the function has no other demands.
            return by_groups(first, out, |group| unsafe { avx512::group(&key, group) });
        }
        self.fill_plain(first, out);
    }

    fn fill_plain(&self, first: u64, out: &mut [u32]) {
        let mut rng = ChaCha8Rng::from_seed(self.key);
        by_groups(first, out, |group| {
            rng.set_word_pos(u128::from(group) * GROUP as u128);
            let mut bytes = [0; 4 * GROUP];
            rng.fill_bytes(&mut bytes);
            let (blocks, _) = bytes.as_chunks::<4>();
            let mut words = [0; GROUP];
            for (i, word) in words.iter_mut().enumerate() {
                *word = u32::from_le_bytes(blocks[i % LANES * BLOCK + i / LANES]);
            }
            words
        });
    }
}

/// Fills `out` with the words from `first` on, out of whole groups.
fn by_groups(first: u64, out: &mut [u32], mut make: impl FnMut(u64) -> [u32; GROUP]) {
    let (mut group, mut skip) = (first / GROUP as u64, (first % GROUP as u64) as usize);
    let mut rest = out;
    while !rest.is_empty() {
        let (now, after) = rest.split_at_mut(rest.len().min(GROUP - skip));
        now.copy_from_slice(&make(group)[skip..skip + now.len()]);
        (rest, group, skip) = (after, group + 1, 0);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{BLOCK, GROUP, LANES};

    /// "expand 32-byte k"
    const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

    pub fn words_of(key: &[u8; 32]) -> [u32; 8] {
        std::array::from_fn(|i| {
            u32::from_le_bytes([key[4 * i], key[4 * i + 1], key[4 * i + 2], key[4 * i + 3]])
        })
    }

    /// The words of 16 blocks, one block in each lane.
    #[target_feature(enable = "avx512f")]
    pub fn group(key: &[u32; 8], group: u64) -> [u32; GROUP] {
        let all = |word: u32| _mm512_set1_epi32(word as i32);
        // The counters of a group differ in the lowest bits alone: no lane carries.
        let block = group * LANES as u64;
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let mut start = [all(0); BLOCK];
        for (s, word) in start.iter_mut().zip(CONSTANTS.iter().chain(key)) {
            *s = all(*word);
        }
        start[12] = _mm512_add_epi32(all(block as u32), lanes);
        start[13] = all((block >> 32) as u32);
        let mut s = start;
        for _ in 0..4 {
            for i in 0..4 {
                quarter(&mut s, [i, 4 + i, 8 + i, 12 + i]);
            }
            for i in 0..4 {
                quarter(&mut s, [i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4]);
            }
        }
        let mut words = [0; GROUP];
        for ((out, s), start) in words.chunks_exact_mut(LANES).zip(s).zip(start) {
            // SAFETY: `out` has room for 16 words.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_add_epi32(s, start)) };
        }
        words
    }

    #[target_feature(enable = "avx512f")]
    fn quarter(s: &mut [__m512i; BLOCK], [a, b, c, d]: [usize; 4]) {
        s[a] = _mm512_add_epi32(s[a], s[b]);
        s[d] = _mm512_rol_epi32::<16>(_mm512_xor_si512(s[d], s[a]));
        s[c] = _mm512_add_epi32(s[c], s[d]);
        s[b] = _mm512_rol_epi32::<12>(_mm512_xor_si512(s[b], s[c]));
        s[a] = _mm512_add_epi32(s[a], s[b]);
        s[d] = _mm512_rol_epi32::<8>(_mm512_xor_si512(s[d], s[a]));
        s[c] = _mm512_add_epi32(s[c], s[d]);
        s[b] = _mm512_rol_epi32::<7>(_mm512_xor_si512(s[b], s[c]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_stream_by_place() {
        let words = Words::new(std::array::from_fn(|i| 7 * i as u8));
        let mut rng = ChaCha8Rng::from_seed(words.key);
        // Across the end of the counter's lower half, too.
        for first in [0, 1, 255, 256, 1003, (1 << 36) - 300] {
            let mut out = [0; 777];
            words.fill(first, &mut out);
            let mut plain = [0; 777];
            words.fill_plain(first, &mut plain);
            assert_eq!(out, plain);
            for (place, word) in (first..).zip(out) {
                let (group, row, lane) = (place / 256, place / 16 % 16, place % 16);
                rng.set_word_pos(u128::from(256 * group + 16 * lane + row));
                assert_eq!(word, rng.next_u32(), "place {place}");
            }
        }
        words.fill(5, &mut []);
    }
}
