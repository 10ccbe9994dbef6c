//! From the loader's 32-bit entry to Rust in long mode.
//!
//! Two loaders, one image. PVH (Xen `xen/include/public/arch-x86/hvm/start_info.h`) finds the
//! entry in an ELF note and passes the start info in EBX. Multiboot 1 (0.6.96) finds its header in
//! the file, and passes 0x2BADB002 in EAX and the info in EBX. Both enter in flat 32-bit
//! protected mode, paging off, interrupts off.

use core::arch::global_asm;

use crate::boot_info::{self, BootProtocol};
use crate::{interrupts, local_apic, pic, segments, serial};

/// The page tables that map the first 4 GiB one to one with 2 MiB pages, filled in below.
/// 4 GiB because the local APIC is at 0xFEE0_0000.
#[repr(C, align(4096))]
struct BootTables([[u64; 512]; 6]);

#[unsafe(no_mangle)]
static mut BOOT_TABLES: BootTables = BootTables([[0; 512]; 6]);

const STACK_SIZE: usize = 64 * 1024;

#[repr(C, align(16))]
struct Stack([u8; STACK_SIZE]);

#[unsafe(no_mangle)]
static mut BOOT_STACK: Stack = Stack([0; STACK_SIZE]);

global_asm!(
    r#"
    .set MULTIBOOT_MAGIC, 0x1BADB002
    .set MULTIBOOT_FLAGS, 0x00010003        // page-aligned modules, memory map, address fields

    .section .boot.header, "ax"
    .balign 4
multiboot_header:
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header, image_start, image_end, bss_end, multiboot_entry

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                          // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    mov ebp, 1                              // BootProtocol::Pvh
    jmp entered
multiboot_entry:
    mov ebp, 2                              // BootProtocol::Multiboot
    cmp eax, 0x2BADB002
    je entered
    xor ebp, ebp                            // BootProtocol::Unknown
entered:
    cli
    cld
    mov esp, offset BOOT_STACK + {stack_size}

    xor eax, eax
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    shr ecx, 2
    rep stosd

    // BOOT_TABLES: PML4, PDPT, then four page directories.
    mov edi, offset BOOT_TABLES
    lea eax, [edi + 0x1003]                 // present, writable
    mov [edi], eax
    lea eax, [edi + 0x2003]
    xor ecx, ecx
2:  mov [edi + 0x1000 + ecx * 8], eax
    add eax, 0x1000
    inc ecx
    cmp ecx, 4
    jne 2b
    mov eax, 0x83                           // present, writable, 2 MiB page
    xor ecx, ecx
3:  mov [edi + 0x2000 + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 3b

    // Long mode, SDM vol. 3A 11.8.5: PAE, CR3, EFER.LME, then paging.
    mov eax, cr4
    or eax, 0x620                           // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov cr3, edi
    mov ecx, 0xC0000080                     // IA32_EFER
    rdmsr
    or eax, 0x900                           // LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9FFFFFF3                     // not CD, NW, EM, TS
    or eax, 0x80010023                      // PG, WP, NE, MP, PE
    mov cr0, eax

    lgdt [entry_gdt_pointer]
    .byte 0xEA                              // jmp far 0x08:entered_long
    .long entered_long
    .word 0x08

    .code64
entered_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    lea rsp, [BOOT_STACK + {stack_size}]
    mov edi, ebp
    mov esi, ebx
    xor ebp, ebp
    call {start}
    ud2

    .balign 8
entry_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
entry_gdt_pointer:
    .word 23
    .quad entry_gdt
    .text
    "#,
    stack_size = const STACK_SIZE,
    start = sym start,
);

unsafe extern "Rust" {
    /// The program, see [`crate::entry!`].
    safe fn guest_main();
}

/// Sets up what every program counts on, runs the program, powers off.
extern "C" fn start(protocol: u32, info: u32) -> ! {
    serial::initialise();
    segments::load();
    interrupts::load();
    pic::remap();
    local_apic::enable();
    boot_info::remember(
        match protocol {
            1 => BootProtocol::Pvh,
            2 => BootProtocol::Multiboot,
            _ => BootProtocol::Unknown,
        },
        info,
    );
    guest_main();
    crate::power::off()
}
