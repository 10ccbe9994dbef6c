//! FXSAVE, XSAVE and their inverses; MXCSR (SDM vol. 1, 10.5 and chapter 13).
//!
//! The register file and the memory image differ only in where things lie, so this is copying.
//! The modified optimisation of XSAVEOPT is not done; the init optimisation is.

use iced_x86::{Instruction, Mnemonic};
use trapgate_thunk::RegisterFile;
use trapgate_x86::registers::{MXCSR_MASK, cr0, cr4, gpr, xcr0};
use trapgate_x86::state::XSAVE_BYTES;
use trapgate_x86::{Exception, XsaveImage};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};
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

    /// The linear address of an operand that must be aligned, or #GP(0).
    fn aligned_operand(
        &mut self,
        op: &Op,
        size: usize,
        alignment: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let linear = self.operand_address(op, size as u64, write)?;
        if !linear.is_multiple_of(alignment) {
            return self.gp0();
        }
        Ok(linear)
    }

    /// Writes some runs of an area: all of them or, on a fault, nothing.
    fn write_runs(&mut self, linear: u64, segment: u8, area: &Area, runs: &Runs) -> Step {
        for (start, end) in runs.iter() {
            let at = self.advance(linear, start as u64);
            self.probe(at, (end - start) as u64, Access::Write, segment)?;
        }
        for (start, end) in runs.iter() {
            let at = self.advance(linear, start as u64);
            self.write_bytes(at, &area[start..end], segment)?;
        }
        Ok(())
    }
}

fn op_fxsave(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_fxsave()?;
    let linear = cpu.aligned_operand(op, LEGACY_BYTES, 16, true)?;
    let count = cpu.vector_count();
    let mut area = [0; XSAVE_BYTES];
    store_x87(&cpu.regs, &mut area, op.code != 0);
    store_mxcsr(&cpu.regs, &mut area);
    store_xmm(&cpu.regs, &mut area, count);
    // What follows the registers is software's, or reserved and not written.
    let mut runs = Runs::default();
    runs.push(0, XMM_AT + 16 * count);
    cpu.write_runs(linear, op.segment, &area, &runs)
}

fn op_fxrstor(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_fxsave()?;
    let linear = cpu.aligned_operand(op, LEGACY_BYTES, 16, false)?;
    let mut area = [0; LEGACY_BYTES];
    cpu.read_bytes(linear, &mut area, op.segment)?;
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
    let linear = cpu.aligned_operand(op, area_bytes(requested), 64, true)?;
    let used = in_use(&cpu.regs);
    let saved = if OPT { requested & used } else { requested };
    let count = cpu.vector_count();

    let header = cpu.advance(linear, HEADER_AT as u64);
    let old: u64 = cpu.read(header, op.segment)?;
    let bits = old & !requested | used & requested;

    let mut area = [0; XSAVE_BYTES];
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
    cpu.write_runs(linear, op.segment, &area, &runs)
}

