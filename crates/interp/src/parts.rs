//! Memory operands that are accessed in several parts, and go over the end of what the instruction's addresses reach.
//!
//! The offset of each part is cut to the address size (SDM vol. 1, 3.6.1), so a part that would begin at or behind 4 GiB
//! (64 KiB) begins at the start of the segment; one that begins before goes on behind. The manual does not say what the
//! parts are. Here they are those of the host CPU.

use std::ops::Range;

use trapgate_thunk::Class;

use crate::cpu::{Cpu, Step, Stop};
use crate::op::Op;
use crate::tlb::Access;

/// In which parts an operand is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    /// All at once, or all but a few rare instructions.
    One,
    /// Eight bytes at a time: what has ten, and MASKMOVDQU.
    Eights,
    /// The x87's environment, seven values of so many bytes, and perhaps registers, each of eight bytes and two.
    X87(usize),
    /// What FXSAVE and XSAVE write.
    Area,
}

impl Parts {
    /// Of what a thunk accesses.
    pub(crate) fn of_thunk(class: Class, size: usize) -> Self {
        match (class, size) {
            (Class::X87, 10) => Self::Eights,
            (Class::X87, 14 | 94) => Self::X87(2),
            (Class::X87, 28 | 108) => Self::X87(4),
            _ => Self::One,
        }
    }

    /// Bytes of the part that begins at a byte of the operand.
    fn length(self, at: usize) -> usize {
        match self {
            Self::One => usize::MAX,
            Self::Eights => 8,
            Self::X87(value) if at < 7 * value => value,
            Self::X87(value) if (at - 7 * value).is_multiple_of(10) => 8,
            Self::X87(_) => 2,
            // FCW to FOP, the pointers, MXCSR and its mask; x87 registers; XMM registers; the header; YMM registers.
            Self::Area => match at {
                0..8 | 24..32 => 4,
                8..160 | 512..576 => 8,
                _ => 16,
            },
        }
    }

    /// Whether the last byte is asked for on its own, before the parts are accessed; the x87's behind the first byte.
    fn asks_for_end(self) -> bool {
        matches!(self, Self::X87(_) | Self::Area)
    }
}

/// Where the bytes of an operand lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Linear address of its first byte.
    pub(crate) linear: u64,
    /// Where in it the part begins that lies at the start of the segment, with all that follow.
    cut: usize,
    /// Linear address of that part.
    rest: u64,
}

impl Extent {
    /// Whether `size` bytes lie one behind the other.
    pub(crate) fn is_contiguous(&self, size: usize) -> bool {
        self.cut >= size
    }
}

impl Cpu {
    /// Linear address of the part that begins so many bytes behind the start of an op's memory operand.
    pub(crate) fn part_address(&self, op: &Op, bytes: u64) -> u64 {
        let offset = self.offset(op).wrapping_add(bytes) & Self::address_mask(op);
        self.linear(usize::from(op.segment), offset)
    }

    /// Where an op's memory operand of `size` bytes lies, of which the linear address is known.
    #[inline]
    pub(crate) fn extent(
        &mut self,
        op: &Op,
        linear: u64,
        size: usize,
        parts: Parts,
        access: Access,
    ) -> Result<Extent, Stop> {
        let mask = Self::address_mask(op);
        // What goes round 64-bit addresses lies one behind the other all the same.
        let whole =
            parts == Parts::One || mask == u64::MAX || size as u64 - 1 <= mask - self.offset(op);
        if whole {
            return Ok(Extent {
                linear,
                cut: usize::MAX,
                rest: 0,
            });
        }
        self.extent_round(op, linear, size, parts, access)
    }

    #[cold]
    fn extent_round(
        &mut self,
        op: &Op,
        linear: u64,
        size: usize,
        parts: Parts,
        access: Access,
    ) -> Result<Extent, Stop> {
        let before = Self::address_mask(op) - self.offset(op);
        let mut cut = 0;
        while cut as u64 <= before {
            cut += parts.length(cut);
        }
        if parts.asks_for_end() {
            if matches!(parts, Parts::X87(_)) {
                self.probe_elements(linear, 1, access, op.segment)?;
            }
            let last = self.part_address(op, size as u64 - 1);
            self.probe_elements(last, 1, access, op.segment)?;
        }
        let rest = self.part_address(op, cut as u64);
        Ok(Extent { linear, cut, rest })
    }

