//! Decoded blocks and where to find them.
//!
//! A block is known by the host address of its first byte, which stands for the guest-physical one,
//! and the code size: wherever the guest maps the page, the same block serves. It remembers which two ran after it
//! lately; they lie in fewer cache lines than a table by address, and code that runs once a millisecond finds
//! those cold.

use std::collections::HashMap;

use trapgate_memory::{HostAddress, PAGE_SIZE};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::sreg;

use crate::cpu::{CodeSize, Cpu, Stop};
use crate::decode::{DecodeError, Decoded, MAX_BLOCK, MAX_INSTRUCTION, decode, undefined};
use crate::op::Op;
use crate::tlb::Access;

/// Entries of the direct-mapped table in front of the map.
const TABLE: usize = 1 << 14;

/// What is kept before all of it is thrown away. Any of these limits can be met with little of the others: a block may be
/// one op, and a page hold one block.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Of 32 bytes.
    ops: usize,
    /// Of 24 bytes, and of 33 in a hash table that is at least 7/16 full. Those that were thrown away count until all are.
    blocks: usize,
    /// Of 33 bytes in such a table, and a list of blocks.
    pages: usize,
}

/// Pages that are watched for writes to code before all is thrown away: a table of 4 MiB.
const MAX_WATCHED: usize = 7 << 14;

/// At most 16 MiB of ops, 15 MiB of blocks, and 6 MiB for the pages.
const ALONE: Limits = Limits {
    ops: 512 * 1024,
    blocks: 7 << 15,
    pages: 7 << 13,
};

/// For an engine that keeps code of its own: a quarter of the ops.
const BESIDE_OTHER_CODE: Limits = Limits {
    ops: 128 * 1024,
    blocks: 7 << 12,
    pages: 7 << 12,
};

/// What a block is known by: the host address of its first byte, and the code size in the two top
/// bits, which no host address has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key(u64);

impl Key {
    const NONE: Self = Self(u64::MAX);

    #[inline(always)]
    fn new(host: HostAddress, code_size: CodeSize) -> Self {
        Self(host.as_ptr() as u64 | (code_size as u64) << 62)
    }

    #[inline(always)]
    fn slot(self) -> usize {
        (self.0 ^ (self.0 >> 14)) as usize % TABLE
    }
}

/// A run of ops in [`Blocks::ops`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    start: u32,
    count: u16,
    /// The block may run wherever it is found: 64-bit code on one page.
    unconditional: bool,
}

/// Where an instruction that is not kept is put.
const PASSING: Place = Place {
    start: 0,
    count: 1,
    unconditional: false,
};

/// A run of instructions that ends with a transfer of control, or before the page's end, or is
/// one instruction that crosses it. What the search for the next needs of it.
#[derive(Clone, Copy)]
struct Block {
    /// [`Key::NONE`] once it was thrown away.
    key: Key,
    place: Place,
    /// Those that ran after it lately, which they are likely to again. Only to be tried: by their keys.
    next: [Number; 2],
}

/// Index in [`Blocks::blocks`].
type Number = u32;

/// The block that is nowhere.
const NOWHERE: Number = 0;

/// What is seldom asked of a block.
#[derive(Clone, Copy)]
struct Details {
    number: Number,
    /// Bytes from the first instruction to the end of the last.
    length: u16,
    /// For an instruction that crosses its page's end: where the next page was then.
    second: Option<HostAddress>,
}

const NO_BLOCK: Block = Block {
    key: Key::NONE,
    place: PASSING,
    next: [NOWHERE; 2],
};

/// A page that instructions were fetched from.
#[derive(Clone, Copy)]
struct FetchPage {
    linear: u64,
    host: Option<HostAddress>,
    /// [`Cpu::fetch_epoch`] in which that was true.
    epoch: u64,
}

impl FetchPage {
    /// How many are kept.
    const KEPT: usize = 32;

    const NONE: Self = Self {
        linear: 0,
        host: None,
        epoch: 0,
    };

    #[inline(always)]
    fn slot(linear: u64) -> usize {
        (linear / PAGE_SIZE) as usize % Self::KEPT
    }
}

/// All blocks of one vCPU.
pub(crate) struct Blocks {
    /// The first block is none.
    blocks: Vec<Block>,
    /// The one that was found last.
    last: Number,
    table: Box<[Number]>,
    map: HashMap<Key, Details>,
    /// All ops of all blocks, one block after the other; those of blocks that were thrown away
    /// stay until everything is.
    ops: Vec<Op>,
    /// Blocks with code on each page, by guest-physical page number.
    pages: HashMap<u64, Vec<Key>>,
    /// Where instructions were fetched from lately, by page.
    pages_entered: [FetchPage; FetchPage::KEPT],
    limits: Limits,
    pub(crate) dropped: Dropped,
    /// How many were decoded.
    pub(crate) decoded: u64,
}

