//! The pair of 8259A interrupt controllers (Intel 8259A data sheet, order 231468) with the edge/level
//! control registers of EISA and PCI boards.

mod saved;

use serde::{Deserialize, Serialize};

pub use saved::{ChipState, PicState};

/// The cascade: the slave's output is the master's input 2.
const CASCADE: u8 = 2;

/// The word that an 8259A's data port expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expects {
    /// An operation command word.
    Ocw,
    /// The second initialization command word: the vector.
    Icw2,
    /// The third: the cascade.
    Icw3,
    /// The fourth: modes.
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    /// Levels at the inputs.
    lines: u8,
    /// Edges seen and not acknowledged, on inputs that are still high.
    edges: u8,
    imr: u8,
    isr: u8,
    /// Inputs that are level triggered.
    elcr: u8,
    elcr_writable: u8,
    vector: u8,
    expects: Expects,
    icw4_follows: bool,
    single: bool,
    /// The input of lowest priority; the next one has the highest.
    lowest: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
    /// Inputs that carry a cascaded 8259A.
    slaves: u8,
}

impl Chip {
    fn new(vector: u8, elcr: u8, elcr_writable: u8, slaves: u8) -> Self {
        Self {
            lines: 0,
            edges: 0,
            imr: 0xff,
            isr: 0,
            elcr,
            elcr_writable,
            vector,
            expects: Expects::Ocw,
            icw4_follows: false,
            single: false,
            lowest: 7,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_isr: false,
            poll: false,
            slaves,
        }
    }

    fn irr(&self) -> u8 {
        self.edges | self.lines & self.elcr
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if level {
            self.edges |= bit & !self.lines;
            self.lines |= bit;
        } else {
            // An input must stay high until it is acknowledged, edge triggered or not
            // ("Edge and level triggered modes").
            self.edges &= !bit;
            self.lines &= !bit;
        }
    }

    /// Distance from the input of highest priority.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest + 1) & 7
    }

    /// Of the inputs in `set`, the one of highest priority.
    fn first(&self, set: u8) -> Option<u8> {
        // Rotated so that the highest priority is bit 0.
        let rotated = set.rotate_right(u32::from(self.lowest + 1) & 7);
        (rotated != 0).then(|| (rotated.trailing_zeros() as u8 + self.lowest + 1) & 7)
    }

    /// The input that would interrupt now.
    fn pending(&self) -> Option<u8> {
        let request = self.first(self.irr() & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested {
            in_service &= !self.slaves;
        }
        match self.first(in_service) {
            Some(current) if self.rank(request) >= self.rank(current) => None,
            _ => Some(request),
        }
    }

    /// An INTA cycle for `input`.
    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        self.edges &= !bit;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    /// The input acknowledged, or `None` for a spurious interrupt (7 with no in-service bit).
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        let input = self.pending()?;
        self.acknowledge(input);
        Some(input)
    }

    fn non_specific_eoi(&mut self) -> Option<u8> {
        let candidates = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        let input = self.first(candidates)?;
        self.isr &= !(1 << input);
        Some(input)
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            self.operation_3(value);
        } else {
            self.operation_2(value);
        }
    }

    /// ICW1.
    fn initialize(&mut self, value: u8) {
        self.edges = 0;
        self.imr = 0;
        self.isr = 0;
        self.lowest = 7;
        self.special_mask = false;
        self.read_isr = false;
        self.poll = false;
        self.auto_eoi = false;
        self.rotate_on_auto_eoi = false;
        self.special_fully_nested = false;
        self.icw4_follows = value & 1 != 0;
        self.single = value & 2 != 0;
        // LTIM (bit 3) has no effect where there is an ELCR.
        self.expects = Expects::Icw2;
    }

    fn operation_2(&mut self, value: u8) {
        let input = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.non_specific_eoi();
            }
            0b101 => {
                if let Some(ended) = self.non_specific_eoi() {
                    self.lowest = ended;
                }
            }
            0b011 => self.isr &= !(1 << input),
            0b111 => {
                self.isr &= !(1 << input);
                self.lowest = input;
            }
            0b110 => self.lowest = input,
            _ => {}
        }
    }

    fn operation_3(&mut self, value: u8) {
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
        if value & 0x04 != 0 {
            self.poll = true;
        } else if value & 0x02 != 0 {
            self.read_isr = value & 1 != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        let icw4 = if self.icw4_follows {
            Expects::Icw4
        } else {
            Expects::Ocw
        };
        self.expects = match self.expects {
            Expects::Ocw => {
                self.imr = value;
                Expects::Ocw
            }
            Expects::Icw2 => {
                self.vector = value & 0xf8;
                if self.single { icw4 } else { Expects::Icw3 }
            }
            // The cascade is wired; what the guest says about it changes nothing.
            Expects::Icw3 => icw4,
            Expects::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                Expects::Ocw
            }
        };
    }

    fn read(&mut self, data: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.interrupt_acknowledge().map_or(0, |input| 0x80 | input);
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }
}

