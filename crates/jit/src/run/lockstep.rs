//! Lockstep: the translator and the interpreter run the same guest, and must agree after every block.
//!
//! The interpreter goes first, with its stores kept apart from guest memory (`trapgate_interp`), along the
//! instructions of the unit that the translator is about to run; then the translator runs the unit, alone and not
//! linked to others; then registers, flags and every page that was written are compared. What cannot be done twice
//! ends the block before it and is done once, by the translator's own processor, whose state the interpreter then
//! takes over: instructions that the translator leaves to the interpreter anyway, accesses to devices and to traced
//! pages, events.
//!
//! Not compared, because the architecture does not say what they are: flags that an instruction leaves undefined.
//! Nobody reads them before the interpreter takes them over: units end before an instruction that would. Not
//! exercised: jumps from unit to unit, which always come by way of this loop.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use trapgate_engine::{
    Counter, Exit as RunExit, Failure, Measure, NoDevices, Signal, Signals, StateError, Vcpu, World,
};
use trapgate_interp::cpu::{Cpu, Stop};
use trapgate_interp::op::{Op, attribute};
use trapgate_interp::{Changes, Interpreter};
use trapgate_memory::{GuestMemory, PAGE_SIZE};
use trapgate_x86::registers::{gpr, rflags};
use trapgate_x86::{Activity, CpuProfile, CpuState, InterruptShadow};

use super::{Ended, JitError, Translating, class, to_ax};
use crate::context::Context;
use crate::instruction::{Kind, Undefined};
use crate::mode::Mode;
use crate::stubs::{answer, exit};
use crate::unit::{MOST, Site};

mod report;

/// Runs of a unit at which its stores are looked at one by one: whether they go to pages that the interpreter
/// wrote too. Other pages are not compared.
const STRICT_RUNS: u8 = 2;

/// What the translator is told while a unit is run in lockstep, and what it tells.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The unit ends before the instruction at this address.
    before: Option<u64>,
    /// It did.
    stopped: bool,
    /// Host pages that may be written, where that is looked at.
    allowed: Option<Vec<u64>>,
    /// Instruction and linear address of a store to another page.
    stray: Option<(u64, u64)>,
    /// Translations that the interpreter must forget.
    forget_all: bool,
    forget: Vec<u64>,
}

impl Watch {
    /// Whether the unit ends before an instruction.
    pub(super) fn stops_before(&mut self, rip: u64) -> bool {
        self.stopped = self.before == Some(rip);
        self.stopped
    }

    /// The translator has looked up where an access leads.
    pub(super) fn resolved(&mut self, site: &Site, linear: u64, host: u64) {
        let strays = self
            .allowed
            .as_ref()
            .is_some_and(|allowed| site.write && !allowed.contains(&host));
        if strays {
            self.stray.get_or_insert((site.rip, linear));
        }
    }

    /// The translator forgets translations.
    pub(super) fn forget(&mut self, changes: &Changes) {
        self.forget_all |= changes.all;
        self.forget.extend_from_slice(&changes.pages);
    }
}

/// An instruction of a unit, as the interpreter runs it.
struct Step {
    ip: u64,
    op: Op,
    /// Done once, outside of the comparison.
    once: bool,
    /// It may change the mode without ending the unit.
    changes_mode: bool,
    uses_x87: bool,
    /// Flags that are undefined after it.
    undefined: u64,
}

/// A unit.
struct Guide {
    rip: u64,
    steps: Vec<Step>,
    /// The guest's code.
    code: Vec<u8>,
    /// Addresses of the host code.
    host: (u64, u64),
    /// How often it was run, up to [`STRICT_RUNS`].
    runs: u8,
}

/// How a run of a unit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// After an instruction.
    After,
    /// Before an instruction that cannot be done twice.
    Before,
    /// At an instruction that raised an exception.
    Fault,
    /// By an instruction that stops the processor, which the interpreter did not come to.
    Stopped,
}

/// What lockstep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Blocks after which both were compared.
    pub blocks: u64,
    /// Instructions in them.
    pub instructions: u64,
    /// Instructions and events that were done once.
    pub once: u64,
    /// Blocks in which a device wrote memory, and that differed.
    pub disturbed: u64,
    /// Blocks that agreed when the interpreter ran them again with no cached translations.
    pub again: u64,
}

