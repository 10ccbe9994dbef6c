//! Exceptions that 64-bit code cannot raise, or raises otherwise (SDM vol. 3A 7.15).

use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    f_into: ["mov eax, 0x7FFFFFFF", "add eax, 1"] "into";
    f_into_without: ["xor eax, eax"] "into";
    f_int1: [] ".byte 0xF1";
    f_int3: [] "int3";
    f_bound: [] "bound eax, [edi]";
    f_bound16: [] "bound ax, [edi]";
    f_bound_register: [] ".byte 0x62, 0xC0";
    f_aam0: ["mov al, 5"] ".byte 0xD4, 0";
    f_syscall: [] "syscall";
    f_sysret: [] ".byte 0x0F, 0x07";
    f_les_register: [] ".byte 0xC4, 0xC0";
    f_mov_cs: [] ".byte 0x8E, 0xC8";
    f_lock_nop: [] ".byte 0xF0, 0x90";
    f_long_instruction: [] ".byte 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90";
    f_load: [] "mov eax, [edi]";
    f_load_ebp: [] "mov eax, [ebp]";
    f_load_word: [] "mov ax, [edi]";
    f_load_byte: [] "mov al, [edi]";
    f_store: [] "mov [edi], eax";
    f_push: [] "push eax";
    f_pop: [] "pop eax";
    f_enter: [] "enter 8, 0";
    f_leave: [] "leave";
    f_ret: [] "ret";
    f_pusha: [] "pushad";
    f_popa: [] "popad";
    f_call_mem: [] "call dword ptr [edi]";
    f_movs: [] "movsd";
    f_jump: [] "jmp edi";
    f_in: [] "in al, dx";
    f_in_dword: [] "in eax, dx";
    f_cli: [] "cli";
    f_sti: [] "sti";
    f_hlt: [] "hlt";
    f_popf: ["push edi", "popfd", "pushfd"] "pop eax";
    f_lmsw: [] "lmsw di";
    f_smsw: [] "smsw eax";
    f_lgdt: [] "lgdt [edi]";
    f_clts: [] "clts";
    f_mov_cr0: [] "mov eax, cr0";
    f_far_call: [] ".byte 0x9A\n.long 99f\n.word 0x23";
    f_far_return: [] "retf";
    f_iret: [] "iretd";
    f_load_fs: [] "mov eax, fs:[edi]";
    f_arpl: ["mov eax, 0x10", "mov ecx, 0x23", "arpl ax, cx"] "setz cl";
    f_arpl_not: ["mov eax, 0x13", "mov ecx, 0x20", "arpl ax, cx"] "setz cl";
}

pub fn show() {
    overflow_and_bound();
    undefined();
    alignment();
    privileges();
    far_frames();
}

#[repr(C, align(16))]
struct Words([u32; 16]);
static mut WORDS: Words = Words([0; 16]);

fn words(values: &[u32]) -> u32 {
    let place = (&raw mut WORDS).cast::<u32>();
    for (index, &value) in values.iter().enumerate() {
        // SAFETY: at most 16 are given.
        unsafe { place.add(index).write_volatile(value) }
    }
    place as u32
}

/// Vectors 4 and 5: INTO is a trap, BOUND a fault.
fn overflow_and_bound() {
    show_("into with overflow", f_into);
    show_("into without", f_into_without);
    show_("int1", f_int1);
    show_("int3", f_int3);
    for (what, index) in [
        ("below", -11i32),
        ("the lower bound", -10),
        ("the upper bound", 10),
        ("above", 11),
    ] {
        let place = words(&[-10i32 as u32, 10]);
        show_with(&format(what, "bound, "), f_bound, |state| {
            state.edi = place;
            state.eax = index as u32;
        });
        let place = words(&[0x000A_FFF6]);
        show_with(&format(what, "bound of 16 bits, "), f_bound16, |state| {
            state.edi = place;
            state.eax = 0x7777_0000 | index as u32 & 0xFFFF;
        });
    }
    show_("bound of a register", f_bound_register);
    show_("aam 0", f_aam0);
    // INTO and INT3 need the gate's permission, BOUND, INT1 and a fault do not (7.12.1.1).
    show3("ring 3, into", f_into, |_| ());
    show3("ring 3, int3", f_int3, |_| ());
    show3("ring 3, int1", f_int1, |_| ());
    let place = words(&[1, 2]);
    show3("ring 3, bound", f_bound, |state| state.edi = place);
}

/// Two texts in one, without an allocator.
struct Joined<'a>(&'a str, &'a str);
fn format<'a>(what: &'a str, before: &'a str) -> Joined<'a> {
    Joined(before, what)
}

