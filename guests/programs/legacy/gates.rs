//! Call gates of 16 and 32 bits with parameters, and the ways back (SDM vol. 3A 6.8.3 to 6.8.6, vol. 2A CALL,
//! IRET, JMP, vol. 2B RET).

use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    // Through FREE_B, with rpl 3.
    g_call: ["push 0x33333333", "push 0x22222222", "push 0x11111111"] ".byte 0x9A\n.long 0\n.word 0x83";
    g_jump: [] ".byte 0xEA\n.long 0\n.word 0x83";
    g_call16: ["push 0x33333333", "push 0x22222222", "push 0x11111111"] ".byte 0x66, 0x9A, 0, 0, 0x83, 0";
    // Where the gates lead: in ring 1 or 0, or where they came from.
    g_target: ["mov ebx, cs", "mov eax, ss", "mov esi, esp"] "nop";
    g_return: ["mov ebx, cs"] "retf";
    g_return_12: ["mov ebx, cs"] "retf 12";
    g_iret: [] "iretd";
    g_arrived: ["mov ebx, cs", "mov eax, ss", "mov ecx, ds", "mov edx, es", "mov esi, fs", "mov edi, gs"] "nop";
    g_flags: ["pushfd", "pop eax"] "nop";
}

pub fn show() {
    through();
    refused();
    refused_stacks();
    back();
    flags_of_iret();
}

/// The ring 1 gate with so many parameters to `target`.
fn open(access: u8, selector: u16, target: u32, count: u8) {
    set_descriptor(FREE_B, gate(access, selector, target, count));
}

fn through() {
    let target = Code::new(g_target);
    for (what, selector, top) in [
        ("ring 1", RING1_CODE & !3, ring1_top()),
        ("ring 0", CODE, ring0_top()),
    ] {
        for count in [0u8, 3] {
            open(0xEC, selector, target.start, count);
            let outcome = run(&State::ring3(Code::new(g_call)));
            let used = top - outcome.esi;
            print!(
                "call gate to {what}, {count} parameters: cs {:#x} ss {:#x}, {used} bytes:",
                outcome.ebx & 0xFFFF,
                outcome.eax & 0xFFFF
            );
            // SAFETY: what the call pushed.
            let word =
                |index: u32| unsafe { (outcome.esi as *const u32).add(index as usize).read() };
            print!(" eip {}", u8::from(word(0) == Code::new(g_call).after));
            print!(" {:#x}", word(1) & 0xFFFF);
            for index in 0..u32::from(count) {
                print!(" {:#x}", word(2 + index));
            }
            let esp = word(2 + u32::from(count));
            println!(
                " esp {} {:#x}",
                u8::from(esp == code_top() - 12),
                word(3 + u32::from(count)) & 0xFFFF
            );
        }
    }
    // A gate of 16 bits pushes words, and copies words.
    set_descriptor(FREE, segment(target.start, 0xFFFF, 0xBB, 4));
    open(0xE4, FREE, 0, 2);
    let outcome = run(&State::ring3(Code::new(g_call)));
    print!(
        "call gate of 16 bits, 2 parameters: {} bytes:",
        ring1_top() - outcome.esi
    );
    for index in 1..6 {
        // SAFETY: what the call pushed.
        let word = unsafe { (outcome.esi as *const u16).add(index).read() };
        match index {
            4 => print!(
                " sp {}",
                u8::from(u32::from(word) == code_top() - 12 & 0xFFFF)
            ),
            _ => print!(" {word:#x}"),
        }
    }
    println!();
    // The largest count.
    open(0xEC, RING1_CODE & !3, target.start, 31);
    let outcome = run(&State::ring3(Code::new(g_call)));
    println!(
        "call gate, 31 parameters: {} bytes",
        ring1_top() - outcome.esi
    );
    // A gate to the same ring, or to conforming code, stays on the stack and copies nothing.
    for (what, access) in [("ring 3 code", 0xFBu8), ("conforming code of ring 0", 0x9F)] {
        set_descriptor(FREE, segment(0, 0xF_FFFF, access, 0xC));
        for (name, piece) in [("call", g_call as Piece), ("jump", g_jump)] {
            open(0xEC, FREE, target.start, 3);
            let outcome = run(&State::ring3(Code::new(piece)));
            println!(
                "{name} through a gate to {what}: cs {:#x}, {} bytes",
                outcome.ebx & 0xFFFF,
                code_top() - outcome.esi
            );
        }
    }
    // The operand's size is not asked where there is a gate.
    open(0xEC, RING1_CODE & !3, target.start, 0);
    let outcome = run(&State::ring3(Code::new(g_call16)));
    println!(
        "call with a 16-bit operand through a 32-bit gate: {} bytes",
        ring1_top() - outcome.esi
    );
    reset();
}

