//! Events in protected mode: gates of all kinds, the stacks behind them, and what is wrong with either
//! (SDM vol. 3A 7.11 to 7.13, vol. 2A INT n).

use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    e_int: [] "int 0x50";
    e_ud: [] "lock nop";
    e_report_cs: [] "mov ebx, cs";
}

const VECTOR: u8 = 0x50;

pub fn show() {
    frames();
    refused_gates();
    refused_stacks();
    conforming();
}

fn int_from(ring: u32, flags: u32) -> (Outcome, Code) {
    let code = Code::new(e_int);
    let mut state = match ring {
        0 => State::ring0(code),
        _ => State::ring3(code),
    };
    state.eflags |= flags;
    (run(&state), code)
}

/// What is pushed, where, and which flags the handler starts with.
fn frames() {
    for (what, access) in [
        ("interrupt gate", 0xEEu8),
        ("trap gate", 0xEF),
        ("interrupt gate of 16 bits", 0xE6),
        ("trap gate of 16 bits", 0xE7),
    ] {
        for ring in [0, 3] {
            let wide = access & 8 != 0;
            let (selector, offset) = if wide {
                (CODE, stub(VECTOR))
            } else {
                (STUBS, stub(VECTOR) - stubs())
            };
            set_gate(VECTOR, gate(access, selector, offset, 0));
            // IOPL 3, NT, direction, all arithmetic flags; IF, which nothing can make use of.
            let (outcome, code) = int_from(ring, 0x7ED5);
            let frame = frame_of(&outcome, wide);
            let top = if ring == 0 { code_top() } else { ring0_top() };
            let words = if ring == 0 { 3 } else { 5 };
            let bytes = top - (outcome.handler_esp + FRAME_AT);
            print!(
                "{what} from ring {ring}: {bytes} bytes, eip {} cs {:#x} flags {:#x}",
                u8::from(frame[0] == code.after & mask(wide)),
                frame[1] & 0xFFFF,
                frame[2]
            );
            if words == 5 {
                print!(
                    " esp {} ss {:#x}",
                    u8::from(frame[3] == code_top() & mask(wide)),
                    frame[4] & 0xFFFF
                );
            }
            println!(
                ", handler ss {:#x} flags {:#x}",
                outcome.handler_ss, outcome.handler_flags
            );
        }
    }
    reset();
    // The descriptor of the new stack is marked as used, and its data segments are the old ones.
    set_descriptor(DATA, descriptor(DATA) & !(1 << 40));
    let (outcome, _) = int_from(3, 0);
    println!(
        "int from ring 3: ds {:#x}, stack descriptor accessed {}",
        outcome.ds & 0xFFFF,
        descriptor(DATA) >> 40 & 1
    );
    reset();
}

/// Where the CPU's frame begins behind what the stub pushed: 4 segments, 8 registers, vector, error code.
const FRAME_AT: u32 = 14 * 4;

fn mask(wide: bool) -> u32 {
    if wide { u32::MAX } else { 0xFFFF }
}

/// The CPU's words: dwords, or words behind the stub's two dwords.
fn frame_of(outcome: &Outcome, wide: bool) -> [u32; 5] {
    let raw = [
        outcome.eip,
        outcome.cs,
        outcome.eflags,
        outcome.esp,
        outcome.ss,
    ];
    if wide {
        return raw;
    }
    core::array::from_fn(|index| raw[index / 2] >> (16 * (index % 2)) & 0xFFFF)
}

/// A case: an INT 0x50 from a ring through what the closure has prepared.
fn int(what: &str, ring: u32, prepare: impl FnOnce()) {
    reset();
    prepare();
    let (outcome, code) = int_from(ring, 0);
    print!("int, {what}: ");
    describe(&outcome, code);
    println!();
    reset();
}

