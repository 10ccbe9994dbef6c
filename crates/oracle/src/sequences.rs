//! Sequences: random programs, natively and on the engines.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use trapgate_x86::profile::Level;
use trapgate_x86::registers::rflags;

use crate::amd;
use crate::bench::{Bench, OracleError, Times, arena, timed};
use crate::campaign::{Campaign, Course};
use crate::engine::{Engine, Kind};
use crate::host::Host;
use crate::images::Images;
use crate::judge::{self, Waiver};
use crate::layout::record as at;
use crate::layout::{
    BACKED_DATA, CODE_AT, DATA_AT, EXIT, IN_AT, PAGE, READ_ONLY, SLOTS, code, data, data_offset,
    vector,
};
use crate::programs::{PIECE, PIECES, Place, Program};
use crate::random::Random;
use crate::record::{Start, of, of_mut, put, quad};
use crate::straight::Straight;

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Programs compared, on each engine.
    pub programs: u64,
    /// Of them, those that faulted.
    pub faults: u64,
    /// Programs that the host did not end in time.
    pub unjudged: u64,
    /// Programs in which something differed that does not count, by reason.
    pub waived: BTreeMap<Waiver, u64>,
    /// Jumps that the programs made natively.
    pub jumps: u64,
    /// Children that died.
    pub deaths: u64,
    /// Differences, the first of them in words.
    pub differences: Vec<String>,
    /// How many there were.
    pub different: u64,
    /// Where time went.
    pub times: Times,
}

/// Offsets in a slot's second page of code: the counter, and the table of pieces.
const COUNTER: u64 = PAGE + 0x800;
const TABLE: u64 = PAGE + 0x900;

/// A program's places.
fn place(slot: usize, random: &mut Random) -> Place {
    let (start, data) = (code(slot), data(slot));
    Place {
        base: start + random.below(PIECE),
        counter: start + COUNTER,
        table: start + TABLE,
        data: (data + PAGE, 2 * PAGE),
        stack: data + 6 * PAGE + 0x800,
        nowhere: data + 3 * PAGE + 0x10,
        end: Some(EXIT),
    }
}

