//! 32-bit code that uses a segment: loads (SDM vol. 3A 3.4.3, 6.5 to 6.7), accesses of each width and direction (6.3, 6.4),
//! stacks (6.7), jumps (6.8.1). What is wanted of each is cited where `main` asks for it.

use core::arch::{global_asm, naked_asm};

use runtime::interrupts::{Fault, catch};
use runtime::segments::{self, KERNEL_CODE, KERNEL_CODE_32, KERNEL_DATA};

#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Access {
    LoadDs,
    LoadSs,
    Read,
    Read2,
    Read4,
    Write,
    Write2,
    Write4,
    Push,
    ReadEbp,
    Jump,
    JumpTo,
    ReadBehindTheDescriptor,
}

/// What the code below works with. It knows the offsets.
#[repr(C)]
struct Request {
    what: u64,
    offset: u32,
    selector: u32,
    descriptor: u64,
}

#[unsafe(no_mangle)]
static mut SEGMENTATION_RSP: u64 = 0;

/// Does something with the segment. What a read gives is in the answer.
pub fn access(what: Access, selector: u16, offset: u64) -> Result<u64, Fault> {
    let request = Request {
        what: what as u64,
        offset: offset as u32,
        selector: selector.into(),
        descriptor: segments::gdt_base() + u64::from(selector & !7),
    };
    catch(in_32_bit_code, &raw const request as u64)
}

/// Where the small code segment begins: what runs at offset 0, and a jump out of it at 0x10.
pub fn landing() -> u64 {
    segmentation_landing as *const () as u64
}

/// To compatibility mode and back. The stack and the request are below 4 GiB.
#[unsafe(naked)]
unsafe extern "C" fn in_32_bit_code(request: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "mov [SEGMENTATION_RSP], rsp",
        "mov esi, edi",
        "push {code_32}",
        "lea rax, [rip + segmentation_begin]",
        "push rax",
        "retfq",
        code_32 = const KERNEL_CODE_32,
    )
}

global_asm!(
    r#"
    .code32
segmentation_begin:
    mov edi, [esi + 8]
    mov ecx, [esi + 12]
    mov edx, [esi]
    xor eax, eax
    jmp dword ptr [segmentation_table + edx * 4]

segmentation_load_ds:
    mov ds, ecx
    jmp segmentation_end
segmentation_load_ss:
    mov ss, ecx
    jmp segmentation_end
segmentation_read:
    mov es, ecx
    mov al, es:[edi]
    jmp segmentation_end
segmentation_read2:
    mov es, ecx
    mov ax, es:[edi]
    jmp segmentation_end
segmentation_read4:
    mov es, ecx
    mov eax, es:[edi]
    jmp segmentation_end
segmentation_write:
    mov es, ecx
    mov es:[edi], al
    jmp segmentation_end
segmentation_write2:
    mov es, ecx
    mov es:[edi], ax
    jmp segmentation_end
segmentation_write4:
    mov es, ecx
    mov es:[edi], eax
    jmp segmentation_end
segmentation_push:
    mov ss, ecx
    mov esp, edi
    push eax
    jmp segmentation_end
segmentation_read_ebp:
    mov ss, ecx
    mov ebp, edi
    mov eax, [ebp]
    jmp segmentation_end
segmentation_jump:
    push ecx
    lea eax, segmentation_end
    push eax
    retf
segmentation_jump_to:
    push ecx
    push edi
    retf
segmentation_read_behind:
    mov es, ecx
    mov ebx, [esi + 16]
    mov dword ptr [ebx], 0
    mov dword ptr [ebx + 4], 0
    mov eax, es:[edi]
    jmp segmentation_end

segmentation_end:
    mov ecx, {data}
    mov ss, ecx
    .byte 0xEA
    .long segmentation_back
    .word {code}
    .code64
segmentation_back:
    mov rsp, [SEGMENTATION_RSP]
    mov ecx, {data}
    mov ds, ecx
    mov es, ecx
    pop rbp
    pop rbx
    ret

    // A segment of its own begins here.
    .code32
    .balign 16
segmentation_landing:
    .byte 0x90, 0x90, 0xB8, 1, 0, 0, 0      // at 2: mov eax, 1
    .byte 0xEA                              // at 7: out of it
    .long segmentation_end
    .word {code_32}
    .balign 16, 0x90
    .byte 0xEB, 0x20                        // at 0x10: to 0x32
    .balign 64, 0xF4
    .code64

    .balign 4
segmentation_table:
    .long segmentation_load_ds, segmentation_load_ss
    .long segmentation_read, segmentation_read2, segmentation_read4
    .long segmentation_write, segmentation_write2, segmentation_write4
    .long segmentation_push, segmentation_read_ebp
    .long segmentation_jump, segmentation_jump_to
    .long segmentation_read_behind
    "#,
    data = const KERNEL_DATA,
    code = const KERNEL_CODE,
    code_32 = const KERNEL_CODE_32,
);

unsafe extern "C" {
    fn segmentation_landing();
}
