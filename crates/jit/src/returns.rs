//! Calls and returns: a guest's CALL is a CALL of the host's and its RET a RET, so that the host's own predictor knows
//! where a return goes.
//!
//! Host code has a stack of return addresses, which are host code: behind each CALL the *landing*, which compares the
//! address that the guest's RET found on the guest's stack with the one that its CALL pushed. If they are the
//! same it goes on there, as any jump to another page does; else by way of the table of jump targets. So
//! what lies on the stack decides nothing but the speed: a landing is right for every return to the address that it
//! compares with, whatever became of the guest's code meanwhile. It is right for one mode; hence each class of modes has a stack
//! of its own ([`crate::run::class`]), which is emptied when the class gets another mode. All are emptied when
//! code is thrown away.
//!
//! Below the calls is room for what else uses a stack: stubs, and the host's signals. Rust functions run on the thread's own
//! stack. A unit goes on behind the landing: it is dropped when its guest code changes, and then the stacks are
//! emptied. A CALL that finds its stack full, or a signal raised, leaves host code, and so does a landing if one is raised: as
//! many returns as there are calls on the stack follow each other without a jump. The word at the base leads to the table
//! and stays there.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::adapt::{Lesson, PATIENCE};
use crate::context::{CLASSES, Context};
use crate::emit::{Alu, Mem, RCX, RSP, condition};
use crate::instruction::Guest;
use crate::mode::Mode;
use crate::registers::{ADDRESS, SPARE};
use crate::unit::{Aside, Site, Writer};

/// Calls that are remembered.
const MOST: usize = 8192;
/// Bytes below them.
const ROOM: usize = 32 << 10;

/// A stack of host code's.
#[repr(C, align(16))]
pub(crate) struct Stack {
    room: [u8; ROOM],
    calls: [u64; MOST],
    /// Where a return leads that no call is remembered for.
    base: u64,
}

/// The offset of RSP in a stack without calls.
pub(crate) const EMPTY: u32 = offset_of!(Stack, base) as u32;
/// The same if there is no room for another call.
const FULL: u32 = offset_of!(Stack, calls) as u32;

/// What host code looks at to see whether a signal may be raised. Other threads ring.
#[repr(C)]
pub(crate) struct Bell {
    /// 0 if one may be raised, else 1: at jumps.
    pub(crate) poll: AtomicU32,
    /// The lowest RSP with which a CALL goes on, by class: none if one may be raised.
    pub(crate) limits: [AtomicU32; CLASSES],
}

impl Bell {
    /// A signal may be raised.
    pub(crate) fn ring(&self) {
        self.poll.store(0, Ordering::SeqCst);
        for limit in &self.limits {
            limit.store(u32::MAX, Ordering::SeqCst);
        }
    }

    /// None that is raised from now on has been seen to. `stacks` is where they lie.
    pub(crate) fn rest(&self, stacks: u32) {
        self.poll.store(1, Ordering::SeqCst);
        for (class, limit) in self.limits.iter().enumerate() {
            let stack = stacks + (class * size_of::<Stack>()) as u32;
            limit.store(stack + FULL, Ordering::SeqCst);
        }
    }
}

impl Context {
    /// Code of a mode is run next.
    pub(crate) fn stand_on(&mut self, mode: Mode) {
        let class = crate::run::class(mode);
        self.use_mode(mode);
        let stacks = (&raw const self.stacks) as u64;
        let here = ((self.stack - stacks) / size_of::<Stack>() as u64) as usize;
        if here != class {
            self.tops[here] = self.stack;
            self.stack = self.tops[class];
        }
        let start = stacks + (class * size_of::<Stack>()) as u64;
        if self.stack < start + u64::from(FULL) {
            self.stack = start + u64::from(EMPTY);
        }
    }

    /// Host code left at a CALL, before the jump.
    pub(crate) fn leave_at_call(&mut self) {
        let exit = self.rust.exits[self.site as usize];
        self.interp.cpu.rip = exit.target;
        let stacks = (&raw const self.stacks) as u64;
        let (class, offset) = (
            (self.stack - stacks) / size_of::<Stack>() as u64,
            (self.stack - stacks) % size_of::<Stack>() as u64,
        );
        let place = offset.checked_sub(u64::from(FULL) + 8);
        let calls = &mut self.stacks[class as usize].calls;
        // If it is full it will be emptied.
        if let Some(call) = place.and_then(|place| calls.get_mut(place as usize / 8)) {
            *call = exit.patch + 4;
            self.stack -= 8;
        }
    }

    /// Host code left at a landing: a signal is raised, or a call was returned to once too often.
    pub(crate) fn leave_at_return(&mut self) {
        let exit = self.rust.exits[self.site as usize];
        self.interp.cpu.rip = exit.target;
        if self.patience[Lesson::Returns as usize] != 0 {
            return;
        }
        self.patience[Lesson::Returns as usize] = PATIENCE[Lesson::Returns as usize];
        let blocks = &self.rust.blocks;
        let block = blocks.partition_point(|block| block.checked <= exit.patch);
        self.adapt(block, exit.target, Lesson::Returns);
    }

