//! Cases: operands for a piece of code, so that it does something worth comparing.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use trapgate_x86::registers::{gpr, rflags};

use crate::encodings::SELECTORS;
use crate::images::Images;
use crate::layout::{self, PAGE, record as at};
use crate::profile::memory_operand;
use crate::random::Random;
use crate::record::{Start, Window, put, quad};

/// A piece of code with one instruction.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Which of the batch's slots holds it.
    pub slot: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What they are.
    pub instruction: Instruction,
    /// They are no instruction, or one that its prefixes forbid; then [`Self::instruction`] is what it would be without.
    pub undefined: bool,
    /// Where it lies.
    pub ip: u64,
    /// 64 or 32.
    pub bits: u32,
    /// What the host executes in its place ([`crate::profile::Judge::StandIn`]).
    pub stand_in: Option<[u8; 2]>,
}

/// The data that all instructions share.
const DATA: u64 = layout::data(0);
/// Vector registers of the profiles; instructions of AVX-512, which are none there, have more.
const VECTORS: usize = 16;
/// Two pages to write.
const PLAIN: (u64, u64) = (DATA + PAGE, DATA + 3 * PAGE);
/// A page to read only.
const FIXED: (u64, u64) = (DATA + 4 * PAGE, DATA + 5 * PAGE);
/// A page for the stack.
const STACK: (u64, u64) = (DATA + 6 * PAGE, DATA + 7 * PAGE);
/// What windows may be of.
const WRITABLE: [(u64, u64); 2] = [PLAIN, STACK];
/// Bytes of windows together.
const ROOM: u64 = at::MEMORY_BYTES as u64;

impl Piece {
    /// Decodes bytes.
    pub fn new(slot: usize, bytes: Vec<u8>, ip: u64, bits: u32) -> Self {
        let mut bytes = bytes;
        let given = bytes.len();
        // A prefix may have made it longer, or shorter.
        bytes.resize(given.max(15), 0);
        // As the interpreter has it: F3 before WBINVD means nothing in the profiles.
        let options = DecoderOptions::NO_WBNOINVD;
        let mut instruction = Decoder::with_ip(bits, &bytes, ip, options).decode();
        let undefined = instruction.is_invalid();
        if undefined {
            let lenient = options | DecoderOptions::NO_INVALID_CHECK;
            instruction = Decoder::with_ip(bits, &bytes, ip, lenient).decode();
        }
        bytes.truncate(if instruction.is_invalid() {
            given
        } else {
            instruction.len()
        });
        Self {
            slot,
            bytes,
            instruction,
            undefined,
            ip,
            bits,
            stand_in: None,
        }
    }

    /// Where it ends.
    pub fn next(&self) -> u64 {
        self.ip + self.bytes.len() as u64
    }

    /// An address in its code where a jump may lead.
    pub fn landing(&self, random: &mut Random) -> u64 {
        landing(self.slot, self.ip, random)
    }
}

/// An address in a slot's code that is not of the instruction at `ip`.
pub fn landing(slot: usize, ip: u64, random: &mut Random) -> u64 {
    let code = layout::code(slot);
    loop {
        let address = code + random.below(2 * PAGE);
        if address + 16 < ip || address > ip + 40 {
            return address;
        }
    }
}

