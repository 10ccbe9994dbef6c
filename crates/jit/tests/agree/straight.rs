//! Runs of instructions as compilers make them, without jumps, of which every case is one.

use std::sync::Arc;

use trapgate_engine::{Exit, NoDevices};
use trapgate_interp::Interpreter;
use trapgate_jit::Translating;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::guest::{
    CODE, Random, contents, fill, instructions, memory, run, sequence, setting, state,
};

#[test]
fn straight_code_of_compilers_does_the_same_on_both() {
    let code = instructions();
    let seed = setting("TRAPGATE_TEST_SEED", 0x1234_5678_9abc_def1);
    let cases = setting("TRAPGATE_TEST_CASES", 3000);
    let mut random = Random(seed);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let (left, right) = (memory(), memory());
    let mut interp = Interpreter::new(
        Arc::clone(&left),
        Box::new(NoDevices),
        profile.clone(),
        0,
        1,
    );
    let mut jit = Translating::new(Arc::clone(&right), Box::new(NoDevices), profile, 0, 1)
        .expect("the host can run translated code");
    jit.be_exact();
    let mut halted = 0;
    for case in 0..cases {
        let case_seed = random.next() | 1;
        let mut random = Random(case_seed);
        let mut twin = Random(case_seed);
        fill(&left, &mut random);
        fill(&right, &mut twin);
        let (mut bytes, list) = sequence(&code, &mut random);
        bytes.extend_from_slice(&[0xf4; 16]);
        for memory in [&left, &right] {
            memory.write(CODE, &bytes).expect("code lies in memory");
        }
        let start = state(&mut random);
        let (exit, mut expected) = run(&mut interp, &start);
        let (other_exit, mut found) = run(&mut jit, &start);
        halted += u64::from(exit == Exit::Halted);
        // Flags that the manual leaves undefined are another test's.
        let undefined = list.iter().fold(0, |flags, instruction| {
            flags | instruction.rflags_undefined()
        });
        let undefined = undefined_flags(undefined);
        expected.rflags &= !undefined;
        found.rflags &= !undefined;
        let same = exit == other_exit && expected == found && contents(&left) == contents(&right);
        if !same {
            eprintln!("case {case} seed {case_seed}");
            for instruction in &list {
                let offset = (instruction.ip() - CODE) as usize;
                let bytes = &bytes[offset..offset + instruction.len()];
                eprintln!(
                    "  {:x} {:?} {:02x?}",
                    instruction.ip(),
                    instruction.code(),
                    bytes
                );
            }
            eprintln!("interpreter {exit:?}, translator {other_exit:?}");
            for index in 0..16 {
                eprintln!(
                    "  {index:2} {:016x} {:016x} {:016x}{}",
                    start.gpr[index],
                    expected.gpr[index],
                    found.gpr[index],
                    if expected.gpr[index] == found.gpr[index] {
                        ""
                    } else {
                        " <<"
                    }
                );
            }
            eprintln!("rip {:x} {:x}", expected.rip, found.rip);
            eprintln!(
                "rflags {:x} {:x} from {:x}",
                expected.rflags, found.rflags, start.rflags
            );
            if expected.xsave != found.xsave {
                for at in (0..832).step_by(8) {
                    if expected.xsave.0[at..at + 8] != found.xsave.0[at..at + 8] {
                        eprintln!(
                            "  xsave {at}: {:02x?} {:02x?}",
                            &expected.xsave.0[at..at + 8],
                            &found.xsave.0[at..at + 8]
                        );
                    }
                }
            }
            let (a, b) = (contents(&left), contents(&right));
            for at in (0..a.len()).filter(|&at| a[at] != b[at]).take(16) {
                eprintln!("  memory {at:x}: {:x} {:x}", a[at], b[at]);
            }
            panic!("translator and interpreter differ");
        }
    }
    eprintln!("{halted} of {cases} cases ran to the end");
    assert!(halted > cases / 5, "{halted} of {cases}");
}

fn undefined_flags(decoder: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [
        (B::CF, 1),
        (B::PF, 4),
        (B::AF, 0x10),
        (B::ZF, 0x40),
        (B::SF, 0x80),
        (B::OF, 0x800),
    ]
    .iter()
    .filter(|(bit, _)| decoder & bit != 0)
    .map(|(_, flag)| flag)
    .sum()
}
