//! #MF and #XM: each of the six causes, alone and masked, and who notices.

use core::arch::asm;

use runtime::interrupts::catch;
use runtime::report::{self, Body};
use runtime::{bodies, cpu, print};

use crate::refusals::{emms, fld1, fnstsw, fwait, fxsave};

const OSXMMEXCPT: u64 = 1 << 10;

bodies! {
    // The control word, and an empty stack.
    load_control: ["fninit", "push rdi"] "fldcw [rsp]\npop rax";
    x87_underflow_of_stack: ["fchs"] "fwait";
    x87_overflow_of_stack: ["fldz", "fldz", "fldz", "fldz", "fldz", "fldz", "fldz", "fldz", "fldz"] "fwait";
    x87_invalid: ["fldz", "fldz", "fdivp"] "fwait";
    x87_denormal: ["push 1", "fld dword ptr [rsp]", "pop rax"] "fwait";
    x87_zero_divide: ["fld1", "fldz", "fdivp"] "fwait";
    x87_overflow: ["push 0x4000", "fild dword ptr [rsp]", "pop rax", "fld1", "fscale"] "fwait";
    x87_underflow: ["push -0x5000", "fild dword ptr [rsp]", "pop rax", "fld1", "fscale"] "fwait";
    x87_inexact: ["push 3", "fld1", "fidiv dword ptr [rsp]", "pop rax"] "fwait";

    divide: ["fld1", "fldz"] "fdivp";
    mmx: [] "movd mm0, eax";
    sse: [] "addps xmm0, xmm0";
    sse_of_mmx: [] "cvtpi2ps xmm0, mm0";
    fnstcw: [] "fnstcw [rsp - 8]";
    fnclex: [] "fnclex";
    fninit: [] "fninit";
    fnsave: [] "fnsave [rsp - 256]";
    fldcw: [] "fldcw [rsp - 8]";
    // The flag is there when its mask goes.
    unmask: ["push rdi", "fldcw [rsp]", "pop rax"] "fwait";

    set_mxcsr: ["push rdi"] "ldmxcsr [rsp]\npop rax";
    sse_invalid: ["xorps xmm0, xmm0"] "divss xmm0, xmm0";
    sse_denormal: ["mov eax, 1", "movd xmm0, eax", "xorps xmm1, xmm1"] "addss xmm0, xmm1";
    sse_zero_divide: ["mov eax, 0x3F800000", "movd xmm0, eax", "xorps xmm1, xmm1"] "divss xmm0, xmm1";
    sse_overflow: ["mov eax, 0x7F000000", "movd xmm0, eax"] "mulss xmm0, xmm0";
    sse_underflow: ["mov eax, 0x00800001", "movd xmm0, eax"] "mulss xmm0, xmm0";
    sse_inexact: ["mov eax, 0x3F800000", "movd xmm0, eax", "mov eax, 0x40400000", "movd xmm1, eax"] "divss xmm0, xmm1";
    sse_exact: ["xorps xmm0, xmm0"] "addss xmm0, xmm0";
    avx_zero_divide: ["mov eax, 0x3F800000", "movd xmm0, eax", "xorps xmm1, xmm1"] "vdivss xmm0, xmm0, xmm1";
}

/// The control word's masks: bits 0 to 5 are invalid operation, denormal operand, division by zero, overflow,
/// underflow, precision (SDM vol. 1, figure 8-6). Extended precision, round to nearest.
const X87_MASKED: u64 = 0x37F;
/// The same in MXCSR, seven bits further (figure 10-3).
const SSE_MASKED: u64 = 0x1F80;

pub fn show() {
    x87();
    pending();
    simd();
    let _ = catch(load_control, X87_MASKED);
    let _ = catch(set_mxcsr, SSE_MASKED);
}

/// What the status word says: its flags, the stack fault, the summary, C1 (vol. 1, 8.1.3).
fn status() -> u16 {
    let status: u16;
    // SAFETY: reads a register.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nostack, nomem)) }
    status & 0x2FF
}

