//! Segment registers, with the parts that only the processor sees, and the descriptor tables'
//! registers.

use core::arch::{asm, global_asm};

use runtime::ring3::{self, Start};
use runtime::segments::{
    self, FIRST_FREE, TablePointer, USER_CODE, USER_CODE_32, USER_DATA, set_descriptor,
};

use super::Piece;

/// Where descriptors are written, loaded, and erased.
const HIDDEN: u16 = FIRST_FREE;
const LDT: u16 = FIRST_FREE + 8; // two slots
/// The second entry of the LDT.
const IN_THE_LDT: u16 = 8 | 4;

pub(super) static PIECES: [Piece; 7] = [
    Piece::new("ds", data_selector, set_ds, ds),
    Piece::new("fs", data_selector, set_fs, fs),
    Piece::new("gs", data_selector, set_gs, gs),
    // After DS, which its read changes.
    Piece::new("es", fit_hidden, set_hidden, hidden),
    Piece::new("ldt", |random| random & 0x1_FFFF, set_ldt, ldt),
    Piece::new(
        "gdt",
        |random| 255 + random % 256 * 8,
        set_gdt_limit,
        gdt_limit,
    ),
    Piece::new(
        "idt",
        |random| 4095 + random % 256 * 16,
        set_idt_limit,
        idt_limit,
    ),
];

#[repr(C, align(4096))]
struct Page([u64; 512]);

/// Where the hidden base may point to: each page begins with its number.
static mut BASES: [Page; 8] = [const { Page([0; 512]) }; 8];
static mut LDTS: [[u64; 2]; 2] = [[0; 2]; 2];
static mut USER_STACK: Page = Page([0; 512]);

pub(super) fn prepare() {
    for index in 0..8 {
        let page = (&raw mut BASES).cast::<Page>().wrapping_add(index);
        // SAFETY: one CPU; the page exists.
        unsafe { page.cast::<u64>().write_volatile(0x100 + index as u64) }
    }
    // The task register lives on without its descriptor.
    set_descriptor(segments::TASK, 0);
    set_descriptor(segments::TASK + 8, 0);
}

fn data_selector(random: u64) -> u64 {
    // No segment of ring 0: an interrupt in ring 3 would take it away (SDM vol. 2A IRET).
    [USER_DATA, USER_CODE, USER_CODE_32, 0][random as usize & 3].into()
}

macro_rules! segment_register {
    ($write:ident, $read:ident, $name:literal) => {
        fn $write(selector: u64) {
            // SAFETY: 64-bit code uses the register for nothing; the selector is a data segment's
            // or null. FS and GS lose their bases, which ring 3's next visit sets.
            unsafe { asm!(concat!("mov ", $name, ", {:x}"), in(reg) selector, options(nostack, preserves_flags)) }
        }

        fn $read() -> u64 {
            let selector: u64;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {:e}, ", $name), out(reg) selector, options(nostack, preserves_flags)) }
            selector & 0xFFFF
        }
    };
}

segment_register!(set_ds, ds, "ds");
segment_register!(set_fs, fs, "fs");
segment_register!(set_gs, gs, "gs");
segment_register!(set_es, es, "es");

/// A base (bits 12 to 14) and a limit.
fn fit_hidden(random: u64) -> u64 {
    random & 0x7FFF | 0x40
}

/// Loads ES with a descriptor that is gone afterwards.
fn set_hidden(value: u64) {
    let (which, limit) = (value >> 12 & 7, (value & 0xFFF) as u32);
    let base = (&raw const BASES)
        .cast::<Page>()
        .wrapping_add(which as usize) as u64;
    let [low, _] = segments::system_descriptor(base, limit, 0xF3);
    set_descriptor(HIDDEN, low | 1 << 54);
    set_es(u64::from(HIDDEN | 3));
    set_descriptor(HIDDEN, 0);
}