fn show_with(what: &Joined, piece: Piece, change: impl FnOnce(&mut State)) {
    print!("{}", what.0);
    show0(what.1, piece, change);
}

fn show_(what: &str, piece: Piece) {
    show0(what, piece, |_| ());
}

fn undefined() {
    // SDM vol. 2B SYSCALL, SYSRET: 64-bit mode only.
    show_("syscall in protected mode", f_syscall);
    show_("sysret in protected mode", f_sysret);
    show_("les of a register", f_les_register);
    show_("mov to cs", f_mov_cs);
    show_("lock nop", f_lock_nop);
    show_("16 bytes long", f_long_instruction);
    for (what, piece) in [
        ("arpl that raises", f_arpl as Piece),
        ("arpl that does not", f_arpl_not),
    ] {
        let outcome = run(&State::ring0(Code::new(piece)));
        println!(
            "{what}: {:#x}, zf {}",
            outcome.eax & 0xFFFF,
            outcome.ecx & 1
        );
    }
}

/// Limits of data, stack and code (vectors 12 and 13), and segments that are null.
/// A stack of 64 bytes whose pushes end at 0: a fault in ring 3 goes to a stack of its own.
fn on_small_stack(what: &str, piece: Piece, esp: u32) {
    set_descriptor(FREE, segment(code_top(), 63, 0xF3, 4));
    show3(what, piece, |state| {
        state.ss = u32::from(FREE | 3);
        state.esp = esp;
        state.ebp = 64;
    });
    reset();
}

/// Limits last: QEMU's TCG looks at few of them, and does not get through.
pub fn show_last() {
    limits();
    on_small_stack("far call at the bottom", f_far_call, 8);
    on_small_stack("far call below the bottom", f_far_call, 7);
}

fn limits() {
    let small = |piece: Piece, what: &str, offset: u32| {
        set_descriptor(FREE, segment(words(&[1, 2, 3, 4]), 7, 0x93, 4));
        show0(what, piece, |state| {
            state.ds = FREE.into();
            state.edi = offset;
        });
    };
    small(f_load, "dword at the end of a segment", 4);
    small(f_load, "dword across the end", 5);
    small(f_load, "dword at -1", 0xFFFF_FFFF);
    small(f_load_word, "word at the last byte", 7);
    small(f_load_byte, "the last byte", 7);
    small(f_load_byte, "the byte behind it", 8);
    small(f_store, "store across the end", 6);
    small(f_call_mem, "call through a pointer across the end", 6);
    reset();
    show0("through a null ds", f_load, |state| state.ds = 0);
    show0("through a null fs", f_load_fs, |state| state.fs = 3);
    show0("movs to a null es", f_movs, |state| {
        state.es = 0;
        state.esi = code_top();
        state.edi = code_top();
    });
    let stack = on_small_stack;
    stack("push at the bottom", f_push, 4);
    stack("push below the bottom", f_push, 2);
    stack("pop at the top", f_pop, 60);
    stack("pop across the top", f_pop, 62);
    stack("ret from across the top", f_ret, 62);
    stack("enter below the bottom", f_enter, 4);
    stack("leave from above the top", f_leave, 32);
    stack("pushad below the bottom", f_pusha, 28);
    stack("popad across the top", f_popa, 40);
    stack("through ebp above the top", f_load_ebp, 32);
    stack("far return from across the top", f_far_return, 58);
    stack("iret from across the top", f_iret, 54);
    set_descriptor(FREE, segment(0, 0xFFF, 0xFB, 0xC));
    show3("jump beyond the limit of 16 MiB", f_jump, |state| {
        state.edi = 0x0100_0000;
        state.cs = u32::from(FREE | 3);
    });
    reset();
}

