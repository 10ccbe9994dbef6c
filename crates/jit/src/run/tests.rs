//! What only the inside of a vCPU shows.

use std::sync::mpsc;
use std::time::Duration;

use trapgate_engine::{NoDevices, Signal};
use trapgate_interp::View;
use trapgate_memory::RamRange;
use trapgate_x86::Segment;
use trapgate_x86::descriptor::access;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr0, cr4, efer, sreg};

use super::*;
use crate::context::TLB_ENTRIES;

const TABLES: u64 = 0x1000;
const CODE_AT: u64 = 0x8000;

/// A processor in 64-bit mode of ring 0 at `code`.
fn translating(code: &[u8], change: impl FnOnce(&mut CpuState)) -> Translating {
    translating_of(&[(CODE_AT, code)], change)
}

/// The same with more in memory, of which the first 16 MiB are mapped as they are.
fn translating_of(pieces: &[(u64, &[u8])], change: impl FnOnce(&mut CpuState)) -> Translating {
    let range = RamRange {
        start: 0,
        length: 16 << 20,
    };
    let memory = Arc::new(GuestMemory::new(&[range]).unwrap());
    let put = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes()).unwrap();
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    for page in 0..8 {
        put(TABLES + 0x2000 + page * 8, page << 21 | 0x87);
    }
    for (gpa, bytes) in pieces {
        memory.write(*gpa, bytes).unwrap();
    }
    let mut state = CpuState::default();
    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    system.cr3 = TABLES;
    system.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    system.efer = efer::LME | efer::LMA;
    system.segments = [Segment::flat(0x10, access::WRITABLE | access::DB); 6];
    system.segments[sreg::CS] = Segment::flat(0x08, access::CODE | access::READABLE | access::L);
    state.rip = CODE_AT;
    state.rflags = 2;
    state.gpr[gpr::RSP] = 0x10_0000;
    change(&mut state);
    let profile = CpuProfile::new(Level::V2, 1_000_000_000);
    let mut vcpu = Translating::new(memory, Box::new(NoDevices), profile, 0, 1).unwrap();
    vcpu.set_state(&state).unwrap();
    vcpu
}

/// What is forgotten while breakpoints are on, which a guest may leave on for good, does not pile up.
#[test]
fn list_of_forgotten_translations_stays_short_under_breakpoints() {
    // mov ecx, 5000; again: invlpg [rdi]; dec ecx; jnz again; hlt
    let code = [
        0xb9, 0x88, 0x13, 0, 0, 0x0f, 0x01, 0x3f, 0xff, 0xc9, 0x75, 0xf9, 0xf4,
    ];
    let mut vcpu = translating(&code, |state| {
        // A data breakpoint on a byte that nobody touches.
        state.system.dr7 = 0x1_0402;
        state.system.dr[0] = 0x20_0000;
        state.gpr[gpr::RDI] = 0xdead_0000_0000;
    });
    assert_eq!(vcpu.run(), RunExit::Halted);
    assert!(vcpu.instructions() > 15_000);
    let changes = vcpu.whole().interp.cpu.changes();
    assert!(
        changes.pages.capacity() < 64,
        "{}",
        changes.pages.capacity()
    );
}

/// Jumps from one to the next, in a MiB of memory: what is kept of them stays within its limit, and is given back.
#[test]
fn units_of_one_jump_stay_within_the_limit() {
    // jmp to the next, 4 bytes further on; the last is HLT.
    let mut code = [0xeb, 2, 0xcc, 0xcc].repeat(1 << 18);
    code.push(0xf4);
    let mut vcpu = translating(&code, |_| {});
    for _ in 0..2 {
        let mut state = vcpu.state();
        state.rip = CODE_AT;
        state.system.activity = Activity::Running;
        vcpu.set_state(&state).unwrap();
        assert_eq!(vcpu.run(), RunExit::Halted);
        let rust = &vcpu.whole().rust;
        let most = rust.room.most();
        assert!(rust.bytes() <= most.bytes + UNIT);
        assert!(rust.blocks.len() <= most.units);
        assert!(rust.statistics.flushes > 2, "{}", rust.statistics.flushes);
    }
    let context = vcpu.whole();
    context.forget_all_code();
    assert!(context.rust.bytes() < 2 * UNIT);
}

