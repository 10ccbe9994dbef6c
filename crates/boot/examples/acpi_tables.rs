//! Writes the ACPI tables of a default machine into a directory, one file each, so that a
//! disassembler can be let loose on them: `iasl -d DIRECTORY/*.aml`.

use std::path::PathBuf;

use trapgate_boot::{Platform, Window, acpi};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .ok_or("usage: acpi_tables DIRECTORY [PROCESSORS]")?,
    );
    let processors = match std::env::args().nth(2) {
        Some(processors) => processors.parse()?,
        None => 2,
    };
    let platform = Platform {
        apic_ids: (0..processors).collect(),
        pci_window_64: Some(Window {
            start: 1 << 38,
            length: 1 << 36,
        }),
        ..Platform::default()
    };
    std::fs::create_dir_all(&directory)?;
    for (address, bytes) in acpi::tables(&platform)? {
        let name = String::from_utf8_lossy(&bytes[..4]).into_owned();
        println!("{name} at {address:#x}, {} bytes", bytes.len());
        std::fs::write(directory.join(format!("{name}.aml").to_lowercase()), bytes)?;
    }
    Ok(())
}
