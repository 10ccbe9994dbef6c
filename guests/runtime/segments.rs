//! The GDT and the TSS.

use core::arch::asm;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE_32: u16 = 0x18 | 3;
pub const USER_DATA: u16 = 0x20 | 3;
pub const USER_CODE: u16 = 0x28 | 3;
pub const KERNEL_CODE_32: u16 = 0x30;
pub const KERNEL_CODE_16: u16 = 0x38;
pub const KERNEL_DATA_16: u16 = 0x40;
pub const TASK: u16 = 0x48; // two slots
/// The first of the slots that programs fill themselves, with [`set_descriptor`].
pub const FIRST_FREE: u16 = 0x58;

const SLOTS: usize = 32;

/// Interrupt stack table slots (SDM vol. 3A 7.14.5). An interrupt that uses a slot must not be
/// interrupted by another that uses the same: the second would overwrite the first's frame.
pub const IST_EXCEPTION: u8 = 1;
pub const IST_INTERRUPT: u8 = 2;
pub const IST_NMI: u8 = 3;
pub const IST_DOUBLE_FAULT: u8 = 4;

const IST_STACK_SIZE: usize = 16 * 1024;

#[repr(C, align(16))]
struct IstStack([u8; IST_STACK_SIZE]);

static mut IST_STACKS: [IstStack; 4] = [const { IstStack([0; IST_STACK_SIZE]) }; 4];

/// The 64-bit TSS, SDM vol. 3A figure 9-11, as 32-bit words because its fields are not aligned.
/// Behind it the I/O permission bits of ports 0 to 255, and the byte of ones that must follow.
static mut TSS: [u32; 26 + 9] = [0; 26 + 9];
const TSS_LIMIT: u32 = 104 + 32;

#[repr(C, align(8))]
struct Gdt([u64; SLOTS]);

static mut GDT: Gdt = Gdt({
    let mut slots = [0; SLOTS];
    slots[1] = 0x00AF_9B00_0000_FFFF; // 64-bit code, ring 0
    slots[2] = 0x00CF_9300_0000_FFFF; // flat data, ring 0
    slots[3] = 0x00CF_FB00_0000_FFFF; // 32-bit code, ring 3
    slots[4] = 0x00CF_F300_0000_FFFF; // flat data, ring 3
    slots[5] = 0x00AF_FB00_0000_FFFF; // 64-bit code, ring 3
    slots[6] = 0x00CF_9B00_0000_FFFF; // 32-bit code, ring 0
    slots[7] = 0x0000_9B00_0000_FFFF; // 16-bit code, ring 0
    slots[8] = 0x0000_9300_0000_FFFF; // 16-bit data, ring 0
    slots
});

/// The operand of LGDT and LIDT.
#[repr(C, packed)]
pub struct TablePointer {
    pub limit: u16,
    pub base: u64,
}

/// Loads GDT and TSS. Also the way back to a sane state for a program that loaded its own.
pub fn load() {
    for (index, slot) in [IST_EXCEPTION, IST_INTERRUPT, IST_NMI, IST_DOUBLE_FAULT]
        .into_iter()
        .enumerate()
    {
        let bottom = (&raw const IST_STACKS) as u64 + (index * IST_STACK_SIZE) as u64;
        set_tss_address(7 + 2 * usize::from(slot), bottom + IST_STACK_SIZE as u64);
    }
    set_tss_word(25, 104 << 16); // where the I/O permission bits begin
    for word in 26..35 {
        set_tss_word(word, u32::MAX);
    }
    let tss = (&raw const TSS) as u64;
    let [low, high] = system_descriptor(tss, TSS_LIMIT, 0x89);
    set_descriptor(TASK, low);
    set_descriptor(TASK + 8, high);
    let pointer = TablePointer {
        limit: (SLOTS * 8 - 1) as u16,
        base: gdt_base(),
    };
    // SAFETY: the selectors name the same kinds of segments as the entry GDT's.
    unsafe {
        asm!(
            "lgdt [{pointer}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            "mov ss, {data:x}",
            "mov fs, {data:x}",
            "mov gs, {data:x}",
            "ltr {task:x}",
            "xor {scratch:e}, {scratch:e}",
            "lldt {scratch:x}", // after reset LDTR is usable, with whatever is at address 0
            pointer = in(reg) &pointer,
            code = in(reg) u64::from(KERNEL_CODE),
            data = in(reg) KERNEL_DATA,
            task = in(reg) TASK,
            scratch = out(reg) _,
        );
    }
}

pub fn gdt_base() -> u64 {
    (&raw const GDT) as u64
}

/// Writes the descriptor that `selector` names.
pub fn set_descriptor(selector: u16, descriptor: u64) {
    assert!(usize::from(selector / 8) < SLOTS, "no such GDT slot");
    // SAFETY: the slot exists; one CPU.
    unsafe {
        ((&raw mut GDT) as *mut u64)
            .add(usize::from(selector / 8))
            .write_volatile(descriptor)
    }
}

pub fn descriptor(selector: u16) -> u64 {
    assert!(usize::from(selector / 8) < SLOTS, "no such GDT slot");
    // SAFETY: as in `set_descriptor`.
    unsafe {
        ((&raw const GDT) as *const u64)
            .add(usize::from(selector / 8))
            .read_volatile()
    }
}

/// The two halves of a 16-byte system descriptor (TSS, LDT) with the given access byte.
pub fn system_descriptor(base: u64, limit: u32, access: u8) -> [u64; 2] {
    let low = u64::from(limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xF) << 48
        | (base >> 24 & 0xFF) << 56;
    [low, base >> 32]
}

/// The two halves of a call gate (type 0xC) or interrupt gate (0xE) with the given access byte.
pub fn gate_descriptor(selector: u16, offset: u64, access: u8) -> [u64; 2] {
    let low = (offset & 0xFFFF)
        | u64::from(selector) << 16
        | u64::from(access) << 40
        | (offset >> 16 & 0xFFFF) << 48;
    [low, offset >> 32]
}

/// The stack that the CPU switches to when it enters ring 0 from ring 3 without IST.
pub fn set_ring0_stack(top: u64) {
    set_tss_address(1, top);
}

/// Where interrupt stack `slot` (1 to 7) starts.
pub fn set_ist(slot: u8, top: u64) {
    set_tss_address(7 + 2 * usize::from(slot), top);
}

/// Gives the TSS another limit, and loads it again. [`load`] undoes it.
pub fn set_task_limit(limit: u32) {
    let [low, _] = system_descriptor((&raw const TSS) as u64, limit, 0x89);
    set_descriptor(TASK, low);
    // SAFETY: the same task-state segment.
    unsafe { asm!("ltr {:x}", in(reg) TASK, options(nostack, preserves_flags)) }
}

/// Lets code without I/O privilege use `port` (0 to 255), or not.
pub fn permit_port(port: u8, permitted: bool) {
    let word = 26 + usize::from(port / 32);
    // SAFETY: inside the TSS; one CPU.
    let old = unsafe { ((&raw const TSS) as *const u32).add(word).read_volatile() };
    let bit = 1 << (port % 32);
    set_tss_word(word, if permitted { old & !bit } else { old | bit });
}

fn set_tss_address(word: usize, address: u64) {
    set_tss_word(word, address as u32);
    set_tss_word(word + 1, (address >> 32) as u32);
}

fn set_tss_word(word: usize, value: u32) {
    // SAFETY: the words named here are inside the TSS; one CPU.
    unsafe { ((&raw mut TSS) as *mut u32).add(word).write_volatile(value) }
}
