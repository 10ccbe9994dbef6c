//! The instruction oracle: single instructions in all their forms, natively and on the engines.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Instant;

use iced_x86::{Code, FlowControl, Mnemonic};
use trapgate_x86::profile::Level;

use crate::bench::{Bench, OracleError, StandIn, Times, arena, timed};
use crate::campaign::{Campaign, Course};
use crate::cases::{Climate, Maker, Piece, landing, target};
use crate::encodings::{Encoding, Form, Surroundings, encodings, is_prefix, write};
use crate::engine::Kind;
use crate::host::Host;
use crate::judge::{self, Waiver};
use crate::layout::record as at;
use crate::layout::{CASES, CODE_AT, IN_AT, PAGE, SLOTS, code, data_offset, vector};
use crate::profile::{Judge, admits, judge as judge_of};
use crate::random::Random;
use crate::record::{of, of_mut, quad};

/// What to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How much, and on what.
    pub campaign: Campaign,
    /// 64 or 32.
    pub bits: u32,
    /// Codes whose names contain this, if given.
    pub code: Option<String>,
    /// Cases for each piece of code, at most [`EACH`].
    pub each: usize,
}

impl Settings {
    /// Batches after which each encoding had its turn.
    pub fn sweep(&self) -> u64 {
        encodings(self.campaign.level, self.bits)
            .len()
            .div_ceil(SLOTS - RAW) as u64
    }
}

/// Something on which an engine and the host do not agree.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Which engine.
    pub engine: Kind,
    /// Name of the instruction.
    pub code: String,
    /// All that there is to say.
    pub text: String,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Encodings of the profile.
    pub encodings: usize,
    /// Those of them that have no cases, by reason.
    pub excluded: BTreeMap<&'static str, usize>,
    /// Encodings of which a case was compared.
    pub covered: usize,
    /// Encodings of which a case came to its end without a fault.
    pub completed: usize,
    /// Names of those that were not covered.
    pub missing: Vec<String>,
    /// Cases compared, on each engine.
    pub cases: u64,
    /// Cases that the host did not end in time, alone neither.
    pub unjudged: u64,
    /// Cases in which something differed that does not count, by reason.
    pub waived: BTreeMap<Waiver, u64>,
    /// Cases that faulted natively.
    pub faults: u64,
    /// Batches.
    pub batches: u64,
    /// Children that died.
    pub deaths: u64,
    /// Differences.
    pub differences: Vec<Difference>,
    /// How many there were, of which not all are listed.
    pub different: u64,
    /// Where time went.
    pub times: Times,
}

/// What all threads share.
struct Shared<'a> {
    settings: &'a Settings,
    course: Course<'a>,
    encodings: Vec<Encoding>,
    report: Mutex<(Report, BTreeSet<Encoding>, BTreeSet<Encoding>)>,
}

/// Why an encoding has no cases: whatever bytes are written for it, nobody can judge them. What cannot be written is no
/// such thing, and will be told as not covered.
fn obstacle(encoding: Encoding, random: &mut Random, settings: &Settings) -> Option<&'static str> {
    let mut reason = None;
    for _ in 0..64 {
        match piece(encoding, 0, random, settings) {
            Err(Refusal::Nobody(why)) => reason = Some(why),
            Err(Refusal::Otherwise) => {}
            Ok(_) | Err(Refusal::Unwritten) => return None,
        }
    }
    reason
}

