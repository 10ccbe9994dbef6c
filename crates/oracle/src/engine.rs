//! The engines: a guest with the same linear addresses as the native child, whose kernel brings faults back to the
//! monitor.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use trapgate_engine::{Exit, NoDevices, Signal, Signals, StateError, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{JitError, Translating};
use trapgate_memory::{GuestMemory, MemoryError, RamRange};
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr0, cr4, efer, sreg, xcr0};
use trapgate_x86::{CpuProfile, CpuState, Segment, TableRegister};

use crate::layout::{
    ARENA_BYTES, CODE_AT, CONTROL, CONTROL_AT, DATA_AT, EXIT_AT, IN_AT, MONITOR, MONITOR_AT,
    OUT_AT, PAGE, READ_ONLY, RECORD, SLOTS, data_offset, record, regions, vector,
};
use crate::monitor::{OWN_HALF, control, entries};
use crate::processor_time::ThreadClock;

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The interpreter.
    Interpreter,
    /// The translator; where programs are compared, one whose flags are always right.
    Translator,
    /// The translator as users run it: flags that no code reads are not kept.
    Inexact,
}

impl Kind {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interpreter => "interpreter",
            Self::Translator => "translator",
            Self::Inexact => "translator as users run it",
        }
    }
}

/// Why an engine cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No memory.
    #[error("no memory for a guest")]
    Memory(#[from] MemoryError),
    /// No translator.
    #[error("the translator cannot run")]
    Translator(#[from] JitError),
    /// It refuses the state that cases start from.
    #[error("the engine refuses the guest's state")]
    State(#[from] StateError),
    /// It stopped where it should not.
    #[error("the {engine} stopped at case {case}: {exit:?}, RIP {rip:#x}")]
    Stopped {
        /// Which engine.
        engine: &'static str,
        /// How.
        exit: Exit,
        /// Which case of the batch it was at.
        case: usize,
        /// Where.
        rip: u64,
    },
}

// What only the guest's kernel reaches, behind the arenas in memory.
const KERNEL: u64 = 0xffff_8800_0000_0000;
const GDT: u64 = ARENA_BYTES as u64;
const IDT: u64 = GDT + PAGE;
const TSS: u64 = IDT + PAGE;
const STACK: u64 = TSS + PAGE;
const TABLES: u64 = STACK + PAGE;
const MEMORY: u64 = TABLES + 0x10_0000;

const fn kernel(gpa: u64) -> u64 {
    KERNEL + (gpa - GDT)
}

/// Linux's descriptors, which LAR and its like show to programs.
const DESCRIPTORS: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];
/// The guest's table has 16 descriptors, as Linux's.
const GDT_LIMIT: u16 = 16 * 8 - 1;

/// A guest and the engine that runs it.
pub struct Engine {
    kind: Kind,
    memory: Arc<GuestMemory>,
    vcpu: Box<dyn Vcpu>,
    state: CpuState,
    watched: Arc<Watched>,
}

impl Engine {
    /// A guest on an engine. `modifying`: cases may write their code.
    ///
    /// # Errors
    /// [`EngineError`].
    pub fn new(kind: Kind, level: Level, modifying: bool) -> Result<Self, EngineError> {
        let ranges = [RamRange {
            start: 0,
            length: MEMORY,
        }];
        let memory = Arc::new(GuestMemory::new(&ranges)?);
        let profile = CpuProfile::new(level, 1_000_000_000);
        furnish(&memory, modifying)?;
        let state = start(&profile);
        let world = Box::new(NoDevices);
        let vcpu: Box<dyn Vcpu> = match kind {
            Kind::Interpreter => {
                Box::new(Interpreter::new(Arc::clone(&memory), world, profile, 0, 1))
            }
            Kind::Translator | Kind::Inexact => {
                let mut translating = Translating::new(Arc::clone(&memory), world, profile, 0, 1)?;
                if modifying && kind == Kind::Translator {
                    // A program that faults shows its flags.
                    translating.be_exact();
                }
                Box::new(translating)
            }
        };
        let watched = Arc::new(Watched {
            memory: Arc::clone(&memory),
            progress: AtomicU64::new(0),
            clock: ThreadClock::new(),
        });
        watch(Arc::downgrade(&watched), vcpu.signals());
        Ok(Self {
            kind,
            memory,
            vcpu,
            state,
            watched,
        })
    }

    /// Which engine it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Copies a batch of `cases` cases and `slots` pieces of code into the guest's memory.
    ///
    /// # Errors
    /// [`EngineError::Memory`], of which there is no reason.
    pub fn load(&mut self, arena: &[u8], cases: usize, slots: usize) -> Result<(), EngineError> {
        let put = |at: usize, length: usize| self.memory.write(at as u64, &arena[at..at + length]);
        put(CONTROL_AT, 0x300)?;
        put(IN_AT, cases * RECORD)?;
        put(CODE_AT, slots * 2 * PAGE as usize)?;
        let entry = MONITOR + entries().done_guest;
        let done = (CONTROL_AT + control::DONE) as u64;
        self.memory.write(done, &entry.to_le_bytes())?;
        Ok(())
    }

    /// Copies a part of an arena into the guest's memory.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn put(&mut self, at: usize, bytes: &[u8]) -> Result<(), EngineError> {
        self.memory.write(at as u64, bytes)?;
        Ok(())
    }

    /// Copies a part of an arena out of the guest's memory.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn get(&self, at: usize, bytes: &mut [u8]) -> Result<(), EngineError> {
        self.memory.read(at as u64, bytes)?;
        Ok(())
    }

    fn word(&self, at: usize) -> Result<u64, EngineError> {
        let mut bytes = [0; 8];
        self.get(CONTROL_AT + at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Runs a batch that was loaded, of `cases` cases. A case that does not end is told as [`vector::TIMEOUT`].
    ///
    /// # Errors
    /// [`EngineError::Stopped`].
    pub fn run(&mut self, cases: usize) -> Result<(), EngineError> {
        self.state.rip = MONITOR;
        self.vcpu.set_state(&self.state)?;
        self.watched.clock.take();
        loop {
            self.watched.progress.fetch_add(1, Ordering::SeqCst);
            let exit = self.vcpu.run();
            self.watched.progress.fetch_add(1, Ordering::SeqCst);
            let left = self.word(control::COUNT)?;
            if exit == Exit::Halted && left == 0 {
                return Ok(());
            }
            let state = self.vcpu.state();
            if exit == Exit::Kicked && state.rip >> 32 == MONITOR >> 32 {
                // Between cases, or the watch came late.
                continue;
            }
            if exit != Exit::Kicked {
                return Err(EngineError::Stopped {
                    engine: self.kind.name(),
                    exit,
                    case: cases - (left as usize).min(cases),
                    rip: state.rip,
                });
            }
            let saved = CONTROL_AT + control::SAVED;
            for (index, value) in state.gpr.iter().enumerate() {
                self.put(saved + index * 8, &value.to_le_bytes())?;
            }
            for (at, value) in [
                (record::FLAGS, state.rflags),
                (record::RIP, state.rip),
                (record::VECTOR, vector::TIMEOUT),
                (record::ERROR, 0),
                (record::ADDRESS, 0),
            ] {
                self.put(saved + at, &value.to_le_bytes())?;
            }
            let mut next = self.state.clone();
            next.xsave = state.xsave;
            next.rip = MONITOR + entries().resume;
            next.gpr[4] = CONTROL + control::STACK_TOP as u64;
            self.vcpu.set_state(&next)?;
        }
    }

    /// The records that came out.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn records(&self, cases: usize, into: &mut Vec<u8>) -> Result<(), EngineError> {
        into.resize(cases * RECORD, 0);
        self.get(OUT_AT, into)
    }

    /// The data of all slots.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn data(&self, into: &mut Vec<u8>) -> Result<(), EngineError> {
        into.resize(ARENA_BYTES - DATA_AT, 0);
        self.get(DATA_AT, into)
    }
}

