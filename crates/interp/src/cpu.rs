//! One processor: its registers, and what the interpreter derives from them.

use std::sync::Arc;

use trapgate_engine::{Signals, World};
use trapgate_memory::GuestMemory;
use trapgate_thunk::RegisterFile;
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::{cr0, cr4, dr, efer, gpr, rflags, sreg};
use trapgate_x86::{CpuProfile, CpuState, Exception, InterruptShadow, Segment, SystemState};

use crate::apart::Apart;
use crate::code::CodePages;
use crate::flags::LazyFlags;
use crate::op::Op;
use crate::tlb::{Tlb, View};
use crate::vector::ThunkTable;
use crate::width::Width;

/// Why an instruction handler does not let the next instruction of its block run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The instruction raised [`Cpu::exception`] and had no other effect (or is restartable).
    Fault,
    /// The instruction is done, or must be resumed at RIP; the block ends here.
    EndBlock,
    /// HLT.
    Halt,
    /// Triple fault.
    Shutdown,
}

/// Outcome of an instruction handler.
pub type Step = Result<(), Stop>;

/// Size of code and default operands, from CS and the mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, 16-bit protected mode.
    Bits16 = 0,
    /// 32-bit protected mode and compatibility mode.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

/// The processor.
pub struct Cpu {
    /// User-visible registers: general, vector, x87, MXCSR. The flags in it are only for thunks.
    pub regs: RegisterFile,
    /// While an instruction runs: the address of the next one. Between: of the next to run.
    pub rip: u64,
    /// CF, PF, AF, ZF, SF, OF.
    pub flags: LazyFlags,
    /// The other flags of RFLAGS.
    pub system_flags: u64,
    /// Everything that system software sees.
    pub sys: SystemState,

    // Derived from the above by `update_mode`.
    /// Code size.
    pub code_size: CodeSize,
    /// Current privilege level.
    pub cpl: u8,
    /// Mask for stack pointer arithmetic: 16, 32 or 64 bits.
    pub stack_mask: u64,

    /// The translation lookaside buffer.
    pub(crate) tlb: Tlb,
    /// The view of explicit data accesses when the current one is [`View::Checked`].
    pub(crate) plain_view: View,
    /// The current view.
    pub(crate) view: View,
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// Everything else.
    pub world: Box<dyn World>,
    /// Signals from other threads.
    pub signals: Arc<Signals>,
    /// What CPUID answers.
    pub profile: CpuProfile,
    /// Index of this processor.
    pub index: u32,
    /// Processors in the machine.
    pub count: u32,

    /// The exception behind [`Stop::Fault`].
    pub exception: Exception,
    /// An exception that was raised but not delivered when the state was set.
    pub pending: Option<Exception>,
    /// An interrupt that another engine acknowledged but did not deliver.
    pub acknowledged: Option<u8>,
    /// The block must end after this instruction: it changed code, or something that the run loop
    /// looks at.
    pub end_block: bool,
    /// The run loop must look at the slow path before the next instruction: shadow, TF, pending
    /// events, breakpoints.
    pub attention: bool,
    /// The interrupt controller signalled an interrupt that could not be taken yet.
    pub interrupt_waits: bool,
    /// DR6 bits of data breakpoints hit by the current instruction.
    pub breakpoints_hit: u64,

    /// Where decoded code lies.
    pub(crate) code: Arc<CodePages>,
    /// Bumped when cached instruction fetches may be wrong: the address space or mode changed.
    pub(crate) fetch_epoch: u64,
    /// Host code of instructions that run on the host.
    pub(crate) thunks: ThunkTable,
    /// Where stores go that stay apart from guest memory.
    pub(crate) apart: Option<Box<Apart>>,
    /// Instructions executed.
    pub instructions: u64,
    /// Walks of page tables: misses of the TLB.
    pub walks: u64,
}