/// Why there is no piece of code.
enum Refusal {
    /// The encoding cannot be written so.
    Unwritten,
    /// Not with these operands, or not there.
    Otherwise,
    /// Nobody can judge it.
    Nobody(&'static str),
}

/// Runs the oracle.
///
/// # Errors
/// [`OracleError`] if the host or an engine could not be asked; differences are no errors.
pub fn run(settings: &Settings) -> Result<Report, OracleError> {
    let mut report = Report::default();
    let mut list = Vec::new();
    for encoding in encodings(settings.campaign.level, settings.bits) {
        if let Some(part) = &settings.code
            && !format!("{:?}", encoding.code)
                .to_lowercase()
                .contains(&part.to_lowercase())
        {
            continue;
        }
        let mut random = Random(encoding.code as u64);
        match obstacle(encoding, &mut random, settings) {
            Some(reason) => *report.excluded.entry(reason).or_default() += 1,
            None => list.push(encoding),
        }
    }
    if list.is_empty() {
        return Err(OracleError::NoCode(
            settings.code.clone().unwrap_or_default(),
        ));
    }
    report.encodings = list.len() + report.excluded.values().sum::<usize>();
    // Neighbours in the table are alike; mixed, a batch has something of everything.
    let mut random = Random(settings.campaign.seed);
    for index in (1..list.len()).rev() {
        list.swap(index, random.below(index as u64 + 1) as usize);
    }
    let shared = Shared {
        settings,
        course: Course::new(&settings.campaign),
        encodings: list,
        report: Mutex::new((report, BTreeSet::new(), BTreeSet::new())),
    };
    shared.course.run(|| work(&shared))?;
    let Ok((mut report, covered, completed)) = shared.report.into_inner() else {
        unreachable!("no thread panicked")
    };
    report.covered = covered.len();
    report.completed = completed.len();
    let mut missing: Vec<String> = shared
        .encodings
        .iter()
        .filter(|encoding| !covered.contains(encoding))
        .map(|encoding| format!("{:?} {:?}", encoding.code, encoding.form))
        .collect();
    missing.sort();
    report.missing = missing;
    Ok(report)
}

/// A batch as it is made: what goes into the arena, and what it is.
struct Batch {
    arena: Vec<u8>,
    pieces: Vec<(Piece, Option<Encoding>)>,
    /// Which piece each case is of.
    cases: Vec<usize>,
    /// What the host executes in place of some pieces.
    stand_ins: Vec<StandIn>,
}

/// Cases for each piece of code, at most.
pub const EACH: usize = CASES / SLOTS;
/// Pieces of a batch that are random bytes.
const RAW: usize = 3;

fn make(batch: &mut Batch, number: u64, mut random: Random, shared: &Shared<'_>, maker: &Maker) {
    let settings = shared.settings;
    let climate = Climate::pick(&mut random);
    batch.pieces.clear();
    batch.cases.clear();
    let area = SLOTS * 2 * PAGE as usize;
    batch.arena[CODE_AT..CODE_AT + area].fill(0xcc);
    let all = &shared.encodings;
    batch.stand_ins.clear();
    let raw = if settings.code.is_none() { RAW } else { 0 };
    for slot in 0..SLOTS {
        let encoding = slot
            .checked_sub(raw)
            .map(|slot| all[(number as usize * (SLOTS - raw) + slot) % all.len()]);
        let written = (0..64).find_map(|_| {
            match encoding {
                Some(encoding) => piece(encoding, slot, &mut random, settings),
                None => bytes(slot, &mut random, settings),
            }
            .ok()
        });
        let Some(piece) = written else {
            continue;
        };
        let at = CODE_AT + slot * 2 * PAGE as usize;
        place(&mut batch.arena[at..at + 2 * PAGE as usize], &piece);
        if let Some(bytes) = piece.stand_in {
            let at = at + (piece.ip - code(slot)) as usize;
            batch.stand_ins.push((at, bytes));
        }
        let index = batch.pieces.len();
        // What is no instruction, or too long, is soon told.
        let each = match encoding {
            Some(encoding) if encoding.form == Form::TooLong => settings.each.min(2),
            _ if piece.undefined || piece.stand_in.is_some() => settings.each.min(4),
            _ => settings.each,
        };
        for _ in 0..each {
            let case = batch.cases.len();
            maker.make(
                &piece,
                climate,
                &mut random,
                of_mut(&mut batch.arena[IN_AT..], case),
            );
            batch.cases.push(index);
        }
        batch.pieces.push((piece, encoding));
    }
}

/// Where an instruction of some bytes lies: mostly anywhere, often at the end of a page.
fn position(slot: usize, length: u64, random: &mut Random) -> u64 {
    let start = code(slot);
    let length = length.max(1);
    match random.below(16) {
        0 => start + PAGE - length,
        1 | 2 => start + PAGE - 1 - random.below(length),
        3 => start + 2 * PAGE - length,
        4 if random.one_in(2) => start + 2 * PAGE - 1 - random.below(length),
        _ => start + 0x100 + random.below(PAGE - 0x200),
    }
}

fn piece(
    encoding: Encoding,
    slot: usize,
    random: &mut Random,
    settings: &Settings,
) -> Result<Piece, Refusal> {
    let bits = settings.bits;
    let guess = position(slot, 1 + random.below(8), random);
    let mut around = Surroundings {
        ip: guess,
        target: target(random, 16, false),
        landing: landing(slot, guess, random),
        near: guess
            .saturating_add_signed(random.next() as i8 as i64)
            .max(code(slot)),
        bits,
    };
    if random.one_in(8) {
        around.landing = guess.saturating_add_signed(random.next() as i32 as i64 / 4);
    }
    if encoding.code.mnemonic() == Mnemonic::Xchg {
        // It locks, and must not do so across cache lines.
        around.target &= !63;
    }
    let around_jump = around.near + 16 < guess || around.near > guess + 20;
    if !around_jump {
        around.near = guess + 40;
    }
    let bytes = write(encoding, &around, random).ok_or(Refusal::Unwritten)?;
    finish(slot, bytes, guess, settings)
}

/// Random bytes that are an instruction more often than not.
fn bytes(slot: usize, random: &mut Random, settings: &Settings) -> Result<Piece, Refusal> {
    let mut bytes = Vec::new();
    while random.one_in(3) && bytes.len() < 4 {
        bytes.push(random.pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x64, 0x65]));
    }
    if random.one_in(3) {
        bytes.push(0x40 | random.next() as u8 & 0xf);
    }
    match random.below(10) {
        0..=2 => {}
        3..=5 => bytes.push(0x0f),
        6 => bytes.extend([0x0f, 0x38]),
        7 => bytes.extend([0x0f, 0x3a]),
        8 => bytes.extend([0xc5, random.next() as u8]),
        _ => {
            let first = random.next() as u8 & 0xe0 | (1 + random.below(3) as u8);
            bytes.extend([0xc4, first, random.next() as u8]);
        }
    }
    bytes.push(random.next() as u8);
    let modrm = random.next() as u8;
    bytes.push(if random.one_in(2) {
        modrm | 0xc0
    } else {
        modrm
    });
    while bytes.len() < 16 {
        bytes.push(if random.one_in(2) {
            0
        } else {
            random.next() as u8
        });
    }
    let piece = Piece::new(slot, bytes.clone(), 0, settings.bits);
    let ip = position(slot, piece.bytes.len() as u64, random);
    finish(slot, bytes, ip, settings)
}

