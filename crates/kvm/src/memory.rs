//! Guest RAM as the kernel's memory slots, and the dirty log.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use trapgate_memory::{GuestMemory, PAGE_SIZE, RamRange, TraceFlags};

use crate::KvmError;
use crate::error::call;

/// A slot for each range of RAM, numbered in their order.
#[derive(Debug)]
pub(crate) struct Slots {
    memory: Arc<GuestMemory>,
}

impl Slots {
    /// Gives all of `memory` to the machine.
    pub(crate) fn new(machine: &VmFd, memory: Arc<GuestMemory>) -> Result<Self, KvmError> {
        let slots = Self { memory };
        slots.set(machine, false)?;
        Ok(slots)
    }

    /// Begins or ends the logging of writes, for which the kernel then write-protects pages.
    pub(crate) fn log(&self, machine: &VmFd, on: bool) -> Result<(), KvmError> {
        self.set(machine, on)
    }

    #[allow(unsafe_code)]
    fn set(&self, machine: &VmFd, log: bool) -> Result<(), KvmError> {
        for (slot, range) in self.memory.ranges().enumerate() {
            let RamRange { start, length } = range;
            let Some(host) = self.memory.host(start) else {
                continue;
            };
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: start,
                memory_size: length,
                userspace_addr: host.as_ptr() as u64,
            };
            // SAFETY: the range is mapped as long as `self.memory` lives, which the machine keeps
            // until its own descriptor is closed; nobody has references to its bytes.
            unsafe { machine.set_user_memory_region(region) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Reports every page that the guest has written since the last call to the memory's
    /// traces, as an engine that writes itself does at each write. Pages that nobody traces cost
    /// nothing.
    pub(crate) fn collect(&self, machine: &VmFd) -> Result<(), KvmError> {
        let traces = self.memory.traces();
        for (slot, range) in self.memory.ranges().enumerate() {
            let words = machine
                .get_dirty_log(slot as u32, range.length as usize)
                .map_err(call("KVM_GET_DIRTY_LOG"))?;
            for gpa in pages(&words).map(|page| range.start + page * PAGE_SIZE) {
                if let Some(page) = self.memory.page_index(gpa)
                    && traces.get(page) != TraceFlags::NONE
                {
                    traces.report(page, gpa, PAGE_SIZE);
                }
            }
        }
        Ok(())
    }
}

/// Numbers of the bits that are set.
fn pages(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..).zip(words).flat_map(|(index, &word)| {
        (0..64)
            .filter(move |bit| word >> bit & 1 != 0)
            .map(move |bit| index * 64 + bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_the_log_are_pages() {
        let words = [1 << 3 | 1 << 63, 0, 1];
        assert_eq!(pages(&words).collect::<Vec<_>>(), [3, 63, 128]);
    }
}
