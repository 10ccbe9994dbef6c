//! A second processor: INIT and start-up IPIs, what it starts with, interrupts to it and to both
//! (SDM vol. 3A 10.4, 12.4.7, 12.6; table 10-1). It runs in real mode, like a trampoline, with a data segment of 4 GiB;
//! at last in long mode, where each processor writes the other's code.
#![no_std]
#![no_main]

mod crossing;

use core::arch::global_asm;

use runtime::interrupts::{self, TrapFrame};
use runtime::local_apic::{self, register};
use runtime::{cpu, pic, port, println, time};

runtime::entry!(processors);

/// Where the second processor's code runs, and where its copy for another start-up vector is.
const PAGE: u64 = 0x8000;
const OTHER_PAGE: u64 = 0xA000;

const VECTOR: u8 = 0x70;
const INIT: u32 = 5 << 8 | 1 << 14;
const START_UP: u32 = 6 << 8 | 1 << 14;
const NMI: u32 = 4 << 8 | 1 << 14;
const FIXED: u32 = 1 << 14;
const OTHERS: u32 = 3 << 18;
const ALL: u32 = 2 << 18;
const LOGICAL: u32 = 1 << 11;

/// What the code below writes, at the end of its page.
const REPORT: u64 = 0xF00;

#[repr(C)]
#[derive(Clone, Copy)]
struct Report {
    started: u32,
    woken: u32,
    interrupts: u32,
    nmis: u32,
    cs: u32,
    flags: u32,
    cr0: u32,
    cr2: u32,
    cr3: u32,
    cr4: u32,
    efer: u32,
    dr6: u32,
    dr7: u32,
    apic_base: u32,
    apic_id: u32,
    spurious: u32,
    mark: u32,
}

fn report(page: u64) -> Report {
    // SAFETY: low memory is not used for anything else.
    unsafe { ((page + REPORT) as *const Report).read_volatile() }
}

fn write_report(page: u64, report: Report) {
    // SAFETY: as above.
    unsafe { ((page + REPORT) as *mut Report).write_volatile(report) }
}

unsafe extern "C" {
    static processor_begin: u8;
    static processor_end: u8;
}

static mut TSC_HZ: u64 = 0;

/// Waits for a condition, a second at most; says whether it came.
fn until(condition: impl Fn() -> bool) -> bool {
    // SAFETY: written once.
    let end = cpu::read_tsc() + unsafe { (&raw const TSC_HZ).read() };
    while cpu::read_tsc() < end {
        if condition() {
            return true;
        }
        core::hint::spin_loop();
    }
    condition()
}

/// Long enough for what does not come.
fn a_while() {
    // SAFETY: as above.
    let end = cpu::read_tsc() + unsafe { (&raw const TSC_HZ).read() } / 50;
    while cpu::read_tsc() < end {
        core::hint::spin_loop();
    }
}

fn send(low: u32, destination: u32) {
    local_apic::write(register::COMMAND_HIGH, destination << 24);
    local_apic::write(register::COMMAND_LOW, low);
}

fn processors() {
    // SAFETY: before anything that reads it.
    unsafe { (&raw mut TSC_HZ).write(time::tsc_frequency().hertz) }
    let begin = &raw const processor_begin;
    let size = (&raw const processor_end) as usize - begin as usize;
    for page in [PAGE, OTHER_PAGE] {
        // SAFETY: as above; both have a page.
        unsafe {
            core::ptr::write_bytes(page as *mut u8, 0, 4096);
            core::ptr::copy_nonoverlapping(begin, page as *mut u8, size);
        }
    }
    println!(
        "the first: bootstrap processor {}, id {}",
        cpu::read_msr(cpu::msr::APIC_BASE) >> 8 & 1,
        local_apic::read(register::ID) >> 24
    );
    start();
    interrupts_to_it();
    again("init", PAGE, OTHER_PAGE, || send(INIT, 1));
    through_io_apic();
    crossing::crossing();
    println!("processors: done");
}

/// INIT, then start-up: real mode at the page of the vector. A second start-up is ignored.
fn start() {
    send(INIT, 1);
    a_while();
    send(START_UP | (PAGE >> 12) as u32, 1);
    let started = until(|| report(PAGE).started != 0);
    send(START_UP | (OTHER_PAGE >> 12) as u32, 1);
    a_while();
    let found = report(PAGE);
    println!(
        "started {}, times {}, by the second start-up {}",
        u8::from(started),
        found.started,
        report(OTHER_PAGE).started
    );
    print_start(&found);
}

