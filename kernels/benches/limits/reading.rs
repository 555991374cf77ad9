//! The limit of decoding: how fast a file map is read.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;

use memmap2::Mmap;
use moe_merge_kernels::{Dtype, cast};
use rayon::prelude::*;

/// Bytes that one task reads: enough to be a stream, and to be dealt out.
const PIECE: usize = 1 << 20;

/// Larger than the caches of one socket: 0.25 GB.
pub const BYTES: usize = 256 << 20;

/// A file of at least `bytes` bytes that holds numbers of `dtype`, mapped; its pages have been touched.
pub fn file_map(bytes: usize, dtype: Dtype) -> Mmap {
    // A period that is no divisor of any row length, so that rows differ.
    let values: Vec<f32> =
        (0..65_521u32).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect();
    let mut piece = vec![0; values.len() * dtype.size()];
    cast::narrow(&values, dtype, &mut piece);
    let mut file = tempfile::tempfile().expect("a temporary file can be made");
    for _ in 0..bytes.div_ceil(piece.len()) {
        file.write_all(&piece).expect("the temporary file can be written");
    }
    map(&file)
}

/// A temporary file that nobody changes, mapped; its pages have been touched.
pub fn map(file: &File) -> Mmap {
    // SAFETY: only this process knows the file, and it is written before.
    let map = unsafe { Mmap::map(file) }.expect("the temporary file can be mapped");
    read(&map);
    map
}

/// Reads every byte once, with the threads of the current pool.
pub fn read(bytes: &[u8]) {
    if rayon::current_num_threads() == 1 {
        black_box(xor(bytes));
    } else {
        black_box(bytes.par_chunks(PIECE).map(xor).reduce(|| 0, |a, b| a ^ b));
    }
}

/// All words of `bytes`, by the widest loads there are.
fn xor(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected.
            return unsafe { x86::avx512(bytes) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { x86::avx2(bytes) };
        }
    }
    plain(bytes)
}

fn plain(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 8];
    for chunk in bytes.chunks_exact(64) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            let word = chunk[8 * i..8 * i + 8].try_into().expect("eight bytes");
            *lane ^= u64::from_ne_bytes(word);
        }
    }
    lanes.iter().fold(0, |a, b| a ^ b)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Eight registers side by side, so that loads do not wait for each other.
    macro_rules! xor_loop {
        ($name:ident, $feature:literal, $width:literal, $register:ty, $zero:ident, $load:ident, $xor:ident) => {
            #[target_feature(enable = $feature)]
            pub(super) fn $name(bytes: &[u8]) -> u64 {
                let mut lanes = [$zero(); 8];
                for chunk in bytes.chunks_exact(8 * $width) {
                    for (i, lane) in lanes.iter_mut().enumerate() {
                        // SAFETY: the chunk has eight vectors; the load is an unaligned one.
                        *lane =
                            $xor(*lane, unsafe { $load(chunk.as_ptr().add(i * $width).cast()) });
                    }
                }
                let all = lanes.into_iter().fold($zero(), |a, b| $xor(a, b));
                // SAFETY: a register is as large as its words, and any bits are words.
                let words: [u64; $width / 8] = unsafe { std::mem::transmute::<$register, _>(all) };
                words.iter().fold(0, |a, b| a ^ b)
            }
        };
    }

    xor_loop!(
        avx512,
        "avx512f",
        64,
        __m512i,
        _mm512_setzero_si512,
        _mm512_loadu_si512,
        _mm512_xor_si512
    );
    xor_loop!(
        avx2,
        "avx2",
        32,
        __m256i,
        _mm256_setzero_si256,
        _mm256_loadu_si256,
        _mm256_xor_si256
    );
}
