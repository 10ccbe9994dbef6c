//! From a run of guest instructions to host code.
//!
//! A unit starts at one linear address, goes on through branches that are not taken, and ends at the first
//! jump, at the page's end, or when it is long. Guest registers are where [`HOME`] says at every instruction
//! boundary. The arithmetic flags are in the host's flags, in memory, or in both; where they are is known
//! when the code is written.

mod decode;
mod strings;
mod transfer;

use iced_x86::{Code, CodeSize, Encoder, Instruction, OpKind, Register};
use trapgate_interp::op::Op;
use trapgate_interp::{Access, Interpreter, Target};
use trapgate_thunk::Class;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::sreg;

use crate::adapt::{Lesson, Noted};
use crate::context::Addresses;
use crate::crossing::Cross;
use crate::emit::{Alu, Asm, Mem, RAX, RCX, RDX, Reg, condition};
use crate::instruction::{COUNTER, FLAGS, Guest, Kind, Plan};
use crate::list::List;
use crate::memory::{Missed, is_instruction_pointer};
use crate::mode::Mode;
use crate::registers::{ADDRESS, GUEST_RCX, GUEST_RSP, HOME, SPARE, is_high_byte, named, number};
use crate::run::Number;
use crate::stubs::Stubs;
use crate::x87;

/// Most instructions in a unit.
pub(crate) const MOST: usize = 64;

/// A place in host code from which Rust code may be called, and what it needs to know then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    /// Linear address of the guest's instruction.
    pub(crate) rip: u64,
    /// Host code of the next instruction; 0 if the unit ends.
    pub(crate) next: u64,
    /// The instruction as the interpreter runs it; 0 if that was not needed yet.
    pub(crate) op: u32,
    /// Bytes of the guest's instruction.
    pub(crate) length: u8,
    /// Bytes of its access.
    pub(crate) size: u8,
    pub(crate) write: bool,
    pub(crate) segment: u8,
    pub(crate) mode: Mode,
    /// What kind of instruction it is, for statistics.
    pub(crate) code: Code,
    /// What an indirect jump has added to RSP already.
    pub(crate) popped: i32,
    /// Host code does it, if it is an access across the end of a page and both pages are in the table.
    pub(crate) crosses: bool,
    /// Host code after it takes the guest's x87 registers to be in the host's.
    pub(crate) x87: bool,
    /// So many bytes ahead of it lies the x87 instruction whose address is to be FIP; 0 if that is known already.
    pub(crate) x87_behind: u16,
}

impl Site {
    /// What its access does.
    pub(crate) fn access(&self) -> Access {
        if self.write {
            Access::Write
        } else {
            Access::Read
        }
    }

    /// Whether its access has the right to what it leads to.
    pub(crate) fn is_allowed(&self, target: &Target) -> bool {
        if self.write {
            target.write
        } else {
            target.read
        }
    }
}

/// A direct jump out of a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    /// Address of the jump's rel32.
    pub(crate) patch: u64,
    /// Where it goes until it is linked.
    pub(crate) stub: u64,
    /// Linear address of the target.
    pub(crate) target: u64,
    pub(crate) mode: Mode,
    /// The flags are in memory, else in the host's.
    pub(crate) memory: bool,
    /// The target lies on another page.
    pub(crate) far: bool,
    /// Block that it is linked to.
    pub(crate) linked: Number,
    /// The next exit that is linked to the same block.
    pub(crate) next: Number,
}

/// What is to be translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
    /// The flags are in memory at the start, else in the host's.
    pub(crate) memory: bool,
    /// The bytes of the page that holds `rip`; and if its first instruction crosses the end, of the next.
    pub(crate) page: &'a [u8],
    /// Number of the mapping that must be in force.
    pub(crate) mapping: u32,
    /// As `mapping`, of the next page, if the first instruction crosses to it. Then it is the only one.
    pub(crate) second: Option<u32>,
    /// Numbers of the first site and exit.
    pub(crate) first_site: u32,
    pub(crate) first_exit: u32,
    /// What is known of the accesses of instructions on this page.
    pub(crate) lessons: &'a [Noted],
    /// Flags are right wherever the guest could look.
    pub(crate) exact: bool,
    /// Instructions are counted as they run.
    pub(crate) counting: bool,
}