    /// Does something with the runs, one or two, in which bytes of an operand lie: where, and which.
    pub(crate) fn each_run(
        &mut self,
        extent: &Extent,
        bytes: Range<usize>,
        mut visit: impl FnMut(&mut Self, u64, Range<usize>) -> Step,
    ) -> Step {
        let cut = extent.cut.clamp(bytes.start, bytes.end);
        let first = self.advance(extent.linear, bytes.start as u64);
        let rest = self.advance(extent.rest, cut.saturating_sub(extent.cut) as u64);
        for (at, run) in [(first, bytes.start..cut), (rest, cut..bytes.end)] {
            if !run.is_empty() {
                visit(self, at, run)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Vector;
    use trapgate_x86::registers::{cr4, gpr, sreg, xcr0};

    use super::*;
    use crate::testing::{PAGE_TABLES, UNMAPPED, execute, fault, long_cpu, unmap_page};

    /// Where operands begin that go round nothing.
    const PLAIN: u64 = 0x10_0000;
    /// Where the segment begins, but for what makes operands aligned.
    const BASE: u64 = 0x40_8000;
    const FOUR_GIB: u64 = 1 << 32;
    /// In memory before anything is stored, as XRSTOR wants it where XSAVE writes nothing.
    const BEFORE: u8 = 0;

    /// A processor with other memory behind 4 GiB, and values in the registers that instructions store.
    fn filled_cpu() -> Cpu {
        let (mut cpu, _) = long_cpu();
        let table = PAGE_TABLES + 0x3000;
        let put = |gpa: u64, value: u64| cpu.memory.write(gpa, &value.to_le_bytes()).unwrap();
        put(PAGE_TABLES + 0x1000 + 4 * 8, table | 7);
        for page in 0..8 {
            put(table + page * 8, (page ^ 1) << 21 | 0xe7);
        }
        cpu.memory.write(BASE - 0x1000, &[BEFORE; 0x2000]).unwrap();
        let behind = physical(FOUR_GIB + BASE);
        cpu.memory
            .write(behind - 0x1000, &[BEFORE; 0x2000])
            .unwrap();
        cpu.memory.write(PLAIN, &[BEFORE; 0x1000]).unwrap();
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.sys.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        for (index, vector) in cpu.regs.vector.iter_mut().enumerate() {
            vector.0 = std::array::from_fn(|byte| (index * 32 + byte) as u8 | 0x80);
        }
        cpu.regs.x87.0[4] = 0xff;
        for index in 0..8 {
            let value = [1, 2, 3, 4, 5, 6, 7, 0x80 | index as u8, 0x1e, 0x40];
            cpu.regs.x87.set_stack_register(index, value);
        }
        cpu.regs.x87.set_pointers(0x1234_5678, 0x123, Some(0x9abc));
        cpu.regs.gpr[gpr::RAX] = u64::MAX;
        cpu.regs.gpr[gpr::RDX] = u64::MAX;
        cpu
    }

    fn physical(linear: u64) -> u64 {
        (linear - FOUR_GIB) ^ (1 << 21)
    }

    /// Executes an instruction on FS:[EBX] or FS:[EDI].
    fn execute_at(cpu: &mut Cpu, base: u64, offset: u64, code: &[u8]) {
        cpu.sys.segments[sreg::FS].base = base;
        // What the address size leaves out of account.
        let register = offset | 0x1234 << 32;
        cpu.regs.gpr[gpr::RBX] = register;
        cpu.regs.gpr[gpr::RDI] = register;
        execute(cpu, &[&[0x64, 0x67], code].concat()).unwrap();
    }

    fn memory<const N: usize>(cpu: &Cpu, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        cpu.memory.read(gpa, &mut bytes).unwrap();
        bytes
    }

    const FSTP: &[u8] = &[0xdb, 0x3b];
    const FLD: &[u8] = &[0xdb, 0x2b];
    const FBSTP: &[u8] = &[0xdf, 0x33];
    const FBLD: &[u8] = &[0xdf, 0x23];
    const FNSTENV: &[u8] = &[0xd9, 0x33];
    const FLDENV: &[u8] = &[0xd9, 0x23];
    const SHORT_FNSTENV: &[u8] = &[0x66, 0xd9, 0x33];
    const SHORT_FLDENV: &[u8] = &[0x66, 0xd9, 0x23];
    const FNSAVE: &[u8] = &[0xdd, 0x33];
    const FRSTOR: &[u8] = &[0xdd, 0x23];
    const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
    const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
    const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
    const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2b];
    const XSAVEOPT: &[u8] = &[0x0f, 0xae, 0x33];
    const MASKMOVDQU: &[u8] = &[0x66, 0x0f, 0xf7, 0xca];
    const MOVDQU: &[u8] = &[0xf3, 0x0f, 0x7f, 0x0b];

    /// What stores, what loads it again, bytes of the operand, how many of them lie before 4 GiB, and how many are not
    /// at the segment's start.
    type Case = (&'static [u8], &'static [u8], usize, u64, usize);

    /// As a host CPU (family 6, model 167) does it.
    const CASES: [Case; 27] = [
        (FSTP, FLD, 10, 1, 8),
        (FSTP, FLD, 10, 8, 8),
        (FSTP, FLD, 10, 9, 10),
        (FBSTP, FBLD, 10, 3, 8),
        (MASKMOVDQU, &[], 16, 1, 8),
        (MASKMOVDQU, &[], 16, 9, 16),
        (MOVDQU, &[], 16, 1, 16),
        (FNSTENV, FLDENV, 28, 2, 4),
        (FNSTENV, FLDENV, 28, 4, 4),
        (FNSTENV, FLDENV, 28, 27, 28),
        (SHORT_FNSTENV, SHORT_FLDENV, 14, 9, 10),
        (FNSAVE, FRSTOR, 108, 29, 36),
        (FNSAVE, FRSTOR, 108, 37, 38),
        (FNSAVE, FRSTOR, 108, 100, 106),
        (FXSAVE, FXRSTOR, 512, 3, 4),
        (FXSAVE, FXRSTOR, 512, 9, 16),
        (FXSAVE, FXRSTOR, 512, 16, 16),
        (FXSAVE, FXRSTOR, 512, 25, 28),
        (FXSAVE, FXRSTOR, 512, 41, 48),
        (FXSAVE, FXRSTOR, 512, 161, 176),
        (XSAVE, XRSTOR, 832, 64, 64),
        (XSAVE, XRSTOR, 832, 513, 520),
        (XSAVE, XRSTOR, 832, 577, 592),
        (XSAVE, XRSTOR, 832, 817, 832),
        (XSAVEOPT, XRSTOR, 832, 64, 64),
        (XSAVEOPT, XRSTOR, 832, 170, 176),
        (XSAVEOPT, XRSTOR, 832, 768, 768),
    ];

    #[test]
    fn parts_behind_4_gib_lie_at_the_start_of_the_segment() {
        for (store, load, size, before, cut) in CASES {
            let what = format!("{store:02x?}, {before} of {size} bytes before 4 GiB");
            // Given what is stored where nothing goes round.
            let mut cpu = filled_cpu();
            execute_at(&mut cpu, PLAIN, 0, store);
            let expected: [u8; 832] = memory(&cpu, PLAIN);

            // When it is stored over 4 GiB, at an aligned address.
            let mut cpu = filled_cpu();
            let base = BASE + before % 64;
            execute_at(&mut cpu, base, FOUR_GIB - before, store);

            let at: [u8; 832] = memory(&cpu, physical(FOUR_GIB + base) - before);
            let round: [u8; 832] = memory(&cpu, base);
            let rest = size - cut;
            let first = cut - before as usize;
            assert_eq!(at[..cut], expected[..cut], "{what}");
            assert_eq!(round[first..][..rest], expected[cut..size], "{what}");
            assert_eq!(at[cut..], vec![BEFORE; 832 - cut], "{what}");
            assert_eq!(round[..first], vec![BEFORE; first], "{what}");

            // And loaded from there, and stored as before.
            if !load.is_empty() {
                cpu.regs.x87.set_control_word(0x27f);
                cpu.regs.x87.set_pointers(0, 0, Some(0));
                if size > 28 {
                    cpu.regs.x87 = trapgate_thunk::FxsaveImage::new();
                    cpu.regs.vector = Default::default();
                }
                execute_at(&mut cpu, base, FOUR_GIB - before, load);
                execute_at(&mut cpu, PLAIN, 0, store);
                let again: [u8; 832] = memory(&cpu, PLAIN);
                assert!(again == expected, "{load:02x?}, {what}");
            }
        }
    }

    #[test]
    fn selector_of_a_far_pointer_has_an_offset_of_its_own() {
        let mut cpu = filled_cpu();
        let behind = physical(FOUR_GIB + BASE);
        cpu.memory.write(behind - 8, &[0xee; 16]).unwrap();
        // lgs eax, fs:[ebx]
        execute_at(&mut cpu, BASE, FOUR_GIB - 4, &[0x0f, 0xb5, 0x03]);
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0xeeee_eeee);
        assert_eq!(cpu.sys.segments[sreg::GS].selector, 0);
    }

    #[test]
    fn last_byte_is_asked_for_where_its_own_offset_leads() {
        let mut cpu = filled_cpu();
        unmap_page(&mut cpu);
        cpu.sys.segments[sreg::FS].base = UNMAPPED;
        cpu.regs.gpr[gpr::RBX] = FOUR_GIB - 27;
        // fnstenv fs:[ebx], of which no part lies there.
        let raised = fault(&mut cpu, &[0x64, 0x67, 0xd9, 0x33]);
        assert_eq!(raised, (Vector::PF, Some(2)));
        assert_eq!(cpu.exception.address, UNMAPPED);
    }

    #[test]
    fn saving_without_the_x87_leaves_its_bytes_alone() {
        let mut cpu = filled_cpu();
        let entry = PAGE_TABLES + 0x3000 + (BASE >> 21) * 8;
        cpu.memory.write(entry, &[0; 8]).unwrap();
        cpu.regs.gpr[gpr::RAX] = xcr0::SSE;
        // MXCSR is the first that lies at the segment's start; what lies before has no page.
        execute_at(&mut cpu, BASE + 24, FOUR_GIB - 24, XSAVE);
        let mxcsr = u32::from_le_bytes(memory(&cpu, BASE + 24));
        assert_eq!(mxcsr, cpu.regs.mxcsr);
    }
}
