//! RDRAND and RDSEED, from the host kernel's generator.

use iced_x86::{Code, Instruction};
use rustix::rand::{GetRandomFlags, getrandom};
use trapgate_x86::registers::rflags;

use crate::cpu::{Cpu, Step};
use crate::op::{Handler, Op};

/// The handler of RDRAND or RDSEED. The size goes into `op.code`.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    op.code = match instruction.code() {
        Code::Rdrand_r16 | Code::Rdseed_r16 => 2,
        Code::Rdrand_r32 | Code::Rdseed_r32 => 4,
        Code::Rdrand_r64 | Code::Rdseed_r64 => 8,
        _ => return None,
    };
    Some(op_random)
}

/// A random number and CF; or zero without CF, which asks the guest to try again, where the host
/// has none to give. The other arithmetic flags are cleared.
fn op_random(cpu: &mut Cpu, op: &Op) -> Step {
    let random = random();
    let value = random.unwrap_or(0);
    match op.code {
        2 => cpu.set_reg(op.dst, value as u16),
        4 => cpu.set_reg(op.dst, value as u32),
        _ => cpu.set_reg(op.dst, value),
    }
    cpu.flags.put(if random.is_some() { rflags::CF } else { 0 });
    Ok(())
}

fn random() -> Option<u64> {
    let mut bytes = [0; 8];
    // Up to 256 bytes come whole; before the host's generator is seeded, none do.
    let count = getrandom(&mut bytes, GetRandomFlags::NONBLOCK).ok()?;
    (count == bytes.len()).then(|| u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{execute, long_cpu};

    #[test]
    fn random_numbers_fill_their_register_and_set_only_carry() {
        let (mut cpu, _) = long_cpu();
        // RDRAND and RDSEED of BX, EBX, RBX, and which bits of RBX they change.
        let cases: [(&[u8], u64); 4] = [
            (&[0x66, 0x0f, 0xc7, 0xf3], 0xffff),
            (&[0x0f, 0xc7, 0xf3], 0xffff_ffff),
            (&[0x48, 0x0f, 0xc7, 0xf3], u64::MAX),
            (&[0x48, 0x0f, 0xc7, 0xfb], u64::MAX),
        ];
        for (bytes, mask) in cases {
            let mut changed = 0;
            for _ in 0..64 {
                cpu.regs.gpr[3] = 0;
                cpu.set_rflags(rflags::ARITHMETIC);
                execute(&mut cpu, bytes).unwrap();
                assert_eq!(cpu.flags.get(), rflags::CF);
                changed |= cpu.regs.gpr[3];
            }
            // Each bit is zero 64 times in a row once in 2^64 tries.
            assert_eq!(changed, mask);
        }
    }
}
