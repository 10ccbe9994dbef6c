//! What lockstep says when translator and interpreter do not agree.

use std::fmt::Write;

use iced_x86::{FastFormatter, Instruction};
use trapgate_interp::Reader;
use trapgate_interp::cpu::Cpu;
use trapgate_x86::profile::Level;

use super::{End, Lockstep, guide_ip, same_system, same_x87};
use crate::unit::MOST;

impl Lockstep {
    /// Runs the first instruction of the block alone, then the first two, and so on, until there is a difference:
    /// the last of them is at fault. The machine is not used after this.
    pub(super) fn find_culprit(&mut self, count: usize) -> String {
        for most in 1..=count + 1 {
            self.reference.cpu.put_memory_back();
            self.reference.cpu.run_again();
            let context = self.jit.whole();
            context.interp.cpu.follow(&self.reference.cpu);
            context.forget_all_code();
            context.rust.translator.most = most;
            let found = self.find();
            self.jit.whole().rust.translator.most = MOST;
            let Ok(Some(block)) = found else {
                break;
            };
            self.reference.cpu.begin_run();
            let (count, ends) = self.run_interpreter(block, most);
            let (end, _) = self.run_guided(block, count, ends);
            let undefined = self.undefined(block, count);
            if !self.agrees(ends, end, undefined) {
                let Some(Some(guide)) = self.guides.get(block as usize) else {
                    break;
                };
                let step = guide.steps.get(most - 1).or(guide.steps.last());
                let ip = step.map_or(guide.rip, |step| step.ip);
                let code = &guide.code[(ip - guide.rip) as usize..];
                let mut line = String::new();
                let context = self.jit.whole();
                let (level, bits) = (context.interp.cpu.profile.level, context.bits_of(block));
                disassemble(&mut line, (level, bits), code, ip, 1);
                return format!("the instruction at fault:\n{line}");
            }
        }
        "no single instruction is at fault: run alone they agree\n".to_owned()
    }

    /// What differs.
    pub(super) fn describe(
        &mut self,
        block: u32,
        ends: End,
        end: End,
        count: usize,
        undefined: u64,
    ) -> String {
        let start = guide_ip(&self.guides, block, 0);
        let context = self.jit.whole();
        let stray = context.rust.watch.as_ref().and_then(|watch| watch.stray);
        let (found, expected) = (&context.interp.cpu, &self.reference.cpu);
        let (gpr, flags) = expected.before_run();
        let mut text = format!(
            "lockstep: a difference after {count} instructions of the block at {start:#x} (CPL {}, CR3 {:#x}), \
             block {} of the run\n{:12} {:18} {:18} {:18}\n",
            found.cpl,
            found.sys.cr3,
            self.compared.blocks,
            "",
            "before",
            "interpreter",
            "translator"
        );
        let mut line = |name: &str, before: u64, expected: u64, found: u64| {
            if expected != found {
                let _ = writeln!(
                    text,
                    "{name:12} {before:#018x} {expected:#018x} {found:#018x}"
                );
            }
        };
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        for (index, name) in NAMES.iter().enumerate() {
            line(
                name,
                gpr[index],
                expected.regs.gpr[index],
                found.regs.gpr[index],
            );
        }
        line("rip", start, expected.rip, found.rip);
        line(
            "rflags",
            flags,
            expected.rflags() & !undefined,
            found.rflags() & !undefined,
        );
        let mxcsr = |cpu: &Cpu| u64::from(cpu.regs.mxcsr);
        line("mxcsr", 0, mxcsr(expected), mxcsr(found));
        for index in 0..16 {
            let parts = |cpu: &Cpu, part: usize| {
                let mut word = [0; 8];
                word.copy_from_slice(&cpu.regs.vector[index].0[part * 8..part * 8 + 8]);
                u64::from_le_bytes(word)
            };
            for part in 0..4 {
                let name = format!("ymm{index}[{part}]");
                line(&name, 0, parts(expected, part), parts(found, part));
            }
        }
        if let Some(memory) = expected.memory_difference() {
            let name = format!("{:#x}", memory.gpa);
            line(&name, memory.before, memory.expected, memory.found);
        }
        if !same_x87(&found.regs.x87.0, &expected.regs.x87.0) {
            let _ = writeln!(text, "the x87 state differs");
        }
        if !same_system(found, expected) {
            let _ = writeln!(
                text,
                "system registers differ:\ninterpreter {:x?}\ntranslator {:x?}",
                expected.sys, found.sys
            );
        }
        if let Some((rip, linear)) = stray {
            let _ = writeln!(
                text,
                "the translator's code of the instruction at {rip:#x} writes to {linear:#x}, the interpreter does not"
            );
        }
        if ends != end || end == End::Fault && found.exception != expected.exception {
            let _ = writeln!(
                text,
                "the interpreter's run ended {}, the translator's {}",
                how(ends, expected),
                how(end, found)
            );
        }
        text
    }

    /// Guest and host code of a block.
    pub(super) fn disassembled(&mut self, block: u32) -> String {
        let Some(Some(guide)) = self.guides.get(block as usize) else {
            return String::new();
        };
        let mut text = "guest code:\n".to_owned();
        let context = self.jit.whole();
        let (level, bits) = (context.interp.cpu.profile.level, context.bits_of(block));
        disassemble(&mut text, (level, bits), &guide.code, guide.rip, usize::MAX);
        text.push_str("host code:\n");
        let (from, to) = guide.host;
        let code = &self.jit.whole().rust.code;
        let host = (Level::V3, 64);
        disassemble(&mut text, host, code.bytes(from, to), from, usize::MAX);
        text
    }
}

fn how(end: End, cpu: &Cpu) -> String {
    match end {
        End::After => format!("after the instruction before {:#x}", cpu.rip),
        End::Before => format!("before what is done once, at {:#x}", cpu.rip),
        End::Fault => format!("with {:x?} at {:#x}", cpu.exception, cpu.rip),
        End::Stopped => format!("with a processor that stopped, at {:#x}", cpu.rip),
    }
}

/// Appends at most `most` lines.
fn disassemble(
    text: &mut String,
    (level, bits): (Level, u32),
    code: &[u8],
    start: u64,
    most: usize,
) {
    let mut formatter = FastFormatter::new();
    let mut reader = Reader::new(level, bits, code, start);
    let mut instruction = Instruction::default();
    let mut lines = 0;
    while reader.can_read() && lines < most {
        let at = reader.position();
        reader.read(&mut instruction);
        let bytes: String = code[at..reader.position()]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut words = String::new();
        formatter.format(&instruction, &mut words);
        let _ = writeln!(text, "  {:#x}: {bytes:22} {words}", start + at as u64);
        lines += 1;
    }
}
