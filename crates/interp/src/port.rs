//! IN and OUT, and who may use which port (SDM vol. 1, 19.5).

use iced_x86::{Code, Instruction};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::gpr;

use crate::cpu::{Cpu, Step};
use crate::op::{Handler, Op};

/// Where the I/O map base lies in a 32-bit or 64-bit TSS.
const MAP_BASE: u64 = 0x66;

/// The handler of IN or OUT. The size goes into `op.code`.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let (size, handler): (u8, Handler) = match instruction.code() {
        Code::In_AL_imm8 => (1, op_in::<false>),
        Code::In_AX_imm8 => (2, op_in::<false>),
        Code::In_EAX_imm8 => (4, op_in::<false>),
        Code::In_AL_DX => (1, op_in::<true>),
        Code::In_AX_DX => (2, op_in::<true>),
        Code::In_EAX_DX => (4, op_in::<true>),
        Code::Out_imm8_AL => (1, op_out::<false>),
        Code::Out_imm8_AX => (2, op_out::<false>),
        Code::Out_imm8_EAX => (4, op_out::<false>),
        Code::Out_DX_AL => (1, op_out::<true>),
        Code::Out_DX_AX => (2, op_out::<true>),
        Code::Out_DX_EAX => (4, op_out::<true>),
        _ => return None,
    };
    op.code = size;
    Some(handler)
}

fn port<const DX: bool>(cpu: &Cpu, op: &Op) -> u16 {
    if DX {
        cpu.regs.gpr[gpr::RDX] as u16
    } else {
        u16::from(op.immediate as u8)
    }
}

fn op_in<const DX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = port::<DX>(cpu, op);
    cpu.check_port(port, u64::from(op.code))?;
    let value = cpu.world.read_port(port, op.code);
    match op.code {
        1 => cpu.set_reg(gpr::RAX as u8, value as u8),
        2 => cpu.set_reg(gpr::RAX as u8, value as u16),
        _ => cpu.set_reg(gpr::RAX as u8, value),
    }
    cpu.end_block |= cpu.breakpoints_hit != 0;
    Ok(())
}

fn op_out<const DX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let port = port::<DX>(cpu, op);
    cpu.check_port(port, u64::from(op.code))?;
    let value = cpu.regs.gpr[gpr::RAX] as u32;
    let value = match op.code {
        1 => value & 0xff,
        2 => value & 0xffff,
        _ => value,
    };
    cpu.world.write_port(port, op.code, value);
    // What the device did (an interrupt, a reset) shows before the next instruction.
    cpu.end_block = true;
    Ok(())
}

impl Cpu {
    /// Whether the program may use `size` bytes of ports from `port`: #GP(0) where IOPL and the I/O
    /// permission bitmap say no. Notes I/O breakpoints.
    pub(crate) fn check_port(&mut self, port: u16, size: u64) -> Step {
        if self.is_protected() && (self.cpl > self.iopl() || self.is_vm86()) {
            self.check_port_map(port, size)?;
        }
        if self.breakpoints_enabled() {
            self.note_port_breakpoints(port, size);
        }
        Ok(())
    }

