//! The run loop: finds host code, runs it, and does what it came back for.
#![allow(unsafe_code)]

pub(crate) mod lockstep;

use std::ptr::{addr_of_mut, from_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use iced_x86::Code;
use rustc_hash::FxHashMap;
use trapgate_engine::{Costs, Counter, Exit as RunExit, Observe, Signals, StateError, Vcpu, World};
use trapgate_interp::cpu::Stop;
use trapgate_interp::op::Op;
use trapgate_interp::{Access, Interpreter, Target, View};
use trapgate_memory::{GuestMemory, HostAddress, PAGE_SIZE};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{gpr, rflags};
use trapgate_x86::{Activity, CpuProfile, CpuState, Exception};

use crate::adapt::{Lesson, Lessons, PATIENCE};
use crate::clock::Rate;
use crate::code_memory::CodeMemory;
use crate::context::{
    ACCESS_TLB, Addresses, CLASSES, Context, MOST_LOCAL, NO_MODE, NO_TARGET, Slots, TARGETS,
    TLB_ENTRIES, Table, USER_TLB,
};
use crate::emit::Asm;
use crate::list::List;
use crate::low::Low;
use crate::mode::Mode;
use crate::perf_map::{self, PerfMap};
use crate::spaces::{Parts, Spaces};
use crate::statistics::{Cell, Slow, Statistics};
use crate::stubs::{self, Stubs, answer, exit};
use crate::unit::{Exit, Request, Site, Translator};
use crate::x87;

use lockstep::Watch;

/// Bytes of host code before all of it is thrown away.
const CODE: usize = 32 << 20;
/// The same if `perf` is to know it: an address has one meaning then.
const NAMED_CODE: usize = 256 << 20;
/// Bytes of host code and of the lists that go with it before all of it is thrown away. Code that compilers make has lists
/// nearly as large as its host code; a guest can make code whose lists are several times as large.
const CODE_AND_LISTS: usize = 52 << 20;
/// The same if `perf` is to know the code.
const NAMED_CODE_AND_LISTS: usize = 2 * NAMED_CODE;
/// Mappings of code pages, and units, that are remembered before all code is thrown away: what a hash table with 2¹⁷ places
/// holds.
const MOST_MAPPINGS: usize = 7 << 14;
const MOST_UNITS: usize = 7 << 14;
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
struct Block {
    pc: u64,
    checked: u64,
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
    stubs: Stubs,
    translator: Translator,
    sites: List<Site>,
    ops: List<Op>,
    exits: List<Exit>,
    blocks: List<Block>,
    /// Most bytes of code and lists.
    most: usize,
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

/// Where signals are rung: the context's poll word, as long as there is a context.
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
            // SAFETY: the address is that of the poll word of a context that lives: its owner takes the
            // address away, under this lock, before it goes.
            let poll = unsafe { &*(address as *const AtomicU32) };
            poll.store(0, Ordering::SeqCst);
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
        let wide = profile.level == Level::V3 && std::is_x86_feature_detected!("avx");
        let mut interp =
            Interpreter::with_signals(memory, world, profile, index, count, Arc::clone(&signals));
        interp.note_changes();
        let (memory_for_code, most) = match perf {
            None => (CodeMemory::new(CODE), CODE_AND_LISTS),
            Some(_) => (CodeMemory::named_by_map(NAMED_CODE), NAMED_CODE_AND_LISTS),
        };
        let no_memory = |what| move |source| JitError::Memory { what, source };
        let mut code = memory_for_code.map_err(no_memory("translated code"))?;
        let sites = room(most).map_err(no_memory("sites of translated code"))?;
        let ops = room(most).map_err(no_memory("instructions for the interpreter"))?;
        let exits = room(most).map_err(no_memory("exits of translated code"))?;
        let blocks = List::new(MOST_UNITS).map_err(no_memory("translated units"))?;
        let mapped = List::new(MOST_MAPPINGS + 2).map_err(no_memory("mappings of code pages"))?;
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
                addr_of_mut!((*context).patience).write([PATIENCE; Lesson::COUNT]);
                addr_of_mut!((*context).poll).write(AtomicU32::new(1));
                addr_of_mut!((*context).miss).write(miss as *const () as u64);
                addr_of_mut!((*context).operate).write(operate as *const () as u64);
                addr_of_mut!((*context).rust).write(Inner {
                    code,
                    stubs_end,
                    stubs,
                    translator: Translator::new(at, stubs),
                    sites,
                    ops,
                    exits,
                    blocks,
                    most,
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
        whole.clear_translations();
        whole.name_stubs();
        *doorbell
            .word
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(from_mut(&mut whole.poll) as usize);
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

    /// Runs host code from [`Context::target`].
    fn enter(&mut self) -> u32 {
        let stub = self.whole().rust.stubs.enter;
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
        let target = match found {
            Ok(Some(target)) => target,
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
        context.poll.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if context.interp.cpu.signals.any() {
            return None;
        }
        context.target = target;
        context.flags = to_ax(context.interp.cpu.flags.get());
        context.rust.statistics.entries += 1;
        let span = context.rust.statistics.start();
        context.rust.statistics.count(Cell::CODE);
        let reason = self.enter();
        let context = self.whole();
        context.rust.statistics.stop(span);
        context.rust.statistics.left[reason as usize & 3] += 1;
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
            _ => None,
        }
    }
}

/// A list that alone may take all of `most` bytes, and a unit more.
fn room<T: Copy>(most: usize) -> std::io::Result<List<T>> {
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
                self.patience[lesson as usize] = PATIENCE;
                self.adapt(site, lesson);
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
        let access = if site.write {
            Access::Write
        } else {
            Access::Read
        };
        match cpu.resolve(linear, size, access, site.segment) {
            Ok(Some(target)) if (site.write && target.write) || (!site.write && target.read) => {
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

    /// Keeps the translation of a site's access in the table.
    fn keep(&mut self, site: &Site, linear: u64, target: &Target) {
        let view = site.mode.view();
        let host = target.page.as_ptr() as u64;
        let rights = (target.read, target.write);
        if let Some(watch) = &mut self.rust.watch {
            watch.resolved(site, linear, host);
        }
        Table(&mut self.tlbs[view][..TLB_ENTRIES[view]]).insert(linear, host, rights);
        // What is not there in every address space. The other tables are exchanged.
        if target.local || (linear >> 63 == 0 && view == View::Supervisor as usize) {
            self.local[view].push(linear);
        }
        if self.interp.cpu.changes().any {
            self.apply_changes();
        }
    }

    /// Keeps the translations of both pages of a site's access, which the interpreter has just done.
    fn keep_both(&mut self, site: &Site, linear: u64) {
        let last = linear.wrapping_add(u64::from(site.size) - 1);
        for linear in [linear, last] {
            let access = if site.write {
                Access::Write
            } else {
                Access::Read
            };
            let cpu = &mut self.interp.cpu;
            if let Ok(Some(target)) = cpu.resolve(linear, 1, access, site.segment)
                && (if site.write {
                    target.write
                } else {
                    target.read
                })
            {
                self.keep(site, linear, &target);
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
            || cpu.attention
            || cpu.signals.any()
            || cpu.has_stale_code()
            || self.interp.has_dropped()
            || cpu.sys.activity != Activity::Running
        {
            return None;
        }
        self.rust.access = cpu.system_flags & rflags::AC != 0;
        let mode = Mode::of(cpu)?;
        self.known_target(cpu.rip, mode)
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
        let mapping = *self.pages.of(rip);
        // Else the code itself would find that its page may be another by now.
        let in_force =
            self.rust.page_users[half] == mode.is_user() && mapping == targets.mapping[slot];
        in_force.then_some(targets.host[slot])
    }

    /// Remembers where a jump to a linear address leads.
    fn know_target(&mut self, rip: u64, mode: Mode, block: u32) {
        if self.rust.watch.is_some() || self.rust.blocks[block as usize].second != 0 {
            // Both its pages must be looked at each time.
            return;
        }
        let class = class(mode);
        if self.target_modes[class] != mode.0 {
            self.target_modes[class] = mode.0;
            self.targets[class].linear.fill(NO_TARGET);
        }
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

    // Translations of addresses.

    fn clear_translations(&mut self) {
        self.clear_tables();
        for local in &mut self.local {
            local.count = 0;
        }
        self.pages.clear();
        self.rust.spaces.clear();
        self.rust.local_code.clear();
    }

    /// Forgets the translations in tables and slots.
    fn clear_tables(&mut self) {
        for (tlb, entries) in self.tlbs.iter_mut().zip(TLB_ENTRIES) {
            Table(&mut tlb[..entries]).clear();
        }
        self.clear_slots();
    }

    fn clear_slots(&mut self) {
        for slots in &mut self.slots {
            Slots(slots).clear(self.unmatched);
        }
    }

    /// Forgets what the processor's TLB forgot.
    fn apply_changes(&mut self) {
        let unmatched = self.unmatched;
        let changes = self.interp.cpu.changes();
        if !changes.any {
            return;
        }
        let (all, space) = (changes.all, changes.space);
        if let Some(watch) = &mut self.rust.watch {
            watch.forget(changes);
        }
        if !all {
            let tables = self.tlbs.iter_mut().zip(TLB_ENTRIES);
            let tables = tables.map(|(tlb, entries)| Table(&mut tlb[..entries]));
            for mut tlb in tables.chain(self.rust.spaces.tables()) {
                for &linear in &changes.pages {
                    tlb.clear_page(linear);
                }
                for &host in &changes.revoked {
                    tlb.revoke_write(host);
                }
            }
            for mut slots in self.slots.iter_mut().map(Slots) {
                for &linear in &changes.pages {
                    slots.clear_page(linear, unmatched);
                }
                for &host in &changes.revoked {
                    slots.revoke_write(host, unmatched);
                }
            }
            for &linear in &changes.pages {
                *self.pages.of(linear) = 0;
                self.rust.spaces.clear_code_page(linear);
            }
        }
        changes.clear();
        let tag = self.interp.cpu.space();
        if all {
            self.clear_translations();
        } else if space && tag != self.rust.space {
            // What is global stays in the supervisor's table and the upper half.
            for (view, local) in self.local.iter_mut().enumerate() {
                let mut tlb = Table(&mut self.tlbs[view][..TLB_ENTRIES[view]]);
                if local.is_full() {
                    tlb.clear();
                }
                for &linear in local.list() {
                    tlb.clear_page(linear);
                }
                local.count = 0;
            }
            if self.rust.local_code.len() >= MOST_LOCAL {
                self.pages.kernel.fill(0);
            }
            for linear in self.rust.local_code.drain(..) {
                *self.pages.of(linear) = 0;
            }
            let [_, access, user] = &mut self.tlbs;
            self.rust.spaces.exchange(
                self.rust.space,
                tag,
                Parts {
                    access: &mut access[..ACCESS_TLB],
                    user: &mut user[..USER_TLB],
                    pages: &mut self.pages.user,
                },
            );
            self.clear_slots();
        }
        self.rust.space = tag;
    }

    // Code.

    /// Host code for RIP, in the present mode; `None` if it can't be translated.
    fn find_here(&mut self) -> Result<Option<u64>, Stop> {
        let Some(mode) = Mode::of(&self.interp.cpu) else {
            return Ok(None);
        };
        self.rust.access = self.interp.cpu.system_flags & rflags::AC != 0;
        let rip = self.wrapped_rip(mode);
        if let Some(target) = self.known_target(rip, mode) {
            return Ok(Some(target));
        }
        let Some(block) = self.find(rip, mode, true)? else {
            return Ok(None);
        };
        self.know_target(rip, mode, block);
        Ok(Some(self.rust.blocks[block as usize].entry))
    }

    /// RIP, after an instruction that may have been the last below 4 GiB in compatibility mode.
    fn wrapped_rip(&mut self, mode: Mode) -> u64 {
        let rip = &mut self.interp.cpu.rip;
        *rip = mode.wrap(*rip);
        *rip
    }

    /// The block at a linear address.
    fn find(&mut self, rip: u64, mode: Mode, memory: bool) -> Result<Option<u32>, Stop> {
        let cpu = &mut self.interp.cpu;
        if !is_canonical(rip) {
            return cpu.gp0();
        }
        let Some(host) = cpu.fetch(rip)? else {
            return Ok(None);
        };
        if self.rust.mapped.len() >= MOST_MAPPINGS || self.rust.blocks.is_full() {
            // Some mappings are of pages where nothing could be translated, so no other limit bounds them.
            self.forget_all_code();
        }
        let mapping = self.mapping(rip, host, mode)?;
        let half = (rip >> 63) as usize;
        if self.rust.page_users[half] != mode.is_user() {
            self.rust.page_users[half] = mode.is_user();
            self.pages.half(half).fill(0);
        }
        self.set_page(rip, mapping);
        let found = self.rust.found.get(&key(mapping, rip, mode));
        if let Some(block) = found.and_then(|found| found[usize::from(memory)].get())
            && self.second_in_force(rip, mode, block)?
        {
            return Ok(Some(block));
        }
        Ok(self.charged(|context| {
            context.rust.statistics.count(Cell::TRANSLATION);
            context.translate(rip, mode, memory, host, mapping)
        }))
    }

    /// Bits of the mode that a block is for.
    fn bits_of(&self, block: u32) -> u32 {
        Mode(self.rust.blocks[block as usize].key as u8).bits()
    }

    /// The mapping of a code page, just fetched from, is in force.
    fn set_page(&mut self, linear: u64, mapping: u32) {
        let slot = self.pages.of(linear);
        if *slot != mapping {
            *slot = mapping;
            if self.rust.local_code.len() < MOST_LOCAL && self.interp.cpu.fetched_locally(linear) {
                self.rust.local_code.push(linear);
            }
        }
    }

    /// Whether the next page, if the block goes on there, is what it was; if not the block is dropped.
    fn second_in_force(&mut self, rip: u64, mode: Mode, block: u32) -> Result<bool, Stop> {
        let second = self.rust.blocks[block as usize].second;
        if second == 0 {
            return Ok(true);
        }
        let next = mode.next_page(rip);
        if let Some(host) = self.interp.cpu.fetch(next)?
            && self.mapping(next, host, mode)? == second
        {
            self.set_page(next, second);
            return Ok(true);
        }
        self.drop_block(block);
        Ok(false)
    }

    fn mapping(&mut self, rip: u64, host: HostAddress, mode: Mode) -> Result<u32, Stop> {
        let page = (rip >> 12) << 1 | u64::from(mode.is_user());
        let key = (page, host.as_ptr() as u64);
        if let Some(&number) = self.rust.mappings.get(&key) {
            return Ok(number);
        }
        let gpa = self.interp.cpu.fetch_physical(rip)?;
        self.rust.mapped.push(Mapping {
            gpa: gpa & !(PAGE_SIZE - 1),
        });
        // Numbers start at 1: 0 is no mapping.
        let number = self.rust.mapped.len() as u32;
        self.rust.mappings.insert(key, number);
        Ok(number)
    }

    fn translate(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
    ) -> Option<u32> {
        if self.rust.code.left() < UNIT || self.rust.bytes() > self.rust.most {
            self.forget_all_code();
            // The mapping's number is gone with the rest; next time.
            return None;
        }
        self.translate_on(rip, mode, memory, host, mapping, None)
            .or_else(|| self.translate_crossing(rip, mode, memory, host, mapping))
    }

    /// Translates an instruction that begins on one page and ends on the next.
    fn translate_crossing(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
    ) -> Option<u32> {
        if rip & 0xfff <= 0xfff - 15 {
            return None;
        }
        let next = mode.next_page(rip);
        // A fault of the second page's fetch is the interpreter's to find.
        if !is_canonical(next) {
            return None;
        }
        let second_host = self.interp.cpu.fetch(next).ok()??;
        let second = self.mapping(next, second_host, mode).ok()?;
        let gpa = self.rust.mapped[second as usize - 1].gpa;
        self.interp.cpu.watch_code(gpa, 15);
        self.set_page(next, second);
        let block = self.translate_on(
            rip,
            mode,
            memory,
            host,
            mapping,
            Some((second, second_host)),
        )?;
        let first = self.rust.mapped[mapping as usize - 1].gpa;
        if first != gpa {
            self.rust.put_on_page(block, 1, gpa);
        }
        Some(block)
    }

    fn translate_on(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
        second: Option<(u32, HostAddress)>,
    ) -> Option<u32> {
        let gpa = self.rust.mapped[mapping as usize - 1].gpa;
        // Mark first, then read: a write in between is then seen.
        self.interp.cpu.watch_code(gpa + (rip & 0xfff), 1);
        let rust = &mut self.rust;
        host.read(&mut rust.page[..PAGE_SIZE as usize]);
        let bytes = match second {
            None => PAGE_SIZE as usize,
            Some((_, second)) => {
                second.read(&mut rust.page[PAGE_SIZE as usize..]);
                rust.page.len()
            }
        };
        let request = Request {
            rip,
            mode,
            memory,
            page: &rust.page[..bytes],
            mapping,
            second: second.map(|(mapping, _)| mapping),
            first_site: rust.sites.len() as u32,
            first_exit: rust.exits.len() as u32,
            lessons: rust.lessons.on_page(gpa),
            exact: rust.exact,
            counting: rust.statistics.timed(),
        };
        let first_site = request.first_site;
        let place = rust.code.next();
        let unit = rust
            .translator
            .translate(request, place, &mut self.interp, &mut rust.ops)?;
        let bytes = rust.translator.asm.bytes.len();
        if bytes > UNIT {
            return None;
        }
        rust.code.append(&rust.translator.asm.bytes);
        rust.statistics.units += 1;
        rust.statistics.instructions += u64::from(unit.instructions);
        rust.statistics.host_bytes += bytes as u64;
        rust.statistics.exits += unit.exits.len() as u64;
        if let Some(perf) = &rust.perf {
            let name = perf_map::unit(mode.is_user(), rip, gpa);
            perf.add([(place, bytes as u64, name)]);
        }
        rust.sites.extend_from_slice(&unit.sites);
        rust.exits.extend_from_slice(&unit.exits);
        let number = rust.blocks.len() as u32;
        let key = key(mapping, rip, mode);
        let found = rust.found.entry(key).or_default();
        found[usize::from(memory)] = Number::of(number);
        if unit.any_flags {
            found[usize::from(!memory)] = Number::of(number);
        }
        rust.blocks.push(Block {
            pc: rip,
            checked: unit.checked,
            entry: unit.entry,
            key,
            incoming: Number::NONE,
            next_on_page: [Number::NONE; 2],
            first_site,
            second: second.map_or(0, |(mapping, _)| mapping),
            alive: true,
        });
        rust.put_on_page(number, 0, gpa);
        let cpu = &mut self.interp.cpu;
        let first = unit.length.min(PAGE_SIZE - (rip & 0xfff));
        cpu.watch_code(gpa + (rip & 0xfff), first);
        for (start, end) in unit.seen {
            cpu.watch_code(gpa + u64::from(start), u64::from(end - start));
        }
        Some(number)
    }

    /// Host code jumped where nothing was yet.
    fn link(&mut self) -> Option<RunExit> {
        let number = self.site;
        let exit = self.rust.exits[number as usize];
        self.rust.statistics.count(Cell::LINK);
        self.interp.cpu.rip = exit.target;
        // Whatever changed meanwhile is seen to first, and the link made another time.
        let cpu = &self.interp.cpu;
        let watched = self.rust.watch.is_some();
        if watched || cpu.signals.any() || cpu.attention || Mode::of(cpu) != Some(exit.mode) {
            return None;
        }
        let units = self.rust.statistics.flushes;
        match self.find(exit.target, exit.mode, exit.memory) {
            Ok(Some(block)) if self.rust.statistics.flushes == units => {
                let rust = &mut self.rust;
                let target = &mut rust.blocks[block as usize];
                let to = if exit.far {
                    target.checked
                } else {
                    target.entry
                };
                // An exit that is linked does not come here, so it is in no other block's list.
                let exit = &mut rust.exits[number as usize];
                exit.linked = Number::of(block);
                exit.next = std::mem::replace(&mut target.incoming, Number::of(number));
                let exit = *exit;
                rust.code.patch(exit.patch, to);
                rust.statistics.links += 1;
                None
            }
            // The fault comes again when the run loop looks; nothing has changed.
            Ok(_) | Err(_) => None,
        }
    }

    /// Host code jumped through a register to what was not in the table.
    fn indirect(&mut self) -> Option<Stop> {
        self.rust.statistics.indirect += 1;
        self.rust.statistics.count(Cell::INDIRECT);
        let rip = self.interp.cpu.rip;
        if !is_canonical(rip) {
            // The transfer itself faults.
            let site = self.rust.sites[self.site as usize];
            let cpu = &mut self.interp.cpu;
            let pointer = &mut cpu.regs.gpr[gpr::RSP];
            *pointer = pointer.wrapping_sub(site.popped as u64);
            cpu.rip = site.rip;
            return Some(cpu.raise(Exception::gp(0)));
        }
        let cpu = &self.interp.cpu;
        if self.rust.watch.is_some() || cpu.signals.any() || cpu.attention {
            return None;
        }
        let mode = Mode::of(cpu)?;
        if let Ok(Some(block)) = self.find(rip, mode, true) {
            self.know_target(rip, mode, block);
        }
        None
    }

    /// So many accesses missed that time is lost by it: the code of the last is made anew.
    fn adapt(&mut self, site: Site, lesson: Lesson) {
        if !self.rust.lessons.is_often(lesson) {
            return;
        }
        let blocks = &self.rust.blocks;
        let number = blocks.partition_point(|block| block.first_site <= self.site);
        let Some(number) = number.checked_sub(1) else {
            return;
        };
        let block = &blocks[number];
        let gpa = self.rust.mapped[mapping_of(block.key) as usize - 1].gpa;
        if block.alive && self.rust.lessons.note(gpa, site.rip, lesson) {
            self.drop_block(number as u32);
        }
    }

    /// Throws units away whose code the interpreter threw away.
    fn see_dropped(&mut self) {
        let dropped = self.interp.take_dropped();
        if !dropped.all && dropped.pages.is_empty() {
            return;
        }
        let span = self.rust.statistics.start();
        self.rust.statistics.count(Cell::INVALIDATION);
        if dropped.all {
            self.forget_all_code();
        } else {
            for page in dropped.pages {
                let mut next = self.rust.on_page.remove(&page).unwrap_or_default();
                while let Some(number) = next.get() {
                    let block = self.rust.blocks[number as usize];
                    let first = self.rust.mapped[mapping_of(block.key) as usize - 1].gpa;
                    next = block.next_on_page[usize::from(first >> 12 != page)];
                    self.drop_block(number);
                }
            }
        }
        self.rust.statistics.stop(span);
    }

    fn drop_block(&mut self, number: u32) {
        let rust = &mut self.rust;
        let block = &mut rust.blocks[number as usize];
        if !block.alive {
            return;
        }
        block.alive = false;
        rust.statistics.dropped += 1;
        if let Some(found) = rust.found.get_mut(&block.key) {
            for found in found.iter_mut() {
                if *found == Number::of(number) {
                    *found = Number::NONE;
                }
            }
            if *found == [Number::NONE; 2] {
                rust.found.remove(&block.key);
            }
        }
        let mut next = std::mem::take(&mut block.incoming);
        while let Some(exit) = next.get() {
            let exit = &mut rust.exits[exit as usize];
            next = exit.next;
            exit.linked = Number::NONE;
            rust.code.patch(exit.patch, exit.stub);
        }
        let slot = block.pc as usize % TARGETS;
        for targets in &mut self.targets {
            if targets.host[slot] == block.checked {
                targets.linear[slot] = NO_TARGET;
            }
        }
    }

    /// Throws everything away.
    fn forget_all_code(&mut self) {
        let rust = &mut self.rust;
        rust.statistics.flushes += 1;
        rust.code.rewind(rust.stubs_end, UNIT);
        rust.sites.clear();
        rust.ops.clear();
        // Number 0 means none.
        self.interp.clear();
        if let Some(op) = self.interp.cpu.lower_one(&[0x90]) {
            rust.ops.push(op);
        }
        rust.exits.clear();
        rust.blocks.clear();
        rust.found.clear();
        rust.mappings.clear();
        rust.mapped.clear();
        rust.on_page.clear();
        self.pages.clear();
        for targets in &mut self.targets {
            targets.linear.fill(NO_TARGET);
        }
        self.interp.take_dropped();
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
