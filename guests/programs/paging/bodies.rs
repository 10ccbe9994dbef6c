//! The accesses: functions of an address (RDI).

use core::arch::{global_asm, naked_asm};

macro_rules! accesses {
    ($($name:ident: $($line:literal),*;)*) => {
        $(#[unsafe(naked)]
        pub unsafe extern "C" fn $name(address: u64) -> u64 {
            naked_asm!($($line,)* "ret")
        })*
    };
}

accesses! {
    read: "movzx eax, byte ptr [rdi]";
    write: "mov byte ptr [rdi], 0xC3";
    fetch: "call rdi";
    // The same with RFLAGS.AC set. POPF, because STAC needs SMAP.
    read_with_ac: "pushfq", "or qword ptr [rsp], 0x40000", "popfq", "movzx eax, byte ptr [rdi]";
    write_with_ac: "pushfq", "or qword ptr [rsp], 0x40000", "popfq", "mov byte ptr [rdi], 0xC3";
    fetch_with_ac: "pushfq", "or qword ptr [rsp], 0x40000", "popfq", "call rdi";
}

global_asm!(
    r#"
    .balign 4096
paging_user_page:
    mov al, [rdi]
    int 0x30
    .balign 16
    mov byte ptr [rdi], 0xC3
    int 0x30
    .balign 16
    call rdi
    int 0x30
    .balign 4096
    "#
);

pub const USER_READ: u64 = 0x00;
pub const USER_WRITE: u64 = 0x10;
pub const USER_FETCH: u64 = 0x20;

pub fn user_page() -> *const u8 {
    unsafe extern "C" {
        static paging_user_page: u8;
    }
    &raw const paging_user_page
}
