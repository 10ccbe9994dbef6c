//! Virtual-8086 mode (SDM vol. 3B 22.2, 22.3) with its extensions (table 22-2), and protected-mode virtual interrupts
//! (22.4).

use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "16"
    v_cli: [] "cli";
    v_sti: [] "sti";
    v_pushf: [] "pushf";
    v_pushf_pop: ["pushf"] "pop ax";
    v_pushfd: [] ".byte 0x66\npushf";
    v_popf: ["push di"] "popf";
    v_popfd: [".byte 0x66\npush di"] ".byte 0x66\npopf";
    v_int: [] "int 0x50";
    v_int3: [] "int3";
    v_into: ["mov al, 0x7F", "add al, 1"] "into";
    v_int1: [] ".byte 0xF1";
    // These return to what is behind them: see `run_virtual`.
    v_iret: [] "iret";
    v_iretd: [] ".byte 0x66
iret";
    v_hlt: [] "hlt";
    v_in: [] "in al, dx";
    v_lgdt: [] "lgdt [di]";
    v_lldt: [] "lldt ax";
    v_ltr: [] "ltr ax";
    v_sldt: [] "sldt ax";
    v_str: [] "str ax";
    v_lar: [] "lar ax, cx";
    v_verr: [] "verr ax";
    v_arpl: [] ".byte 0x63, 0xC8";
    v_sgdt: [] "sgdt [0x6000]";
    v_smsw: [] "smsw ax";
    v_lmsw: [] "lmsw ax";
    v_mov_cr0: [] "mov eax, cr0";
    v_clts: [] "clts";
    v_invd: [] "invd";
    v_rdmsr: [] "rdmsr";
    v_cpuid: ["xor eax, eax"] "cpuid";
    v_sysenter: [] "sysenter";
    v_syscall: [] "syscall";
    v_div: ["xor cx, cx"] "div cx";
    v_word_at_end: ["mov si, 0xFFFF"] "mov ax, [si]";
    v_push_odd: ["mov sp, 1"] "push ax";
    v_byte_at_32_bits: ["mov esi, 0x10000"] "mov al, [esi]";
    v_segments: ["mov ax, 0x1234", "mov fs, ax", "mov ax, 0x5678", "mov gs, ax", "push 0x2345"] "pop es";
    v_lds: ["mov dword ptr [0x6000], 0x34560042"] "lds si, [0x6000]";
}

pieces! { "32"
    p_cli: [] "cli";
    p_sti: [] "sti";
    p_pushf: ["pushfd"] "pop eax";
    p_popf: ["push edi"] "popfd";
    p_to_virtual: [] "iretd";
}

const IOPL_3: u32 = 3 << 12;
const IF: u32 = 1 << 9;
const VIF: u32 = 1 << 19;
const VIP: u32 = 1 << 20;
const VME: u32 = 1;
const PVI: u32 = 2;

pub fn show() {
    frames();
    instructions();
    limits();
    gates();
    extensions();
    redirection();
    protected_interrupts();
}

/// Where the stack is while nothing else is said.
const STACK: u32 = 0x7000;

fn run_virtual(piece: Piece, change: impl FnOnce(&mut State)) -> (Outcome, Code) {
    let code = Code::new(piece);
    let mut state = State::virtual_8086(code);
    change(&mut state);
    let offsets = code.offsets();
    // A frame for IRET, of words or dwords, in case the code has one.
    let frame = [offsets.after, LOW >> 4, state.edi | 2];
    for (index, word) in frame.into_iter().enumerate() {
        // SAFETY: low memory is not used for anything else.
        unsafe {
            if piece as usize == v_iret as *const () as usize {
                (STACK as *mut u16).add(index).write_volatile(word as u16);
            } else if piece as usize == v_iretd as *const () as usize {
                (STACK as *mut u32).add(index).write_volatile(word);
            }
        }
    }
    (run(&state), offsets)
}

fn v(what: &str, piece: Piece, change: impl FnOnce(&mut State)) {
    let (outcome, code) = run_virtual(piece, change);
    print!("virtual, {what}: ");
    describe(&outcome, code);
    println!();
}