fn call(what: &str, piece: Piece, prepare: impl FnOnce(u32)) {
    reset();
    prepare(Code::new(g_target).start);
    let code = Code::new(piece);
    let outcome = run(&State::ring3(code));
    print!("{what}: ");
    if outcome.eip == Code::new(g_target).after {
        print!("taken");
    } else {
        describe(&outcome, code);
    }
    println!();
    reset();
}

fn refused() {
    call("call, gate of ring 2", g_call, |to| open(0xCC, CODE, to, 0));
    call("call, gate not present", g_call, |to| {
        open(0x6C, CODE, to, 0)
    });
    call("call, gate of ring 2 that is not present", g_call, |to| {
        open(0x4C, CODE, to, 0)
    });
    call("call, gate to null", g_call, |to| open(0xEC, 3, to, 0));
    call("call, gate beyond the gdt", g_call, |to| {
        open(0xEC, 0x1000, to, 0)
    });
    call("call, gate to data", g_call, |to| open(0xEC, DATA, to, 0));
    call("call, gate to a gate", g_call, |to| {
        open(0xEC, FREE_B, to, 0)
    });
    call("call, gate to a task's segment", g_call, |to| {
        open(0xEC, TASK_B, to, 0)
    });
    call("call, gate to code that is not present", g_call, |to| {
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x1B, 0xC));
        open(0xEC, FREE, to, 0);
    });
    call("call, offset beyond the code's limit", g_call, |to| {
        set_descriptor(FREE, segment(0, 0xFFFF, 0x9B, 4));
        open(0xEC, FREE, to, 0);
    });
    call("call, an interrupt gate", g_call, |to| {
        open(0xEE, CODE, to, 0)
    });
    call("call, an ldt", g_call, |_| {
        set_descriptor(FREE_B, descriptor(LDT))
    });
    call("jump, gate to ring 0", g_jump, |to| open(0xEC, CODE, to, 0));
    call("call, not through a gate, ring 0 code", g_call, |_| {
        set_descriptor(FREE_B, descriptor(CODE));
    });
}

/// The inner stack of a call gate: as of an interrupt, and EXT is never set.
fn refused_stacks() {
    let stack = |what: &str, prepare: &dyn Fn()| {
        call(what, g_call, |to| {
            open(0xEC, RING1_CODE & !3, to, 3);
            prepare();
        });
    };
    let ss1 = |selector: u16| task(0).words[4] = selector.into();
    stack("call, stack null", &|| ss1(0));
    stack("call, stack beyond the gdt", &|| ss1(0x1001));
    stack("call, stack of wrong rpl", &|| ss1(RING1_DATA & !3));
    stack("call, stack of wrong dpl", &|| ss1(DATA | 1));
    stack("call, stack read-only", &|| {
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0xB1, 0xC));
        ss1(FREE | 1);
    });
    stack("call, stack not present", &|| {
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x33, 0xC));
        ss1(FREE | 1);
    });
    stack("call, stack without room", &|| {
        set_descriptor(FREE, segment(ring1_top(), 0xFF, 0xB3, 4));
        ss1(FREE | 1);
        task(0).words[3] = 27;
    });
    stack("call, stack with just enough", &|| {
        set_descriptor(FREE, segment(ring1_top(), 0xFF, 0xB3, 4));
        ss1(FREE | 1);
        task(0).words[3] = 28;
    });
    stack("call, stack behind the task's limit", &|| {
        set_descriptor(TASK, segment(task(0) as *const Task as u32, 0x10, 0x89, 0));
    });
}

