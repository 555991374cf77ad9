//! The device behind the CUDA driver, whose library is opened at run time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, LaunchConfig, PinnedHostSlice,
    PushKernelArg, result, sys,
};
use cudarc::nvrtc::{self, Ptx};

use crate::cuda::backend::{Arg, Backend, Fill, THREADS, Use};
use crate::cuda::error::CudaError;
use crate::cuda::ptx;

/// Pinned memory that uploads go through: while one piece is copied, the next is filled.
const PIECES: usize = 4;
const PIECE: usize = 4 << 20;

/// Set to 1, kernels are compiled for the very device.
const COMPILE: &str = "MOE_MERGE_NVRTC";

#[derive(Debug)]
pub(super) struct Driver {
    name: String,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<String, CudaFunction>,
    /// Scratch buffers that nobody uses, by size. What was enqueued with them runs before what their next owner enqueues.
    spare: Mutex<HashMap<usize, Vec<u64>>>,
    pieces: Mutex<Pieces>,
}

/// Pinned memory in pieces that are used in turn.
#[derive(Debug, Default)]
struct Pieces {
    all: Vec<(PinnedHostSlice<u8>, Option<CudaEvent>)>,
    next: usize,
}

fn failed(what: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |e| CudaError::Driver { what, message: e.to_string() }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    pub fn open() -> Result<Self, CudaError> {
        // SAFETY: it opens libraries of the driver's names, which run no code of ours.
        // Without this question, the first call of the driver would panic where there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        match CudaContext::device_count() {
            Ok(count) if count > 0 => {}
            Ok(_) => return Err(CudaError::NoDevice { reason: "it counts 0".into() }),
            Err(e) => return Err(CudaError::NoDevice { reason: e.to_string() }),
        }
        let context = CudaContext::new(0).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("asking for the device's name"))?;
        let (major, minor) =
            context.compute_capability().map_err(failed("asking for the compute capability"))?;
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        let module =
            context.load_module(image(major, minor)?).map_err(failed("loading the kernels"))?;
        let mut kernels = HashMap::new();
        for name in ptx::kernels() {
            let kernel = module.load_function(&name).map_err(failed("finding a kernel"))?;
            kernels.insert(name, kernel);
        }
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        let (spare, pieces) = Default::default();
        Ok(Self { name, context, stream, kernels, spare, pieces })
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(failed("binding the device to a thread"))
    }

    /// Gives spare scratch memory back to the device.
    fn release(&self) {
        let spare = std::mem::take(&mut *locked(&self.spare));
        for at in spare.into_values().flatten() {
            // SAFETY: it came from `malloc_sync`, and is in no list any more. Freeing waits for what uses it.
            // An error can only tell of earlier work, whose caller is told when it reads the result.
            let _ = unsafe { result::free_sync(at) };
        }
    }
}

/// The kernels, made for later compilation by the driver or for this device.
fn image(major: i32, minor: i32) -> Result<Ptx, CudaError> {
    let wanted = std::env::var_os(COMPILE).is_some_and(|v| v == "1");
    // SAFETY: as in `Driver::open`.
    if !wanted || !unsafe { nvrtc::sys::is_culib_present() } {
        return Ok(Ptx::from_src(ptx::PTX));
    }
    let options = nvrtc::CompileOptions {
        options: vec![format!("--gpu-architecture=compute_{major}{minor}"), "--std=c++17".into()],
        name: Some("moe.cu".into()),
        ..Default::default()
    };
    nvrtc::compile_ptx_with_opts(ptx::SOURCE, options).map_err(|e| CudaError::Driver {
        what: "compiling the kernels, which MOE_MERGE_NVRTC asks for,",
        message: e.to_string(),
    })
}

/// The size in which scratch memory of `bytes` is kept.
fn class(bytes: usize) -> usize {
    bytes.next_power_of_two().max(512)
}

impl Backend for Driver {
    fn name(&self) -> &str {
        &self.name
    }

    fn free_memory(&self) -> Result<usize, CudaError> {
        let (free, _) = self.context.mem_get_info().map_err(failed("asking for free memory"))?;
        Ok(free)
    }