impl Cpu {
    /// A processor in the state after power-up.
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
        signals: Arc<Signals>,
    ) -> Self {
        let code = Arc::new(CodePages::new(Arc::clone(&signals)));
        let reset = CpuState::default();
        let mut cpu = Self {
            regs: RegisterFile::new(),
            rip: reset.rip,
            flags: LazyFlags::default(),
            system_flags: 0,
            sys: reset.system,
            code_size: CodeSize::Bits16,
            cpl: 0,
            stack_mask: 0xffff,
            tlb: Tlb::new(),
            plain_view: View::SupervisorUser,
            view: View::SupervisorUser,
            memory,
            world,
            signals,
            profile,
            index,
            count,
            exception: Exception::UD,
            pending: None,
            acknowledged: None,
            end_block: false,
            attention: false,
            interrupt_waits: false,
            breakpoints_hit: 0,
            code,
            fetch_epoch: 0,
            thunks: ThunkTable::default(),
            apart: None,
            instructions: 0,
            walks: 0,
        };
        cpu.set_rflags(reset.rflags);
        cpu.update_mode();
        cpu
    }

    /// Notes an exception as the reason why the current instruction stops.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Stop {
        self.exception = exception;
        Stop::Fault
    }

    /// `Err` with #GP(0).
    #[cold]
    pub fn gp0<T>(&mut self) -> Result<T, Stop> {
        Err(self.raise(Exception::gp(0)))
    }

    /// `Err` with #UD.
    #[cold]
    pub fn ud<T>(&mut self) -> Result<T, Stop> {
        Err(self.raise(Exception::UD))
    }

    // Modes.

    /// CR0.PE.
    #[inline(always)]
    pub fn is_protected(&self) -> bool {
        self.sys.cr0 & cr0::PE != 0
    }

    /// EFLAGS.VM.
    #[inline(always)]
    pub fn is_vm86(&self) -> bool {
        self.system_flags & rflags::VM != 0
    }

    /// Long mode is active: 64-bit or compatibility mode.
    #[inline(always)]
    pub fn is_long(&self) -> bool {
        self.sys.efer & efer::LMA != 0
    }

    /// 64-bit mode.
    #[inline(always)]
    pub fn is_64bit(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }

    /// Works out what derives from control registers, CS, SS and flags. To be called after each
    /// change to one of CR0, CR4, EFER, RFLAGS.VM, RFLAGS.AC, CS, SS, DR7.
    pub fn update_mode(&mut self) {
        let code = &self.sys.segments[sreg::CS];
        self.code_size = if self.sys.efer & efer::LMA != 0 && code.has(access::L) {
            CodeSize::Bits64
        } else if code.has(access::DB) && self.sys.cr0 & cr0::PE != 0 && !self.is_vm86() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.cpl = if self.sys.cr0 & cr0::PE == 0 {
            0
        } else if self.is_vm86() {
            3
        } else {
            // SS.DPL is the CPL (SDM vol. 3C, 25.4.1): it is right even while CS conforms.
            self.sys.segments[sreg::SS].dpl()
        };
        self.stack_mask = if self.code_size == CodeSize::Bits64 {
            u64::MAX
        } else if self.sys.segments[sreg::SS].has(access::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        self.plain_view = if self.cpl == 3 {
            View::User
        } else if self.sys.cr4 & cr4::SMAP == 0 || self.system_flags & rflags::AC != 0 {
            View::SupervisorUser
        } else {
            View::Supervisor
        };
        let alignment =
            self.cpl == 3 && self.sys.cr0 & cr0::AM != 0 && self.system_flags & rflags::AC != 0;
        let watching = self.sys.dr7 & 0xff != 0 && self.sys.dr7 & 0x3333_0000 != 0;
        self.view = if alignment || watching {
            View::Checked
        } else {
            self.plain_view
        };
        self.tlb.set_view(self.view);
        self.fetch_epoch = self.fetch_epoch.wrapping_add(1);
        self.update_attention();
    }

    /// Works out whether the run loop must take its slow path. To be called after each change to
    /// the shadow, TF, DR7 or pending events.
    pub fn update_attention(&mut self) {
        self.attention = self.asks_for_attention(rflags::TF | rflags::RF);
    }

    fn asks_for_attention(&self, flags: u64) -> bool {
        self.sys.shadow != InterruptShadow::None
            || self.system_flags & flags != 0
            || self.sys.dr7 & 0xff != 0
            || self.sys.nmi_pending
            || self.pending.is_some()
            || self.acknowledged.is_some()
            || (self.interrupt_waits && self.system_flags & rflags::IF != 0)
    }

    /// Whether RFLAGS.RF, while no breakpoint is enabled, is all that asks for attention: the next instruction would merely
    /// clear it.
    pub fn merely_resumes(&self) -> bool {
        self.system_flags & rflags::RF != 0 && !self.asks_for_attention(rflags::TF)
    }

    /// The next instruction is run without looking at what asks for attention: it clears RFLAGS.RF.
    pub fn resume(&mut self) {
        self.system_flags &= !rflags::RF;
        self.update_attention();
    }

    // Flags.

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.system_flags | self.flags.get() | rflags::ONE
    }

    /// Replaces RFLAGS (all bits; the caller has masked what may change) and what derives from it.
    pub fn set_rflags(&mut self, value: u64) {
        let before = self.system_flags;
        self.flags.put(value);
        self.system_flags = value & rflags::DEFINED & !rflags::ARITHMETIC;
        if (before ^ self.system_flags) & (rflags::VM | rflags::AC) != 0 {
            self.update_mode();
        } else {
            self.update_attention();
        }
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        ((self.system_flags & rflags::IOPL) >> rflags::IOPL_SHIFT) as u8
    }

    /// Step of string instructions: ±`size`.
    #[inline(always)]
    pub fn string_step(&self, size: u64) -> u64 {
        if self.system_flags & rflags::DF == 0 {
            size
        } else {
            size.wrapping_neg()
        }
    }

    // General registers. An 8-bit register is named by its byte offset in the register file:
    // 8 × n for the low byte of register n, 8 × n + 1 for AH, CH, DH, BH.

    /// Reads a register.
    #[inline(always)]
    pub fn reg<T: Width>(&self, index: u8) -> T {
        if T::BITS == 8 {
            T::from_u64(self.regs.gpr[usize::from(index >> 3) & 15] >> ((index & 1) * 8))
        } else {
            T::from_u64(self.regs.gpr[usize::from(index) & 15])
        }
    }

    /// Writes a register; 32-bit writes clear the upper half.
    #[inline(always)]
    pub fn set_reg<T: Width>(&mut self, index: u8, value: T) {
        if T::BITS == 8 {
            let shift = (index & 1) * 8;
            let register = &mut self.regs.gpr[usize::from(index >> 3) & 15];
            *register = *register & !(0xff << shift) | value.to_u64() << shift;
        } else {
            let register = &mut self.regs.gpr[usize::from(index) & 15];
            *register = value.merge(*register);
        }
    }

    /// RSP, masked to the stack's size.
    pub fn stack_pointer(&self) -> u64 {
        self.regs.gpr[gpr::RSP] & self.stack_mask
    }

    /// Writes the part of RSP that the stack's size names (SDM vol. 1, 6.2.3).
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let old = self.regs.gpr[gpr::RSP];
        self.regs.gpr[gpr::RSP] = match self.stack_mask {
            0xffff => old & !0xffff | value & 0xffff,
            mask => value & mask,
        };
    }

    /// RIP truncated to the code size.
    #[inline(always)]
    pub fn mask_rip(&self, rip: u64) -> u64 {
        match self.code_size {
            CodeSize::Bits64 => rip,
            _ => rip & 0xffff_ffff,
        }
    }

    // Addresses.

    /// Linear address of an offset in a segment, without limit checks. In 64-bit mode only FS and
    /// GS have a base.
    #[inline(always)]
    pub fn linear(&self, segment: usize, offset: u64) -> u64 {
        if self.is_64bit() {
            if segment >= sreg::FS {
                self.sys.segments[segment & 7].base.wrapping_add(offset)
            } else {
                offset
            }
        } else {
            self.sys.segments[segment.min(5)].base.wrapping_add(offset) & 0xffff_ffff
        }
    }

    /// Checks an access of `size` bytes at `offset` against a segment outside 64-bit mode: limit,
    /// type, presence (SDM vol. 3A, 6.3 and 6.5). In 64-bit mode there is nothing to check here:
    /// whether the address is canonical shows when it is translated.
    pub fn check_segment(
        &mut self,
        segment: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<(), Stop> {
        if self.is_64bit() {
            return Ok(());
        }
        let register = self.sys.segments[segment.min(5)];
        let refuse = |cpu: &mut Self| {
            let exception = if segment == sreg::SS {
                Exception::ss(0)
            } else {
                Exception::gp(0)
            };
            Err(cpu.raise(exception))
        };
        if self.is_protected() && !self.is_vm86() {
            if !register.is_usable() {
                return refuse(self);
            }
            let readable = !register.has(access::CODE) || register.has(access::READABLE);
            let writable = !register.has(access::CODE) && register.has(access::WRITABLE);
            if (write && !writable) || (!write && !readable) {
                return self.gp0();
            }
        }
        if !within_limit(&register, offset, size) {
            return refuse(self);
        }
        Ok(())
    }

    /// Checks and computes the linear address of `size` bytes at `offset` in a segment.
    pub fn segment_address(
        &mut self,
        segment: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        self.check_segment(segment, offset, size, write)?;
        Ok(self.linear(segment, offset))
    }

    /// The address size mask of an instruction.
    #[inline(always)]
    pub fn address_mask(op: &Op) -> u64 {
        match op.address_size() {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }

    // Time.

    /// The time-stamp counter.
    pub fn tsc(&mut self) -> u64 {
        let ticks = ticks(self.world.clock(), self.profile.tsc_hz);
        ticks.wrapping_add(self.sys.tsc_offset)
    }

    /// Whether any breakpoint of DR7 is enabled.
    pub fn breakpoints_enabled(&self) -> bool {
        self.sys.dr7 & 0xff != 0
    }

    /// Takes the data breakpoints that the current instruction hit, as DR6 bits.
    pub fn take_breakpoints(&mut self) -> u64 {
        std::mem::take(&mut self.breakpoints_hit) & !dr::DR6_ONES
    }
}

/// Ticks of a clock of `hz` in `nanoseconds`.
pub fn ticks(nanoseconds: u64, hz: u64) -> u64 {
    if hz == 1_000_000_000 {
        return nanoseconds;
    }
    (u128::from(nanoseconds) * u128::from(hz) / 1_000_000_000) as u64
}

/// Whether `size` bytes at `offset` are inside a segment's limit; offsets wrap at the segment's
/// address size, and a wrapped access is outside.
pub(crate) fn within_limit(segment: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    let expand_down =
        !segment.has(access::CODE) && segment.has(access::S) && segment.has(access::EXPAND_DOWN);
    if expand_down {
        let top = if segment.has(access::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}
