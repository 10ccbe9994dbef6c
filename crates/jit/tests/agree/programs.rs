//! Whole programs that come from a seed: branches, loops, calls, returns, string instructions, flags across
//! blocks, code that changes code, exceptions in the middle, at both privilege levels. They run in lockstep, where
//! translator and interpreter are compared after every block; and on the translator alone, with its blocks linked,
//! exact and as users run it, which must come to the same end.
//!
//! `TRAPGATE_TEST_SEED` and `TRAPGATE_TEST_CASES` choose other programs, and more; `TRAPGATE_TEST_CASE` repeats one by
//! its own seed. Parts of the programs are this test's own code: name a copy of it in `TRAPGATE_TEST_CODE` to get the
//! same programs after it was built anew.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use trapgate_engine::{Exit, NoDevices, Signal, Vcpu};
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::GuestMemory;
use trapgate_oracle::programs::{Code, Computing, PIECE, PIECES, Place, Program};
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr4, gpr, rflags, sreg};
use trapgate_x86::{CpuProfile, CpuState, Segment, TableRegister};

use crate::guest::{
    CODE, DATA, MEMORY, Random, TABLES, contents, fill, instructions, memory, run, sequence,
    setting, state, unseen,
};

const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const TSS: u64 = 0x8000;
/// Stacks: of programs, and of the handler.
const STACK: u64 = 0xe000;
const HANDLER_STACK: u64 = 0xf000;
/// Where the handler of all exceptions lies.
const HANDLER: u64 = CODE + 0x7000;
/// How many more jumps a program may make.
const COUNTER: u64 = CODE + 0x7800;
/// Addresses of the pieces.
const TABLE: u64 = CODE + 0x7900;
/// CMP AL, imm8: defines all flags.
const COMPARE: [u8; 2] = [0x3c, 0x40];
/// Where exceptions save RFLAGS: always at the top of their stack.
const SAVED_FLAGS: u64 = HANDLER_STACK - 24;

/// What programs are filled with: compilers' code, and the x87.
struct Filler<'a>(&'a [u8]);

impl Computing for Filler<'_> {
    fn compute(&mut self, _: &Place, random: &mut Random, code: &mut Code) {
        if random.below(9) < 5 {
            let (bytes, list) = sequence(self.0, random);
            code.raw(&bytes);
            // What an instruction leaves undefined may be what was there before, which nobody else needed.
            if list.iter().any(|one| one.rflags_undefined() != 0) {
                code.raw(&COMPARE);
            }
        } else {
            for _ in 0..1 + random.below(8) {
                crate::x87::part(random, code.start, &mut code.bytes);
            }
        }
    }
}

/// Writes a program from a seed, and gives the processor that is to run it.
fn write(memory: &GuestMemory, compiled: &[u8], random: &mut Random) -> CpuState {
    // A program that did not end on both has left it different.
    let nothing = vec![0; MEMORY as usize];
    memory.write(0, &nothing).expect("it is all of memory");
    fill(memory, random);
    let put = |gpa: u64, bytes: &[u8]| memory.write(gpa, bytes).expect("it lies in memory");
    let quad = |gpa: u64, value: u64| put(gpa, &value.to_le_bytes());
    for (index, descriptor) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        quad(GDT + index as u64 * 8, descriptor);
    }
    for vector in 0..32 {
        // An interrupt gate to the handler, on the first stack of the table of stacks.
        let low = HANDLER & 0xffff | 0x08 << 16 | 0x8e01 << 32 | (HANDLER >> 16 & 0xffff) << 48;
        quad(IDT + vector * 16, low);
        quad(IDT + vector * 16 + 8, HANDLER >> 32);
    }
    // What a cached translation of a changed table leads to is the processor's choice, so no program changes them.
    for page in 1..=TSS >> 12 {
        quad(TABLES + 0x3000 + page * 8, page << 12 | 5);
    }
    put(TSS, &[0; 0x68]);
    quad(TSS + 4, HANDLER_STACK);
    quad(TSS + 0x24, HANDLER_STACK);
    put(CODE, &[0; 0x8000]);
    let base = CODE + random.below(PIECE);
    quad(COUNTER, 10 + random.below(200));
    for number in 0..PIECES {
        quad(TABLE + number * 8, base + number * PIECE);
    }
    let mut program = Program {
        random,
        computing: &mut Filler(compiled),
        place: Place {
            base,
            counter: COUNTER,
            table: TABLE,
            data: (DATA, 0x2_0000),
            stack: STACK - 0x100,
            nowhere: 0x70_0000,
            end: None,
        },
    };
    for number in 0..PIECES {
        let piece = program.piece(number);
        put(piece.start, &piece.bytes);
    }
    let mut handler = Code::at(HANDLER);
    // Nobody looks at the flags of what faulted but who reads the frame.
    handler.raw(&COMPARE);
    program.count(&mut handler);
    handler.raw(&[0x48, 0x8d, 0x25]).to(STACK - 0x200, 0);
    // Else #MF comes again and again.
    handler.raw(&[0xdb, 0xe2]); // fnclex
    let next = program.any_piece();
    handler.raw(&[0xfc, 0xe9]).to(next, 0); // cld; jmp
    put(HANDLER, &handler.bytes);

    let mut start = state(random);
    start.rip = base;
    start.gpr[gpr::RSP] = STACK - 0x300;
    let system = &mut start.system;
    system.cr4 |= random.next() & cr4::FSGSBASE;
    system.gdtr = TableRegister {
        base: GDT,
        limit: 0x27,
    };
    system.idtr = TableRegister {
        base: IDT,
        limit: 32 * 16 - 1,
    };
    system.tr = Segment {
        selector: 0x30,
        base: TSS,
        limit: 0x67,
        access: 0x8b,
    };
    if random.below(2) == 0 {
        let level = access::DPL;
        let data = Segment::flat(0x23, access::WRITABLE | access::DB | level);
        let (fs, gs) = (
            system.segments[sreg::FS].base,
            system.segments[sreg::GS].base,
        );
        system.segments = [data; 6];
        system.segments[sreg::FS].base = fs;
        system.segments[sreg::GS].base = gs;
        system.segments[sreg::CS] =
            Segment::flat(0x1b, access::CODE | access::READABLE | access::L | level);
    }
    start
}