/// A case that takes more of the engine's processor time than this does not come to its end: thirty times what the
/// host has for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the watch looks at.
struct Watched {
    memory: Arc<GuestMemory>,
    /// Runs begun and ended: odd during one.
    progress: AtomicU64,
    /// Of the thread that runs the engine.
    clock: ThreadClock,
}

impl Watched {
    /// Where the engine is, if it runs: it stays there as long as it works at one case.
    fn place(&self) -> Option<(u64, u64)> {
        let progress = self.progress.load(Ordering::SeqCst);
        let mut left = [0; 8];
        let read = self
            .memory
            .read((CONTROL_AT + control::COUNT) as u64, &mut left);
        (progress & 1 != 0 && read.is_ok()).then(|| (progress, u64::from_le_bytes(left)))
    }
}

/// Kicks an engine that works at one case for longer than any takes.
fn watch(watched: Weak<Watched>, signals: Arc<Signals>) {
    std::thread::spawn(move || {
        let mut seen = None;
        let mut since = Duration::ZERO;
        while let Some(watched) = watched.upgrade() {
            let (place, now) = (watched.place(), watched.clock.now());
            drop(watched);
            if place.is_none() || place != seen {
                (seen, since) = (place, now);
            } else if now.saturating_sub(since) > PATIENCE {
                signals.raise(Signal::Kick);
                since = now;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

/// Writes what is the same for all batches: the monitor, tables, and the kernel's data.
fn furnish(memory: &GuestMemory, modifying: bool) -> Result<(), MemoryError> {
    let quad = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes());
    let mut tables = Tables {
        memory,
        next: TABLES + PAGE,
    };
    let mut arena = vec![0; ARENA_BYTES];
    prepare(&mut arena);
    memory.write(0, &arena)?;
    for region in regions(modifying) {
        for at in (0..region.length as u64).step_by(PAGE as usize) {
            let mut entry = (region.offset as u64 + at) | PRESENT | USER;
            if region.writable {
                entry |= WRITABLE;
            }
            if !region.executable {
                entry |= NO_EXECUTE;
            }
            tables.map(region.linear + at, entry)?;
        }
    }
    for gpa in (GDT..TABLES).step_by(PAGE as usize) {
        tables.map(kernel(gpa), gpa | PRESENT | WRITABLE | NO_EXECUTE)?;
    }
    for (index, descriptor) in DESCRIPTORS.into_iter().enumerate() {
        quad(GDT + index as u64 * 8, descriptor)?;
    }
    for vector in 0..256 {
        let gate = IDT + vector * 16;
        let (handler, level) = match vector {
            3 | 4 => (entries().vectors + vector * 16, 3),
            0..32 => (entries().vectors + vector * 16, 0),
            0x80 => (entries().finished, 3),
            // Programs have no right to these.
            _ => (entries().finished, 0),
        };
        let offset = MONITOR + handler;
        let low = offset & 0xffff
            | 0x10 << 16
            | (0x8e00 | level << 13) << 32
            | (offset >> 16 & 0xffff) << 48;
        quad(gate, low)?;
        quad(gate + 8, offset >> 32)?;
    }
    quad(TSS + 4, kernel(STACK) + PAGE)?;
    // The map of ports lies behind the limit: none is allowed.
    quad(TSS + 0x60, 0x68 << 48)
}

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, linear: u64, entry: u64) -> Result<(), MemoryError> {
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let at = table + (linear >> level & 0x1ff) * 8;
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes)?;
            let mut found = u64::from_le_bytes(bytes);
            if found == 0 {
                found = self.next | PRESENT | WRITABLE | USER;
                self.next += PAGE;
                self.memory.write(at, &found.to_le_bytes())?;
            }
            table = found & !0xfff;
        }
        assert!(
            self.next <= MEMORY,
            "tables need {:#x} bytes",
            self.next - TABLES
        );
        self.memory
            .write(table + (linear >> 12 & 0x1ff) * 8, &entry.to_le_bytes())
    }
}

