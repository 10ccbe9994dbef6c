//! The run loop: finds host code, runs it, and does what it came back for.
#![allow(unsafe_code)]

pub(crate) mod lockstep;
mod translations;
mod units;

use std::ptr::{addr_of_mut, from_mut};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use iced_x86::Code;
use rustc_hash::FxHashMap;
use trapgate_engine::{Costs, Counter, Exit as RunExit, Observe, Signals, StateError, Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_interp::cpu::Stop;
use trapgate_interp::op::Op;
use trapgate_memory::{GuestMemory, PAGE_SIZE};
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{gpr, rflags};
use trapgate_x86::{Activity, CpuProfile, CpuState};

use crate::adapt::{Lesson, Lessons, PATIENCE};
use crate::clock::Rate;
use crate::code_memory::CodeMemory;
use crate::context::{Addresses, CLASSES, Context, NO_MODE, NO_TARGET, TARGETS};
use crate::emit::Asm;
use crate::list::List;
use crate::low::Low;
use crate::mode::Mode;
use crate::perf_map::PerfMap;
use crate::returns::Bell;
use crate::room::{Limits, Room};
use crate::spaces::Spaces;
use crate::statistics::{Cell, Slow, Statistics};
use crate::stubs::{self, Stubs, answer, exit};
use crate::unit::{Exit, Site, Translator};
use crate::x87;

use lockstep::Watch;

/// Room that a unit certainly needs no more than.
const UNIT: usize = 64 << 10;

/// Why a translator could not be made.
#[derive(Debug, thiserror::Error)]
pub enum JitError {
    /// The host lacks an instruction that translated code is made of.
    #[error("the host CPU has no {0}, which translated code is made of")]
    Host(&'static str),
    /// No memory.
    #[error("no memory for {what}")]
    Memory {
        /// What it is for.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// No file for `perf`.
    #[error("cannot make `{}`, where perf looks for the names of translated code", path.display())]
    PerfMap {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What speaks for this engine on this host, or why it can't run.
///
/// # Errors
/// [`JitError::Host`].
pub fn usable() -> Result<String, JitError> {
    if !std::is_x86_feature_detected!("bmi2") {
        return Err(JitError::Host("BMI2"));
    }
    if !std::is_x86_feature_detected!("xsave") {
        return Err(JitError::Host("XSAVE"));
    }
    Ok("translates x86-64 code to host code".to_owned())
}

/// Which table of jump targets code of a mode uses.
pub(crate) fn class(mode: Mode) -> usize {
    match (mode.is_user(), mode.is_compatibility()) {
        (true, false) => 0,
        (true, true) => 3,
        (false, _) => 1 + mode.view(),
    }
}

/// A page of linear addresses on which code lies, and the page in memory behind it.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    gpa: u64,
}

/// A number of something in a list, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Number(u32);

impl Number {
    pub(crate) const NONE: Self = Self(0);

    fn of(index: u32) -> Self {
        Self(index + 1)
    }

    fn get(self) -> Option<u32> {
        self.0.checked_sub(1)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pc: u64,
    pub(crate) checked: u64,
    entry: u64,
    /// What it is found by.
    key: u64,
    /// The first exit that is linked to it; each knows the next.
    incoming: Number,
    /// The next block with code on the same page in memory; and on the second page, if it is an instruction that
    /// crosses to it.
    next_on_page: [Number; 2],
    /// Number of its first site.
    first_site: u32,
    /// A RET may enter it in its middle.
    has_landing: bool,
    /// The mapping of the second page, or 0.
    second: u32,
    alive: bool,
}

/// What ended a run of host code.
#[derive(Clone, Copy, Debug)]
enum Ended {
    /// An instruction did not complete.
    Stopped(Stop),
    /// Look what comes next.
    Look,
}

/// What only Rust code uses of a vCPU.
pub(crate) struct Inner {
    code: CodeMemory,
    /// Bytes of stubs at the start of the code.
    stubs_end: usize,
    pub(crate) stubs: Stubs,
    translator: Translator,
    sites: List<Site>,
    ops: List<Op>,
    pub(crate) exits: List<Exit>,
    pub(crate) blocks: List<Block>,
    room: Room,
    /// Blocks by key: for flags in the host's, and for flags in memory.
    found: FxHashMap<u64, [Number; 2]>,
    /// By linear page with the privilege below, and page in the host's memory.
    mappings: FxHashMap<(u64, u64), u32>,
    mapped: List<Mapping>,
    /// The first block with code on each guest-physical page; each knows the next.
    on_page: FxHashMap<u64, Number>,
    /// For whom the slots of each half of the address space are: user code?
    page_users: [bool; 2],
    ended: Ended,
    exact: bool,
    /// Tag of the address space whose translations are in the tables.
    space: u64,
    /// Translations of others.
    spaces: Spaces,
    /// Addresses of code pages of the upper half that are not global.
    local_code: Vec<u64>,
    /// EFLAGS.AC as the processor's derived state has it.
    access: bool,
    page: Box<[u8; 4096 + 16]>,
    lessons: Lessons,
    rate: Rate,
    pub(crate) statistics: Statistics,
    /// In lockstep: every unit is run alone, and watched.
    watch: Option<Box<Watch>>,
    perf: Option<PerfMap>,
}

/// A vCPU that translates.
pub struct Translating {
    context: Low<Context>,
    signals: Arc<Signals>,
    /// Keeps the word that others clear; it outlives the context.
    _doorbell: Arc<Doorbell>,
}

/// Where signals are rung: the context's bell, as long as there is a context.
struct Doorbell {
    word: std::sync::Mutex<Option<usize>>,
}

impl Drop for Translating {
    fn drop(&mut self) {
        // Nobody may touch the context from now on.
        *self
            ._doorbell
            .word
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }
}

impl Doorbell {
    fn ring(&self) {
        let word = self
            .word
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(address) = *word {
            // SAFETY: the address is that of the bell of a context that lives: its owner takes the
            // address away, under this lock, before it goes.
            let bell = unsafe { &*(address as *const Bell) };
            bell.ring();
        }
    }
}

extern "sysv64" fn miss(context: *mut Context) -> u64 {
    // SAFETY: host code calls this with the context that it was made for, while the run loop, which entered
    // it, holds no references into it.
    unsafe { &mut *context }.charged(Context::miss)
}

extern "sysv64" fn operate(context: *mut Context) -> u64 {
    // SAFETY: as for `miss`.
    unsafe { &mut *context }.charged(Context::operate)
}

impl Translating {
    /// A processor after reset. It is number `index` of `count`, and owns its view of the world.
    ///
    /// # Errors
    /// [`JitError`] if the host can't run translated code.
    pub fn new(
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
    ) -> Result<Self, JitError> {
        Self::observed(memory, world, profile, index, count, Observe::default())
    }

    /// As [`Self::new`], with somebody who wants to know more of what it does.
    ///
    /// # Errors
    /// As [`Self::new`]; or the file for `perf` can't be made.
    pub fn observed(
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
        observe: Observe,
    ) -> Result<Self, JitError> {
        usable()?;
        let perf = observe.perf_map.then(PerfMap::open).transpose();
        let perf = perf.map_err(|source| JitError::PerfMap {
            path: PerfMap::path(),
            source,
        })?;
        let doorbell = Arc::new(Doorbell {
            word: std::sync::Mutex::new(None),
        });
        let bell = Arc::clone(&doorbell);
        let signals = Arc::new(Signals::with_interrupter(move || bell.ring()));
        // Registers of 256 bits with dirty upper halves make SSE code slow, so only where a guest may use them.
        let level = profile.level;
        let wide = level == Level::V3 && std::is_x86_feature_detected!("avx");
        let mut room = Room::new(memory.size());
        let mut interp =
            Interpreter::with_signals(memory, world, profile, index, count, Arc::clone(&signals));
        interp.note_changes();
        let memory_for_code = match perf {
            None => CodeMemory::new(room.most().code),
            // To `perf` an address has one meaning, so code is to go as seldom as can be.
            Some(_) => {
                room = Room::largest();
                CodeMemory::named_by_map(room.most().code)
            }
        };
        let Limits { bytes, units, .. } = room.most();
        let no_memory = |what| move |source| JitError::Memory { what, source };
        let mut code = memory_for_code.map_err(no_memory("translated code"))?;
        let sites = list(bytes).map_err(no_memory("sites of translated code"))?;
        let ops = list(bytes).map_err(no_memory("instructions for the interpreter"))?;
        let exits = list(bytes).map_err(no_memory("exits of translated code"))?;
        let blocks = List::new(units).map_err(no_memory("translated units"))?;
        let mapped = List::new(units + 2).map_err(no_memory("mappings of code pages"))?;
        // SAFETY: every field that is not valid as zeros is written.
        let context = unsafe {
            Low::<Context>::new(|context| {
                let at = Addresses::at(context as usize as u32);
                // In its final place, the processor tells where its parts lie.
                addr_of_mut!((*context).interp).write(interp);
                let tlb = (*context).interp.cpu.translations();
                let mut asm = Asm::default();
                asm.start(code.next());
                let stubs = stubs::write(&mut asm, at, wide, tlb);
                code.append(&asm.bytes);
                let stubs_end = code.used();
                addr_of_mut!((*context).target_modes).write([NO_MODE; CLASSES]);
                addr_of_mut!((*context).unmatched).write(unmatched());
                addr_of_mut!((*context).x87).write(x87::IMAGE);
                addr_of_mut!((*context).patience).write(PATIENCE);
                addr_of_mut!((*context).miss).write(miss as *const () as u64);
                addr_of_mut!((*context).operate).write(operate as *const () as u64);
                addr_of_mut!((*context).rust).write(Inner {
                    code,
                    stubs_end,
                    stubs,
                    translator: Translator::new(at, stubs, level),
                    sites,
                    ops,
                    exits,
                    blocks,
                    room,
                    found: FxHashMap::default(),
                    mappings: FxHashMap::default(),
                    mapped,
                    on_page: FxHashMap::default(),
                    page_users: [true, false],
                    ended: Ended::Look,
                    exact: false,
                    space: 0,
                    spaces: Spaces::default(),
                    local_code: Vec::new(),
                    access: false,
                    page: Box::new([0; 4096 + 16]),
                    lessons: Lessons::default(),
                    rate: Rate::new(),
                    watch: None,
                    statistics: Statistics::new(observe.costs),
                    perf,
                });
            })
        }
        .map_err(no_memory("a processor below 2 GiB"))?;
        // SAFETY: no host code runs.
        let whole = unsafe { &mut *context.pointer() };
        whole.forget_all_code();
        whole.stack = whole.tops[0];
        whole.clear_translations();
        whole.name_stubs();
        *doorbell
            .word
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(from_mut(&mut whole.bell) as usize);
        Ok(Self {
            context,
            signals,
            _doorbell: doorbell,
        })
    }

    /// From now on the flags are right at every instruction that could show them, which costs time.
    pub fn be_exact(&mut self) {
        self.whole().rust.exact = true;
    }

    fn whole(&mut self) -> &mut Context {
        // SAFETY: no host code runs while this vCPU is borrowed by its user, but inside `enter`.
        unsafe { &mut *self.context.pointer() }
    }

    /// Runs host code of a mode from [`Context::target`].
    fn enter(&mut self, mode: Mode) -> u32 {
        let context = self.whole();
        context.stand_on(mode);
        let stub = context.rust.stubs.enter;
        // SAFETY: the stub was written by `stubs::write` for this signature, and lives as long as the
        // context. What runs from there was made by `Translator`: it keeps the host's stack and callee-saved
        // registers, and touches no memory but the context and guest RAM that the TLB vouches for.
        let enter: extern "sysv64" fn() -> u32 =
            unsafe { std::mem::transmute::<usize, extern "sysv64" fn() -> u32>(stub as usize) };
        enter()
    }

    fn run_until_exit(&mut self) -> RunExit {
        loop {
            let context = self.whole();
            let interp = &mut context.interp;
            if interp.cpu.signals.any() || interp.cpu.attention {
                let span = context.rust.statistics.start();
                context.rust.statistics.count(Cell::EVENT);
                let exit = context.interp.events();
                context.rust.statistics.stop(span);
                if let Some(exit) = exit {
                    return exit;
                }
                context.see_dropped();
                let interp = &mut context.interp;
                if interp.cpu.pending.is_some() {
                    continue;
                }
                if interp.cpu.attention {
                    let step = interp.one();
                    // Breakpoints can be set for good: what is forgotten meanwhile must not pile up.
                    context.apply_changes();
                    if let Err(stop) = step
                        && let Some(exit) = context.interp.after(stop)
                    {
                        return exit;
                    }
                    continue;
                }
            }
            let interp = &mut context.interp;
            if interp.cpu.sys.activity != Activity::Running {
                return interp.why_inactive();
            }
            if let Some(exit) = self.advance() {
                return exit;
            }
        }
    }

    /// Runs host code from RIP, or one block on the interpreter.
    fn advance(&mut self) -> Option<RunExit> {
        let context = self.whole();
        context.rust.statistics.count(Cell::LOOP);
        if context.interp.has_dropped() {
            context.see_dropped();
        }
        let found = context.find_here();
        // Translating may have taken rights to write away.
        context.apply_changes();
        let (target, mode) = match found {
            Ok(Some(found)) => found,
            Ok(None) => {
                context.rust.statistics.interpreted += 1;
                let span = context.rust.statistics.start();
                context.rust.statistics.count(Cell::INTERPRETED);
                let step = context.interp.block();
                context.rust.statistics.stop(span);
                return context.outcome(step);
            }
            Err(stop) => return context.interp.after(stop),
        };
        context.bell.rest((&raw const context.stacks) as u32);
        fence(Ordering::SeqCst);
        if context.interp.cpu.signals.any() {
            return None;
        }
        context.target = target;
        context.flags = to_ax(context.interp.cpu.flags.get());
        context.rust.statistics.entries += 1;
        let span = context.rust.statistics.start();
        context.rust.statistics.count(Cell::CODE);
        let reason = self.enter(mode);
        let context = self.whole();
        context.rust.statistics.stop(span);
        context.rust.statistics.left[reason as usize % exit::COUNT] += 1;
        context.settle();
        context.interp.cpu.end_block = false;
        if reason == exit::STOP {
            return match context.rust.ended {
                Ended::Stopped(stop) => context.outcome(Err(stop)),
                Ended::Look => None,
            };
        }
        context.take_flags();
        match reason {
            exit::LINK => context.charged(Context::link),
            exit::INDIRECT => {
                let stop = context.charged(Context::indirect);
                stop.and_then(|stop| context.outcome(Err(stop)))
            }
            exit::CALL => {
                context.leave_at_call();
                None
            }
            exit::RETURN => {
                context.leave_at_return();
                None
            }
            _ => None,
        }
    }
}

/// A list that alone may take all of `most` bytes, and a unit more.
fn list<T: Copy>(most: usize) -> std::io::Result<List<T>> {
    List::new((most + UNIT) / size_of::<T>())
}

/// A non-canonical page that the guest can't know.
fn unmatched() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the page is merely unlikely.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    // Bit 62 differs from bit 63; the 50 others are more than a guest can try.
    0x4000_0000_0000_0000 | u64::from_le_bytes(bytes) & 0x3fff_ffff_ffff_f000
}

/// The arithmetic flags as LAHF and SETO leave them in AX.
fn to_ax(flags: u64) -> u32 {
    // LAHF gives bit 1 as set, and PUSHFQ wants it so.
    ((flags & 0xd5 | 2) << 8 | (flags >> 11 & 1)) as u32
}

fn from_ax(ax: u32) -> u64 {
    u64::from(ax >> 8 & 0xd5 | (ax & 1) << 11)
}

impl Context {
    /// Does something whose time is charged to what it counts.
    fn charged<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let span = self.rust.statistics.start();
        let result = work(self);
        self.rust.statistics.stop(span);
        result
    }

    /// Makes known what was counted.
    fn publish(&mut self) {
        let used = self.rust.code.used();
        self.rust.statistics.publish(used, &self.refills);
    }

    /// Tells `perf` of the stubs.
    fn name_stubs(&self) {
        let rust = &self.rust;
        let Some(perf) = &rust.perf else {
            return;
        };
        let names = rust.stubs.names();
        // What is left to the code's start is the last one's.
        let ends = names[1..].iter().map(|(start, _)| *start);
        let ends = ends.chain([rust.code.next()]);
        let pieces = names.iter().zip(ends);
        perf.add(pieces.map(|((start, name), end)| (*start, end - start, name.clone())));
    }

    fn outcome(&mut self, step: Result<(), Stop>) -> Option<RunExit> {
        match step {
            Ok(()) => None,
            Err(stop) => self.interp.after(stop),
        }
    }

    /// Host code changes EFLAGS.AC and the privilege level without working out what follows from it.
    fn settle(&mut self) {
        let cpu = &mut self.interp.cpu;
        if self.stale != 0 || (cpu.system_flags & rflags::AC != 0) != self.rust.access {
            self.stale = 0;
            self.rust.access = cpu.system_flags & rflags::AC != 0;
            cpu.update_mode();
        }
    }

    /// The flags that host code left in memory to the processor.
    fn take_flags(&mut self) {
        self.interp.cpu.flags.put(from_ax(self.flags));
    }

    // Calls from host code.

    /// An access missed the inline TLB.
    fn miss(&mut self) -> u64 {
        let site = self.rust.sites[self.site as usize];
        self.take_x87_pointer(&site);
        self.settle();
        let (linear, size) = (self.linear, u64::from(site.size));
        let crosses = (linear & 0xfff) + size > PAGE_SIZE;
        if crosses {
            self.patience[Lesson::Crosses as usize] -= 1;
        }
        for lesson in [Lesson::Crowded, Lesson::Wanders, Lesson::Crosses] {
            if self.patience[lesson as usize] == 0 {
                self.patience[lesson as usize] = PATIENCE[lesson as usize];
                let blocks = &self.rust.blocks;
                let block = blocks.partition_point(|block| block.first_site <= self.site);
                self.adapt(block, site.rip, lesson);
            }
        }
        if crosses {
            let answer = self.slow_access(site, Slow::Crossing);
            if site.crosses && answer == site.next {
                self.keep_both(&site, linear);
            }
            return answer;
        }
        self.rust.statistics.misses += 1;
        let cell = Cell::miss(site.mode.view(), site.write);
        self.rust.statistics.count(cell);
        let cpu = &mut self.interp.cpu;
        match cpu.resolve(linear, size, site.access(), site.segment) {
            Ok(Some(target)) if site.is_allowed(&target) => {
                self.keep(&site, linear, &target);
                self.give_x87(&site);
                answer::RETURN
            }
            Ok(_) => {
                // What is readable is memory, whose writes someone traces.
                let reason = if cpu.has_readable(linear) {
                    Slow::Traced
                } else {
                    Slow::Device
                };
                self.slow_access(site, reason)
            }
            Err(stop) => {
                cpu.rip = site.rip;
                self.take_flags();
                self.rust.ended = Ended::Stopped(stop);
                answer::LEAVE
            }
        }
    }

    fn slow_access(&mut self, site: Site, reason: Slow) -> u64 {
        self.rust.statistics.slow(reason, site.code);
        self.run_site(site)
    }

    /// The interpreter is to run a site's instruction.
    fn operate(&mut self) -> u64 {
        let site = self.rust.sites[self.site as usize];
        self.take_x87_pointer(&site);
        self.rust.statistics.operations += 1;
        self.rust.statistics.count(Cell::call_out(site.code));
        self.run_site(site)
    }

    fn run_site(&mut self, site: Site) -> u64 {
        self.take_flags();
        self.settle();
        let cpu = &mut self.interp.cpu;
        cpu.rip = site.rip;
        cpu.end_block = false;
        if self
            .rust
            .watch
            .as_mut()
            .is_some_and(|watch| watch.stops_before(site.rip))
        {
            self.rust.ended = Ended::Look;
            return answer::LEAVE;
        }
        let op = match site.op {
            0 => match self.site_op(site) {
                Some(op) => op,
                None => {
                    let result = self.interp.one();
                    self.rust.ended = match result {
                        Ok(()) => Ended::Look,
                        Err(stop) => Ended::Stopped(stop),
                    };
                    return answer::LEAVE;
                }
            },
            number => self.rust.ops[number as usize],
        };
        let cpu = &mut self.interp.cpu;
        let next = site.rip.wrapping_add(u64::from(op.length));
        cpu.rip = next;
        let step = (op.handler)(cpu, &op);
        // Else host code counts it.
        cpu.instructions += u64::from(!self.rust.statistics.timed());
        match site.code {
            Code::Rdtsc | Code::Rdtscp if step.is_ok() => self.read_time(),
            Code::Wrmsr => self.rust.rate.restart(&mut self.clock),
            _ => {}
        }
        let cpu = &mut self.interp.cpu;
        if let Err(stop) = step {
            if stop == Stop::Fault {
                cpu.rip = site.rip;
            }
            self.rust.ended = Ended::Stopped(stop);
            return answer::LEAVE;
        }
        let go_on = site.next != 0
            && cpu.rip == next
            && !cpu.end_block
            && !cpu.attention
            && !cpu.has_stale_code()
            && (!site.x87 || cpu.regs.x87.masks_all())
            && Mode::of(cpu) == Some(site.mode);
        let same_space = !cpu.changes().space && !cpu.changes().all;
        if cpu.changes().any {
            self.apply_changes();
        }
        if !go_on || !same_space {
            self.rust.ended = Ended::Look;
            if let Some(target) = self.elsewhere() {
                self.flags = to_ax(self.interp.cpu.flags.get());
                return target;
            }
            return answer::LEAVE;
        }
        self.flags = to_ax(self.interp.cpu.flags.get());
        self.give_x87(&site);
        site.next
    }

    /// The guest read its time-stamp counter.
    fn read_time(&mut self) {
        let registers = &mut self.interp.cpu.regs.gpr;
        let tsc = registers[gpr::RDX] << 32 | registers[gpr::RAX];
        let seen = self.rust.rate.read(&mut self.clock, tsc);
        registers[gpr::RAX] = seen & 0xffff_ffff;
        registers[gpr::RDX] = seen >> 32;
    }

    /// After an instruction that went elsewhere: host code for RIP, if that is at hand and nothing else is to be
    /// done before.
    fn elsewhere(&mut self) -> Option<u64> {
        let cpu = &self.interp.cpu;
        if self.rust.watch.is_some()
            || (cpu.attention && !cpu.merely_resumes())
            || cpu.signals.any()
            || cpu.has_stale_code()
            || self.interp.has_dropped()
            || cpu.sys.activity != Activity::Running
        {
            return None;
        }
        self.rust.access = cpu.system_flags & rflags::AC != 0;
        let mode = Mode::of(cpu)?;
        let target = self.known_target(cpu.rip, mode)?;
        self.interp.cpu.resume();
        self.stand_on(mode);
        Some(target)
    }

    /// Host code for a linear address, if it is in the table of jump targets.
    fn known_target(&mut self, rip: u64, mode: Mode) -> Option<u64> {
        let class = class(mode);
        let slot = rip as usize % TARGETS;
        let targets = &self.targets[class];
        if targets.linear[slot] != rip || self.target_modes[class] != mode.0 {
            return None;
        }
        let half = (rip >> 63) as usize;
        let mapping = self.pages.get(rip);
        // Else the code itself would find that its page may be another by now.
        let in_force =
            self.rust.page_users[half] == mode.is_user() && mapping == targets.mapping[slot];
        in_force.then_some(targets.host[slot])
    }

    /// Jump targets and calls of a mode's class are to be those of that mode.
    pub(crate) fn use_mode(&mut self, mode: Mode) {
        let class = class(mode);
        if self.target_modes[class] != mode.0 {
            self.target_modes[class] = mode.0;
            self.targets[class].linear.fill(NO_TARGET);
            self.forget_calls_of(class);
        }
    }

    /// Remembers where a jump to a linear address leads.
    fn know_target(&mut self, rip: u64, mode: Mode, block: u32) {
        if self.rust.watch.is_some() || self.rust.blocks[block as usize].second != 0 {
            // Both its pages must be looked at each time.
            return;
        }
        self.use_mode(mode);
        let class = class(mode);
        let slot = rip as usize % TARGETS;
        let Block { checked, key, .. } = self.rust.blocks[block as usize];
        self.targets[class].linear[slot] = rip;
        self.targets[class].host[slot] = checked;
        self.targets[class].mapping[slot] = mapping_of(key);
    }

    /// Lowers a site's instruction, which was not expected to need it.
    fn site_op(&mut self, site: Site) -> Option<Op> {
        let cpu = &mut self.interp.cpu;
        let host = cpu.fetch(site.rip).ok()??;
        let offset = site.rip & 0xfff;
        let mut bytes = [0; 15];
        let length = (PAGE_SIZE - offset).min(15) as usize;
        host.offset(offset).read(&mut bytes[..length]);
        let op = cpu.lower_one(&bytes[..length])?;
        if self.rust.ops.is_full() {
            return None;
        }
        self.rust.ops.push(op);
        self.rust.sites[self.site as usize].op = self.rust.ops.len() as u32 - 1;
        Some(op)
    }
}

impl Inner {
    /// Bytes that host code and its lists take.
    fn bytes(&self) -> usize {
        let Self {
            code,
            sites,
            ops,
            exits,
            blocks,
            mapped,
            ..
        } = self;
        let lists = sites.bytes() + ops.bytes() + exits.bytes() + blocks.bytes();
        code.used() + lists + mapped.bytes()
    }

    /// Notes that a block has code on a guest-physical page: its first, or its second.
    fn put_on_page(&mut self, block: u32, which: usize, gpa: u64) {
        let first = self.on_page.entry(gpa >> 12).or_default();
        self.blocks[block as usize].next_on_page[which] =
            std::mem::replace(first, Number::of(block));
    }
}
/// What a block is found by.
fn key(mapping: u32, rip: u64, mode: Mode) -> u64 {
    let low = (rip & 0xfff) << Mode::BITS | u64::from(mode.0);
    u64::from(mapping) << (12 + Mode::BITS) | low
}

/// The mapping of a block that is found by `key`.
fn mapping_of(key: u64) -> u32 {
    (key >> (12 + Mode::BITS)) as u32
}

impl Vcpu for Translating {
    fn forget_code(&mut self) {
        self.whole().forget_all_code();
    }

    fn run(&mut self) -> RunExit {
        let context = self.whole();
        // The machine's clock may have stood still.
        context.rust.rate.forget(&mut context.clock);
        context.interp.notice_traces();
        let span = context.rust.statistics.start();
        context.see_dropped();
        let exit = self.run_until_exit();
        let context = self.whole();
        context.rust.statistics.stop(span);
        context.publish();
        exit
    }

    fn step(&mut self) -> RunExit {
        let context = self.whole();
        context.interp.notice_traces();
        let exit = context.interp.one_or_event();
        context.see_dropped();
        exit
    }

    fn state(&mut self) -> CpuState {
        self.whole().interp.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let context = self.whole();
        context.rust.rate.restart(&mut context.clock);
        context.interp.set_state(state)
    }

    fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.signals)
    }

    fn instructions(&self) -> u64 {
        // SAFETY: no host code runs while this is borrowed.
        unsafe { &*self.context.pointer() }.interp.cpu.instructions
    }

    fn counters(&self) -> Vec<Counter> {
        // SAFETY: no host code runs while this is borrowed.
        let context = unsafe { &*self.context.pointer() };
        context.rust.statistics.counters()
    }

    fn costs(&self) -> Option<Arc<dyn Costs>> {
        // SAFETY: no host code runs while this is borrowed.
        let context = unsafe { &*self.context.pointer() };
        Some(context.rust.statistics.costs())
    }
}

#[cfg(test)]
mod tests;