/// Kicks a processor that does not come to an end.
fn bounded<T>(vcpu: &mut dyn Vcpu, go: impl FnOnce(&mut dyn Vcpu) -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    let signals = vcpu.signals();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(Duration::from_secs(1)) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                signals.raise(Signal::Kick);
            }
        });
        let result = go(vcpu);
        drop(done);
        result
    })
}

#[test]
fn programs_do_the_same_in_lockstep_and_with_linked_blocks() {
    let compiled = instructions();
    let seed = setting("TRAPGATE_TEST_SEED", 0x005e_ed0f_9806_0a15);
    let cases = setting("TRAPGATE_TEST_CASES", 150);
    let mut random = Random(seed | 1);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let (left, rights) = (memory(), [memory(), memory()]);
    let mut lockstep = Lockstep::new(
        Arc::clone(&left),
        Box::new(NoDevices),
        profile.clone(),
        0,
        1,
    )
    .expect("the host can run translated code");
    let mut translators = rights.each_ref().map(|memory| {
        let (memory, profile) = (Arc::clone(memory), profile.clone());
        Translating::new(memory, Box::new(NoDevices), profile, 0, 1)
            .expect("the host can run translated code")
    });
    translators[0].be_exact();
    let (mut ended, mut compared) = (0, 0);
    for case in 0..cases {
        let case_seed = setting("TRAPGATE_TEST_CASE", random.next() | 1);
        let start = write(&left, &compiled, &mut Random(case_seed));
        for memory in &rights {
            write(memory, &compiled, &mut Random(case_seed));
        }
        let before = lockstep.compared().blocks;
        let (exit, expected) = bounded(&mut lockstep, |vcpu| run(vcpu, &start));
        if let Exit::Failed(failure) = exit {
            let report = lockstep.explain().unwrap_or_default();
            panic!("case {case} seed {case_seed}: {failure}\n{report}");
        }
        compared += lockstep.compared().blocks - before;
        let found = translators
            .each_mut()
            .map(|jit| bounded(jit, |vcpu| run(vcpu, &start)));
        if exit == Exit::Kicked {
            // It wrote over its own counter. The translator alone is faster, and may have come to the end.
            continue;
        }
        ended += 1;
        let one = contents(&left);
        for (index, (other_exit, mut found)) in found.into_iter().enumerate() {
            let mut other = contents(&rights[index]);
            if index == 1 {
                found.rflags ^= (found.rflags ^ expected.rflags) & unseen(&exit);
                let saved = SAVED_FLAGS as usize..;
                let masks = rflags::ARITHMETIC.to_le_bytes();
                for ((byte, expected), mask) in
                    other[saved.clone()].iter_mut().zip(&one[saved]).zip(masks)
                {
                    *byte ^= (*byte ^ expected) & mask;
                }
            }
            assert_eq!(exit, other_exit, "case {case} seed {case_seed}");
            assert_eq!(expected, found, "case {case} seed {case_seed}");
            let difference = one.iter().zip(&other).position(|(one, other)| one != other);
            assert_eq!(
                difference, None,
                "case {case} seed {case_seed} translator {index}: gpa"
            );
        }
    }
    eprintln!("{ended} of {cases} programs ended, {compared} blocks compared; seed {seed:#x}");
    assert!(ended > cases * 9 / 10, "{ended} of {cases}");
    assert!(
        compared > cases * 20,
        "{compared} blocks of {cases} programs"
    );
}
