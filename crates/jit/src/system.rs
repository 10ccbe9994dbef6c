//! System instructions that host code does itself, in the cases that occur all the time. The interpreter does
//! the others.

use trapgate_x86::descriptor::{Segment, access};
use trapgate_x86::registers::{MXCSR_MASK, cr4, efer, rflags, sreg};

use crate::clock::WINDOW;
use crate::emit::{Alu, Mem, RAX, RDX, RSP, condition};
use crate::instruction::{FLAGS, Guest};
use crate::mode::Mode;
use crate::registers::{ADDRESS, GUEST_RCX, GUEST_RSP, SPARE};
use crate::run::class;
use crate::unit::{Where, Writer};

/// RFLAGS but for the arithmetic flags.
const SYSTEM: u64 = rflags::DEFINED & !rflags::ARITHMETIC;
/// Flags that change how instructions run, so that the run loop must look at them.
const TRAPS: u64 = rflags::TF | rflags::AC;
/// The guest's R11 lives in memory.
const R11: usize = 11;

impl Writer<'_> {
    /// PUSHFQ: RF and VM are pushed as zero, and are zero anyhow while host code runs.
    pub(crate) fn push_flags(&mut self, guest: &Guest) {
        self.give_up_flags(FLAGS);
        self.stack_access(guest, true);
        let flags = self.at.flags();
        // What LAHF gives is the low byte of RFLAGS, bit 1 included.
        self.asm.load8(SPARE, Mem::low(flags + 1));
        self.asm
            .alu_load(Alu::Or, SPARE, Mem::low(self.at.system_flags()));
        self.asm.store(Mem::at(ADDRESS, 0), SPARE);
        self.asm.load8(SPARE, Mem::low(flags));
        self.asm.shl32(SPARE, 11);
        self.asm.alu_store(Alu::Or, Mem::at(ADDRESS, 0), SPARE);
        self.asm.lea(true, GUEST_RSP, Mem::at(GUEST_RSP, -8));
    }

    /// POPFQ that changes nothing but arithmetic flags and, at CPL 0, IF.
    pub(crate) fn pop_flags(&mut self, guest: &Guest) {
        self.give_up_flags(guest.live_in);
        self.stack_access(guest, false);
        self.asm.load(SPARE, Mem::at(ADDRESS, 0));
        self.asm.mov(ADDRESS, SPARE);
        self.asm
            .alu_load(Alu::Xor, ADDRESS, Mem::low(self.at.system_flags()));
        let may = if self.mode.is_user() { 0 } else { rflags::IF };
        self.asm.test_imm32(ADDRESS, (SYSTEM & !may) as u32);
        self.operate_if(guest, condition::NE);
        if may != 0 {
            // An interrupt that waits for IF comes by way of the run loop.
            self.unless_interrupt_waits(guest);
        }
        // At CPL 3 the system's flags are stored as they were.
        self.store_flags();
        self.asm.lea(true, GUEST_RSP, Mem::at(GUEST_RSP, 8));
    }

    /// CLD and STD.
    pub(crate) fn direction(&mut self, guest: &Guest, down: bool) {
        self.give_up_flags(guest.live_in);
        let flags = Mem::low(self.at.system_flags());
        let (operation, value) = if down {
            (Alu::Or, rflags::DF)
        } else {
            (Alu::And, !rflags::DF)
        };
        self.asm.alu_memory_imm32(operation, flags, value as i32);
    }

    /// CLI and STI at CPL 0. The instruction that STI holds interrupts off for is not heeded: none waits, and
    /// one that comes now might have come later.
    pub(crate) fn interrupts(&mut self, guest: &Guest, enable: bool) {
        self.give_up_flags(guest.live_in);
        let flags = Mem::low(self.at.system_flags());
        if enable {
            self.asm
                .compare_byte(Mem::low(self.at.interrupt_waits()), 0);
            self.operate_if(guest, condition::NE);
            self.asm.alu_memory_imm32(Alu::Or, flags, rflags::IF as i32);
        } else {
            self.asm
                .alu_memory_imm32(Alu::And, flags, !(rflags::IF as i32));
        }
    }

    /// STAC and CLAC at CPL 0.
    pub(crate) fn access(&mut self, guest: &Guest, set: bool) {
        self.give_up_flags(guest.live_in);
        let mode = self.mode.with_access(set);
        self.check_targets(guest, mode);
        let flags = Mem::low(self.at.system_flags());
        if set {
            self.asm.alu_memory_imm32(Alu::Or, flags, rflags::AC as i32);
        } else {
            self.asm
                .alu_memory_imm32(Alu::And, flags, !(rflags::AC as i32));
        }
        self.change_mode(mode);
    }

    /// Code of another class follows, which has another stack.
    fn change_mode(&mut self, mode: Mode) {
        let (old, new) = (class(self.mode), class(mode));
        if old != new {
            self.asm.store(Mem::low(self.at.top(old)), RSP);
            self.asm.load(RSP, Mem::low(self.at.top(new)));
        }
        self.mode = mode;
    }

    /// SWAPGS at CPL 0.
    pub(crate) fn swap_gs(&mut self) {
        let (base, kernel) = (
            Mem::low(self.at.segment_base(sreg::GS)),
            Mem::low(self.at.kernel_gs_base()),
        );
        self.asm.load(SPARE, base);
        self.asm.load(ADDRESS, kernel);
        self.asm.store(kernel, SPARE);
        self.asm.store(base, ADDRESS);
    }

    /// SYSCALL at CPL 3 (SDM vol. 2B) to a kernel that masks TF and AC.
    pub(crate) fn system_call(&mut self, guest: &Guest) {
        self.give_up_flags(FLAGS);
        let mode = self.mode.entered();
        self.change_level(guest, mode);
        // RFLAGS to ADDRESS, what stays of it to SPARE.
        let flags = self.at.flags();
        self.asm.load8(SPARE, Mem::low(flags));
        self.asm.shl32(SPARE, 11);
        self.asm.load8(ADDRESS, Mem::low(flags + 1));
        self.asm.alu(true, Alu::Or, ADDRESS, SPARE);
        self.asm
            .alu_load(Alu::Or, ADDRESS, Mem::low(self.at.system_flags()));
        self.asm.load(SPARE, Mem::low(self.at.sfmask()));
        self.asm.not(SPARE);
        self.asm.alu(true, Alu::And, SPARE, ADDRESS);
        self.asm.test_imm32(SPARE, TRAPS as u32);
        self.operate_if(guest, condition::NE);
        self.asm.store(Mem::low(self.at.gpr(R11)), ADDRESS);
        self.asm.mov_imm(GUEST_RCX, guest.instruction.next_ip());
        self.store_flags();
        let star = self.at.star();
        self.asm.load16(SPARE, Mem::low(star + 4));
        self.asm.alu_imm(false, Alu::And, SPARE, 0xfffc);
        self.store_selectors(0, 8);
        self.asm.load(ADDRESS, Mem::low(self.at.lstar()));
        self.asm.store(Mem::low(self.at.top(class(self.mode))), RSP);
        // The kernel's calls begin.
        let empty = self.at.empty_stack(class(mode));
        self.asm.mov_imm(RSP, u64::from(empty));
        self.mode = mode;
        self.indirect(guest);
    }

    /// SYSRET at CPL 0 (SDM vol. 2B) to the lower half of the address space.
    pub(crate) fn system_return(&mut self, guest: &Guest) {
        self.give_up_flags(guest.live_in);
        let mode = self.mode.returned();
        self.change_level(guest, mode);
        self.asm.mov(SPARE, GUEST_RCX);
        self.asm.shr(SPARE, 47);
        self.operate_if(guest, condition::NE);
        self.asm.load32(SPARE, Mem::low(self.at.gpr(R11)));
        self.asm.alu_imm(
            false,
            Alu::And,
            SPARE,
            (rflags::DEFINED & !(rflags::RF | rflags::VM)) as i32,
        );
        self.asm.test_imm32(SPARE, TRAPS as u32);
        self.operate_if(guest, condition::NE);
        self.unless_interrupt_waits(guest);
        self.store_flags();
        let star = self.at.star();
        self.asm.load16(SPARE, Mem::low(star + 6));
        self.asm.lea(false, SPARE, Mem::at(SPARE, 8));
        self.asm.alu_imm(false, Alu::Or, SPARE, 3);
        self.store_selectors(8, 0);
        self.asm.mov(ADDRESS, GUEST_RCX);
        self.change_mode(mode);
        self.indirect(guest);
    }

    /// The conditions of a change of the privilege level to `mode`: SYSCALL is enabled, and the table of jump
    /// targets is for that mode.
    fn change_level(&mut self, guest: &Guest, mode: Mode) {
        self.asm
            .test_byte_memory(Mem::low(self.at.efer()), efer::SCE as u8);
        self.operate_if(guest, condition::E);
        self.check_targets(guest, mode);
    }

    /// The interpreter does it unless the table of jump targets, and the stack, of a mode's class are for that mode.
    fn check_targets(&mut self, guest: &Guest, mode: Mode) {
        let target_mode = self.at.target_mode(class(mode));
        self.asm.compare_byte(Mem::low(target_mode), mode.0);
        self.operate_if(guest, condition::NE);
    }

    /// The interpreter does it if the flags in [`SPARE`] enable interrupts and one waits for that.
    fn unless_interrupt_waits(&mut self, guest: &Guest) {
        self.asm.test_imm32(SPARE, rflags::IF as u32);
        let stays = self.asm.short_if(condition::E);
        self.asm
            .compare_byte(Mem::low(self.at.interrupt_waits()), 0);
        self.operate_if(guest, condition::NE);
        self.asm.land(stays);
    }

    /// RFLAGS from [`SPARE`], which is lost, as is [`ADDRESS`].
    fn store_flags(&mut self) {
        let flags = self.at.flags();
        self.asm.mov32(ADDRESS, SPARE);
        self.asm.alu_imm(false, Alu::And, ADDRESS, SYSTEM as i32);
        self.asm.store(Mem::low(self.at.system_flags()), ADDRESS);
        self.asm.alu_imm(
            false,
            Alu::And,
            SPARE,
            (rflags::ARITHMETIC | rflags::ONE) as i32,
        );
        self.asm.alu_imm(false, Alu::Or, SPARE, rflags::ONE as i32);
        self.asm.store8(Mem::low(flags + 1), SPARE);
        self.asm.shr32(SPARE, 11);
        self.asm.store8(Mem::low(flags), SPARE);
        self.flags = Where {
            host: false,
            memory: true,
        };
    }

    /// The flat segments of SYSCALL and SYSRET: the selectors of CS and SS are so much more than [`SPARE`].
    /// The privilege level follows from them, by way of the run loop when it needs to know.
    fn store_selectors(&mut self, code: i32, stack: i32) {
        let level = if code == 0 { 0 } else { 3 };
        let dpl = level << access::DPL_SHIFT;
        let kinds = [
            (
                sreg::CS,
                code,
                access::CODE | access::READABLE | access::L | dpl,
            ),
            (sreg::SS, stack, access::WRITABLE | access::DB | dpl),
        ];
        for (segment, distance, rights) in kinds {
            let flat = Segment::flat(0, rights);
            self.asm.lea(false, ADDRESS, Mem::at(SPARE, distance));
            self.asm
                .store16(Mem::low(self.at.selector(segment)), ADDRESS);
            self.asm
                .store_imm(Mem::low(self.at.segment_base(segment)), 0);
            self.asm
                .store_imm32(Mem::low(self.at.segment_limit(segment)), flat.limit);
            self.asm
                .store_imm32(Mem::low(self.at.segment_access(segment)), flat.access);
        }
        self.asm.store_imm32(Mem::low(self.at.stale()), 1);
    }

    /// STMXCSR: the guest's is the host's.
    pub(crate) fn store_mxcsr(&mut self, guest: &Guest) {
        self.give_up_flags(guest.live_in);
        self.operand(guest, 4, true, 1);
        self.asm.mxcsr(true, Mem::at(ADDRESS, 0));
    }

    /// LDMXCSR of a value that masks all exceptions, as the present one does, and has no reserved bit.
    pub(crate) fn load_mxcsr(&mut self, guest: &Guest) {
        const MASKS: u32 = 0x1f80;
        self.give_up_flags(guest.live_in);
        self.operand(guest, 4, false, 1);
        // Read once: others may write to the guest's memory meanwhile.
        let value = Mem::low(self.at.stash());
        self.asm.load32(SPARE, Mem::at(ADDRESS, 0));
        self.asm.store32(value, SPARE);
        self.asm.not(SPARE);
        self.asm.alu_imm(false, Alu::Xor, SPARE, !MXCSR_MASK as i32);
        self.asm.test_imm32(SPARE, !MXCSR_MASK | MASKS);
        self.operate_if(guest, condition::NE);
        self.asm.mxcsr(false, value);
    }

    /// RDTSC and RDTSCP, while the last reading of the machine's clock is not old: see [`crate::clock`].
    pub(crate) fn read_time(&mut self, guest: &Guest, processor: bool) {
        self.give_up_flags(guest.live_in);
        if self.mode.is_user() {
            self.asm
                .test_byte_memory(Mem::low(self.at.cr4()), cr4::TSD as u8);
            self.operate_if(guest, condition::NE);
        }
        // RDTSCP waits for what is before it, and changes RCX, which is spare.
        self.asm.raw(if processor {
            &[0x0f, 0x01, 0xf9]
        } else {
            &[0x0f, 0x31]
        });
        self.asm.shl(RDX, 32);
        self.asm.alu(true, Alu::Or, RAX, RDX);
        self.asm
            .alu_load(Alu::Sub, RAX, Mem::low(self.at.clock_host()));
        self.asm.alu_imm(true, Alu::Cmp, RAX, WINDOW);
        self.operate_if(guest, condition::A);
        self.asm.multiply_load(RAX, Mem::low(self.at.clock_ratio()));
        self.asm.shr(RAX, 32);
        self.asm
            .alu_load(Alu::Add, RAX, Mem::low(self.at.clock_guest()));
        self.asm.mov(RDX, RAX);
        self.asm.shr(RDX, 32);
        self.asm.mov32(RAX, RAX);
        if processor {
            self.asm.load(GUEST_RCX, Mem::low(self.at.tsc_aux()));
        }
    }
}
