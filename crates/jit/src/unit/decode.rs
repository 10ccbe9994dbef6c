//! Which guest instructions make a unit, and which of the flags between them are needed.

use iced_x86::{Code, FlowControl, Instruction};
use trapgate_interp::Reader;
use trapgate_x86::profile::Level;

use super::{Request, Translator, Unit};
use crate::instruction::{FLAGS, Guest, Kind, Undefined, classify, flag_use};

/// Most bytes of a loop whose accesses are taken to be few.
const LOOP: u64 = 2048;
/// Instructions that a look ahead for flags reads.
const AHEAD: usize = 12;

impl Translator {
    pub(super) fn decode(&mut self, request: &Request<'_>, unit: &mut Unit) -> Option<()> {
        self.guests.clear();
        let offset = (request.rip & 0xfff) as usize;
        let bytes = &request.page[offset..];
        let mut reader = Reader::new(self.level, request.mode.bits(), bytes, request.rip);
        let mut instruction = Instruction::default();
        let mut mode = request.mode;
        let most = if request.second.is_some() {
            1
        } else {
            self.most
        };
        let mut undefined = Undefined::default();
        while reader.can_read() && self.guests.len() < most {
            let start = reader.position();
            reader.read(&mut instruction);
            if instruction.is_invalid() {
                let rest = bytes.len() - start;
                if reader.is_cut() && rest < 15 {
                    break;
                }
                // The interpreter raises what is due.
                instruction = Instruction::default();
                instruction.set_len(1);
                instruction.set_ip(request.rip + start as u64);
                self.push(instruction, Kind::OperateLast);
                unit.length = start as u64 + 15.min(rest as u64);
                break;
            }
            // Who compares what this does with what the interpreter does takes over what it left undefined first.
            if request.exact && undefined.is_read_by(&instruction) {
                break;
            }
            undefined.after(&instruction);
            #[cfg(test)]
            if let Some(fault) = self.fault {
                fault(&mut instruction);
            }
            plain_offset(&mut instruction);
            let mut kind = classify(&instruction, mode);
            let once = self.repeats && matches!(kind, Kind::ReadTime { .. });
            if once || trapgate_interp::is_lacking(self.level, &instruction) {
                kind = Kind::Operate;
            }
            if let Kind::Access(set) = kind {
                mode = mode.with_access(set);
            }
            self.push(instruction, kind);
            unit.length = reader.position() as u64;
            // Units that are run one by one end at each CALL.
            let goes_on = kind.is_call() && !self.repeats && request.is_returned_to(&instruction);
            if kind.ends() && !goes_on {
                break;
            }
        }
        unit.instructions = self.guests.len() as u32;
        (!self.guests.is_empty()).then_some(())
    }

    pub(super) fn push(&mut self, instruction: Instruction, kind: Kind) {
        let (reads, kills, modifies) = match kind {
            Kind::Operate | Kind::OperateLast => (FLAGS, 0, FLAGS),
            // Division leaves the flags undefined; the checks around it change them.
            Kind::Divide { .. } => (0, FLAGS, FLAGS),
            Kind::Nothing | Kind::Verbatim | Kind::Lea => (0, 0, 0),
            Kind::Count(..) => (0, 0, 0),
            Kind::PushFlags => (FLAGS, 0, 0),
            Kind::SystemCall => (FLAGS, 0, FLAGS),
            Kind::PopFlags | Kind::SystemReturn => (0, FLAGS, FLAGS),
            Kind::ReadTime { .. } => (0, 0, 0),
            Kind::Direction(_)
            | Kind::Interrupts(_)
            | Kind::Access(_)
            | Kind::SwapGs
            | Kind::Selector(_)
            | Kind::SelectorWord(_)
            | Kind::ReadBase(_)
            | Kind::WriteBase(_)
            | Kind::ControlWord
            | Kind::LoadControlWord
            | Kind::Wait
            | Kind::StoreMxcsr
            | Kind::LoadMxcsr
            | Kind::String(_) => (0, 0, 0),
            _ => flag_use(&instruction),
        };
        self.guests.push(Guest {
            instruction,
            kind,
            reads,
            kills,
            modifies,
            live_in: FLAGS,
            live_out: FLAGS,
        });
    }

