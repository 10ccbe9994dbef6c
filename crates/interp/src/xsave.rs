//! FXSAVE, XSAVE and their inverses; MXCSR (SDM vol. 1, 10.5 and chapter 13).
//!
//! The register file and the memory image differ only in where things lie, so this is copying.
//! The modified optimisation of XSAVEOPT is not done; the init optimisation is.

use std::ops::Range;

use iced_x86::{Instruction, Mnemonic};
use trapgate_thunk::RegisterFile;
use trapgate_x86::registers::{MXCSR_MASK, cr0, cr4, gpr, xcr0};
use trapgate_x86::state::XSAVE_BYTES;
use trapgate_x86::{Exception, XsaveImage};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};
use crate::parts::{Extent, Parts};
use crate::tlb::Access;

/// Bytes that FXSAVE names.
const LEGACY_BYTES: usize = 512;
/// Where MXCSR and its mask lie.
const MXCSR_AT: usize = 24;
/// Where the x87 registers lie, 16 bytes each.
const X87_AT: usize = 32;
/// Where the XMM registers lie, 16 bytes each.
const XMM_AT: usize = 160;
/// Where XSTATE_BV lies; XCOMP_BV and reserved bytes follow.
const HEADER_AT: usize = 512;
/// Bytes of the XSAVE header.
const HEADER_BYTES: usize = 64;
/// Where the upper halves of the YMM registers lie.
const YMM_AT: usize = 576;

/// A memory image in standard format.
pub(crate) type Area = [u8; XSAVE_BYTES];

/// The handler of an instruction that this module owns. `op.code` is 1 for the forms with REX.W,
/// whose x87 pointers have 64 bits.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let (wide, handler): (bool, Handler) = match instruction.mnemonic() {
        Mnemonic::Fxsave => (false, op_fxsave),
        Mnemonic::Fxsave64 => (true, op_fxsave),
        Mnemonic::Fxrstor => (false, op_fxrstor),
        Mnemonic::Fxrstor64 => (true, op_fxrstor),
        Mnemonic::Xsave => (false, op_xsave::<false>),
        Mnemonic::Xsave64 => (true, op_xsave::<false>),
        Mnemonic::Xsaveopt => (false, op_xsave::<true>),
        Mnemonic::Xsaveopt64 => (true, op_xsave::<true>),
        Mnemonic::Xrstor => (false, op_xrstor),
        Mnemonic::Xrstor64 => (true, op_xrstor),
        Mnemonic::Ldmxcsr => (false, op_ldmxcsr::<false>),
        Mnemonic::Stmxcsr => (false, op_stmxcsr::<false>),
        Mnemonic::Vldmxcsr => (false, op_ldmxcsr::<true>),
        Mnemonic::Vstmxcsr => (false, op_stmxcsr::<true>),
        // Not in the profiles.
        Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xsaves
        | Mnemonic::Xsaves64
        | Mnemonic::Xrstors
        | Mnemonic::Xrstors64 => (false, crate::control::op_undefined),
        _ => return None,
    };
    op.code = u8::from(wide);
    Some(handler)
}

/// State components that are not in their initial configuration (XINUSE; SDM vol. 1, 13.6).
pub(crate) fn in_use(regs: &RegisterFile) -> u64 {
    let mut components = 0;
    let x87 = &regs.x87;
    let x87_initial = x87.control_word() == 0x37f
        && x87.0[2..24].iter().all(|&byte| byte == 0)
        && (0..8).all(|index| x87.stack_register(index) == [0; 10]);
    if !x87_initial {
        components |= xcr0::X87;
    }
    if regs.vector.iter().any(|vector| vector.0[..16] != [0; 16]) {
        components |= xcr0::SSE;
    }
    if regs.vector.iter().any(|vector| vector.0[16..] != [0; 16]) {
        components |= xcr0::AVX;
    }
    components
}

/// Writes the x87 component. Only 64-bit forms keep the upper halves of the pointers; FCS and FDS
/// are deprecated and read as zero.
fn store_x87(regs: &RegisterFile, area: &mut [u8], wide: bool) {
    let x87 = &regs.x87;
    area[..MXCSR_AT].fill(0);
    area[0..2].copy_from_slice(&x87.control_word().to_le_bytes());
    // ES and B follow from the flags and masks, of which FLDCW may have changed the latter.
    let summary = if x87.exception_pending() { 0x8080 } else { 0 };
    let status = x87.status_word() & !0x8080 | summary;
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[4] = x87.tags();
    area[6..8].copy_from_slice(&x87.opcode().to_le_bytes());
    let pointers = [x87.instruction_pointer(), x87.data_pointer()];
    for (pointer, at) in pointers.into_iter().zip([8, 16]) {
        let kept = if wide { pointer } else { pointer & 0xffff_ffff };
        area[at..at + 8].copy_from_slice(&kept.to_le_bytes());
    }
    for index in 0..8 {
        let at = X87_AT + 16 * index;
        area[at..at + 10].copy_from_slice(&x87.stack_register(index));
        area[at + 10..at + 16].fill(0);
    }
}

