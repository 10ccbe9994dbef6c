//! Jumps: to known addresses and through registers. Calls and returns are in [`crate::returns`].

use iced_x86::{Instruction, OpKind};

use super::{Aside, Exit, Number, Writer};
use crate::emit::{Alu, Mem, RCX, condition};
use crate::instruction::{Count, FLAGS, Guest};
use crate::registers::{ADDRESS, GUEST_RCX, SPARE, number};

impl Writer<'_> {
    /// Pushes the address of the next instruction.
    pub(crate) fn push_return(&mut self, guest: &Guest) {
        self.stack_access(guest, true);
        let address = guest.instruction.next_ip();
        if self.mode.is_compatibility() {
            self.asm.store_imm32(Mem::at(ADDRESS, 0), address as u32);
        } else {
            match i32::try_from(address as i64) {
                Ok(value) => self.asm.store_imm(Mem::at(ADDRESS, 0), value),
                Err(_) => {
                    self.asm.mov_imm(SPARE, address);
                    self.asm.store(Mem::at(ADDRESS, 0), SPARE);
                }
            }
        }
        self.move_stack(-1);
    }

    /// The target of an indirect jump to [`ADDRESS`].
    pub(crate) fn indirect_target(&mut self, guest: &Guest) {
        let instruction = &guest.instruction;
        if instruction.op0_kind() == OpKind::Memory {
            self.operand(guest, self.mode.word(), false, 1);
            self.load_word(ADDRESS, Mem::at(ADDRESS, 0));
        } else {
            let register = number(instruction.op0_register());
            let from = self.fetch(register, ADDRESS);
            if from != ADDRESS {
                self.mov_word(ADDRESS, from);
            }
        }
    }

    /// Goes on at the linear address in [`ADDRESS`]. The flags are in memory.
    pub(crate) fn indirect(&mut self, guest: &Guest) {
        let site = self.site(guest);
        let site = self.add_site(site);
        let class = crate::run::class(self.mode);
        self.asm
            .alu_memory_imm32(Alu::Cmp, Mem::low(self.at.poll()), 0);
        self.asm.jump_if(condition::E, self.asm.here());
        let poll = self.asm.bytes.len() - 4;
        self.asm.find_target(self.at, class);
        self.asm.jump_if(condition::NE, self.asm.here());
        let miss = self.asm.bytes.len() - 4;
        self.asm
            .jump_memory(Mem::array(self.at.targets_host(class), SPARE));
        self.asides.push(Aside::Indirect {
            jumps: [poll, miss],
            site,
        });
    }

    /// Makes the exit at the rel32 before here; `live` flags are needed at the target.
    pub(crate) fn exit_here(&mut self, target: u64, live: u32) {
        let far = target & !0xfff != self.request.rip & !0xfff;
        self.exit(target, live, far);
    }

    pub(super) fn exit(&mut self, target: u64, live: u32, far: bool) {
        let memory = live == 0 || !self.flags.host;
        let exit = Exit {
            patch: self.asm.here() - 4,
            stub: 0,
            target,
            mode: self.mode,
            memory,
            far,
            linked: Number::NONE,
            next: Number::NONE,
        };
        self.unit.exits.push(exit);
        self.asides.push(Aside::Link {
            exit: self.unit.exits.len() - 1,
        });
    }

    /// Leaves for a target on this page or, it may be, not on this.
    pub(crate) fn leave_far(&mut self, target: u64) {
        self.asm.jump(self.asm.here());
        self.exit(target, FLAGS, true);
    }

    pub(super) fn leave_direct(&mut self, target: u64, live: u32) {
        self.asm.jump(self.asm.here());
        self.exit_here(target, live);
    }

    /// Whether a jump goes ahead on its page: any other looks for signals first. Every loop goes back somewhere, and code
    /// without loops may be long.
    fn is_short(instruction: &Instruction, target: u64) -> bool {
        let from = instruction.ip();
        target > from && target >> 12 == from >> 12
    }

    /// Goes on at `target`.
    pub(super) fn jump(&mut self, instruction: &Instruction, target: u64, live: u32) {
        if Self::is_short(instruction, target) {
            self.leave_direct(target, live);
            return;
        }
        self.asm.load32(RCX, Mem::low(self.at.poll()));
        let raised = self.asm.short_if_rcx_zero();
        self.leave_direct(target, live);
        self.asm.land(raised);
        self.asm.jump(self.asm.here());
        let jump = self.asm.bytes.len() - 4;
        let memory = live == 0 || !self.flags.host;
        self.asides.push(Aside::Go {
            jump,
            target,
            memory,
        });
    }

    pub(super) fn jump_if(&mut self, guest: &Guest, code: u8, target: u64) {
        self.want_flags();
        let live = guest.live_out;
        if Self::is_short(&guest.instruction, target) {
            self.asm.jump_if(code, self.asm.here());
            self.exit_here(target, live);
            return;
        }
        let past = self.asm.short_if(code ^ 1);
        self.jump(&guest.instruction, target, live);
        self.asm.land(past);
    }

    pub(super) fn count(&mut self, guest: &Guest, count: Count, target: u64) {
        if count == Count::Loop {
            self.asm.lea(true, GUEST_RCX, Mem::at(GUEST_RCX, -1));
        }
        self.asm.mov(RCX, GUEST_RCX);
        let zero = self.asm.short_if_rcx_zero();
        let next = guest.instruction.next_ip();
        let (counting, ended) = match count {
            Count::Zero => (next, target),
            Count::Loop => (target, next),
        };
        self.jump(&guest.instruction, counting, guest.live_out);
        self.asm.land(zero);
        self.jump(&guest.instruction, ended, guest.live_out);
    }
}