impl Request<'_> {
    /// Whether a CALL is one that is returned to all the time.
    pub(crate) fn is_returned_to(&self, instruction: &Instruction) -> bool {
        let offset = (instruction.next_ip() & 0xfff) as u16;
        // Who is compared seldom runs long enough to learn it.
        let known = |noted: &Noted| noted.offset == offset && noted.lesson == Lesson::Returns;
        self.exact && offset & 1 == 0 || self.lessons.iter().any(known)
    }
}

/// A translated unit.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    /// Where jumps from other pages enter.
    pub(crate) checked: u64,
    /// Where jumps enter that know that the mapping is in force.
    pub(crate) entry: u64,
    /// The flags on entry do not matter.
    pub(crate) any_flags: bool,
    /// A RET may enter it in its middle.
    pub(crate) has_landing: bool,
    /// Bytes of guest code that it was made of, from the start.
    pub(crate) length: u64,
    pub(crate) instructions: u32,
    /// Further bytes on the page that were looked at, as offsets.
    pub(crate) seen: Vec<(u16, u16)>,
    pub(crate) sites: Vec<Site>,
    pub(crate) exits: Vec<Exit>,
}

/// Where the flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Where {
    pub(crate) host: bool,
    pub(crate) memory: bool,
}

/// Host code that is written after the unit's, out of the way.
pub(crate) enum Aside {
    Miss {
        jump: usize,
        retry: u64,
        site: u32,
        /// Address of the stub that fetches the translation.
        stub: u64,
        missed: Missed,
    },
    Operate {
        jump: usize,
        site: u32,
    },
    Link {
        exit: usize,
    },
    Go {
        jump: usize,
        target: u64,
        memory: bool,
    },
    Indirect {
        jumps: [usize; 2],
        site: u32,
    },
    Leave {
        jump: usize,
        exit: usize,
        /// Address of the stub that leaves.
        stub: u64,
    },
    /// A miss that may be an access across the end of a page.
    Cross(Cross),
    /// The x87's registers must be loaded, or the interpreter does the instruction.
    LoadX87 {
        jump: usize,
        retry: u64,
        site: u32,
    },
}

/// Translates units, one after the other.
pub(crate) struct Translator {
    pub(crate) asm: Asm,
    encoder: Encoder,
    /// The unit translated last.
    pub(crate) guests: Vec<Guest>,
    at: Addresses,
    stubs: Stubs,
    level: Level,
    /// Most instructions in a unit.
    pub(crate) most: usize,
    /// Everything is done twice, and must give the same: the interpreter reads the clock.
    pub(crate) repeats: bool,
    /// Changes instructions before they are translated: a fault, to see that it is found.
    #[cfg(test)]
    pub(crate) fault: Option<fn(&mut Instruction)>,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").finish_non_exhaustive()
    }
}

impl Translator {
    pub(crate) fn new(at: Addresses, stubs: Stubs, level: Level) -> Self {
        Self {
            asm: Asm::default(),
            encoder: Encoder::new(64),
            guests: Vec::new(),
            at,
            stubs,
            level,
            most: MOST,
            repeats: false,
            #[cfg(test)]
            fault: None,
        }
    }

    /// Translates the unit at `request.rip`, to lie at `place`. `None` if not even its first instruction is
    /// whole on the page.
    pub(crate) fn translate(
        &mut self,
        request: Request<'_>,
        place: u64,
        interp: &mut Interpreter,
        ops: &mut List<Op>,
    ) -> Option<Unit> {
        let mut unit = Unit::default();
        self.decode(&request, &mut unit)?;
        self.work_out_flags(&request, &mut unit);
        self.asm.start(place);
        let guests = std::mem::take(&mut self.guests);
        let mut writer = Writer {
            asm: &mut self.asm,
            encoder: &mut self.encoder,
            at: self.at,
            stubs: self.stubs,
            request,
            flags: Where {
                host: !request.memory,
                memory: request.memory,
            },
            mode: request.mode,
            unit: &mut unit,
            asides: Vec::new(),
            is_last: false,
            x87: false,
            last_x87: None,
            loops: decode::loops(&guests),
            interp,
            ops,
        };
        let whole = writer.write(&guests);
        self.guests = guests;
        whole.then_some(unit)
    }
}

