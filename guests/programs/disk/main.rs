//! Reads a virtio disk, one sector at a time, and checks what it reads: sector `n` is to hold the numbers
//! `n * 64` to `n * 64 + 63`, eight bytes each, but for the first, in whose place is code that returns `n`. It calls that
//! after each read: the code of the sector before has been executed at the same place, and only the device has
//! written there since.
//!
//! Between the reads it does what a driver may do: it moves the device's window, switches it off and on, rings by
//! writes of other sizes, gives the interrupt another vector, masks it while a request is under way, resets the
//! device. Each read is to interrupt once, and at no other time.
//!
//! The command line `rounds=N` makes it longer (400 without it). Without a disk it says so.
#![no_std]
#![no_main]

mod function;
mod queue;

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use function::Function;
use queue::Disk;
use runtime::interrupts::{self, TrapFrame};
use runtime::{boot_info, cpu, local_apic, println};

runtime::entry!(run);

/// The two vectors that it takes turns with.
const VECTORS: [u8; 2] = [0x51, 0x62];

/// Interrupts that came, by vector.
static CAME: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

fn came() -> u64 {
    CAME[0].load(Relaxed) + CAME[1].load(Relaxed)
}

fn interrupt(frame: &mut TrapFrame) {
    let index = usize::from(frame.vector != VECTORS[0].into());
    CAME[index].fetch_add(1, Relaxed);
    local_apic::end_of_interrupt();
}

/// Halts until as many interrupts have come.
fn wait_for(interrupts: u64) {
    loop {
        cpu::disable_interrupts();
        if came() >= interrupts {
            cpu::enable_interrupts();
            return;
        }
        // SAFETY: no memory is touched; nothing comes between STI and HLT.
        unsafe { asm!("sti", "hlt", options(nostack)) }
    }
}

fn run() {
    for vector in VECTORS {
        interrupts::set_handler(vector, interrupt);
    }
    let Some(function) = Function::find() else {
        println!("disk: there is none");
        return;
    };
    let mut disk = Disk::new(function);
    disk.start(VECTORS[0]);
    let sectors = disk.sectors();
    let rounds = number("rounds=", 400);
    println!("disk: {sectors} sectors");
    let (mut wrong, mut stale, mut unasked, mut held) = (0, 0, 0, 0);
    cpu::enable_interrupts();
    for round in 0..rounds {
        let sector = round * 7 % sectors;
        let before = came();
        match round % 64 {
            9 => disk.function.move_window(),
            17 => disk.function.switch_window_off_and_on(),
            25 => disk.function.set_vector(VECTORS[(round / 64 % 2) as usize]),
            33 => {
                disk.stop();
                disk.start(VECTORS[0]);
            }
            _ => {}
        }
        let masked = round % 64 == 41;
        if masked {
            disk.function.mask(true);
        }
        if round % 4 == 0 {
            disk.clear();
        }
        disk.ask(sector);
        match round % 8 {
            3 => disk.ring(queue::Ring::Long),
            5 => disk.ring(queue::Ring::Byte),
            _ => disk.ring(queue::Ring::Usual),
        }
        if masked {
            disk.wait();
            while !disk.function.is_pending() {}
            held += 1;
            unasked += came() - before;
            disk.function.mask(false);
        }
        wait_for(before + 1);
        if disk.is_right(sector) {
            stale += u64::from(disk.call() != sector);
        } else {
            wrong += 1;
        }
        // None comes a second time.
        unasked += came() - before - 1;
    }
    cpu::disable_interrupts();
    println!("disk: {rounds} sectors read, {wrong} of them wrong");
    println!("disk: called, {stale} of them the code of another sector");
    println!(
        "disk: {} interrupts, {unasked} of them not asked for, {held} held back",
        came()
    );
    println!("disk: done");
}

fn number(name: &str, otherwise: u64) -> u64 {
    boot_info::command_line()
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name))
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}
