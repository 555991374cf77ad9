//! A device for tests alone: `moe.cu` as C++, in this process.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use crate::cuda::backend::{Arg, Backend, Fill, Use};
use crate::cuda::device::Device;
use crate::cuda::error::CudaError;

type Alloc = unsafe extern "C" fn(usize) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, usize);
type Launch = unsafe extern "C" fn(
    *const c_char,
    u32,
    u32,
    *const *const c_void,
    *const usize,
    usize,
    c_int,
) -> c_int;

/// The library lives as long as the process; kernels keep state in statics, so one runs at a time.
struct Library {
    alloc: Alloc,
    free: Free,
    launch: Launch,
    running: Mutex<()>,
}

#[derive(Debug)]
struct Emulator {
    /// Whether threads and blocks run from the last to the first.
    reversed: bool,
}

/// A device that runs threads in this or the opposite order; none, told loudly, where there is no C++ compiler.
pub fn emulated(reversed: bool) -> Option<Device> {
    library()?;
    Some(Device::on(Arc::new(Emulator { reversed })))
}

fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let found = LIBRARY.get_or_init(build);
    if found.is_none() {
        skipped("no C++ compiler (`c++`, or what `CXX` names) is here");
    }
    found.as_ref()
}

/// Says on stderr that the running test compares nothing, and why.
pub(super) fn skipped(why: &str) {
    use std::io::Write;
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}, nothing was compared");
}

/// Compiles and opens the emulator; none without a compiler. What a compiler refuses is a failure.
fn build() -> Option<Library> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/emulate.cpp"));
    let folder = std::env::temp_dir().join(format!("moe-merge-emulator-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("emulator.so");
    let run = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-o"])
        .args([path.as_path(), source])
        .output();
    let library = run.ok().map(|done| {
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        // SAFETY: the library was compiled from our file a moment ago; the types are those of its functions.
        unsafe {
            let opened = Box::leak(Box::new(libloading::Library::new(&path).unwrap()));
            Library {
                alloc: *opened.get::<Alloc>(b"emulate_alloc").unwrap(),
                free: *opened.get::<Free>(b"emulate_free").unwrap(),
                launch: *opened.get::<Launch>(b"emulate_launch").unwrap(),
                running: Mutex::new(()),
            }
        }
    });
    std::fs::remove_dir_all(&folder).unwrap();
    library
}

fn opened() -> &'static Library {
    library().expect("`emulated` has found the library")
}

impl Backend for Emulator {
    fn name(&self) -> &str {
        "emulator"
    }

    fn free_memory(&self) -> Result<usize, CudaError> {
        Ok(1 << 30)
    }

    fn alloc(&self, bytes: usize, _: Use) -> Result<u64, CudaError> {
        assert!(bytes > 0 && bytes.is_multiple_of(16), "a buffer of {bytes} bytes");
        // SAFETY: any size can be asked for.
        let at = unsafe { (opened().alloc)(bytes) };
        if at.is_null() {
            return Err(CudaError::NoRoom { bytes, free: 0 });
        }
        Ok(at as u64)
    }

    unsafe fn free(&self, at: u64, bytes: usize, _: Use) {
        // SAFETY: the caller's promise.
        unsafe { (opened().free)(at as *mut c_void, bytes) };
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; here the memory of the device is that of the process.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn stage(&self, bytes: usize, to: u64, fill: &mut Fill<'_>) -> Result<(), CudaError> {
        // Pieces of an odd size: they end in the middle of rows and numbers.
        let mut piece = vec![0u8; 1001];
        for from in (0..bytes).step_by(piece.len()) {
            let count = piece.len().min(bytes - from);
            piece.fill(0xff);
            fill(from, &mut piece[..count]);
            // SAFETY: the caller's promise.
            unsafe { self.upload(&piece[..count], to + from as u64)? };
        }
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: &str, grid: (u32, u32), args: &[Arg]) -> Result<(), CudaError> {
        let name = CString::new(kernel).unwrap();
        let (places, sizes): (Vec<*const c_void>, Vec<usize>) = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(at) => (std::ptr::from_ref(at).cast(), size_of_val(at)),
                Arg::Int(value) => (std::ptr::from_ref(value).cast(), size_of_val(value)),
                Arg::Float(value) => (std::ptr::from_ref(value).cast(), size_of_val(value)),
            })
            .unzip();
        let _running = opened().running.lock().unwrap();
        // SAFETY: the caller's promise; the emulator checks number and sizes of the arguments.
        let code = unsafe {
            (opened().launch)(
                name.as_ptr(),
                grid.0,
                grid.1,
                places.as_ptr(),
                sizes.as_ptr(),
                args.len(),
                c_int::from(self.reversed),
            )
        };
        assert_eq!(code, 0, "`{kernel}`: 1 if there is none, 2 if the arguments are not its own");
        Ok(())
    }
}
