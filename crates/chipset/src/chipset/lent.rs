//! Interrupt controllers that somebody else runs for a while: a host kernel that has them too.
//!
//! While they are lent, what devices do to their inputs goes out as [`Effects::lines`](crate::Effects)
//! and [`Effects::messages`](crate::Effects); registers of the controllers are the other's to answer.
//! All timers but the local APICs' stay here.

use super::Chipset;
use crate::ioapic::{IoApic, IoApicState};
use crate::lapic::{LocalApic, LocalApicState};
use crate::map;
use crate::pic::{Pic, PicState};
use crate::saved::StateError;

/// The interrupt controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllersState {
    /// The local APICs, by vCPU.
    pub local_apics: Vec<LocalApicState>,
    /// The I/O APIC.
    pub io_apic: IoApicState,
    /// The 8259As.
    pub pic: PicState,
}

impl Chipset {
    /// Gives the interrupt controllers away, with the GSIs that are high now, a bit each. Until they
    /// are taken back the chipset is not saved.
    pub fn lend_controllers(&mut self, now: u64) -> (ControllersState, u32) {
        self.advance(now);
        let state = ControllersState {
            local_apics: self.apics.iter().map(LocalApic::save).collect(),
            io_apic: self.io_apic.save(),
            pic: self.pic.save(),
        };
        let mut inert: Vec<LocalApic> = (0..self.config.cpus as u32)
            .map(|id| LocalApic::new(id, self.config.tsc_hz, self.config.physical_address_bits))
            .collect();
        for (inert, apic) in inert.iter_mut().zip(&self.apics) {
            inert.set_tsc_offset(apic.tsc_offset(), now);
        }
        self.apics = inert;
        self.io_apic = IoApic::new();
        self.pic = Pic::new();
        self.pending.fill(false);
        self.lent = true;
        self.deadline_is_stale = true;
        (state, self.levels())
    }

    /// Whether they are lent.
    pub fn controllers_are_lent(&self) -> bool {
        self.lent
    }

    /// Takes the interrupt controllers back as the other left them. Levels of their inputs are not
    /// taken from `state`: the chipset knows them. An armed TSC deadline is brought to VM time from
    /// the TSC offset that each vCPU has by now.
    ///
    /// # Errors
    /// For a state that they can't be in; they stay lent then.
    pub fn take_back_controllers(
        &mut self,
        state: &ControllersState,
        now: u64,
    ) -> Result<(), StateError> {
        let now = self.clock(now);
        let levels = self.levels();
        let ControllersState {
            local_apics,
            io_apic,
            pic,
        } = state;
        if local_apics.len() != self.apics.len() {
            return Err(StateError::Length {
                device: "lapic",
                what: "the state",
                length: local_apics.len(),
                expected: "needs one for each vCPU",
            });
        }
        let mut apics = Vec::new();
        for (id, (state, inert)) in (0..).zip(local_apics.iter().zip(&self.apics)) {
            let bits = self.config.physical_address_bits;
            let mut apic = LocalApic::restore(id, self.config.tsc_hz, bits, state)?;
            apic.set_tsc_offset(inert.tsc_offset(), now);
            apics.push(apic);
        }
        let mut io_apic = io_apic.clone();
        io_apic.asserted = levels;
        io_apic.edges &= levels;
        let mut pic = pic.clone();
        let lines = isa_lines(levels);
        for (chip, lines) in [
            (&mut pic.master, lines as u8),
            (&mut pic.slave, (lines >> 8) as u8),
        ] {
            // The cascade's is worked out below.
            chip.lines = lines;
            chip.edges &= lines;
        }
        let (io_apic, mut pic) = (IoApic::restore(&io_apic)?, Pic::restore(&pic)?);
        pic.settle();
        // It is where it is: no edge, and so no NMI through LINT0.
        apics[0].set_lint(0, pic.output());
        self.apics = apics;
        self.io_apic = io_apic;
        self.pic = pic;
        self.lent = false;
        self.deadline_is_stale = true;
        self.service_io_apic();
        for cpu in 0..self.apics.len() {
            self.refresh(cpu);
        }
        Ok(())
    }

    /// GSIs that are high, a bit each.
    fn levels(&self) -> u32 {
        (0..)
            .zip(self.lines)
            .filter(|(_, sources)| *sources != 0)
            .fold(0, |levels, (gsi, _): (u32, u8)| levels | 1 << gsi)
    }
}

