//! Gates of long mode (7.14), tables that are not mapped or not to be touched (5.6.1), and IRET (vol. 2A).

use core::arch::asm;

use runtime::interrupts::{self, catch};
use runtime::report::{self, Body};
use runtime::segments::{
    self, FIRST_FREE, KERNEL_CODE, KERNEL_CODE_32, KERNEL_DATA, TablePointer, USER_CODE, USER_DATA,
};
use runtime::window::{self, PRESENT, WRITABLE};
use runtime::{print, println};

use crate::bodies::*;
use crate::{NON_CANONICAL, Page, UNMAPPED, print_ended, restore, ring0_top, run3};

pub fn show() {
    types_and_targets();
    stacks();
    tables();
    returns();
}

/// INT 0x81 from ring 0, and #UD, whose errors are external.
fn both(what: &str, prepare: impl Fn(u8)) {
    print!("{what}:");
    for (name, vector, body) in [("int", 0x81u8, int_0x81 as Body), ("#UD", 6, undefined)] {
        prepare(vector);
        let ended = catch(body, 0);
        restore();
        print!(" {name} ");
        print_ended(&ended);
    }
    println!();
}

fn types_and_targets() {
    print!("gates that are taken, by type:");
    for kind in 0..16u8 {
        let stub = interrupts::stub_address(0x81);
        interrupts::set_gate(0x81, KERNEL_CODE, stub, 0x80 | kind, 2);
        if catch(int_0x81, 0).is_err_and(|fault| fault.frame.vector == 0x81) {
            print!(" {kind:#x}");
        }
    }
    restore();
    println!();
    let to = |selector: u16, offset: u64| {
        move |vector| {
            let offset = if offset == 0 {
                interrupts::stub_address(vector)
            } else {
                offset
            };
            interrupts::set_gate(vector, selector, offset, 0x8E, 2);
        }
    };
    both("not present", |vector| {
        interrupts::set_gate(
            vector,
            KERNEL_CODE,
            interrupts::stub_address(vector),
            0x0E,
            2,
        );
    });
    both("a 16-bit gate", |vector| {
        interrupts::set_gate(
            vector,
            KERNEL_CODE,
            interrupts::stub_address(vector),
            0x86,
            2,
        );
    });
    both("to 32-bit code", to(KERNEL_CODE_32, 0));
    both("to data", to(KERNEL_DATA, 0));
    both("to a task", to(segments::TASK, 0));
    both("to null", to(0, 0));
    both("to ring 3 code", to(USER_CODE & !3, 0));
    both("beyond the gdt", to(0x1000, 0));
    both("in no ldt", to(4, 0));
    segments::set_descriptor(FIRST_FREE, 0x00AF_1B00_0000_FFFF);
    both("to code that is not present", |vector| {
        segments::set_descriptor(FIRST_FREE, 0x00AF_1B00_0000_FFFF);
        to(FIRST_FREE, 0)(vector);
    });
    both("to code with both l and d", |vector| {
        segments::set_descriptor(FIRST_FREE, 0x00EF_9B00_0000_FFFF);
        to(FIRST_FREE, 0)(vector);
    });
    both("to a non-canonical address", to(KERNEL_CODE, NON_CANONICAL));
    // Shorter tables still have the exceptions.
    for (what, limit) in [
        ("in the gate", 0x81 * 16 + 14),
        ("with the gate", 0x81 * 16 + 15),
    ] {
        set_idt_limit(limit);
        let ended = catch(int_0x81, 0);
        restore();
        print!("the idt ends {what}: ");
        print_ended(&ended);
        println!();
    }
}

fn set_idt_limit(limit: u16) {
    let pointer = TablePointer {
        limit,
        base: interrupts::table(),
    };
    // SAFETY: the same table, shorter: the exceptions that follow are inside, or the case is about them.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) }
}

/// RSP0 and the interrupt stacks (7.14.2, 7.14.5).
fn stacks() {
    let from3 = |what: &str, prepare: &dyn Fn()| {
        let stub = interrupts::stub_address(6);
        interrupts::set_gate(6, KERNEL_CODE, stub, 0x8E, 0);
        prepare();
        let fault = run3(undefined, 0);
        restore();
        print!("#UD in ring 3, {what}: ");
        report::print_name(&fault);
        println!();
    };
    from3("on rsp0", &|| ());
    from3("rsp0 not canonical", &|| {
        segments::set_ring0_stack(NON_CANONICAL + 64)
    });
    from3("rsp0 not mapped", &|| {
        segments::set_ring0_stack(UNMAPPED + 4096)
    });
    from3("on an interrupt stack, rsp0 bad", &|| {
        segments::set_ring0_stack(UNMAPPED + 4096);
        interrupts::set_gate(6, KERNEL_CODE, interrupts::stub_address(6), 0x8E, 1);
    });
    // The frame is where the stack pointer says, aligned down to 16 bytes, also on an interrupt stack.
    for below in [0u64, 8, 15] {
        segments::set_ist(5, ring0_top() - below);
        interrupts::set_gate(6, KERNEL_CODE, interrupts::stub_address(6), 0x8E, 5);
        // SAFETY: this program's own stack.
        unsafe { ((ring0_top() - 16 - 8) as *mut u64).write_volatile(0) }
        let ended = catch(undefined, 0);
        restore();
        // SAFETY: as above.
        let ss = unsafe {
            ((ring0_top() - if below == 0 { 8 } else { 24 }) as *const u64).read_volatile()
        };
        print!("interrupt stack {below} below: ");
        print_ended(&ended);
        println!(
            ", ss where it should be {}",
            u8::from(ss == u64::from(KERNEL_DATA))
        );
    }
}

