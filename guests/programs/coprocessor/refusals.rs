//! Instructions that control registers refuse.

use core::arch::asm;

use runtime::interrupts::catch;
use runtime::report::{self, Body};
use runtime::{bodies, cpu, println};

const MP: u64 = 1 << 1;
const EM: u64 = 1 << 2;
const TS: u64 = cpu::cr0::TS;
const OSFXSR: u64 = 1 << 9;
const OSXSAVE: u64 = 1 << 18;

bodies! {
    fld1: [] "fld1";
    fwait: [] "fwait";
    fnstsw: [] "fnstsw ax";
    mmx_add: [] "paddd mm0, mm0";
    emms: [] "emms";
    sse_add: [] "addps xmm0, xmm0";
    sse_to_mmx: [] "cvtps2pi mm0, xmm0";
    store_mxcsr: [] "stmxcsr [rsp - 8]";
    movnti: [] "movnti [rsp - 8], eax";
    sfence: [] "sfence";
    prefetch: [] "prefetchnta [rsp]";
    popcnt: [] "popcnt eax, edi";
    crc32: [] "crc32 eax, edi";
    fxsave: ["mov rax, rsp", "and rax, -16"] "fxsave64 [rax - 512]";
    avx_add: [] "vaddps ymm0, ymm0, ymm0";
    avx_add_128: [] "vaddps xmm0, xmm0, xmm0";
    zero_upper: [] "vzeroupper";
    andn: [] "andn eax, edi, edi";
    xsave: ["xor eax, eax", "xor edx, edx", "mov rcx, rsp", "and rcx, -64"] "xsave [rcx - 640]";
    xgetbv: ["xor ecx, ecx"] "xgetbv";
}

/// While CR0 and CR4 hold these bits nothing else may happen: not even printing.
fn refused(what: &str, cr0: (u64, u64), cr4: (u64, u64), body: Body) {
    let (old_cr0, old_cr4) = (cpu::read_cr0(), cpu::read_cr4());
    cpu::write_cr4(old_cr4 & !cr4.0 | cr4.1);
    cpu::write_cr0(old_cr0 & !cr0.0 | cr0.1);
    let ended = catch(body, 0);
    cpu::write_cr0(old_cr0);
    cpu::write_cr4(old_cr4);
    report::show(what, ended, body);
}

const SAME: (u64, u64) = (0, 0);

pub fn show() {
    by_cr0();
    without_osfxsr();
    if cpu::cpuid(1, 0).ecx & 1 << 28 == 0 {
        println!("note: no avx");
        return;
    }
    avx();
}

/// SDM vol. 3A 2.5 (CR0.TS, EM, MP), table 2-2 (x87 and WAIT), tables 14-1 and 15-1 (MMX, SSE).
fn by_cr0() {
    for (cr0, body, what) in [
        ((0, TS), fld1 as Body, "x87 while cr0.ts"),
        ((0, TS), fnstsw, "x87 that does not wait while cr0.ts"),
        ((0, TS), mmx_add, "mmx while cr0.ts"),
        ((0, TS), emms, "emms while cr0.ts"),
        ((0, TS), sse_add, "sse while cr0.ts"),
        ((0, TS), fxsave, "fxsave while cr0.ts"),
        ((0, TS), movnti, "movnti while cr0.ts"),
        ((0, TS | MP), fwait, "fwait while cr0.ts and cr0.mp"),
        ((MP, TS), fwait, "fwait while cr0.ts and not cr0.mp"),
        ((0, MP), fwait, "fwait while cr0.mp and not cr0.ts"),
        ((0, EM), fld1, "x87 while cr0.em"),
        ((0, EM), fnstsw, "x87 that does not wait while cr0.em"),
        ((0, EM), mmx_add, "mmx while cr0.em"),
        ((0, EM), sse_add, "sse while cr0.em"),
        ((0, EM), fxsave, "fxsave while cr0.em"),
        ((0, EM), fwait, "fwait while cr0.em"),
        ((0, EM | TS), mmx_add, "mmx while cr0.em and cr0.ts"),
        ((0, EM | TS), sse_add, "sse while cr0.em and cr0.ts"),
        ((0, EM | TS | MP), fwait, "fwait while all three"),
    ] {
        refused(what, cr0, SAME, body);
    }
}

/// SDM vol. 3A 2.5 (CR4.OSFXSR): #UD by SSE instructions, but for those that its footnote names; FXSAVE runs.
fn without_osfxsr() {
    for (body, what) in [
        (sse_add as Body, "sse"),
        (sse_to_mmx, "sse that writes mmx"),
        (store_mxcsr, "stmxcsr"),
        (mmx_add, "mmx"),
        (fxsave, "fxsave"),
        (movnti, "movnti"),
        (sfence, "sfence"),
        (prefetch, "prefetch"),
        (popcnt, "popcnt"),
        (crc32, "crc32"),
    ] {
        runtime::print!("without cr4.osfxsr, ");
        refused(what, SAME, (OSFXSR, 0), body);
    }
    runtime::print!("without cr4.osfxsr, ");
    refused("sse while cr0.ts", (0, TS), (OSFXSR, 0), sse_add);
}

fn set_xcr0(value: u64) {
    // SAFETY: CR4.OSXSAVE is set, and nothing else here uses these registers.
    unsafe { asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") 0, options(nostack)) }
}

/// SDM vol. 1 14.3; vol. 2A 2.4 (classes 1 to 8): CR4.OSXSAVE, then XCR0, then CR0.TS. Neither CR0.EM
/// nor CR4.OSFXSR is asked, and instructions on general registers (class 13) ask for none of all these.
fn avx() {
    let old = cpu::read_cr4();
    refused("avx without cr4.osxsave", SAME, (OSXSAVE, 0), avx_add);
    refused(
        "avx without cr4.osxsave while cr0.ts",
        (0, TS),
        (OSXSAVE, 0),
        avx_add,
    );
    refused(
        "vex on general registers without cr4.osxsave",
        SAME,
        (OSXSAVE, 0),
        andn,
    );
    refused("xsave without cr4.osxsave", SAME, (OSXSAVE, 0), xsave);
    refused("xgetbv without cr4.osxsave", SAME, (OSXSAVE, 0), xgetbv);
    cpu::write_cr4(old | OSXSAVE);
    for (xcr0, what) in [(1, "x87"), (3, "x87 and sse"), (7, "all")] {
        set_xcr0(xcr0);
        for (body, of) in [
            (avx_add as Body, "avx of 256 bits"),
            (avx_add_128, "avx of 128 bits"),
            (zero_upper, "vzeroupper"),
            (sse_add, "sse"),
            (andn, "vex on general registers"),
        ] {
            runtime::print!("xcr0 {what}, ");
            refused(of, SAME, SAME, body);
        }
    }
    for (cr0, cr4, body, what) in [
        (TS, 0, avx_add as Body, "avx while cr0.ts"),
        (TS, 0, zero_upper, "vzeroupper while cr0.ts"),
        (TS, 0, andn, "vex on general registers while cr0.ts"),
        (TS, 0, xsave, "xsave while cr0.ts"),
        (TS, 0, xgetbv, "xgetbv while cr0.ts"),
        (EM, 0, avx_add, "avx while cr0.em"),
        (EM, 0, xsave, "xsave while cr0.em"),
        (0, OSFXSR, avx_add, "avx without cr4.osfxsr"),
    ] {
        refused(what, (0, cr0), (cr4, 0), body);
    }
    set_xcr0(3);
    refused("xcr0 x87 and sse, avx while cr0.ts", (0, TS), SAME, avx_add);
    cpu::write_cr4(old);
}