/// Asks 32-bit code of ring 3 what ES still is: its base by what is there, its limit by the first
/// byte that is refused.
fn hidden() -> u64 {
    if es() != u64::from(HIDDEN | 3) {
        return es() << 32;
    }
    let mut limit = 0;
    for bit in (0..12).rev() {
        let offset = limit | 1 << bit;
        if probe(offset).is_some() {
            limit = offset;
        }
    }
    match probe(0) {
        Some(content) => u64::from(content & 7) << 12 | limit,
        None => u64::MAX,
    }
}

/// What ES has at 0, if the byte at `offset` can be read.
fn probe(offset: u64) -> Option<u32> {
    let start = Start {
        rip: chain_probe as *const () as u64,
        cs: USER_CODE_32.into(),
        rflags: 0x202,
        rsp: (&raw const USER_STACK) as u64 + 4096,
        ss: USER_DATA.into(),
        argument: offset,
    };
    let fault = ring3::run(&start);
    (fault.frame.rbx == 1).then_some(fault.frame.rax as u32)
}

global_asm!(
    r#"
    .code32
    .global chain_probe
chain_probe:
    xor ebx, ebx
    mov al, es:[edi]
    mov eax, es:[0]
    inc ebx
    hlt
    .code64
    "#
);

unsafe extern "C" {
    fn chain_probe();
}

/// Loads LDTR with a descriptor that is gone afterwards. Bit 16 says which table.
fn set_ldt(value: u64) {
    let table = (&raw mut LDTS)
        .cast::<[u64; 2]>()
        .wrapping_add(value as usize >> 16 & 1);
    let [descriptor, _] = segments::system_descriptor(0, value as u32 & 0xFFFF, 0xF3);
    let [low, high] = segments::system_descriptor(table as u64, 15, 0x82);
    set_descriptor(LDT, low);
    set_descriptor(LDT + 8, high);
    // SAFETY: the table is there; nothing uses its segments.
    unsafe {
        table.write_volatile([u64::from(value as u32 >> 16), descriptor]);
        asm!("lldt {:x}", in(reg) LDT, options(nostack, preserves_flags));
        // The other table has no such segment.
        (&raw mut LDTS)
            .cast::<[u64; 2]>()
            .wrapping_add(value as usize >> 16 & 1 ^ 1)
            .write_volatile([0; 2]);
    }
    set_descriptor(LDT, 0);
    set_descriptor(LDT + 8, 0);
}

fn ldt() -> u64 {
    let (selector, limit): (u64, u64);
    // SAFETY: reads what the table says; the flags are the compiler's to forget.
    unsafe {
        asm!("sldt {:e}", out(reg) selector, options(nostack, preserves_flags));
        asm!("lsl {:e}, {:e}", inout(reg) u64::MAX >> 32 => limit, in(reg) u64::from(IN_THE_LDT), options(nostack));
    }
    if selector & 0xFFFF != u64::from(LDT) {
        return selector << 32;
    }
    // SAFETY: one CPU.
    let second = unsafe { (&raw const LDTS).cast::<[u64; 2]>().add(1).read_volatile() }[1] != 0;
    limit | u64::from(second) << 16
}

macro_rules! table_register {
    ($write:ident, $read:ident, $load:literal, $store:literal) => {
        fn $write(limit: u64) {
            let mut pointer = TablePointer { limit: 0, base: 0 };
            // SAFETY: the table stays where it is, and keeps all its entries.
            unsafe {
                asm!(concat!($store, " [{}]"), in(reg) &mut pointer, options(nostack, preserves_flags));
                pointer.limit = limit as u16;
                asm!(concat!($load, " [{}]"), in(reg) &pointer, options(nostack, preserves_flags));
            }
        }

        fn $read() -> u64 {
            let mut pointer = TablePointer { limit: 0, base: 0 };
            // SAFETY: writes ten bytes, for which there is room.
            unsafe { asm!(concat!($store, " [{}]"), in(reg) &mut pointer, options(nostack, preserves_flags)) }
            pointer.limit.into()
        }
    };
}

table_register!(set_gdt_limit, gdt_limit, "lgdt", "sgdt");
table_register!(set_idt_limit, idt_limit, "lidt", "sidt");
