//! Memory accesses of single elements that a vector selects: gathers (SDM vol. 2C, VGATHERDPS and its kin, VPGATHERDD and
//! its kin), and MASKMOVQ, MASKMOVDQU.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::Exception;
use trapgate_x86::registers::{cr0, gpr};

use crate::cpu::{Cpu, Step};
use crate::op::{AddressForm, Handler, Op};
use crate::parts::Parts;
use crate::tlb::Access;

/// Bits of a gather's `op.extra`: the index register and log2 of its scale, then these.
const SCALE_SHIFT: u16 = 4;
/// Indices have eight bytes, not four.
const WIDE_INDEX: u16 = 1 << 6;
/// Elements have eight bytes, not four.
const WIDE_ELEMENT: u16 = 1 << 7;
/// Vectors have 256 bits.
const YMM: u16 = 1 << 8;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let (wide_index, wide_element) = match instruction.mnemonic() {
        Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd => (false, false),
        Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq => (false, true),
        Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd => (true, false),
        Mnemonic::Vgatherqpd | Mnemonic::Vpgatherqq => (true, true),
        Mnemonic::Maskmovq => return masked_store(instruction, op, op_maskmovq),
        Mnemonic::Maskmovdqu => return masked_store(instruction, op, op_maskmovdqu::<false>),
        Mnemonic::Vmaskmovdqu => return masked_store(instruction, op, op_maskmovdqu::<true>),
        _ => return None,
    };
    // Those of AVX-512 name no mask here, but in their prefix.
    if instruction.op_count() != 3 || !instruction.op2_register().is_vector_register() {
        return None;
    }
    let index = instruction.memory_index();
    op.dst = instruction.op0_register().number() as u8;
    op.src = instruction.op2_register().number() as u8;
    op.extra = index.number() as u16
        | (instruction.memory_index_scale().trailing_zeros() as u16) << SCALE_SHIFT
        | if wide_index { WIDE_INDEX } else { 0 }
        | if wide_element { WIDE_ELEMENT } else { 0 };
    if instruction.op0_register().is_ymm() || index.is_ymm() {
        op.extra |= YMM;
    }
    // Base and displacement; the index is another one for each element.
    op.form = AddressForm::General;
    Some(op_gather)
}

fn op_gather(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_avx()?;
    let index = usize::from(op.extra & 15);
    let (destination, mask) = (usize::from(op.dst) & 15, usize::from(op.src) & 15);
    if index == destination || index == mask || destination == mask {
        return cpu.ud();
    }
    let scale = op.extra >> SCALE_SHIFT & 3;
    let index_bytes = if op.extra & WIDE_INDEX != 0 { 8 } else { 4 };
    let bytes = if op.extra & WIDE_ELEMENT != 0 { 8 } else { 4 };
    let length = if op.extra & YMM != 0 { 32 } else { 16 };
    let count = length / index_bytes.max(bytes);
    let base = cpu.offset(op);
    let indices = cpu.regs.vector[index].0;
    // All bits of an element's mask become its highest, which a fault shows.
    for element in 0..length / bytes {
        let part = &mut cpu.regs.vector[mask].0[element * bytes..][..bytes];
        let selected = part[bytes - 1] & 0x80 != 0;
        part.fill(if selected { 0xff } else { 0 });
    }
    cpu.regs.vector[mask].0[length..].fill(0);
    for element in 0..count {
        let at = element * bytes;
        if cpu.regs.vector[mask].0[at] == 0 {
            continue;
        }
        let mut word = [0; 8];
        word[..index_bytes].copy_from_slice(&indices[element * index_bytes..][..index_bytes]);
        let index = match index_bytes {
            4 => i64::from(u64::from_le_bytes(word) as i32),
            _ => i64::from_le_bytes(word),
        };
        let offset = base.wrapping_add((index as u64) << scale) & Cpu::address_mask(op);
        let segment = usize::from(op.segment);
        let linear = cpu.segment_address(segment, offset, bytes as u64, false)?;
        let mut value = [0; 8];
        cpu.read_elements(linear, &mut value[..bytes], op.segment)?;
        // A fault at a later element shows what was done: the instruction goes on from there.
        let vector = &mut cpu.regs.vector[destination].0;
        vector[at..at + bytes].copy_from_slice(&value[..bytes]);
        vector[length..].fill(0);
        cpu.regs.vector[mask].0[at..at + bytes].fill(0);
    }
    cpu.regs.vector[mask].0.fill(0);
    cpu.regs.vector[destination].0[count * bytes..].fill(0);
    Ok(())
}

/// DS:rDI, or another segment's, is the operand; `op.src` the mask.
fn masked_store(instruction: &Instruction, op: &mut Op, handler: Handler) -> Option<Handler> {
    op.dst = instruction.op1_register().number() as u8;
    op.src = instruction.op2_register().number() as u8;
    op.base = gpr::RDI as u8;
    op.form = AddressForm::General;
    Some(handler)
}

fn op_maskmovdqu<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    if VEX {
        cpu.check_avx()?;
    } else {
        cpu.check_sse()?;
    }
    let data = cpu.regs.vector[usize::from(op.dst) & 15].0;
    let mask = cpu.regs.vector[usize::from(op.src) & 15].0;
    store_selected(cpu, op, &data[..16], &mask[..16])
}

fn op_maskmovq(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.sys.cr0 & cr0::EM != 0 {
        return cpu.ud();
    }
    if cpu.sys.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(Exception::NM));
    }
    if cpu.regs.x87.exception_pending() {
        return Err(cpu.x87_error());
    }
    let data = cpu.regs.x87.mmx_register(usize::from(op.dst));
    let mask = cpu.regs.x87.mmx_register(usize::from(op.src));
    cpu.regs.x87.enter_mmx();
    store_selected(cpu, op, &data, &mask)
}