fn refused_gates() {
    let g = |access: u8, selector: u16| set_gate(VECTOR, gate(access, selector, stub(VECTOR), 0));
    int("gate not present", 0, || g(0x0E, CODE));
    int("ring 3, gate not present", 3, || g(0x6E, CODE));
    int("ring 3, gate of ring 0", 3, || g(0x8E, CODE));
    int("ring 3, gate of ring 0, not present", 3, || g(0x0E, CODE));
    int("ring 3, gate of ring 2", 3, || g(0xCE, CODE));
    for (what, access) in [
        ("call gate", 0x8C),
        ("call gate of 16 bits", 0x84),
        ("available task", 0x89),
        ("ldt", 0x82),
        ("zero", 0x80),
        ("data", 0x92),
        ("code", 0x9A),
    ] {
        int(what, 0, || g(access, CODE));
    }
    int("gate to null", 0, || g(0x8E, 0));
    int("gate to null with rpl 3", 0, || g(0x8E, 3));
    int("gate beyond the gdt", 0, || g(0x8E, 0x1000));
    int("gate to an ldt that is not there", 0, || g(0x8E, 0xC));
    int("gate to data", 0, || g(0x8E, DATA));
    int("gate to a task's segment", 0, || g(0x8E, TASK));
    int("gate to ring 3 code", 0, || g(0x8E, USER_CODE & !3));
    int("gate to ring 1 code", 0, || g(0x8E, RING1_CODE & !3));
    int("gate to code that is not present", 0, || {
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x1B, 0xC));
        g(0x8E, FREE);
    });
    int("gate to execute-only code", 0, || {
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x98, 0xC));
        g(0x8E, FREE);
    });
    int("gate's selector with rpl 3", 0, || g(0x8E, CODE | 3));
    int("offset beyond the code's limit", 0, || {
        set_descriptor(FREE, segment(0, 0xFFFF, 0x9B, 4));
        g(0x8E, FREE);
    });
    int("idt ends in the gate", 0, || {
        set_idt_limit(u16::from(VECTOR) * 8 + 6)
    });
    int("idt ends with the gate", 0, || {
        set_idt_limit(u16::from(VECTOR) * 8 + 7)
    });
    int("idt ends before it", 3, || {
        set_idt_limit(u16::from(VECTOR) * 8 - 1)
    });
    // An exception's delivery: EXT is set, and the privilege level of the gate does not count.
    let exception = |what: &str, piece: Piece, prepare: &dyn Fn()| {
        reset();
        prepare();
        show3(what, piece, |_| ());
        reset();
    };
    let g6 = |access: u8, selector: u16| set_gate(6, gate(access, selector, stub(6), 0));
    exception("#UD, gate not present", e_ud, &|| g6(0x0E, CODE));
    exception("#UD, gate of ring 0", e_ud, &|| g6(0x8E, CODE));
    exception("#UD, gate to null", e_ud, &|| g6(0x8E, 0));
    exception("#UD, gate to data", e_ud, &|| g6(0x8E, DATA));
    exception("#UD, call gate", e_ud, &|| g6(0x8C, CODE));
    exception("#UD, gate beyond the gdt", e_ud, &|| g6(0x8E, 0x1000));
    exception("#UD, offset beyond the code's limit", e_ud, &|| {
        set_descriptor(FREE, segment(0, 0xFFFF, 0x9B, 4));
        g6(0x8E, FREE);
    });
}

/// Stacks that the task-state segment names, for a handler in ring 1: the exceptions that follow go to ring 0.
fn refused_stacks() {
    fn to_ring1(vector: u8) {
        set_gate(vector, gate(0xEE, RING1_CODE, stub(vector), 0));
    }
    type Prepare = &'static dyn Fn();
    let cases: [(&str, Prepare); 12] = [
        ("null", &|| task(0).words[4] = 0),
        ("null with rpl 1", &|| task(0).words[4] = 1),
        ("beyond the gdt", &|| task(0).words[4] = 0x1001),
        ("in no ldt", &|| task(0).words[4] = 0xD),
        ("wrong rpl", &|| {
            task(0).words[4] = u32::from(RING1_DATA & !3)
        }),
        ("wrong dpl", &|| task(0).words[4] = u32::from(DATA | 1)),
        ("read-only", &|| {
            set_descriptor(FREE, segment(0, 0xF_FFFF, 0xB1, 0xC));
            task(0).words[4] = u32::from(FREE | 1);
        }),
        ("code", &|| task(0).words[4] = RING1_CODE.into()),
        ("not present", &|| {
            set_descriptor(FREE, segment(0, 0xF_FFFF, 0x33, 0xC));
            task(0).words[4] = u32::from(FREE | 1);
        }),
        ("no room", &|| {
            set_descriptor(FREE, segment(ring1_top(), 0xFF, 0xB3, 4));
            task(0).words[4] = u32::from(FREE | 1);
            task(0).words[3] = 19;
        }),
        ("above its limit", &|| {
            set_descriptor(FREE, segment(ring1_top(), 0xFF, 0xB3, 4));
            task(0).words[4] = u32::from(FREE | 1);
            task(0).words[3] = 0x104;
        }),
        ("behind the task's limit", &|| {
            let base = task(0) as *const Task as u32;
            // The exception that follows takes ring 0's stack, which is still inside.
            set_descriptor(TASK, segment(base, 0x10, 0x89, 0));
        }),
    ];
    for (what, prepare) in cases {
        reset();
        to_ring1(VECTOR);
        prepare();
        let (outcome, code) = int_from(3, 0);
        print!("stack of ring 1, {what}: int ");
        describe(&outcome, code);
        reset();
        to_ring1(6);
        prepare();
        let code = Code::new(e_ud);
        print!(", #UD ");
        describe(&run(&State::ring3(code)), code);
        println!();
    }
    reset();
}

/// A handler in conforming code runs in the ring it interrupts (7.12.1.1), on its stack.
fn conforming() {
    set_descriptor(FREE, segment(0, 0xF_FFFF, 0x9F, 0xC));
    let handler = Code::new(e_report_cs);
    set_gate(VECTOR, gate(0xEE, FREE, handler.start, 0));
    let (outcome, _) = int_from(3, 0);
    println!(
        "handler in conforming code: cs {:#x}, {} bytes pushed",
        outcome.ebx & 0xFFFF,
        code_top() - outcome.esp
    );
    reset();
}