/// Writes the program of a slot, its data and its record.
fn write(
    arena: &mut [u8],
    slot: usize,
    straight: &mut Straight,
    images: &Images,
    random: &mut Random,
) {
    let place = place(slot, random);
    let jumps = 10 + random.below(100);
    for chunk in arena[data_offset(slot, 0)..data_offset(slot, READ_ONLY)].chunks_mut(8) {
        let value = if random.one_in(3) {
            random.lane()
        } else {
            random.next()
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    let stack = data_offset(slot, 3);
    for chunk in arena[stack..stack + PAGE as usize].chunks_mut(8) {
        // Whatever is returned to.
        let piece = place.base + random.below(PIECES) * PIECE;
        chunk.copy_from_slice(&piece.to_le_bytes());
    }
    let mut program = Program {
        random,
        computing: straight,
        place,
    };
    let pages = &mut arena[CODE_AT + slot * 2 * PAGE as usize..][..2 * PAGE as usize];
    pages.fill(0xcc);
    for number in 0..PIECES {
        let piece = program.piece(number);
        let from = (piece.start - code(slot)) as usize;
        pages[from..from + piece.bytes.len()].copy_from_slice(&piece.bytes);
        put(
            pages,
            TABLE as usize + number as usize * 8,
            place.base + number * PIECE,
        );
    }
    put(pages, COUNTER as usize, jumps);

    let record = of_mut(&mut arena[IN_AT..], slot);
    record.fill(0);
    record[at::XSAVE..at::MEMORY].copy_from_slice(images.pick(random));
    // All exceptions masked, and none pending: a program would hardly begin.
    record[at::XSAVE] |= 0x3f;
    record[at::XSAVE + 24] |= 0x80;
    record[at::XSAVE + 25] |= 0x1f;
    let mut start = Start {
        flags: rflags::ONE | rflags::IF | random.next() & rflags::ARITHMETIC,
        rip: place.base,
        bases: [data(slot) + PAGE, data(slot) + PAGE + 0x400],
        ..Start::default()
    };
    for register in &mut start.gpr {
        *register = random.integer();
    }
    start.gpr[4] = place.stack;
    start.write(record);
}

/// Runs programs.
///
/// # Errors
/// [`OracleError`] if the host or an engine could not be asked; differences are no errors.
pub fn run(campaign: &Campaign) -> Result<Report, OracleError> {
    let report = Mutex::new(Report::default());
    let course = Course::new(campaign);
    course.run(|| work(campaign, &course, &report))?;
    let Ok(report) = report.into_inner() else {
        unreachable!("no thread panicked")
    };
    Ok(report)
}

/// Bytes of all data.
const DATA_BYTES: usize = SLOTS * BACKED_DATA * PAGE as usize;
/// Bytes of all code.
const CODE_BYTES: usize = SLOTS * 2 * PAGE as usize;

fn work(campaign: &Campaign, course: &Course<'_>, all: &Mutex<Report>) -> Result<(), OracleError> {
    let mut engines = campaign.engines.clone();
    if engines.contains(&Kind::Translator) {
        engines.push(Kind::Inexact);
    }
    let mut bench = Bench::new(campaign.level, &engines, true)?;
    let images = Images::new(campaign.level == Level::V3);
    let mut straight = Straight::new(campaign.level);
    let mut arena = arena();
    let mut memory = vec![0; CODE_BYTES + DATA_BYTES];
    let host = Host::new();
    while let Some((number, mut random)) = course.next() {
        let mut report = Report::default();
        let mut times = Times::default();
        timed(&mut times.making, || {
            for slot in 0..SLOTS {
                write(&mut arena, slot, &mut straight, &images, &mut random);
            }
        });
        let data = DATA_AT..DATA_AT + DATA_BYTES;
        bench.native.arena()[data.clone()].copy_from_slice(&arena[data.clone()]);
        for engine in &mut bench.engines {
            engine.put(DATA_AT, &arena[data.clone()])?;
        }
        match bench.run(&mut arena, SLOTS, 0, SLOTS, &mut times) {
            Err(OracleError::Native(crate::native::NativeError::Died { .. })) => {
                // A program has found the child's own memory: nobody can judge the batch.
                report.unjudged += SLOTS as u64;
                report.deaths += 1;
            }
            other => {
                other?;
                let begun = Instant::now();
                judge_batch(
                    &mut bench,
                    host,
                    &arena,
                    &mut memory,
                    number,
                    campaign.seed,
                    &mut report,
                )?;
                times.comparing += begun.elapsed();
            }
        }
        report.times = times;
        let Ok(mut all) = all.lock() else {
            return Ok(());
        };
        let Report {
            programs,
            faults,
            unjudged,
            waived,
            jumps,
            deaths,
            differences,
            different,
            times,
        } = report;
        all.programs += programs;
        all.faults += faults;
        all.unjudged += unjudged;
        for (waiver, count) in waived {
            *all.waived.entry(waiver).or_default() += count;
        }
        all.jumps += jumps;
        all.deaths += deaths;
        all.different += different;
        all.times.add(&times);
        if all.differences.len() < 20 {
            all.differences.extend(differences);
        }
        course.note(all.programs, "programs", all.different);
    }
    Ok(())
}

fn judge_batch(
    bench: &mut Bench,
    host: Host,
    arena: &[u8],
    memory: &mut [u8],
    number: u64,
    seed: u64,
    report: &mut Report,
) -> Result<(), OracleError> {
    let mut found: Vec<(usize, usize, Vec<String>)> = Vec::new();
    let mut late = [false; SLOTS];
    let kinds: Vec<Kind> = bench.engines.iter().map(Engine::kind).collect();
    let ends: Vec<bool> = (0..SLOTS)
        .map(|slot| host.is_amd() && ends_in_comparison(bench, slot))
        .collect();
    for (slot, late) in late.iter_mut().enumerate() {
        let (native, outcomes) = bench.outcome(slot);
        if quad(native, at::VECTOR) == vector::TIMEOUT {
            *late = true;
            report.unjudged += 1;
            continue;
        }
        report.programs += 1;
        report.faults += u64::from(quad(native, at::VECTOR) != vector::NONE);
        let input = of(&arena[IN_AT..], slot);
        for (engine, outcome) in outcomes.enumerate() {
            let mut outcome = outcome.to_vec();
            if ends[slot] {
                for way in amd::settle_comparison(native, &mut outcome) {
                    *report.waived.entry(Waiver::Amd(way)).or_default() += 1;
                }
            }
            if kinds[engine] == Kind::Inexact {
                take_unseen_flags(&mut outcome, native);
            }
            let judgement = judge::differences(host, None, input, native, &outcome);
            for waiver in judgement.waived {
                *report.waived.entry(waiver).or_default() += 1;
            }
            if !judgement.differences.is_empty() {
                found.push((engine, slot, judgement.differences));
            }
        }
    }
    for engine in 0..bench.engines.len() {
        let (code_part, data_part) = memory.split_at_mut(CODE_BYTES);
        bench.engines[engine].get(CODE_AT, code_part)?;
        bench.engines[engine].get(DATA_AT, data_part)?;
        let native = bench.native.arena();
        for (slot, late) in late.into_iter().enumerate() {
            let code_bytes = 2 * PAGE as usize;
            let data_bytes = BACKED_DATA * PAGE as usize;
            let parts = [
                ("code", slot * code_bytes, code_bytes, CODE_AT, &*code_part),
                ("data", slot * data_bytes, data_bytes, DATA_AT, &*data_part),
            ];
            for (name, from, length, area, ours) in parts {
                let native = &native[area + from..area + from + length];
                let ours = &ours[from..from + length];
                if native != ours && !late {
                    let first = native
                        .iter()
                        .zip(ours)
                        .position(|(one, other)| one != other)
                        .unwrap_or(0);
                    let end = (first + 16).min(length);
                    let line = format!(
                        "{name} at offset {first:#x}: {:02x?}, natively {:02x?}",
                        &ours[first..end],
                        &native[first..end]
                    );
                    match found
                        .iter_mut()
                        .find(|(e, s, _)| (*e, *s) == (engine, slot))
                    {
                        Some((_, _, lines)) => lines.push(line),
                        None => found.push((engine, slot, vec![line])),
                    }
                }
            }
            if engine == 0 {
                let counter = CODE_AT + slot * code_bytes + COUNTER as usize;
                let before = quad(arena, counter) as i32;
                let after = quad(native, counter) as i32;
                report.jumps += (before - after).max(0) as u64;
            }
        }
    }
    for (engine, slot, lines) in found {
        report.different += 1;
        let (native, _) = bench.outcome(slot);
        let end = format!(
            "vector {:#x} at {:#x}",
            quad(native, at::VECTOR),
            quad(native, at::RIP)
        );
        let text = format!(
            "{}: program {slot} of batch {number}, seed {:#x}, natively ended with {end}\n    {}\n    from {}\n{}",
            bench.engines[engine].kind().name(),
            seed,
            lines.join("\n    "),
            judge::describe(of(&arena[IN_AT..], slot)),
            listing(arena, slot),
        );
        // Who runs it for hours need not wait for the end, and keeps it if the run is stopped.
        eprintln!("{text}\n");
        report.differences.push(text);
    }
    Ok(())
}

/// Whether a program ended natively by the fault of a comparison of strings ([`amd::Way::StringFlags`]).
fn ends_in_comparison(bench: &mut Bench, slot: usize) -> bool {
    let (native, _) = bench.outcome(slot);
    let at = quad(native, at::RIP).wrapping_sub(code(slot));
    if quad(native, at::VECTOR) == vector::NONE || at >= 2 * PAGE {
        return false;
    }
    let arena = bench.native.arena();
    let pages = &arena[CODE_AT + slot * 2 * PAGE as usize..][..2 * PAGE as usize];
    let bytes = &pages[at as usize..];
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    amd::compares_strings(&instruction)
}

/// Takes the arithmetic flags that an exception saved from the host: no code would have read them.
fn take_unseen_flags(outcome: &mut [u8], native: &[u8]) {
    if quad(native, at::VECTOR) != vector::NONE {
        let host = quad(native, at::FLAGS) & rflags::ARITHMETIC;
        let flags = quad(outcome, at::FLAGS) & !rflags::ARITHMETIC | host;
        put(outcome, at::FLAGS, flags);
    }
}

/// A program's code.
fn listing(arena: &[u8], slot: usize) -> String {
    let pages = &arena[CODE_AT + slot * 2 * PAGE as usize..][..2 * PAGE as usize];
    let start = (quad(of(&arena[IN_AT..], slot), at::RIP) - code(slot)) as usize;
    let mut text = String::new();
    let mut formatter = iced_x86::FastFormatter::new();
    for number in 0..PIECES as usize {
        let from = start + number * PIECE as usize;
        let bytes = &pages[from..from + PIECE as usize];
        let mut decoder =
            Decoder::with_ip(64, bytes, code(slot) + from as u64, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.mnemonic() == Mnemonic::Int3 {
                break;
            }
            let mut line = String::new();
            formatter.format(&instruction, &mut line);
            text.push_str(&format!("    {:x} {line}\n", instruction.ip()));
        }
    }
    text
}