fn op_xrstor(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_xsave()?;
    let requested = cpu.requested_components();
    let bytes = area_bytes(requested);
    let linear = cpu.aligned_operand(op, bytes, 64, false)?;
    let mut area = [0; XSAVE_BYTES];
    cpu.read_bytes(linear, &mut area[..HEADER_AT + HEADER_BYTES], op.segment)?;
    if state_bits(&area) & requested & xcr0::AVX != 0 {
        let at = cpu.advance(linear, YMM_AT as u64);
        cpu.read_bytes(at, &mut area[YMM_AT..], op.segment)?;
    }
    if !is_restorable(&area, cpu.sys.xcr0, requested) {
        return cpu.gp0();
    }
    let count = cpu.vector_count();
    restore(&mut cpu.regs, &area, requested, op.code != 0, count);
    Ok(())
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
        if !vex {
            return self.check_sse();
        }
        let enabled = xcr0::SSE | xcr0::AVX;
        if !self.is_protected()
            || self.is_vm86()
            || self.sys.cr4 & cr4::OSXSAVE == 0
            || self.sys.xcr0 & enabled != enabled
        {
            return self.ud();
        }
        if self.sys.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
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
mod tests {
    use trapgate_x86::Vector;

    use super::*;
    use crate::testing::{GP0, UD, execute, fault, long_cpu, protected_cpu};

    /// Instructions on `[RBX]`, without REX.W.
    const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
    const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
    const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x13];
    const STMXCSR: &[u8] = &[0x0f, 0xae, 0x1b];
    const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
    const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2b];
    const XSAVEOPT: &[u8] = &[0x0f, 0xae, 0x33];
    const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
    const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
    const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
    const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
    const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];

    const AT: u64 = 0x8000;
    const NM: (Vector, Option<u32>) = (Vector::NM, None);

    #[derive(Clone)]
    #[repr(align(64))]
    struct Aligned(Area);

    /// A 64-bit processor with everything enabled, RBX at [`AT`], EDX:EAX all ones.
    fn enabled_cpu() -> Cpu {
        let (mut cpu, _) = long_cpu();
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.sys.xcr0 = 7;
        cpu.regs.gpr[gpr::RAX] = u64::MAX;
        cpu.regs.gpr[gpr::RDX] = u64::MAX;
        cpu.regs.gpr[gpr::RBX] = AT;
        cpu
    }

    /// Registers in which every bit that can be set is somewhere.
    fn fill(regs: &mut RegisterFile) {
        regs.x87.set_control_word(0x0240);
        regs.x87.set_status_word(0xb982);
        regs.x87.0[4] = 0xa5;
        let instruction = 0x0000_7123_89ab_cdef;
        regs.x87
            .set_pointers(instruction, 0x5a5, Some(0x0000_7fed_cba9_8765));
        for index in 0..8 {
            regs.x87
                .set_stack_register(index, [0x11 * (index as u8 + 1); 10]);
        }
        for (index, vector) in regs.vector.iter_mut().enumerate() {
            vector.0 = std::array::from_fn(|byte| (index * 32 + byte) as u8 | 0x80);
        }
        regs.mxcsr = 0xffc0;
    }

    fn memory(cpu: &Cpu) -> Area {
        let mut area = [0; XSAVE_BYTES];
        cpu.memory.read(AT, &mut area).unwrap();
        area
    }

    fn put(cpu: &Cpu, area: &Area) {
        cpu.memory.write(AT, area).unwrap();
    }

    /// Lets the host load an image and save it again, in one of its own areas.
    #[allow(unsafe_code)]
    fn through_host(image: &Area, out: &mut Aligned, components: u32) {
        let image = Aligned(*image);
        let mut saved = Box::new([0u8; 16384]);
        let offset = saved.as_ptr().align_offset(64);
        // SAFETY: the instructions access areas of the sizes that `components`, and for FXSAVE the
        // instruction itself, ask for; the host's own state is what it was at the end.
        unsafe {
            let own = saved.as_mut_ptr().add(offset);
            if components == 0 {
                std::arch::asm!(
                    "fxsave64 [{own}]", "fxrstor64 [{image}]", "fxsave64 [{out}]",
                    "fxrstor64 [{own}]",
                    own = in(reg) own, image = in(reg) image.0.as_ptr(),
                    out = in(reg) out.0.as_mut_ptr());
            } else {
                std::arch::asm!(
                    "xsave64 [{own}]", "xrstor64 [{image}]", "xsave64 [{out}]",
                    "xrstor64 [{own}]",
                    own = in(reg) own, image = in(reg) image.0.as_ptr(),
                    out = in(reg) out.0.as_mut_ptr(), in("eax") components, in("edx") 0);
            }
        }
    }

    #[test]
    fn fxsave_writes_what_the_host_does() {
        let mut cpu = enabled_cpu();
        fill(&mut cpu.regs);
        let background = [0xcc; XSAVE_BYTES];
        put(&cpu, &background);
        execute(&mut cpu, FXSAVE64).unwrap();
        let ours = memory(&cpu);
        let mut host = Aligned(background);
        through_host(&ours, &mut host, 0);
        assert_eq!(ours[..416], host.0[..416]);
        assert_eq!(ours[416..], background[416..], "not the processor's");
    }

    #[test]
    fn xsave_writes_what_the_host_does() {
        if !std::arch::is_x86_feature_detected!("avx") {
            println!("skipped: the host has no AVX");
            return;
        }
        let mut cpu = enabled_cpu();
        fill(&mut cpu.regs);
        execute(&mut cpu, XSAVE64).unwrap();
        let ours = memory(&cpu);
        assert_eq!(state_bits(&ours), 7);
        let mut host = Aligned([0; XSAVE_BYTES]);
        through_host(&ours, &mut host, 7);
        assert_eq!(ours, host.0);
        // The host agrees on what components in their initial configuration are.
        for component in [xcr0::X87, xcr0::SSE, xcr0::AVX] {
            let mut lacking = ours;
            lacking[HEADER_AT] = 7 & !(component as u8);
            put(&cpu, &lacking);
            execute(&mut cpu, XRSTOR64).unwrap();
            execute(&mut cpu, XSAVE64).unwrap();
            let ours = memory(&cpu);
            through_host(&lacking, &mut host, 7);
            assert_eq!(ours[..HEADER_AT], host.0[..HEADER_AT], "{component}");
            assert_eq!(ours[YMM_AT..], host.0[YMM_AT..], "{component}");
            assert_eq!(state_bits(&ours), 7 & !component);
        }
    }

    #[test]
    fn registers_come_back_from_memory() {
        let instructions = [
            (FXSAVE64, FXRSTOR64),
            (XSAVE64, XRSTOR64),
            (XSAVEOPT64, XRSTOR64),
        ];
        for (save, restore) in instructions {
            let mut cpu = enabled_cpu();
            fill(&mut cpu.regs);
            let before = cpu.regs.clone();
            execute(&mut cpu, save).unwrap();
            let uppers = save != FXSAVE64;
            let (gpr, vector) = (cpu.regs.gpr, before.vector);
            cpu.regs = RegisterFile::new();
            cpu.regs.gpr = gpr;
            execute(&mut cpu, restore).unwrap();
            let bytes = if uppers { 32 } else { 16 };
            for (got, expected) in cpu.regs.vector.iter().zip(vector) {
                assert_eq!(got.0[..bytes], expected.0[..bytes]);
            }
            assert_eq!(cpu.regs.mxcsr, before.mxcsr);
            assert_eq!(cpu.regs.x87.0[..24], before.x87.0[..24]);
            for index in 0..8 {
                let expected = before.x87.stack_register(index);
                assert_eq!(cpu.regs.x87.stack_register(index), expected);
            }
        }
    }

    #[test]
    fn narrow_forms_keep_half_the_pointers() {
        for (save, restore) in [(FXSAVE, FXRSTOR), (XSAVE, XRSTOR)] {
            let mut cpu = enabled_cpu();
            fill(&mut cpu.regs);
            execute(&mut cpu, save).unwrap();
            let area = memory(&cpu);
            assert_eq!(area[8..16], [0xef, 0xcd, 0xab, 0x89, 0, 0, 0, 0]);
            assert_eq!(area[16..24], [0x65, 0x87, 0xa9, 0xcb, 0, 0, 0, 0]);
            execute(&mut cpu, restore).unwrap();
            assert_eq!(cpu.regs.x87.instruction_pointer(), 0x89ab_cdef);
            assert_eq!(cpu.regs.x87.data_pointer(), 0xcba9_8765);
        }
    }

    #[test]
    fn eight_registers_are_reached_outside_64bit_mode() {
        for (save, restore) in [(FXSAVE, FXRSTOR), (XSAVE, XRSTOR)] {
            let (mut cpu, _) = protected_cpu();
            cpu.sys.cr4 = cr4::OSFXSR | cr4::OSXSAVE;
            cpu.sys.xcr0 = 7;
            cpu.regs.gpr[gpr::RAX] = 7;
            cpu.regs.gpr[gpr::RBX] = AT;
            put(&cpu, &[0; XSAVE_BYTES]);
            fill(&mut cpu.regs);
            execute(&mut cpu, save).unwrap();
            let area = memory(&cpu);
            assert_eq!(area[160..176], cpu.regs.vector[0].0[..16]);
            assert_eq!(area[272..288], cpu.regs.vector[7].0[..16]);
            assert_eq!(area[288..416], [0; 128]);
            assert_eq!(area[704..], [0; 128]);
            let before = cpu.regs.vector;
            put(&cpu, &XsaveImage::default().0);
            execute(&mut cpu, restore).unwrap();
            assert_eq!(cpu.regs.vector[7].0[..16], [0; 16]);
            assert_eq!(cpu.regs.vector[8], before[8]);
        }
    }

    #[test]
    fn xsave_writes_only_what_is_requested() {
        let mut cpu = enabled_cpu();
        fill(&mut cpu.regs);
        let mut background = [0xcc; XSAVE_BYTES];
        background[512..520].copy_from_slice(&0x8000_0000_0000_0007u64.to_le_bytes());
        // Requested, and the bytes written besides XSTATE_BV.
        let cases: [(u64, &[std::ops::Range<usize>]); 4] = [
            (0, &[]),
            (1, &[0..24, 32..160]),
            (2, &[24..32, 160..416]),
            (4, &[24..32, 576..832]),
        ];
        for (requested, ranges) in cases {
            cpu.regs.gpr[gpr::RAX] = requested;
            cpu.regs.gpr[gpr::RDX] = 0;
            for instruction in [XSAVE64, XSAVEOPT64] {
                put(&cpu, &background);
                execute(&mut cpu, instruction).unwrap();
                let area = memory(&cpu);
                for (at, &byte) in area.iter().enumerate() {
                    let written = ranges.iter().any(|range| range.contains(&at));
                    assert!(written || byte == background[at], "{requested}: byte {at}");
                }
                for range in ranges {
                    assert_ne!(area[range.clone()], background[range.clone()]);
                }
                let bits = state_bits(&area);
                assert_eq!(bits, 0x8000_0000_0000_0007, "other bits stay");
            }
        }
    }

    #[test]
    fn xsaveopt_leaves_initial_components_out() {
        let mut cpu = enabled_cpu();
        cpu.regs.mxcsr = 0x9f80;
        cpu.regs.vector[3].0[20] = 1;
        let mut background = [0xcc; XSAVE_BYTES];
        background[HEADER_AT] = 0;
        put(&cpu, &background);
        execute(&mut cpu, XSAVEOPT64).unwrap();
        let area = memory(&cpu);
        assert_eq!(area[..24], background[..24]);
        assert_eq!(mxcsr_of(&area), 0x9f80);
        assert_eq!(area[32..512], background[32..512]);
        assert_eq!(area[512], 4);
        assert_eq!(area[576 + 3 * 16 + 4], 1);
        put(&cpu, &background);
        execute(&mut cpu, XSAVE64).unwrap();
        let area = memory(&cpu);
        assert_eq!(area[..2], [0x7f, 0x03], "XSAVE writes them");
        assert_eq!(area[512], 4);
    }

    #[test]
    fn restoring_checks_before_it_changes_anything() {
        type Change = fn(&mut Area);
        let cases: [(&str, &[u8], Change); 7] = [
            ("component not enabled", XRSTOR, |area| area[512] |= 0x80),
            ("compacted", XRSTOR, |area| area[527] = 0x80),
            ("reserved in header", XRSTOR, |area| area[528] = 1),
            ("reserved in header", XRSTOR, |area| area[535] = 1),
            ("MXCSR", XRSTOR, |area| area[26] = 1),
            ("MXCSR, absent", XRSTOR, |area| {
                area[512] = 1;
                area[27] = 1;
            }),
            ("MXCSR", FXRSTOR, |area| area[26] = 1),
        ];
        for (what, instruction, change) in cases {
            let mut cpu = enabled_cpu();
            let mut area = *image(&RegisterFile::new()).0;
            change(&mut area);
            put(&cpu, &area);
            fill(&mut cpu.regs);
            let before = cpu.export();
            assert_eq!(fault(&mut cpu, instruction), GP0, "{what}");
            assert!(cpu.export() == before, "{what}");
        }
        // The rest of the header is not looked at.
        let mut cpu = enabled_cpu();
        let mut area = *XsaveImage::default().0;
        area[536..576].fill(0xff);
        put(&cpu, &area);
        execute(&mut cpu, XRSTOR).unwrap();
    }

    #[test]
    fn mxcsr_is_restored_with_either_of_its_components() {
        for (requested, restored) in [(1, false), (2, true), (4, true)] {
            let mut cpu = enabled_cpu();
            cpu.regs.gpr[gpr::RAX] = requested;
            cpu.regs.gpr[gpr::RDX] = 0;
            let mut area = *XsaveImage::default().0;
            area[24..28].copy_from_slice(&0x3f80u32.to_le_bytes());
            put(&cpu, &area);
            execute(&mut cpu, XRSTOR).unwrap();
            let expected = if restored { 0x3f80 } else { 0x1f80 };
            assert_eq!(cpu.regs.mxcsr, expected, "{requested}");
        }
    }

    #[test]
    fn pending_exceptions_show_in_the_status_word() {
        let mut cpu = enabled_cpu();
        // Invalid operation, flagged while masked, then unmasked by FLDCW.
        cpu.regs.x87.set_status_word(1);
        cpu.regs.x87.set_control_word(0x37e);
        execute(&mut cpu, FXSAVE).unwrap();
        assert_eq!(memory(&cpu)[2..4], [0x81, 0x80]);
    }

    #[test]
    fn operands_must_be_aligned() {
        for (instruction, offset) in [
            (FXSAVE, 8),
            (FXRSTOR, 8),
            (XSAVE, 32),
            (XRSTOR, 32),
            (XSAVEOPT, 32),
        ] {
            let mut cpu = enabled_cpu();
            cpu.regs.gpr[gpr::RBX] = AT + offset;
            assert_eq!(fault(&mut cpu, instruction), GP0, "{instruction:02x?}");
        }
    }

    #[test]
    fn control_registers_forbid_or_defer() {
        for instruction in [FXSAVE, FXRSTOR, XSAVE, XRSTOR, LDMXCSR, STMXCSR] {
            let mut cpu = enabled_cpu();
            cpu.sys.cr0 |= cr0::TS;
            assert_eq!(fault(&mut cpu, instruction), NM, "{instruction:02x?}");
        }
        for (instruction, vector) in [(FXSAVE, NM), (FXRSTOR, NM), (LDMXCSR, UD)] {
            let mut cpu = enabled_cpu();
            cpu.sys.cr0 |= cr0::EM;
            assert_eq!(fault(&mut cpu, instruction), vector, "{instruction:02x?}");
        }
        for instruction in [XSAVE, XRSTOR, XSAVEOPT, &[0xc5, 0xf8, 0xae, 0x13]] {
            let mut cpu = enabled_cpu();
            cpu.sys.cr4 &= !cr4::OSXSAVE;
            assert_eq!(fault(&mut cpu, instruction), UD, "{instruction:02x?}");
        }
        let mut cpu = enabled_cpu();
        cpu.sys.cr4 &= !cr4::OSFXSR;
        assert_eq!(fault(&mut cpu, STMXCSR), UD);
    }

    #[test]
    fn save_across_a_missing_page_writes_nothing() {
        let mut cpu = enabled_cpu();
        // The last page of the mapped GiB leads to memory; nothing is mapped after it.
        let entry = (0x20_0000u64 | 0xe7).to_le_bytes();
        let last = crate::testing::PAGE_TABLES + 0x2000 + 511 * 8;
        cpu.memory.write(last, &entry).unwrap();
        cpu.memory.write(0x40_0000 - 576, &[0xcc; 576]).unwrap();
        fill(&mut cpu.regs);
        cpu.regs.gpr[gpr::RBX] = (1 << 30) - 576;
        let (vector, code) = fault(&mut cpu, XSAVE64);
        assert_eq!((vector, code), (Vector::PF, Some(2)));
        assert_eq!(cpu.exception.address, 1 << 30);
        let mut kept = [0; 576];
        cpu.memory.read(0x40_0000 - 576, &mut kept).unwrap();
        assert_eq!(kept, [0xcc; 576]);
    }

    #[test]
    fn mxcsr_moves_to_and_from_memory() {
        let cases: [(&[u8], &[u8]); 2] = [
            (LDMXCSR, STMXCSR),
            (&[0xc5, 0xf8, 0xae, 0x13], &[0xc5, 0xf8, 0xae, 0x1b]),
        ];
        for (load, store) in cases {
            let mut cpu = enabled_cpu();
            cpu.memory.write(AT, &0x7f80u32.to_le_bytes()).unwrap();
            execute(&mut cpu, load).unwrap();
            assert_eq!(cpu.regs.mxcsr, 0x7f80);
            cpu.regs.mxcsr = 0x1fa0;
            execute(&mut cpu, store).unwrap();
            let mut stored = [0; 4];
            cpu.memory.read(AT, &mut stored).unwrap();
            assert_eq!(u32::from_le_bytes(stored), 0x1fa0);
            cpu.memory.write(AT, &0x1_0000u32.to_le_bytes()).unwrap();
            assert_eq!(fault(&mut cpu, load), GP0);
            assert_eq!(cpu.regs.mxcsr, 0x1fa0);
        }
    }
}
