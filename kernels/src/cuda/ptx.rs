//! The kernels in the form that the driver compiles for its device.

/// `moe.cu` compiled for compute capability 8.0 and later.
pub(super) const PTX: &str = include_str!("../../cuda/moe.ptx");

/// What it was compiled from, for compilation at run time.
pub(super) const SOURCE: &str = include_str!("../../cuda/moe.cu");

/// Names of the kernels.
pub(super) fn kernels() -> Vec<String> {
    let of_dtypes = [
        "gate_up",
        "down",
        "down_backward",
        "gate_up_backward",
        "linear",
        "linear_backward",
        "gemv",
        "decode_gate_up",
        "decode_down",
    ];
    let plain = ["route", "count", "place", "combine", "gate_backward", "outer"];
    let each =
        of_dtypes.iter().flat_map(|name| ["bf16", "f16", "f32"].map(|d| format!("{name}_{d}")));
    each.chain(plain.map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a of 64 bits: enough to notice a change, and in every language four lines.
    fn fnv(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    }

    #[test]
    fn the_ptx_is_made_from_the_source() {
        assert_eq!(fnv(b"foobar"), 0x8594_4171_f739_67e8);
        let line = format!("// fnv1a64 of moe.cu: {:016x}\n", fnv(SOURCE.as_bytes()));
        assert!(
            PTX.contains(&line),
            "run `kernels/cuda/build_ptx.py`: moe.ptx has no line `{}`",
            line.trim()
        );
        assert!(PTX.contains("\n.version 8.0\n.target sm_80\n"), "a newer compiler made moe.ptx");
    }

    #[test]
    fn every_kernel_is_in_the_ptx() {
        for name in kernels() {
            assert!(PTX.contains(&format!(".visible .entry {name}(")), "{name}");
        }
        assert_eq!(PTX.matches(".visible .entry ").count(), kernels().len());
    }
}
