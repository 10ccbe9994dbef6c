//! PUSHF, POPF and IRET: which flags ring 3 sees, and which it may change (SDM vol. 2B POPF,
//! table 4-19).

use runtime::{print, println};

use crate::{pieces, refused, run, run_with};

const CARRY: u64 = 1;
const TRAP: u64 = 1 << 8;
const INTERRUPT: u64 = 1 << 9;
const DIRECTION: u64 = 1 << 10;
const IOPL: u64 = 3 << 12;
const NESTED: u64 = 1 << 14;
const RESUME: u64 = 1 << 16;
const VIRTUAL_8086: u64 = 1 << 17;
const ALIGNMENT: u64 = 1 << 18;
const VIRTUAL_INTERRUPT: u64 = 3 << 19;
const IDENTIFICATION: u64 = 1 << 21;

/// Flags that are always clear. (Bit 1 is always set.)
const RESERVED: u64 = 1 << 3 | 1 << 5 | 1 << 15;

/// All that POPF may be asked for, but a single step and alignment checks.
const EVERYTHING: u64 = CARRY
    | INTERRUPT
    | DIRECTION
    | IOPL
    | NESTED
    | RESUME
    | VIRTUAL_8086
    | VIRTUAL_INTERRUPT
    | IDENTIFICATION
    | 1 << 3
    | 1 << 5;

pub fn show(ring: u64) {
    for rflags in match ring {
        0 => &[2][..],
        _ => &[2, 2 | IOPL, 2 | INTERRUPT, 2 | INTERRUPT | IOPL],
    } {
        if ring == 3 {
            print!("  flags {rflags:#x}:");
        } else {
            print!("  flags:");
        }
        for (name, code, argument) in [
            ("pushf", pieces::pushf as pieces::Code, 0),
            ("pushf16", pieces::pushf16, 0),
            ("popf of 1s", pieces::popf, EVERYTHING & !NESTED),
            ("with nt", pieces::popf, EVERYTHING),
            ("of 0s", pieces::popf, 0),
            ("of reserved", pieces::popf, RESERVED),
            ("popf16 of 1s", pieces::popf16, EVERYTHING & !NESTED),
            (
                "iret of 1s",
                pieces::iret,
                EVERYTHING & !NESTED & !VIRTUAL_8086 & !RESUME,
            ),
            ("of 0s", pieces::iret, 0),
        ] {
            print!(" {name} ");
            let fault = run_with(ring, code, *rflags, argument);
            if !refused(&fault) {
                print!("{:#x}", fault.frame.rax);
            }
        }
        println!();
    }
    // A single step is the guest's own affair.
    let fault = run(ring, pieces::popf, 2 | TRAP);
    print!("  popf of tf: ");
    if !refused(&fault) {
        print!("nothing");
    }
    println!(", flags {:#x}", fault.frame.rflags & (TRAP | ALIGNMENT));
}