/// Kicks a processor that goes round for ever.
fn kicked(mut vcpu: Translating) {
    let signals = vcpu.signals();
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(vcpu.run()));
    std::thread::sleep(Duration::from_millis(50));
    signals.raise(Signal::Kick);
    let exit = wait.recv_timeout(Duration::from_secs(20));
    assert_eq!(exit, Ok(RunExit::Kicked));
}

fn entry(leads: u64) -> [u8; 8] {
    (leads | 7).to_le_bytes()
}

/// Code that runs over the top of the address space goes on at 0, and a jump from there to the top goes ahead: neither looks
/// like a loop.
#[test]
fn loop_around_the_address_space_notices_a_signal() {
    let pieces: [(u64, &[u8]); 5] = [
        // The topmost 2 MiB lie at 2 MiB.
        (TABLES + 511 * 8, &entry(TABLES + 0x1000)),
        (TABLES + 0x1000 + 511 * 8, &entry(TABLES + 0x2000)),
        (TABLES + 0x2000 + 511 * 8, &entry(2 << 20 | 0x80)),
        ((4 << 20) - 14, &[0x90; 14]),
        (0, &[0xeb, 0xf0]), // jmp to the first NOP
    ];
    kicked(translating_of(&pieces, |state| state.rip = u64::MAX - 13));
}

#[test]
fn loop_around_4_gib_in_compatibility_mode_notices_a_signal() {
    let pieces: [(u64, &[u8]); 4] = [
        (TABLES + 0x1000 + 3 * 8, &entry(TABLES + 0x2000)),
        (TABLES + 0x2000 + 511 * 8, &entry(2 << 20 | 0x80)),
        ((4 << 20) - 14, &[0x90; 14]),
        (0, &[0xeb, 0xf0]),
    ];
    kicked(translating_of(&pieces, |state| {
        let data = Segment::flat(0x2b, access::WRITABLE | access::DB | access::DPL);
        state.system.segments = [data; 6];
        let code = access::CODE | access::READABLE | access::DB | access::DPL;
        state.system.segments[sreg::CS] = Segment::flat(0x23, code);
        state.rip = 0xffff_fff2;
    }));
}

/// Thousands of calls return one after the other, with no jump back between. The first notices a signal, whether its unit
/// goes on behind the call (`exact`: half of all do) or not.
#[test]
fn returns_notice_a_signal() {
    // mov ecx, 5000; call f; hlt; f: dec ecx; jz end; call f; inc ebx; ret; end: hlt; ret
    let code = [
        0xb9, 0x88, 0x13, 0, 0, 0xe8, 1, 0, 0, 0, 0xf4, 0xff, 0xc9, 0x74, 8, 0xe8, 0xf7, 0xff,
        0xff, 0xff, 0xff, 0xc3, 0xc3, 0xf4, 0xc3,
    ];
    for exact in [false, true] {
        let mut vcpu = translating(&code, |_| {});
        if exact {
            vcpu.be_exact();
        }
        let start = vcpu.state();
        let go_on = |vcpu: &mut Translating| {
            vcpu.whole().interp.cpu.sys.activity = Activity::Running;
        };
        assert_eq!(vcpu.run(), RunExit::Halted);
        go_on(&mut vcpu);
        assert_eq!(vcpu.run(), RunExit::Halted);
        assert_eq!(vcpu.state().gpr[gpr::RBX], 4999);
        // Now everything is linked.
        vcpu.set_state(&start).unwrap();
        assert_eq!(vcpu.run(), RunExit::Halted);
        go_on(&mut vcpu);
        let context = vcpu.whole();
        let (target, mode) = context.find_here().unwrap().unwrap();
        context.apply_changes();
        context.target = target;

        context.bell.ring();
        vcpu.enter(mode);

        let registers = &vcpu.whole().interp.cpu.regs.gpr;
        assert_eq!(registers[gpr::RBX], 0, "returns before it looked");
    }
}

/// A loop in which something goes wrong each time, until it is translated again.
struct Wrong {
    what: &'static str,
    code: &'static [u8],
    set: fn(&mut CpuState),
    /// How often it went wrong.
    count: fn(&Context) -> u64,
}