/// The segment that decides whether an address that is not canonical raises #SS or #GP: only FS and GS can replace
/// the base register's (SDM vol. 1, 3.3.7.1).
pub(crate) fn fault_segment(instruction: &Instruction) -> usize {
    match (instruction.memory_segment(), instruction.memory_base()) {
        (Register::FS | Register::GS, _) => sreg::DS,
        (_, Register::RSP | Register::RBP | Register::ESP | Register::EBP) => sreg::SS,
        _ => sreg::DS,
    }
}

pub(crate) struct Writer<'a> {
    pub(crate) asm: &'a mut Asm,
    encoder: &'a mut Encoder,
    pub(crate) at: Addresses,
    pub(crate) stubs: Stubs,
    pub(crate) request: Request<'a>,
    pub(crate) flags: Where,
    /// The mode at this point: STAC and CLAC change it.
    pub(crate) mode: Mode,
    pub(crate) unit: &'a mut Unit,
    pub(crate) asides: Vec<Aside>,
    /// Nothing of the unit comes after the instruction that is written.
    pub(crate) is_last: bool,
    /// The guest's x87 registers are in the host's.
    pub(crate) x87: bool,
    /// Address of the last x87 instruction, while it is not FIP yet.
    pub(crate) last_x87: Option<u64>,
    /// Loops in this unit, as addresses of their first and last instructions.
    loops: Vec<(u64, u64)>,
    interp: &'a mut Interpreter,
    ops: &'a mut List<Op>,
}

