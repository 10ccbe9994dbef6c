//! Runs of instructions as compilers make them, without jumps, of which every case is one, on the interpreter and on the
//! translator: exact, and as users run it.

use std::sync::Arc;

use trapgate_engine::{Exit, NoDevices};
use trapgate_interp::Interpreter;
use trapgate_jit::Translating;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::guest::{
    CODE, Random, contents, fill, instructions, memory, run, sequence, setting, state, unseen,
};
use crate::together;

#[test]
fn straight_code_of_compilers_does_the_same_on_both() {
    let code = instructions();
    let seed = setting("TRAPGATE_TEST_SEED", 0x1234_5678_9abc_def1);
    let cases = setting("TRAPGATE_TEST_CASES", 3000);
    let mut random = Random(seed);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let left = memory();
    let mut interp = Interpreter::new(
        Arc::clone(&left),
        Box::new(NoDevices),
        profile.clone(),
        0,
        1,
    );
    let mut translators = [true, false].map(|exact| {
        let right = memory();
        let (guest, profile) = (Arc::clone(&right), profile.clone());
        let mut jit = Translating::new(guest, Box::new(NoDevices), profile, 0, 1)
            .expect("the host can run translated code");
        if exact {
            jit.be_exact();
        }
        (jit, right, exact)
    });
    let mut halted = 0;
    for case in 0..cases {
        let case_seed = random.next() | 1;
        let mut random = Random(case_seed);
        fill(&left, &mut random);
        for (_, right, _) in &translators {
            fill(right, &mut Random(case_seed));
        }
        let (mut bytes, list) = sequence(&code, &mut random);
        bytes.extend_from_slice(&[0xf4; 16]);
        for memory in translators.iter().map(|(_, right, _)| right).chain([&left]) {
            memory.write(CODE, &bytes).expect("code lies in memory");
        }
        let start = state(&mut random);
        let (exit, expected) = run(&mut interp, &start);
        halted += u64::from(exit == Exit::Halted);
        for (jit, right, exact) in &mut translators {
            let mut expected = expected.clone();
            let (other_exit, mut found) = run(jit, &start);
            // Flags that the manual leaves undefined are another test's.
            let undefined = list.iter().fold(0, |flags, instruction| {
                flags | instruction.rflags_undefined()
            });
            let mut undefined = undefined_flags(undefined);
            if !*exact {
                undefined |= unseen(&exit);
            }
            expected.rflags &= !undefined;
            found.rflags &= !undefined;
            let same =
                exit == other_exit && expected == found && contents(&left) == contents(right);
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
                let (a, b) = (contents(&left), contents(right));
                for at in (0..a.len()).filter(|&at| a[at] != b[at]).take(16) {
                    eprintln!("  memory {at:x}: {:x} {:x}", a[at], b[at]);
                }
                panic!("translator and interpreter differ");
            }
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

/// CH is a part of a register that lives elsewhere.
#[test]
fn instructions_with_ch_do_the_same_on_both() {
    const FORMS: &[&[u8]] = &[
        &[0xf6, 0xc5, 0x41],       // test ch, 0x41
        &[0x80, 0xe5, 0x5a],       // and ch, 0x5a
        &[0x80, 0xcd, 0x81],       // or ch, 0x81
        &[0x88, 0xc5],             // mov ch, al
        &[0x88, 0xea],             // mov dl, ch
        &[0x00, 0xdd],             // add ch, bl
        &[0x10, 0xf5],             // adc ch, dh
        &[0x30, 0xe9],             // xor cl, ch
        &[0x0f, 0xb6, 0xcd],       // movzx ecx, ch
        &[0x0f, 0xbe, 0xc5],       // movsx eax, ch
        &[0xd0, 0xcd],             // ror ch, 1
        &[0xc0, 0xe5, 3],          // shl ch, 3
        &[0x86, 0xdd],             // xchg ch, bl
        &[0x86, 0xcd],             // xchg ch, cl
        &[0x0f, 0x92, 0xc5],       // setc ch
        &[0x0f, 0xc0, 0xd5],       // xadd ch, dl
        &[0x0f, 0xb0, 0xdd],       // cmpxchg ch, bl
        &[0x8a, 0x2d, 0, 0, 0, 0], // mov ch, [rip]
        &[0x89, 0xd1],             // mov ecx, edx
        &[0x48, 0x01, 0xc1],       // add rcx, rax
    ];
    together::compare(600, |random, _| {
        let mut code = Vec::new();
        for _ in 0..1 + random.below(12) {
            code.extend_from_slice(FORMS[random.below(FORMS.len() as u64) as usize]);
        }
        // Some leave flags undefined: add eax, ebx.
        code.extend_from_slice(&[0x01, 0xd8]);
        code
    });
}

/// PUSH and CALL of memory take their operand's address another way than the rest.
#[test]
fn addresses_relative_to_eip_are_those_relative_to_rip() {
    const FORMS: &[&[u8]] = &[
        &[0x67, 0xff, 0x35, 0, 0, 0, 0],       // push [eip]
        &[0x67, 0x8b, 0x05, 0, 0, 0, 0],       // mov eax, [eip]
        &[0x67, 0x48, 0x8d, 0x1d, 9, 0, 0, 0], // lea rbx, [eip + 9]
        &[0x67, 0x03, 0x0d, 4, 0, 0, 0],       // add ecx, [eip + 4]
        &[0x58],                               // pop rax
    ];
    together::compare(200, |random, _| {
        let mut code = Vec::new();
        for _ in 0..1 + random.below(12) {
            code.extend_from_slice(FORMS[random.below(FORMS.len() as u64) as usize]);
        }
        // Some leave flags undefined: add eax, ebx.
        code.extend_from_slice(&[0x01, 0xd8]);
        code
    });
}