const WRONG: [Wrong; 4] = [
    Wrong {
        what: "frame across the end of a page, by RSP",
        // again: mov eax, [rsp]; mov edx, [rsp + 16]; dec ecx; jnz again; hlt
        code: &[
            0x8b, 0x04, 0x24, 0x8b, 0x54, 0x24, 0x10, 0xff, 0xc9, 0x75, 0xf5, 0xf4,
        ],
        set: |state| state.gpr[gpr::RSP] = 0x10_0ff8,
        count: |context| refills(context, 1),
    },
    Wrong {
        what: "two pages of one entry of the table",
        // again: call f; dec ecx; jnz again; hlt; f: mov eax, [rdi]; mov edx, [rsi]; ret
        code: &[
            0xe8, 5, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4, 0x8b, 0x07, 0x8b, 0x16, 0xc3,
        ],
        set: |state| {
            state.gpr[gpr::RDI] = 0x10_0000;
            let entries = TLB_ENTRIES[View::SupervisorUser as usize] as u64;
            state.gpr[gpr::RSI] = 0x10_0000 + entries * PAGE_SIZE;
        },
        count: |context| refills(context, 0),
    },
    Wrong {
        what: "access across the end of a page",
        // again: mov rax, [rdi]; dec ecx; jnz again; hlt
        code: &[0x48, 0x8b, 0x07, 0xff, 0xc9, 0x75, 0xf9, 0xf4],
        set: |state| state.gpr[gpr::RDI] = 0x10_0ffc,
        count: |context| context.rust.statistics.slow[Slow::Crossing as usize],
    },
    Wrong {
        what: "call that returns",
        // again: call f; dec ecx; jnz again; hlt; f: ret
        code: &[0xe8, 5, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4, 0xc3],
        set: |_| {},
        count: |context| context.rust.statistics.left[exit::RETURN as usize],
    },
];

/// Reads that found no translation in the table, or in a slot.
fn refills(context: &Context, slot: usize) -> u64 {
    let views = context.refills.iter();
    views.map(|view| view[0][slot]).sum()
}

/// What goes wrong all the time is translated again, and goes wrong no more.
#[test]
fn code_learns_from_what_goes_wrong() {
    for wrong in WRONG {
        let mut vcpu = translating(wrong.code, |state| {
            state.gpr[gpr::RCX] = 200_000;
            (wrong.set)(state);
        });
        // However slow this host is now.
        vcpu.whole().rust.lessons.often = Duration::MAX;
        let start = vcpu.state();
        let mut counts = [0; 2];
        for count in &mut counts {
            let before = (wrong.count)(vcpu.whole());
            vcpu.set_state(&start).unwrap();
            assert_eq!(vcpu.run(), RunExit::Halted, "{}", wrong.what);
            *count = (wrong.count)(vcpu.whole()) - before;
        }
        let dropped = vcpu.whole().rust.statistics.dropped;
        eprintln!("{}: {counts:?} times, {dropped} units dropped", wrong.what);
        assert!(dropped > 0, "{}", wrong.what);
        assert!(counts[0] > 1, "{}", wrong.what);
        assert!(counts[1] < 10 && counts[1] < counts[0], "{}", wrong.what);
    }
}

/// A page that may be read and not written, in a slot: what is there for writes is hit by no address that a guest can make up.
#[test]
fn slot_of_a_page_that_is_read_only_is_not_written_through() {
    // mov ecx, 2; again: mov eax, [rdi]; mov [rdi], ecx; dec ecx; jnz again; hlt
    let code = [
        0xb9, 2, 0, 0, 0, 0x8b, 0x07, 0x89, 0x0f, 0xff, 0xc9, 0x75, 0xf8, 0xf4,
    ];
    let read_only = (
        TABLES + 0x2000 + 3 * 8,
        &(3u64 << 21 | 0x85).to_le_bytes()[..],
    );
    let pieces = [(CODE_AT, &code[..]), read_only, (3 << 21, &[0x5a; 8])];
    let mut unmatched = Vec::new();
    for _ in 0..4 {
        let mut vcpu = translating_of(&pieces, |state| state.gpr[gpr::RDI] = 3 << 21);
        // The store faults, and nobody handles that.
        assert_eq!(vcpu.run(), RunExit::ShutDown);
        assert_eq!(vcpu.state().rip, CODE_AT + 7);
        let context = vcpu.whole();
        let slots = context.slots.as_flattened();
        let slot = slots.iter().find(|slot| slot.read == 3 << 21).unwrap();
        assert_eq!(slot.write, context.unmatched);
        assert_eq!(context.unmatched & 0xfff, 0);
        assert!(!is_canonical(context.unmatched));
        unmatched.push(context.unmatched);
    }
    unmatched.dedup();
    assert_eq!(unmatched.len(), 4, "they are random: {unmatched:x?}");
}
