//! An exception while another is being delivered (table 7-5): contributory ones and page faults make a double fault,
//! benign ones are passed over.

use runtime::interrupts::{self, catch};
use runtime::report::{self, Body};
use runtime::segments::{self, FIRST_FREE, KERNEL_CODE};
use runtime::{cpu, print, println};

use crate::bodies::*;
use crate::{NON_CANONICAL, UNMAPPED, print_ended, restore, run3};

/// What is wrong with the first exception's gate.
#[derive(Clone, Copy)]
enum Second {
    NotPresent,
    GeneralProtection,
    Stack,
    PageFault,
    TaskState,
}

const SECONDS: [(&str, Second); 5] = [
    ("#NP", Second::NotPresent),
    ("#GP", Second::GeneralProtection),
    ("#SS", Second::Stack),
    ("#PF", Second::PageFault),
    ("#TS", Second::TaskState),
];

fn spoil(vector: u8, second: Second) {
    let stub = interrupts::stub_address(vector);
    match second {
        Second::NotPresent => interrupts::set_gate(vector, KERNEL_CODE, stub, 0x6E, 0),
        Second::GeneralProtection => interrupts::set_gate(vector, 0x1000, stub, 0xEE, 0),
        Second::Stack => {
            segments::set_ist(5, NON_CANONICAL + 64);
            interrupts::set_gate(vector, KERNEL_CODE, stub, 0xEE, 5);
        }
        Second::PageFault => {
            segments::set_ist(5, UNMAPPED + 4096);
            interrupts::set_gate(vector, KERNEL_CODE, stub, 0xEE, 5);
        }
        // The stack pointer's field is behind the limit. The other gates use lower ones.
        Second::TaskState => {
            interrupts::set_gate(vector, KERNEL_CODE, stub, 0xEE, 7);
            segments::set_task_limit(36 + 6 * 8 - 1);
        }
    }
}

pub fn show() {
    println!("an exception, and what its delivery raises:");
    segments::set_descriptor(FIRST_FREE, 0x00CF_1300_0000_FFFF);
    let firsts: [(&str, u8, Body, bool); 9] = [
        ("#DE", 0, divide, false),
        ("#NP", 11, not_present, false),
        ("#SS", 12, stack_fault, false),
        ("#GP", 13, general_protection, false),
        ("#PF", 14, page_fault, false),
        ("#UD", 6, undefined, false),
        ("#DB", 1, debug, false),
        ("int3", 3, breakpoint, false),
        ("#AC", 17, misaligned, true),
    ];
    for (name, vector, body, user) in firsts {
        print!("{name}:");
        for (second_name, second) in SECONDS {
            // The second must not go through the gate that was spoilt for the first.
            let same = second_name == name;
            spoil(vector, second);
            cpu::write_cr0(cpu::read_cr0() | if user { cpu::cr0::AM } else { 0 });
            let ended = if user {
                Err(run3(body, 0))
            } else {
                catch(body, 0)
            };
            cpu::write_cr0(cpu::read_cr0() & !cpu::cr0::AM);
            restore();
            segments::set_descriptor(FIRST_FREE, 0x00CF_1300_0000_FFFF);
            print!(" {second_name}{} ", if same { " again" } else { "" });
            print_ended(&ended);
        }
        println!();
    }
    // An INT n is no exception: what its delivery raises is alone, and not external.
    print!("int 0x81:");
    for (name, second) in SECONDS {
        spoil(0x81, second);
        let ended = catch(int_0x81, 0);
        restore();
        print!(" {name} ");
        print_ended(&ended);
    }
    println!();
    // CR2 is the last page fault's.
    spoil(14, Second::PageFault);
    let ended = catch(page_fault, 0);
    restore();
    if let Err(fault) = ended {
        report::print_name(&fault);
        println!(" of two page faults: cr2 {:#x}", fault.cr2);
    }
}
