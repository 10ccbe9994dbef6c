//! Memory operands: from the guest's registers to an address in the host's memory.

use iced_x86::{Instruction, Register};
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::sreg;

use crate::adapt::Lesson;
use crate::context::{Addresses, HOST_OFFSET, SLOTS, page_offset};
use crate::emit::{Alu, Mem, Reg, condition};
use crate::instruction::Guest;
use crate::registers::{ADDRESS, GUEST_RSP, SPARE, number};
use crate::stubs::{ENTRY_SHIFT, entry_mask};
use crate::unit::{Aside, Site, Writer, fault_segment};

/// The slot for accesses relative to RSP.
const STACK: usize = 0;
/// Those for accesses relative to FS and GS.
const SEGMENTS: [usize; 2] = [1, 2];
/// Where the slots begin that loops share.
const SHARED: usize = 4;

/// Where an access finds its translation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// In the table, by its address.
    Table,
    /// In the entry of the table at this offset: the address is known.
    Entry(u32),
    /// In a slot of its own, which it has no need to look for.
    Slot(usize),
}

/// What the code out of the way must do before it calls for a translation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Missed {
    /// SPARE holds the entry's offset.
    Table,
    /// It does not; here it is.
    Entry(u32),
    /// The slot's address.
    Slot(u32),
}

/// Whether an address is relative to the instruction: the decoder's displacement is where it leads then.
pub(crate) fn is_instruction_pointer(base: Register) -> bool {
    matches!(base, Register::RIP | Register::EIP)
}

