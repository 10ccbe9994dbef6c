//! Taking a snapshot of a machine that runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use trapgate_memory::{CHUNK, GuestMemory, MemoryError, SavedChunk};
use trapgate_pci::Bus;

use super::config::SavedConfig;
use super::header::{FORMAT_VERSION, Header, Part, Profile, section};
use super::parts::Writer;
use super::restore::{
    CONFIG, CONFIG_VERSION, MEMORY, MEMORY_LIST, MEMORY_LIST_VERSION, MemoryList,
};
use super::state::{ClockState, MachineState};
use crate::clock::time_of_day;
use crate::{Machine, MachineConfig, SnapshotError};

/// How long a machine that is about to reset or end is waited for.
const UPHEAVAL: Duration = Duration::from_secs(5);

/// What a snapshot is made from, besides what the machine itself has.
pub(crate) struct Source {
    pub(crate) config: Arc<MachineConfig>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) bus: Arc<Bus>,
    /// Bytes of each disk.
    pub(crate) disks: Vec<u64>,
    pub(crate) has_terminal: bool,
}

/// What came of saving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotReport {
    /// The snapshot.
    pub directory: PathBuf,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// How long the guest stood still for it.
    pub paused: Duration,
}

impl Machine {
    /// Saves the machine to a directory, which this makes; the one above it must be there. The guest
    /// stands still while its memory is copied, and goes on (unless it was paused before).
    ///
    /// # Errors
    /// Any [`SnapshotError`]. The machine goes on then too, and there is nothing under the name.
    pub fn snapshot(&self, directory: &Path) -> Result<SnapshotReport, SnapshotError> {
        let Source {
            config,
            memory,
            bus: _,
            disks,
            has_terminal,
        } = &self.source;
        let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        let mut writer = Writer::new(&directory)?;
        // First what can be written while the guest runs; if there is no room, it shows here.
        if config.kernel.length() > 0 {
            writer.write_content("boot/kernel", &config.kernel)?;
        }
        for (number, initrd) in config.initrds.iter().enumerate() {
            writer.write_content(&format!("boot/initrd-{number}"), initrd)?;
        }
        for (number, module) in config.modules.iter().enumerate() {
            writer.write_content(&format!("boot/module-{number}"), &module.content)?;
        }
        let file = writer.create(MEMORY)?;

        let still = Still::of(self)?;
        let state = self.state()?;
        // The time of the last write to a disk is to be that before the guest goes on.
        let mut saved_config = SavedConfig::of(config, *has_terminal, &self.consoles.names)?;
        let chunks = memory
            .save(&file)
            .map_err(|source| SnapshotError::WriteMemory {
                path: writer.path(MEMORY),
                source,
            })?;
        let paused = still.since.elapsed();
        drop(still);

        for (disk, bytes) in saved_config.disks.iter_mut().zip(disks) {
            disk.bytes = *bytes;
        }
        let unsummed = |length: u64| Part {
            length,
            crc32: None,
        };
        writer.add(MEMORY, unsummed(memory.size()));
        let list = MemoryList {
            chunk_bytes: CHUNK,
            chunks: chunks
                .iter()
                .map(|chunk| (chunk.offset, chunk.checksum))
                .collect(),
        };
        writer.write(MEMORY_LIST, &section(MEMORY_LIST_VERSION, &list))?;
        for (name, bytes) in state.sections() {
            writer.write(&name, &bytes)?;
        }
        let bytes = section(CONFIG_VERSION, &saved_config);
        writer.write(CONFIG, &bytes)?;
        writer.add(CONFIG, unsummed(bytes.len() as u64));
        let bytes = writer.finish(Header {
            format: Header::format(),
            version: FORMAT_VERSION,
            program: concat!("trapgate ", env!("CARGO_PKG_VERSION")).to_owned(),
            created: time_of_day() / 1_000_000_000,
            guest: self.kernel_version().map(str::to_owned),
            engine: self.engine().kind.name().to_owned(),
            profile: Profile::of(config.level, config.tsc_hz),
            cpus: config.cpus,
            memory_bytes: config.memory_bytes,
            parts: std::collections::BTreeMap::new(),
        })?;
        Ok(SnapshotReport {
            directory,
            bytes,
            paused,
        })
    }

    /// The state of the machine, which stands still.
    fn state(&self) -> Result<MachineState, SnapshotError> {
        let processors = self.processor_states();
        if processors.len() != self.source.config.cpus as usize {
            return Err(SnapshotError::Ended);
        }
        let (chipset, serial_input) = self.board.save();
        Ok(MachineState {
            clock: ClockState {
                now: self.board.clock.now(),
                epoch: self.board.clock.epoch(),
            },
            processors,
            chipset,
            serial_input,
            bus: self.source.bus.save(),
        })
    }
}

/// A machine stands still, and will neither reset nor end, as long as this lives.
struct Still<'a> {
    machine: &'a Machine,
    since: Instant,
    _changes: std::sync::MutexGuard<'a, ()>,
}

impl<'a> Still<'a> {
    fn of(machine: &'a Machine) -> Result<Self, SnapshotError> {
        let until = Instant::now() + UPHEAVAL;
        loop {
            let changes = machine.brake.hold_changes();
            let since = Instant::now();
            machine.brake.engage();
            if !machine.crew.is_held() {
                return Ok(Self {
                    machine,
                    since,
                    _changes: changes,
                });
            }
            // Something has happened that the supervisor is to act on: its effects are not in the
            // state any more, and not yet in the machine.
            machine.brake.release();
            drop(changes);
            if machine.wait_for(Duration::from_millis(1)).is_some() || Instant::now() > until {
                return Err(SnapshotError::Ended);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.machine.brake.release();
    }
}

impl MemoryList {
    /// As memory wants it.
    pub(super) fn chunks(&self) -> Result<Vec<SavedChunk>, SnapshotError> {
        if self.chunk_bytes != CHUNK {
            return Err(SnapshotError::Memory(MemoryError::Chunk {
                offset: self.chunk_bytes,
            }));
        }
        let chunk = |&(offset, checksum): &(u64, u32)| SavedChunk { offset, checksum };
        Ok(self.chunks.iter().map(chunk).collect())
    }
}
