//! Reading and writing registers that may refuse it, and finding out which of their bits exist.

use core::arch::asm;

use runtime::interrupts::{Fault, catch};
use runtime::{cpu, print, println, report};

#[derive(Clone, Copy)]
pub enum Register {
    Msr(u32),
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Dr0,
    Dr6,
    Dr7,
    /// Extended control register.
    Xcr(u32),
}

struct Request {
    register: Register,
    value: u64,
}

unsafe extern "C" fn read_it(request: u64) -> u64 {
    // SAFETY: the caller's request outlives the call.
    let request = unsafe { &*(request as *const Request) };
    match request.register {
        Register::Msr(index) => cpu::read_msr(index),
        Register::Cr0 => cpu::read_cr0(),
        Register::Cr2 => cpu::read_cr2(),
        Register::Cr3 => cpu::read_cr3(),
        Register::Cr4 => cpu::read_cr4(),
        Register::Dr0 => cpu::read_dr0(),
        Register::Dr6 => cpu::read_dr6(),
        Register::Dr7 => cpu::read_dr7(),
        Register::Xcr(index) => {
            let (low, high): (u32, u32);
            // SAFETY: reads a register.
            unsafe {
                asm!("xgetbv", in("ecx") index, out("eax") low, out("edx") high, options(nostack, preserves_flags));
            }
            u64::from(high) << 32 | u64::from(low)
        }
    }
}

unsafe extern "C" fn write_it(request: u64) -> u64 {
    // SAFETY: as above.
    let request = unsafe { &*(request as *const Request) };
    let value = request.value;
    match request.register {
        Register::Msr(index) => cpu::write_msr(index, value),
        Register::Cr0 => cpu::write_cr0(value),
        Register::Cr2 => cpu::write_cr2(value),
        Register::Cr3 => cpu::write_cr3(value),
        Register::Cr4 => cpu::write_cr4(value),
        Register::Dr0 => cpu::write_dr0(value),
        Register::Dr6 => cpu::write_dr6(value),
        Register::Dr7 => cpu::write_dr7(value),
        Register::Xcr(index) => {
            // SAFETY: nothing uses the state components.
            unsafe {
                asm!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
            }
        }
    }
    0
}

impl Register {
    pub fn read(self) -> Result<u64, Fault> {
        let request = Request {
            register: self,
            value: 0,
        };
        catch(read_it, &raw const request as u64)
    }

    pub fn write(self, value: u64) -> Result<(), Fault> {
        let request = Request {
            register: self,
            value,
        };
        catch(write_it, &raw const request as u64).map(drop)
    }
}

/// ` VALUE`, or the exception.
pub fn print_read(register: Register) {
    match register.read() {
        Ok(value) => print!(" {value:#x}"),
        Err(fault) => print_fault(&fault),
    }
}

/// ` taken`, or the exception.
pub fn print_write(register: Register, value: u64) {
    match register.write(value) {
        Ok(()) => print!(" taken"),
        Err(fault) => print_fault(&fault),
    }
}

fn print_fault(fault: &Fault) {
    print!(" ");
    report::print_name(fault);
}

/// Changes one bit after the other, and prints which can be changed, and which are ignored; the
/// others are refused with #GP(0). `asked` are the bits that it changes.
pub fn bits(name: &str, register: Register, from: u64, asked: u64) {
    let (mut writable, mut ignored, mut other) = (0, 0, 0u64);
    let old = register.read();
    print!("{name}:");
    if let Err(fault) = register.write(from) {
        print_fault(&fault);
        println!();
        return;
    }
    for bit in (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|bit| asked & bit != 0)
    {
        match register.write(from ^ bit) {
            Ok(()) => {
                match register.read() {
                    Ok(value) if value & asked == (from ^ bit) & asked => writable |= bit,
                    Ok(value) if value & asked == from & asked => ignored |= bit,
                    _ => other |= bit,
                }
                let _ = register.write(from);
            }
            Err(fault) if (fault.frame.vector, fault.frame.error) == (13, 0) => {}
            Err(_) => other |= bit,
        }
    }
    if let Ok(old) = old {
        let _ = register.write(old);
    }
    print!(" {writable:#x}");
    if ignored != 0 {
        print!(", ignored {ignored:#x}");
    }
    if other != 0 {
        print!(", otherwise {other:#x}");
    }
    println!();
}

/// Which values of a byte at bit `at` are taken.
pub fn types(name: &str, register: Register, at: u32) {
    let Ok(old) = register.read() else {
        println!("{name}: not there");
        return;
    };
    print!("{name}:");
    for value in 0..=255u64 {
        if register.write(old & !(0xFF << at) | value << at).is_ok() {
            print!(" {value}");
        }
    }
    let _ = register.write(old);
    println!();
}
