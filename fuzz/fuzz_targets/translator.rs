//! Any bytes as guest code in 64-bit mode. It runs in lockstep, where translator and interpreter agree after every
//! block; then on the translator alone, with its blocks linked, which comes to the same end.
#![no_main]
#![forbid(unsafe_code)]

#[path = "interpreter/code.rs"]
mod code;
#[path = "interpreter/scenery.rs"]
mod scenery;
#[path = "interpreter/void.rs"]
mod void;
#[path = "interpreter/watch.rs"]
mod watch;

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use scenery::{Guest, RAM};
use trapgate_engine::{Exit, Signal, Vcpu};
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_x86::profile::Level;
use trapgate_x86::{CpuProfile, CpuState};
use void::Void;

/// Kicks after which a guest has run long enough.
const PATIENCE: u32 = 3;

#[derive(Arbitrary, Debug)]
struct Input {
    v3: bool,
    interrupt: Option<u8>,
    guest: Guest,
}

/// How a guest that came to an end by itself ended.
#[derive(Debug, PartialEq)]
struct Ended {
    exit: Exit,
    state: CpuState,
}

fuzz_target!(|input: Input| {
    let mut input = input;
    input.guest.translate();
    let level = if input.v3 { Level::V3 } else { Level::V2 };
    let profile = CpuProfile::new(level, 1_000_000_000);
    let memories = [(); 2].map(|()| {
        let ram = RamRange {
            start: 0,
            length: RAM,
        };
        let memory = Arc::new(GuestMemory::new(&[ram]).expect("the host has memory"));
        input.guest.paint(&memory);
        memory
    });
    let world = || {
        Box::new(Void {
            interrupt: input.interrupt,
            clock: 0,
        })
    };
    let [one, other] = memories.each_ref().map(Arc::clone);
    let mut lockstep = Lockstep::new(one, world(), profile.clone(), 0, 1)
        .expect("the host can run translated code");
    let mut jit = Translating::new(other, world(), profile.clone(), 0, 1)
        .expect("the host can run translated code");
    jit.be_exact();
    let start = input.guest.state(&profile);
    let both = (
        run(&input, &mut lockstep, &start),
        run(&input, &mut jit, &start),
    );
    // Between which two instructions an interrupt comes is the processor's choice.
    if let (Some(stepped), Some(ran)) = both
        && input.interrupt.is_none()
    {
        let bytes = memories.map(|memory| {
            let mut bytes = vec![0; RAM as usize];
            memory.read(0, &mut bytes).expect("it is RAM");
            bytes
        });
        // RDRAND and RDSEED answer differently each time.
        if bytes[0].windows(2).any(|pair| *pair == [0x0f, 0xc7]) {
            return;
        }
        assert_eq!(stepped, ran);
        let difference = bytes[0].iter().zip(&bytes[1]).position(|(a, b)| a != b);
        assert_eq!(difference, None, "address of the first byte that differs");
    }
});

/// Runs a guest, for a while at most.
fn run(input: &Input, vcpu: &mut dyn Vcpu, start: &CpuState) -> Option<Ended> {
    vcpu.set_state(start)
        .expect("a processor can be in this state");
    let signals = vcpu.signals();
    if input.interrupt.is_some() {
        signals.raise(Signal::Interrupt);
    }
    let watched = watch::kick(&signals);
    let mut kicks = 0;
    let exit = loop {
        match vcpu.run() {
            exit @ (Exit::Halted | Exit::ShutDown) => break Some(exit),
            Exit::Failed(failure) => {
                panic!("{failure}\n{}", vcpu.explain().unwrap_or_default());
            }
            Exit::Kicked | Exit::Debug => kicks += 1,
        }
        if kicks > PATIENCE {
            break None;
        }
    };
    drop(watched);
    let state = vcpu.state();
    exit.map(|exit| Ended { exit, state })
}