static mut TABLE: [Page; 2] = [const { Page([0; 4096]) }; 2];

/// Tables that are not mapped: page faults of supervisor reads, whoever runs.
fn tables() {
    window::open();
    let table = (&raw mut TABLE).cast::<u8>();
    // The IDT's second half is missing, where vector 0x81 and more are.
    // SAFETY: both are 4096 bytes.
    unsafe { core::ptr::copy_nonoverlapping(interrupts::table() as *const u8, table, 4096) }
    let low = window::map(0, table as u64, PRESENT | WRITABLE);
    window::unmap(1);
    let split = low + 4096 - 16 * 0x81;
    // SAFETY: as above: vector 0x81 is the first of the missing page.
    unsafe {
        core::ptr::copy_nonoverlapping(
            interrupts::table() as *const u8,
            table.add(4096 - 16 * 0x81),
            16 * 0x81,
        );
    }
    load_idt(split);
    let ended = catch(int_0x81, 0);
    let user = run3(int_0x81, 0);
    restore();
    print!("idt entry without a page: ");
    print_cr2(&ended);
    print!(", ring 3 ");
    print_cr2(&Err(user));
    println!();
}

fn print_cr2(ended: &Result<u64, interrupts::Fault>) {
    print_ended(ended);
    if let Err(fault) = ended
        && fault.frame.vector == 14
    {
        print!(" cr2 {:#x}", fault.cr2);
    }
}

fn load_idt(base: u64) {
    let pointer = TablePointer { limit: 4095, base };
    // SAFETY: the entries in use are there, or the case is about them.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) }
}

fn frame(rip: u64, cs: u16, flags: u64, rsp: u64, ss: u16) -> [u64; 5] {
    [rip, cs.into(), flags, rsp, ss.into()]
}

/// IRET in 64-bit mode: it always pops RSP and SS.
fn returns() {
    let there = arrived as *const () as u64;
    let back = |what: &str, body: Body, frame: [u64; 5]| {
        let ended = catch(body, &raw const frame as u64);
        restore();
        print!("iret, {what}: ");
        match ended {
            Err(fault) if fault.frame.vector == 6 && fault.frame.rip == there => println!(
                "cs {:#x} ss {:#x} rsp {:#x} flags {:#x}",
                fault.frame.cs,
                fault.frame.ss,
                fault.frame.rsp,
                fault.frame.rflags & !0x1_0000
            ),
            ended => {
                print_ended(&ended);
                println!();
            }
        }
    };
    back(
        "to ring 0",
        iret,
        frame(there, KERNEL_CODE, 2, 0x1238, KERNEL_DATA),
    );
    back(
        "to ring 3",
        iret,
        frame(there, USER_CODE, 2, 0x1238, USER_DATA),
    );
    back(
        "to ring 0, null ss",
        iret,
        frame(there, KERNEL_CODE, 2, 0x1238, 0),
    );
    back(
        "to ring 3, null ss",
        iret,
        frame(there, USER_CODE, 2, 0x1238, 3),
    );
    back(
        "to ring 3, ss of ring 0",
        iret,
        frame(there, USER_CODE, 2, 0x1238, KERNEL_DATA),
    );
    back("to null", iret, frame(there, 0, 2, 0x1238, KERNEL_DATA));
    back(
        "to data",
        iret,
        frame(there, KERNEL_DATA, 2, 0x1238, KERNEL_DATA),
    );
    back(
        "to a non-canonical address",
        iret,
        frame(NON_CANONICAL, KERNEL_CODE, 2, 0x1238, KERNEL_DATA),
    );
    back(
        "to ring 3 at a non-canonical address",
        iret,
        frame(NON_CANONICAL, USER_CODE, 2, 0x1238, USER_DATA),
    );
    back(
        "with a non-canonical rsp",
        iret,
        frame(there, KERNEL_CODE, 2, NON_CANONICAL, KERNEL_DATA),
    );
    back(
        "with nt in the frame",
        iret,
        frame(there, KERNEL_CODE, 0x4002, 0x1238, KERNEL_DATA),
    );
    back(
        "with vm in the frame",
        iret,
        frame(there, KERNEL_CODE, 0x2_0002, 0x1238, KERNEL_DATA),
    );
    back(
        "with all flags but tf, if, nt",
        iret,
        frame(there, KERNEL_CODE, 0x3C_BCD7, 0x1238, KERNEL_DATA),
    );
    segments::set_descriptor(FIRST_FREE, 0x00EF_9B00_0000_FFFF);
    back(
        "to code with both l and d",
        iret,
        frame(there, FIRST_FREE, 2, 0x1238, KERNEL_DATA),
    );
    let narrow = [
        there | u64::from(KERNEL_CODE) << 32,
        2 | 0x1238 << 32,
        KERNEL_DATA.into(),
        0,
        0,
    ];
    back("32-bit operands", iret_32, narrow);
    let ended = catch(iret, UNMAPPED);
    restore();
    print!("iret, from a frame that is not mapped: ");
    print_cr2(&ended);
    println!();
}
