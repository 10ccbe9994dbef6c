//! Debug registers and alignment checks (SDM vol. 3B, chapter 18; vol. 3A, 7.15, #AC).

use iced_x86::{Code, Instruction};
use trapgate_x86::registers::{cr0, cr4, dr, rflags};
use trapgate_x86::{Exception, Vector};

use crate::control::op_undefined;
use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};
use crate::tlb::{Access, View};

/// DR6 bits that software can change (no RTM, no bus-lock detection).
const DR6_WRITABLE: u64 = 0xf | dr::DR6_BD | dr::DR6_BS | dr::DR6_BT;
/// DR7 bits that software can change: enables, LE and GE, GD, conditions and lengths.
const DR7_WRITABLE: u64 = 0xffff_0000 | dr::DR7_GD | 0x3ff;

/// What a breakpoint of DR7 watches (SDM vol. 3B, 18.2.4, R/Wn).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    Execution,
    Writes,
    Ports,
    ReadsAndWrites,
}

/// An enabled breakpoint.
struct Breakpoint {
    /// Its bit in DR6.
    bit: u64,
    watch: Watch,
    /// Address of its first byte, aligned to its length.
    start: u64,
    /// Bytes.
    length: u64,
}

impl Breakpoint {
    fn overlaps(&self, address: u64, size: u64) -> bool {
        let size = size.max(1);
        address.wrapping_sub(self.start) < self.length || self.start.wrapping_sub(address) < size
    }
}

/// The handler of a move to or from a debug register.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.code() {
        Code::Mov_r32_dr | Code::Mov_r64_dr if op.src < 8 => Some(op_mov_from_dr),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 if op.dst < 8 => Some(op_mov_to_dr),
        Code::Mov_r32_dr | Code::Mov_r64_dr | Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
            Some(op_undefined)
        }
        _ => None,
    }
}

fn op_mov_from_dr(cpu: &mut Cpu, op: &Op) -> Step {
    let register = cpu.check_debug_register(op.src)?;
    let value = match register {
        6 => cpu.sys.dr6,
        7 => cpu.sys.dr7,
        register => cpu.sys.dr[register],
    };
    cpu.set_system_operand(op.dst, value);
    Ok(())
}

fn op_mov_to_dr(cpu: &mut Cpu, op: &Op) -> Step {
    let register = cpu.check_debug_register(op.dst)?;
    let value = cpu.system_operand(op.src);
    if register >= 6 && value >> 32 != 0 {
        return cpu.gp0();
    }
    match register {
        6 => cpu.sys.dr6 = value & DR6_WRITABLE | dr::DR6_ONES,
        7 => {
            cpu.sys.dr7 = value & DR7_WRITABLE | dr::DR7_ONE;
            cpu.update_mode();
        }
        register => cpu.sys.dr[register] = value,
    }
    cpu.end_block = true;
    Ok(())
}

/// Whether DR6 can hold a value.
pub(crate) fn is_valid_dr6(value: u64) -> bool {
    value == value & DR6_WRITABLE | dr::DR6_ONES
}

/// Whether DR7 can hold a value.
pub(crate) fn is_valid_dr7(value: u64) -> bool {
    value == value & DR7_WRITABLE | dr::DR7_ONE
}

impl Cpu {
    /// The checks of a move to or from a debug register; gives its number, 0 to 3, 6 or 7.
    fn check_debug_register(&mut self, number: u8) -> Result<usize, Stop> {
        let mut number = usize::from(number);
        if matches!(number, 4 | 5) {
            if self.sys.cr4 & cr4::DE != 0 {
                return self.ud();
            }
            number += 2;
        }
        self.check_cpl0()?;
        if self.sys.dr7 & dr::DR7_GD != 0 {
            self.sys.dr6 |= dr::DR6_BD;
            return Err(self.raise(Exception::plain(Vector::DB)));
        }
        Ok(number)
    }

    fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> {
        let (dr7, addresses) = (self.sys.dr7, self.sys.dr);
        (0..4)
            .filter(move |index| dr7 >> (2 * index) & 3 != 0)
            .map(move |index| {
                let watch = match dr7 >> (16 + 4 * index) & 3 {
                    0 => Watch::Execution,
                    1 => Watch::Writes,
                    2 => Watch::Ports,
                    _ => Watch::ReadsAndWrites,
                };
                let length = match dr7 >> (18 + 4 * index) & 3 {
                    0 => 1,
                    1 => 2,
                    2 => 8,
                    _ => 4,
                };
                Breakpoint {
                    bit: 1 << index,
                    watch,
                    // The address bits below the length are ignored (18.2.5).
                    start: addresses[index as usize] & !(length - 1),
                    length,
                }
            })
    }

    /// In [`View::Checked`]: #AC for a misaligned access where EFLAGS.AC asks for it.
    pub(crate) fn check_alignment(&mut self, linear: u64, alignment: u64) -> Step {
        debug_assert_eq!(self.view, View::Checked);
        if self.checks_alignment() && !linear.is_multiple_of(alignment) {
            return Err(self.raise(Exception::with_code(Vector::AC, 0)));
        }
        Ok(())
    }

