//! The host bridge, function 0:0.0.

use crate::{ConfigSpace, Function, Identity, SavedFunction, StateError, Window};

const KIND: &str = "host-bridge";
const VERSION: u32 = 1;

/// The bridge between processors and bus. It does nothing, but guests look for one to see that
/// there is a bus (Linux: `pci_sanity_check`).
#[derive(Clone, Debug)]
pub struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        // The ids that a common open machine model uses for its host bridge, so that no driver
        // for real hardware takes it for a chipset with registers.
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl Function for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }

    fn bar_read(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.0.reset();
    }

    fn save(&mut self) -> SavedFunction {
        let Self(space) = self;
        SavedFunction::new(KIND, VERSION, &space.save())
    }

    fn restore(&mut self, saved: &SavedFunction) -> Result<(), StateError> {
        self.0 = self.0.restored(&saved.read(KIND, VERSION)?, KIND)?;
        Ok(())
    }
}
