//! Says how a kernel would be loaded into a guest, and how long that takes.

use std::time::Instant;

use trapgate_boot::{Platform, Request, plan};
use trapgate_memory::{GuestMemory, pc_ram_ranges};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next().ok_or("usage: load_plan KERNEL [MIB]")?;
    let mib: u64 = match arguments.next() {
        Some(mib) => mib.to_string_lossy().parse()?,
        None => 256,
    };
    let kernel = std::fs::read(path)?;
    let memory = GuestMemory::new(&pc_ram_ranges(mib << 20))?;
    let request = Request {
        kernel: &kernel,
        command_line: "console=ttyS0",
        ..Request::default()
    };
    let start = Instant::now();
    let plan = plan(&request, &memory, &Platform::default())
        .map_err(|error| format!("{error}\n  fix: {}", error.fix()))?;
    let planned = start.elapsed();
    for write in &plan.writes {
        let end = write.address + write.data.len() as u64;
        println!("{:#012x} to {end:#012x}", write.address);
    }
    for part in plan.unpacking.iter().flat_map(|kernel| &kernel.parts) {
        let end = part.address + (part.file.end - part.file.start);
        println!("{:#012x} to {end:#012x}, unpacked", part.address);
    }
    let start = Instant::now();
    let entry = plan.apply(&memory)?;
    println!("planned in {planned:?}, written in {:?}", start.elapsed());
    println!(
        "{} through {}",
        entry.version.as_deref().unwrap_or("unnamed"),
        entry.protocol
    );
    println!("{:#x?}", entry.cpu.system.segments);
    println!("rip {:#x}, gpr {:x?}", entry.cpu.rip, entry.cpu.gpr);
    Ok(())
}