    /// In [`View::Checked`]: notes the data breakpoints that an access hits.
    pub(crate) fn note_data_breakpoints(&mut self, linear: u64, size: u64, access: Access) {
        let mut hit = 0;
        for breakpoint in self.breakpoints() {
            let watched = match breakpoint.watch {
                Watch::Writes => access == Access::Write,
                Watch::ReadsAndWrites => access != Access::Execute,
                Watch::Execution | Watch::Ports => false,
            };
            if watched && breakpoint.overlaps(linear, size) {
                hit |= breakpoint.bit;
            }
        }
        self.breakpoints_hit |= hit;
    }

    /// Whether misaligned accesses raise #AC.
    fn checks_alignment(&self) -> bool {
        self.cpl == 3 && self.sys.cr0 & cr0::AM != 0 && self.system_flags & rflags::AC != 0
    }

    /// DR6 bits of the breakpoints on executing the instruction at a linear address.
    pub(crate) fn instruction_breakpoints(&self, linear: u64) -> u64 {
        self.breakpoints()
            .filter(|breakpoint| breakpoint.watch == Watch::Execution)
            .filter(|breakpoint| breakpoint.length == 1 && breakpoint.start == linear)
            .fold(0, |bits, breakpoint| bits | breakpoint.bit)
    }