/// Vector 17 (table 7-7): ring 3, CR0.AM, EFLAGS.AC, and an operand that is not where its size wants it.
fn alignment() {
    const AM: u32 = 1 << 18;
    const AC: u32 = 1 << 18;
    let place = words(&[0; 4]);
    let aligned = |what: &str, piece: Piece, offset: u32| {
        show3(what, piece, |state| {
            state.cr0 |= AM;
            state.eflags |= AC;
            state.edi = place + offset;
            state.esi = place;
            state.ebp = place + offset;
        });
    };
    aligned("ac, byte at 1", f_load_byte, 1);
    aligned("ac, word at 1", f_load_word, 1);
    aligned("ac, word at 2", f_load_word, 2);
    aligned("ac, dword at 2", f_load, 2);
    aligned("ac, store of a dword at 2", f_store, 2);
    aligned("ac, dword at 4", f_load, 4);
    aligned("ac, bound at 4", f_bound, 4);
    aligned("ac, bound at 2", f_bound, 2);
    aligned("ac, movs to 1", f_movs, 1);
    aligned("ac, call through 2", f_call_mem, 2);
    let stack = |what: &str, piece: Piece, down: u32| {
        show3(what, piece, |state| {
            state.cr0 |= AM;
            state.eflags |= AC;
            state.esp -= down;
        });
    };
    stack("ac, push at 2", f_push, 2);
    stack("ac, pop at 2", f_pop, 2);
    stack("ac, far call at 2", f_far_call, 2);
    stack("ac, far return at 2", f_far_return, 2);
    stack("ac, iret at 2", f_iret, 2);
    show3("ac without am, dword at 2", f_load, |state| {
        state.eflags |= AC;
        state.edi = place + 2;
    });
    show0("ac in ring 0, dword at 2", f_load, |state| {
        state.cr0 |= AM;
        state.eflags |= AC;
        state.edi = place + 2;
    });
}

/// What ring 3 may do by IOPL and the I/O permission map (SDM vol. 1 19.5, vol. 3A 6.9).
fn privileges() {
    const IOPL_3: u32 = 3 << 12;
    for (what, flags) in [("iopl 0", 0), ("iopl 3", IOPL_3)] {
        for (name, piece) in [
            (", cli", f_cli as Piece),
            (", sti", f_sti),
            (", hlt", f_hlt),
            (", lgdt", f_lgdt),
            (", clts", f_clts),
            (", mov from cr0", f_mov_cr0),
            (", lmsw", f_lmsw),
            (", in from 0x80", f_in),
        ] {
            print!("{what}");
            show3(name, piece, |state| {
                state.eflags |= flags;
                state.edx = 0x80;
            });
        }
    }
    let port = |what: &str, piece: Piece, port: u32| show3(what, piece, |state| state.edx = port);
    task(0).ports[16] = 0xFE;
    port("port 0x80 permitted", f_in, 0x80);
    port("ports 0x80 to 0x83, one permitted", f_in_dword, 0x80);
    task(0).ports[16] = 0xF0;
    port("ports 0x80 to 0x83 permitted", f_in_dword, 0x80);
    // The processor reads two bytes of the map (SDM vol. 1 19.5.2): the second must be inside the limit too.
    task(0).ports[17] = 0;
    port(
        "port 0x88, whose second byte is beyond the limit",
        f_in,
        0x88,
    );
    task(0).words[25] = (TASK_LIMIT + 1) << 16;
    port("map beyond the limit", f_in, 0x80);
    reset();
    for (what, flags, value) in [
        ("popf of if and iopl, iopl 0", 0, 0x3202),
        ("popf of if 1 and iopl 0, iopl 3", IOPL_3, 0x202),
    ] {
        let code = Code::new(f_popf);
        let mut state = State::ring3(code);
        state.eflags |= flags;
        state.edi = value;
        println!("{what}: {:#x}", run(&state).eax);
    }
    // LMSW sets four bits and cannot clear PE; its other bits are not looked at (SDM vol. 2A LMSW).
    let code = Code::new(f_lmsw);
    let mut state = State::ring0(code);
    state.edi = 0xFFF6;
    let set = run(&state).cr0;
    state.edi = 0;
    let cleared = run(&state).cr0;
    println!("cr0 after lmsw of 0xfff6: {set:#x}, of 0: {cleared:#x}");
    show3("smsw in ring 3", f_smsw, |_| ());
}

/// Frames of far transfers at ring 3 (RET, IRET: SDM vol. 2): what is on the stack decides.
fn far_frames() {
    let frame = |what: &str, piece: Piece, cs: u16, flags: u32| {
        let values = [Code::new(piece).after, cs.into(), flags];
        let esp = code_top() - 64;
        for (index, value) in values.into_iter().enumerate() {
            // SAFETY: inside the stack.
            unsafe { (esp as *mut u32).add(index).write_volatile(value) }
        }
        show3(what, piece, |state| state.esp = esp);
    };
    for (way, piece) in [("far return", f_far_return as Piece), ("iret", f_iret)] {
        for (what, selector) in [
            ("ring 3", USER_CODE),
            ("ring 0", CODE),
            ("ring 3 code with rpl 0", USER_CODE & !3),
            ("null", 3),
            ("data", USER_DATA),
            ("beyond the gdt", 0x1003),
        ] {
            print!("ring 3, {way} to ");
            frame(what, piece, selector, 2);
        }
    }
    // VM is popped in ring 0 only: here the bit is ignored, and this is a return to ring 3.
    frame("ring 3, iret with vm", f_iret, USER_CODE, 0x2_0002);
}