    fn alloc(&self, bytes: usize, purpose: Use) -> Result<u64, CudaError> {
        self.bind()?;
        let bytes = match purpose {
            Use::Weights => bytes,
            Use::Scratch => class(bytes),
        };
        if purpose == Use::Scratch
            && let Some(at) = locked(&self.spare).get_mut(&bytes).and_then(Vec::pop)
        {
            return Ok(at);
        }
        let full = |e: &DriverError| e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        // SAFETY: memory that has not been written is not read: kernels write their outputs whole.
        let mut at = unsafe { result::malloc_sync(bytes) };
        if at.as_ref().is_err_and(full) {
            self.release();
            // SAFETY: as above.
            at = unsafe { result::malloc_sync(bytes) };
        }
        at.map_err(|e| match full(&e) {
            true => CudaError::NoRoom { bytes, free: self.free_memory().unwrap_or(0) },
            false => failed("allocating memory")(e),
        })
    }

    unsafe fn free(&self, at: u64, bytes: usize, purpose: Use) {
        if purpose == Use::Scratch {
            locked(&self.spare).entry(class(bytes)).or_default().push(at);
        } else if self.bind().is_ok() {
            // SAFETY: the caller's promise. Freeing waits for what uses it.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), CudaError> {
        let mut copy = |offset: usize, piece: &mut [u8]| {
            piece.copy_from_slice(&from[offset..offset + piece.len()]);
        };
        // SAFETY: the caller's promise.
        unsafe { self.stage(from.len(), to, &mut copy) }
    }

    unsafe fn stage(&self, bytes: usize, to: u64, fill: &mut Fill<'_>) -> Result<(), CudaError> {
        self.bind()?;
        let mut pieces = locked(&self.pieces);
        let mut done = 0;
        while done < bytes {
            let count = PIECE.min(bytes - done);
            let number = pieces.next;
            if number == pieces.all.len() {
                // SAFETY: bytes of any value are bytes; `fill` writes them before they are read.
                let memory = unsafe { self.context.alloc_pinned::<u8>(PIECE) };
                pieces.all.push((memory.map_err(failed("allocating pinned memory"))?, None));
            }
            pieces.next = (number + 1) % PIECES;
            let (memory, copied) = &mut pieces.all[number];
            if let Some(copied) = copied.take() {
                copied.synchronize().map_err(failed("waiting for a copy"))?;
            }
            let piece = memory.as_mut_slice().map_err(failed("opening pinned memory"))?;
            let piece = &mut piece[..count];
            fill(done, piece);
            // SAFETY: the buffer at `to` has room, the caller promised; `piece` is not touched before the event recorded
            // behind the copy.
            unsafe {
                result::memcpy_htod_async(to + done as u64, piece, self.stream.cu_stream())
                    .map_err(failed("a copy to the device"))?;
            }
            *copied = Some(self.stream.record_event(None).map_err(failed("marking a copy"))?);
            done += count;
        }
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise; `to` is borrowed until the copy has been waited for.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
        // Also where the copy was refused: what is reported should be the first thing that went wrong.
        let waited = self.stream.synchronize();
        waited.and(copied).map_err(failed("work on the device"))
    }

    unsafe fn launch(&self, kernel: &str, grid: (u32, u32), args: &[Arg]) -> Result<(), CudaError> {
        let Some(function) = self.kernels.get(kernel) else {
            let message = format!("there is no `{kernel}`");
            return Err(CudaError::Driver { what: "finding a kernel", message });
        };
        let mut launch = self.stream.launch_builder(function);
        for arg in args {
            match arg {
                Arg::Pointer(at) => launch.arg(at),
                Arg::Int(value) => launch.arg(value),
                Arg::Float(value) => launch.arg(value),
            };
        }
        let config = LaunchConfig {
            grid_dim: (grid.0, grid.1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.map_err(failed("starting a kernel"))?;
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Pinned memory must not be freed while it is copied from; buffers of others hold this driver, so none is left.
        if self.bind().is_ok() {
            let _ = self.stream.synchronize();
            self.release();
        }
    }
}
