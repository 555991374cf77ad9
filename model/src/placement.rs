//! Where the frozen products of a model run: on the processor, or on a device that holds their weights.

use std::sync::Arc;

use moe_merge_kernels::cuda::{CudaLinear, CudaMoe, Device};
use moe_merge_kernels::{Accuracy, ExpertView, MatView};

use crate::error::{ModelError, no_device};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The processor.
    #[default]
    Cpu,
    /// A CUDA device, or an error.
    Cuda,
    /// A CUDA device where one is found, else the processor.
    Auto,
}

/// Where the frozen products of a model run. By default on the processor.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    device: Option<Device>,
    cpu_experts: usize,
}

impl Placement {
    /// All on the processor.
    pub fn cpu() -> Self {
        Self::default()
    }

    /// All on `device`, but for the routed experts of the first `cpu_experts` layers.
    pub fn on(device: Device, cpu_experts: usize) -> Self {
        Self { device: Some(device), cpu_experts }
    }

    /// Finds what `choice` names. For [`DeviceChoice::Auto`], no driver and no device to use are no errors.
    ///
    /// # Errors
    /// [`ModelError::Device`] where a device is asked for and there is none, or the driver fails.
    pub fn find(choice: DeviceChoice, cpu_experts: usize) -> Result<Self, ModelError> {
        if choice == DeviceChoice::Cpu {
            return Ok(Self::cpu());
        }
        match Device::open() {
            Ok(device) => Ok(Self::on(device, cpu_experts)),
            Err(e) if choice == DeviceChoice::Auto && no_device(&e) => Ok(Self::cpu()),
            Err(e) => Err(e.into()),
        }
    }

    /// What the device is called; none on the processor.
    pub fn device_name(&self) -> Option<&str> {
        self.device.as_ref().map(Device::name)
    }

    /// A linear layer on the device; none on the processor.
    pub(crate) fn linear(
        &self,
        weight: MatView<'_>,
        bias: Option<&[f32]>,
        accuracy: Accuracy,
    ) -> Result<Option<Arc<CudaLinear>>, ModelError> {
        let upload = |device: &Device| {
            let device = device.clone().with_accuracy(accuracy);
            CudaLinear::upload(&device, weight, bias).map(Arc::new)
        };
        Ok(self.device.as_ref().map(upload).transpose()?)
    }

    /// The routed experts of layer `layer` on the device; none on the processor.
    pub(crate) fn experts(
        &self,
        layer: usize,
        experts: &[ExpertView<'_>],
        accuracy: Accuracy,
    ) -> Result<Option<Arc<CudaMoe>>, ModelError> {
        let device = self.device.as_ref().filter(|_| !self.experts_on_cpu(layer));
        let upload = |device: &Device| {
            let device = device.clone().with_accuracy(accuracy);
            CudaMoe::upload(&device, experts).map(Arc::new)
        };
        Ok(device.map(upload).transpose()?)
    }

    /// Whether the routed experts of layer `layer` stay on the processor.
    pub(crate) fn experts_on_cpu(&self, layer: usize) -> bool {
        self.device.is_none() || layer < self.cpu_experts
    }
}

#[cfg(test)]
mod tests;
