//! Instructions whose operands lie elsewhere than their addresses say: string instructions, and bits of memory.

use iced_x86::Register;
use trapgate_x86::registers::sreg;

use super::{Writer, fault_segment};
use crate::emit::{Alu, Mem, RCX, RDI, RSI, Reg, condition};
use crate::instruction::{Guest, Plan, Text};
use crate::memory::Place;
use crate::registers::{ADDRESS, GUEST_RCX, SPARE, named, number};

impl Writer<'_> {
    /// MOVS and STOS with an ascending index, on one page; the interpreter does the others.
    pub(super) fn string(&mut self, guest: &Guest, string: Text) {
        let Text {
            size,
            repeated,
            moves,
        } = string;
        let shift = size.trailing_zeros() as u8;
        self.give_up_flags(guest.live_in);
        // DF is bit 10.
        self.asm
            .test_byte_memory(Mem::low(self.at.system_flags() + 1), 4);
        self.operate_if(guest, condition::NE);
        let none = if repeated {
            self.mov_word(SPARE, GUEST_RCX);
            let some = self.asm.short_unless_rcx_zero();
            self.asm.jump(self.asm.here());
            let none = self.asm.bytes.len() - 4;
            self.asm.land(some);
            // The first byte after what is written, and read, must not be on a page further on.
            self.asm.alu_imm(true, Alu::Cmp, SPARE, 4096 >> shift);
            self.operate_if(guest, condition::A);
            Some(none)
        } else {
            None
        };
        let pointers: &[Reg] = if moves { &[RDI, RSI] } else { &[RDI] };
        for &pointer in pointers {
            self.asm.mov32(ADDRESS, pointer);
            self.asm.alu_imm(false, Alu::And, ADDRESS, 0xfff);
            let end = if repeated {
                Mem {
                    base: Some(ADDRESS),
                    index: Some((SPARE, shift)),
                    displacement: 0,
                }
            } else {
                Mem::at(ADDRESS, size)
            };
            self.asm.lea(true, ADDRESS, end);
            self.asm.alu_imm(true, Alu::Cmp, ADDRESS, 4096);
            self.operate_if(guest, condition::A);
        }
        if moves {
            self.mov_word(ADDRESS, RSI);
            self.translate(guest, 1, false, Place::Table, sreg::DS);
            self.asm.store(Mem::low(self.at.stash()), ADDRESS);
        }
        self.mov_word(ADDRESS, RDI);
        self.translate(guest, 1, true, Place::Table, sreg::ES);
        // From here on nothing can go wrong. The host's own instruction does it, on host addresses.
        self.asm.push(RDI);
        self.asm.mov(RDI, ADDRESS);
        if moves {
            self.asm.push(RSI);
            self.asm.load(RSI, Mem::low(self.at.stash()));
        }
        if repeated {
            self.mov_word(RCX, GUEST_RCX);
        }
        let opcode = if moves { 0xa4 } else { 0xaa } | u8::from(size > 1);
        if size == 2 {
            self.asm.raw(&[0x66]);
        }
        if repeated {
            self.asm.raw(&[0xf3]);
        }
        if size == 8 {
            self.asm.raw(&[0x48]);
        }
        self.asm.raw(&[opcode]);
        if moves {
            self.asm.pop(RSI);
        }
        self.asm.pop(RDI);
        for &pointer in pointers {
            let end = if repeated {
                Mem {
                    base: Some(pointer),
                    index: Some((GUEST_RCX, shift)),
                    displacement: 0,
                }
            } else {
                Mem::at(pointer, size)
            };
            let wide = !self.mode.is_compatibility();
            self.asm.lea(wide, pointer, end);
        }
        if repeated {
            self.asm.mov_imm(GUEST_RCX, 0);
        }
        if let Some(none) = none {
            self.asm.patch(none, self.asm.here());
        }
    }

    /// BT, BTS, BTR and BTC of memory with an offset in a register, whose upper bits move the address.
    pub(super) fn bit_of_memory(&mut self, guest: &Guest, plan: &Plan) {
        let mut instruction = guest.instruction;
        instruction.set_code(plan.harmless.code);
        let size = instruction.memory_size().size();
        let register = instruction.op1_register();
        self.give_up_flags(guest.live_in);
        self.linear_address(guest);
        let offset = self.fetch(number(register), SPARE);
        // The offset is signed; its lowest bits choose in the operand.
        if size == 8 {
            if offset != SPARE {
                self.asm.mov(SPARE, offset);
            }
            self.asm.sar(true, SPARE, 6);
        } else {
            self.asm.sign_extend32(SPARE, offset);
            self.asm.sar(true, SPARE, 5);
        }
        let moved = Mem {
            base: Some(ADDRESS),
            index: Some((SPARE, size.trailing_zeros() as u8)),
            displacement: 0,
        };
        self.asm.lea(true, ADDRESS, moved);
        if plan.harmless.locked {
            self.asm.test_byte(ADDRESS, size as u8 - 1);
            self.operate_if(guest, condition::NE);
        }
        let segment = fault_segment(&guest.instruction);
        self.translate(guest, size, plan.writes_memory, Place::Table, segment);
        let offset = self.fetch(number(register), SPARE);
        if offset != SPARE {
            self.asm.mov32(SPARE, offset);
        }
        self.asm
            .alu_imm(false, Alu::And, SPARE, size as i32 * 8 - 1);
        // The flags come by way of the spare register.
        let stash = Mem::low(self.at.stash());
        self.asm.store(stash, SPARE);
        self.before(guest);
        self.asm.load(SPARE, stash);
        instruction.set_memory_base(named(ADDRESS, 8));
        instruction.set_memory_index(Register::None);
        instruction.set_memory_displacement64(0);
        instruction.set_memory_displ_size(0);
        instruction.set_segment_prefix(Register::None);
        instruction.set_op_register(1, named(SPARE, register.size()));
        self.encode(&instruction);
        self.after(guest);
    }
}