/// Stores the bytes whose mask has its highest bit set: all of them, or on a fault none.
fn store_selected(cpu: &mut Cpu, op: &Op, data: &[u8], mask: &[u8]) -> Step {
    let length = data.len();
    let linear = cpu.operand_address(op, length as u64, true)?;
    // Bytes that are not selected may fault as well (SDM vol. 2B, MASKMOVDQU), and do on the host CPU.
    let extent = cpu.extent(op, linear, length, Parts::Eights, Access::Write)?;
    cpu.each_run(&extent, 0..length, |cpu, at, run| {
        let length = run.len() as u64;
        cpu.check_access(at, op.segment, length, 8, Access::Write)?;
        cpu.probe_elements(at, length, Access::Write, op.segment)
    })?;
    let mut start = 0;
    for run in mask.chunk_by(|one, next| one & 0x80 == next & 0x80) {
        let end = start + run.len();
        if run[0] & 0x80 != 0 {
            cpu.each_run(&extent, start..end, |cpu, at, run| {
                cpu.write_elements(at, &data[run], op.segment)
            })?;
        }
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Vector;
    use trapgate_x86::registers::{cr4, gpr, xcr0};

    use crate::cpu::Cpu;
    use crate::testing::{UD, UNMAPPED, execute, fault, long_cpu, unmap_page};

    const DATA: u64 = 0x20_0000;
    /// vpgatherdd xmm1, [rax + xmm2 * 4], xmm3
    const GATHER: [u8; 6] = [0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90];

    fn avx_cpu() -> Cpu {
        let (mut cpu, _) = long_cpu();
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.sys.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        for element in 0..64u32 {
            let at = DATA + u64::from(element) * 4;
            cpu.memory
                .write(at, &(element + 100).to_le_bytes())
                .unwrap();
        }
        cpu.regs.gpr[gpr::RAX] = DATA + 32 * 4;
        cpu
    }

    fn doublewords(values: [i32; 4]) -> u128 {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        u128::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn gather_loads_the_elements_that_the_mask_selects() {
        let mut cpu = avx_cpu();
        cpu.regs.vector[1].0 = [0x55; 32];
        cpu.regs.set_xmm(2, doublewords([1, -2, 3, 4]));
        cpu.regs.set_xmm(3, doublewords([-1, i32::MIN, 1, -1]));
        execute(&mut cpu, &GATHER).unwrap();
        let expected = doublewords([133, 130, 0x5555_5555, 136]);
        assert_eq!(cpu.regs.xmm(1), expected);
        assert_eq!(cpu.regs.vector[1].0[16..], [0; 16]);
        assert_eq!(cpu.regs.vector[3].0, [0; 32]);
    }

    #[test]
    fn gather_that_faults_has_done_the_elements_before() {
        let mut cpu = avx_cpu();
        unmap_page(&mut cpu);
        cpu.regs.gpr[gpr::RAX] = UNMAPPED - 8;
        cpu.memory.write(UNMAPPED - 8, &7u32.to_le_bytes()).unwrap();
        cpu.regs.set_xmm(2, doublewords([0, 2, 0, 0]));
        cpu.regs.set_xmm(3, doublewords([-1; 4]));
        assert_eq!(fault(&mut cpu, &GATHER), (Vector::PF, Some(0)));
        assert_eq!(cpu.exception.address, UNMAPPED);
        assert_eq!(cpu.regs.xmm(1), 7);
        assert_eq!(cpu.regs.xmm(3), doublewords([0, -1, -1, -1]));
    }

    #[test]
    fn gather_into_its_own_mask_or_index_is_undefined() {
        for register in [2, 3] {
            let mut cpu = avx_cpu();
            let mut code = GATHER;
            code[4] = 0x04 | register << 3;
            assert_eq!(fault(&mut cpu, &code), UD, "xmm{register}");
        }
    }

    #[test]
    fn masked_move_stores_selected_bytes() {
        let mut cpu = avx_cpu();
        cpu.regs.gpr[gpr::RDI] = DATA;
        cpu.regs.vector[1].0[..16].copy_from_slice(&[7; 16]);
        cpu.regs.vector[2].0[..4].copy_from_slice(&[0x80, 0x7f, 0xff, 0]);
        cpu.memory.write(DATA, &[1; 16]).unwrap();
        // maskmovdqu xmm1, xmm2
        execute(&mut cpu, &[0x66, 0x0f, 0xf7, 0xca]).unwrap();
        let mut stored = [0; 16];
        cpu.memory.read(DATA, &mut stored).unwrap();
        assert_eq!(stored, [7, 1, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);

        // maskmovq mm0, mm1
        cpu.regs.x87.set_status_word(3 << 11);
        cpu.regs
            .x87
            .set_stack_register(5, [9, 8, 7, 6, 5, 4, 3, 2, 0, 0]);
        cpu.regs
            .x87
            .set_stack_register(6, [0xff, 0, 0, 0, 0, 0, 0, 0x80, 0, 0]);
        execute(&mut cpu, &[0x0f, 0xf7, 0xc1]).unwrap();
        cpu.memory.read(DATA, &mut stored).unwrap();
        assert_eq!(stored[..8], [9, 1, 7, 1, 1, 1, 1, 2]);
        assert_eq!(cpu.regs.x87.status_word() >> 11 & 7, 0, "TOP");
        assert_eq!(cpu.regs.x87.tags(), 0xff);
    }
}
