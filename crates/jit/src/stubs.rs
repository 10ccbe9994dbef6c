//! Host code that is there once: the way in, the way out, and calls of Rust functions.

use crate::context::Addresses;
use crate::emit::{
    Alu, Asm, Mem, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RSP, condition,
};
use crate::registers::{ADDRESS, HOME};

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stubs {
    /// `extern "sysv64" fn() -> u32`: runs the host code at `target`; gives one of [`exit`].
    pub(crate) enter: u64,
    /// Called at a miss, with the linear address in [`ADDRESS`]; returns to try again.
    pub(crate) miss: u64,
    /// Called to run a site's instruction on the interpreter; returns, or goes on elsewhere.
    pub(crate) operate: u64,
    /// Jumped to: leave with [`exit::LINK`]; the flags are in the host's.
    pub(crate) link_host: u64,
    /// Jumped to: leave with [`exit::LINK`]; the flags are in memory.
    pub(crate) link_memory: u64,
    /// Jumped to: leave with [`exit::GO`]; RIP is stored, the flags are in the host's.
    pub(crate) go_host: u64,
    /// Jumped to: leave with [`exit::GO`]; RIP is stored, the flags are in memory.
    pub(crate) go_memory: u64,
    /// Jumped to: leave with [`exit::INDIRECT`]; the target is in [`ADDRESS`], the flags are in memory.
    pub(crate) indirect: u64,
}

/// Why host code came back.
pub(crate) mod exit {
    /// A direct jump that leads nowhere yet; the site says which.
    pub(crate) const LINK: u32 = 0;
    /// Look what is to be done at RIP.
    pub(crate) const GO: u32 = 1;
    /// As `GO`, after an indirect jump whose target was not in the table.
    pub(crate) const INDIRECT: u32 = 2;
    /// A called function says so: it left the reason in the context.
    pub(crate) const STOP: u32 = 3;
}

/// What a called function answers.
pub(crate) mod answer {
    /// Try again, or go on.
    pub(crate) const RETURN: u64 = 0;
    /// Leave with [`super::exit::STOP`]. Any other value is host code to go on at.
    pub(crate) const LEAVE: u64 = 1;
}

struct Writer<'a> {
    asm: &'a mut Asm,
    at: Addresses,
    /// The guest may use AVX: registers are 256 bits wide.
    wide: bool,
}

impl Writer<'_> {
    /// Guest registers to memory, but for [`RCX`] and [`ADDRESS`], which hold none.
    fn save(&mut self) {
        for (index, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                self.asm.store(Mem::low(self.at.gpr(index)), *home);
            }
        }
        for index in 0..16 {
            let address = self.at.vector(usize::from(index));
            self.asm.vector(self.wide, true, index, address);
        }
        if self.wide {
            self.asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        self.asm.mxcsr(true, self.at.mxcsr());
    }

    fn restore(&mut self) {
        self.asm.mxcsr(false, self.at.mxcsr());
        for index in 0..16 {
            let address = self.at.vector(usize::from(index));
            self.asm.vector(self.wide, false, index, address);
        }
        for (index, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                self.asm.load(*home, Mem::low(self.at.gpr(index)));
            }
        }
    }

    /// The flags to memory; RCX is lost.
    fn save_flags(&mut self) {
        self.asm.mov(RCX, RAX);
        self.asm.flags_to_ax();
        self.asm.store_ax(Mem::low(self.at.flags()));
        self.asm.mov(RAX, RCX);
    }

    /// The flags from memory, before the registers are restored: RAX is lost.
    fn restore_flags(&mut self) {
        self.asm.load32(RAX, Mem::low(self.at.flags()));
        self.asm.flags_from_ax();
    }

    /// Back to whoever called `enter`; EAX is the answer.
    fn leave(&mut self) {
        self.asm.mxcsr(false, self.at.host_mxcsr());
        self.asm.alu_imm(true, Alu::Add, RSP, 8);
        for register in [R15, R14, R13, R12, RBP, RBX] {
            self.asm.pop(register);
        }
        self.asm.raw(&[0xc3]);
    }

    fn leave_with(&mut self, reason: u32) -> u64 {
        let start = self.asm.here();
        self.save();
        self.asm.mov_imm(RAX, u64::from(reason));
        self.leave();
        start
    }
}

/// Writes the stubs.
pub(crate) fn write(asm: &mut Asm, at: Addresses, wide: bool) -> Stubs {
    let mut writer = Writer { asm, at, wide };
    let enter = writer.asm.here();
    for register in [RBX, RBP, R12, R13, R14, R15] {
        writer.asm.push(register);
    }
    writer.asm.alu_imm(true, Alu::Sub, RSP, 8);
    writer.asm.mxcsr(true, at.host_mxcsr());
    writer.restore_flags();
    writer.restore();
    writer.asm.jump_memory(Mem::low(at.target()));

    // What a called function answered beside "return": RAX is that, and its call's return address is on
    // the stack.
    let elsewhere = writer.asm.here();
    writer.asm.alu_imm(true, Alu::Add, RSP, 8);
    writer.asm.alu_imm(true, Alu::Cmp, RAX, answer::LEAVE as i32);
    let going = writer.asm.short_if(condition::NE);
    writer.asm.mov_imm(RAX, u64::from(exit::STOP));
    writer.leave();
    writer.asm.land(going);
    writer.asm.store(Mem::low(at.target()), RAX);
    writer.restore_flags();
    writer.restore();
    writer.asm.jump_memory(Mem::low(at.target()));

    // Calls of Rust functions `extern "sysv64" fn(*mut Context) -> u64`.
    let call = |writer: &mut Writer<'_>, function: u32| {
        let start = writer.asm.here();
        writer.asm.store(Mem::low(at.rcx()), RCX);
        writer.asm.store(Mem::low(at.linear()), ADDRESS);
        writer.save();
        writer.asm.alu_imm(true, Alu::Sub, RSP, 8);
        writer.asm.mov_imm(RDI, u64::from(at.base()));
        writer.asm.call_memory(Mem::low(function));
        writer.asm.alu_imm(true, Alu::Add, RSP, 8);
        writer.asm.alu(true, Alu::Or, RAX, RAX);
        writer.asm.jump_if(condition::NE, elsewhere);
        writer.restore();
        writer.asm.load(RCX, Mem::low(at.rcx()));
        writer.asm.load(ADDRESS, Mem::low(at.linear()));
        writer.asm.raw(&[0xc3]);
        start
    };
    let miss = call(&mut writer, at.miss());
    let operate = call(&mut writer, at.operate());

    let link_host = writer.asm.here();
    writer.save_flags();
    let link_memory = writer.leave_with(exit::LINK);
    let go_host = writer.asm.here();
    writer.save_flags();
    let go_memory = writer.leave_with(exit::GO);
    let indirect = writer.asm.here();
    writer.asm.store(Mem::low(at.rip()), ADDRESS);
    writer.leave_with(exit::INDIRECT);
    Stubs {
        enter,
        miss,
        operate,
        link_host,
        link_memory,
        go_host,
        go_memory,
        indirect,
    }
}
