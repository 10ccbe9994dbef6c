//! The complete state of the processor, taken out and put in.

use trapgate_engine::StateError;
use trapgate_thunk::RegisterFile;
use trapgate_x86::descriptor::access;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::profile::PHYSICAL_ADDRESS_BITS;
use trapgate_x86::registers::{cr0, cr4, efer, rflags, sreg};
use trapgate_x86::state::ParavirtualMsrs;
use trapgate_x86::stored_msr::is_valid_pat;
use trapgate_x86::{CpuState, Segment, SystemState, TableRegister};

use crate::control::is_valid_xcr0;
use crate::cpu::Cpu;
use crate::debug::{is_valid_dr6, is_valid_dr7};
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
            interrupt: self.acknowledged,
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
            interrupt,
        } = state;
        let mut regs = RegisterFile::new();
        regs.gpr = *gpr;
        xsave::set_image(&mut regs, xsave);
        self.regs = regs;
        self.rip = *rip;
        self.sys = system.clone();
        self.pending = *pending;
        self.acknowledged = *interrupt;
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
            interrupt: _,
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
            // Reserved bits lead a walk outside memory at worst.
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

#[cfg(test)]
mod tests {
    use trapgate_x86::registers::{MXCSR_MASK, dr, xcr0};
    use trapgate_x86::state::Mtrrs;
    use trapgate_x86::{Activity, Exception, InterruptShadow, XsaveImage};

    use super::*;
    use crate::testing::{long_cpu, reset_cpu};

