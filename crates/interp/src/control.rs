//! Control registers, XCR0, and the instructions that invalidate translations (SDM vol. 3A, 2.5,
//! 2.6, 5.10.4; vol. 2, MOV to/from control registers, LMSW, SMSW, INVLPG, INVPCID, XSETBV).

use iced_x86::{Code, Instruction, Mnemonic};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::profile::PHYSICAL_ADDRESS_BITS;
use trapgate_x86::registers::{cr0, cr4, efer, gpr, sreg, xcr0};

use crate::cpu::{Cpu, Step};
use crate::op::{AddressForm, Handler, Op};

/// PCID in CR3.
const CR3_PCID: u64 = 0xfff;
/// MOV to CR3: keep what was cached for the PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let handler: Handler = match instruction.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => match op.src {
            0 => op_mov_from_cr::<0>,
            2 => op_mov_from_cr::<2>,
            3 => op_mov_from_cr::<3>,
            4 => op_mov_from_cr::<4>,
            8 => op_mov_from_cr::<8>,
            _ => op_undefined,
        },
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => match op.dst {
            0 => op_mov_to_cr::<0>,
            2 => op_mov_to_cr::<2>,
            3 => op_mov_to_cr::<3>,
            4 => op_mov_to_cr::<4>,
            8 => op_mov_to_cr::<8>,
            _ => op_undefined,
        },
        // The operand size of SMSW to a register is in the code only.
        Code::Smsw_rm16 => {
            op.code = 2;
            op_smsw
        }
        Code::Smsw_r32m16 => {
            op.code = 4;
            op_smsw
        }
        Code::Smsw_r64m16 => {
            op.code = 8;
            op_smsw
        }
        _ => match instruction.mnemonic() {
            Mnemonic::Lmsw => op_lmsw,
            Mnemonic::Invlpg => op_invlpg,
            Mnemonic::Invpcid => op_invpcid,
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => op_invalidate_caches,
            Mnemonic::Xgetbv => op_xgetbv,
            Mnemonic::Xsetbv => op_xsetbv,
            Mnemonic::Rdpmc => op_rdpmc,
            // Not in any profile: MONITOR, SMM, VMX, SVM, SMX, SGX, CLFLUSHOPT and its kin.
            Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Monitorx
            | Mnemonic::Mwaitx
            | Mnemonic::Umonitor
            | Mnemonic::Umwait
            | Mnemonic::Tpause
            | Mnemonic::Rsm
            | Mnemonic::Vmcall
            | Mnemonic::Vmlaunch
            | Mnemonic::Vmresume
            | Mnemonic::Vmxoff
            | Mnemonic::Vmxon
            | Mnemonic::Vmptrld
            | Mnemonic::Vmptrst
            | Mnemonic::Vmclear
            | Mnemonic::Vmread
            | Mnemonic::Vmwrite
            | Mnemonic::Vmfunc
            | Mnemonic::Invept
            | Mnemonic::Invvpid
            | Mnemonic::Vmrun
            | Mnemonic::Vmload
            | Mnemonic::Vmsave
            | Mnemonic::Vmmcall
            | Mnemonic::Stgi
            | Mnemonic::Clgi
            | Mnemonic::Skinit
            | Mnemonic::Invlpga
            | Mnemonic::Invlpgb
            | Mnemonic::Tlbsync
            | Mnemonic::Getsec
            | Mnemonic::Encls
            | Mnemonic::Enclu
            | Mnemonic::Enclv
            | Mnemonic::Pconfig
            | Mnemonic::Rdpkru
            | Mnemonic::Wrpkru => op_undefined,
            _ => return None,
        },
    };
    Some(handler)
}

/// #UD.
pub(crate) fn op_undefined(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.ud()
}

impl Cpu {
    /// #GP(0) unless the CPL is 0 (virtual-8086 mode's is 3).
    #[inline(always)]
    pub(crate) fn check_cpl0(&mut self) -> Step {
        if self.cpl == 0 { Ok(()) } else { self.gp0() }
    }

