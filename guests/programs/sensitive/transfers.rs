//! CALL, JMP, RET and INT n: the guest's own tables say where they go (SDM vol. 2A CALL, INT n; vol.
//! 2B JMP, RET; the error codes are of vol. 3A 7.13).

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame};
use runtime::segments::{self, KERNEL_CODE, USER_CODE};
use runtime::{print, println};

use crate::{LOCAL_CODE, LOCAL_DATA, TASK, pieces, refused, run};

#[repr(C, packed)]
struct FarPointer {
    offset: u32,
    selector: u16,
}

const SOFTWARE: u8 = 0x31;

static CS_SEEN: AtomicU64 = AtomicU64::new(0);

pub fn show(ring: u64) {
    let own = if ring == 0 { KERNEL_CODE } else { USER_CODE };
    for (name, code) in [
        ("call", pieces::far_call as pieces::Code),
        ("jmp", pieces::far_jump),
    ] {
        print!("  far {name}:");
        for (what, selector) in [
            ("own", own),
            ("local", LOCAL_CODE),
            ("local data", LOCAL_DATA),
            ("null", 0),
        ] {
            transfer(ring, what, code, selector);
        }
        println!();
    }
    print!("  far ret:");
    for (what, selector) in [
        ("own", own),
        (
            "other ring",
            if ring == 0 {
                USER_CODE & !3
            } else {
                KERNEL_CODE
            },
        ),
        ("local data", LOCAL_DATA),
    ] {
        let fault = run(ring, pieces::far_return, selector.into());
        print!(" {what} ");
        if !refused(&fault) {
            print!("{:#x}+{}", fault.frame.rax, fault.frame.rdx);
        }
    }
    println!();
}

/// A far CALL or JMP, and its end: ` NAME CS+BYTES PUSHED`.
fn transfer(ring: u64, what: &str, code: pieces::Code, selector: u16) {
    let pointer = FarPointer {
        offset: pieces::far_target as *const () as u32,
        selector,
    };
    let fault = run(ring, code, &raw const pointer as u64);
    print!(" {what} ");
    if !refused(&fault) {
        print!("{:#x}+{}", fault.frame.rax, fault.frame.rdx);
    }
}

/// There are no task switches in long mode.
pub fn to_a_task(ring: u64) {
    print!("to a task in ring {ring}:");
    transfer(ring, "call", pieces::far_call, TASK);
    transfer(ring, "jmp", pieces::far_jump, TASK);
    println!();
}

/// INT n and INT3: the gate's privilege level, the IDT's limit.
pub fn interrupts(ring: u64) {
    print!("int in ring {ring}:");
    interrupts::set_handler(SOFTWARE, |frame: &mut TrapFrame| {
        CS_SEEN.store(frame.cs, Relaxed);
    });
    for (what, access) in [("gate of ring 0", 0x8Eu8), ("gate of ring 3", 0xEE)] {
        CS_SEEN.store(0, Relaxed);
        interrupts::set_gate(
            SOFTWARE,
            KERNEL_CODE,
            interrupts::stub_address(SOFTWARE),
            access,
            segments::IST_INTERRUPT,
        );
        let fault = run(ring, pieces::int_0x31, 0);
        print!(" {what} ");
        if !refused(&fault) {
            print!(
                "from {:#x}, back {:#x}",
                CS_SEEN.load(Relaxed),
                fault.frame.rax
            );
        }
    }
    interrupts::clear_handler(SOFTWARE);
    println!();
    print!("int in ring {ring}:");
    for (what, code) in [
        ("last gate", pieces::int_last as pieces::Code),
        ("half a gate", pieces::int_half),
        ("beyond the idt", pieces::int_beyond),
        ("int3", pieces::int3),
    ] {
        print!(" {what} ");
        refused(&run(ring, code, 0));
    }
    println!();
}