    /// A state of a 64-bit program in which no field has its reset value.
    fn busy_state() -> CpuState {
        let (mut cpu, _) = long_cpu();
        let state = cpu.export();
        let mut image = [0; trapgate_x86::state::XSAVE_BYTES];
        for (index, byte) in image.iter_mut().enumerate() {
            *byte = index as u8 | 1;
        }
        // Control and status word, tags, opcode; MXCSR and mask; tails of the x87 registers;
        // what follows the XMM registers; the header.
        image[..8].copy_from_slice(&[0x7f, 0x02, 0x41, 0x38, 0x81, 0, 0x23, 0x05]);
        image[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for register in 0..8 {
            image[32 + 16 * register + 10..][..6].fill(0);
        }
        image[416..576].fill(0);
        image[512] = 7;
        let segment = |number: u16| Segment {
            selector: number * 8,
            base: u64::from(number) << 12,
            limit: 0xf_ffff - u32::from(number),
            access: access::P | access::S | u32::from(number % 2),
        };
        let mut segments = [3, 4, 5, 6, 7, 8].map(segment);
        segments[sreg::CS] = state.system.segments[sreg::CS];
        CpuState {
            gpr: std::array::from_fn(|index| 0x1111_1111_1111_1111 * index as u64 + 3),
            rip: 0xffff_8000_1234_5678,
            rflags: rflags::ONE | rflags::ARITHMETIC | rflags::IF | rflags::AC | rflags::NT,
            xsave: XsaveImage(Box::new(image)),
            pending: Some(Exception::page_fault(0x1234, 5)),
            interrupt: Some(0x41),
            system: SystemState {
                segments,
                ldtr: segment(20),
                tr: segment(21),
                gdtr: TableRegister {
                    base: 0x1000,
                    limit: 0x7f,
                },
                idtr: TableRegister {
                    base: 0x2000,
                    limit: 0xfff,
                },
                cr0: state.system.cr0 | cr0::AM,
                cr2: 0x22,
                cr3: 0x33_3005,
                cr4: state.system.cr4 | cr4::PCIDE | cr4::OSXSAVE,
                xcr0: 7,
                pdptes: [1, 2, 3, 4],
                dr: [5, 6, 7, 8],
                dr6: dr::DR6_ONES | 1,
                dr7: dr::DR7_ONE | 0xff,
                efer: state.system.efer,
                star: 9,
                lstar: 10,
                cstar: 11,
                sfmask: 12,
                kernel_gs_base: 13,
                sysenter_cs: 14,
                sysenter_esp: 15,
                sysenter_eip: 16,
                tsc_aux: 17,
                tsc_offset: 18,
                tsc_adjust: 19,
                pat: 0x0001_0406_0007_0406,
                misc_enable: 0,
                spec_ctrl: 1,
                mcg_status: 4,
                mtrrs: Mtrrs {
                    default_type: 0xc06,
                    fixed: [20; 11],
                    variable: [(21, 22); 8],
                },
                paravirtual: ParavirtualMsrs {
                    system_time: 0x5001,
                    wall_clock: 0x6000,
                },
                shadow: InterruptShadow::Sti,
                nmi_blocked: true,
                nmi_pending: true,
                activity: Activity::Halted,
            },
        }
    }

    #[test]
    fn state_put_in_is_the_state_taken_out() {
        let (mut cpu, world) = reset_cpu();
        for state in [busy_state(), CpuState::default(), busy_state()] {
            cpu.import(&state).unwrap();
            let got = cpu.export();
            assert!(got.xsave.0 == state.xsave.0, "x87, SSE and AVX state");
            assert_eq!(got, state);
        }
        assert_eq!(world.with(|told| told.tsc_offset), 18);
        assert!(cpu.is_64bit(), "the mode was worked out");
    }

    #[test]
    fn components_that_an_image_lacks_are_initial() {
        let (mut cpu, _) = reset_cpu();
        let mut state = busy_state();
        state.xsave.0[512] = xcr0::SSE as u8;
        cpu.import(&state).unwrap();
        assert_eq!(cpu.regs.x87.control_word(), 0x37f);
        assert_eq!(cpu.regs.vector[5].0[16..], [0; 16]);
        assert_eq!(cpu.regs.vector[5].0[..16], state.xsave.0[240..256]);
        assert_eq!(cpu.regs.mxcsr, 0x9fc0);
    }

    #[test]
    fn states_that_the_profile_does_not_admit_are_refused() {
        type Change = fn(&mut CpuState);
        let cases: &[(&str, Change)] = &[
            ("CR4", |s| s.system.cr4 |= cr4::LA57),
            ("CR4", |s| s.system.cr4 |= 1 << 33),
            ("CR3", |s| s.system.cr3 |= 1 << 40),
            ("CR0", |s| s.system.cr0 |= 1 << 32),
            ("CR0", |s| s.system.cr0 |= cr0::NW),
            ("CR0", |s| s.system.cr0 &= !cr0::PE),
            ("IA32_EFER", |s| s.system.efer &= !efer::LMA),
            ("IA32_EFER", |s| s.system.efer |= 1 << 14),
            ("IA32_EFER", |s| s.system.cr4 &= !cr4::PAE),
            ("XCR0", |s| s.system.xcr0 |= 1 << 9),
            ("XCR0", |s| s.system.xcr0 = 5),
            ("XSTATE_BV or MXCSR", |s| s.xsave.0[512] |= 8),
            ("XSTATE_BV or MXCSR", |s| s.xsave.0[520] = 1),
            ("XSTATE_BV or MXCSR", |s| s.xsave.0[26] = 1),
            ("RFLAGS", |s| s.rflags = 0),
            ("RFLAGS", |s| s.rflags |= 1 << 15),
            ("RIP", |s| s.rip = 1 << 47),
            ("DR6", |s| s.system.dr6 = 0),
            ("DR7", |s| s.system.dr7 |= 1 << 12),
            ("IA32_PAT", |s| s.system.pat = 3),
            ("LSTAR", |s| s.system.lstar = 1 << 47),
            ("KERNEL_GS_BASE", |s| s.system.kernel_gs_base = 1 << 63),
            ("segment base", |s| {
                s.system.segments[sreg::GS].base = 1 << 47
            }),
            ("GDTR or IDTR", |s| s.system.idtr.base = 1 << 47),
            ("segment access rights", |s| s.system.tr.access = 1 << 8),
            ("TSC_AUX", |s| s.system.tsc_aux = 1 << 32),
        ];
        let (mut cpu, _) = reset_cpu();
        let before = cpu.export();
        for (number, (name, change)) in cases.iter().enumerate() {
            let mut state = busy_state();
            change(&mut state);
            let Err(StateError::Register { register, .. }) = cpu.import(&state) else {
                panic!("case {number}, {name}, was let in");
            };
            assert_eq!(register, *name, "case {number}");
            assert_eq!(cpu.export(), before);
        }
    }
}
