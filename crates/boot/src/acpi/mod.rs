//! ACPI tables (ACPI specification 6.5): RSDP, RSDT and XSDT, FADT, FACS, DSDT, MADT, MCFG, HPET.
//!
//! The hardware is ACPI's own register model, not the reduced one, because that is what a PC has
//! and what every kernel can drive: PM1 event and control blocks, a PM timer, the SCI. There is no
//! SMI command port: the machine is in ACPI mode from the start (4.8.3.2, SCI_EN).

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use crate::error::BootError;
use crate::memory_map::BIOS_START;
use crate::platform::Platform;

/// Guest-physical address of the RSDP: where a scan of the BIOS area finds it first (5.2.5.1).
pub const RSDP_ADDRESS: u64 = BIOS_START;

/// Guest-physical end of the tables; the SMBIOS tables follow.
const END: u64 = 0xf_0000;
/// Alignment of each table; the FACS needs it (5.2.10).
const ALIGN: u64 = 64;
const OEM: [u8; 6] = *b"TRAPGT";
const OEM_TABLE: [u8; 8] = *b"TRAPGATE";
const OEM_REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH` (5.2.9.3): devices on the ISA bus.
const LEGACY_DEVICES: u16 = 1 << 0;
/// `IAPC_BOOT_ARCH`: an 8042 keyboard controller.
const HAS_8042: u16 = 1 << 1;
/// `IAPC_BOOT_ARCH`: do not probe for VGA.
const NO_VGA: u16 = 1 << 2;

/// Interrupt flags of MADT entries (5.2.12.5): level-triggered, active high.
const LEVEL_ACTIVE_HIGH: u16 = 0b1101;
/// APIC IDs from here on need x2APIC entries.
const FIRST_X2APIC_ID: u32 = 255;

/// All tables, with the guest-physical addresses that they must be written to; they lie between
/// 0xe0000 and 0xf0000, and the first is the RSDP.
pub fn tables(platform: &Platform) -> Result<Vec<(u64, Vec<u8>)>, BootError> {
    let mut next = RSDP_ADDRESS + ALIGN;
    let mut tables = Vec::new();
    let mut place = |table: Vec<u8>| {
        let address = next;
        next = (next + table.len() as u64).next_multiple_of(ALIGN);
        tables.push((address, table));
        address
    };
    let facs = place(facs());
    let dsdt = place(dsdt::table(platform));
    let mut listed = vec![place(fadt(platform, facs, dsdt)), place(madt(platform))];
    listed.extend(mcfg(platform).map(&mut place));
    listed.extend(hpet(platform).map(&mut place));
    let rsdt = place(root_table(*b"RSDT", &listed, 4));
    let xsdt = place(root_table(*b"XSDT", &listed, 8));
    if next > END {
        return Err(BootError::TablesTooLarge {
            processors: platform.apic_ids.len(),
            bytes: next - RSDP_ADDRESS,
            limit: END - RSDP_ADDRESS,
        });
    }
    tables.insert(0, (RSDP_ADDRESS, rsdp(rsdt, xsdt)));
    Ok(tables)
}

/// A table with its header; `body` follows it.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 36;
    let mut table = Sdt::new(signature, HEADER, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn checksum(bytes: &[u8]) -> u8 {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    sum.wrapping_neg()
}

/// Root system description pointer (5.2.5.3).
fn rsdp(rsdt: u64, xsdt: u64) -> Vec<u8> {
    let mut rsdp = b"RSD PTR \0".to_vec();
    rsdp.extend(OEM);
    rsdp.push(2);
    rsdp.extend((rsdt as u32).to_le_bytes());
    rsdp.extend(36u32.to_le_bytes());
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    // One checksum for what ACPI 1.0 knew, one for all.
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// RSDT or XSDT (5.2.7, 5.2.8), with addresses of `width` bytes.
fn root_table(signature: [u8; 4], listed: &[u64], width: usize) -> Vec<u8> {
    let body: Vec<u8> = listed
        .iter()
        .flat_map(|address| address.to_le_bytes().into_iter().take(width))
        .collect();
    table(signature, 1, &body)
}

/// Firmware ACPI control structure (5.2.10); has no checksum.
fn facs() -> Vec<u8> {
    let mut facs = b"FACS".to_vec();
    facs.extend(64u32.to_le_bytes());
    facs.resize(64, 0);
    facs[32] = 2;
    facs
}

/// A block of I/O ports of `bits` bits, accessed in units of `access`.
fn ports(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
}

/// Fixed ACPI description table (5.2.9).
fn fadt(platform: &Platform, facs: u64, dsdt: u64) -> Vec<u8> {
    let keyboard = if platform.keyboard { HAS_8042 } else { 0 };
    let (reset_port, reset_value) = platform.reset;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // A fixed power button (the flag would mean one in the namespace), no sleep button, and an
        // RTC that does not wake.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(platform.sci).into();
    fadt.pm1a_evt_blk = u32::from(platform.pm1a_event_port).into();
    fadt.pm1a_cnt_blk = u32::from(platform.pm1a_control_port).into();
    fadt.pm_tmr_blk = u32::from(platform.pm_timer_port).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_len = 4;
    // More than 100 and 1000 microseconds: no C2 and C3 states.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = platform.century_register;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | keyboard | NO_VGA).into();
    fadt.reset_reg = ports(reset_port, 8, AccessSize::ByteAccess);
    fadt.reset_value = reset_value;
    fadt.x_pm1a_evt_blk = ports(platform.pm1a_event_port, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = ports(platform.pm1a_control_port, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = ports(platform.pm_timer_port, 32, AccessSize::DwordAccess);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    if platform.pm_timer_is_32_bit {
        fadt = fadt.flag(Flags::TmrValExt);
    }
    if let Some((port, length)) = platform.gpe0 {
        fadt.gpe0_blk = u32::from(port).into();
        fadt.gpe0_blk_len = length;
        fadt.x_gpe0_blk = ports(port, length.saturating_mul(8), AccessSize::ByteAccess);
    }
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// Multiple APIC description table (5.2.12).
fn madt(platform: &Platform) -> Vec<u8> {
    const PC_AT_COMPATIBLE: u32 = 1;
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend(platform.local_apic.to_le_bytes());
    body.extend(PC_AT_COMPATIBLE.to_le_bytes());
    let mut has_x2apic = false;
    for (uid, id) in (0u32..).zip(&platform.apic_ids) {
        if *id < FIRST_X2APIC_ID && uid < FIRST_X2APIC_ID {
            body.extend([0, 8, uid as u8, *id as u8]);
            body.extend(ENABLED.to_le_bytes());
        } else {
            body.extend([9, 16, 0, 0]);
            for value in [*id, ENABLED, uid] {
                body.extend(value.to_le_bytes());
            }
            has_x2apic = true;
        }
    }
    body.extend([1, 12, platform.io_apic.id, 0]);
    body.extend(platform.io_apic.address.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // The timer's ISA interrupt 0 is input 2 of the I/O APIC, as on every PC.
    interrupt_override(&mut body, 0, 2, 0);
    interrupt_override(
        &mut body,
        platform.sci,
        platform.sci.into(),
        LEVEL_ACTIVE_HIGH,
    );
    let mut shared = platform.pci_interrupts.to_vec();
    shared.sort_unstable();
    shared.dedup();
    for gsi in shared {
        if gsi < 16 && gsi != u32::from(platform.sci) {
            interrupt_override(&mut body, gsi as u8, gsi, LEVEL_ACTIVE_HIGH);
        }
    }
    // LINT1 of all processors is NMI.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    if has_x2apic {
        body.extend([10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    table(*b"APIC", 6, &body)
}

/// Interrupt source override (5.2.12.5).
fn interrupt_override(body: &mut Vec<u8>, irq: u8, gsi: u32, flags: u16) {
    body.extend([2, 10, 0, irq]);
    body.extend(gsi.to_le_bytes());
    body.extend(flags.to_le_bytes());
}

/// Memory-mapped configuration space (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg(platform: &Platform) -> Option<Vec<u8>> {
    let ecam = platform.ecam?;
    let mut body = vec![0; 8];
    body.extend(ecam.address.to_le_bytes());
    body.extend([0, 0, 0, ecam.last_bus, 0, 0, 0, 0]);
    Some(table(*b"MCFG", 1, &body))
}

/// HPET description table (IA-PC HPET 1.0a, 3.2.4).
fn hpet(platform: &Platform) -> Option<Vec<u8>> {
    const MINIMUM_TICK: u16 = 0x80;
    let hpet = platform.hpet?;
    let mut body = hpet.capabilities.to_le_bytes().to_vec();
    GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::Undefined,
        hpet.address,
    )
    .to_aml_bytes(&mut body);
    body.push(0);
    body.extend(MINIMUM_TICK.to_le_bytes());
    body.push(0);
    Some(table(*b"HPET", 1, &body))
}

#[cfg(test)]
mod tests;
