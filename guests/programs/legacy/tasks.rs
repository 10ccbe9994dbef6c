//! Hardware task switches: what is saved and loaded, who may switch, and in which task an exception falls that the
//! switch finds (SDM vol. 3A 9.2 to 9.7, table 9-1; vol. 2A IRET, INT n).

use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    t_jump: [] ".byte 0xEA\n.long 0\n.word 0x38";
    t_call: [] ".byte 0x9A\n.long 0\n.word 0x38";
    t_jump16: [] ".byte 0xEA\n.long 0\n.word 0x40";
    t_call16: [] ".byte 0x9A\n.long 0\n.word 0x40";
    t_jump_gate: [] ".byte 0xEA\n.long 0\n.word 0x83"; // FREE_B, with rpl 3
    t_int: [] "int 0x50";
    t_iret: [] "iretd";
    t_gp: [] "mov eax, cs:[0xFFFFFFFF]";
    t_push: ["mov esp, 2"] "push eax";
    t_hlt: [] "hlt";
    t_arrived: [] "nop";
}

pub fn show() {
    ways();
    sixteen_bits();
    virtual_task();
    debug_trap();
    refused();
    refused_by_iret();
    broken_tasks();
    double_fault();
}

const VECTOR: u8 = 0x50;
const NT: u32 = 1 << 14;

/// Task B: at [`t_arrived`], with a number in each register.
fn prepare(ring: u8) {
    reset();
    let words = &mut task(1).words;
    words[8] = Code::new(t_arrived).start;
    words[9] = 0xCD7;
    for (index, word) in words[10..18].iter_mut().enumerate() {
        *word = 0x1111_1111 * (index as u32 + 1);
    }
    words[14] = ring1_top();
    if ring == 3 {
        words[19] = USER_CODE.into();
        for segment in [18, 20, 21, 22, 23] {
            words[segment] = USER_DATA.into();
        }
    }
}

fn busy(selector: u16) -> u64 {
    descriptor(selector) >> 41 & 1
}

/// JMP, CALL, a task gate in the IDT with and without an error code, IRET with NT.
fn ways() {
    for (what, piece) in [
        ("jmp", t_jump as Piece),
        ("jmp through a task gate", t_jump_gate),
        ("call", t_call),
        ("int through a task gate", t_int),
        ("#GP through a task gate", t_gp),
        ("iret", t_iret),
    ] {
        prepare(0);
        let gate = gate(0xE5, TASK_B, 0, 0);
        set_descriptor(FREE_B, gate);
        let code = Code::new(piece);
        let mut state = State::ring0(code);
        state.eflags |= 0x8D5;
        state.eax = 0xAAAA_0000;
        state.edi = 0xAAAA_0007;
        state.fs = DATA.into();
        if piece as usize == t_int as *const () as usize {
            set_gate(VECTOR, gate);
        }
        if piece as usize == t_gp as *const () as usize {
            set_descriptor(FREE, segment(0, 0x0FFF_FFFF >> 12, 0x9B, 0xC));
            state.cs = FREE.into();
            set_gate(13, gate);
        }
        if piece as usize == t_iret as *const () as usize {
            state.eflags |= NT;
            task(0).words[0] = TASK_B.into();
            set_descriptor(TASK_B, descriptor(TASK_B) | 1 << 41);
        }
        let outcome = run(&state);
        let old = &task(0).words;
        let resumes = match old[8] {
            eip if eip == code.at => "at",
            eip if eip == code.after => "after",
            _ => "elsewhere",
        };
        println!(
            "{what}: tr {:#x}, eax {:#x} edi {:#x} flags {:#x} esp {} below, ts {}, busy {}{}, link {:#x}",
            outcome.tr,
            outcome.eax,
            outcome.edi,
            outcome.eflags & !0x1_0000,
            // The handler is in the same ring: its stack is the task's.
            ring1_top() - (outcome.handler_esp + 14 * 4 + 12),
            outcome.cr0 >> 3 & 1,
            busy(TASK),
            busy(TASK_B),
            task(1).words[0] & 0xFFFF
        );
        println!(
            "  saved: {resumes}, flags {:#x} eax {:#x} edi {:#x} cs {:#x} fs {:#x}",
            old[9],
            old[10],
            old[17],
            old[19] & 0xFFFF,
            old[22] & 0xFFFF
        );
    }
    // The error code is on the new task's stack.
    prepare(0);
    set_gate(13, gate(0x85, TASK_B, 0, 0));
    run(&State::ring3(Code::new(t_hlt)));
    // SAFETY: inside task B's stack.
    let pushed = unsafe { ((ring1_top() - 4) as *const u32).read() };
    println!("hlt in ring 3, through a task gate: error code {pushed:#x}");
    reset();
}