/// Admits a piece that ends in its slot's code, or where it ends, and of which the host can judge.
fn finish(slot: usize, bytes: Vec<u8>, ip: u64, settings: &Settings) -> Result<Piece, Refusal> {
    let (level, bits) = (settings.campaign.level, settings.bits);
    let mut piece = Piece::new(slot, bytes, ip, bits);
    let instruction = &piece.instruction;
    // What is no instruction has no end: how much of it is fetched before #UD is the CPU's choice.
    if piece.undefined && piece.ip % PAGE > PAGE - 32 {
        return Err(Refusal::Otherwise);
    }
    // What has the prefix of AVX the host may know where the profile does not.
    let opcode = piece.bytes.iter().find(|byte| !is_prefix(**byte));
    let vex = matches!(opcode, Some(0xc4 | 0xc5));
    if instruction.code() == Code::INVALID {
        if level != Level::V3 && vex {
            return Err(Refusal::Nobody("have AVX's prefix, which the host knows"));
        }
    } else if !(piece.undefined && admits(level, instruction.code(), bits)) {
        match judge_of(level, instruction, bits) {
            Judge::Host => {}
            Judge::Nobody(why) => return Err(Refusal::Nobody(why)),
            Judge::StandIn(_) if piece.next() > code(slot) + 2 * PAGE => {
                return Err(Refusal::Otherwise);
            }
            Judge::StandIn(bytes) => piece.stand_in = Some(bytes),
        }
    }
    let instruction = &piece.instruction;
    // A jump to itself has no end; one into itself is another program.
    if matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Call
            | FlowControl::XbeginXabortXend
    ) && instruction.near_branch_target() != 0
    {
        let to = instruction.near_branch_target();
        if to + 16 > piece.ip && to < piece.next() + 20 && to != piece.next() {
            return Err(Refusal::Otherwise);
        }
    }
    // Operands that the code itself names must not be the code.
    if instruction.is_ip_rel_memory_operand()
        && crate::layout::is_near(instruction.memory_displacement64())
    {
        let to = instruction.memory_displacement64();
        if to < crate::layout::data(0) {
            return Err(Refusal::Otherwise);
        }
    }
    Ok(piece)
}

