//! System calls of protected mode, and the doors between the modes that must stay shut
//! (SDM vol. 2B SYSENTER, SYSEXIT; vol. 3A 2.5, 5.1.1, 5.4.1, 11.8.5).

use runtime::cpu::{self, msr};
use runtime::println;

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    n_sysenter: ["mov ecx, esp"] "sysenter";
    n_sysexit: [] "sysexit";
    n_entered: ["mov ebx, cs", "mov eax, ss", "mov esi, esp", "pushfd", "pop ecx"] "nop";
    n_arrived: ["mov ebx, cs", "mov eax, ss"] "nop";
    n_cr0: [] "mov cr0, edi";
    n_cr3: [] "mov cr3, edi";
    n_cr4: [] "mov cr4, edi";
    n_wrmsr: ["mov ecx, 0xC0000080", "xor edx, edx"] "wrmsr";
    n_lmsw_clear: ["xor eax, eax"] "lmsw ax";
    // CR0.PG with EFER.LME, prepared in EAX and EBX: CR4 and CR0.
    n_long: ["mov cr4, esi", "mov cr3, ebp", "mov ecx, 0xC0000080", "xor edx, edx", "mov eax, 0x900", "wrmsr"] "mov cr0, edi";
    n_long_16: ["mov eax, 0x40", "ltr ax", "mov cr4, esi", "mov cr3, ebp", "mov ecx, 0xC0000080", "xor edx, edx", "mov eax, 0x900", "wrmsr"] "mov cr0, edi";
    n_inc: ["mov ecx, 0xC0000080", "xor edx, edx", "mov eax, 0x900", "wrmsr", "mov eax, 5"] ".byte 0x48, 0x40"; // dec eax, inc eax; in 64-bit mode two prefixes
}

pub fn show() {
    system_calls();
}

/// What QEMU's TCG lets pass, and then loses its way.
pub fn show_last() {
    into_long_mode();
    control_registers();
}

fn system_calls() {
    let entered = Code::new(n_entered);
    cpu::write_msr(msr::SYSENTER_CS, 0);
    cpu::write_msr(msr::SYSENTER_ESP, ring0_top().into());
    cpu::write_msr(msr::SYSENTER_EIP, entered.start.into());
    show3("sysenter with a null selector", n_sysenter, |_| ());
    show0("sysexit with a null selector", n_sysexit, |_| ());
    // SYSEXIT goes to the selectors 16 and 24 above: the descriptors do not matter.
    cpu::write_msr(msr::SYSENTER_CS, u64::from(DATA));
    let mut state = State::ring3(Code::new(n_sysenter));
    state.eflags |= 0x3202 | 0x4_0000;
    let outcome = run(&state);
    println!(
        "sysenter: cs {:#x} ss {:#x} esp {} flags {:#x}",
        outcome.ebx & 0xFFFF,
        outcome.eax & 0xFFFF,
        u8::from(outcome.esi == ring0_top()),
        outcome.ecx
    );
    show3("sysexit in ring 3", n_sysexit, |_| ());
    let arrived = Code::new(n_arrived);
    let mut state = State::ring0(Code::new(n_sysexit));
    state.ecx = 0x5000;
    state.edx = arrived.start;
    let outcome = run(&state);
    println!(
        "sysexit: cs {:#x} ss {:#x} esp {:#x}, at its target {}",
        outcome.ebx & 0xFFFF,
        outcome.eax & 0xFFFF,
        outcome.esp,
        u8::from(outcome.eip == arrived.after)
    );
    cpu::write_msr(msr::SYSENTER_CS, 0);
}

/// What CR0, CR3 and CR4 refuse in protected mode.
fn control_registers() {
    const PG: u32 = 1 << 31;
    let with = |what: &str, piece: Piece, value: u32| show0(what, piece, |state| state.edi = value);
    with("cr0: paging without protection", n_cr0, CR0 & !1 | PG);
    with(
        "cr0: not-write-through with caches on",
        n_cr0,
        CR0 | 1 << 29,
    );
    with("cr4: a reserved bit", n_cr4, 1 << 31);
    // SDM vol. 3A 5.10.1: PCIDs are for IA-32e mode.
    with("cr4.pcide outside of long mode", n_cr4, 1 << 17 | 1 << 5);
    with("cr4.pae", n_cr4, 1 << 5);
    with("cr4: vme, pvi, tsd, de, pse", n_cr4, 0x1F);
    // Bits 11 to 0 without meaning are ignored (table 5-3).
    with("cr3: low bits", n_cr3, 0xFFF);
    let code = Code::new(n_lmsw_clear);
    println!("lmsw of 0: protection {}", run(&State::ring0(code)).cr0 & 1);
    show0("efer: bit 1", n_wrmsr, |state| state.eax = 0x802);
    show0("efer: long mode wanted, paging off", n_wrmsr, |state| {
        state.eax = 0x900
    });
    let code = Code::new(n_inc);
    println!(
        "long mode wanted, paging off, 0x48 is dec: {:#x}",
        run(&State::ring0(code)).eax
    );
}

fn into_long_mode() {
    const PG: u32 = 1 << 31;
    const PAE: u32 = 1 << 5;
    let tables = cpu::read_cr3() as u32;
    let long = |what: &str, piece: Piece, cr4: u32, change: &dyn Fn(&mut State)| {
        show0(what, piece, |state| {
            state.edi = CR0 | PG;
            state.esi = cr4;
            state.ebp = tables;
            change(state);
        });
    };
    long("long mode without pae", n_long, 0, &|_| ());
    // SDM vol. 3A 11.8.5: #GP if CS.L is set.
    set_descriptor(FREE, 0x00EF_9B00_0000_FFFF);
    long("long mode from code with cs.l", n_long, PAE, &|state| {
        state.cs = FREE.into()
    });
    long("long mode on a 16-bit task", n_long_16, PAE, &|_| ());
    reset();
}
