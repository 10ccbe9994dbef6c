//! The saved state of the chipset: that of its devices, and what is between them.

use serde::{Deserialize, Serialize};

use super::{Chipset, ChipsetConfig, ConfigError, source};
use crate::acpi_pm::{AcpiPm, AcpiPmState};
use crate::effects::Effects;
use crate::hpet::{Hpet, HpetState};
use crate::i8042::{I8042, I8042State};
use crate::ioapic::{IoApic, IoApicState};
use crate::lapic::{LocalApic, LocalApicState};
use crate::map;
use crate::pic::{Pic, PicState};
use crate::pit::{Pit, PitState};
use crate::rtc::{Rtc, RtcState};
use crate::saved::{Check, StateError};
use crate::serial::{Serial, SerialState};

/// Why a chipset can't be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The machine that it would belong to can't be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A device can't be in the state that it is said to be in.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What is between the devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BoardState {
    /// The latest VM time that the chipset has seen, nanoseconds.
    pub now: u64,
    /// Who asserts each GSI: 1 a device outside of the chipset, 2 one of its own, 4 and 8 the HPET.
    pub lines: [u8; map::IO_APIC_PINS as usize],
    /// Where the search for the next lowest-priority destination begins.
    pub lowest_priority_turn: usize,
    /// Reset control register.
    pub reset_control: u8,
    /// The last power-on self test code.
    pub post_code: u8,
}

/// The whole chipset. Its configuration is not in it: that belongs to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChipsetState {
    /// What is between the devices.
    pub board: BoardState,
    /// The local APICs, by vCPU.
    pub local_apics: Vec<LocalApicState>,
    /// The I/O APIC.
    pub io_apic: IoApicState,
    /// The 8259As.
    pub pic: PicState,
    /// The 8254.
    pub pit: PitState,
    /// Clock and memory.
    pub rtc: RtcState,
    /// The HPET.
    pub hpet: HpetState,
    /// The ACPI fixed registers.
    pub acpi_pm: AcpiPmState,
    /// COM1 and COM2 (which is there also where the guest can't see it).
    pub serial: [SerialState; 2],
    /// Keyboard controller.
    pub i8042: I8042State,
}

impl Chipset {
    /// Its state between two calls. Effects that were not taken are lost with it.
    pub fn save(&self) -> ChipsetState {
        let Self {
            config: _,
            // What the last calls did to the outside; taken by now.
            effects: _,
            has_effects: _,
            now,
            // Follow from the devices.
            deadline: _,
            deadline_is_stale: _,
            // Nobody saves it meanwhile.
            lent: _,
            apics,
            pending: _,
            lowest_priority_turn,
            io_apic,
            lines,
            pic,
            pit,
            rtc,
            hpet,
            pm,
            serial: [com1, com2],
            i8042,
            reset_control,
            post_code,
        } = self;
        ChipsetState {
            board: BoardState {
                now: *now,
                lines: *lines,
                lowest_priority_turn: *lowest_priority_turn,
                reset_control: *reset_control,
                post_code: *post_code,
            },
            local_apics: apics.iter().map(LocalApic::save).collect(),
            io_apic: io_apic.save(),
            pic: pic.save(),
            pit: pit.save(),
            rtc: rtc.save(),
            hpet: hpet.save(),
            acpi_pm: pm.save(),
            serial: [com1.save(), com2.save()],
            i8042: i8042.save(),
        }
    }

    /// The chipset of a machine like `config` in a state. It has no effects: whoever restores it asks
    /// [`interrupt_pending`](Self::interrupt_pending) for every vCPU.
    ///
    /// # Errors
    /// For a configuration that no chipset has, and a state that this one can't be in.
    pub fn restore(config: ChipsetConfig, state: &ChipsetState) -> Result<Self, RestoreError> {
        let ChipsetState {
            board:
                BoardState {
                    now,
                    lines,
                    lowest_priority_turn,
                    reset_control,
                    post_code,
                },
            local_apics,
            io_apic,
            pic,
            pit,
            rtc,
            hpet,
            acpi_pm,
            serial: [com1, com2],
            i8042,
        } = state;
        config.validate()?;
        let now = *now;
        let check = Check("board");
        check.time("VM time", now)?;
        for &line in lines {
            let known = source::EXTERNAL | source::DEVICE | source::HPET_EDGE | source::HPET_LEVEL;
            check.bits("who asserts a line", line, known)?;
        }
        check.that(
            *lowest_priority_turn < config.cpus,
            "lowest_priority_turn",
            *lowest_priority_turn as u64,
        )?;
        check.bits("reset_control", *reset_control, 0x0eu8)?;
        if local_apics.len() != config.cpus {
            Err(StateError::Length {
                device: "lapic",
                what: "the saved state",
                length: local_apics.len(),
                expected: "needs one for each vCPU",
            })?;
        }
        let apics = (0..)
            .zip(local_apics)
            .map(|(id, apic)| {
                LocalApic::restore(id, config.tsc_hz, config.physical_address_bits, apic)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut chipset = Self {
            effects: Effects::default(),
            has_effects: false,
            now,
            deadline: u64::MAX,
            deadline_is_stale: true,
            pending: vec![false; config.cpus],
            lowest_priority_turn: *lowest_priority_turn,
            lent: false,
            apics,
            io_apic: IoApic::restore(io_apic)?,
            lines: *lines,
            pic: Pic::restore(pic)?,
            pit: Pit::restore(pit, now)?,
            rtc: Rtc::restore(rtc, now)?,
            hpet: Hpet::restore(hpet)?,
            pm: AcpiPm::restore(acpi_pm, now)?,
            serial: [Serial::restore(com1)?, Serial::restore(com2)?],
            i8042: I8042::restore(i8042)?,
            reset_control: *reset_control,
            post_code: *post_code,
            config,
        };
        for cpu in 0..chipset.apics.len() {
            chipset.refresh(cpu);
        }
        // Nobody is to be told of what was told before the state was saved.
        chipset.take_effects();
        Ok(chipset)
    }
}