/// The processor at the monitor's start, as Linux would have it in a program.
fn start(profile: &CpuProfile) -> CpuState {
    let mut state = CpuState::default();
    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    system.cr3 = TABLES;
    system.cr4 = cr4::PAE
        | cr4::PGE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::OSXSAVE
        | cr4::FSGSBASE
        | cr4::UMIP;
    system.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    system.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX & profile.xcr0_mask();
    system.segments = [Segment::null(0); 6];
    system.segments[sreg::CS] = Segment::flat(
        0x33,
        access::CODE | access::READABLE | access::L | access::DPL,
    );
    system.segments[sreg::SS] = Segment::flat(0x2b, access::WRITABLE | access::DB | access::DPL);
    system.gdtr = TableRegister {
        base: kernel(GDT),
        limit: GDT_LIMIT,
    };
    system.idtr = TableRegister {
        base: kernel(IDT),
        limit: 256 * 16 - 1,
    };
    system.tr = Segment {
        selector: 0x40,
        base: kernel(TSS),
        limit: 0x67,
        access: 0x8b,
    };
    system.ldtr = Segment::null(0);
    state.rflags = 0x202;
    state
}

/// What the arena holds before any batch: the monitor, the page through which cases end, and what cannot be written.
pub fn prepare(arena: &mut [u8]) {
    let code = crate::monitor::code();
    arena[MONITOR_AT..][..code.len()].copy_from_slice(code);
    // jmp [rip + 2]; the address, aligned: the case may have set RFLAGS.AC
    arena[EXIT_AT..][..6].copy_from_slice(&[0xff, 0x25, 2, 0, 0, 0]);
    let target = MONITOR + entries().exit;
    arena[EXIT_AT + 8..][..8].copy_from_slice(&target.to_le_bytes());
    let own = (MONITOR >> 32) as u32;
    arena[CONTROL_AT + OWN_HALF..][..4].copy_from_slice(&own.to_le_bytes());
    for slot in 0..SLOTS {
        let at = data_offset(slot, READ_ONLY);
        let mut value = 0x9e37_79b9_7f4a_7c15_u64;
        for chunk in arena[at..at + PAGE as usize].chunks_mut(8) {
            value = value
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            chunk.copy_from_slice(&(value ^ value >> 29).to_le_bytes());
        }
    }
}