/// Writes a piece and the jump that ends its cases into a slot.
fn place(pages: &mut [u8], piece: &Piece) {
    let base = code(piece.slot);
    let at = (piece.ip - base) as usize;
    let mut put = |at: usize, bytes: &[u8]| {
        for (index, byte) in bytes.iter().enumerate() {
            if let Some(place) = pages.get_mut(at + index) {
                *place = *byte;
            }
        }
    };
    put(at, &piece.bytes);
    let next = at + piece.bytes.len();
    if piece.bits == 64 {
        let distance = crate::layout::EXIT.wrapping_sub(base + next as u64 + 5) as u32;
        let mut jump = vec![0xe9];
        jump.extend(distance.to_le_bytes());
        put(next, &jump);
    } else {
        // jmp 0x33:exit
        let mut jump = vec![0xea];
        jump.extend((crate::layout::EXIT as u32).to_le_bytes());
        jump.extend([0x33, 0]);
        put(next, &jump);
    }
}

/// What a thread has.
struct Worker {
    bench: Bench,
    host: Host,
    data: Vec<u8>,
}

fn work(shared: &Shared<'_>) -> Result<(), OracleError> {
    let Campaign { level, engines, .. } = &shared.settings.campaign;
    let mut worker = Worker {
        bench: Bench::new(*level, engines, false)?,
        host: Host::new(),
        data: Vec::new(),
    };
    let maker = Maker::new(*level == Level::V3);
    let mut batch = Batch {
        arena: arena(),
        pieces: Vec::new(),
        cases: Vec::new(),
        stand_ins: Vec::new(),
    };
    while let Some((number, random)) = shared.course.next() {
        let mut times = Times::default();
        timed(&mut times.making, || {
            make(&mut batch, number, random, shared, &maker)
        });
        worker.judge(&mut batch, number, shared, &mut times)?;
    }
    let Ok(mut guard) = shared.report.lock() else {
        return Ok(());
    };
    guard.0.deaths += worker.bench.native.deaths;
    Ok(())
}

/// A difference: on which engine, in which case, and what.
type Found = (usize, usize, Vec<String>);

