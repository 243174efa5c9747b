//! Work that is recorded once and started again as a whole.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::device::{Device, checked};
use super::quiet::Noise;
use crate::KernelError;

/// A recording under way: what goes to the stream is taken down instead of done. Dropping it gives the recording up.
#[derive(Debug)]
pub(crate) struct Recording {
    device: Arc<Device>,
    is_open: bool,
    _noise: Noise,
}

impl Recording {
    /// Starts to record. Until [`finish`](Self::finish), this thread must not wait for the device or allocate on it.
    pub(crate) fn start(device: &Arc<Device>) -> Result<Self, KernelError> {
        let noise = Noise::begin();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives and is not the default one.
        checked("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(device.stream(), mode) })?;
        Ok(Self { device: Arc::clone(device), is_open: true, _noise: noise })
    }

    /// Ends the recording.
    pub(crate) fn finish(mut self) -> Result<Graph, KernelError> {
        self.is_open = false;
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream is being captured, by this thread.
        checked("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.device.stream(), &mut graph) })?;
        // SAFETY: the capture gave a whole graph, which is not needed once it is instantiated.
        let result = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            result
        };
        match result {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(KernelError::OutOfMemory { what: "a recorded step", wanted_bytes: 0 })
            }
            result => {
                checked("cuGraphInstantiate", result)?;
                Ok(Graph { device: Arc::clone(&self.device), exec })
            }
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.is_open {
            let mut graph = std::ptr::null_mut();
            // SAFETY: the stream is being captured; what was taken down is thrown away.
            unsafe {
                sys::cuStreamEndCapture(self.device.stream(), &mut graph);
                if !graph.is_null() {
                    sys::cuGraphDestroy(graph);
                }
            }
        }
    }
}

/// Recorded work.
#[derive(Debug)]
pub(crate) struct Graph {
    device: Arc<Device>,
    exec: sys::CUgraphExec,
}

// SAFETY: graphs of the driver may be used from any thread, by one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the recorded work into the stream. The buffers that it names must still be there.
    pub(crate) fn launch(&self) -> Result<(), KernelError> {
        // SAFETY: who recorded it keeps its buffers and kernels.
        checked("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.exec, self.device.stream()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the driver waits for launches under way. Errors cannot be told.
        unsafe {
            let _ = self.device.bind();
            sys::cuGraphExecDestroy(self.exec);
        }
    }
}
