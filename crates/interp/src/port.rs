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
