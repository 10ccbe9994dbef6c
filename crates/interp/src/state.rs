//! The complete state of the processor, taken out and put in.

use trapgate_engine::StateError;
use trapgate_thunk::RegisterFile;
use trapgate_x86::descriptor::access;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::profile::PHYSICAL_ADDRESS_BITS;
use trapgate_x86::registers::{cr0, cr4, efer, rflags, sreg};
use trapgate_x86::state::ParavirtualMsrs;
use trapgate_x86::{CpuState, Segment, SystemState, TableRegister};

use crate::control::is_valid_xcr0;
use crate::cpu::Cpu;
use crate::debug::{is_valid_dr6, is_valid_dr7};
use crate::msr::is_valid_pat;
use crate::xsave;

impl Cpu {
    /// The state between two instructions.
    pub(crate) fn export(&mut self) -> CpuState {
        CpuState {
            gpr: self.regs.gpr,
            rip: self.mask_rip(self.rip),
            rflags: self.rflags(),
            xsave: xsave::image(&self.regs),
            system: self.sys.clone(),
            pending: self.pending,
        }
    }

    /// Replaces the state. An error changes nothing.
    pub(crate) fn import(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.check_state(state)?;
        let CpuState {
            gpr,
            rip,
            rflags,
            xsave,
            system,
            pending,
        } = state;
        let mut regs = RegisterFile::new();
        regs.gpr = *gpr;
        xsave::set_image(&mut regs, xsave);
        self.regs = regs;
        self.rip = *rip;
        self.sys = system.clone();
        self.pending = *pending;
        self.world.set_tsc_offset(self.sys.tsc_offset);
        // What was derived from the old state, or belonged to its last instruction.
        self.breakpoints_hit = 0;
        self.end_block = true;
        self.interrupt_waits = true;
        self.tlb.flush_all();
        let pcid = if self.sys.cr4 & cr4::PCIDE != 0 {
            (self.sys.cr3 & 0xfff) as u16
        } else {
            0
        };
        self.tlb.switch(pcid, false);
        self.set_rflags(*rflags);
        self.update_mode();
        Ok(())
    }

    /// Refuses what no sequence of instructions leads to on a processor of this profile, and what
    /// the interpreter's own invariants rest on. Every field is named here, so that a new one is
    /// thought about.
    fn check_state(&self, state: &CpuState) -> Result<(), StateError> {
        let CpuState {
            gpr: _,
            rip,
            rflags,
            xsave,
            system,
            pending: _,
        } = state;
        let SystemState {
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2: _,
            cr3,
            cr4,
            xcr0,
            // Loaded unchecked only if not present; a walk ignores reserved bits of the others.
            pdptes: _,
            dr: _,
            dr6,
            dr7,
            efer,
            star: _,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            tsc_aux,
            tsc_offset: _,
            tsc_adjust: _,
            pat,
            misc_enable: _,
            spec_ctrl: _,
            mcg_status: _,
            mtrrs: _,
            paravirtual:
                ParavirtualMsrs {
                    system_time: _,
                    wall_clock: _,
                },
            shadow: _,
            nmi_blocked: _,
            nmi_pending: _,
            activity: _,
        } = system;

        let canonical = |register, value| check(register, value, is_canonical(value));
        check("RFLAGS", *rflags, is_valid_rflags(*rflags))?;
        check("CR0", *cr0, is_valid_cr0(*cr0))?;
        check("CR3", *cr3, cr3 >> PHYSICAL_ADDRESS_BITS == 0)?;
        check("CR4", *cr4, cr4 & !self.profile.cr4_mask() == 0)?;
        check("IA32_EFER", *efer, is_valid_efer(*efer, *cr0, *cr4))?;
        check("CR4", *cr4, cr4 & cr4::PCIDE == 0 || efer & efer::LMA != 0)?;
        let mask = self.profile.xcr0_mask();
        check("XCR0", *xcr0, is_valid_xcr0(*xcr0, mask))?;
        let valid = xsave::is_valid_image(xsave, mask);
        check("XSTATE_BV or MXCSR", xsave::header_bits(xsave), valid)?;
        check("DR6", *dr6, is_valid_dr6(*dr6))?;
        check("DR7", *dr7, is_valid_dr7(*dr7))?;
        check("IA32_PAT", *pat, is_valid_pat(*pat))?;
        check("SFMASK", *sfmask, sfmask >> 32 == 0)?;
        check("TSC_AUX", *tsc_aux, tsc_aux >> 32 == 0)?;
        check("IA32_SYSENTER_CS", *sysenter_cs, sysenter_cs >> 32 == 0)?;
        canonical("LSTAR", *lstar)?;
        canonical("CSTAR", *cstar)?;
        canonical("KERNEL_GS_BASE", *kernel_gs_base)?;
        canonical("IA32_SYSENTER_ESP", *sysenter_esp)?;
        canonical("IA32_SYSENTER_EIP", *sysenter_eip)?;
        for TableRegister { base, limit: _ } in [gdtr, idtr] {
            canonical("GDTR or IDTR", *base)?;
        }
        for segment in segments.iter().chain([ldtr, tr]) {
            check_segment(segment)?;
        }
        check_code_segment(&segments[sreg::CS], *efer, *rip)
    }
}

fn check(register: &'static str, value: u64, valid: bool) -> Result<(), StateError> {
    if valid {
        Ok(())
    } else {
        Err(StateError::Register { register, value })
    }
}

fn is_valid_rflags(value: u64) -> bool {
    value & !rflags::DEFINED == rflags::ONE
}

fn is_valid_cr0(value: u64) -> bool {
    value & !cr0::DEFINED == 0
        && value & cr0::ET != 0
        && (value & cr0::PG == 0 || value & cr0::PE != 0)
        && (value & cr0::NW == 0 || value & cr0::CD != 0)
}

/// EFER has only known bits, and LMA is what LME and CR0.PG say (SDM vol. 3A, 12.8.5).
fn is_valid_efer(value: u64, cr0: u64, cr4: u64) -> bool {
    let known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    let active = value & efer::LME != 0 && cr0 & cr0::PG != 0;
    value & !known == 0 && (value & efer::LMA != 0) == active && (!active || cr4 & cr4::PAE != 0)
}

fn check_segment(segment: &Segment) -> Result<(), StateError> {
    let Segment {
        selector: _,
        base,
        limit: _,
        access,
    } = segment;
    check("segment base", *base, is_canonical(*base))?;
    let known = 0xf0ff | access::UNUSABLE;
    check(
        "segment access rights",
        u64::from(*access),
        access & !known == 0,
    )
}

/// 64-bit code runs at a canonical address, other code below 4 GiB.
fn check_code_segment(code: &Segment, efer: u64, rip: u64) -> Result<(), StateError> {
    let is_64bit = efer & efer::LMA != 0 && code.has(access::L);
    check(
        "RIP",
        rip,
        if is_64bit {
            is_canonical(rip)
        } else {
            rip >> 32 == 0
        },
    )
}