impl Writer<'_> {
    /// Writes it all. `false` if an op could not be had.
    fn write(&mut self, guests: &[Guest]) -> bool {
        let (rip, mapping) = (self.request.rip, self.request.mapping);
        self.unit.checked = self.asm.here();
        self.check_mapping(rip, mapping, rip);
        self.unit.entry = self.asm.here();
        if let Some(second) = self.request.second {
            self.check_mapping(self.mode.next_page(rip), second, rip);
        }
        for (index, guest) in guests.iter().enumerate() {
            let after_jump = index == 0 || guests[index - 1].kind.leaves();
            self.is_last = index + 1 == guests.len();
            if self.request.counting && after_jump {
                self.count_run(&guests[index..]);
            }
            let first = self.unit.sites.len();
            if !self.guest(guest) {
                return false;
            }
            // Behind the last there is none, even if it jumps to the next address.
            let last = self.is_last && guest.kind.ends();
            let next = if last { 0 } else { self.asm.here() };
            for site in &mut self.unit.sites[first..] {
                site.next = next;
            }
        }
        if let Some(last) = guests.last()
            && !last.kind.ends()
        {
            self.store_x87_pointer();
            let next = self.request.rip.wrapping_add(self.unit.length);
            let next = self.mode.wrap(next);
            // Over the end of the address space is no way ahead.
            self.jump(&last.instruction, next, last.live_out);
        }
        self.write_asides();
        true
    }

    /// Counts the instructions from here to the next jump out of the unit's middle. Neither the flags nor a guest register change.
    fn count_run(&mut self, guests: &[Guest]) {
        let jump = guests.iter().position(|guest| guest.kind.leaves());
        let run = jump.map_or(guests.len(), |jump| jump + 1);
        let counter = Mem::low(self.at.instructions());
        self.asm.load(RCX, counter);
        self.asm.lea(true, RCX, Mem::at(RCX, run as i32));
        self.asm.store(counter, RCX);
    }

    /// A page must still be mapped where this was translated from.
    pub(crate) fn check_mapping(&mut self, linear: u64, mapping: u32, target: u64) {
        let slot = Mem::low(self.at.page(linear));
        let mapping = mapping as i32;
        let memory = !self.flags.host;
        let jump = if self.unit.any_flags || memory {
            self.asm.alu_memory_imm32(Alu::Cmp, slot, mapping);
            self.asm.jump_if(condition::NE, self.asm.here());
            self.asm.bytes.len() - 4
        } else {
            self.asm.load32(RCX, slot);
            self.asm.lea(false, RCX, Mem::at(RCX, -mapping));
            let good = self.asm.short_if_rcx_zero();
            self.asm.jump(self.asm.here());
            let jump = self.asm.bytes.len() - 4;
            self.asm.land(good);
            jump
        };
        self.asides.push(Aside::Go {
            jump,
            target,
            memory,
        });
    }

    // Flags.

    /// Host code that changes the flags follows: they must be in memory if anyone needs them.
    pub(crate) fn give_up_flags(&mut self, live: u32) {
        if live != 0 && !self.flags.memory {
            self.asm.mov(RCX, RAX);
            self.asm.flags_to_ax();
            self.asm.store_ax(Mem::low(self.at.flags()));
            self.asm.mov(RAX, RCX);
        }
        self.flags = Where {
            host: false,
            memory: true,
        };
    }

    /// The flags must be in the host's.
    fn want_flags(&mut self) {
        if !self.flags.host {
            self.asm.mov(RCX, RAX);
            self.asm.load32(RAX, Mem::low(self.at.flags()));
            self.asm.flags_from_ax();
            self.asm.mov(RAX, RCX);
            self.flags.host = true;
        }
    }

    /// Before an instruction whose flags are the host's.
    fn before(&mut self, guest: &Guest) {
        let partly = guest.modifies != 0 && guest.live_out & !guest.kills != 0;
        if guest.reads != 0 || partly {
            self.want_flags();
        }
    }

    /// After it.
    fn after(&mut self, guest: &Guest) {
        if guest.modifies != 0 {
            self.flags = Where {
                host: true,
                memory: false,
            };
        }
    }

    // Addresses and memory.

    /// The guest's register, in its home or fetched to `spare`.
    pub(crate) fn fetch(&mut self, guest: usize, spare: Reg) -> Reg {
        match HOME[guest] {
            Some(home) => home,
            None => {
                self.asm.load(spare, Mem::low(self.at.gpr(guest)));
                spare
            }
        }
    }

    /// What is known of an instruction's accesses.
    pub(crate) fn lesson(&self, guest: &Guest) -> Option<Lesson> {
        let offset = (guest.instruction.ip() & 0xfff) as u16;
        if self.request.exact && offset & 3 == 0 {
            // Programs that are compared seldom run long enough to learn it.
            return Some(Lesson::Crosses);
        }
        let mut noted = self.request.lessons.iter();
        noted
            .find(|noted| noted.offset == offset && noted.lesson != Lesson::Returns)
            .map(|noted| noted.lesson)
    }

    /// Whether an instruction is in a loop that ends in this unit.
    pub(crate) fn is_in_loop(&self, guest: &Guest) -> bool {
        let ip = guest.instruction.ip();
        self.loops
            .iter()
            .any(|&(first, last)| first <= ip && ip <= last)
    }

    pub(crate) fn site(&mut self, guest: &Guest) -> Site {
        Site {
            rip: guest.instruction.ip(),
            next: 0,
            op: 0,
            length: guest.instruction.len() as u8,
            size: 0,
            write: false,
            segment: sreg::DS as u8,
            mode: self.mode,
            code: guest.instruction.code(),
            popped: 0,
            crosses: false,
            x87: self.x87,
            x87_behind: self
                .last_x87
                .map_or(0, |last| (guest.instruction.ip() - last) as u16),
        }
    }

    pub(crate) fn add_site(&mut self, site: Site) -> u32 {
        self.unit.sites.push(site);
        self.request.first_site + self.unit.sites.len() as u32 - 1
    }

    /// The site of a number that was given in this unit.
    pub(crate) fn site_of(&mut self, number: u32) -> &mut Site {
        &mut self.unit.sites[(number - self.request.first_site) as usize]
    }

    /// The interpreter does the instruction if a condition holds.
    pub(crate) fn operate_if(&mut self, guest: &Guest, condition: u8) {
        self.asm.jump_if(condition, self.asm.here());
        let jump = self.asm.bytes.len() - 4;
        let site = self.site(guest);
        let site = self.add_site(site);
        self.asides.push(Aside::Operate { jump, site });
    }

    // Instructions.

    fn guest(&mut self, guest: &Guest) -> bool {
        let instruction = &guest.instruction;
        if guest.kind.ends() || matches!(guest.kind, Kind::JumpIf(..)) {
            self.store_x87_pointer();
        }
        match guest.kind {
            Kind::Same(plan) => self.same(guest, &plan),
            Kind::Lea => self.load_address(instruction),
            Kind::Nothing => {}
            Kind::Verbatim => self.encode(instruction),
            Kind::PushRegister(register) => {
                self.give_up_flags(guest.live_in);
                self.stack_access(guest, true);
                let from = self.fetch(register, SPARE);
                self.store_word(Mem::at(ADDRESS, 0), from);
                self.move_stack(-1);
            }
            Kind::PushImmediate(value) => {
                self.give_up_flags(guest.live_in);
                self.stack_access(guest, true);
                self.store_immediate(value);
                self.move_stack(-1);
            }
            Kind::PushMemory => {
                self.give_up_flags(guest.live_in);
                self.operand(guest, self.mode.word(), false, 1);
                self.load_word(SPARE, Mem::at(ADDRESS, 0));
                self.asm.store(Mem::low(self.at.stash()), SPARE);
                self.stack_access(guest, true);
                self.asm.load(SPARE, Mem::low(self.at.stash()));
                self.store_word(Mem::at(ADDRESS, 0), SPARE);
                self.move_stack(-1);
            }
            Kind::Pop(register) => {
                self.give_up_flags(guest.live_in);
                self.stack_access(guest, false);
                self.pop_to(register);
            }
            Kind::Leave => {
                self.give_up_flags(guest.live_in);
                let word = self.mode.word();
                self.mov_word(ADDRESS, crate::emit::RBP);
                let place = self.stack_place(guest);
                self.translate(guest, word, false, place, sreg::SS);
                let above = Mem::at(crate::emit::RBP, word as i32);
                self.asm.lea(word == 8, GUEST_RSP, above);
                self.load_word(crate::emit::RBP, Mem::at(ADDRESS, 0));
            }
            Kind::Divide { signed, wide } => self.divide(guest, signed, wide),
            Kind::Jump(target) => self.jump(instruction, target, guest.live_out),
            Kind::JumpIf(condition, target) => self.jump_if(guest, condition, target),
            Kind::Count(count, target) => self.count(guest, count, target),
            Kind::Call(target) => self.call(guest, target),
            Kind::JumpIndirect => {
                self.give_up_flags(guest.live_in);
                self.indirect_target(guest);
                self.indirect(guest);
            }
            Kind::CallIndirect => self.call_indirect(guest),
            Kind::Return(extra) => {
                self.give_up_flags(guest.live_in);
                self.stack_access(guest, false);
                self.load_word(ADDRESS, Mem::at(ADDRESS, 0));
                let word = self.mode.word();
                let popped = word as i32 + i32::from(extra);
                self.asm
                    .lea(word == 8, GUEST_RSP, Mem::at(GUEST_RSP, popped));
                self.return_to(guest, popped);
            }
            Kind::PushFlags => self.push_flags(guest),
            Kind::PopFlags => self.pop_flags(guest),
            Kind::Direction(down) => self.direction(guest, down),
            Kind::Interrupts(enable) => self.interrupts(guest, enable),
            Kind::Access(set) => self.access(guest, set),
            Kind::SwapGs => self.swap_gs(),
            Kind::SystemCall => self.system_call(guest),
            Kind::SystemReturn => self.system_return(guest),
            Kind::ReadTime { processor } => self.read_time(guest, processor),
            Kind::String(string) => self.string(guest, string),
            Kind::ControlWord => {
                self.give_up_flags(guest.live_in);
                self.operand(guest, 2, true, 1);
                self.asm.load16(SPARE, Mem::low(self.at.x87_image()));
                self.asm.store16(Mem::at(ADDRESS, 0), SPARE);
            }
            Kind::LoadControlWord => self.load_control_word(guest),
            Kind::Wait => self.want_x87(guest),
            Kind::StoreMxcsr => self.store_mxcsr(guest),
            Kind::LoadMxcsr => self.load_mxcsr(guest),
            Kind::ReadBase(segment) => {
                let to = instruction.op0_register();
                let wide = to.size() == 8;
                let base = Mem::low(self.at.segment_base(segment));
                let to = number(to);
                let place = HOME[to].unwrap_or(SPARE);
                if wide {
                    self.asm.load(place, base);
                } else {
                    self.asm.load32(place, base);
                }
                if HOME[to].is_none() {
                    self.asm.store(Mem::low(self.at.gpr(to)), SPARE);
                }
            }
            Kind::WriteBase(segment) => {
                let from = self.fetch(number(instruction.op0_register()), ADDRESS);
                self.give_up_flags(guest.live_in);
                // Canonical: the upper 17 bits are all alike.
                self.asm.mov(SPARE, from);
                self.asm.sar(true, SPARE, 47);
                self.asm.lea(true, SPARE, Mem::at(SPARE, 1));
                self.asm.alu_imm(true, Alu::Cmp, SPARE, 1);
                self.operate_if(guest, condition::A);
                self.asm
                    .store(Mem::low(self.at.segment_base(segment)), from);
            }
            Kind::SelectorWord(segment) => {
                let to = number(instruction.op0_register());
                let selector = Mem::low(self.at.selector(segment));
                match HOME[to] {
                    Some(home) => self.asm.load_word(home, selector),
                    None => {
                        self.asm.load16(SPARE, selector);
                        self.asm.store16(Mem::low(self.at.gpr(to)), SPARE);
                    }
                }
            }
            Kind::Selector(segment) => {
                // MOV of a selector to a register of 32 or 64 bits clears the upper bits.
                let to = number(instruction.op0_register());
                let selector = Mem::low(self.at.selector(segment));
                match HOME[to] {
                    Some(home) => self.asm.load16(home, selector),
                    None => {
                        self.asm.load16(SPARE, selector);
                        self.asm.store(Mem::low(self.at.gpr(to)), SPARE);
                    }
                }
            }
            Kind::BitOfMemory(plan) => self.bit_of_memory(guest, &plan),
            Kind::Operate | Kind::OperateLast => return self.operate(guest),
        }
        true
    }

    fn encode(&mut self, instruction: &Instruction) {
        self.encoder.set_buffer(std::mem::take(&mut self.asm.bytes));
        let encoded = self.encoder.encode(instruction, 0);
        debug_assert!(encoded.is_ok(), "{instruction:?}: {encoded:?}");
        self.asm.bytes = self.encoder.take_buffer();
    }

    /// The interpreter does the instruction.
    fn operate(&mut self, guest: &Guest) -> bool {
        let start = (guest.instruction.ip() & 0xfff) as usize;
        let bytes = &self.request.page[start..];
        let Some(op) = self.interp.cpu.lower_one(&bytes[..bytes.len().min(15)]) else {
            return false;
        };
        self.ops.push(op);
        self.x87 = false;
        let mut site = self.site(guest);
        site.op = self.ops.len() as u32 - 1;
        site.length = op.length;
        let site = self.add_site(site);
        self.last_x87 = None;
        self.give_up_flags(FLAGS);
        self.asm.mov_imm(RCX, u64::from(site));
        self.asm.call(self.stubs.operate);
        true
    }

    /// The same instruction with other registers.
    fn same(&mut self, guest: &Guest, plan: &Plan) {
        let mut instruction = guest.instruction;
        instruction.set_code(plan.harmless.code);
        instruction.set_code_size(CodeSize::Code64);
        let count = instruction.op_count();
        let memory = (0..count).any(|index| instruction.op_kind(index) == OpKind::Memory);
        let (mut base, mut size) = (ADDRESS, 0);
        if guest.kind.uses_x87() {
            self.want_x87(guest);
        }
        if memory {
            size = instruction.memory_size().size();
            self.give_up_flags(guest.live_in);
            // A LOCKed access across cache lines would lock the host's bus.
            let alignment = if plan.harmless.locked {
                size
            } else {
                plan.harmless.alignment
            };
            self.operand(guest, size, plan.writes_memory, alignment);
        }
        let hit = self.asm.bytes.len();
        self.before(guest);
        if plan.high && memory {
            // A REX prefix, which ADDRESS needs, would make another register of the operand.
            base = SPARE;
            self.asm.mov(SPARE, ADDRESS);
        }
        for (register, place) in plan.visitors.iter().flatten() {
            self.asm.load(*place, Mem::low(self.at.gpr(*register)));
        }
        if plan.counts {
            self.asm.mov(COUNTER, GUEST_RCX);
        }
        let op_code = plan.harmless.code.op_code();
        for index in 0..count {
            match instruction.op_kind(index) {
                OpKind::Memory => {
                    instruction.set_memory_base(named(base, 8));
                    instruction.set_memory_index(Register::None);
                    instruction.set_memory_displacement64(0);
                    instruction.set_memory_displ_size(0);
                    instruction.set_segment_prefix(Register::None);
                }
                OpKind::Register => {
                    let register = instruction.op_register(index);
                    let fixed = op_code.op_kind(index) == iced_x86::OpCodeOperandKind::cl;
                    if !register.is_gpr() || fixed || is_high_byte(register) {
                        continue;
                    }
                    let guest = number(register);
                    if plan.visits_rcx && HOME[guest] == Some(GUEST_RCX) {
                        continue;
                    }
                    let place = HOME[guest].or_else(|| {
                        let visitor = plan.visitors.iter().flatten();
                        visitor
                            .filter(|visitor| visitor.0 == guest)
                            .map(|visitor| visitor.1)
                            .next()
                    });
                    // A detour's only other register is its destination.
                    let place = if plan.detour {
                        SPARE
                    } else {
                        place.unwrap_or(SPARE)
                    };
                    instruction.set_op_register(index, named(place, register.size()));
                }
                _ => {}
            }
        }
        self.encode(&instruction);
        if plan.indexes {
            self.asm.mov(GUEST_RCX, COUNTER);
        }
        if plan.detour {
            let guest = number(guest.instruction.op0_register());
            match HOME[guest] {
                Some(home) => self.asm.mov32(home, SPARE),
                None => self.asm.store(Mem::low(self.at.gpr(guest)), SPARE),
            }
        }
        for (register, place) in plan.visitors.iter().flatten() {
            self.asm.store(Mem::low(self.at.gpr(*register)), *place);
        }
        if memory && self.lesson(guest) == Some(Lesson::Crosses) {
            self.may_cross(plan, size, hit);
        }
        self.after(guest);
        if plan.harmless.class == Class::X87 && x87::is_recorded(guest.instruction.mnemonic()) {
            self.last_x87 = Some(guest.instruction.ip());
        }
    }

    fn load_address(&mut self, instruction: &Instruction) {
        let register = instruction.op0_register();
        let wide = register.size() == 8;
        let guest = number(register);
        match HOME[guest] {
            Some(home) => {
                // Its old value may be the base or the index: only ADDRESS is written before it is read.
                self.address_to(instruction, home, wide);
            }
            None => {
                self.effective_address(instruction, ADDRESS, wide);
                self.asm.store(Mem::low(self.at.gpr(guest)), ADDRESS);
            }
        }
    }

    fn address_to(&mut self, instruction: &Instruction, to: Reg, wide: bool) {
        let base = instruction.memory_base();
        let fetched =
            base != Register::None && !is_instruction_pointer(base) && HOME[number(base)].is_none();
        if fetched {
            self.effective_address(instruction, ADDRESS, wide);
            if wide {
                self.asm.mov(to, ADDRESS);
            } else {
                self.asm.mov32(to, ADDRESS);
            }
        } else {
            self.effective_address(instruction, to, wide);
        }
    }

    /// The word at [`ADDRESS`] to a register, and RSP moves.
    fn pop_to(&mut self, register: usize) {
        match HOME[register] {
            Some(home) => {
                // POP RSP: the value popped stays.
                if home != GUEST_RSP {
                    self.move_stack(1);
                }
                self.load_word(home, Mem::at(ADDRESS, 0));
            }
            None => {
                self.asm.load(SPARE, Mem::at(ADDRESS, 0));
                self.asm.store(Mem::low(self.at.gpr(register)), SPARE);
                self.move_stack(1);
            }
        }
    }

    /// A sign-extended value to the word at [`ADDRESS`].
    fn store_immediate(&mut self, value: i32) {
        if self.mode.is_compatibility() {
            self.asm.store_imm32(Mem::at(ADDRESS, 0), value as u32);
        } else {
            self.asm.store_imm(Mem::at(ADDRESS, 0), value);
        }
    }

    /// DIV and IDIV where they certainly don't fault; the interpreter does the others.
    fn divide(&mut self, guest: &Guest, signed: bool, wide: bool) {
        let instruction = &guest.instruction;
        self.give_up_flags(guest.live_in);
        let divisor = if instruction.op0_kind() == OpKind::Memory {
            self.operand(guest, if wide { 8 } else { 4 }, false, 1);
            if wide {
                self.asm.load(ADDRESS, Mem::at(ADDRESS, 0));
            } else {
                self.asm.load32(ADDRESS, Mem::at(ADDRESS, 0));
            }
            ADDRESS
        } else {
            self.fetch(number(instruction.op0_register()), ADDRESS)
        };
        if signed {
            // The dividend is a sign-extended number of half its width, the divisor neither 0 nor -1.
            if wide {
                self.asm.mov(RCX, RAX);
            } else {
                self.asm.mov32(RCX, RAX);
            }
            self.asm.sar(wide, RCX, if wide { 63 } else { 31 });
            self.asm.alu(wide, Alu::Cmp, RCX, RDX);
            self.operate_if(guest, condition::NE);
            self.asm.lea(wide, RCX, Mem::at(divisor, 1));
            self.asm.alu_imm(wide, Alu::Cmp, RCX, 1);
            self.operate_if(guest, condition::BE);
        } else {
            // The quotient fits if the upper half is less than the divisor, which then is not zero.
            self.asm.alu(wide, Alu::Cmp, RDX, divisor);
            self.operate_if(guest, condition::AE);
        }
        let rex = 0x40 | u8::from(wide) << 3 | divisor.0 >> 3;
        let extension = if signed { 7 } else { 6 };
        self.asm
            .raw(&[rex, 0xf7, 0xc0 | extension << 3 | divisor.0 & 7]);
        self.flags = Where {
            host: true,
            memory: false,
        };
    }

    // Out of the way.

    fn write_asides(&mut self) {
        for aside in std::mem::take(&mut self.asides) {
            let here = self.asm.here();
            match aside {
                Aside::Miss {
                    jump,
                    retry,
                    site,
                    stub,
                    missed,
                } => {
                    self.asm.patch(jump, here);
                    self.missed(missed, stub, retry, site);
                }
                Aside::Operate { jump, site } => {
                    self.asm.patch(jump, here);
                    // It does not return here: it goes on at the next instruction.
                    self.asm.mov_imm(RCX, u64::from(site));
                    self.asm.call(self.stubs.operate);
                }
                Aside::Link { exit } => {
                    let number = self.request.first_exit + exit as u32;
                    let to = if self.unit.exits[exit].memory {
                        self.stubs.link_memory
                    } else {
                        self.stubs.link_host
                    };
                    let patch = self.unit.exits[exit].patch;
                    let base = self.asm.here() - self.asm.bytes.len() as u64;
                    self.asm.patch((patch - base) as usize, here);
                    self.unit.exits[exit].stub = here;
                    self.asm.call(to);
                    self.asm.word(number);
                }
                Aside::Go {
                    jump,
                    target,
                    memory,
                } => {
                    self.asm.patch(jump, here);
                    self.asm.mov_imm(RCX, target);
                    self.asm.store(Mem::low(self.at.rip()), RCX);
                    let to = if memory {
                        self.stubs.go_memory
                    } else {
                        self.stubs.go_host
                    };
                    self.asm.jump(to);
                }
                Aside::Leave { jump, exit, stub } => {
                    self.asm.patch(jump, here);
                    let number = self.request.first_exit + exit as u32;
                    self.asm.mov_imm(RCX, u64::from(number));
                    self.asm.jump(stub);
                }
                Aside::Indirect { jumps, site } => {
                    for jump in jumps {
                        self.asm.patch(jump, here);
                    }
                    self.asm.call(self.stubs.indirect);
                    self.asm.word(site);
                }
                Aside::Cross(cross) => self.crossed(&cross),
                Aside::LoadX87 { jump, retry, site } => {
                    self.asm.patch(jump, here);
                    self.asm.call(self.stubs.load_x87);
                    self.asm.jump_if(condition::E, retry);
                    self.asm.mov_imm(RCX, u64::from(site));
                    self.asm.call(self.stubs.operate);
                }
            }
        }
    }
}