/// What an event pushes, and what the handler finds (22.2.2, 22.3).
fn frames() {
    let (outcome, code) = run_virtual(v_segments, |state| {
        state.eflags |= IOPL_3 | 0xD5;
        state.ss = 0x0010;
        state.esp = 0xABCD_6000;
        state.ds = 0x4321;
    });
    let [es, ds, fs, gs] = outcome.virtual_segments;
    print!("virtual, after loads of segments: ");
    describe(&outcome, code);
    println!(", es {es:#x} ds {ds:#x} fs {fs:#x} gs {gs:#x}");
    println!(
        "virtual, frame: cs {:#x} flags {:#x} ss {:#x} esp {:#x}, {} bytes on esp0",
        outcome.cs,
        outcome.eflags,
        outcome.ss,
        outcome.esp,
        ring0_top() - (outcome.handler_esp + 14 * 4)
    );
    println!(
        "virtual, in the handler: flags {:#x} es {:#x} ds {:#x} fs {:#x} gs {:#x}",
        outcome.handler_flags & 0x2_7200,
        outcome.es & 0xFFFF,
        outcome.ds & 0xFFFF,
        outcome.fs & 0xFFFF,
        outcome.gs & 0xFFFF
    );
    let (outcome, _) = run_virtual(v_lds, |_| ());
    println!(
        "virtual, lds: ds {:#x} si {:#x}",
        outcome.virtual_segments[1],
        outcome.esi & 0xFFFF
    );
    // IRET to virtual-8086 mode, beyond its 64 KiB (SDM vol. 2A IRET).
    let esp = code_top() - 64;
    for (index, value) in [0x1_0000, 0, 0x2_0002, 0x7000, 0, 0, 0, 0, 0]
        .into_iter()
        .enumerate()
    {
        // SAFETY: inside the stack.
        unsafe { (esp as *mut u32).add(index).write_volatile(value) }
    }
    show0(
        "iret to virtual-8086 mode, eip 0x10000",
        p_to_virtual,
        |state| {
            state.esp = esp;
        },
    );
}

/// Privileged ones are refused, those of protected mode unknown (22.2.1, 22.2.7).
fn instructions() {
    for (what, piece) in [
        ("hlt", v_hlt as Piece),
        ("lgdt", v_lgdt),
        ("lmsw", v_lmsw),
        ("mov from cr0", v_mov_cr0),
        ("clts", v_clts),
        ("invd", v_invd),
        ("rdmsr", v_rdmsr),
        ("sysenter", v_sysenter),
        ("smsw", v_smsw),
        ("sgdt", v_sgdt),
        ("cpuid", v_cpuid),
        ("lldt", v_lldt),
        ("ltr", v_ltr),
        ("sldt", v_sldt),
        ("str", v_str),
        ("lar", v_lar),
        ("verr", v_verr),
        ("arpl", v_arpl),
        ("syscall", v_syscall),
        ("div by zero", v_div),
        ("int1", v_int1),
        ("int3", v_int3),
        ("into", v_into),
    ] {
        v(what, piece, |_| ());
    }
    v(
        "in from port 0x80, iopl 3, refused by the map",
        v_in,
        |state| {
            state.eflags |= IOPL_3;
            state.edx = 0x80;
        },
    );
    task(0).ports[16] = 0xFE;
    v(
        "in from port 0x80, iopl 0, permitted by the map",
        v_in,
        |state| state.edx = 0x80,
    );
    reset();
    for (what, flags) in [("iopl 0", 0), ("iopl 3", IOPL_3)] {
        for (name, piece) in [
            ("cli", v_cli as Piece),
            ("sti", v_sti),
            ("pushf", v_pushf),
            ("popf", v_popf),
            ("int", v_int),
            ("iret", v_iret),
            ("iretd", v_iretd),
        ] {
            print!("{what}, ");
            v(name, piece, |state| {
                state.eflags |= flags;
                state.edi = 2;
            });
        }
    }
}

fn limits() {
    v("word at ffff", v_word_at_end, |_| ());
    v("push to sp 1", v_push_odd, |_| ());
    v("offset 0x10000", v_byte_at_32_bits, |_| ());
}

/// The handler must be in ring 0 (vol. 2A INT n).
fn gates() {
    let int = |what: &str, selector: u16| {
        set_gate(0x50, gate(0xEE, selector, stub(0x50), 0));
        v(what, v_int, |state| state.eflags |= IOPL_3);
    };
    int("int to ring 1", RING1_CODE & !3);
    set_descriptor(FREE, segment(0, 0xF_FFFF, 0x9F, 0xC));
    int("int to conforming code", FREE);
    set_gate(0x50, gate(0x8E, CODE, stub(0x50), 0));
    v("int through a gate of ring 0", v_int, |state| {
        state.eflags |= IOPL_3
    });
    reset();
}