    /// A general register at the width that moves to and from control and debug registers have:
    /// 64 bits in 64-bit mode, else 32.
    #[inline(always)]
    pub(crate) fn system_operand(&self, register: u8) -> u64 {
        let value = self.regs.gpr[usize::from(register) & 15];
        if self.is_64bit() {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    /// Writes a general register as [`Self::system_operand`] reads it.
    #[inline(always)]
    pub(crate) fn set_system_operand(&mut self, register: u8, value: u64) {
        let value = if self.is_64bit() {
            value
        } else {
            value & 0xffff_ffff
        };
        self.regs.gpr[usize::from(register) & 15] = value;
    }

    fn is_pae_paging(&self, cr0: u64, cr4: u64) -> bool {
        cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && self.sys.efer & efer::LME == 0
    }

    /// MOV to CR0, and LMSW.
    fn write_cr0(&mut self, value: u64) -> Step {
        if value >> 32 != 0 {
            return self.gp0();
        }
        let old = self.sys.cr0;
        let value = value & cr0::DEFINED | cr0::ET;
        let changed = old ^ value;
        let paging = value & cr0::PG != 0;
        if (paging && value & cr0::PE == 0) || (value & cr0::NW != 0 && value & cr0::CD == 0) {
            return self.gp0();
        }
        let mut new_efer = self.sys.efer;
        if changed & cr0::PG != 0 {
            if paging {
                if self.sys.efer & efer::LME != 0 {
                    self.check_long_mode_activation()?;
                    new_efer |= efer::LMA;
                }
            } else {
                // 64-bit code, or PCIDs, can't live without paging.
                if self.is_64bit() || self.sys.cr4 & cr4::PCIDE != 0 {
                    return self.gp0();
                }
                new_efer &= !efer::LMA;
            }
        }
        // SDM vol. 3A, 5.4.1.
        if self.is_pae_paging(value, self.sys.cr4) && changed & (cr0::CD | cr0::NW | cr0::PG) != 0 {
            self.sys.pdptes = self.load_pdptes(self.sys.cr3)?;
        }
        self.sys.cr0 = value;
        self.sys.efer = new_efer;
        // WP does not invalidate on a real processor, whose TLB entries hold the R/W flag; ours
        // hold the rights that follow from it.
        if changed & (cr0::PG | cr0::WP) != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        self.end_block = true;
        Ok(())
    }

    /// The conditions of entering long mode (SDM vol. 3A, 12.8.5).
    fn check_long_mode_activation(&mut self) -> Step {
        let task_is_16bit = matches!(
            self.sys.tr.access & access::TYPE,
            system::TSS16 | system::TSS16_BUSY
        );
        if self.sys.cr4 & cr4::PAE == 0
            || self.sys.segments[sreg::CS].has(access::L)
            || task_is_16bit
        {
            return self.gp0();
        }
        Ok(())
    }

    /// MOV to CR3.
    fn write_cr3(&mut self, value: u64) -> Step {
        let pcids = self.sys.cr4 & cr4::PCIDE != 0;
        let keep = pcids && value & CR3_NO_FLUSH != 0;
        let value = if pcids { value & !CR3_NO_FLUSH } else { value };
        if value >> PHYSICAL_ADDRESS_BITS != 0 {
            return self.gp0();
        }
        if self.is_pae_paging(self.sys.cr0, self.sys.cr4) {
            self.sys.pdptes = self.load_pdptes(value)?;
        }
        self.sys.cr3 = value;
        let pcid = if pcids { (value & CR3_PCID) as u16 } else { 0 };
        self.tlb.switch(pcid, keep);
        self.fetch_epoch = self.fetch_epoch.wrapping_add(1);
        self.end_block = true;
        Ok(())
    }

    /// MOV to CR4.
    fn write_cr4(&mut self, value: u64) -> Step {
        let old = self.sys.cr4;
        let changed = old ^ value;
        if value & !self.profile.cr4_mask() != 0 {
            return self.gp0();
        }
        if self.is_long() && value & cr4::PAE == 0 {
            return self.gp0();
        }
        if changed & value & cr4::PCIDE != 0 && (!self.is_long() || self.sys.cr3 & CR3_PCID != 0) {
            return self.gp0();
        }
        let pae = changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0;
        if pae && self.is_pae_paging(self.sys.cr0, value) {
            self.sys.pdptes = self.load_pdptes(self.sys.cr3)?;
        }
        self.sys.cr4 = value;
        // SDM vol. 3A, 5.10.4.1; SMAP too because our TLB holds the rights that follow from it.
        let flushing = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
        if changed & flushing != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        self.end_block = true;
        Ok(())
    }
}

fn op_mov_to_cr<const REGISTER: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_cpl0()?;
    let value = cpu.system_operand(op.src);
    match REGISTER {
        0 => cpu.write_cr0(value),
        2 => {
            cpu.sys.cr2 = value;
            Ok(())
        }
        3 => cpu.write_cr3(value),
        4 => cpu.write_cr4(value),
        _ => {
            if value > 15 {
                return cpu.gp0();
            }
            cpu.world.set_task_priority(value as u8);
            cpu.look_for_interrupts();
            Ok(())
        }
    }
}

fn op_mov_from_cr<const REGISTER: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_cpl0()?;
    let value = match REGISTER {
        0 => cpu.sys.cr0,
        2 => cpu.sys.cr2,
        3 => cpu.sys.cr3,
        4 => cpu.sys.cr4,
        _ => u64::from(cpu.world.task_priority()),
    };
    cpu.set_system_operand(op.dst, value);
    Ok(())
}

