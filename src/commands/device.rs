//! `--device` and `--cpu-experts`: where models run.

use moe_merge_checkpoint::{Explain, Kind, Source};
use moe_merge_kernels::Exec;
use moe_merge_model::{DeviceChoice, Model, ModelError, Placement};

use crate::args::{Common, Device};
use crate::render::{self, Failure};

/// Finds the device that was asked for.
pub fn find(common: &Common) -> Result<Placement, Failure> {
    let choice = match common.device {
        Device::Auto => DeviceChoice::Auto,
        Device::Cpu => DeviceChoice::Cpu,
        Device::Cuda => DeviceChoice::Cuda,
    };
    let placement = Placement::find(choice, common.cpu_experts)?;
    if let Some(name) = placement.device_name().filter(|_| !common.quiet && !common.json) {
        render::note(&format!("products run on `{name}`"));
    }
    Ok(placement)
}

/// Opens a model there; where nobody asked for the device and the model has no room on it, on the processor.
pub fn open_model(
    source: &Source,
    exec: Exec,
    experts_per_token: Option<usize>,
    common: &Common,
) -> Result<Model, Failure> {
    let mut model = open(source, exec, common)?;
    if let Some(experts) = experts_per_token {
        model.set_experts_per_token(experts)?;
    }
    Ok(model)
}

fn open(source: &Source, exec: Exec, common: &Common) -> Result<Model, Failure> {
    Ok(Place::find(common)?.open(source, exec)?)
}

/// Where models are opened, one after another.
pub struct Place {
    placement: Placement,
    /// Whether a model without room on the device runs on the processor.
    fall_back: bool,
    tell: bool,
}

impl Place {
    /// Finds the device that was asked for.
    pub fn find(common: &Common) -> Result<Self, Failure> {
        Ok(Self {
            placement: find(common)?,
            fall_back: common.device == Device::Auto,
            tell: !common.quiet && !common.json,
        })
    }

    /// Opens a model there; where nobody asked for the device and the model has no room on it, on the processor.
    pub fn open(&self, source: &Source, exec: Exec) -> Result<Model, ModelError> {
        match Model::open_on(source, exec, &self.placement) {
            Err(e @ ModelError::Device(_)) if self.fall_back && e.kind() == Kind::NoRoom => {
                if self.tell {
                    let hint = "`--cpu-experts N` keeps the experts of N layers off it";
                    render::note(&format!("{e}: running on the processor; {hint}"));
                }
                Model::open_with(source, exec)
            }
            opened => opened,
        }
    }
}