/// CR4.VME, IOPL below 3: VIF stands for IF.
fn extensions() {
    let flags = |what: &str, piece: Piece, flags: u32, argument: u32| {
        let (outcome, code) = run_virtual(piece, |state| {
            state.cr4 = VME;
            state.eflags |= flags;
            state.edi = argument;
        });
        print!("vme, {what}: ");
        describe(&outcome, code);
        println!(", vif {}", u8::from(outcome.eflags & VIF != 0));
    };
    flags("cli", v_cli, VIF, 0);
    flags("sti", v_sti, 0, 0);
    flags("sti while vip", v_sti, VIP, 0);
    flags("cli while vip", v_cli, VIP | VIF, 0);
    flags("popf of if", v_popf, 0, IF);
    flags("popf without if", v_popf, VIF, 0);
    flags("popf of if while vip", v_popf, VIP, IF);
    flags("popf without if while vip", v_popf, VIP | VIF, 0);
    flags("popf of tf", v_popf, 0, 0x100);
    flags("popfd", v_popfd, 0, 0);
    flags("pushfd", v_pushfd, 0, 0);
    flags("iret of if", v_iret, 0, IF);
    flags("iret without if", v_iret, VIF, 0);
    flags("iret of if while vip", v_iret, VIP, IF);
    flags("iret of tf", v_iret, 0, 0x100);
    flags("iretd", v_iretd, 0, 0);
    for (what, flags) in [
        ("vif 0", 0),
        ("vif 1", VIF),
        ("vif 0, iopl 3, if 0", IOPL_3),
    ] {
        let (outcome, _) = run_virtual(v_pushf_pop, |state| {
            state.cr4 = VME;
            state.eflags |= flags;
        });
        println!("vme, pushf, {what}: {:#x}", outcome.eax & 0xFFFF);
    }
    // With IOPL 3 they work on IF as without the extensions.
    let (outcome, _) = run_virtual(v_cli, |state| {
        state.cr4 = VME;
        state.eflags |= IOPL_3 | IF | VIF;
    });
    println!("vme, cli with iopl 3: flags {:#x}", outcome.eflags);
}

/// INT n with CR4.VME: a clear bit of the redirection map sends it to the 8086 program's own vectors
/// (22.3.3.4, table 22-2).
fn redirection() {
    const IVT_ENTRY: *mut u16 = (0x50 * 4) as *mut u16;
    // Vector 0x50 of the real-mode table: at 0:0x6800, a UD2.
    // SAFETY: the loader's and firmware's first page is nobody's here.
    unsafe {
        IVT_ENTRY.write_volatile(0x6800);
        IVT_ENTRY.add(1).write_volatile(0);
        (0x6800 as *mut u16).write_volatile(0x0B0F);
    }
    for (what, flags) in [
        ("iopl 0, vif 0", 0),
        ("iopl 0, vif 1", VIF),
        ("iopl 3, if 0", IOPL_3 | VIF),
        ("iopl 3, if 1", IOPL_3 | IF | VIF),
    ] {
        for redirected in [false, true] {
            task(0).redirection[0x50 / 8] = if redirected { 0xFE } else { 0xFF };
            let (outcome, code) = run_virtual(v_int, |state| {
                state.cr4 = VME;
                state.eflags |= flags;
            });
            print!("vme, int, {what}, bit {}: ", u8::from(!redirected));
            if outcome.vector == 6 && outcome.eip == 0x6800 {
                // SAFETY: what it pushed.
                let frame = unsafe { *((outcome.esp & 0xFFFF) as *const [u16; 3]) };
                println!(
                    "own handler, flags {:#x}, pushed ip {} cs {:#x} flags {:#x}",
                    outcome.eflags,
                    u8::from(u32::from(frame[0]) == code.after),
                    frame[1],
                    frame[2]
                );
            } else {
                describe(&outcome, code);
                println!();
            }
        }
    }
    reset();
}

/// CR4.PVI: CLI and STI in ring 3 with IOPL below 3 (22.4). PUSHF and POPF are as without.
fn protected_interrupts() {
    for (what, piece, flags) in [
        ("cli", p_cli as Piece, VIF),
        ("sti", p_sti, 0),
        ("sti while vip", p_sti, VIP),
        ("popf of if", p_popf, 0),
        ("popf without if", p_popf, VIF),
    ] {
        let code = Code::new(piece);
        let mut state = State::ring3(code);
        state.cr4 = PVI;
        state.eflags |= flags;
        state.edi = if what == "popf of if" { IF | 2 } else { 2 };
        let outcome = run(&state);
        print!("pvi, {what}: ");
        describe(&outcome, code);
        println!(
            ", if {} vif {}",
            outcome.eflags >> 9 & 1,
            outcome.eflags >> 19 & 1
        );
    }
    let mut state = State::ring3(Code::new(p_pushf));
    state.cr4 = PVI;
    state.eflags |= VIF;
    println!("pvi, pushf: {:#x}", run(&state).eax);
}