/// Where an operand may lie: mostly where it can be accessed.
pub fn target(random: &mut Random, size: u64, long: bool) -> u64 {
    let size = size.max(1);
    let inside = |random: &mut Random| {
        let room = PLAIN.1 - PLAIN.0 - size.next_multiple_of(64);
        PLAIN.0 + (random.below(room) & !63)
    };
    let part = |random: &mut Random| 1 + random.below(size);
    match random.below(64) {
        0..=35 => inside(random),
        36..=43 => {
            let grain = size.next_power_of_two().min(64);
            inside(random) + (random.below(64) & !(grain - 1))
        }
        44..=49 => inside(random) + random.below(64),
        50..=52 => PLAIN.0 + PAGE - part(random),
        53 | 54 => PLAIN.1 - part(random),
        55 => PLAIN.1 - size,
        56 => PLAIN.0 - part(random),
        57 => PLAIN.1 + random.below(PAGE),
        58 | 59 => FIXED.0 + (random.below(PAGE - 64) & !15),
        60 => FIXED.1 - part(random),
        61 if long => (random.next() >> 17 | 1 << 47) & !7,
        62 if long => (1 << 47) - random.below(2 * size),
        // The upper half, but not where the host or the guest has something for programs.
        63 if long => 0xffff_9000_0000_0000 | random.next() >> 24,
        _ => PLAIN.0 - PAGE + random.below(PAGE - 64),
    }
}

/// What the cases of a batch have in common: the translator has other code for each of these, and a batch of all of
/// them would be about going from one to the other.
#[derive(Clone, Copy, Debug)]
pub struct Climate {
    /// MXCSR may leave exceptions unmasked.
    pub unmasked: bool,
    /// RFLAGS.AC may be set: misaligned accesses fault.
    pub aligned: bool,
}

impl Climate {
    /// One of them.
    pub fn pick(random: &mut Random) -> Self {
        Self {
            unmasked: random.one_in(10),
            aligned: random.one_in(8),
        }
    }
}

/// Makes cases; one for each thread.
pub struct Maker {
    images: Images,
    components: u64,
}

/// A case under construction.
struct Making<'a> {
    piece: &'a Piece,
    random: &'a mut Random,
    start: Start,
    record: &'a mut [u8],
    /// Where the explicit memory operand lies.
    operand: u64,
    /// State components of the profile.
    components: u64,
}

impl Maker {
    /// `avx`: states have upper halves of the YMM registers.
    pub fn new(avx: bool) -> Self {
        Self {
            images: Images::new(avx),
            components: if avx { 7 } else { 3 },
        }
    }

    /// Writes a case for a piece of code into a record that holds zeros or an older one.
    pub fn make(&self, piece: &Piece, climate: Climate, random: &mut Random, record: &mut [u8]) {
        record[at::XSAVE..at::MEMORY].copy_from_slice(self.images.pick(random));
        if !climate.unmasked {
            // All exceptions masked.
            record[at::XSAVE + 24] |= 0x80;
            record[at::XSAVE + 25] |= 0x1f;
        }
        let mut making = Making {
            piece,
            random,
            start: Start::default(),
            record,
            operand: 0,
            components: self.components,
        };
        making.registers(climate);
        making.vectors();
        making.stack();
        making.operands();
        making.windows();
        making.contents();
        making.particulars();
        making.start.write(making.record);
    }
}