/// Table 10-1, the column of INIT: general state cleared, caches as they were.
fn print_start(found: &Report) {
    println!(
        "cs {:#x} flags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} dr6 {:#x} dr7 {:#x}",
        found.cs,
        found.flags,
        // Whether caches are on is the loader's and not INIT's affair.
        found.cr0 & 0x9FFF_FFFF,
        found.cr2,
        found.cr3,
        found.cr4,
        found.efer,
        found.dr6,
        found.dr7
    );
    println!(
        "apic: enabled {}, bootstrap processor {}, id {}, spurious vector {:#x}",
        found.apic_base >> 11 & 1,
        found.apic_base >> 8 & 1,
        found.apic_id >> 24,
        found.spurious
    );
}

fn interrupts_to_it() {
    fn handler(_: &mut TrapFrame) {
        // SAFETY: one CPU runs this.
        unsafe {
            let own = (&raw const OWN).read_volatile();
            (&raw mut OWN).write_volatile(own + 1);
        }
        local_apic::end_of_interrupt();
    }
    interrupts::set_handler(VECTOR, handler);
    let vector = u32::from(VECTOR);
    let each = |what: &str, low: u32, destination: u32| {
        let before = report(PAGE);
        // SAFETY: one CPU.
        unsafe { (&raw mut OWN).write_volatile(0) }
        send(low, destination);
        until(|| {
            let now = report(PAGE);
            cpu::enable_interrupts();
            cpu::disable_interrupts();
            now.interrupts != before.interrupts || now.nmis != before.nmis
        });
        a_while();
        for _ in 0..10 {
            // SAFETY: the runtime has a handler for every vector.
            unsafe { core::arch::asm!("sti", "nop", "nop", "cli", options(nostack)) }
        }
        let now = report(PAGE);
        // SAFETY: one CPU.
        let own = unsafe { (&raw const OWN).read_volatile() };
        println!(
            "{what}: interrupts {} nmis {}, woken {}, own {own}",
            now.interrupts - before.interrupts,
            now.nmis - before.nmis,
            u8::from(now.woken != before.woken)
        );
    };
    each("fixed to 1", FIXED | vector, 1);
    each("nmi to 1", NMI, 1);
    each("fixed to all others", FIXED | OTHERS | vector, 0);
    each("nmi to all others", NMI | OTHERS, 0);
    each("fixed to all", FIXED | ALL | vector, 0);
    each("fixed, broadcast", FIXED | vector, 0xFF);
    local_apic::write(register::LOGICAL_DESTINATION, 1 << 24);
    each("logical 2", FIXED | LOGICAL | vector, 2);
    each("logical 3", FIXED | LOGICAL | vector, 3);
}

static mut OWN: u32 = 0;

/// INIT of a processor that runs: it waits, hears nothing but a start-up, and starts with the same state. What INIT leaves
/// alone is memory, of course, and MSRs (TSC_AUX here).
fn again(what: &str, page: u64, other: u64, init: impl FnOnce()) {
    let before = report(page);
    init();
    a_while();
    send(FIXED | u32::from(VECTOR), 1);
    send(NMI, 1);
    a_while();
    let silent = report(page);
    println!(
        "after {what}: interrupts {} nmis {} woken {}",
        silent.interrupts - before.interrupts,
        silent.nmis - before.nmis,
        silent.woken - before.woken
    );
    write_report(
        other,
        Report {
            started: 0,
            ..report(other)
        },
    );
    send(START_UP | (other >> 12) as u32, 1);
    let started = until(|| report(other).started != 0);
    a_while();
    let found = report(other);
    println!(
        "started again {}, msr kept {}",
        u8::from(started),
        u8::from(found.mark == 0x5EED)
    );
    print_start(&found);
}