impl Worker {
    fn judge(
        &mut self,
        batch: &mut Batch,
        number: u64,
        shared: &Shared<'_>,
        times: &mut Times,
    ) -> Result<(), OracleError> {
        let cases = batch.cases.len();
        self.bench.stand_ins.clone_from(&batch.stand_ins);
        self.bench.run(&mut batch.arena, cases, 0, cases, times)?;
        let begun = Instant::now();
        let mut found = Vec::new();
        let (mut faults, mut unjudged) = (0, 0);
        let mut covered = Vec::new();
        let mut waived = Vec::new();
        // Which of them faults is the processor's choice, and so what they write.
        let mut open = BTreeSet::new();
        self.repeat_late(batch, times)?;
        for (case, &piece) in batch.cases.iter().enumerate() {
            let (native, outcomes) = self.bench.outcome(case);
            let (piece, encoding) = &batch.pieces[piece];
            let done = quad(native, at::VECTOR) == vector::NONE;
            faults += u64::from(!done);
            if quad(native, at::VECTOR) == vector::TIMEOUT {
                eprintln!(
                    "not judged: {:?} {:02x?} at {:#x}, batch {number} case {case}\n    {}",
                    piece.instruction.code(),
                    piece.bytes,
                    piece.ip,
                    judge::describe(of(&batch.arena[IN_AT..], case)),
                );
                unjudged += 1;
                continue;
            }
            if let Some(encoding) = encoding {
                covered.push((*encoding, done));
            }
            let input = of(&batch.arena[IN_AT..], case);
            for (engine, outcome) in outcomes.enumerate() {
                let judgement = judge::differences(self.host, Some(piece), input, native, outcome);
                if judgement.open {
                    open.insert(case);
                }
                waived.extend(judgement.waived);
                if !judgement.differences.is_empty() {
                    found.push((engine, case, judgement.differences));
                }
            }
        }
        covered.dedup();
        let suspects = self.differing_data()?;
        if !open.is_empty() {
            found = self.again(batch, &found, times)?;
        }
        self.compare_data(batch, suspects, &open, &mut found, times)?;
        times.comparing += begun.elapsed();
        let Ok(mut guard) = shared.report.lock() else {
            return Ok(());
        };
        let (report, all_covered, all_completed) = &mut *guard;
        report.batches += 1;
        report.cases += cases as u64 - unjudged;
        report.unjudged += unjudged;
        report.faults += faults;
        for waiver in waived {
            *report.waived.entry(waiver).or_default() += 1;
        }
        for (encoding, done) in covered {
            all_covered.insert(encoding);
            if done {
                all_completed.insert(encoding);
            }
        }
        report.times.add(times);
        let mut formatter = iced_x86::FastFormatter::new();
        for (engine, case, lines) in found {
            report.different += 1;
            let (piece, encoding) = &batch.pieces[batch.cases[case]];
            let code = format!("{:?}", piece.instruction.code());
            let same = report
                .differences
                .iter()
                .filter(|difference| {
                    difference.code == code
                        && difference.engine == self.bench.engines[engine].kind()
                })
                .count();
            if same < 2 {
                let mut name = String::new();
                formatter.format(&piece.instruction, &mut name);
                let form = encoding.map(|encoding| encoding.form);
                let bytes: String = piece
                    .bytes
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                let text = format!(
                    "{}: {name} [{bytes} at {:#x}, {:?}, {form:?}], batch {number} case {case}, seed {:#x}\n    {}\n    from {}",
                    self.bench.engines[engine].kind().name(),
                    piece.ip,
                    piece.instruction.code(),
                    shared.settings.campaign.seed,
                    lines.join("\n    "),
                    judge::describe(of(&batch.arena[IN_AT..], case)),
                );
                // Who runs it for hours need not wait for the end, and keeps it if the run is stopped.
                eprintln!("{text}\n");
                report.differences.push(Difference {
                    engine: self.bench.engines[engine].kind(),
                    code,
                    text,
                });
            }
        }
        let Report {
            cases, different, ..
        } = *report;
        shared.course.note(cases, "cases", different);
        Ok(())
    }