/// A task-state segment of the 80286 (9.6): words, and no FS, GS, CR3.
fn sixteen_bits() {
    for (what, piece) in [("jmp", t_jump16 as Piece), ("call", t_call16)] {
        reset();
        // 16-bit code at a base, to end with UD2 at offset 1.
        let base = Code::new(t_arrived).start;
        set_descriptor(FREE, segment(base, 0xFFFF, 0x9B, 0));
        let small = small_task();
        *small = [0; 22];
        small[7] = 0; // IP
        small[8] = 0x4D7; // FLAGS
        for (index, word) in small[9..17].iter_mut().enumerate() {
            *word = 0x1111 * (index as u16 + 1);
        }
        small[13] = 0x6000; // SP
        small[17] = DATA_16;
        small[18] = FREE;
        small[19] = DATA_16;
        small[20] = DATA_16;
        let mut state = State::ring0(Code::new(piece));
        state.fs = DATA.into();
        state.gs = DATA.into();
        let outcome = run(&state);
        print!("{what} to a 16-bit task: ");
        print_event(&outcome);
        println!(
            " at {:#x}, tr {:#x} ax {:#x} di {:#x} cs {:#x} ds {:#x} fs {:#x} gs {:#x} flags {:#x} link {:#x}",
            outcome.eip,
            outcome.tr,
            outcome.eax & 0xFFFF,
            outcome.edi & 0xFFFF,
            outcome.cs & 0xFFFF,
            outcome.ds & 0xFFFF,
            outcome.fs & 0xFFFF,
            outcome.gs & 0xFFFF,
            outcome.eflags & 0xFFFF,
            small_task()[0]
        );
    }
    reset();
}

/// VM in the new task's flags: its selectors are virtual-8086 mode's.
fn virtual_task() {
    prepare(0);
    // SAFETY: low memory is not used for anything else.
    unsafe { (LOW as *mut u16).write_volatile(0x0B0F) }
    let words = &mut task(1).words;
    words[8] = 0;
    words[9] = 0x2_0002;
    words[14] = 0x6000;
    words[18] = 0x4321;
    words[19] = LOW >> 4;
    words[20] = 0x10; // SS
    words[21] = 0xFFFF;
    words[22] = 1;
    words[23] = 2;
    let outcome = run(&State::ring0(Code::new(t_jump)));
    print!("virtual-8086 task: ");
    print_event(&outcome);
    let [es, ds, fs, gs] = outcome.virtual_segments;
    println!(
        " at {:#x}:{:#x}, flags {:#x} ss {:#x} ds {ds:#x} es {es:#x} fs {fs:#x} gs {gs:#x}",
        outcome.cs, outcome.eip, outcome.eflags, outcome.ss
    );
    reset();
}

/// The T flag of a task-state segment (vol. 3B 19.3.1.5).
fn debug_trap() {
    prepare(0);
    task(1).words[25] |= 1;
    runtime::cpu::write_dr6(0);
    let outcome = run(&State::ring0(Code::new(t_jump)));
    print!("task with the debug trap flag: ");
    print_event(&outcome);
    println!(
        " at its start {}, dr6 {:#x}",
        u8::from(outcome.eip == Code::new(t_arrived).start),
        outcome.dr6 & 0xE00F
    );
    runtime::cpu::write_dr6(0);
    reset();
}

