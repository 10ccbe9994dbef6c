//! Code that means another instruction on another profile.

use std::sync::Arc;

use trapgate_engine::{Exit, NoDevices, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{gpr, rflags};
use trapgate_x86::{CpuProfile, CpuState};

use crate::guest::{CODE, Random, TABLES, memory, run, state};

/// Runs code on the engines, which agree, from RAX and RDX of all ones and RCX = 0.
fn end(level: Level, code: &[u8]) -> CpuState {
    let profile = CpuProfile::new(level, 1_000_000_000);
    let mut ends = Vec::new();
    for engine in 0..3 {
        let memory = memory();
        for (at, entry) in [
            (0, TABLES + 0x1007),
            (0x1000, TABLES + 0x2007),
            (0x2000, 0x87),
        ] {
            memory
                .write(TABLES + at, &u64::to_le_bytes(entry))
                .expect("tables lie in memory");
        }
        memory.write(CODE, code).expect("code lies in memory");
        let mut start = state(&mut Random(7));
        start.system.xcr0 &= profile.xcr0_mask();
        start.xsave.0[512] &= profile.xcr0_mask() as u8;
        start.gpr[gpr::RAX] = u64::MAX;
        start.gpr[gpr::RDX] = u64::MAX;
        start.gpr[gpr::RCX] = 0;
        let (world, profile) = (Box::new(NoDevices), profile.clone());
        let mut vcpu: Box<dyn Vcpu> = match engine {
            0 => Box::new(Interpreter::new(memory, world, profile, 0, 1)),
            1 => Box::new(
                Translating::new(Arc::clone(&memory), world, profile, 0, 1)
                    .expect("the host can run translated code"),
            ),
            _ => Box::new(
                Lockstep::new(memory, world, profile, 0, 1)
                    .expect("the host can run translated code"),
            ),
        };
        let (exit, end) = run(&mut *vcpu, &start);
        assert_eq!(exit, Exit::Halted);
        ends.push(end);
    }
    let first = ends.swap_remove(0);
    for other in ends {
        assert_eq!(first.gpr, other.gpr);
    }
    first
}

#[test]
fn processors_without_tzcnt_and_lzcnt_scan_bits_with_a_prefix() {
    for opcode in [0xbc, 0xbd] {
        // xor ebx, ebx; rep bsf rax, rcx; setz bl; rep bsf rdx, rdx; hlt
        let code = [
            0x31, 0xdb, 0xf3, 0x48, 0x0f, opcode, 0xc1, 0x0f, 0x94, 0xc3, 0xf3, 0x48, 0x0f, opcode,
            0xd2, 0xf4,
        ];
        let old = end(Level::V2, &code);
        // Nothing was found: what was there stays (AMD64 vol. 3, BSF; SDM vol. 2A since its revision of 2023).
        assert_eq!(old.gpr[gpr::RAX], u64::MAX);
        assert_eq!(old.gpr[gpr::RBX], 1);
        assert_eq!(
            old.gpr[gpr::RDX],
            if opcode == 0xbc { 0 } else { 63 },
            "the number of the bit"
        );
        let new = end(Level::V3, &code);
        assert_eq!(new.gpr[gpr::RAX], 64);
        // ZF says that the result is 0.
        assert_eq!(new.gpr[gpr::RBX], 0);
        assert_eq!(new.gpr[gpr::RDX], 0, "of zeroes before the first one");
        assert_eq!(new.rflags & rflags::ZF, rflags::ZF);
    }
}