/// Master and slave, as ISA interrupts 0 to 15.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
    output: bool,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// As firmware leaves them: vectors 8 and 0x70, but with every input masked; interrupts 9, 10 and
    /// 11 level triggered, for the SCI and PCI.
    pub fn new() -> Self {
        Self {
            master: Chip::new(0x08, 0, 0xf8, 1 << CASCADE),
            slave: Chip::new(0x70, 0x0e, 0xde, 0),
            output: false,
        }
    }

    /// The level of the master's INT output.
    pub fn output(&self) -> bool {
        self.output
    }

    /// Works the cascade and the output out from the lines.
    pub(crate) fn settle(&mut self) {
        self.update();
    }

    fn update(&mut self) {
        // The cascade follows the slave's output rather than its edges: in the INTA cycle that ends
        // one request of the slave, the next one raises the output again.
        self.master.set_line(CASCADE, false);
        if self.slave.pending().is_some() {
            self.master.set_line(CASCADE, true);
        }
        self.output = self.master.pending().is_some();
    }

    /// Sets the level of an ISA interrupt (0 to 15; 2 is the cascade and has no line).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            0..8 if irq != CASCADE => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.update();
    }

    /// Whether an edge or level on this ISA interrupt would reach the output: not masked on its way.
    pub fn is_unmasked(&self, irq: u8) -> bool {
        match irq {
            0..8 => self.master.imr & 1 << irq == 0,
            8..16 => self.slave.imr & 1 << (irq - 8) == 0 && self.master.imr & 1 << CASCADE == 0,
            _ => false,
        }
    }

    /// The processor's interrupt acknowledge: the vector. With no request left it is the spurious
    /// interrupt, input 7 of the chip that was asked.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.interrupt_acknowledge() {
            Some(CASCADE) => self.slave.vector | self.slave.interrupt_acknowledge().unwrap_or(7),
            Some(input) => self.master.vector | input,
            None => self.master.vector | 7,
        };
        self.update();
        vector
    }

    fn chip(&mut self, port: u16) -> &mut Chip {
        if port & 0x80 == 0 {
            &mut self.master
        } else {
            &mut self.slave
        }
    }

    /// Reads port 0x20, 0x21, 0xa0 or 0xa1.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = self.chip(port).read(port & 1 != 0);
        self.update();
        value
    }

    /// Writes port 0x20, 0x21, 0xa0 or 0xa1.
    pub fn write(&mut self, port: u16, value: u8) {
        let chip = self.chip(port);
        if port & 1 == 0 {
            chip.write_command(value);
        } else {
            chip.write_data(value);
        }
        self.update();
    }

    /// Reads port 0x4d0 or 0x4d1.
    pub fn read_elcr(&self, port: u16) -> u8 {
        if port & 1 == 0 {
            self.master.elcr
        } else {
            self.slave.elcr
        }
    }

    /// Writes port 0x4d0 or 0x4d1: a set bit makes the interrupt level triggered. Interrupts 0, 1, 2,
    /// 8 and 13 cannot be.
    pub fn write_elcr(&mut self, port: u16, value: u8) {
        let chip = if port & 1 == 0 {
            &mut self.master
        } else {
            &mut self.slave
        };
        chip.elcr = value & chip.elcr_writable;
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux initialises them (init_8259A), everything unmasked.
    fn initialized(icw4: u8) -> Pic {
        let mut pic = Pic::new();
        for (port, vector, cascade) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pic.write(port, 0x11);
            pic.write(port + 1, vector);
            pic.write(port + 1, cascade);
            pic.write(port + 1, icw4);
            pic.write(port + 1, 0);
        }
        pic
    }

    fn isr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0b);
        pic.read(port)
    }

    fn irr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0a);
        pic.read(port)
    }

    #[test]
    fn mask_register_reads_back_what_was_written() {
        // Linux finds out this way whether there is a PIC at all (probe_8259A).
        let mut pic = Pic::new();
        pic.write(0x21, 0xfb);
        pic.write(0xa1, 0xa5);
        assert_eq!((pic.read(0x21), pic.read(0xa1)), (0xfb, 0xa5));
    }

    #[test]
    fn master_request_gives_its_vector() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.output());
        assert_eq!(isr(&mut pic, 0x20), 0x10);
        assert_eq!(irr(&mut pic, 0x20), 0);
    }

    #[test]
    fn slave_request_is_in_service_at_both() {
        let mut pic = initialized(1);
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x3c);
        assert_eq!(isr(&mut pic, 0x20), 1 << 2);
        assert_eq!(isr(&mut pic, 0xa0), 1 << 4);
    }

    #[test]
    fn lower_priority_waits_for_the_end_of_the_higher() {
        let mut pic = initialized(1);
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.set_irq(4, true);
        assert!(!pic.output());
        pic.write(0x20, 0x20);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn higher_priority_interrupts_the_lower() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        pic.acknowledge();
        pic.set_irq(1, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x31);
        // The non-specific EOI ends the higher one.
        pic.write(0x20, 0x20);
        assert_eq!(isr(&mut pic, 0x20), 1 << 4);
    }

    #[test]
    fn specific_eoi_ends_the_named_input() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        pic.acknowledge();
        pic.set_irq(1, true);
        pic.acknowledge();
        pic.write(0x20, 0x64);
        assert_eq!(isr(&mut pic, 0x20), 1 << 1);
    }

    #[test]
    fn masked_request_is_kept_and_delivered_when_unmasked() {
        let mut pic = initialized(1);
        pic.write(0x21, 0x10);
        pic.set_irq(4, true);
        assert!(!pic.output());
        assert_eq!(irr(&mut pic, 0x20), 0x10);
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn edge_input_needs_a_new_edge_for_the_next_interrupt() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        pic.acknowledge();
        pic.write(0x20, 0x20);
        assert!(!pic.output());
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert!(pic.output());
    }

    #[test]
    fn level_input_interrupts_again_while_it_is_high() {
        let mut pic = initialized(1);
        pic.write_elcr(0x4d0, 0x20);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x20);
        assert!(pic.output());
        pic.set_irq(5, false);
        assert!(!pic.output());
    }

    #[test]
    fn elcr_bits_of_the_boards_own_interrupts_stay_clear() {
        let mut pic = Pic::new();
        pic.write_elcr(0x4d0, 0xff);
        pic.write_elcr(0x4d1, 0xff);
        assert_eq!((pic.read_elcr(0x4d0), pic.read_elcr(0x4d1)), (0xf8, 0xde));
    }

    #[test]
    fn request_that_goes_away_is_spurious_interrupt_7() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        pic.set_irq(4, false);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(isr(&mut pic, 0x20), 0);
    }

    /// The master has accepted the slave's request, so it needs an EOI; the slave has not.
    #[test]
    fn slaves_request_that_goes_away_is_spurious_interrupt_15() {
        let mut pic = initialized(1);
        pic.set_irq(10, true);
        // In between the two INTA pulses the request is masked at the slave only.
        pic.slave.imr = 0xff;
        assert_eq!(pic.acknowledge(), 0x3f);
        assert_eq!(isr(&mut pic, 0x20), 1 << 2);
        assert_eq!(isr(&mut pic, 0xa0), 0);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pic = initialized(3);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!(isr(&mut pic, 0x20), 0);
    }

    #[test]
    fn rotation_on_eoi_makes_the_ended_input_the_lowest() {
        let mut pic = initialized(1);
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.write(0x20, 0xa0);
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        pic.set_irq(7, true);
        assert_eq!(pic.acknowledge(), 0x37);
    }

    #[test]
    fn set_priority_command_names_the_lowest() {
        let mut pic = initialized(1);
        pic.write(0x20, 0xc4);
        pic.set_irq(0, true);
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn poll_acknowledges_without_the_processor() {
        let mut pic = initialized(1);
        pic.set_irq(6, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x86);
        assert_eq!(isr(&mut pic, 0x20), 0x40);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0);
    }

    #[test]
    fn special_mask_lets_lower_priorities_through() {
        let mut pic = initialized(1);
        pic.set_irq(3, true);
        pic.acknowledge();
        pic.set_irq(5, true);
        assert!(!pic.output());
        pic.write(0x20, 0x68);
        pic.write(0x21, 0x08);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn special_fully_nested_master_takes_a_higher_request_of_the_slave() {
        let mut pic = initialized(0x11);
        pic.set_irq(12, true);
        pic.acknowledge();
        pic.set_irq(8, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x38);
    }

    #[test]
    fn second_request_of_the_slave_follows_the_end_of_the_first() {
        let mut pic = initialized(1);
        pic.set_irq(8, true);
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x38);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn initialisation_clears_mask_and_requests() {
        let mut pic = initialized(1);
        pic.set_irq(4, true);
        pic.write(0x20, 0x11);
        assert!(!pic.output());
        assert_eq!(irr(&mut pic, 0x20), 0);
    }

    #[test]
    fn cascade_masked_at_the_master_hides_the_slave() {
        let mut pic = initialized(1);
        pic.write(0x21, 1 << 2);
        pic.set_irq(8, true);
        assert!(!pic.output());
        assert!(!pic.is_unmasked(8));
    }
}