    /// The I/O permission bitmap of the TSS (SDM vol. 1, 19.5.2).
    fn check_port_map(&mut self, port: u16, size: u64) -> Step {
        let tss = self.sys.tr;
        let limit = u64::from(tss.limit);
        let has_map = matches!(tss.access & access::TYPE, system::TSS | system::TSS_BUSY);
        if !tss.is_usable() || !has_map || limit < MAP_BASE + 1 {
            return self.gp0();
        }
        let base: u16 = self.read_system(tss.base.wrapping_add(MAP_BASE))?;
        let at = u64::from(base) + u64::from(port) / 8;
        // The processor always reads two bytes, both of which must be inside the limit.
        if at + 1 > limit {
            return self.gp0();
        }
        let bits: u16 = self.read_system(tss.base.wrapping_add(at))?;
        let wanted = ((1u32 << size) - 1) << (port % 8);
        if u32::from(bits) & wanted != 0 {
            return self.gp0();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Segment;
    use trapgate_x86::registers::{cr4, dr, rflags};

    use super::*;
    use crate::cpu::Stop;
    use crate::testing::{GP0, execute, fault};
    use crate::testing::{long_cpu, protected_cpu, reset_cpu, set_cpl};

    const TSS_AT: u64 = 0x6000;
    /// Offset of the permission bitmap in the TSS.
    const MAP_AT: u64 = 0x68;

    /// A user-mode processor with a TSS of `limit` whose bitmap starts with `map`.
    fn user_cpu(limit: u32, map: &[u8]) -> Cpu {
        let (mut cpu, _) = long_cpu();
        cpu.sys.tr = Segment {
            selector: 0x40,
            base: TSS_AT,
            limit,
            access: access::P | system::TSS_BUSY,
        };
        let base = (MAP_AT as u16).to_le_bytes();
        cpu.memory.write(TSS_AT + MAP_BASE, &base).unwrap();
        cpu.memory.write(TSS_AT + MAP_AT, map).unwrap();
        set_cpl(&mut cpu, 3);
        cpu
    }

    #[test]
    fn operands_have_the_size_of_the_register() {
        let (mut cpu, world) = long_cpu();
        cpu.regs.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
        cpu.regs.gpr[gpr::RDX] = 0x9999_1234;
        let instructions: [&[u8]; 4] = [&[0xe6, 0xf0], &[0xee], &[0x66, 0xef], &[0xef]];
        for bytes in instructions {
            execute(&mut cpu, bytes).unwrap();
            assert!(cpu.end_block);
        }
        let written = world.with(|told| told.port_writes.clone());
        let expected = [
            (0xf0, 1, 0x88),
            (0x1234, 1, 0x88),
            (0x1234, 2, 0x7788),
            (0x1234, 4, 0x5566_7788),
        ];
        assert_eq!(written, expected);
        world.with(|told| told.ports.insert(0x1234, 0xaabb_ccdd));
        world.with(|told| told.ports.insert(0xf0, 0x11));
        let cases: [(&[u8], u64); 4] = [
            (&[0xe4, 0xf0], 0x1122_3344_5566_7711),
            (&[0xec], 0x1122_3344_5566_77dd),
            (&[0x66, 0xed], 0x1122_3344_5566_ccdd),
            (&[0xed], 0xaabb_ccdd),
        ];
        for (bytes, rax) in cases {
            execute(&mut cpu, bytes).unwrap();
            assert_eq!(cpu.regs.gpr[gpr::RAX], rax, "{bytes:02x?}");
        }
    }

    #[test]
    fn io_privilege_level_opens_every_port() {
        let (mut cpu, _) = protected_cpu();
        cpu.sys.tr.limit = 0;
        set_cpl(&mut cpu, 3);
        assert_eq!(fault(&mut cpu, &[0xee]), GP0);
        cpu.set_rflags(rflags::IOPL);
        execute(&mut cpu, &[0xee]).unwrap();
        let (mut cpu, _) = reset_cpu();
        execute(&mut cpu, &[0xee]).unwrap();
    }

    #[test]
    fn bitmap_opens_single_ports() {
        // Ports 0 to 7 closed, 8 to 15 open but for 12, 16 to 23 open.
        let mut cpu = user_cpu(MAP_AT as u32 + 3, &[0xff, 0x10, 0x00, 0xff]);
        let cases = [
            (7, 1, false),
            (8, 1, true),
            (8, 4, true),
            (9, 4, false),
            (12, 1, false),
            (13, 4, true),
            (16, 4, true),
            (22, 4, false),
            (21, 2, true),
        ];
        for (port, size, open) in cases {
            let step = cpu.check_port(port, size);
            assert_eq!(step.is_ok(), open, "port {port}, {size} bytes");
        }
    }

    #[test]
    fn ports_beyond_the_limit_are_closed() {
        let mut cpu = user_cpu(MAP_AT as u32 + 1, &[0; 8]);
        assert_eq!(cpu.check_port(7, 1), Ok(()));
        assert_eq!(
            cpu.check_port(8, 1),
            Err(Stop::Fault),
            "second byte outside"
        );
        cpu.sys.tr.limit = 0x66;
        assert_eq!(cpu.check_port(0, 1), Err(Stop::Fault), "no map base");
        cpu.sys.tr.limit = 0xffff;
        cpu.sys.tr.access = access::P | system::TSS16_BUSY;
        assert_eq!(
            cpu.check_port(0, 1),
            Err(Stop::Fault),
            "a 16-bit TSS has no map"
        );
    }

    #[test]
    fn virtual_8086_mode_asks_the_bitmap_whatever_iopl_is() {
        let mut cpu = user_cpu(MAP_AT as u32 + 7, &[0xfe, 0xff, 0xff, 0xff]);
        cpu.sys.efer = 0;
        cpu.sys.cr0 &= !trapgate_x86::registers::cr0::PG;
        cpu.set_rflags(rflags::VM | rflags::IOPL);
        assert_eq!(cpu.check_port(0, 1), Ok(()));
        assert_eq!(cpu.check_port(1, 1), Err(Stop::Fault));
    }

    #[test]
    fn io_breakpoints_need_debugging_extensions() {
        let (mut cpu, _) = long_cpu();
        // Breakpoint 1: two ports from 0x60.
        cpu.sys.dr[1] = 0x60;
        cpu.sys.dr7 = dr::DR7_ONE | 1 << 2 | 0b0110 << 20;
        cpu.check_port(0x60, 1).unwrap();
        assert_eq!(cpu.take_breakpoints(), 0);
        cpu.sys.cr4 |= cr4::DE;
        for (port, size, hit) in [(0x5f, 1, 0), (0x5f, 2, 2), (0x61, 1, 2), (0x62, 1, 0)] {
            cpu.check_port(port, size).unwrap();
            assert_eq!(cpu.take_breakpoints(), hit, "port {port:#x}");
        }
    }
}
