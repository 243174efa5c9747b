//! What the kernels of a step read about it: ids, positions, slots, block tables and work lists, in one buffer on the device
//! that is filled by one copy.
//!
//! Recorded steps name the buffer's addresses, so a section stays where it is until a larger step needs more room; then all
//! moves, and [`StepBuffer::generation`] says that what was recorded is void.

use std::sync::Arc;

use bytemuck::NoUninit;

use super::device::Device;
use super::memory::{Buffer, Event, Pinned};
use super::ops::operand::Span;
use crate::KernelError;

/// Sections start at multiples of this.
const ALIGN: usize = 256;
/// Copies that may be under way: of the step that runs, the one behind it, and the one that is being written.
const COPIES: usize = 3;

/// The sections of a step's description.
pub(super) mod section {
    pub(in crate::cuda) const NUM_UNITS: usize = 0;
    pub(in crate::cuda) const IDS: usize = 1;
    pub(in crate::cuda) const CARRIED: usize = 2;
    pub(in crate::cuda) const LAST_IDS: usize = 3;
    pub(in crate::cuda) const POSITIONS: usize = 4;
    pub(in crate::cuda) const SLOTS: usize = 5;
    pub(in crate::cuda) const LOGIT_ROWS: usize = 6;
    pub(in crate::cuda) const UNITS: usize = 7;
    pub(in crate::cuda) const TILES: usize = 8;
    pub(in crate::cuda) const BLOCK_TABLE: usize = 9;
    pub(in crate::cuda) const EXPANDED: usize = 10;
    pub(in crate::cuda) const COUNT: usize = 11;
}

/// Descriptions of steps that may be recorded, and of others: small, and as large as steps can be.
#[derive(Debug)]
pub(super) struct Steps {
    pub(super) decode: StepBuffer<{ section::COUNT }>,
    pub(super) mixed: StepBuffer<{ section::COUNT }>,
    /// Which of them has the step that was begun.
    pub(super) is_decode: bool,
}

impl Steps {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        Ok(Self { decode: StepBuffer::new(device)?, mixed: StepBuffer::new(device)?, is_decode: false })
    }

    /// A section of the step that was begun.
    pub(super) fn section(&self, section: usize) -> Result<Span<'_>, KernelError> {
        let step = if self.is_decode { &self.decode } else { &self.mixed };
        let (start, bytes) = step.section(section);
        Span::part(step.buffer(), start, bytes)
    }
}

/// A buffer of `N` sections.
#[derive(Debug)]
pub(super) struct StepBuffer<const N: usize> {
    device: Arc<Device>,
    /// Bytes of each section.
    room: [usize; N],
    starts: [usize; N],
    on_device: Buffer,
    staging: Vec<(Pinned, Event)>,
    turn: usize,
    generation: u64,
}

/// The sections of a step that is being written.
pub(super) struct Sections<'a, const N: usize> {
    bytes: &'a mut [u8],
    starts: &'a [usize; N],
    end: usize,
}

impl<const N: usize> StepBuffer<N> {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, KernelError> {
        let (room, starts) = ([0; N], [0; N]);
        let on_device = device.alloc("the description of a step", 0)?;
        Ok(Self { device: Arc::clone(device), room, starts, on_device, staging: Vec::new(), turn: 0, generation: 0 })
    }

    /// Grows whenever it does: addresses of an earlier generation are no longer valid.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The buffer on the device.
    pub(super) fn buffer(&self) -> &Buffer {
        &self.on_device
    }

    /// Where section `section` starts, and its size.
    pub(super) fn section(&self, section: usize) -> (usize, usize) {
        (self.starts[section], self.room[section])
    }

    /// Makes room for sections of so many bytes. At most doubles what there is beyond what is wanted, so that it happens seldom.
    pub(super) fn reserve(&mut self, wanted: &[usize; N]) -> Result<(), KernelError> {
        if self.staging.len() == COPIES && wanted.iter().zip(&self.room).all(|(wanted, room)| wanted <= room) {
            return Ok(());
        }
        let mut end = 0;
        for ((start, room), &wanted) in self.starts.iter_mut().zip(&mut self.room).zip(wanted) {
            if wanted > *room {
                *room = wanted.next_power_of_two().max(ALIGN);
            }
            *start = end;
            end += room.next_multiple_of(ALIGN);
        }
        // The copies under way are to and from what goes.
        self.device.synchronize()?;
        self.staging.clear();
        self.on_device = self.device.alloc("the description of a step", end)?;
        for _ in 0..COPIES {
            let pinned = Pinned::new(&self.device, "the description of a step", end)?;
            self.staging.push((pinned, Event::new(&self.device)?));
        }
        self.generation += 1;
        Ok(())
    }

    /// Lets `write` write the sections, within the room that was reserved, and starts the copy to the device.
    pub(super) fn fill(&mut self, write: impl FnOnce(&mut Sections<'_, N>)) -> Result<(), KernelError> {
        self.turn = (self.turn + 1) % self.staging.len();
        let (pinned, copied) = &mut self.staging[self.turn];
        copied.wait()?;
        let mut sections = Sections { bytes: pinned.as_mut_slice(), starts: &self.starts, end: 0 };
        write(&mut sections);
        let end = sections.end;
        pinned.start_upload(&self.on_device, 0, end)?;
        copied.record()
    }
}

impl<const N: usize> Sections<'_, N> {
    /// Writes `values` to the start of a section.
    ///
    /// # Panics
    /// If they do not fit what was reserved.
    pub(super) fn put<V: NoUninit>(&mut self, section: usize, values: &[V]) {
        let bytes = bytemuck::cast_slice(values);
        let start = self.starts[section];
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.end = self.end.max(start + bytes.len());
    }
}
