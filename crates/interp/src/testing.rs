//! A processor to test handlers on: 16 MiB of memory and a world that remembers what it is told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use trapgate_engine::{Refused, World};
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr0, cr4, efer, sreg};
use trapgate_x86::{CpuProfile, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::decode::decode;

/// Bytes of memory, from address 0.
pub(crate) const MEMORY: u64 = 16 << 20;
/// Ticks of the TSC in a second.
pub(crate) const TSC_HZ: u64 = 2_000_000_000;

/// What a [`TestWorld`] was told, and what it answers.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Ports: what was written, and what reads give.
    pub(crate) ports: HashMap<u16, u32>,
    /// Port writes in order: port, size, value.
    pub(crate) port_writes: Vec<(u16, u8, u32)>,
    /// MSRs of the local APIC; others are refused.
    pub(crate) apic_msrs: HashMap<u32, u64>,
    /// CR8.
    pub(crate) task_priority: u8,
    /// Nanoseconds of VM time.
    pub(crate) clock: u64,
    /// Nanoseconds since 1970 when VM time was zero.
    pub(crate) epoch: u64,
    /// The last TSC offset.
    pub(crate) tsc_offset: u64,
    /// Interrupts to be taken, last first.
    pub(crate) interrupts: Vec<u8>,
}

/// A world without devices.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestWorld(Arc<Mutex<Told>>);

