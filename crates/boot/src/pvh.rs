//! PVH, Xen's direct boot ABI for HVM guests, which other kernels than Linux speak as well
//! (xen/include/public/arch-x86/hvm/start_info.h).

use trapgate_x86::registers::gpr;

use crate::entry::Mode;
use crate::error::BootError;
use crate::layout::PAGE;
use crate::plan::{Builder, Entry, Protocol, Request};

/// XEN_HVM_START_MAGIC_VALUE.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;
/// Modules are handed over by 64-bit addresses, to a kernel in 32-bit mode.
const ADDRESS_LIMIT: u64 = 1 << 32;

/// Plans entry at the address of the PVH note into an executable whose segments are already in the
/// plan. The initial RAM disks together are the first module.
pub(crate) fn plan<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    entry: u32,
    version: Option<String>,
) -> Result<Entry, BootError> {
    let command_line = builder.write_text("the command line", request.command_line)?;
    let mut modules = Vec::new();
    let mut count = 0;
    let mut add = |start: u64, length: u64, command_line: u64| {
        count += 1;
        modules.extend([start, length, command_line, 0].map(u64::to_le_bytes));
    };
    let (initrd, initrd_bytes) = builder.place_initrds(request, ADDRESS_LIMIT)?;
    if initrd_bytes != 0 {
        add(initrd, initrd_bytes, 0);
    }
    for module in request.modules {
        let length = module.data.len() as u64;
        let start = builder
            .layout
            .highest(length, PAGE, ADDRESS_LIMIT)
            .ok_or_else(|| builder.layout.too_little("the modules", length))?;
        builder.write(start, module.data);
        add(
            start,
            length,
            builder.write_text("command lines", module.command_line)?,
        );
    }
    let mut map = Vec::new();
    for range in &builder.map {
        map.extend(range.start.to_le_bytes());
        map.extend(range.length.to_le_bytes());
        map.extend(u64::from(range.kind as u32).to_le_bytes());
    }
    let map_entries = builder.map.len() as u32;
    let modules = match count {
        0 => 0,
        _ => builder.write_low("the module list", modules.concat(), 8)?,
    };
    let map = builder.write_low("the memory map", map, 8)?;

    let mut info = Vec::new();
    for value in [MAGIC, VERSION, 0, count] {
        info.extend(value.to_le_bytes());
    }
    for address in [modules, command_line, builder.rsdp, map] {
        info.extend(address.to_le_bytes());
    }
    for value in [map_entries, 0] {
        info.extend(value.to_le_bytes());
    }
    let info = builder.write_low("the start info", info, 8)?;
    let mut cpu = builder.enter(Mode::Protected, u64::from(entry))?;
    cpu.gpr[gpr::RBX] = info;
    Ok(Entry {
        cpu,
        protocol: Protocol::Pvh,
        version,
    })
}