/// RETF and IRET to outer rings, from ring 0.
fn back() {
    let code = Code::new(g_arrived);
    let esp = code_top() - 64;
    let frame = |values: &[u32]| {
        for (index, &value) in values.iter().enumerate() {
            // SAFETY: inside the stack.
            unsafe { (esp as *mut u32).add(index).write_volatile(value) }
        }
    };
    // Data segments of inner rings do not survive, those of conforming code do.
    set_descriptor(FREE, segment(0, 0xF_FFFF, 0x9F, 0xC));
    frame(&[
        code.start,
        USER_CODE.into(),
        7,
        8,
        9,
        0x5000,
        USER_DATA.into(),
    ]);
    for (what, piece, first) in [
        ("retf 12", g_return_12 as Piece, 2usize),
        ("iret", g_iret, 0),
    ] {
        if first == 0 {
            frame(&[code.start, USER_CODE.into(), 2, 0x5000, USER_DATA.into()]);
        }
        let mut state = State::ring0(Code::new(piece));
        state.esp = esp;
        state.ds = DATA.into();
        state.es = USER_DATA.into();
        state.fs = FREE.into();
        state.gs = RING1_DATA.into();
        let outcome = run(&state);
        println!(
            "{what} to ring 3: cs {:#x} ss {:#x} esp {:#x}, ds {:#x} es {:#x} fs {:#x} gs {:#x}",
            outcome.ebx & 0xFFFF,
            outcome.eax & 0xFFFF,
            outcome.esp,
            outcome.ecx & 0xFFFF,
            outcome.edx & 0xFFFF,
            outcome.esi & 0xFFFF,
            outcome.edi & 0xFFFF
        );
    }
    reset();
    let ways: [(&str, Piece, bool); 2] = [("retf", g_return, false), ("iret", g_iret, true)];
    for (what, piece, with_flags) in ways {
        let to = |name: &str, cs: u16, eip: u32, ss: u16| {
            let end = [0x5000, u32::from(ss)];
            if with_flags {
                frame(&[eip, cs.into(), 2, end[0], end[1]]);
            } else {
                frame(&[eip, cs.into(), end[0], end[1]]);
            }
            print!("{what} from ring 0, ");
            show0(name, piece, |state| state.esp = esp);
        };
        to("cs null", 0, 0, USER_DATA);
        to("cs beyond the gdt", 0x1003, 0, USER_DATA);
        to("cs data", USER_DATA, 0, USER_DATA);
        to("cs a gate", 3 | TASK_B, 0, USER_DATA);
        to("cs of ring 3 with rpl 0", USER_CODE & !3, 0, USER_DATA);
        to("cs of ring 0 with rpl 3", CODE | 3, 0, USER_DATA);
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x7B, 0xC));
        to("cs not present", FREE | 3, 0, USER_DATA);
        set_descriptor(FREE, segment(0, 0xFFF, 0xFB, 4));
        to("eip beyond the limit", FREE | 3, 0x1000, USER_DATA);
        to("ss null", USER_CODE, code.start, 0);
        to("ss null with rpl 3", USER_CODE, code.start, 3);
        to("ss of wrong rpl", USER_CODE, code.start, USER_DATA & !3);
        to("ss of wrong dpl", USER_CODE, code.start, DATA | 3);
        to("ss beyond the gdt", USER_CODE, code.start, 0x1003);
        to("ss code", USER_CODE, code.start, USER_CODE);
        set_descriptor(FREE, segment(0, 0xF_FFFF, 0x73, 0xC));
        to("ss not present", USER_CODE, code.start, FREE | 3);
        reset();
    }
}

/// Which flags IRET takes from its frame, by ring and IOPL (SDM vol. 2A IRET): 32-bit operands, from 0 and from all
/// ones but TF, NT, VM.
fn flags_of_iret() {
    let code = Code::new(g_flags);
    for (ring, iopl) in [(0u32, 0u32), (3, 0), (3, 3)] {
        let esp = code_top() - 64;
        let mut got = [0; 2];
        for (value, result) in [0x3C_BED7u32, 2].into_iter().zip(&mut got) {
            let mut state = match ring {
                0 => State::ring0(Code::new(g_iret)),
                _ => State::ring3(Code::new(g_iret)),
            };
            state.esp = esp;
            state.eflags |= iopl << 12;
            for (index, word) in [code.start, state.cs, value].into_iter().enumerate() {
                // SAFETY: inside the stack.
                unsafe { (esp as *mut u32).add(index).write_volatile(word) }
            }
            *result = run(&state).eax;
        }
        println!(
            "iret in ring {ring}, iopl {iopl}: flags {:#x} and {:#x}",
            got[0], got[1]
        );
    }
}