/// In which task an exception of a switch is raised, and as what.
fn tell(what: &str, piece: Piece, ring: u8, change: impl FnOnce()) {
    change();
    let code = Code::new(piece);
    let mut state = match ring {
        0 => State::ring0(code),
        _ => State::ring3(code),
    };
    if piece as usize == t_iret as *const () as usize {
        state.eflags |= NT;
    }
    let outcome = run(&state);
    print!("{what}: ");
    print_event(&outcome);
    let place = match outcome.eip {
        eip if eip == code.at => "at",
        eip if eip == code.after => "after",
        eip if eip == task(1).words[8] => "at the start",
        _ => "elsewhere",
    };
    println!(" {place} in {:#x}", outcome.tr);
    reset();
}

/// Refused before anything is switched.
fn refused() {
    let to_b = |access: u8, limit: u32| {
        prepare(0);
        set_descriptor(
            TASK_B,
            segment(task(1) as *const Task as u32, limit, access, 0),
        );
    };
    tell("jmp to a busy task", t_jump, 0, || to_b(0x8B, TASK_LIMIT));
    tell("call to a busy task", t_call, 0, || to_b(0x8B, TASK_LIMIT));
    tell("jmp to a task that is not present", t_jump, 0, || {
        to_b(0x09, TASK_LIMIT)
    });
    tell("jmp to a task of 0x67 bytes", t_jump, 0, || {
        to_b(0x89, 0x66)
    });
    tell("jmp to a task of 0x68 bytes", t_jump, 0, || {
        to_b(0x89, 0x67)
    });
    tell("ring 3, jmp to a task of ring 0", t_jump, 3, || {
        to_b(0x89, TASK_LIMIT)
    });
    tell("jmp to a 16-bit task of 0x2b bytes", t_jump16, 0, || {
        set_descriptor(
            TASK_16,
            segment(small_task().as_ptr() as u32, 0x2A, 0x81, 0),
        );
    });
    let gate_to = |access: u8, selector: u16| {
        prepare(0);
        set_descriptor(FREE_B, gate(access, selector, 0, 0));
        set_gate(VECTOR, gate(access, selector, 0, 0));
    };
    for (what, piece) in [("jmp", t_jump_gate as Piece), ("int", t_int)] {
        let tell = |name: &str, access: u8, selector: u16| {
            print!("{what} through a task gate, ");
            tell(name, piece, 3, || gate_to(access, selector));
        };
        tell("of ring 0", 0x85, TASK_B);
        tell("not present", 0x65, TASK_B);
        tell("to a busy task", 0xE5, TASK);
        tell("to null", 0xE5, 0);
        tell("to the ldt's table", 0xE5, TASK_B | 4);
        tell("beyond the gdt", 0xE5, 0x1000);
        tell("to data", 0xE5, DATA);
    }
    tell(
        "int through a task gate, to a task that is not present",
        t_int,
        3,
        || {
            gate_to(0xE5, TASK_B);
            set_descriptor(
                TASK_B,
                segment(task(1) as *const Task as u32, TASK_LIMIT, 0x09, 0),
            );
        },
    );
}

fn refused_by_iret() {
    let linked = |link: u16| {
        prepare(0);
        task(0).words[0] = link.into();
    };
    tell("iret to a task that is not busy", t_iret, 0, || {
        linked(TASK_B)
    });
    tell("iret to null", t_iret, 0, || linked(0));
    tell("iret to data", t_iret, 0, || linked(DATA));
    tell("iret to the ldt's table", t_iret, 0, || linked(TASK_B | 4));
    tell("iret beyond the gdt", t_iret, 0, || linked(0x1000));
    tell("iret to a busy task that is not present", t_iret, 0, || {
        linked(TASK_B);
        set_descriptor(
            TASK_B,
            segment(task(1) as *const Task as u32, TASK_LIMIT, 0x0B, 0),
        );
    });
}