/// Which decoded code was thrown away: for an engine that made its own code of the same bytes.
#[derive(Debug, Default)]
pub struct Dropped {
    /// All of it.
    pub all: bool,
    /// That on these guest-physical pages, by number.
    pub pages: Vec<u64>,
    /// Whether anyone takes what is written here.
    wanted: bool,
}

impl Dropped {
    /// Takes what was noted, to start over.
    pub fn take(&mut self) -> Self {
        let wanted = self.wanted;
        std::mem::replace(
            self,
            Self {
                wanted,
                ..Self::default()
            },
        )
    }
}

impl Blocks {
    pub(crate) fn new() -> Self {
        Self {
            blocks: vec![NO_BLOCK],
            last: NOWHERE,
            table: vec![NOWHERE; TABLE].into_boxed_slice(),
            map: HashMap::new(),
            ops: vec![undefined()],
            pages: HashMap::new(),
            pages_entered: [FetchPage::NONE; FetchPage::KEPT],
            limits: ALONE,
            dropped: Dropped::default(),
            decoded: 0,
        }
    }

    /// Someone makes code of the same bytes: from now on [`Dropped`] is noted, and less is kept.
    pub(crate) fn note_dropped(&mut self) {
        self.dropped.wanted = true;
        self.limits = BESIDE_OTHER_CODE;
    }

    /// The ops of the block that was found last.
    #[inline(always)]
    pub(crate) fn ops(&self) -> &[Op] {
        let place = self.blocks[self.last as usize].place;
        let start = place.start as usize;
        &self.ops[start..start + usize::from(place.count)]
    }

    /// Finds the block at CS:RIP, decoded now if need be: [`Self::ops`] gives it then. `Err` after a fault of the fetch.
    #[inline(always)]
    pub(crate) fn find(&mut self, cpu: &mut Cpu) -> Result<(), Stop> {
        if cpu.is_64bit() && self.follow(cpu) {
            return Ok(());
        }
        self.search(cpu)
    }

    /// Finds the block among those that ran after the last one.
    #[inline(always)]
    fn follow(&mut self, cpu: &Cpu) -> bool {
        let Some(page) = self.known_page(cpu, cpu.rip) else {
            return false;
        };
        let key = Key::new(page.offset(cpu.rip % PAGE_SIZE), CodeSize::Bits64);
        for number in self.blocks[self.last as usize].next {
            // Those are unconditional, if they are not gone.
            if self.blocks[number as usize].key == key {
                self.last = number;
                return true;
            }
        }
        false
    }

    #[inline(never)]
    fn search(&mut self, cpu: &mut Cpu) -> Result<(), Stop> {
        let linear = self.linear(cpu)?;
        let page = match self.known_page(cpu, linear) {
            Some(page) => page,
            None => match self.enter_page(cpu, linear)? {
                Some(page) => page,
                None => return self.decode_passing(cpu, linear),
            },
        };
        let host = page.offset(linear % PAGE_SIZE);
        let key = Key::new(host, cpu.code_size);
        let before = self.last;
        let number = self.table[key.slot()];
        let found = self.blocks[number as usize];
        if found.key == key && found.place.unconditional {
            self.last = number;
        } else {
            self.find_or_decode(cpu, linear, key, host)?;
        }
        // It may be gone, and its number another's or nobody's.
        if self.blocks[self.last as usize].place.unconditional
            && let Some(before) = self.blocks.get_mut(before as usize)
            && before.next[0] != self.last
        {
            before.next = [self.last, before.next[0]];
        }
        Ok(())
    }

    /// The instruction at CS:RIP by itself: after it all flags are right, which they need not be
    /// inside a block ([`crate::quiet`]).
    pub(crate) fn single(&mut self, cpu: &mut Cpu) -> Result<Op, Stop> {
        self.find(cpu)?;
        if self.ops()[0].quiet >= 2 {
            let linear = self.linear(cpu)?;
            self.decode_passing(cpu, linear)?;
        }
        Ok(self.ops()[0])
    }

    /// Linear address of CS:RIP.
    fn linear(&self, cpu: &mut Cpu) -> Result<u64, Stop> {
        if cpu.is_64bit() {
            Ok(cpu.rip)
        } else {
            self.legacy_address(cpu)
        }
    }

    /// The page of `linear`, if instructions were fetched from it lately.
    #[inline(always)]
    fn known_page(&self, cpu: &Cpu, linear: u64) -> Option<HostAddress> {
        let page = &self.pages_entered[FetchPage::slot(linear)];
        let known = page.linear == linear & !(PAGE_SIZE - 1) && page.epoch == cpu.fetch_epoch;
        page.host.filter(|_| known)
    }

