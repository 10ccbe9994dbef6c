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

    /// In [`View::Checked`]: #AC for a misaligned access where EFLAGS.AC asks for it, and a note of
    /// the data breakpoints that the access hits.
    pub(crate) fn check_debug_and_alignment(
        &mut self,
        linear: u64,
        size: u64,
        access: Access,
    ) -> Step {
        debug_assert_eq!(self.view, View::Checked);
        if self.checks_alignment() {
            // Other sizes have requirements of their own, or none (table 7-7).
            let alignment = match size {
                2 | 4 | 8 => size,
                10 => 8,
                _ => 1,
            };
            if !linear.is_multiple_of(alignment) {
                return Err(self.raise(Exception::with_code(Vector::AC, 0)));
            }
        }
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
        Ok(())
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
