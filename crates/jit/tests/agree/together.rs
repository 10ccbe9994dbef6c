//! Runs of instructions without jumps on the interpreter, in lockstep, and on the translator: exact, and as users run it.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use trapgate_engine::{Exit, NoDevices, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::GuestMemory;
use trapgate_x86::profile::Level;
use trapgate_x86::{CpuProfile, CpuState};

use crate::guest::{CODE, Random, contents, fill, memory, run, setting, state, unseen};

/// Compares so many cases, each of which `make` gives the code of; it may change the processor's state.
pub(crate) fn compare(cases: u64, make: impl Fn(&mut Random, &mut CpuState) -> Vec<u8>) {
    let seed = setting("TRAPGATE_TEST_SEED", 0x0087_0087_8087_8081);
    let cases = setting("TRAPGATE_TEST_CASES", cases);
    let mut random = Random(seed);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let memories = [(); 4].map(|()| memory());
    let [one, two, three, four] = memories.each_ref().map(Arc::clone);
    let mut interp = Interpreter::new(one, Box::new(NoDevices), profile.clone(), 0, 1);
    let mut jit = Translating::new(two, Box::new(NoDevices), profile.clone(), 0, 1)
        .expect("the host can run translated code");
    jit.be_exact();
    let mut plain = Translating::new(four, Box::new(NoDevices), profile.clone(), 0, 1)
        .expect("the host can run translated code");
    let mut lockstep = Lockstep::new(three, Box::new(NoDevices), profile, 0, 1)
        .expect("the host can run translated code");
    let mut halted = 0;
    for case in 0..cases {
        let case_seed = setting("TRAPGATE_TEST_CASE", random.next() | 1);
        let write = |memory: &GuestMemory| {
            let mut random = Random(case_seed);
            fill(memory, &mut random);
            let mut start = state(&mut random);
            let mut code = make(&mut random, &mut start);
            code.extend([0xf4; 16]);
            memory.write(CODE, &code).expect("code lies in memory");
            (code, start)
        };
        let (code, start) = write(&memories[0]);
        for memory in &memories[1..] {
            write(memory);
        }
        let expected = run(&mut interp, &start);
        let found = run(&mut jit, &start);
        let stepped = run(&mut lockstep, &start);
        let mut used = run(&mut plain, &start);
        used.1.rflags ^= (used.1.rflags ^ expected.1.rflags) & unseen(&expected.0);
        halted += u64::from(expected.0 == Exit::Halted);
        if let Exit::Failed(failure) = &stepped.0 {
            let report = lockstep.explain().unwrap_or_default();
            panic!("case {case} seed {case_seed}: {failure}\n{report}");
        }
        for (other, memory) in [
            (&found, &memories[1]),
            (&stepped, &memories[2]),
            (&used, &memories[3]),
        ] {
            let differs = (0..832).filter(|&at| expected.1.xsave.0[at] != other.1.xsave.0[at]);
            let differs: Vec<usize> = differs.collect();
            assert!(
                expected == *other && contents(&memories[0]) == contents(memory),
                "case {case} seed {case_seed}: {:?} {:?}, rip {:x} {:x}, rflags {:x} {:x}, xsave at {differs:?}\n{}",
                expected.0,
                other.0,
                expected.1.rip,
                other.1.rip,
                expected.1.rflags,
                other.1.rflags,
                listing(&code),
            );
        }
    }
    eprintln!("{halted} of {cases} ran to the end");
    assert!(halted > cases / 5, "{halted} of {cases}");
}

fn listing(code: &[u8]) -> String {
    Decoder::with_ip(64, code, CODE, DecoderOptions::NONE)
        .into_iter()
        .take_while(|instruction| instruction.mnemonic() != Mnemonic::Hlt)
        .map(|instruction| format!("  {:x} {:?}\n", instruction.ip(), instruction.code()))
        .collect()
}