    /// Notes the page that is executed from now on.
    fn enter_page(&mut self, cpu: &mut Cpu, linear: u64) -> Result<Option<HostAddress>, Stop> {
        let host = self.fetch_page(cpu, linear)?;
        if let Some(host) = host {
            self.pages_entered[FetchPage::slot(linear)] = FetchPage {
                linear: linear & !(PAGE_SIZE - 1),
                host: Some(host),
                epoch: cpu.fetch_epoch,
            };
        }
        Ok(host)
    }

    /// Linear address of CS:EIP outside 64-bit mode, after the limit check.
    fn legacy_address(&self, cpu: &mut Cpu) -> Result<u64, Stop> {
        cpu.rip &= 0xffff_ffff;
        let code = &cpu.sys.segments[sreg::CS];
        if cpu.rip > u64::from(code.limit) {
            return cpu.gp0();
        }
        Ok(code.base.wrapping_add(cpu.rip) & 0xffff_ffff)
    }

    /// Whether a block may run as it was decoded: its second page is still there, and it ends
    /// inside the code segment.
    fn fits(&self, cpu: &mut Cpu, block: &Details, linear: u64) -> Result<bool, Stop> {
        if !cpu.is_64bit() && !inside_limit(cpu, block.length.into()) {
            return Ok(false);
        }
        if let Some(second) = block.second {
            let next = cpu.advance(linear & !(PAGE_SIZE - 1), PAGE_SIZE);
            if self.fetch_page(cpu, next)? != Some(second) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Host address of the page that instructions at `linear` are fetched from; `None` if it is
    /// not RAM.
    fn fetch_page(&self, cpu: &mut Cpu, linear: u64) -> Result<Option<HostAddress>, Stop> {
        if cpu.is_64bit() && !is_canonical(linear) {
            return cpu.gp0();
        }
        let view = cpu.plain_view;
        // Not the page's start: a page fault shows the address.
        let piece = cpu.piece(linear, Access::Execute, view)?;
        Ok(match piece.place {
            crate::mmu::Place::Ram { host, .. } => Some(host.page_start()),
            crate::mmu::Place::Device => None,
        })
    }

    #[cold]
    fn find_or_decode(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        key: Key,
        host: HostAddress,
    ) -> Result<(), Stop> {
        if let Some(&block) = self.map.get(&key) {
            if self.fits(cpu, &block, linear)? {
                self.table[key.slot()] = block.number;
                self.last = block.number;
                return Ok(());
            }
            if !cpu.is_64bit() {
                return self.decode_passing(cpu, linear);
            }
        }
        if self.is_full(cpu) {
            self.clear(cpu);
        }
        let view = cpu.plain_view;
        // The traces want the guest-physical address.
        let gpa = cpu.translate(linear, Access::Execute, view)?.gpa;
        // Mark first, then read: a write in between is then seen.
        cpu.watch_code(gpa, 1);
        let mut bytes = [0; 512];
        let available = ((PAGE_SIZE - linear % PAGE_SIZE) as usize).min(bytes.len());
        host.read(&mut bytes[..available]);
        match decode(cpu, &bytes[..available], MAX_BLOCK) {
            Ok(decoded) if cpu.is_64bit() || inside_limit(cpu, decoded.length) => {
                self.insert(cpu, key, &decoded, gpa, None);
                Ok(())
            }
            Err(DecodeError::TableFull) => {
                self.clear(cpu);
                self.find_or_decode(cpu, linear, key, host)
            }
            Err(DecodeError::TooShort) if available < MAX_INSTRUCTION => {
                self.decode_crossing(cpu, linear, key, host, gpa)
            }
            _ => self.decode_passing(cpu, linear),
        }
    }

    fn is_full(&self, cpu: &Cpu) -> bool {
        let Limits { ops, blocks, pages } = self.limits;
        self.ops.len() > ops
            || self.blocks.len() >= blocks
            || self.pages.len() >= pages
            // Those where nothing could be decoded, or where another engine's code is, count too.
            || cpu.code.pages() >= MAX_WATCHED
    }

    /// Decodes the instruction that starts on one page and goes on in the next.
    fn decode_crossing(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        key: Key,
        host: HostAddress,
        gpa: u64,
    ) -> Result<(), Stop> {
        let next = cpu.advance(linear & !(PAGE_SIZE - 1), PAGE_SIZE);
        let Some(second) = self.fetch_page(cpu, next)? else {
            return self.decode_passing(cpu, linear);
        };
        let view = cpu.plain_view;
        let second_gpa = cpu.translate(next, Access::Execute, view)?.gpa;
        cpu.watch_code(second_gpa, 1);
        let mut bytes = [0; MAX_INSTRUCTION];
        let available = (PAGE_SIZE - linear % PAGE_SIZE) as usize;
        host.read(&mut bytes[..available]);
        second.read(&mut bytes[available..]);
        // Only the instruction that crosses, so that each block has one page or is one
        // instruction.
        match decode(cpu, &bytes, 1) {
            Ok(decoded) => {
                if !cpu.is_64bit() && !inside_limit(cpu, decoded.length) {
                    return self.decode_passing(cpu, linear);
                }
                self.insert(cpu, key, &decoded, gpa, Some((second, second_gpa)));
                Ok(())
            }
            Err(DecodeError::TableFull) => {
                self.clear(cpu);
                self.decode_crossing(cpu, linear, key, host, gpa)
            }
            Err(DecodeError::TooShort) => self.decode_passing(cpu, linear),
        }
    }

    /// Decodes one instruction that is not kept.
    #[cold]
    fn decode_passing(&mut self, cpu: &mut Cpu, linear: u64) -> Result<(), Stop> {
        self.last = NOWHERE;
        let mut bytes = [0; MAX_INSTRUCTION];
        let limit = if cpu.is_64bit() {
            MAX_INSTRUCTION as u64
        } else {
            let whole = (1..=MAX_INSTRUCTION).rev();
            whole
                .into_iter()
                .find(|&length| inside_limit(cpu, length))
                .unwrap_or(0) as u64
        };
        let view = cpu.plain_view;
        for have in 0..limit {
            // Byte by byte: only what the instruction needs may fault.
            let at = cpu.advance(linear, have);
            let piece = cpu.piece(at, Access::Execute, view)?;
            let end = have as usize + 1;
            cpu.read_piece(piece, &mut bytes[end - 1..end]);
            match decode(cpu, &bytes[..end], 1) {
                Err(DecodeError::TooShort) => {}
                Err(DecodeError::TableFull) => {
                    self.clear(cpu);
                    return self.decode_passing(cpu, linear);
                }
                Ok(decoded) => {
                    self.ops[PASSING.start as usize] = decoded.ops[0];
                    return Ok(());
                }
            }
        }
        // The code segment ends inside the instruction.
        cpu.gp0()
    }

    fn insert(
        &mut self,
        cpu: &mut Cpu,
        key: Key,
        decoded: &Decoded,
        gpa: u64,
        second: Option<(HostAddress, u64)>,
    ) {
        self.decoded += 1;
        let in_first = (PAGE_SIZE - gpa % PAGE_SIZE).min(decoded.length as u64);
        cpu.code.add(gpa, in_first);
        self.pages.entry(gpa / PAGE_SIZE).or_default().push(key);
        if let Some((_, second_gpa)) = second {
            cpu.code.add(second_gpa, decoded.length as u64 - in_first);
            let keys = self.pages.entry(second_gpa / PAGE_SIZE).or_default();
            keys.push(key);
        }
        let place = Place {
            start: self.ops.len() as u32,
            count: decoded.ops.len() as u16,
            unconditional: second.is_none() && cpu.is_64bit(),
        };
        self.ops.extend_from_slice(&decoded.ops);
        // There are fewer than ops.
        let number = self.blocks.len() as Number;
        self.blocks.push(Block {
            key,
            place,
            next: [NOWHERE; 2],
        });
        self.table[key.slot()] = number;
        self.last = number;
        let details = Details {
            number,
            length: decoded.length as u16,
            second: second.map(|(host, _)| host),
        };
        self.map.insert(key, details);
    }

    fn remove(&mut self, key: Key) {
        if let Some(gone) = self.map.remove(&key) {
            self.blocks[gone.number as usize].key = Key::NONE;
        }
    }

    /// Throws away the blocks whose code was written over.
    pub(crate) fn drop_stale(&mut self, cpu: &mut Cpu) {
        for page in cpu.code.take_stale() {
            if self.dropped.wanted {
                self.dropped.pages.push(page);
            }
            for key in self.pages.remove(&page).unwrap_or_default() {
                self.remove(key);
            }
        }
    }

    /// Throws all blocks away.
    pub(crate) fn clear(&mut self, cpu: &mut Cpu) {
        cpu.code.clear();
        self.dropped.all = true;
        self.blocks.clear();
        self.blocks.push(NO_BLOCK);
        self.last = NOWHERE;
        self.table.fill(NOWHERE);
        self.map.clear();
        self.ops.truncate(1);
        // Their lists of blocks go too.
        self.pages.clear();
        cpu.thunks.clear();
    }
}

/// Whether `length` bytes from EIP are inside the code segment. Nothing is outside of one of 4 GiB: a host CPU
/// (Intel family 6, model 167) goes on at 0, within an instruction too.
fn inside_limit(cpu: &Cpu, length: usize) -> bool {
    let limit = cpu.sys.segments[sreg::CS].limit;
    limit == u32::MAX || cpu.rip + length.max(1) as u64 - 1 <= u64::from(limit)
}

#[cfg(test)]
mod tests;
