//! A device writes over code while a processor runs it: another thread of the machine, through `GuestMemory::write`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use trapgate_engine::{Exit, NoDevices, Signal, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::GuestMemory;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::guest::{CODE, DATA, Random, fill, memory, state};

/// Where the loop says what it has executed.
const SAID: u64 = DATA + 0x100;
/// Times that the loop is written over.
const WRITES: u32 = 500;
/// No processor takes so long to see what was written, even if others leave its thread a hundredth of the host: it would never.
const PATIENCE: Duration = Duration::from_secs(300);

/// The loop's constant, its four bytes aligned.
const CONSTANT: u64 = CODE + 4;

/// Writes each number into the loop once the last was executed, and in the end HLT over its first instruction.
fn device(memory: &GuestMemory) -> Result<(), String> {
    for number in 1..=WRITES {
        memory
            .write(CONSTANT, &number.to_le_bytes())
            .map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let mut said = [0; 4];
        while u32::from_le_bytes(said) != number {
            if begun.elapsed() > PATIENCE {
                return Err(format!("{number} is not executed, but {said:?}"));
            }
            std::thread::yield_now();
            memory
                .read(SAID, &mut said)
                .map_err(|error| error.to_string())?;
        }
    }
    memory
        .write(CODE, &[0xf4])
        .map_err(|error| error.to_string())
}

#[test]
fn code_that_a_device_writes_over_is_executed_as_written() {
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let works = "the host can run translated code";
    let (a, b, c) = (memory(), memory(), memory());
    let mut interp = Interpreter::new(Arc::clone(&a), Box::new(NoDevices), profile.clone(), 0, 1);
    let mut jit =
        Translating::new(Arc::clone(&b), Box::new(NoDevices), profile.clone(), 0, 1).expect(works);
    let mut lockstep =
        Lockstep::new(Arc::clone(&c), Box::new(NoDevices), profile, 0, 1).expect(works);
    let engines: [(&str, &mut dyn Vcpu, _); 3] = [
        ("interpreter", &mut interp, a),
        ("translator", &mut jit, b),
        ("lockstep", &mut lockstep, c),
    ];
    for (name, vcpu, memory) in engines {
        let mut random = Random(7);
        fill(&memory, &mut random);
        let page = (SAID & !0xfff) | 7;
        let entry = crate::guest::TABLES + 0x3000 + (SAID >> 12) * 8;
        memory.write(entry, &page.to_le_bytes()).expect("memory");
        // nop; nop; nop; mov eax, 0; mov [SAID], eax; jmp to the beginning
        let mut code = vec![0x90, 0x90, 0x90, 0xb8, 0, 0, 0, 0, 0x89, 0x04, 0x25];
        code.extend((SAID as u32).to_le_bytes());
        code.extend([0xeb, 0xef]);
        memory.write(CODE, &code).expect("memory");
        let start = state(&mut random);
        vcpu.set_state(&start).expect("the state is sound");
        let signals = vcpu.signals();
        let (exit, written) = std::thread::scope(|scope| {
            let memory = &memory;
            let device = scope.spawn(move || {
                let written = device(memory);
                if written.is_err() {
                    signals.raise(Signal::Kick);
                }
                written
            });
            (vcpu.run(), device.join().expect("it does not panic"))
        });
        assert_eq!(written, Ok(()), "{name}");
        assert_eq!(exit, Exit::Halted, "{name}");
        assert_eq!(vcpu.state().gpr[0], u64::from(WRITES), "{name}");
    }
}