    /// Notes the breakpoints that an access to a port hits.
    pub(crate) fn note_port_breakpoints(&mut self, port: u16, size: u64) {
        if self.sys.cr4 & cr4::DE == 0 {
            return;
        }
        let hit = self
            .breakpoints()
            .filter(|breakpoint| breakpoint.watch == Watch::Ports)
            .filter(|breakpoint| breakpoint.overlaps(u64::from(port), size))
            .fold(0, |bits, breakpoint| bits | breakpoint.bit);
        self.breakpoints_hit |= hit;
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::registers::gpr;

    use super::*;
    use crate::testing::{GP0, UD, execute, fault, long_cpu, protected_cpu, set_cpl};

    const DB: (Vector, Option<u32>) = (Vector::DB, None);

    /// MOV DRn, RAX.
    fn write_dr(number: u8) -> [u8; 3] {
        [0x0f, 0x23, 0xc0 | number << 3]
    }

    /// MOV RAX, DRn.
    fn read_dr(number: u8) -> [u8; 3] {
        [0x0f, 0x21, 0xc0 | number << 3]
    }

    /// A watching processor: breakpoint 2 has the R/W and LEN fields of `field`.
    fn watching_cpu(address: u64, field: u64) -> Cpu {
        let (mut cpu, _) = long_cpu();
        cpu.sys.dr[2] = address;
        cpu.sys.dr7 = dr::DR7_ONE | 1 << 5 | field << 24;
        cpu.update_mode();
        cpu
    }

    #[test]
    fn registers_keep_what_they_have_bits_for() {
        let (mut cpu, _) = long_cpu();
        let cases = [
            (0, 0x8000_0000_0000_1234, 0x8000_0000_0000_1234),
            (3, u64::MAX, u64::MAX),
            (6, 0, 0xffff_0ff0),
            (6, 0xffff_ffff, 0xffff_efff),
            (7, 0, 0x400),
            (7, 0xffff_dfff, 0xffff_07ff),
        ];
        for (number, written, kept) in cases {
            cpu.regs.gpr[gpr::RAX] = written;
            execute(&mut cpu, &write_dr(number)).unwrap();
            cpu.regs.gpr[gpr::RAX] = 0;
            execute(&mut cpu, &read_dr(number)).unwrap();
            assert_eq!(cpu.regs.gpr[gpr::RAX], kept, "DR{number}");
        }
        cpu.regs.gpr[gpr::RAX] = 1 << 32;
        assert_eq!(fault(&mut cpu, &write_dr(6)), GP0);
        assert_eq!(fault(&mut cpu, &write_dr(7)), GP0);
        // With REX.R the number is 8.
        assert_eq!(fault(&mut cpu, &[0x44, 0x0f, 0x23, 0xc0]), UD);
    }

    #[test]
    fn outside_64bit_mode_only_half_a_register_moves() {
        let (mut cpu, _) = protected_cpu();
        cpu.regs.gpr[gpr::RAX] = 0xffff_ffff_0000_1000;
        execute(&mut cpu, &write_dr(0)).unwrap();
        assert_eq!(cpu.sys.dr[0], 0x1000);
    }

    #[test]
    fn dr4_and_dr5_are_aliases_without_debugging_extensions() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.dr6 = dr::DR6_ONES | 5;
        execute(&mut cpu, &read_dr(4)).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], dr::DR6_ONES | 5);
        cpu.sys.cr4 |= cr4::DE;
        assert_eq!(fault(&mut cpu, &read_dr(4)), UD);
        assert_eq!(fault(&mut cpu, &write_dr(5)), UD);
    }

    #[test]
    fn general_detect_catches_every_access() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.dr7 |= dr::DR7_GD;
        assert_eq!(fault(&mut cpu, &read_dr(0)), DB);
        assert_eq!(cpu.sys.dr6, dr::DR6_ONES | dr::DR6_BD);
        assert_eq!(fault(&mut cpu, &write_dr(7)), DB);
        set_cpl(&mut cpu, 3);
        assert_eq!(fault(&mut cpu, &read_dr(0)), GP0);
    }

    #[test]
    fn data_breakpoints_hit_what_overlaps_them() {
        // R/W and LEN, address, then: linear, size, access, hit.
        const WRITE_2: u64 = 0b0101;
        const ACCESS_4: u64 = 0b1111;
        const ACCESS_8: u64 = 0b1011;
        const EXECUTE: u64 = 0b0000;
        let cases = [
            (WRITE_2, 0x1001, 0x1000, 1, Access::Write, true),
            (WRITE_2, 0x1000, 0x1001, 1, Access::Write, true),
            (WRITE_2, 0x1000, 0x1002, 1, Access::Write, false),
            (WRITE_2, 0x1000, 0xffc, 4, Access::Write, false),
            (WRITE_2, 0x1000, 0xffd, 4, Access::Write, true),
            (WRITE_2, 0x1000, 0x1000, 2, Access::Read, false),
            (ACCESS_4, 0x1000, 0x1003, 1, Access::Read, true),
            (ACCESS_4, 0x1000, 0x1003, 8, Access::Write, true),
            (ACCESS_4, 0x1000, 0x1004, 8, Access::Write, false),
            (ACCESS_8, 0x1004, 0x1000, 1, Access::Read, true),
            (ACCESS_8, 0x1004, 0x1000, 1, Access::Execute, false),
            (EXECUTE, 0x1000, 0x1000, 1, Access::Read, false),
        ];
        for (field, address, linear, size, access, hit) in cases {
            let mut cpu = watching_cpu(address, field);
            cpu.view = View::Checked;
            cpu.note_data_breakpoints(linear, size, access);
            let expected = if hit { 1 << 2 } else { 0 };
            assert_eq!(
                cpu.take_breakpoints(),
                expected,
                "{linear:#x}+{size} {access:?}"
            );
        }
    }

    #[test]
    fn loads_and_stores_are_watched() {
        let mut cpu = watching_cpu(0x8000, 0b1111);
        cpu.regs.gpr[gpr::RSI] = 0x8002;
        execute(&mut cpu, &[0x8a, 0x06]).unwrap();
        assert_eq!(cpu.take_breakpoints(), 1 << 2, "MOV AL, [RSI]");
        execute(&mut cpu, &[0x88, 0x46, 0x02]).unwrap();
        assert_eq!(cpu.take_breakpoints(), 0, "MOV [RSI+2], AL");
    }

    #[test]
    fn instruction_breakpoints_match_the_first_byte_exactly() {
        let cpu = watching_cpu(0x1003, 0b0000);
        assert_eq!(cpu.instruction_breakpoints(0x1003), 1 << 2);
        assert_eq!(cpu.instruction_breakpoints(0x1002), 0);
        let disabled = watching_cpu(0x1003, 0b0001);
        assert_eq!(disabled.instruction_breakpoints(0x1003), 0);
    }

    #[test]
    fn misaligned_accesses_fault_where_user_code_asked_for_it() {
        let (mut cpu, _) = long_cpu();
        cpu.regs.gpr[gpr::RSI] = 0x8001;
        cpu.sys.cr0 |= cr0::AM;
        cpu.set_rflags(rflags::AC);
        cpu.update_mode();
        // MOV AX, [RSI]
        let load: &[u8] = &[0x66, 0x8b, 0x06];
        execute(&mut cpu, load).unwrap();
        set_cpl(&mut cpu, 3);
        assert_eq!(fault(&mut cpu, load), (Vector::AC, Some(0)));
        cpu.set_rflags(0);
        execute(&mut cpu, load).unwrap();
        cpu.set_rflags(rflags::AC);
        cpu.regs.gpr[gpr::RSI] = 0x8002;
        execute(&mut cpu, load).unwrap();
    }

    /// RETFQ and IRETQ pop several words at once.
    #[test]
    fn frames_of_far_transfers_are_watched_and_checked() {
        let (retf, iret): (&[u8], &[u8]) = (&[0x48, 0xcb], &[0x48, 0xcf]);
        for code in [retf, iret] {
            let mut cpu = watching_cpu(0x8008, 0b1011);
            cpu.regs.gpr[gpr::RSP] = 0x8000;
            // The null selector there is refused; it was read.
            assert_eq!(fault(&mut cpu, code), GP0);
            assert_eq!(cpu.take_breakpoints(), 1 << 2);

            let (mut cpu, _) = long_cpu();
            set_cpl(&mut cpu, 3);
            cpu.sys.cr0 |= cr0::AM;
            cpu.set_rflags(rflags::AC);
            cpu.update_mode();
            cpu.regs.gpr[gpr::RSP] = 0x8004;
            assert_eq!(fault(&mut cpu, code), (Vector::AC, Some(0)));
        }
    }
}
