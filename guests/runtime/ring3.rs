//! Running code in ring 3, until the first interrupt that has no handler.

use core::arch::naked_asm;

use crate::cpu;
use crate::interrupts::{Fault, catch};
use crate::segments::{USER_CODE, USER_DATA};

/// What the registers are when the code starts.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Start {
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    /// RDI.
    pub argument: u64,
}

impl Start {
    /// 64-bit code, interrupts off, I/O privilege level 0.
    pub fn new(rip: u64, rsp: u64, argument: u64) -> Start {
        Start {
            rip,
            cs: u64::from(USER_CODE),
            rflags: 2,
            rsp,
            ss: u64::from(USER_DATA),
            argument,
        }
    }
}

/// Lets ring 3 use the first GiB of memory: code and stacks of the program included.
pub fn open_memory() {
    const USER: u64 = 1 << 2;
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    let pml4 = (cpu::read_cr3() & ADDRESS) as *mut u64;
    // SAFETY: the tables are the start-up code's, identity-mapped, and in use: each change only
    // adds a permission.
    unsafe {
        let pointers = (*pml4 & ADDRESS) as *mut u64;
        let directory = (*pointers & ADDRESS) as *mut u64;
        *pml4 |= USER;
        *pointers |= USER;
        for index in 0..512 {
            *directory.add(index) |= USER;
        }
    }
    cpu::write_cr3(cpu::read_cr3());
}

/// Runs ring 3 code. It cannot end but by an exception or an INT.
pub fn run(start: &Start) -> Fault {
    match catch(enter, start as *const Start as u64) {
        Err(fault) => fault,
        Ok(_) => unreachable!("IRET came back"),
    }
}

#[unsafe(naked)]
unsafe extern "C" fn enter(start: u64) -> u64 {
    naked_asm!(
        "push [rdi + 32]",
        "push [rdi + 24]",
        "push [rdi + 16]",
        "push [rdi + 8]",
        "push [rdi]",
        "mov rdi, [rdi + 40]",
        "iretq",
    )
}