/// SDM vol. 1 8.5: each cause with all others masked, and masked itself. A stack fault is an invalid operation, C1 tells
/// in which direction.
fn x87() {
    for (what, bit, body) in [
        ("stack underflow", 0, x87_underflow_of_stack as Body),
        ("stack overflow", 0, x87_overflow_of_stack),
        ("invalid operation", 0, x87_invalid),
        ("denormal operand", 1, x87_denormal),
        ("division by zero", 2, x87_zero_divide),
        ("overflow", 3, x87_overflow),
        ("underflow", 4, x87_underflow),
        ("precision", 5, x87_inexact),
    ] {
        for (control, how) in [(X87_MASKED & !(1 << bit), ""), (X87_MASKED, "masked, ")] {
            let _ = catch(load_control, control);
            let ended = catch(body, 0);
            print!("x87, {how}status {:#x}, ", status());
            report::show(what, ended, body);
        }
    }
}

/// SDM vol. 1 8.6, vol. 3A 7.15 (vector 16): waiting x87 instructions and MMX instructions notice, others do not.
fn pending() {
    const UNMASKED: u64 = X87_MASKED & !(1 << 2);
    for (control, body, what) in [
        (UNMASKED, fld1 as Body, "fld1"),
        (UNMASKED, mmx, "movd of mmx"),
        (UNMASKED, emms, "emms"),
        (UNMASKED, sse, "addps"),
        (UNMASKED, sse_of_mmx, "cvtpi2ps of mmx"),
        (UNMASKED, fnstsw, "fnstsw"),
        (UNMASKED, fnstcw, "fnstcw"),
        (UNMASKED, fnclex, "fnclex"),
        (UNMASKED, fninit, "fninit"),
        (UNMASKED, fnsave, "fnsave"),
        (UNMASKED, fxsave, "fxsave"),
        (UNMASKED, fldcw, "fldcw"),
        (UNMASKED, fwait, "fwait"),
        (X87_MASKED, unmask, "unmasked later, fwait"),
    ] {
        let _ = catch(load_control, control);
        let _ = catch(divide, 0);
        let ended = catch(body, UNMASKED);
        print!("x87 error pending, ");
        report::show(what, ended, body);
    }
}

fn mxcsr() -> u32 {
    let mut mxcsr = 0u32;
    // SAFETY: writes that word.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack)) }
    mxcsr & 0x3F
}

/// SDM vol. 1 11.5.2; vol. 3A 2.5 (CR4.OSXMMEXCPT) and 7.15 (vector 19).
fn simd() {
    let with = |cr4: u64, body: Body, mxcsr: u64| {
        let old = cpu::read_cr4();
        let _ = catch(set_mxcsr, mxcsr);
        cpu::write_cr4(old & !OSXMMEXCPT | cr4);
        let ended = catch(body, 0);
        cpu::write_cr4(old);
        ended
    };
    for (what, bit, body) in [
        ("invalid operation", 7, sse_invalid as Body),
        ("denormal operand", 8, sse_denormal),
        ("division by zero", 9, sse_zero_divide),
        ("overflow", 10, sse_overflow),
        ("underflow", 11, sse_underflow),
        ("precision", 12, sse_inexact),
    ] {
        for (cr4, masks, how) in [
            (OSXMMEXCPT, SSE_MASKED & !(1 << bit), ""),
            (OSXMMEXCPT, SSE_MASKED, "masked, "),
            (0, SSE_MASKED & !(1 << bit), "without cr4.osxmmexcpt, "),
            (0, SSE_MASKED, "masked, without cr4.osxmmexcpt, "),
        ] {
            let ended = with(cr4, body, masks);
            print!("sse, {how}flags {:#x}, ", mxcsr());
            report::show(what, ended, body);
        }
    }
    report::show(
        "sse, a flag that is set and not masked",
        with(OSXMMEXCPT, sse_exact, SSE_MASKED & !(1 << 9) | 1 << 2),
        sse_exact,
    );
    if cpu::cpuid(1, 0).ecx & 1 << 28 == 0 {
        return;
    }
    const OSXSAVE: u64 = 1 << 18;
    let old = cpu::read_cr4();
    cpu::write_cr4(old | OSXSAVE);
    // SAFETY: nothing else here uses these registers.
    unsafe { asm!("xsetbv", in("ecx") 0, in("eax") 7, in("edx") 0, options(nostack)) }
    for (cr4, what) in [
        (OSXMMEXCPT, "avx, division by zero"),
        (0, "avx, division by zero without cr4.osxmmexcpt"),
    ] {
        let ended = with(cr4, avx_zero_divide, SSE_MASKED & !(1 << 9));
        report::show(what, ended, avx_zero_divide);
    }
    cpu::write_cr4(old);
}
