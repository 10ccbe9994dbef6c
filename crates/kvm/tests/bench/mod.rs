//! A processor with a few bytes of code, in a world that remembers what it was asked.

mod skipped;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use trapgate_engine::{Exit, Refused, Vcpu, World};
use trapgate_kvm::{Facts, InKernel, KvmMachine, KvmVcpu, Lacks};
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_x86::descriptor::access;
use trapgate_x86::msr::IA32_APIC_BASE;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr0, cr4, efer, gpr, sreg};
use trapgate_x86::{CpuProfile, CpuState, Segment, TableRegister};

pub(crate) use skipped::skipped;

/// Where the code is.
pub const CODE: u64 = 0x1000;
/// Where the stack ends.
pub const STACK: u64 = 0x8000;
/// Where the tables are: pages, descriptors, interrupts.
const PAGES: u64 = 0x10_0000;
const GDT: u64 = 0x2000;
pub const IDT: u64 = 0x3000;
/// Where no RAM is.
pub const DEVICE: u64 = 0x60_0000;
const RAM: u64 = 4 << 20;

/// What the world was told, and what it answers.
#[derive(Default)]
pub struct Told {
    pub ports: Vec<(u16, u8, u32)>,
    pub memory: Vec<(u64, Vec<u8>)>,
    pub apic_msrs: Vec<(u32, u64)>,
    pub priority: u8,
    /// Vectors that wait.
    pub interrupts: Vec<u8>,
    pub tsc_offset: u64,
    /// VM time stands at this if it stands.
    pub paused_at: Option<u64>,
    /// By how much it is behind the host's.
    pub behind: u64,
}

#[derive(Clone)]
pub struct TestWorld {
    told: Arc<Mutex<Told>>,
    base: Instant,
}

impl TestWorld {
    pub fn with<R>(&self, look: impl FnOnce(&mut Told) -> R) -> R {
        look(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn host(&self) -> u64 {
        self.base.elapsed().as_nanos() as u64
    }

    /// Stops VM time.
    pub fn pause(&self) {
        let now = self.host();
        self.with(|told| told.paused_at = Some(now - told.behind));
    }

    /// Lets it go on where it stands.
    pub fn resume(&self) {
        let now = self.host();
        self.with(|told| told.behind = now - told.paused_at.take().unwrap());
    }
}

impl World for TestWorld {
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]) {
        let bytes = (gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
        data.copy_from_slice(&bytes[..data.len()]);
    }

    fn write_memory(&mut self, gpa: u64, data: &[u8]) {
        self.with(|told| told.memory.push((gpa, data.to_vec())));
    }

    fn read_port(&mut self, port: u16, size: u8) -> u32 {
        (u32::from(port) * 0x0101_0101) & (u32::MAX >> (32 - 8 * size))
    }

    fn write_port(&mut self, port: u16, size: u8, value: u32) {
        self.with(|told| told.ports.push((port, size, value)));
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        self.with(|told| told.interrupts.pop())
    }

    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused> {
        if index == IA32_APIC_BASE {
            return Ok(0xfee0_0900);
        }
        self.with(|told| {
            let found = told.apic_msrs.iter().rev().find(|(told, _)| *told == index);
            found.map(|(_, value)| *value).ok_or(Refused)
        })
    }

    fn write_apic_msr(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        if index == 0x8ff {
            return Err(Refused);
        }
        self.with(|told| told.apic_msrs.push((index, value)));
        Ok(())
    }

    fn task_priority(&mut self) -> u8 {
        self.with(|told| told.priority)
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.with(|told| told.priority = priority);
    }

    fn clock(&mut self) -> u64 {
        let now = self.host();
        self.with(|told| told.paused_at.unwrap_or(now - told.behind))
    }

    fn epoch(&mut self) -> u64 {
        1_700_000_000_000_000_000
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.with(|told| told.tsc_offset = offset);
    }
}

/// The profile of these tests; `None`, with a word about it, where there is no KVM.
pub fn profile() -> Option<CpuProfile> {
    match Facts::probe() {
        Ok(facts) => Some(CpuProfile::new(Level::V2, facts.tsc_hz)),
        Err(error) => {
            skipped(&format!("no KVM here: {error}"));
            None
        }
    }
}

pub struct Bench {
    pub vcpu: KvmVcpu,
    pub machine: Arc<KvmMachine>,
    pub memory: Arc<GuestMemory>,
    pub world: TestWorld,
}

/// A 64-bit program in ring 0, with `code` to run; `None` where there is no KVM.
pub fn bench(code: &[u8]) -> Option<Bench> {
    bench_with(code, InKernel::NOTHING)
}

/// As [`bench`], where the kernel does what it can of `in_kernel`.
pub fn bench_with(code: &[u8], in_kernel: InKernel) -> Option<Bench> {
    bench_of(code, in_kernel, 1)
}

/// As [`bench_with`], in a machine of `count` processors, of which the others are the caller's to make.
pub fn bench_of(code: &[u8], in_kernel: InKernel, count: u32) -> Option<Bench> {
    let profile = profile()?;
    let memory = Arc::new(
        GuestMemory::new(&[RamRange {
            start: 0,
            length: RAM,
        }])
        .unwrap(),
    );
    let world = TestWorld {
        told: Arc::default(),
        base: Instant::now(),
    };
    let machine =
        KvmMachine::new(Arc::clone(&memory), profile, count, Lacks::Hide, in_kernel).unwrap();
    let mut vcpu = machine.vcpu(Box::new(world.clone()), 0).unwrap();
    write(&memory, PAGES, PAGES + 0x1003);
    write(&memory, PAGES + 0x1000, PAGES + 0x2003);
    // One to one, with pages of 2 MiB: two of RAM, two of devices.
    for page in 0..4 {
        write(&memory, PAGES + 0x2000 + 8 * page, page << 21 | 0x83);
    }
    for (index, descriptor) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        write(&memory, GDT + 8 * index as u64, descriptor);
    }
    memory.write(CODE, code).unwrap();
    vcpu.set_state(&long_state()).unwrap();
    Some(Bench {
        vcpu,
        machine,
        memory,
        world,
    })
}

fn write(memory: &GuestMemory, gpa: u64, value: u64) {
    memory.write(gpa, &value.to_le_bytes()).unwrap();
}

/// The state of a 64-bit program in ring 0 that is about to run [`CODE`].
pub fn long_state() -> CpuState {
    let mut state = CpuState {
        rip: CODE,
        ..CpuState::default()
    };
    state.gpr[gpr::RSP] = STACK;
    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
    system.cr3 = PAGES;
    system.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    system.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    system.segments = [Segment::flat(16, access::WRITABLE | access::DB); 6];
    system.segments[sreg::CS] = Segment::flat(8, access::CODE | access::READABLE | access::L);
    system.ldtr = Segment::null(0);
    system.gdtr = TableRegister {
        base: GDT,
        limit: 23,
    };
    system.idtr = TableRegister {
        base: IDT,
        limit: 0xfff,
    };
    state
}

impl Bench {
    /// An interrupt gate of ring 0 to `handler`.
    pub fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + 16 * u64::from(vector);
        write(&self.memory, at, handler & 0xffff | 8 << 16 | 0x8e00 << 32);
        write(&self.memory, at + 8, 0);
    }

    /// Runs until the processor halts.
    #[track_caller]
    pub fn run_to_halt(&mut self) -> CpuState {
        loop {
            match self.vcpu.run() {
                Exit::Kicked => {}
                exit => {
                    assert_eq!(exit, Exit::Halted);
                    return self.vcpu.state();
                }
            }
        }
    }
}