impl TestWorld {
    /// Looks at or changes what the world knows.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut Told) -> R) -> R {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl World for TestWorld {
    fn read_memory(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_memory(&mut self, _gpa: u64, _data: &[u8]) {}

    fn read_port(&mut self, port: u16, _size: u8) -> u32 {
        self.with(|told| told.ports.get(&port).copied().unwrap_or(u32::MAX))
    }

    fn write_port(&mut self, port: u16, size: u8, value: u32) {
        self.with(|told| {
            told.ports.insert(port, value);
            told.port_writes.push((port, size, value));
        });
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        self.with(|told| told.interrupts.pop())
    }

    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused> {
        self.with(|told| told.apic_msrs.get(&index).copied().ok_or(Refused))
    }

    fn write_apic_msr(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        self.with(|told| match told.apic_msrs.get_mut(&index) {
            Some(register) => {
                *register = value;
                Ok(())
            }
            None => Err(Refused),
        })
    }

    fn task_priority(&mut self) -> u8 {
        self.with(|told| told.task_priority)
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.with(|told| told.task_priority = priority);
    }

    fn clock(&mut self) -> u64 {
        self.with(|told| told.clock)
    }

    fn epoch(&mut self) -> u64 {
        self.with(|told| told.epoch)
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.with(|told| told.tsc_offset = offset);
    }
}

/// A processor in its reset state, x86-64-v3.
pub(crate) fn reset_cpu() -> (Cpu, TestWorld) {
    let ranges = [RamRange {
        start: 0,
        length: MEMORY,
    }];
    let memory = GuestMemory::new(&ranges).expect("16 MiB can be reserved");
    let world = TestWorld::default();
    world.with(|told| told.apic_msrs.insert(0x1b, 0xfee0_0900));
    let profile = CpuProfile::new(Level::V3, TSC_HZ);
    let cpu = Cpu::new(
        Arc::new(memory),
        Box::new(world.clone()),
        profile,
        0,
        1,
        Arc::default(),
    );
    (cpu, world)
}

/// A processor in protected mode at CPL 0: flat 32-bit segments, no paging.
pub(crate) fn protected_cpu() -> (Cpu, TestWorld) {
    let (mut cpu, world) = reset_cpu();
    cpu.sys.cr0 = cr0::PE | cr0::ET | cr0::NE;
    let data = Segment::flat(0x10, access::WRITABLE | access::DB);
    cpu.sys.segments = [data; 6];
    cpu.sys.segments[sreg::CS] = Segment::flat(0x08, access::CODE | access::READABLE | access::DB);
    cpu.update_mode();
    (cpu, world)
}

/// Page tables of [`long_cpu`]: the top-level table lies here, two more follow.
pub(crate) const PAGE_TABLES: u64 = 0x1000;

/// A processor in 64-bit mode at CPL 0: the first GiB is mapped by user-accessible 2 MiB pages to
/// itself.
pub(crate) fn long_cpu() -> (Cpu, TestWorld) {
    let (mut cpu, world) = reset_cpu();
    let put = |cpu: &Cpu, gpa: u64, value: u64| {
        cpu.memory
            .write(gpa, &value.to_le_bytes())
            .expect("the tables lie in memory");
    };
    put(&cpu, PAGE_TABLES, (PAGE_TABLES + 0x1000) | 7);
    put(&cpu, PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 7);
    for page in 0..512 {
        put(&cpu, PAGE_TABLES + 0x2000 + page * 8, page << 21 | 0xe7);
    }
    cpu.sys.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    cpu.sys.cr3 = PAGE_TABLES;
    cpu.sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::PGE;
    cpu.sys.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    let data = Segment::flat(0x10, access::WRITABLE | access::DB);
    cpu.sys.segments = [data; 6];
    cpu.sys.segments[sreg::CS] = Segment::flat(0x08, access::CODE | access::READABLE | access::L);
    cpu.update_mode();
    (cpu, world)
}

/// An address whose page tables [`map_window`] changes.
pub(crate) const WINDOW: u64 = 0x4000_0000;

/// Maps the 2 MiB at [`WINDOW`] to those at `frame`, in the tables of [`long_cpu`].
pub(crate) fn map_window(cpu: &Cpu, frame: u64) {
    let put = |gpa: u64, value: u64| {
        cpu.memory
            .write(gpa, &value.to_le_bytes())
            .expect("the tables lie in memory");
    };
    put(PAGE_TABLES + 0x1000 + 8, (PAGE_TABLES + 0x3000) | 7);
    put(PAGE_TABLES + 0x3000, frame | 0xe7);
}

/// Where [`unmap_page`] leaves nothing mapped; what lies before it is.
pub(crate) const UNMAPPED: u64 = 6 << 21;

/// Takes a page of [`long_cpu`] away.
pub(crate) fn unmap_page(cpu: &mut Cpu) {
    let at = PAGE_TABLES + 0x2000 + (UNMAPPED >> 21) * 8;
    cpu.memory
        .write(at, &[0; 8])
        .expect("the tables lie in memory");
}

/// Changes the CPL of a protected or long-mode processor.
pub(crate) fn set_cpl(cpu: &mut Cpu, cpl: u8) {
    for index in [sreg::CS, sreg::SS] {
        let segment = &mut cpu.sys.segments[index];
        segment.access = segment.access & !access::DPL | u32::from(cpl) << access::DPL_SHIFT;
        segment.selector = segment.selector & !3 | u16::from(cpl);
    }
    cpu.update_mode();
}

/// Decodes and executes one instruction, as the run loop does.
pub(crate) fn execute(cpu: &mut Cpu, bytes: &[u8]) -> Step {
    let Ok(decoded) = decode(cpu, bytes, 1) else {
        panic!("{bytes:02x?} is not one instruction");
    };
    let op = decoded.ops[0];
    cpu.end_block = false;
    cpu.rip = cpu.rip.wrapping_add(u64::from(op.length));
    let step = (op.handler)(cpu, &op);
    if step == Err(Stop::Fault) {
        cpu.rip = cpu.rip.wrapping_sub(u64::from(op.length));
    }
    step
}

/// Executes one instruction that raises an exception; gives its vector and error code.
pub(crate) fn fault(cpu: &mut Cpu, bytes: &[u8]) -> (Vector, Option<u32>) {
    assert_eq!(execute(cpu, bytes), Err(Stop::Fault), "{bytes:02x?}");
    (cpu.exception.vector, cpu.exception.error_code)
}

/// #GP(0), as [`fault`] gives it.
pub(crate) const GP0: (Vector, Option<u32>) = (Vector::GP, Some(0));
/// #UD, as [`fault`] gives it.
pub(crate) const UD: (Vector, Option<u32>) = (Vector::UD, None);