impl Writer<'_> {
    /// The effective address to a register, without its segment's base. Only [`SPARE`] is used beside it.
    pub(crate) fn effective_address(&mut self, instruction: &Instruction, to: Reg, wide: bool) {
        let displacement = instruction.memory_displacement64();
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if is_instruction_pointer(base) || (base == Register::None && index == Register::None) {
            let address = if wide {
                displacement
            } else {
                displacement & 0xffff_ffff
            };
            self.asm.mov_imm(to, address);
            return;
        }
        let narrow = base.is_gpr32() || index.is_gpr32();
        let base = (base != Register::None).then(|| self.fetch(number(base), to));
        let index = (index != Register::None).then(|| {
            let scale = instruction.memory_index_scale().trailing_zeros() as u8;
            (self.fetch(number(index), SPARE), scale)
        });
        let memory = Mem {
            base,
            index,
            displacement: displacement as i32,
        };
        match memory {
            Mem {
                base: Some(base),
                index: None,
                displacement: 0,
            } if wide && !narrow => {
                if base != to {
                    self.asm.mov(to, base);
                }
            }
            _ => self.asm.lea(wide && !narrow, to, memory),
        }
    }

    /// The linear address of an instruction's memory operand to [`ADDRESS`].
    pub(crate) fn linear_address(&mut self, guest: &Guest) {
        let instruction = &guest.instruction;
        let wide = !self.mode.is_compatibility();
        self.effective_address(instruction, ADDRESS, wide);
        let segment = match instruction.memory_segment() {
            Register::FS => sreg::FS,
            Register::GS => sreg::GS,
            _ => return,
        };
        if !wide {
            // A segment that checks nothing; the interpreter does the checks of others.
            let rights = access::P | access::S | access::CODE | access::WRITABLE;
            let limit = Mem::low(self.at.segment_limit(segment));
            self.asm.alu_memory_imm32(Alu::Cmp, limit, -1);
            self.operate_if(guest, condition::NE);
            self.asm
                .load32(SPARE, Mem::low(self.at.segment_access(segment)));
            self.asm.alu_imm(false, Alu::And, SPARE, rights as i32);
            let wanted = rights & !access::CODE;
            self.asm.alu_imm(false, Alu::Cmp, SPARE, wanted as i32);
            self.operate_if(guest, condition::NE);
        }
        self.asm
            .load(SPARE, Mem::low(self.at.segment_base(segment)));
        let sum = Mem {
            base: Some(ADDRESS),
            index: Some((SPARE, 0)),
            displacement: 0,
        };
        self.asm.lea(wide, ADDRESS, sum);
    }

    /// Where an access to a memory operand finds its translation. An access that goes to one page most of the time
    /// is best off with a slot: one relative to RSP, or to FS and GS; and one in a loop, whose other accesses are
    /// few. Those of which that is not true are found out: see [`crate::adapt`].
    fn place(&self, guest: &Guest) -> Place {
        let instruction = &guest.instruction;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let segment = match instruction.memory_segment() {
            Register::FS => Some(SEGMENTS[0]),
            Register::GS => Some(SEGMENTS[1]),
            _ => None,
        };
        let fixed = is_instruction_pointer(base) || base == Register::None;
        let lesson = self.lesson(guest);
        if lesson.is_none() && segment.is_none() && fixed && index == Register::None {
            let mut linear = instruction.memory_displacement64();
            if self.mode.is_compatibility() {
                linear &= 0xffff_ffff;
            }
            return Place::Entry(Addresses::tlb_entry(self.mode.view(), linear));
        }
        if lesson >= Some(Lesson::Wanders) {
            return Place::Table;
        }
        if let Some(slot) = segment {
            return Place::Slot(slot);
        }
        if base == Register::RSP && index == Register::None {
            return Place::Slot(STACK);
        }
        if lesson.is_none() && !self.is_in_loop(guest) {
            return Place::Table;
        }
        // Instructions with the same base share one: they often work on the same structure.
        let mut hash = guest.instruction.ip() >> 6;
        for register in [base, index] {
            hash = hash.wrapping_mul(31) + register as u64;
        }
        if fixed {
            hash = hash.wrapping_add(instruction.memory_displacement64() >> 8);
        }
        Place::Slot(SHARED + (hash % (SLOTS - SHARED) as u64) as usize)
    }

    /// [`ADDRESS`] from linear to host address, or else a call. The flags and [`SPARE`] are lost.
    pub(crate) fn translate(
        &mut self,
        guest: &Guest,
        size: usize,
        write: bool,
        place: Place,
        segment: usize,
    ) {
        let view = self.mode.view();
        let site = Site {
            size: size as u8,
            write,
            segment: segment as u8,
            ..self.site(guest)
        };
        let site = self.add_site(site);
        let retry = self.asm.here();
        let table = self.at.tlb(view);
        let (page, host, missed) = match place {
            Place::Table => {
                self.asm.rorx32(SPARE, ADDRESS, 12 - ENTRY_SHIFT);
                self.asm.alu_imm(false, Alu::And, SPARE, entry_mask(view));
                (
                    Mem::offset(table + page_offset(write), SPARE),
                    Mem::offset(table + HOST_OFFSET, SPARE),
                    Missed::Table,
                )
            }
            Place::Entry(offset) => (
                Mem::low(table + offset + page_offset(write)),
                Mem::low(table + offset + HOST_OFFSET),
                Missed::Entry(offset),
            ),
            Place::Slot(slot) => {
                let slot = self.at.slot(view, slot);
                (
                    Mem::low(slot + page_offset(write)),
                    Mem::low(slot + HOST_OFFSET),
                    Missed::Slot(slot),
                )
            }
        };
        self.asm.alu_load(Alu::Sub, ADDRESS, page);
        self.asm
            .alu_imm(true, Alu::Cmp, ADDRESS, 4096 - size as i32);
        self.asm.jump_if(condition::A, retry);
        let jump = self.asm.bytes.len() - 4;
        self.asm.alu_load(Alu::Add, ADDRESS, host);
        let stubs = match missed {
            Missed::Slot(_) => &self.stubs.find,
            _ => &self.stubs.refill,
        };
        let stub = stubs[view][usize::from(write)];
        self.asides.push(Aside::Miss {
            jump,
            retry,
            site,
            stub,
            missed,
        });
    }

    /// Code after a miss, out of the way.
    pub(crate) fn missed(&mut self, missed: Missed, stub: u64, retry: u64, site: u32) {
        if let Missed::Entry(value) | Missed::Slot(value) = missed {
            self.asm.mov_imm(SPARE, u64::from(value));
        }
        self.asm.call(stub);
        self.asm.jump(retry);
        self.asm.word(site);
    }

    // Words of the stack, and pointers: 4 bytes in compatibility mode, else 8.

    pub(crate) fn mov_word(&mut self, to: Reg, from: Reg) {
        if self.mode.is_compatibility() {
            self.asm.mov32(to, from);
        } else {
            self.asm.mov(to, from);
        }
    }

    pub(crate) fn load_word(&mut self, to: Reg, from: Mem) {
        if self.mode.is_compatibility() {
            self.asm.load32(to, from);
        } else {
            self.asm.load(to, from);
        }
    }

    pub(crate) fn store_word(&mut self, to: Mem, from: Reg) {
        if self.mode.is_compatibility() {
            self.asm.store32(to, from);
        } else {
            self.asm.store(to, from);
        }
    }

    /// RSP moves by so many words.
    pub(crate) fn move_stack(&mut self, words: i32) {
        let word = self.mode.word();
        let moved = Mem::at(GUEST_RSP, words * word as i32);
        self.asm.lea(word == 8, GUEST_RSP, moved);
    }

    /// Where the word at the top of the stack finds its translation.
    pub(crate) fn stack_place(&self, guest: &Guest) -> Place {
        if self.lesson(guest) >= Some(Lesson::Wanders) {
            Place::Table
        } else {
            Place::Slot(STACK)
        }
    }

    /// The address of the word at the top of the stack, to be pushed or popped.
    pub(crate) fn stack_access(&mut self, guest: &Guest, write: bool) {
        let word = self.mode.word();
        if write {
            let top = Mem::at(GUEST_RSP, -(word as i32));
            self.asm.lea(word == 8, ADDRESS, top);
        } else {
            self.mov_word(ADDRESS, GUEST_RSP);
        }
        let place = self.stack_place(guest);
        self.translate(guest, word, write, place, sreg::SS);
    }

    /// The memory operand of an instruction: its host address to [`ADDRESS`]. The interpreter does an access
    /// that is not aligned to `alignment` bytes.
    pub(crate) fn operand(&mut self, guest: &Guest, size: usize, write: bool, alignment: usize) {
        let instruction = &guest.instruction;
        let segment = fault_segment(instruction);
        self.linear_address(guest);
        if alignment > 1 {
            self.asm.test_byte(ADDRESS, alignment as u8 - 1);
            self.operate_if(guest, condition::NE);
        }
        let place = self.place(guest);
        self.translate(guest, size, write, place, segment);
    }
}