    /// Cases that took the host long are done again, each alone: it may have done something else meanwhile.
    fn repeat_late(&mut self, batch: &mut Batch, times: &mut Times) -> Result<(), OracleError> {
        let cases = batch.cases.len();
        for case in 0..cases {
            for _ in 0..3 {
                if quad(self.bench.outcome(case).0, at::VECTOR) != vector::TIMEOUT {
                    break;
                }
                self.bench.run(&mut batch.arena, cases, case, 1, times)?;
            }
        }
        Ok(())
    }

    /// What of differences remains if each case begins with memory that no other has written: what an open one did to it
    /// is not compared, and another may read it.
    fn again(
        &mut self,
        batch: &mut Batch,
        found: &[Found],
        times: &mut Times,
    ) -> Result<Vec<Found>, OracleError> {
        let cases = batch.cases.len();
        let mut remaining = Vec::new();
        for &(engine, case, _) in found {
            self.bench.run(&mut batch.arena, cases, case, 1, times)?;
            let (piece, _) = &batch.pieces[batch.cases[case]];
            let input = of(&batch.arena[IN_AT..], case);
            let (native, mut outcomes) = self.bench.outcome(case);
            let Some(outcome) = outcomes.nth(engine) else {
                continue;
            };
            let lines = judge::differences(self.host, Some(piece), input, native, outcome);
            drop(outcomes);
            if !lines.differences.is_empty() {
                remaining.push((engine, case, lines.differences));
            }
            self.differing_data()?;
        }
        Ok(remaining)
    }

    /// Finds the case that made memory different that no window shows, and clears it.
    fn compare_data(
        &mut self,
        batch: &mut Batch,
        mut suspects: Vec<(usize, String)>,
        open: &BTreeSet<usize>,
        found: &mut Vec<Found>,
        times: &mut Times,
    ) -> Result<(), OracleError> {
        let cases = batch.cases.len();
        if !suspects.is_empty() && found.is_empty() {
            // Each case alone shows which.
            for case in 0..cases {
                self.bench.run(&mut batch.arena, cases, case, 1, times)?;
                let lines = self.differing_data()?;
                if !open.contains(&case) {
                    found.extend(
                        lines
                            .into_iter()
                            .map(|(engine, line)| (engine, case, vec![line])),
                    );
                }
            }
            if found.is_empty() && open.is_empty() {
                suspects.truncate(1);
                for (engine, line) in suspects {
                    found.push((
                        engine,
                        0,
                        vec![format!("in the batch, not in any case alone: {line}")],
                    ));
                }
            }
        }
        Ok(())
    }

    /// Compares memory that no window shows, and clears it.
    fn differing_data(&mut self) -> Result<Vec<(usize, String)>, OracleError> {
        let mut lines = Vec::new();
        for page in [0, 1, 3] {
            let from = data_offset(0, page);
            self.data.resize(PAGE as usize, 0);
            for (index, engine) in self.bench.engines.iter_mut().enumerate() {
                engine.get(from, &mut self.data)?;
                let native = &mut self.bench.native.arena()[from..from + PAGE as usize];
                if let Some(position) = native
                    .iter()
                    .zip(&self.data)
                    .position(|(one, other)| one != other)
                {
                    let linear = crate::layout::data(0) + crate::layout::DATA_PAGES[page] * PAGE;
                    lines.push((
                        index,
                        format!(
                            "memory outside windows at {:#x}: {:02x?}, natively {:02x?}",
                            linear + position as u64,
                            &self.data[position..(position + 16).min(PAGE as usize)],
                            &native[position..(position + 16).min(PAGE as usize)],
                        ),
                    ));
                }
                if self.data.iter().any(|byte| *byte != 0) {
                    engine.put(from, &[0; PAGE as usize])?;
                }
            }
            let native = &mut self.bench.native.arena()[from..from + PAGE as usize];
            native.fill(0);
        }
        Ok(lines)
    }
}