/// The I/O APIC's messages are like those of the first processor (82093AA data sheet, 3.2.4: delivery modes 000, 100,
/// 101). The line is the serial port's, which is quiet meanwhile.
fn through_io_apic() {
    pic::remap();
    let raise = |low: u32| {
        set_serial_entry(low);
        while port::read8(0x3FD) & 0x60 != 0x60 {}
        // Its transmitter is empty.
        port::write8(0x3F9, 2);
        a_while();
        port::write8(0x3F9, 0);
        set_serial_entry(1 << 16);
    };
    for (what, low) in [("fixed", u32::from(VECTOR)), ("nmi", 4 << 8)] {
        let before = report(OTHER_PAGE);
        raise(low);
        let now = report(OTHER_PAGE);
        println!(
            "i/o apic, {what}: interrupts {} nmis {}",
            now.interrupts - before.interrupts,
            now.nmis - before.nmis
        );
    }
    again("init by the i/o apic", OTHER_PAGE, PAGE, || raise(5 << 8));
}

/// Writes the I/O APIC's entry of the serial port; the second processor is the destination.
fn set_serial_entry(low: u32) {
    for (register, value) in [(0x19, 1 << 24), (0x18, low)] {
        // SAFETY: the I/O APIC's registers are identity-mapped.
        unsafe {
            (0xFEC0_0000 as *mut u32).write_volatile(register);
            (0xFEC0_0010 as *mut u32).write_volatile(value);
        }
    }
}

global_asm!(
    r#"
    .section .text.processors, "ax"
    .code16
    .global processor_begin, processor_end
processor_begin:
    cli
    mov ax, cs
    mov ds, ax
    mov ss, ax
    mov sp, 0xE00
    pushfd
    pop dword ptr [0xF00 + 20]
    movzx eax, ax
    mov [0xF00 + 16], eax
    mov eax, cr0
    mov [0xF00 + 24], eax
    mov eax, cr2
    mov [0xF00 + 28], eax
    mov eax, cr3
    mov [0xF00 + 32], eax
    mov eax, cr4
    mov [0xF00 + 36], eax
    mov ecx, 0xC0000080
    rdmsr
    mov [0xF00 + 40], eax
    mov eax, dr6
    mov [0xF00 + 44], eax
    mov eax, dr7
    mov [0xF00 + 48], eax
    mov ecx, 0x1B
    rdmsr
    mov [0xF00 + 52], eax
    mov ecx, 0xC0000103
    rdmsr
    mov [0xF00 + 64], eax
    mov eax, 0x5EED
    xor edx, edx
    wrmsr

    // ES with a limit of 4 GiB, for the local APIC.
    xor eax, eax
    mov ax, cs
    shl eax, 4
    add eax, 0x280
    mov [0xEF2], eax
    mov word ptr [0xEF0], 15
    .byte 0x66, 0x0F, 0x01, 0x16            // lgdt [0xEF0], 32 bits of base
    .word 0xEF0
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov bx, 8
    mov es, bx
    and al, 0xFE
    mov cr0, eax
    xor ax, ax
    mov es, ax

    // Vectors 2 and 0x70 of real mode.
    mov ax, 0x200
    mov es:[2 * 4], ax
    mov es:[2 * 4 + 2], cs
    mov ax, 0x240
    mov es:[0x70 * 4], ax
    mov es:[0x70 * 4 + 2], cs

    mov edi, 0xFEE00020
    mov eax, es:[edi]
    mov [0xF00 + 56], eax
    mov edi, 0xFEE000F0
    mov eax, es:[edi]
    mov [0xF00 + 60], eax
    mov dword ptr es:[edi], 0x1FF
    mov edi, 0xFEE000D0
    mov dword ptr es:[edi], 0x02000000
    lock inc dword ptr [0xF00]
    sti
1:  hlt
    lock inc dword ptr [0xF00 + 4]
    jmp 1b

    .fill 0x200 - (. - processor_begin), 1, 0x90
    // Vector 2.
    lock inc dword ptr cs:[0xF00 + 12]
    iret
    .fill 0x240 - (. - processor_begin), 1, 0x90
    // Vector 0x70.
    lock inc dword ptr cs:[0xF00 + 8]
    mov edi, 0xFEE000B0
    mov dword ptr es:[edi], 0
    iret

    .fill 0x280 - (. - processor_begin), 1, 0x90
    // The descriptors.
    .quad 0, 0x00CF93000000FFFF
processor_end:
    .code64
    .text
    "#
);
