//! Tests of control registers, invalidations, and of hints.

use trapgate_x86::descriptor::access;
use trapgate_x86::registers::xcr0;

use super::*;
use crate::testing::{
    GP0, PAGE_TABLES, UD, WINDOW, execute, fault, long_cpu, map_window, protected_cpu, reset_cpu,
    set_cpl,
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
    map_window(&cpu, 0x20_0000);
    assert_eq!(look(&mut cpu), 1);
    map_window(&cpu, 0x40_0000);
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
    map_window(&cpu, 0x20_0000);
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
    map_window(&cpu, 0x20_0000);
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