/// What is wrong in the new task is the new task's exception (9.3). Its handler has a stack of its own, since the
/// task is in ring 3.
fn broken_tasks() {
    let broken = |what: &str, change: &dyn Fn(&mut [u32; 26])| {
        tell(what, t_jump, 0, || {
            prepare(3);
            change(&mut task(1).words);
        });
    };
    let free = |descriptor: u64| set_descriptor(FREE, descriptor);
    broken("task whose ldt is local", &|words| words[24] = 0xC);
    broken("task whose ldt is data", &|words| words[24] = DATA.into());
    broken("task whose ldt is beyond the gdt", &|words| {
        words[24] = 0x1000
    });
    broken("task whose ldt is not present", &|words| {
        free(segment(0, 31, 0x02, 0));
        words[24] = FREE.into();
    });
    broken("task with an ldt", &|words| words[24] = LDT.into());
    broken("task whose cs is null", &|words| words[19] = 3);
    broken("task whose cs is data", &|words| {
        words[19] = USER_DATA.into()
    });
    broken("task whose cs is beyond the gdt", &|words| {
        words[19] = 0x1003
    });
    broken("task whose cs is of ring 0", &|words| {
        words[19] = u32::from(CODE | 3)
    });
    broken("task whose cs is not present", &|words| {
        free(segment(0, 0xF_FFFF, 0x7B, 0xC));
        words[19] = u32::from(FREE | 3);
    });
    broken("task whose eip is beyond the limit", &|words| {
        free(segment(0, 0xFFF, 0xFB, 4));
        words[19] = u32::from(FREE | 3);
    });
    broken("task whose ss is null", &|words| words[20] = 3);
    broken("task whose ss is code", &|words| {
        words[20] = USER_CODE.into()
    });
    broken("task whose ss is of ring 0", &|words| {
        words[20] = u32::from(DATA | 3)
    });
    broken("task whose ss has rpl 0", &|words| {
        words[20] = u32::from(USER_DATA & !3)
    });
    broken("task whose ss is beyond the gdt", &|words| {
        words[20] = 0x1003
    });
    broken("task whose ss is not present", &|words| {
        free(segment(0, 0xF_FFFF, 0x73, 0xC));
        words[20] = u32::from(FREE | 3);
    });
    broken("task whose ds is null", &|words| words[21] = 0);
    broken("task whose ds is of ring 0", &|words| {
        words[21] = DATA.into()
    });
    broken("task whose ds is beyond the gdt", &|words| {
        words[21] = 0x1003
    });
    broken("task whose ds is execute-only", &|words| {
        free(segment(0, 0xF_FFFF, 0xF9, 0xC));
        words[21] = u32::from(FREE | 3);
    });
    broken("task whose ds is not present", &|words| {
        free(segment(0, 0xF_FFFF, 0x73, 0xC));
        words[21] = u32::from(FREE | 3);
    });
    broken("task whose gs is a task", &|words| words[23] = TASK.into());
}

/// A stack that is none: #SS cannot be pushed either, and the double fault gets a task of its own (7.15, vector 8).
fn double_fault() {
    prepare(0);
    set_gate(8, gate(0x85, TASK_DF, 0, 0));
    set_descriptor(FREE, segment(code_top() - 64, 63, 0x93, 4));
    let code = Code::new(t_push);
    let mut state = State::ring0(code);
    state.ss = FREE.into();
    state.esp = 32;
    let outcome = run(&state);
    print!("push on a stack without room, then #SS on it: ");
    print_event(&outcome);
    println!(
        ", in {:#x} from {:#x}, nested {}, saved eip {}",
        outcome.tr,
        task(2).words[0] & 0xFFFF,
        outcome.handler_flags >> 14 & 1,
        if task(0).words[8] == code.at {
            "at"
        } else {
            "elsewhere"
        }
    );
    reset();
}