/// The levels of ISA interrupts 0 to 15 from those of the GSIs.
fn isa_lines(levels: u32) -> u16 {
    let timer = levels >> map::TIMER_GSI & 1;
    (levels as u16 & !(1 | 1 << map::TIMER_GSI)) | timer as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::{ChipsetConfig, ChipsetState};

    fn chipset() -> Chipset {
        Chipset::new(ChipsetConfig {
            cpus: 2,
            ..ChipsetConfig::default()
        })
        .unwrap()
    }

    /// A chipset in which interrupts wait, are in service and timers run.
    fn busy() -> Chipset {
        let mut chipset = chipset();
        for (register, value) in [
            (0xf0, 0x1ff),
            (0x320, 0x2_0041),
            (0x3e0, 0xb),
            (0x380, 100_000),
        ] {
            let value = u32::to_le_bytes(value);
            chipset.mmio_write(0, map::LOCAL_APIC_ADDRESS + register, &value, 10);
        }
        for (index, value) in [(0x10 + 2 * 5, 0x45u32), (0x10 + 2 * 20, 0xa050)] {
            chipset.mmio_write(0, map::IO_APIC_ADDRESS, &u32::to_le_bytes(index), 20);
            chipset.mmio_write(0, map::IO_APIC_ADDRESS + 0x10, &value.to_le_bytes(), 20);
        }
        chipset.port_write(0x21, 1, 0, 30);
        chipset.port_write(0xa1, 1, 0, 30);
        for gsi in [5, 9, 20] {
            chipset.set_line(gsi, true, 40);
        }
        assert!(chipset.take_interrupt(0).is_some());
        chipset.take_effects();
        chipset
    }

    #[test]
    fn controllers_come_back_as_they_were_lent() {
        let mut chipset = busy();
        let before: ChipsetState = chipset.save();
        let pending = chipset.interrupt_pending(0);

        let (state, levels) = chipset.lend_controllers(50);
        assert_eq!(levels, 1 << 5 | 1 << 9 | 1 << 20);
        assert!(chipset.controllers_are_lent() && !chipset.interrupt_pending(0));
        chipset.take_back_controllers(&state, 50).unwrap();

        let mut after = chipset.save();
        assert_eq!(after.board.now, 50);
        after.board.now = before.board.now;
        assert_eq!(after, before);
        assert_eq!(chipset.interrupt_pending(0), pending);
    }

    #[test]
    fn lines_and_messages_go_out_while_they_are_lent() {
        let mut chipset = busy();
        let (state, _) = chipset.lend_controllers(50);
        chipset.take_effects();
        chipset.set_line(11, true, 60);
        chipset.set_line(11, true, 60);
        chipset.set_line(5, false, 60);
        chipset.send_msi(0xfee0_0000, 0x51);
        let effects = chipset.take_effects();
        assert_eq!(effects.lines, [(11, true), (5, false)]);
        assert_eq!(effects.messages, [(0xfee0_0000, 0x51)]);
        assert!(effects.signals.is_empty());

        // Levels are the chipset's to know, and the other has served the edge.
        chipset.take_back_controllers(&state, 70).unwrap();
        let saved = chipset.save();
        assert_eq!(saved.io_apic.asserted, 1 << 9 | 1 << 11 | 1 << 20);
        assert_eq!(saved.pic.slave.lines, 1 << 1 | 1 << 3);
        assert!(chipset.take_effects().lines.is_empty());
    }

    #[test]
    fn deadline_in_tsc_ticks_comes_back_at_its_time() {
        let mut chipset = chipset();
        let (mut state, _) = chipset.lend_controllers(0);
        let apic = &mut state.local_apics[1];
        apic.svr |= 0x100;
        apic.lvt[0] = 2 << 17 | 0x41;
        apic.timer.tsc_deadline = 5_000;
        chipset.set_tsc_offset(1, 1_000, 0);
        assert_ne!(chipset.next_deadline(), Some(4_000));
        chipset.take_back_controllers(&state, 100).unwrap();
        assert_eq!(chipset.next_deadline(), Some(4_000));
    }

    #[test]
    fn impossible_state_is_refused_and_nothing_is_lost() {
        let mut chipset = busy();
        let (state, _) = chipset.lend_controllers(50);
        let mut wrong = state.clone();
        wrong.local_apics.pop();
        assert!(chipset.take_back_controllers(&wrong, 60).is_err());
        let mut wrong = state.clone();
        wrong.io_apic.entries[3] = 1 << 14;
        assert!(chipset.take_back_controllers(&wrong, 60).is_err());
        assert!(chipset.controllers_are_lent());
        chipset.take_back_controllers(&state, 60).unwrap();
    }
}