    /// Forgets the calls of a class.
    pub(crate) fn forget_calls_of(&mut self, class: usize) {
        let stacks = (&raw const self.stacks) as u64;
        let start = stacks + (class * size_of::<Stack>()) as u64;
        self.stacks[class].base = self.rust.stubs.no_call[class];
        self.tops[class] = start + u64::from(EMPTY);
        if (self.stack.wrapping_sub(start) as usize) < size_of::<Stack>() {
            self.stack = self.tops[class];
        }
    }

    /// Forgets all calls.
    pub(crate) fn forget_calls(&mut self) {
        for class in 0..CLASSES {
            self.forget_calls_of(class);
        }
    }
}

impl Writer<'_> {
    /// CALL to a known address.
    pub(crate) fn call(&mut self, guest: &Guest, target: u64) {
        self.give_up_flags(guest.live_in);
        self.push_return(guest);
        let class = crate::run::class(self.mode);
        self.asm.compare_load32(RSP, Mem::low(self.at.limit(class)));
        self.asm.jump_if(condition::B, self.asm.here());
        let jump = self.asm.bytes.len() - 4;
        self.asides.push(Aside::Leave {
            jump,
            exit: self.unit.exits.len(),
            stub: self.stubs.at_call,
        });
        self.asm.call(self.asm.here());
        self.exit_here(target, guest.live_out);
        self.landing(guest);
    }

    /// CALL to an address in a register or in memory, if it is in the table of jump targets; the interpreter does the others.
    /// It looks there before it pushes the return address: one that is not canonical faults first (SDM vol. 2A, CALL).
    pub(crate) fn call_indirect(&mut self, guest: &Guest) {
        self.give_up_flags(guest.live_in);
        self.indirect_target(guest);
        let class = crate::run::class(self.mode);
        self.asm.compare_load32(RSP, Mem::low(self.at.limit(class)));
        self.operate_if(guest, condition::B);
        self.asm.find_target(self.at, class);
        self.operate_if(guest, condition::NE);
        let place = Mem::low(self.at.stash());
        self.asm.store(place, SPARE);
        self.push_return(guest);
        self.asm.load(SPARE, place);
        self.asm
            .call_memory(Mem::array(self.at.targets_host(class), SPARE));
        self.landing(guest);
    }

    /// RET to the address in [`ADDRESS`].
    pub(crate) fn return_to(&mut self, guest: &Guest, popped: i32) {
        let site = Site {
            popped,
            ..self.site(guest)
        };
        let site = self.add_site(site);
        // Who finds that it leads elsewhere must know from where.
        self.asm.store_imm32(Mem::low(self.at.site()), site);
        self.asm.ret();
    }

    /// Where a RET arrives if the host takes it to belong to this CALL.
    fn landing(&mut self, guest: &Guest) {
        let class = crate::run::class(self.mode);
        let address = self.mode.wrap(guest.instruction.next_ip());
        if self.mode.is_compatibility() {
            self.asm
                .alu_imm(false, Alu::Cmp, ADDRESS, address as u32 as i32);
        } else if let Ok(address) = i32::try_from(address as i64) {
            self.asm.alu_imm(true, Alu::Cmp, ADDRESS, address);
        } else {
            self.asm.mov_imm(RCX, address);
            self.asm.alu(true, Alu::Cmp, ADDRESS, RCX);
        }
        self.asm
            .jump_if(condition::NE, self.stubs.other_call[class]);
        self.x87 = false;
        self.asm.compare_byte(Mem::low(self.at.poll()), 0);
        self.asm.jump_if(condition::E, self.asm.here());
        let poll = self.asm.bytes.len() - 4;
        // The page may be mapped elsewhere by then.
        if self.is_last {
            self.leave_at_landing(poll);
            if !self.request.is_returned_to(&guest.instruction) {
                let patience = Mem::low(self.at.patience(Lesson::Returns));
                self.asm.alu_memory_imm32(Alu::Sub, patience, 1);
                self.asm.jump_if(condition::E, self.asm.here());
                self.leave_at_landing(self.asm.bytes.len() - 4);
            }
            self.leave_far(address);
        } else {
            self.asides.push(Aside::Go {
                jump: poll,
                target: address,
                memory: true,
            });
            self.unit.has_landing = true;
            self.check_mapping(address, self.request.mapping, address);
        }
    }

    /// A jump leaves a landing whose exit is the next that is made.
    fn leave_at_landing(&mut self, jump: usize) {
        self.asides.push(Aside::Leave {
            jump,
            exit: self.unit.exits.len(),
            stub: self.stubs.at_return,
        });
    }
}