    pub(super) fn work_out_flags(&mut self, request: &Request<'_>, unit: &mut Unit) {
        let look = |unit: &mut Unit, target: u64| {
            if request.exact {
                FLAGS
            } else {
                look_ahead(self.level, request, unit, target, 2)
            }
        };
        let mut live = match self.guests.last() {
            None => FLAGS,
            Some(guest) => match guest.kind {
                Kind::Jump(target) | Kind::Call(target) => look(unit, target),
                Kind::Count(_, target) => {
                    look(unit, target) | look(unit, guest.instruction.next_ip())
                }
                kind if kind.ends() => FLAGS,
                _ => look(unit, guest.instruction.next_ip()),
            },
        };
        for guest in self.guests.iter_mut().rev() {
            match guest.kind {
                Kind::JumpIf(_, target) => live |= look(unit, target),
                Kind::Call(target) => live = look(unit, target),
                Kind::CallIndirect => live = FLAGS,
                _ => {}
            }
            guest.live_out = live;
            live = live & !guest.kills | guest.reads;
            if request.exact {
                live = FLAGS;
            }
            guest.live_in = live;
        }
        unit.any_flags = live == 0;
    }
}

/// MOV between the accumulator and an address in the instruction, as one with any memory operand.
pub(super) fn plain_offset(instruction: &mut Instruction) {
    let code = match instruction.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    instruction.set_code(code);
}

/// Loops that end in a unit: the targets of jumps that go back a little, and the jumps.
pub(super) fn loops(guests: &[Guest]) -> Vec<(u64, u64)> {
    let jumps = guests.iter().filter_map(|guest| match guest.kind {
        Kind::Jump(target) | Kind::JumpIf(_, target) | Kind::Count(_, target) => {
            Some((target, guest.instruction.ip()))
        }
        _ => None,
    });
    jumps
        .filter(|(target, jump)| target <= jump && jump - target <= LOOP)
        .collect()
}

/// Flags that code at `target` may read before it overwrites them: all of them where that can't be seen.
pub(super) fn look_ahead(
    level: Level,
    request: &Request<'_>,
    unit: &mut Unit,
    target: u64,
    depth: u32,
) -> u32 {
    let page = request.rip & !0xfff;
    let (mut live, mut open) = (0, FLAGS);
    let mut at = target;
    let mut instruction = Instruction::default();
    for _ in 0..AHEAD {
        if at & !0xfff != page || open == 0 || request.second.is_some() {
            break;
        }
        let offset = (at & 0xfff) as usize;
        let bytes = &request.page[offset..];
        let bytes = &bytes[..bytes.len().min(15)];
        let mut reader = Reader::new(level, request.mode.bits(), bytes, at);
        reader.read(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        unit.seen
            .push((offset as u16, (offset + instruction.len()) as u16));
        let (reads, kills, _) = flag_use(&instruction);
        live |= reads & open;
        open &= !(kills | reads);
        match instruction.flow_control() {
            // Who looks at a processor that waits sees its flags.
            FlowControl::Next if instruction.code() == Code::Hlt => break,
            FlowControl::Next => at = instruction.next_ip(),
            FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
                at = instruction.near_branch_target();
            }
            FlowControl::Call if instruction.is_call_near() => {
                at = instruction.near_branch_target();
            }
            FlowControl::ConditionalBranch
                if instruction.is_jcc_short_or_near() && depth > 0 && open != 0 =>
            {
                live |= open
                    & look_ahead(
                        level,
                        request,
                        unit,
                        instruction.near_branch_target(),
                        depth - 1,
                    );
                at = instruction.next_ip();
            }
            _ => break,
        }
    }
    live | open
}
