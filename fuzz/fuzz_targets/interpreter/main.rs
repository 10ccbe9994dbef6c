//! Any bytes as guest code, in every mode, with tables that may be anything too. The interpreter runs
//! them without a panic, in bounded memory, and can always be kicked out of a run; and it does the
//! same by blocks as one instruction at a time.
#![no_main]
#![forbid(unsafe_code)]

mod code;
mod scenery;
mod void;
mod watch;

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use scenery::{Guest, RAM};
use trapgate_engine::{Exit, Signal, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_x86::profile::Level;
use trapgate_x86::{CpuProfile, CpuState};
use void::Void;

/// Instructions after which the guest has run long enough. A loop runs many more before the first
/// kick, which is no matter.
const ENOUGH: u64 = 400;
/// Kicks after which a guest has run long enough that gets no further: a repeated string instruction
/// counts as one.
const PATIENCE: u32 = 4;

#[derive(Arbitrary, Debug)]
struct Input {
    v3: bool,
    interrupt: Option<u8>,
    nmi: bool,
    guest: Guest,
}

/// How far a guest came.
struct Ended {
    /// It halted or shut down by itself, so that how it was run must not matter.
    by_itself: bool,
    exit: Exit,
    state: CpuState,
    memory: Arc<GuestMemory>,
}

fuzz_target!(|input: Input| {
    let stepped = run(&input, Interpreter::step);
    let ran = run(&input, Interpreter::run);
    // Between which two instructions an interrupt comes is the processor's choice.
    let is_alone = input.interrupt.is_none() && !input.nmi;
    if is_alone && stepped.by_itself && ran.by_itself {
        compare(&stepped, &ran);
    }
});

fn run(input: &Input, go: impl Fn(&mut Interpreter) -> Exit) -> Ended {
    let ram = RamRange {
        start: 0,
        length: RAM,
    };
    let memory = Arc::new(GuestMemory::new(&[ram]).expect("the host has memory"));
    input.guest.paint(&memory);
    let level = if input.v3 { Level::V3 } else { Level::V2 };
    let profile = CpuProfile::new(level, 1_000_000_000);
    let world = Void {
        interrupt: input.interrupt,
        clock: 0,
    };
    let state = input.guest.state(&profile);
    let mut cpu = Interpreter::new(Arc::clone(&memory), Box::new(world), profile, 0, 1);
    cpu.set_state(&state)
        .expect("a processor can be in this state");
    let signals = cpu.signals();
    if input.interrupt.is_some() {
        signals.raise(Signal::Interrupt);
    }
    if input.nmi {
        signals.raise(Signal::Nmi);
    }
    let watched = watch::kick(&signals);
    let mut kicks = 0;
    let (by_itself, exit) = loop {
        let exit = go(&mut cpu);
        match exit {
            Exit::Halted | Exit::ShutDown => break (true, exit),
            Exit::Kicked => kicks += 1,
            Exit::Debug => {}
            Exit::Failed(failure) => panic!("{failure}"),
        }
        if cpu.instructions() > ENOUGH || kicks > PATIENCE {
            break (false, exit);
        }
    };
    drop(watched);
    let state = cpu.state();
    // What an engine gives it takes: idea 1 of the design.
    cpu.set_state(&state).expect("it was in this state");
    Ended {
        by_itself,
        exit,
        state,
        memory,
    }
}

fn compare(stepped: &Ended, ran: &Ended) {
    let bytes = |memory: &GuestMemory| {
        let mut bytes = vec![0; RAM as usize];
        memory.read(0, &mut bytes).expect("it is RAM");
        bytes
    };
    let (one, other) = (bytes(&stepped.memory), bytes(&ran.memory));
    let same = stepped.exit == ran.exit && stepped.state == ran.state && one == other;
    // RDRAND and RDSEED answer differently each time.
    if same || one.windows(2).any(|pair| *pair == [0x0f, 0xc7]) {
        return;
    }
    assert_eq!(stepped.exit, ran.exit);
    assert_eq!(stepped.state, ran.state);
    let difference = one.iter().zip(&other).position(|(one, other)| one != other);
    assert_eq!(difference, None, "address of the first byte that differs");
}