/// A vCPU on which the translator and the interpreter check each other.
pub struct Lockstep {
    jit: Translating,
    reference: Interpreter,
    /// By number of the translator's block.
    guides: Vec<Option<Guide>>,
    /// Number of times that the translator had thrown its code away.
    flushes: u64,
    compared: Compared,
    counters: [Counter; 4],
    report: Option<String>,
}

impl Lockstep {
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
        let mut reference = Interpreter::new(
            Arc::clone(&memory),
            Box::new(NoDevices),
            profile.clone(),
            index,
            count,
        );
        reference.cpu.stay_apart();
        let mut jit = Translating::new(memory, world, profile, index, count)?;
        jit.be_exact();
        let context = jit.whole();
        context.interp.cpu.translate_pages_alone();
        let rust = &mut context.rust;
        rust.rate.disable();
        rust.watch = Some(Box::default());
        rust.translator.repeats = true;
        Ok(Self {
            jit,
            reference,
            guides: Vec::new(),
            flushes: 0,
            compared: Compared::default(),
            counters: [
                ("compared_blocks", "Blocks that were compared"),
                (
                    "done_once",
                    "Instructions and events that cannot be compared",
                ),
                (
                    "disturbed_blocks",
                    "Blocks not judged because a device wrote memory",
                ),
                ("repeated_blocks", "Blocks that the interpreter ran again"),
            ]
            .map(|(name, help)| Counter::new(name, Measure::Events, help)),
            report: None,
        })
    }

    /// What was compared.
    pub fn compared(&self) -> Compared {
        self.compared
    }

    /// Translates wrongly from now on.
    #[cfg(test)]
    fn translate_wrongly(&mut self, fault: fn(&mut iced_x86::Instruction)) {
        self.jit.whole().rust.translator.fault = Some(fault);
    }

    fn run_until_exit(&mut self) -> RunExit {
        loop {
            let context = self.jit.whole();
            let interp = &mut context.interp;
            if interp.cpu.signals.any() || interp.cpu.attention {
                self.compared.once += 1;
                let mut exit = interp.events();
                let interp = &mut context.interp;
                if exit.is_none() && interp.cpu.pending.is_none() && interp.cpu.attention {
                    exit = match interp.one() {
                        Ok(()) => None,
                        Err(stop) => interp.after(stop),
                    };
                }
                context.see_dropped();
                self.catch_up();
                match exit {
                    Some(exit) => return exit,
                    None => continue,
                }
            }
            if interp.cpu.sys.activity != Activity::Running {
                return interp.why_inactive();
            }
            if let Some(exit) = self.advance() {
                return exit;
            }
        }
    }

    /// The interpreter takes over what was done once.
    fn catch_up(&mut self) {
        self.forget();
        self.reference.cpu.follow(&self.jit.whole().interp.cpu);
    }

    /// The interpreter forgets what the translator's processor forgot.
    fn forget(&mut self) {
        let context = self.jit.whole();
        context.apply_changes();
        let Some(watch) = &mut context.rust.watch else {
            return;
        };
        let cpu = &mut self.reference.cpu;
        if std::mem::take(&mut watch.forget_all) {
            watch.forget.clear();
            cpu.forget_translations();
        }
        for linear in watch.forget.drain(..) {
            cpu.forget_page(linear);
        }
    }

    /// Runs and compares one block, or does once what can't be compared.
    fn advance(&mut self) -> Option<RunExit> {
        let context = self.jit.whole();
        if context.interp.has_dropped() {
            context.see_dropped();
        }
        let block = match self.find() {
            Ok(Some(block)) => block,
            Ok(None) => {
                let context = self.jit.whole();
                context.rust.statistics.interpreted += 1;
                let step = context.interp.block();
                return self.done_once(step);
            }
            Err(stop) => return self.done_once(Err(stop)),
        };
        let guide = self.guides.get(block as usize)?.as_ref()?;
        if guide.steps[0].once {
            // Nothing to compare.
            let (end, stop) = self.run_translator(block, Some(guide.steps[0].ip), false);
            return self.finish(end, stop, guide_ip(&self.guides, block, 0));
        }
        self.compare(block)
    }

    /// The block at RIP, with its guide.
    fn find(&mut self) -> Result<Option<u32>, Stop> {
        let context = self.jit.whole();
        let units = context.rust.statistics.units;
        let found = context.block_here();
        // Translating may have taken rights to write away.
        self.forget();
        let context = self.jit.whole();
        if self.flushes != context.rust.statistics.flushes {
            self.flushes = context.rust.statistics.flushes;
            self.guides.clear();
        }
        let Some(block) = found? else {
            return Ok(None);
        };
        if units != context.rust.statistics.units && !self.make_guide(block) {
            // The interpreter has no place for more kinds of instructions. Everything starts over.
            self.reference.clear();
            self.jit.whole().forget_all_code();
            return Ok(None);
        }
        Ok(Some(block))
    }

    /// Takes down what the translator just translated. `false` if the interpreter has no place for it.
    fn make_guide(&mut self, block: u32) -> bool {
        let rust = &self.jit.whole().rust;
        let block = block as usize;
        let rip = rust.blocks[block].pc;
        let page = rip & !(PAGE_SIZE - 1);
        let mut undefined = Undefined::default();
        let mut steps = Vec::new();
        let mut end = rip;
        for guest in &rust.translator.guests {
            let instruction = &guest.instruction;
            let bytes = &rust.page[(instruction.ip() - page) as usize..];
            let Some(op) = self.reference.cpu.lower_one(&bytes[..bytes.len().min(15)]) else {
                return false;
            };
            undefined.after(instruction);
            end = instruction.next_ip();
            steps.push(Step {
                ip: instruction.ip(),
                op,
                once: matches!(guest.kind, Kind::Operate | Kind::OperateLast),
                changes_mode: matches!(guest.kind, Kind::PopFlags | Kind::LoadMxcsr),
                uses_x87: guest.kind.uses_x87(),
                undefined: undefined.bits(),
            });
        }
        let code = rust.page[(rip - page) as usize..(end - page) as usize].to_vec();
        let host = (rust.blocks[block].checked, rust.code.next());
        if self.guides.len() <= block {
            self.guides.resize_with(block + 1, || None);
        }
        self.guides[block] = Some(Guide {
            rip,
            steps,
            code,
            host,
            runs: 0,
        });
        true
    }

    /// Runs and compares a block.
    fn compare(&mut self, block: u32) -> Option<RunExit> {
        let memory = Arc::clone(&self.jit.whole().interp.cpu.memory);
        let writes = memory.traces().device_writes();
        let stale = self.is_stale(block);
        self.reference.cpu.begin_run();
        let (count, ends) = self.run_interpreter(block, usize::MAX);
        let (end, stop) = self.run_guided(block, count, ends);
        self.compared.blocks += 1;
        self.compared.instructions += count as u64;
        let undefined = self.undefined(block, count);
        if !stale && self.agrees(ends, end, undefined) {
            self.reference.cpu.end_run();
            return self.finish(end, stop, guide_ip(&self.guides, block, count));
        }
        if let Some(at) = self.interrupted(block, stop)
            && self.repeat_in_part(block, at)
            && self.agrees(end, end, self.undefined(block, at))
        {
            self.reference.cpu.end_run();
            return self.finish(end, stop, guide_ip(&self.guides, block, count));
        }
        // A device's write is told after it is done.
        if writes == memory.traces().device_writes() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let told = self.jit.signals().is_raised(Signal::Flush);
        if writes != memory.traces().device_writes() || (stale && told) {
            self.compared.disturbed += 1;
            self.reference.cpu.end_run();
            let exit = self.finish(end, stop, guide_ip(&self.guides, block, count));
            self.catch_up();
            return exit;
        }
        let mut report = self.describe(block, ends, end, count, undefined);
        // A page may have two linear addresses, of which the interpreter used one for a store, then the other,
        // with a cached translation, for a load.
        self.reference.cpu.run_again();
        let again = self.run_interpreter(
            block,
            if ends == End::Before {
                count
            } else {
                usize::MAX
            },
        );
        if !stale && again.0 == count && self.agrees(ends, end, undefined) {
            self.compared.again += 1;
            self.reference.cpu.end_run();
            return self.finish(end, stop, guide_ip(&self.guides, block, count));
        }
        let rip = guide_ip(&self.guides, block, 0);
        let code = self.disassembled(block);
        let culprit = if stale {
            "the guest's code is no longer what was translated".to_owned()
        } else {
            self.find_culprit(count)
        };
        let _ = write!(report, "{culprit}\n{code}");
        self.report = Some(report);
        Some(RunExit::Failed(Failure {
            what: "the translator and the interpreter differ after the block",
            code: count as u64,
            rip,
        }))
    }

    /// The interpreter runs at most `most` instructions of a block: how many they were, and what ended it.
    fn run_interpreter(&mut self, block: u32, most: usize) -> (usize, End) {
        let Some(Some(guide)) = self.guides.get(block as usize) else {
            return (0, End::After);
        };
        let ended = interpret(&mut self.reference.cpu, &guide.steps, most);
        if let (count, End::Before) = ended
            && let Some(step) = guide.steps.get(count)
            && !step.once
            && step.op.has(attribute::REP | attribute::REPNE)
        {
            // Half of a string instruction is undone.
            self.reference.cpu.run_again();
            return (
                interpret(&mut self.reference.cpu, &guide.steps, count).0,
                End::Before,
            );
        }
        ended
    }

    /// Where the translator's processor left a string instruction unfinished, because a signal was raised.
    fn interrupted(&mut self, block: u32, stop: Option<Stop>) -> Option<usize> {
        let rip = self.jit.whole().interp.cpu.rip;
        let steps = &self.guides.get(block as usize)?.as_ref()?.steps;
        let at = steps.iter().position(|step| step.ip == rip)?;
        let repeats = steps[at].op.has(attribute::REP | attribute::REPNE);
        (stop == Some(Stop::EndBlock) && repeats).then_some(at)
    }

    /// The interpreter runs a block to a string instruction, and that as far as the translator's processor did.
    fn repeat_in_part(&mut self, block: u32, at: usize) -> bool {
        let left = self.jit.whole().interp.cpu.regs.gpr[gpr::RCX];
        let Some(Some(guide)) = self.guides.get(block as usize) else {
            return false;
        };
        let cpu = &mut self.reference.cpu;
        cpu.run_again();
        if interpret(cpu, &guide.steps, at) != (at, End::After) {
            return false;
        }
        let counter = &mut cpu.regs.gpr[gpr::RCX];
        *counter = counter.wrapping_sub(left);
        let one = std::slice::from_ref(&guide.steps[at]);
        let ended = interpret(cpu, one, 1);
        cpu.regs.gpr[gpr::RCX] = cpu.regs.gpr[gpr::RCX].wrapping_add(left);
        cpu.rip = guide.steps[at].ip;
        // As an instruction that is stopped half way leaves it.
        cpu.set_rflags(cpu.rflags() | rflags::RF);
        ended == (1, End::After)
    }

    /// The translator runs a block to where the interpreter came.
    fn run_guided(&mut self, block: u32, count: usize, ends: End) -> (End, Option<Stop>) {
        let Some(Some(guide)) = self.guides.get_mut(block as usize) else {
            return (End::After, None);
        };
        let strict = guide.runs < STRICT_RUNS;
        guide.runs += u8::from(strict);
        let before = match ends {
            End::Before => guide.steps.get(count).map(|step| step.ip),
            _ => None,
        };
        self.run_translator(block, before, strict)
    }

    fn run_translator(
        &mut self,
        block: u32,
        before: Option<u64>,
        strict: bool,
    ) -> (End, Option<Stop>) {
        let context = self.jit.whole();
        let allowed = strict.then(|| {
            let written = self.reference.cpu.written().iter();
            written.map(|page| page.real.as_ptr() as u64).collect()
        });
        if strict {
            context.interp.cpu.forget_write_rights();
            context.clear_tables();
        }
        if let Some(watch) = &mut context.rust.watch {
            watch.before = before;
            watch.stopped = false;
            watch.allowed = allowed;
            watch.stray = None;
        }
        context.bell.rest((&raw const context.stacks) as u32);
        context.target = context.rust.blocks[block as usize].checked;
        context.flags = to_ax(context.interp.cpu.flags.get());
        context.rust.statistics.entries += 1;
        let mode = Mode::of(&context.interp.cpu);
        let reason = mode.map_or(exit::GO, |mode| self.jit.enter(mode));
        let context = self.jit.whole();
        context.settle();
        context.interp.cpu.end_block = false;
        let stop = match (reason, context.rust.ended) {
            (exit::STOP, Ended::Stopped(stop)) => Some(stop),
            (exit::STOP, Ended::Look) => None,
            _ => {
                context.take_flags();
                match reason {
                    exit::LINK => {
                        context.link();
                        None
                    }
                    exit::INDIRECT => context.indirect(),
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
        };
        let stopped = context
            .rust
            .watch
            .as_ref()
            .is_some_and(|watch| watch.stopped);
        let end = match stop {
            Some(Stop::Fault) => End::Fault,
            Some(Stop::Halt | Stop::Shutdown) => End::Stopped,
            None if stopped => End::Before,
            _ => End::After,
        };
        (end, stop)
    }

    /// After both came to `end`: delivers the exception, or does the instruction that is done once, which is at
    /// `next`.
    fn finish(&mut self, end: End, stop: Option<Stop>, next: u64) -> Option<RunExit> {
        if let Some(stop) = stop {
            return self.done_once(Err(stop));
        }
        if end != End::Before {
            let context = self.jit.whole();
            // STI, and the interpreter was told that no interrupt waits.
            context.interp.cpu.update_attention();
            self.reference.cpu.follow_flags(&context.interp.cpu);
            return None;
        }
        let context = self.jit.whole();
        debug_assert_eq!(context.interp.cpu.rip, next);
        if let Some(watch) = &mut context.rust.watch {
            watch.before = None;
            watch.allowed = None;
        }
        let site = context.rust.sites[context.site as usize];
        context.flags = to_ax(context.interp.cpu.flags.get());
        let answer = context.run_site(site);
        context.settle();
        context.interp.cpu.end_block = false;
        let step = match context.rust.ended {
            Ended::Stopped(stop) if answer == answer::LEAVE => Err(stop),
            _ => Ok(()),
        };
        self.done_once(step)
    }

    /// After something was done once.
    fn done_once(&mut self, step: Result<(), Stop>) -> Option<RunExit> {
        self.compared.once += 1;
        let exit = self.jit.whole().outcome(step);
        self.catch_up();
        exit
    }

    /// Flags that are undefined after so many instructions of a block.
    fn undefined(&self, block: u32, count: usize) -> u64 {
        let guide = self.guides.get(block as usize).and_then(Option::as_ref);
        guide
            .zip(count.checked_sub(1))
            .and_then(|(guide, last)| guide.steps.get(last))
            .map_or(0, |step| step.undefined)
    }

    fn agrees(&mut self, ends: End, end: End, undefined: u64) -> bool {
        let context = self.jit.whole();
        let (found, expected) = (&context.interp.cpu, &self.reference.cpu);
        let stray = context.rust.watch.as_ref().and_then(|watch| watch.stray);
        ends == end
            && (end != End::Fault || found.exception == expected.exception)
            && found.rip == expected.rip
            && found.regs.gpr == expected.regs.gpr
            && (found.flags.get() ^ expected.flags.get()) & rflags::ARITHMETIC & !undefined == 0
            && found.system_flags == expected.system_flags
            && found.regs.mxcsr == expected.regs.mxcsr
            && found.regs.vector == expected.regs.vector
            && same_x87(&found.regs.x87.0, &expected.regs.x87.0)
            && same_system(found, expected)
            && stray.is_none()
            && expected.memory_difference().is_none()
    }

    /// Whether memory holds other code than was translated.
    fn is_stale(&mut self, block: u32) -> bool {
        let Some(Some(guide)) = self.guides.get(block as usize) else {
            return false;
        };
        let context = self.jit.whole();
        let cpu = &mut context.interp.cpu;
        let in_page = ((PAGE_SIZE - guide.rip % PAGE_SIZE) as usize).min(guide.code.len());
        let mut now = [0; MOST * 15];
        let now = &mut now[..in_page];
        let Ok(Some(host)) = cpu.fetch(guide.rip) else {
            return false;
        };
        host.offset(guide.rip % PAGE_SIZE).read(now);
        *now != guide.code[..in_page]
    }
}

/// Address of an instruction of a block.
fn guide_ip(guides: &[Option<Guide>], block: u32, step: usize) -> u64 {
    let guide = guides.get(block as usize).and_then(Option::as_ref);
    guide
        .and_then(|guide| guide.steps.get(step))
        .map_or(0, |step| step.ip)
}

/// Everything that system software sees, but for the instruction that STI holds interrupts off for: the
/// translator's STI does not.
fn same_system(found: &Cpu, expected: &Cpu) -> bool {
    if found.sys.shadow == InterruptShadow::None {
        return found.sys == expected.sys;
    }
    let mut sys = found.sys.clone();
    sys.shadow = InterruptShadow::None;
    sys == expected.sys
}

/// The x87's control words, pointers and registers of ten bytes each. What lies between is not state.
fn same_x87(found: &[u8; 512], expected: &[u8; 512]) -> bool {
    found[..160] == expected[..160]
        || found[..24] == expected[..24]
            && (32..160)
                .step_by(16)
                .all(|at| found[at..at + 10] == expected[at..at + 10])
}

/// Runs at most `most` instructions as long as they are the next in line.
fn interpret(cpu: &mut Cpu, steps: &[Step], most: usize) -> (usize, End) {
    let unit = Mode::of(cpu);
    for (index, step) in steps.iter().enumerate().take(most) {
        if step.once {
            return (index, End::Before);
        }
        let next = step.ip.wrapping_add(u64::from(step.op.length));
        let next = unit.map_or(next, |mode| mode.wrap(next));
        let mode = step.changes_mode.then(|| Mode::of(cpu));
        cpu.rip = next;
        cpu.end_block = false;
        let done = (step.op.handler)(cpu, &step.op);
        if cpu.sys.shadow != InterruptShadow::None {
            cpu.sys.shadow = InterruptShadow::None;
            cpu.update_attention();
        }
        if done == Err(Stop::Fault) {
            cpu.rip = step.ip;
            let end = if cpu.left_undone() {
                End::Before
            } else {
                End::Fault
            };
            return (index, end);
        }
        // The translator leaves the unit then, too.
        if cpu.rip != next
            || cpu.attention
            || mode.is_some_and(|mode| mode != Mode::of(cpu))
            || (step.uses_x87 && !cpu.regs.x87.masks_all())
        {
            return (index + 1, End::After);
        }
    }
    (steps.len().min(most), End::After)
}

impl Context {
    /// The block at RIP in the present mode; `None` if it can't be translated.
    fn block_here(&mut self) -> Result<Option<u32>, Stop> {
        let Some(mode) = Mode::of(&self.interp.cpu) else {
            return Ok(None);
        };
        self.rust.access = self.interp.cpu.system_flags & rflags::AC != 0;
        // Host code that changes the mode looks for this.
        self.target_modes[class(mode)] = mode.0;
        if !mode.is_user() {
            for set in [false, true] {
                let mode = mode.with_access(set);
                self.target_modes[class(mode)] = mode.0;
            }
        }
        let rip = self.wrapped_rip(mode);
        self.find(rip, mode, true)
    }
}

impl Vcpu for Lockstep {
    fn run(&mut self) -> RunExit {
        let context = self.jit.whole();
        context.rust.rate.forget(&mut context.clock);
        context.interp.notice_traces();
        context.see_dropped();
        self.reference.cpu.forget_translations();
        self.catch_up();
        let exit = self.run_until_exit();
        let Compared {
            blocks,
            once,
            disturbed,
            again,
            ..
        } = self.compared;
        for (counter, value) in self.counters.iter().zip([blocks, once, disturbed, again]) {
            counter.set(value);
        }
        exit
    }

    fn step(&mut self) -> RunExit {
        self.jit.step()
    }

    fn state(&mut self) -> CpuState {
        self.jit.state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.jit.set_state(state)
    }

    fn signals(&self) -> Arc<Signals> {
        self.jit.signals()
    }

    fn instructions(&self) -> u64 {
        self.compared.instructions + self.compared.once
    }

    fn counters(&self) -> Vec<Counter> {
        self.counters.to_vec()
    }

    fn explain(&mut self) -> Option<String> {
        self.report.take()
    }
}

#[cfg(test)]
mod tests;