impl Cpu {
    /// The local APIC's priorities may have changed: lets the run loop ask it for an interrupt.
    pub(crate) fn look_for_interrupts(&mut self) {
        self.interrupt_waits = true;
        self.update_attention();
        self.end_block = true;
    }
}

/// LMSW: CR0.PE, MP, EM and TS; PE can't be cleared by it.
fn op_lmsw(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_cpl0()?;
    let source: u16 = if op.has_memory() {
        cpu.load(op)?
    } else {
        cpu.reg(op.dst)
    };
    let bits = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let old = cpu.sys.cr0;
    cpu.write_cr0(old & !(bits & !cr0::PE) | u64::from(source) & bits)
}

/// SMSW: CR0 to a register of any size (all of it that fits), or its low word to memory.
fn op_smsw(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_umip()?;
    let value = cpu.sys.cr0;
    if op.has_memory() {
        return cpu.store(op, value as u16);
    }
    match op.code {
        2 => cpu.set_reg(op.dst, value as u16),
        4 => cpu.set_reg(op.dst, value as u32),
        _ => cpu.set_reg(op.dst, value),
    }
    Ok(())
}

impl Cpu {
    /// User-mode instruction prevention: #GP(0) for SGDT, SIDT, SLDT, SMSW and STR.
    #[inline(always)]
    pub(crate) fn check_umip(&mut self) -> Step {
        if self.cpl != 0 && self.sys.cr4 & cr4::UMIP != 0 {
            return self.gp0();
        }
        Ok(())
    }
}

/// INVLPG. The operand is an address only: no segment check, and nothing happens where it is not
/// canonical.
fn op_invlpg(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_cpl0()?;
    let offset = cpu.offset(op);
    let linear = if op.form == AddressForm::General {
        cpu.linear(usize::from(op.segment), offset)
    } else {
        offset
    };
    cpu.tlb.flush_page(linear);
    cpu.fetch_epoch = cpu.fetch_epoch.wrapping_add(1);
    cpu.end_block = true;
    Ok(())
}

/// INVPCID: the type is in the register, the descriptor (PCID, linear address) in memory.
fn op_invpcid(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_cpl0()?;
    let kind = cpu.system_operand(op.dst);
    let linear = cpu.operand_address(op, 16, false)?;
    let mut descriptor = [0; 16];
    cpu.read_bytes(linear, &mut descriptor, op.segment)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (low, address) = (descriptor as u64, (descriptor >> 64) as u64);
    let pcid = low & CR3_PCID;
    let pcids = cpu.sys.cr4 & cr4::PCIDE != 0;
    if kind > 3 || low & !CR3_PCID != 0 {
        return cpu.gp0();
    }
    if kind <= 1 && !pcids && pcid != 0 {
        return cpu.gp0();
    }
    match kind {
        0 => {
            if !is_canonical(address) {
                return cpu.gp0();
            }
            cpu.tlb.flush_page(address);
        }
        1 => {
            let current = !pcids || cpu.sys.cr3 & CR3_PCID == pcid;
            cpu.tlb.flush_pcid(pcid as u16, current);
        }
        // With or without global translations: ours have none that outlive their address space.
        _ => cpu.tlb.flush_all(),
    }
    cpu.fetch_epoch = cpu.fetch_epoch.wrapping_add(1);
    cpu.end_block = true;
    Ok(())
}

/// INVD, WBINVD: guest memory is always coherent.
fn op_invalidate_caches(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.check_cpl0()
}

fn op_xgetbv(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    // ECX = 1 (XINUSE) is not in the profiles.
    if cpu.regs.gpr[gpr::RCX] as u32 != 0 {
        return cpu.gp0();
    }
    cpu.regs.gpr[gpr::RAX] = cpu.sys.xcr0 & 0xffff_ffff;
    cpu.regs.gpr[gpr::RDX] = cpu.sys.xcr0 >> 32;
    Ok(())
}

fn op_xsetbv(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.sys.cr4 & cr4::OSXSAVE == 0 {
        return cpu.ud();
    }
    cpu.check_cpl0()?;
    let low = cpu.regs.gpr[gpr::RAX] & 0xffff_ffff;
    let value = low | cpu.regs.gpr[gpr::RDX] << 32;
    if cpu.regs.gpr[gpr::RCX] as u32 != 0 || !is_valid_xcr0(value, cpu.profile.xcr0_mask()) {
        return cpu.gp0();
    }
    cpu.sys.xcr0 = value;
    cpu.end_block = true;
    Ok(())
}

/// Whether XCR0 may have this value (SDM vol. 1, 13.3).
pub(crate) fn is_valid_xcr0(value: u64, mask: u64) -> bool {
    let avx_alone = value & xcr0::AVX != 0 && value & xcr0::SSE == 0;
    value & !mask == 0 && value & xcr0::X87 != 0 && !avx_alone
}

/// RDPMC: the profiles have no counters.
fn op_rdpmc(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.gp0()
}

#[cfg(test)]
mod tests;