impl Making<'_> {
    fn is_long(&self) -> bool {
        self.piece.bits == 64
    }

    fn registers(&mut self, climate: Climate) {
        let random = &mut *self.random;
        for register in &mut self.start.gpr {
            *register = random.integer();
        }
        let bits = random.next();
        let mut flags = rflags::ONE | rflags::IF | bits & rflags::ARITHMETIC;
        for (chance, flag) in [
            (8, rflags::DF),
            (3, rflags::AC),
            (40, rflags::NT),
            (4, rflags::ID),
        ] {
            let allowed = flag != rflags::AC || climate.aligned;
            if allowed && random.one_in(chance) {
                flags |= flag;
            }
        }
        self.start.flags = flags;
        self.start.rip = self.piece.ip;
        self.start.compatibility = self.piece.bits == 32;
        self.start.bases = [
            DATA,
            random.next() >> if self.start.compatibility { 34 } else { 18 },
        ];
    }

    /// Fresh values for the vector registers that are named.
    fn vectors(&mut self) {
        let instruction = &self.piece.instruction;
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(operand);
            let number = register.number();
            if !(register.is_xmm() || register.is_ymm()) || number >= VECTORS {
                continue;
            }
            for part in [160 + number * 16, 576 + number * 16] {
                if part >= 576 && self.record[at::XSAVE + 512] & 4 == 0 {
                    continue;
                }
                for lane in [part, part + 8] {
                    let value = self.random.lane();
                    put(self.record, at::XSAVE + lane, value);
                }
            }
        }
    }

    fn uses_stack(&self) -> bool {
        let instruction = &self.piece.instruction;
        instruction.is_stack_instruction()
            || matches!(
                instruction.mnemonic(),
                Mnemonic::Iret
                    | Mnemonic::Iretd
                    | Mnemonic::Iretq
                    | Mnemonic::Retf
                    | Mnemonic::Leave
                    | Mnemonic::Enter
            )
    }

    fn place_on_stack(&mut self) -> u64 {
        let random = &mut *self.random;
        match random.below(40) {
            0 => STACK.0 + random.below(24),
            1 => STACK.1 - random.below(48),
            2 => PLAIN.0 + 0x800,
            3 => STACK.1 + random.below(PAGE - 0x100),
            4 => STACK.0 + 0x600 + random.below(64),
            5 if self.piece.bits == 64 => 1 << 47 | random.next() >> 20,
            6 if self.piece.bits == 64 => (1 << 47) - random.below(20),
            _ => STACK.0 + 0x400 + random.below(0x80) * 8,
        }
    }

    fn stack(&mut self) {
        if self.uses_stack() || self.random.below(4) != 0 {
            self.start.gpr[gpr::RSP] = self.place_on_stack();
            if matches!(
                self.piece.instruction.mnemonic(),
                Mnemonic::Leave | Mnemonic::Enter
            ) {
                self.start.gpr[gpr::RBP] = self.place_on_stack();
            }
        }
    }

    /// Registers by which memory operands are found.
    fn operands(&mut self) {
        let instruction = self.piece.instruction;
        let size = operand_size(&self.piece.instruction);
        let random = &mut *self.random;
        let long = self.piece.bits == 64;
        // String instructions and their like.
        let is_string = instruction.is_string_instruction();
        let count = match random.below(16) {
            0 => 0,
            1 => random.below(3000),
            _ => random.below(24),
        };
        let mut implied = |start: &mut Start, register: usize, address_bits: u32| {
            let element = size.max(1);
            let mut address = target(random, element, long);
            if start.flags & rflags::DF != 0 && random.below(4) != 0 {
                address = address.wrapping_add(count.min(30) * element);
            }
            start.gpr[register] = match address_bits {
                64 => address,
                32 => address & 0xffff_ffff | random.next() << 32,
                _ => address & 0xffff | start.gpr[register] & !0xffff,
            };
        };
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::MemorySegRSI => implied(&mut self.start, gpr::RSI, 64),
                OpKind::MemorySegESI => implied(&mut self.start, gpr::RSI, 32),
                OpKind::MemorySegSI => implied(&mut self.start, gpr::RSI, 16),
                OpKind::MemorySegRDI | OpKind::MemoryESRDI => {
                    implied(&mut self.start, gpr::RDI, 64)
                }
                OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                    implied(&mut self.start, gpr::RDI, 32)
                }
                OpKind::MemorySegDI | OpKind::MemoryESDI => implied(&mut self.start, gpr::RDI, 16),
                _ => {}
            }
        }
        if is_string {
            // Loops of billions of rounds would not end; the upper half is nothing for ECX.
            self.start.gpr[gpr::RCX] = count;
            if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
                let short = (0..instruction.op_count()).any(|operand| {
                    matches!(
                        instruction.op_kind(operand),
                        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
                    )
                });
                if short {
                    self.start.gpr[gpr::RCX] |= self.random.next() << 32;
                }
            }
        }
        if memory_operand(&instruction).is_some() {
            self.explicit(&instruction, size);
        }
    }

    fn explicit(&mut self, instruction: &Instruction, size: u64) {
        let long = self.is_long();
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let address_bits = address_bits(instruction, self.piece.bits);
        let mask = match address_bits {
            64 => u64::MAX,
            32 => 0xffff_ffff,
            _ => 0xffff,
        };
        let mut wanted = target(self.random, size, long && address_bits == 64);
        let locks = instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg;
        // BTS and its like access other elements than the one at the address.
        let elements = matches!(
            instruction.mnemonic(),
            Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        if locks && (wanted >> 47 == 0 || wanted >> 63 != 0) {
            wanted &= !63;
            if !elements && self.random.one_in(2) {
                wanted += self.random.below(64 - size.min(63) + 1);
            }
        }
        // What the segment adds.
        let segment = match instruction.memory_segment() {
            Register::FS => Some(0),
            Register::GS => Some(1),
            _ => None,
        };
        let mut offset = wanted;
        if let Some(which) = segment {
            offset = match self.random.below(3) {
                0 => self.random.below(0x1000),
                // What goes over the end of a segment of 4 GiB is the processor's choice.
                _ if !long => self.random.next() >> 34 & mask,
                // Over the end of what addresses of 32 bits reach, which parts of operands do not leave.
                _ if address_bits == 32 && self.random.one_in(3) => {
                    (self.random.below(size) + 1).wrapping_neg() & mask
                }
                1 => (self.random.below(0x1000) + 8).wrapping_neg() & mask,
                _ => self.random.next() >> 18 & mask,
            };
            if base == Register::None && index == Register::None
                || base == Register::RIP
                || base == Register::EIP
            {
                offset = instruction.memory_displacement64() & mask;
            }
            let wanted_base = wanted.wrapping_sub(offset);
            // The base itself has to be canonical.
            self.start.bases[which] = if long {
                ((wanted_base << 16) as i64 >> 16) as u64
            } else {
                wanted_base & 0xffff_ffff
            };
        }
        let displacement = instruction.memory_displacement64();
        let scale = u64::from(instruction.memory_index_scale());
        if base == Register::RIP || base == Register::EIP {
            // The code says where.
        } else if index.is_vector_register() {
            self.gather(instruction);
            if base != Register::None {
                self.set(base, offset.wrapping_sub(displacement), mask);
            }
        } else {
            let mut index_value = 0;
            let same = base != Register::None && base == index;
            let byte_index = index == Register::AL;
            if byte_index {
                index_value = self.start.gpr[gpr::RAX] & 0xff;
            } else if index != Register::None && !same && base != Register::None {
                index_value = (self.random.next() as i8 as i64 / 2) as u64;
                self.set(index, index_value, mask);
            }
            let rest = offset.wrapping_sub(displacement) & mask;
            if same {
                self.set(base, rest / (scale + 1), mask);
            } else if base != Register::None {
                self.set(
                    base,
                    rest.wrapping_sub(index_value.wrapping_mul(scale)),
                    mask,
                );
            } else if index != Register::None {
                let rest = if mask == u64::MAX {
                    rest as i64
                } else {
                    rest as i32 as i64
                };
                self.set(index, (rest / scale as i64) as u64, mask);
            }
        }
        // Where it is, whatever was wanted: registers may play two parts.
        let segment = segment.map_or(0, |which| self.start.bases[which]);
        let space = if long { u64::MAX } else { 0xffff_ffff };
        for _ in 0..64 {
            self.operand = self.effective(instruction, mask).wrapping_add(segment) & space;
            let splits = if elements {
                !self.operand.is_multiple_of(size.max(1))
            } else {
                self.operand % 64 + size > 64
            };
            let register = if base == Register::None { index } else { base };
            if !locks || !splits || !register.is_gpr() {
                break;
            }
            // A lock across cache lines stops all processors of the host, and some hosts punish it, or never end it.
            let value = &mut self.start.gpr[register.number() & 15];
            *value = value.wrapping_sub(1);
        }
    }

    /// Sets a register that an address is made of.
    fn set(&mut self, register: Register, value: u64, mask: u64) {
        let garbage = if mask == u64::MAX {
            0
        } else {
            self.random.next() & !mask
        };
        let garbage = if self.is_long() {
            garbage
        } else {
            garbage & 0xffff_ffff
        };
        self.start.gpr[register.number() & 15] = value & mask | garbage;
    }

    fn effective(&self, instruction: &Instruction, mask: u64) -> u64 {
        let value = |register: Register| match register {
            Register::None | Register::RIP | Register::EIP => 0,
            Register::AL => self.start.gpr[0] & 0xff,
            register if register.is_vector_register() => 0,
            register => self.start.gpr[register.number() & 15],
        };
        let scale = u64::from(instruction.memory_index_scale());
        value(instruction.memory_base())
            .wrapping_add(value(instruction.memory_index()).wrapping_mul(scale))
            .wrapping_add(instruction.memory_displacement64())
            & mask
    }

    /// Indices of a gather that stay near its base, and a mask.
    fn gather(&mut self, instruction: &Instruction) {
        let scale = u64::from(instruction.memory_index_scale());
        let wild = self.random.one_in(16);
        let narrow = matches!(
            instruction.mnemonic(),
            Mnemonic::Vgatherdps
                | Mnemonic::Vgatherdpd
                | Mnemonic::Vpgatherdd
                | Mnemonic::Vpgatherdq
        );
        let index = instruction.memory_index().number();
        if index >= VECTORS {
            return;
        }
        let element = |random: &mut Random| {
            let near = random.below(320) / scale;
            let value = if random.one_in(4) {
                near.wrapping_neg()
            } else {
                near
            };
            if wild && random.one_in(3) {
                random.integer()
            } else {
                value
            }
        };
        for part in [160 + index * 16, 576 + index * 16] {
            for lane in [part, part + 8] {
                let value = if narrow {
                    element(self.random) & 0xffff_ffff | element(self.random) << 32
                } else {
                    element(self.random)
                };
                put(self.record, at::XSAVE + lane, value);
            }
        }
    }

    fn windows(&mut self) {
        let instruction = &self.piece.instruction;
        let size = operand_size(&self.piece.instruction);
        let mut windows = [Window::default(); 2];
        let mut room = ROOM;
        if self.uses_stack() {
            let pointer = self.start.gpr[gpr::RSP];
            windows[1] = Window::within(pointer.wrapping_sub(300), 300 + 96, &WRITABLE, 400);
            room -= windows[1].length();
        }
        if instruction.is_string_instruction() {
            let span = |register: usize| {
                let down = self.start.flags & rflags::DF != 0;
                let pointer = self.start.gpr[register];
                let first = if down {
                    pointer.wrapping_sub(400)
                } else {
                    pointer.wrapping_sub(8)
                };
                Window::within(first, 432, &WRITABLE, ROOM / 2)
            };
            windows = [span(gpr::RSI), span(gpr::RDI)];
        } else if matches!(
            instruction.mnemonic(),
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
        ) {
            let address = self.start.gpr[gpr::RDI];
            windows[0] = Window::within(address.wrapping_sub(16), 64, &WRITABLE, room);
        } else if memory_operand(instruction).is_some() {
            let (before, after) = match instruction.memory_index().is_vector_register() {
                true => (336, 352),
                false if size > 512 => (0, 0),
                false => (16, 16),
            };
            let first = self.operand.wrapping_sub(before);
            windows[0] = Window::within(first, before + size + after, &WRITABLE, room);
        }
        self.start.windows = windows;
    }

    fn contents(&mut self) {
        let bytes = (self.start.windows[0].length() + self.start.windows[1].length()) as usize;
        let lanes = self.piece.instruction.op_register(0).is_vector_register()
            || self.piece.instruction.op_register(1).is_vector_register()
            || self.random.one_in(4);
        for at in (at::MEMORY..at::MEMORY + bytes).step_by(8) {
            let value = if lanes {
                self.random.lane()
            } else {
                self.random.integer()
            };
            put(self.record, at, value);
        }
    }

    /// Writes memory that a window holds, as far as it does.
    fn put_memory(&mut self, address: u64, bytes: &[u8]) {
        let mut at = at::MEMORY;
        for window in self.start.windows {
            for (index, byte) in bytes.iter().enumerate() {
                if let Some(position) = window.position(address.wrapping_add(index as u64)) {
                    self.record[at + position] = *byte;
                }
            }
            at += window.length() as usize;
        }
    }

    fn memory(&self, address: u64) -> u64 {
        let mut at = at::MEMORY;
        for window in self.start.windows {
            if let Some(position) = window.position(address)
                && position as u64 + 8 <= window.length()
            {
                return quad(self.record, at + position);
            }
            at += window.length() as usize;
        }
        0
    }

    /// Where a jump through a register or memory leads.
    fn destination(&mut self) -> u64 {
        match self.random.below(16) {
            0 => self.random.next(),
            1 => PLAIN.0 + self.random.below(PAGE),
            2 => PLAIN.1 + self.random.below(PAGE),
            3 => (1 << 47) - 1 + self.random.below(3),
            4 => layout::code(self.piece.slot) + 2 * PAGE + self.random.below(PAGE),
            _ => self.piece.landing(self.random),
        }
    }

    /// What some instructions need to do more than fault.
    fn particulars(&mut self) {
        use Mnemonic as M;
        let instruction = self.piece.instruction;
        let memory = memory_operand(&instruction).is_some();
        let operand = self.operand;
        let pointer = self.start.gpr[gpr::RSP];
        let first = instruction.op_register(0);
        let width = if self.is_long() { 8 } else { 4 };
        // A locked operand must not move over the end of a cache line again.
        let moves = instruction.has_lock_prefix()
            && [instruction.memory_base(), instruction.memory_index()]
                .iter()
                .any(|part| part.is_gpr() && matches!(part.number() & 15, gpr::RAX | gpr::RDX));
        match instruction.mnemonic() {
            M::Div | M::Idiv if self.random.below(3) != 0 => {
                // A quotient that fits.
                let register = if first.is_gpr8() { gpr::RAX } else { gpr::RDX };
                let shift = if first.is_gpr8() || instruction.memory_size().size() == 1 {
                    60
                } else {
                    61
                };
                let small = self.random.next() >> shift;
                let value = if instruction.mnemonic() == M::Idiv && self.random.one_in(2) {
                    small.wrapping_neg()
                } else {
                    small
                };
                if first.number() != register || memory {
                    self.start.gpr[register] = value;
                }
            }
            M::Jmp | M::Call => {
                let destination = self.destination();
                if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() {
                    // What becomes of the upper half in compatibility mode is the processor's choice.
                    self.start.gpr[gpr::RSP] = self.start.gpr[gpr::RSP] & 0xffff_ffff | 0x1000;
                    let size = instruction.memory_size().size().max(4) - 2;
                    let mut bytes = destination.to_le_bytes()[..size].to_vec();
                    let selector = self.code_selector();
                    bytes.extend(selector.to_le_bytes());
                    self.put_memory(operand, &bytes);
                } else if memory {
                    self.put_memory(operand, &destination.to_le_bytes());
                } else if first.is_gpr() {
                    self.start.gpr[first.number() & 15] = destination;
                }
            }
            M::Ret => {
                let destination = self.destination();
                self.put_memory(pointer, &destination.to_le_bytes()[..width]);
            }
            M::Retf | M::Iret | M::Iretd | M::Iretq => self.far_return(pointer),
            M::Popf | M::Popfd | M::Popfq => {
                // With TF the next instruction would trap, which natively is another one.
                let value = self.random.next() & !rflags::TF;
                self.put_memory(pointer, &value.to_le_bytes());
            }
            M::Pop if first.is_segment_register() => self.selector_at(pointer),
            M::Mov | M::Lar | M::Lsl | M::Verr | M::Verw
                if instruction.mnemonic() != M::Mov || first.is_segment_register() =>
            {
                let from = if instruction.op_count() > 1 { 1 } else { 0 };
                if memory {
                    self.selector_at(operand);
                } else {
                    let register = instruction.op_register(from);
                    let selector = self.random.pick(&SELECTORS);
                    self.start.gpr[register.number() & 15] =
                        u64::from(selector) | self.random.next() << 16;
                }
            }
            M::Lfs | M::Lgs | M::Lss | M::Lds | M::Les => {
                let size = instruction.memory_size().size().max(4) as u64 - 2;
                self.selector_at(operand.wrapping_add(size));
            }
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 => {
                // The host has more components than the profile.
                let mask = self.components;
                self.start.gpr[gpr::RAX] &= mask | 0xffff_ffff << 32;
                self.start.gpr[gpr::RDX] &= 0xffff_ffff << 32;
                self.area(operand);
            }
            M::Fxrstor | M::Fxrstor64 => self.area(operand),
            M::Ldmxcsr | M::Vldmxcsr if self.random.below(8) != 0 => {
                let value = self.random.next() as u32 & 0xffff;
                self.put_memory(operand, &value.to_le_bytes());
            }
            M::Cmpxchg if self.random.one_in(2) && !moves => {
                self.start.gpr[gpr::RAX] = if memory {
                    self.memory(operand)
                } else {
                    self.start.gpr[first.full_register().number() & 15]
                };
            }
            M::Cmpxchg8b if self.random.one_in(2) && !moves => {
                let value = self.memory(operand);
                self.start.gpr[gpr::RAX] = value & 0xffff_ffff;
                self.start.gpr[gpr::RDX] = value >> 32;
            }
            M::Cmpxchg16b if self.random.one_in(2) && !moves => {
                self.start.gpr[gpr::RAX] = self.memory(operand);
                self.start.gpr[gpr::RDX] = self.memory(operand.wrapping_add(8));
            }
            M::Bt | M::Bts | M::Btr | M::Btc
                if memory && instruction.op_kind(1) == OpKind::Register =>
            {
                // Bits of other memory than the window would not be compared at once.
                let register = instruction.op_register(1).number() & 15;
                let base = instruction.memory_base();
                let index = instruction.memory_index();
                let free = (base == Register::None || base.number() & 15 != register)
                    && (index == Register::None || index.number() & 15 != register);
                if free {
                    let bit = self.random.next() as i8 as i64;
                    let wild = self.is_long()
                        && instruction.memory_size().size() == 8
                        && self.random.one_in(16);
                    self.start.gpr[register] = if wild {
                        self.random.next() | 1 << 62
                    } else {
                        bit as u64
                    };
                }
            }
            M::Xgetbv => {
                // XCR0, or what there is not; 1 is XINUSE, which the host may have and the profile not.
                self.start.gpr[gpr::RCX] =
                    self.random
                        .pick(&[0, 0, 0, 1 << 32, 2, 7, 1 << 31, u64::MAX]);
            }
            M::Loop | M::Loope | M::Loopne | M::Jrcxz | M::Jecxz | M::Jcxz => {
                self.start.gpr[gpr::RCX] =
                    self.random.pick(&[0, 1, 2, 1 << 32, 1 << 32 | 1, u64::MAX]);
            }
            _ => {}
        }
        if !self.is_long() {
            // What the upper halves are after a change of mode is the processor's choice.
            for register in &mut self.start.gpr {
                *register &= 0xffff_ffff;
            }
        }
    }

    fn selector_at(&mut self, address: u64) {
        let selector = self.random.pick(&SELECTORS);
        self.put_memory(address, &selector.to_le_bytes());
    }

    /// Often one of code, of either width.
    fn code_selector(&mut self) -> u16 {
        if self.random.one_in(2) {
            self.random.pick(&[0x23, 0x33])
        } else {
            self.random.pick(&SELECTORS)
        }
    }

    /// What RETF and IRET find on the stack.
    fn far_return(&mut self, pointer: u64) {
        let instruction = &self.piece.instruction;
        let iret = instruction.mnemonic() != Mnemonic::Retf;
        let width = match instruction.code() {
            iced_x86::Code::Retfw | iced_x86::Code::Retfw_imm16 | iced_x86::Code::Iretw => 2,
            iced_x86::Code::Retfq | iced_x86::Code::Retfq_imm16 | iced_x86::Code::Iretq => 8,
            _ => 4,
        };
        let same = if self.is_long() { 0x33 } else { 0x23 };
        let destination = self.destination();
        let selector = if self.random.one_in(2) {
            same
        } else {
            self.code_selector().into()
        };
        let mut words = vec![destination, selector];
        if iret {
            let mut flags = self.random.next() & 0x3f_7fff & !rflags::TF;
            if self.is_long() && !pointer.is_multiple_of(width as u64) {
                // What comes behind them would raise #AC with AC clear. Hosts take that for a split lock, and do the instruction
                // again without end.
                flags &= !rflags::AC;
            }
            words.push(flags);
            words.push(STACK.0 + 0x400 + self.random.below(0x80) * 8);
            words.push(if self.random.below(4) != 0 {
                0x2b
            } else {
                self.random.pick(&SELECTORS).into()
            });
        }
        for (index, word) in words.iter().enumerate() {
            let address = pointer.wrapping_add((index * width) as u64);
            self.put_memory(address, &word.to_le_bytes()[..width]);
        }
    }

    /// A saved state for FXRSTOR and XRSTOR, mostly a valid one.
    fn area(&mut self, address: u64) {
        let mxcsr = self.random.next() as u32 & 0xffff;
        if self.random.below(8) != 0 {
            self.put_memory(address.wrapping_add(24), &mxcsr.to_le_bytes());
        }
        // Which bits of the x87 pointers a CPU keeps depends on the width of its addresses.
        for pointer in [8, 16] {
            let value = self.random.next() >> 17;
            self.put_memory(address.wrapping_add(pointer), &value.to_le_bytes());
        }
        if self.random.below(8) != 0 {
            let components = self.random.next() & self.components;
            self.put_memory(address.wrapping_add(512), &components.to_le_bytes());
            self.put_memory(address.wrapping_add(520), &[0; 56]);
        } else {
            // A component that only the host has would be refused in the guest alone; bit 62 has none.
            let header = address.wrapping_add(512);
            let components = self.memory(header);
            if components & !self.components != 0 {
                self.put_memory(header, &(components | 1 << 62).to_le_bytes());
            }
        }
    }
}

/// Bytes of an instruction's memory operand, at most.
pub(crate) fn operand_size(instruction: &Instruction) -> u64 {
    match instruction.mnemonic() {
        Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64
        | Mnemonic::Xrstor
        | Mnemonic::Xrstor64 => 832,
        _ => match instruction.memory_size().size() {
            0 => 64,
            size => size as u64,
        },
    }
}

/// Bits of the addresses that an instruction computes.
pub(crate) fn address_bits(instruction: &Instruction, bits: u32) -> u32 {
    let register = match instruction.memory_base() {
        Register::None => instruction.memory_index(),
        register => register,
    };
    match register {
        Register::RIP => 64,
        Register::EIP => 32,
        register if register.is_gpr64() => 64,
        register if register.is_gpr32() => 32,
        register if register.is_gpr16() => 16,
        _ => match instruction.memory_displ_size() {
            2 => 2 * 8,
            8 => 64,
            _ => bits,
        },
    }
}

#[cfg(test)]
mod tests;
