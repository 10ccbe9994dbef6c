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
mod tests {
    use trapgate_x86::descriptor::access;
    use trapgate_x86::registers::xcr0;

    use super::*;
    use crate::testing::{
        GP0, PAGE_TABLES, UD, execute, fault, long_cpu, protected_cpu, reset_cpu, set_cpl,
    };

    const MOV_CR0_EAX: &[u8] = &[0x0f, 0x22, 0xc0];
    const MOV_CR3_EAX: &[u8] = &[0x0f, 0x22, 0xd8];
    const MOV_CR4_EAX: &[u8] = &[0x0f, 0x22, 0xe0];
    const MOV_RAX_CR8: &[u8] = &[0x44, 0x0f, 0x20, 0xc0];
    const MOV_CR8_RAX: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
    const INVLPG_RBX: &[u8] = &[0x0f, 0x01, 0x3b];
    /// INVPCID RCX, [RBX].
    const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x0b];
    /// MOV RDX, [RSI].
    const LOAD: &[u8] = &[0x48, 0x8b, 0x16];
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    const SMSW_EAX: &[u8] = &[0x0f, 0x01, 0xe0];
    const LMSW_AX: &[u8] = &[0x0f, 0x01, 0xf0];

    /// An address whose page tables [`remap`] changes.
    const WINDOW: u64 = 0x4000_0000;

    /// Maps the 2 MiB at [`WINDOW`] to those at `frame`, in the tables of [`long_cpu`].
    fn remap(cpu: &Cpu, frame: u64) {
        let put = |gpa: u64, value: u64| cpu.memory.write(gpa, &value.to_le_bytes()).unwrap();
        put(PAGE_TABLES + 0x1000 + 8, (PAGE_TABLES + 0x3000) | 7);
        put(PAGE_TABLES + 0x3000, frame | 0xe7);
    }

    /// What the CPU loads from [`WINDOW`].
    fn look(cpu: &mut Cpu) -> u64 {
        cpu.regs.gpr[gpr::RSI] = WINDOW;
        execute(cpu, LOAD).unwrap();
        cpu.regs.gpr[gpr::RDX]
    }

    /// A 64-bit CPU with [`WINDOW`] mapped to memory that holds 1, looked at, and then mapped to
    /// memory that holds 2.
    fn stale_cpu() -> Cpu {
        let (mut cpu, _) = long_cpu();
        cpu.memory.write(0x20_0000, &1u64.to_le_bytes()).unwrap();
        cpu.memory.write(0x40_0000, &2u64.to_le_bytes()).unwrap();
        remap(&cpu, 0x20_0000);
        assert_eq!(look(&mut cpu), 1);
        remap(&cpu, 0x40_0000);
        assert_eq!(look(&mut cpu), 1, "the translation is cached");
        cpu
    }

    #[test]
    fn cr0_refuses_what_the_manual_forbids() {
        let (mut cpu, _) = protected_cpu();
        let cases = [
            (cr0::PG, true),
            (cr0::PE | cr0::NW, true),
            (cr0::PE | cr0::CD, false),
            (cr0::PE | cr0::CD | cr0::NW, false),
            (cr0::PE | cr0::PG, false),
        ];
        for (value, refused) in cases {
            cpu.sys.cr0 = cr0::PE | cr0::ET;
            cpu.update_mode();
            cpu.regs.gpr[gpr::RAX] = value;
            let step = execute(&mut cpu, MOV_CR0_EAX);
            assert_eq!(step.is_err(), refused, "{value:#x}");
            let expected = if refused { cr0::PE } else { value };
            assert_eq!(cpu.sys.cr0, expected | cr0::ET, "{value:#x}");
        }
    }

    #[test]
    fn cr0_upper_half_is_reserved_and_undefined_lower_bits_are_ignored() {
        let (mut cpu, _) = long_cpu();
        let old = cpu.sys.cr0;
        cpu.regs.gpr[gpr::RAX] = old | 1 << 32;
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0);
        cpu.regs.gpr[gpr::RAX] = (old | 1 << 10) & !cr0::ET;
        execute(&mut cpu, MOV_CR0_EAX).unwrap();
        assert_eq!(cpu.sys.cr0, old);
    }

    #[test]
    fn long_mode_starts_and_ends_with_paging() {
        let (mut cpu, _) = protected_cpu();
        cpu.sys.efer = efer::LME;
        cpu.sys.tr.access = access::P | system::TSS_BUSY;
        let on = cpu.sys.cr0 | cr0::PG;
        cpu.regs.gpr[gpr::RAX] = on;
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0, "needs PAE");
        cpu.sys.cr4 = cr4::PAE;
        cpu.sys.segments[sreg::CS].access |= access::L;
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0, "CS.L");
        cpu.sys.segments[sreg::CS].access &= !access::L;
        cpu.sys.tr.access = access::P | system::TSS16_BUSY;
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0, "16-bit TSS");
        cpu.sys.tr.access = access::P | system::TSS_BUSY;
        execute(&mut cpu, MOV_CR0_EAX).unwrap();
        assert!(cpu.is_long() && !cpu.is_64bit());

        cpu.sys.segments[sreg::CS].access ^= access::L | access::DB;
        cpu.update_mode();
        assert!(cpu.is_64bit());
        cpu.regs.gpr[gpr::RAX] = on & !cr0::PG;
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0, "64-bit code");
        cpu.sys.segments[sreg::CS].access ^= access::L | access::DB;
        cpu.sys.cr4 |= cr4::PCIDE;
        cpu.update_mode();
        assert_eq!(fault(&mut cpu, MOV_CR0_EAX), GP0, "PCIDs");
        cpu.sys.cr4 &= !cr4::PCIDE;
        execute(&mut cpu, MOV_CR0_EAX).unwrap();
        assert_eq!(cpu.sys.efer, efer::LME);
    }

    #[test]
    fn pae_paging_loads_its_pointers_with_cr3() {
        let (mut cpu, _) = protected_cpu();
        cpu.sys.cr4 = cr4::PAE;
        cpu.sys.cr0 |= cr0::PG;
        cpu.update_mode();
        // A good table at 0x20 past a page, one with a reserved bit in the page after.
        cpu.sys.pdptes = [0x9001; 4];
        let put = |gpa: u64, value: u64| cpu.memory.write(gpa, &value.to_le_bytes()).unwrap();
        put(0x4020, 0x5001);
        put(0x5008, 0x3);
        cpu.regs.gpr[gpr::RAX] = 0x5000;
        // The code runs on the tables in use, which don't matter to it here.
        assert_eq!(fault(&mut cpu, MOV_CR3_EAX), GP0);
        assert_eq!(cpu.sys.pdptes, [0x9001; 4]);
        cpu.regs.gpr[gpr::RAX] = 0x4020;
        execute(&mut cpu, MOV_CR3_EAX).unwrap();
        assert_eq!(cpu.sys.pdptes, [0x5001, 0, 0, 0]);
    }

    #[test]
    fn cr4_admits_what_profile_and_mode_do() {
        let base = cr4::PAE | cr4::PGE;
        let cases = [
            (base | cr4::LA57, 0, true),
            (base | cr4::VMXE, 0, true),
            (base | 1 << 40, 0, true),
            (cr4::PGE, 0, true),
            (base | cr4::PCIDE, 5, true),
            (base | cr4::PCIDE, 0, false),
            (
                base | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::OSXSAVE,
                0,
                false,
            ),
        ];
        for (value, pcid, refused) in cases {
            let (mut cpu, _) = long_cpu();
            let old = cpu.sys.cr4;
            cpu.sys.cr3 |= pcid;
            cpu.regs.gpr[gpr::RAX] = value;
            let step = execute(&mut cpu, MOV_CR4_EAX);
            assert_eq!(step.is_err(), refused, "{value:#x}");
            assert_eq!(cpu.sys.cr4, if refused { old } else { value });
        }
        let (mut cpu, _) = protected_cpu();
        cpu.regs.gpr[gpr::RAX] = cr4::PCIDE;
        assert_eq!(fault(&mut cpu, MOV_CR4_EAX), GP0, "only in long mode");
    }

    #[test]
    fn cr3_has_no_bits_beyond_the_physical_address() {
        let (mut cpu, _) = long_cpu();
        for bit in [40, 51, 52, 62, 63] {
            cpu.regs.gpr[gpr::RAX] = PAGE_TABLES | 1 << bit;
            assert_eq!(fault(&mut cpu, MOV_CR3_EAX), GP0, "bit {bit}");
        }
        cpu.sys.cr4 |= cr4::PCIDE;
        cpu.regs.gpr[gpr::RAX] = PAGE_TABLES | 1 << 62;
        assert_eq!(fault(&mut cpu, MOV_CR3_EAX), GP0);
        cpu.regs.gpr[gpr::RAX] = PAGE_TABLES | 7 | CR3_NO_FLUSH;
        execute(&mut cpu, MOV_CR3_EAX).unwrap();
        assert_eq!(cpu.sys.cr3, PAGE_TABLES | 7, "bit 63 is not stored");
    }

    #[test]
    fn cr3_load_drops_translations_unless_told_to_keep_them() {
        let mut cpu = stale_cpu();
        cpu.regs.gpr[gpr::RAX] = PAGE_TABLES;
        execute(&mut cpu, MOV_CR3_EAX).unwrap();
        assert_eq!(look(&mut cpu), 2);

        cpu.regs.gpr[gpr::RAX] = cpu.sys.cr4 | cr4::PCIDE;
        execute(&mut cpu, MOV_CR4_EAX).unwrap();
        let go = |cpu: &mut Cpu, pcid: u64, keep: bool| {
            let keep = if keep { CR3_NO_FLUSH } else { 0 };
            cpu.regs.gpr[gpr::RAX] = PAGE_TABLES | pcid | keep;
            execute(cpu, MOV_CR3_EAX).unwrap();
        };
        go(&mut cpu, 1, false);
        assert_eq!(look(&mut cpu), 2);
        remap(&cpu, 0x20_0000);
        // PCID 2 must not look: the TLB has one place for the address.
        go(&mut cpu, 2, false);
        go(&mut cpu, 1, true);
        assert_eq!(look(&mut cpu), 2);
        go(&mut cpu, 1, false);
        assert_eq!(look(&mut cpu), 1);
    }

    #[test]
    fn invlpg_drops_one_translation() {
        let mut cpu = stale_cpu();
        let epoch = cpu.fetch_epoch;
        cpu.regs.gpr[gpr::RBX] = WINDOW + 0x123;
        execute(&mut cpu, INVLPG_RBX).unwrap();
        assert_eq!(look(&mut cpu), 2);
        assert_ne!(cpu.fetch_epoch, epoch);
        cpu.regs.gpr[gpr::RBX] = 1 << 62;
        execute(&mut cpu, INVLPG_RBX).unwrap();
    }

    #[test]
    fn invpcid_drops_what_its_type_says() {
        for kind in 0..4 {
            let mut cpu = stale_cpu();
            cpu.memory.write(0x8000, &0u64.to_le_bytes()).unwrap();
            cpu.memory.write(0x8008, &WINDOW.to_le_bytes()).unwrap();
            cpu.regs.gpr[gpr::RBX] = 0x8000;
            cpu.regs.gpr[gpr::RCX] = kind;
            execute(&mut cpu, INVPCID).unwrap();
            assert_eq!(look(&mut cpu), 2, "type {kind}");
        }
    }

    #[test]
    fn invpcid_checks_its_type_and_descriptor() {
        // Type, PCID and reserved bits, address, CR4.PCIDE, refused.
        let cases = [
            (4, 0, 0, true, true),
            (0, 1 << 12, 0, true, true),
            (0, 1, 0, false, true),
            (1, 1, 0, false, true),
            (0, 0, 1 << 47, true, true),
            (1, 1, 1 << 47, true, false),
            (2, 1, 1 << 47, false, false),
        ];
        for (kind, low, address, pcids, refused) in cases {
            let (mut cpu, _) = long_cpu();
            if pcids {
                cpu.sys.cr4 |= cr4::PCIDE;
            }
            cpu.memory.write(0x8000, &u64::to_le_bytes(low)).unwrap();
            cpu.memory
                .write(0x8008, &u64::to_le_bytes(address))
                .unwrap();
            cpu.regs.gpr[gpr::RBX] = 0x8000;
            cpu.regs.gpr[gpr::RCX] = kind;
            let step = execute(&mut cpu, INVPCID);
            assert_eq!(step.is_err(), refused, "type {kind} {low:#x} {address:#x}");
        }
    }

    #[test]
    fn write_protection_takes_effect_on_cached_rights() {
        let (mut cpu, _) = long_cpu();
        remap(&cpu, 0x20_0000);
        let read_only = 0x20_0000u64 | 0xe5;
        let at = PAGE_TABLES + 0x3000;
        cpu.memory.write(at, &read_only.to_le_bytes()).unwrap();
        // MOV [RSI], RDX
        let store: &[u8] = &[0x48, 0x89, 0x16];
        cpu.regs.gpr[gpr::RSI] = WINDOW;
        cpu.regs.gpr[gpr::RAX] = cpu.sys.cr0 & !cr0::WP;
        execute(&mut cpu, MOV_CR0_EAX).unwrap();
        execute(&mut cpu, store).unwrap();
        cpu.regs.gpr[gpr::RAX] |= cr0::WP;
        execute(&mut cpu, MOV_CR0_EAX).unwrap();
        assert_eq!(fault(&mut cpu, store), (trapgate_x86::Vector::PF, Some(3)));
    }

    #[test]
    fn cr8_is_the_task_priority() {
        let (mut cpu, world) = long_cpu();
        cpu.regs.gpr[gpr::RAX] = 9;
        execute(&mut cpu, MOV_CR8_RAX).unwrap();
        assert_eq!(world.with(|told| told.task_priority), 9);
        assert!(cpu.interrupt_waits, "an interrupt may be let through now");
        cpu.regs.gpr[gpr::RAX] = 0;
        execute(&mut cpu, MOV_RAX_CR8).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 9);
        cpu.regs.gpr[gpr::RAX] = 16;
        assert_eq!(fault(&mut cpu, MOV_CR8_RAX), GP0);
    }

    #[test]
    fn lmsw_sets_but_never_clears_protection() {
        let (mut cpu, _) = reset_cpu();
        cpu.regs.gpr[gpr::RAX] = cr0::PE | cr0::TS | 0xfff0;
        execute(&mut cpu, LMSW_AX).unwrap();
        let upper = cr0::CD | cr0::NW | cr0::ET;
        assert_eq!(cpu.sys.cr0, upper | cr0::PE | cr0::TS);
        cpu.regs.gpr[gpr::RAX] = cr0::MP;
        execute(&mut cpu, LMSW_AX).unwrap();
        assert_eq!(cpu.sys.cr0, upper | cr0::PE | cr0::MP);
    }

    #[test]
    fn smsw_stores_as_much_as_fits() {
        let (mut cpu, _) = long_cpu();
        let all = cpu.sys.cr0;
        cpu.regs.gpr[gpr::RAX] = u64::MAX;
        execute(&mut cpu, &[0x66, 0x0f, 0x01, 0xe0]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], !0xffff | all & 0xffff);
        execute(&mut cpu, SMSW_EAX).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], all);
        cpu.memory.write(0x8000, &[0xaa; 4]).unwrap();
        cpu.regs.gpr[gpr::RAX] = 0x8000;
        execute(&mut cpu, &[0x0f, 0x01, 0x20]).unwrap();
        let mut stored = [0; 4];
        cpu.memory.read(0x8000, &mut stored).unwrap();
        assert_eq!(stored, [all as u8, (all >> 8) as u8, 0xaa, 0xaa]);

        set_cpl(&mut cpu, 3);
        execute(&mut cpu, SMSW_EAX).unwrap();
        cpu.sys.cr4 |= cr4::UMIP;
        assert_eq!(fault(&mut cpu, SMSW_EAX), GP0);
    }

    #[test]
    fn user_mode_may_do_none_of_it() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.regs.gpr[gpr::RBX] = 0x8000;
        set_cpl(&mut cpu, 3);
        let before = cpu.export();
        let instructions: &[&[u8]] = &[
            MOV_CR0_EAX,
            MOV_CR3_EAX,
            MOV_CR4_EAX,
            MOV_CR8_RAX,
            MOV_RAX_CR8,
            LMSW_AX,
            INVLPG_RBX,
            INVPCID,
            XSETBV,
            &[0x0f, 0x20, 0xc0], // MOV RAX, CR0
            &[0x0f, 0x08],       // INVD
            &[0x0f, 0x09],       // WBINVD
            &[0x0f, 0x33],       // RDPMC
            &[0x0f, 0x32],       // RDMSR
            &[0x0f, 0x30],       // WRMSR
            &[0x0f, 0x01, 0xf8], // SWAPGS
            &[0x0f, 0x21, 0xc0], // MOV RAX, DR0
        ];
        for bytes in instructions {
            assert_eq!(fault(&mut cpu, bytes), GP0, "{bytes:02x?}");
        }
        assert_eq!(cpu.export(), before);
    }

    #[test]
    fn what_no_profile_has_is_undefined() {
        let (mut cpu, _) = long_cpu();
        let instructions: &[&[u8]] = &[
            &[0x0f, 0x22, 0xc8],       // MOV CR1, RAX
            &[0x0f, 0x20, 0xe8],       // MOV RAX, CR5
            &[0x0f, 0x01, 0xc8],       // MONITOR
            &[0x0f, 0x01, 0xc9],       // MWAIT
            &[0x0f, 0xaa],             // RSM
            &[0x0f, 0x01, 0xc1],       // VMCALL
            &[0x0f, 0x01, 0xd9],       // VMMCALL
            &[0x0f, 0x01, 0xd8],       // VMRUN
            &[0x0f, 0x37],             // GETSEC
            &[0x66, 0x0f, 0xae, 0x38], // CLFLUSHOPT
            &[0x0f, 0xc7, 0x23],       // XSAVEC
            XGETBV,                    // without OSXSAVE
        ];
        for bytes in instructions {
            assert_eq!(fault(&mut cpu, bytes), UD, "{bytes:02x?}");
        }
    }

    #[test]
    fn hints_do_nothing_and_flushes_fault_like_loads() {
        let (mut cpu, _) = long_cpu();
        cpu.regs.gpr[gpr::RAX] = 1 << 40;
        let before = cpu.export();
        let instructions: &[&[u8]] = &[
            &[0x90],
            &[0xf3, 0x90],             // PAUSE
            &[0x0f, 0x1f, 0x00],       // NOP [RAX]
            &[0xf3, 0x0f, 0x1e, 0xfa], // ENDBR64
            &[0x0f, 0x18, 0x08],       // PREFETCHT0 [RAX]
            &[0x0f, 0x0d, 0x08],       // PREFETCHW [RAX]
            &[0x0f, 0xae, 0xe8],       // LFENCE
            &[0x0f, 0xae, 0xf0],       // MFENCE
            &[0x0f, 0xae, 0xf8],       // SFENCE
            &[0x0f, 0x09],             // WBINVD
            &[0xf3, 0x0f, 0x09],       // WBNOINVD, which is WBINVD
        ];
        for bytes in instructions {
            assert_eq!(execute(&mut cpu, bytes), Ok(()), "{bytes:02x?}");
        }
        let clflush: &[u8] = &[0x0f, 0xae, 0x38];
        let vector = fault(&mut cpu, clflush).0;
        assert_eq!(vector, trapgate_x86::Vector::PF);
        let after = cpu.export();
        assert_eq!((after.gpr, after.system), (before.gpr, before.system));
        cpu.regs.gpr[gpr::RAX] = 0x8000;
        execute(&mut cpu, clflush).unwrap();
    }

    #[test]
    fn xcr0_takes_only_combinations_that_make_sense() {
        let all = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        let cases = [
            (0, all, false),
            (0, xcr0::X87, false),
            (0, xcr0::X87 | xcr0::SSE, false),
            (0, 0, true),
            (0, xcr0::SSE, true),
            (0, xcr0::X87 | xcr0::AVX, true),
            (0, all | 1 << 5, true),
            (0, all | 1 << 63, true),
            (1, all, true),
        ];
        for (register, value, refused) in cases {
            let (mut cpu, _) = long_cpu();
            cpu.sys.cr4 |= cr4::OSXSAVE;
            cpu.regs.gpr[gpr::RCX] = register;
            cpu.regs.gpr[gpr::RAX] = value & 0xffff_ffff;
            cpu.regs.gpr[gpr::RDX] = value >> 32;
            let step = execute(&mut cpu, XSETBV);
            assert_eq!(step.is_err(), refused, "{value:#x}");
            cpu.regs.gpr[gpr::RCX] = 0;
            execute(&mut cpu, XGETBV).unwrap();
            let expected = if refused { xcr0::X87 } else { value };
            assert_eq!(cpu.regs.gpr[gpr::RAX], expected);
        }
    }
}