fn load_x87(regs: &mut RegisterFile, area: &[u8], wide: bool) {
    let word = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let pointer = |at: usize| {
        let mut bytes = [0; 8];
        let length = if wide { 8 } else { 4 };
        bytes[..length].copy_from_slice(&area[at..at + length]);
        u64::from_le_bytes(bytes)
    };
    let x87 = &mut regs.x87;
    x87.set_control_word(word(0));
    x87.set_status_word(word(2));
    x87.0[4] = area[4];
    x87.0[5] = 0;
    x87.set_pointers(pointer(8), word(6), Some(pointer(16)));
    for index in 0..8 {
        let mut value = [0; 10];
        value.copy_from_slice(&area[X87_AT + 16 * index..][..10]);
        x87.set_stack_register(index, value);
    }
    // The summary bits follow from flags and masks, whatever the image says.
    let summary = if x87.exception_pending() { 0x8080 } else { 0 };
    x87.set_status_word(x87.status_word() & !0x8080 | summary);
}

fn store_mxcsr(regs: &RegisterFile, area: &mut [u8]) {
    area[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&regs.mxcsr.to_le_bytes());
    area[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

fn mxcsr_of(area: &[u8]) -> u32 {
    let at = MXCSR_AT;
    u32::from_le_bytes([area[at], area[at + 1], area[at + 2], area[at + 3]])
}

/// Writes the XMM registers; `count` is 8 outside 64-bit mode.
fn store_xmm(regs: &RegisterFile, area: &mut [u8], count: usize) {
    for index in 0..count {
        area[XMM_AT + 16 * index..][..16].copy_from_slice(&regs.vector[index].0[..16]);
    }
}

fn load_xmm(regs: &mut RegisterFile, area: &[u8], count: usize) {
    for index in 0..count {
        regs.vector[index].0[..16].copy_from_slice(&area[XMM_AT + 16 * index..][..16]);
    }
}

fn store_ymm(regs: &RegisterFile, area: &mut [u8], count: usize) {
    for index in 0..count {
        area[YMM_AT + 16 * index..][..16].copy_from_slice(&regs.vector[index].0[16..]);
    }
}

fn load_ymm(regs: &mut RegisterFile, area: &[u8], count: usize) {
    for index in 0..count {
        regs.vector[index].0[16..].copy_from_slice(&area[YMM_AT + 16 * index..][..16]);
    }
}

/// Replaces components by their initial configuration.
fn initialise(regs: &mut RegisterFile, components: u64, count: usize) {
    if components & xcr0::X87 != 0 {
        regs.x87 = trapgate_thunk::FxsaveImage::new();
    }
    for vector in &mut regs.vector[..count] {
        if components & xcr0::SSE != 0 {
            vector.0[..16].fill(0);
        }
        if components & xcr0::AVX != 0 {
            vector.0[16..].fill(0);
        }
    }
}

fn state_bits(area: &Area) -> u64 {
    let mut bits = [0; 8];
    bits.copy_from_slice(&area[HEADER_AT..HEADER_AT + 8]);
    u64::from_le_bytes(bits)
}

/// Where XRSTOR finds `components`, which are those that XCR0 enables, to be out of order: its
/// checks of the header (13.8) and of MXCSR.
fn is_restorable(area: &Area, enabled: u64, requested: u64) -> bool {
    let header = &area[HEADER_AT + 8..HEADER_AT + 24];
    let mxcsr = requested & (xcr0::SSE | xcr0::AVX) != 0;
    state_bits(area) & !enabled == 0
        && header.iter().all(|&byte| byte == 0)
        && (!mxcsr || mxcsr_of(area) & !MXCSR_MASK == 0)
}

/// XRSTOR's effect, after its checks.
fn restore(regs: &mut RegisterFile, area: &Area, requested: u64, wide: bool, count: usize) {
    let present = state_bits(area) & requested;
    initialise(regs, requested & !present, count);
    if present & xcr0::X87 != 0 {
        load_x87(regs, area, wide);
    }
    // Of the standard format, MXCSR is loaded with either of its components, present or not.
    if requested & (xcr0::SSE | xcr0::AVX) != 0 {
        regs.mxcsr = mxcsr_of(area);
    }
    if present & xcr0::SSE != 0 {
        load_xmm(regs, area, count);
    }
    if present & xcr0::AVX != 0 {
        load_ymm(regs, area, count);
    }
}

/// Everything in the register file, as XSAVE64 would write it with all components enabled.
pub(crate) fn image(regs: &RegisterFile) -> XsaveImage {
    let mut image = XsaveImage::default();
    let area = &mut image.0[..];
    store_x87(regs, area, true);
    store_mxcsr(regs, area);
    store_xmm(regs, area, 16);
    store_ymm(regs, area, 16);
    area[HEADER_AT..HEADER_AT + 8].copy_from_slice(&in_use(regs).to_le_bytes());
    image
}

/// XSTATE_BV of an image.
pub(crate) fn header_bits(image: &XsaveImage) -> u64 {
    state_bits(&image.0)
}

/// Whether an image holds nothing but components in `enabled`, with valid values.
pub(crate) fn is_valid_image(image: &XsaveImage, enabled: u64) -> bool {
    is_restorable(&image.0, enabled, enabled | xcr0::SSE)
}

/// The inverse of [`image`]: components that the image doesn't hold take their initial
/// configuration, as with XRSTOR64.
pub(crate) fn set_image(regs: &mut RegisterFile, image: &XsaveImage) {
    let all = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    restore(regs, &image.0, all, true, 16);
}

/// A few runs of bytes in an area, ascending; adjacent ones are joined.
#[derive(Default)]
struct Runs {
    runs: [(usize, usize); 5],
    count: usize,
}

impl Runs {
    fn push(&mut self, start: usize, end: usize) {
        if self.count > 0 && self.runs[self.count - 1].1 == start {
            self.runs[self.count - 1].1 = end;
        } else {
            self.runs[self.count] = (start, end);
            self.count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, usize)> {
        self.runs.into_iter().take(self.count)
    }
}

impl Cpu {
    /// XMM and YMM registers that save and restore reach.
    fn vector_count(&self) -> usize {
        if self.is_64bit() { 16 } else { 8 }
    }

    /// #NM for FXSAVE and FXRSTOR.
    fn check_fxsave(&mut self) -> Step {
        if self.sys.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
    }

    /// #UD or #NM for the XSAVE instructions.
    fn check_xsave(&mut self) -> Step {
        if self.sys.cr4 & cr4::OSXSAVE == 0 {
            return self.ud();
        }
        if self.sys.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
    }

    /// The components that EDX:EAX requests and XCR0 enables.
    fn requested_components(&self) -> u64 {
        let [rax, rdx] = [gpr::RAX, gpr::RDX].map(|index| self.regs.gpr[index]);
        self.sys.xcr0 & (rdx << 32 | rax & 0xffff_ffff)
    }

    /// Where an area lies that must be aligned, or #GP(0).
    fn aligned_area(
        &mut self,
        op: &Op,
        size: usize,
        alignment: u64,
        access: Access,
    ) -> Result<Extent, Stop> {
        let linear = self.operand_address(op, size as u64, access == Access::Write)?;
        if !linear.is_multiple_of(alignment) {
            return self.gp0();
        }
        self.extent(op, linear, size, Parts::Area, access)
    }

    /// Faults if some bytes of an area cannot be written.
    fn probe_area(&mut self, area: &Extent, segment: u8, bytes: Range<usize>) -> Step {
        self.each_run(area, bytes, |cpu, at, run| {
            cpu.probe(at, run.len() as u64, Access::Write, segment)
        })
    }

    /// Reads some bytes of an area to the same place in `data`.
    fn read_area(
        &mut self,
        area: &Extent,
        segment: u8,
        bytes: Range<usize>,
        data: &mut [u8],
    ) -> Step {
        self.each_run(area, bytes, |cpu, at, run| {
            cpu.read_bytes(at, &mut data[run], segment)
        })
    }

    /// Writes some runs of an area: all of them or, on a fault, nothing.
    fn write_runs(&mut self, area: &Extent, segment: u8, data: &Area, runs: &Runs) -> Step {
        for (start, end) in runs.iter() {
            self.probe_area(area, segment, start..end)?;
        }
        for (start, end) in runs.iter() {
            self.each_run(area, start..end, |cpu, at, run| {
                cpu.write_bytes(at, &data[run], segment)
            })?;
        }
        Ok(())
    }
}

fn op_fxsave(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_fxsave()?;
    let place = cpu.aligned_area(op, LEGACY_BYTES, 16, Access::Write)?;
    let count = cpu.vector_count();
    let mut area = [0; XSAVE_BYTES];
    store_x87(&cpu.regs, &mut area, op.code != 0);
    store_mxcsr(&cpu.regs, &mut area);
    store_xmm(&cpu.regs, &mut area, count);
    // What follows the registers is software's, or reserved and not written: but it must be there.
    cpu.probe_area(&place, op.segment, 0..LEGACY_BYTES)?;
    let mut runs = Runs::default();
    runs.push(0, XMM_AT + 16 * count);
    cpu.write_runs(&place, op.segment, &area, &runs)
}

fn op_fxrstor(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_fxsave()?;
    let place = cpu.aligned_area(op, LEGACY_BYTES, 16, Access::Read)?;
    let mut area = [0; LEGACY_BYTES];
    cpu.read_area(&place, op.segment, 0..LEGACY_BYTES, &mut area)?;
    let mxcsr = mxcsr_of(&area);
    if mxcsr & !MXCSR_MASK != 0 {
        return cpu.gp0();
    }
    let count = cpu.vector_count();
    load_x87(&mut cpu.regs, &area, op.code != 0);
    cpu.regs.mxcsr = mxcsr;
    load_xmm(&mut cpu.regs, &area, count);
    Ok(())
}

/// XSAVE, or with `OPT` XSAVEOPT (SDM vol. 1, 13.7 and 13.9).
fn op_xsave<const OPT: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_xsave()?;
    let requested = cpu.requested_components();
    let place = cpu.aligned_area(op, area_bytes(requested), 64, Access::Write)?;
    let used = in_use(&cpu.regs);
    let saved = if OPT { requested & used } else { requested };
    let count = cpu.vector_count();

    // The host CPU wants to write all of it, also what it leaves as it is.
    cpu.probe_area(&place, op.segment, accessed(requested))?;
    let mut area = [0; XSAVE_BYTES];
    cpu.read_area(&place, op.segment, HEADER_AT..HEADER_AT + 8, &mut area)?;
    let bits = state_bits(&area) & !requested | used & requested;

    let mut runs = Runs::default();
    if saved & xcr0::X87 != 0 {
        store_x87(&cpu.regs, &mut area, op.code != 0);
        runs.push(0, MXCSR_AT);
    }
    if requested & (xcr0::SSE | xcr0::AVX) != 0 {
        store_mxcsr(&cpu.regs, &mut area);
        runs.push(MXCSR_AT, X87_AT);
    }
    if saved & xcr0::X87 != 0 {
        runs.push(X87_AT, XMM_AT);
    }
    if saved & xcr0::SSE != 0 {
        store_xmm(&cpu.regs, &mut area, count);
        runs.push(XMM_AT, XMM_AT + 16 * count);
    }
    area[HEADER_AT..HEADER_AT + 8].copy_from_slice(&bits.to_le_bytes());
    runs.push(HEADER_AT, HEADER_AT + 8);
    if saved & xcr0::AVX != 0 {
        store_ymm(&cpu.regs, &mut area, count);
        runs.push(YMM_AT, YMM_AT + 16 * count);
    }
    cpu.write_runs(&place, op.segment, &area, &runs)
}

fn op_xrstor(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_xsave()?;
    let requested = cpu.requested_components();
    let bytes = area_bytes(requested);
    let place = cpu.aligned_area(op, bytes, 64, Access::Read)?;
    let mut area = [0; XSAVE_BYTES];
    // What XSTATE_BV says is not there is read as well, by the host CPU.
    cpu.read_area(&place, op.segment, accessed(requested), &mut area)?;
    if !is_restorable(&area, cpu.sys.xcr0, requested) {
        return cpu.gp0();
    }
    let count = cpu.vector_count();
    restore(&mut cpu.regs, &area, requested, op.code != 0, count);
    Ok(())
}

/// Where an area is accessed for these components: without the x87 from MXCSR on, with none only in its header.
fn accessed(components: u64) -> Range<usize> {
    let start = match components {
        0 => HEADER_AT,
        components if components & xcr0::X87 == 0 => MXCSR_AT,
        _ => 0,
    };
    start..area_bytes(components)
}

/// Bytes of an area with these components.
fn area_bytes(components: u64) -> usize {
    if components & xcr0::AVX != 0 {
        XSAVE_BYTES
    } else {
        HEADER_AT + HEADER_BYTES
    }
}

impl Cpu {
    /// The checks before (V)LDMXCSR and (V)STMXCSR.
    fn check_mxcsr(&mut self, vex: bool) -> Step {
        if vex {
            self.check_avx()
        } else {
            self.check_sse()
        }
    }
}

fn op_ldmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_mxcsr(VEX)?;
    let value: u32 = cpu.load(op)?;
    if value & !MXCSR_MASK != 0 {
        return cpu.gp0();
    }
    cpu.regs.mxcsr = value;
    Ok(())
}

fn op_stmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_mxcsr(VEX)?;
    cpu.store(op, cpu.regs.mxcsr)
}

#[cfg(test)]
mod tests;
