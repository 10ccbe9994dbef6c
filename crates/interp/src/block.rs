//! Decoded blocks and where to find them.
//!
//! A block is known by the host address of its first byte, which stands for the guest-physical one,
//! and the code size: wherever the guest maps the page, the same block serves.

use std::collections::HashMap;

use trapgate_memory::{HostAddress, PAGE_SIZE, TraceFlags};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::sreg;

use crate::cpu::{CodeSize, Cpu, Stop};
use crate::decode::{DecodeError, Decoded, MAX_INSTRUCTION, decode};
use crate::mmu::Place;
use crate::op::Op;
use crate::tlb::Access;

/// Places in the direct-mapped table in front of the map.
const TABLE: usize = 1 << 14;

/// Ops after which all blocks are thrown away: 32 bytes each, 16 MiB.
const MAX_OPS: usize = 512 * 1024;

/// A run of instructions that ends with a transfer of control, or before the page's end, or with
/// one instruction that crosses it.
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    key: Key,
    /// Bytes from the first instruction to the end of the last.
    length: u16,
    /// For an instruction that crosses its page's end: where the next page was then.
    second: Option<HostAddress>,
}

/// Host address of the first byte, and the code size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key(u64, CodeSize);

impl Key {
    #[inline(always)]
    fn slot(self) -> usize {
        let mixed = self.0 ^ (self.0 >> 15) ^ ((self.1 as u64) << 13);
        mixed as usize % TABLE
    }
}

const NO_KEY: Key = Key(0, CodeSize::Bits16);

/// The page that instructions were last fetched from.
#[derive(Clone, Copy)]
struct FetchPage {
    linear: u64,
    host: HostAddress,
    /// [`Cpu::fetch_epoch`] in which that was true.
    epoch: u64,
}

/// All blocks of one vCPU.
pub(crate) struct Blocks {
    table: Box<[(Key, u32)]>,
    map: HashMap<Key, u32>,
    blocks: Vec<Option<Block>>,
    free: Vec<u32>,
    /// Blocks with code on each page, by guest-physical page number.
    pages: HashMap<u64, Vec<u32>>,
    ops: usize,
    /// The page that instructions were last fetched from.
    page: Option<FetchPage>,
    /// For code that can't be kept, because it does not lie in RAM or is larger than the segment.
    passing: Option<Block>,
}

impl Blocks {
    pub(crate) fn new() -> Self {
        Self {
            table: vec![(NO_KEY, 0); TABLE].into_boxed_slice(),
            map: HashMap::new(),
            blocks: Vec::new(),
            free: Vec::new(),
            pages: HashMap::new(),
            ops: 0,
            page: None,
            passing: None,
        }
    }

    /// The block at CS:RIP, decoded now if need be. `Err` after a fault of the fetch.
    #[inline]
    pub(crate) fn lookup(&mut self, cpu: &mut Cpu) -> Result<&Block, Stop> {
        let linear = if cpu.is_64bit() {
            cpu.rip
        } else {
            self.legacy_address(cpu)?
        };
        let page = linear & !(PAGE_SIZE - 1);
        let host = match self.page {
            Some(last) if last.linear == page && last.epoch == cpu.fetch_epoch => last.host,
            _ => match self.fetch_page(cpu, linear)? {
                Some(host) => {
                    self.page = Some(FetchPage {
                        linear: page,
                        host,
                        epoch: cpu.fetch_epoch,
                    });
                    host
                }
                None => return self.decode_passing(cpu, linear),
            },
        };
        let host = host.offset(linear % PAGE_SIZE);
        let key = Key(host.as_ptr() as u64, cpu.code_size);
        let (found, number) = self.table[key.slot()];
        if found == key {
            // The table's numbers are those of living blocks: `remove` clears them.
            let index = number as usize;
            if self.fits(cpu, index, linear)? {
                return self.get(index);
            }
        }
        self.find_or_decode(cpu, linear, key, host)
    }

    #[inline(always)]
    fn get(&self, index: usize) -> Result<&Block, Stop> {
        match &self.blocks[index] {
            Some(block) => Ok(block),
            None => unreachable!("numbers are those of living blocks"),
        }
    }

    /// Linear address of CS:EIP outside 64-bit mode, after the limit check.
    fn legacy_address(&mut self, cpu: &mut Cpu) -> Result<u64, Stop> {
        cpu.rip &= 0xffff_ffff;
        let code = &cpu.sys.segments[sreg::CS];
        if cpu.rip > u64::from(code.limit) {
            return cpu.gp0();
        }
        Ok(code.base.wrapping_add(cpu.rip) & 0xffff_ffff)
    }

    /// Whether a block may run as it was decoded: its second page is still there, and it ends
    /// inside the code segment.
    #[inline(always)]
    fn fits(&self, cpu: &mut Cpu, index: usize, linear: u64) -> Result<bool, Stop> {
        let block = self.get(index)?;
        if block.second.is_none() && cpu.is_64bit() {
            return Ok(true);
        }
        self.fits_slowly(cpu, index, linear)
    }

    fn fits_slowly(&self, cpu: &mut Cpu, index: usize, linear: u64) -> Result<bool, Stop> {
        let block = self.get(index)?;
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
        Ok(match cpu.piece(linear, Access::Execute, view)?.place {
            Place::Ram { host, .. } => Some(host.page_start()),
            Place::Device => None,
        })
    }

    #[cold]
    fn find_or_decode(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        key: Key,
        host: HostAddress,
    ) -> Result<&Block, Stop> {
        if let Some(&number) = self.map.get(&key) {
            let index = number as usize;
            if self.fits(cpu, index, linear)? {
                self.table[key.slot()] = (key, number);
                return self.get(index);
            }
            if cpu.is_64bit() {
                self.remove(number);
            } else {
                return self.decode_passing(cpu, linear);
            }
        }
        if self.ops > MAX_OPS {
            self.clear(cpu);
        }
        let view = cpu.plain_view;
        // The traces want the guest-physical address.
        let gpa = cpu.translate(linear, Access::Execute, view)?.gpa;
        // Mark first, then read: a write in between is then seen.
        self.trace(cpu, gpa);
        let mut bytes = [0; 512];
        let available = ((PAGE_SIZE - linear % PAGE_SIZE) as usize).min(bytes.len());
        host.read(&mut bytes[..available]);
        match decode(cpu, &bytes[..available]) {
            Ok(decoded) if cpu.is_64bit() || inside_limit(cpu, decoded.length) => {
                Ok(self.insert(cpu, key, decoded, gpa, None))
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

    /// Decodes the instruction that starts on one page and goes on in the next.
    fn decode_crossing(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        key: Key,
        host: HostAddress,
        gpa: u64,
    ) -> Result<&Block, Stop> {
        let next = cpu.advance(linear & !(PAGE_SIZE - 1), PAGE_SIZE);
        let Some(second) = self.fetch_page(cpu, next)? else {
            return self.decode_passing(cpu, linear);
        };
        let view = cpu.plain_view;
        let second_gpa = cpu.translate(next, Access::Execute, view)?.gpa;
        self.trace(cpu, second_gpa);
        let mut bytes = [0; MAX_INSTRUCTION];
        let available = (PAGE_SIZE - linear % PAGE_SIZE) as usize;
        host.read(&mut bytes[..available]);
        second.read(&mut bytes[available..]);
        match decode(cpu, &bytes) {
            Ok(mut decoded) if inside_limit_or_long(cpu, &decoded) => {
                // Only the instruction that crosses, so that each block has one page or is one
                // instruction.
                decoded.ops.truncate(1);
                decoded.length = usize::from(decoded.ops[0].length).max(1);
                Ok(self.insert(cpu, key, decoded, gpa, Some((second, second_gpa))))
            }
            Err(DecodeError::TableFull) => {
                self.clear(cpu);
                self.decode_crossing(cpu, linear, key, host, gpa)
            }
            _ => self.decode_passing(cpu, linear),
        }
    }

    /// Decodes one instruction that is not kept.
    #[cold]
    fn decode_passing(&mut self, cpu: &mut Cpu, linear: u64) -> Result<&Block, Stop> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let limit = if cpu.is_64bit() {
            MAX_INSTRUCTION as u64
        } else {
            let code = &cpu.sys.segments[sreg::CS];
            (u64::from(code.limit) + 1 - cpu.rip).min(MAX_INSTRUCTION as u64)
        };
        let view = cpu.plain_view;
        let mut decoded = Err(DecodeError::TooShort);
        let mut have = 0;
        while have < limit {
            // Byte by byte: only what the instruction needs may fault.
            let at = cpu.advance(linear, have);
            let piece = cpu.piece(at, Access::Execute, view)?;
            let place = have as usize;
            cpu.read_piece(piece, &mut bytes[place..=place]);
            have += 1;
            decoded = decode(cpu, &bytes[..have as usize]);
            match decoded {
                Err(DecodeError::TooShort) => {}
                Err(DecodeError::TableFull) => {
                    self.clear(cpu);
                    return self.decode_passing(cpu, linear);
                }
                Ok(_) => break,
            }
        }
        let Ok(mut decoded) = decoded else {
            // The code segment ends inside the instruction, or it is longer than any.
            return cpu.gp0();
        };
        decoded.ops.truncate(1);
        Ok(self.passing.insert(Block {
            ops: decoded.ops.into_boxed_slice(),
            key: NO_KEY,
            length: 0,
            second: None,
        }))
    }

    /// Marks a page as one whose writes concern decoded code.
    fn trace(&mut self, cpu: &mut Cpu, gpa: u64) {
        let Some(page) = cpu.memory.page_index(gpa) else {
            return;
        };
        let before = cpu.memory.traces().set(page, TraceFlags::CODE);
        if !before.contains(TraceFlags::CODE)
            && let Some(host) = cpu.memory.host(gpa & !(PAGE_SIZE - 1))
        {
            cpu.tlb.revoke_write(host);
        }
    }

    fn insert(
        &mut self,
        cpu: &mut Cpu,
        key: Key,
        decoded: Decoded,
        gpa: u64,
        second: Option<(HostAddress, u64)>,
    ) -> &Block {
        let in_first = (PAGE_SIZE - gpa % PAGE_SIZE).min(decoded.length as u64);
        cpu.code.add(gpa, in_first);
        let number = self.free.pop().unwrap_or_else(|| {
            self.blocks.push(None);
            self.blocks.len() as u32 - 1
        });
        self.pages.entry(gpa / PAGE_SIZE).or_default().push(number);
        if let Some((_, second_gpa)) = second {
            cpu.code.add(second_gpa, decoded.length as u64 - in_first);
            self.pages
                .entry(second_gpa / PAGE_SIZE)
                .or_default()
                .push(number);
        }
        self.ops += decoded.ops.len();
        self.map.insert(key, number);
        self.table[key.slot()] = (key, number);
        self.blocks[number as usize].insert(Block {
            ops: decoded.ops.into_boxed_slice(),
            key,
            length: decoded.length as u16,
            second: second.map(|(host, _)| host),
        })
    }

    fn remove(&mut self, number: u32) {
        let Some(block) = self.blocks[number as usize].take() else {
            return;
        };
        self.ops -= block.ops.len();
        self.map.remove(&block.key);
        let slot = block.key.slot();
        if self.table[slot].0 == block.key {
            self.table[slot] = (NO_KEY, 0);
        }
        self.free.push(number);
    }

    /// Throws away the blocks whose code was written over.
    pub(crate) fn drop_stale(&mut self, cpu: &mut Cpu) {
        for page in cpu.code.take_stale() {
            for number in self.pages.remove(&page).unwrap_or_default() {
                // A number may be another page's block by now: throwing that away costs only time.
                self.remove(number);
            }
            self.untrace(cpu, page);
        }
    }

    /// Throws all blocks away.
    pub(crate) fn clear(&mut self, cpu: &mut Cpu) {
        for page in cpu.code.clear() {
            self.untrace(cpu, page);
        }
        self.table.fill((NO_KEY, 0));
        self.map.clear();
        self.blocks.clear();
        self.free.clear();
        self.pages.clear();
        self.ops = 0;
        self.passing = None;
        cpu.thunks.clear();
    }

    /// Lets writes to a page be fast again, unless another processor has code there too.
    fn untrace(&self, cpu: &Cpu, page: u64) {
        if cpu.count > 1 {
            return;
        }
        if let Some(index) = cpu.memory.page_index(page * PAGE_SIZE) {
            cpu.memory.traces().clear(index, TraceFlags::CODE);
        }
    }
}

/// Whether `length` bytes from EIP are inside the code segment.
fn inside_limit(cpu: &Cpu, length: usize) -> bool {
    let limit = u64::from(cpu.sys.segments[sreg::CS].limit);
    cpu.rip + length.max(1) as u64 - 1 <= limit
}

fn inside_limit_or_long(cpu: &Cpu, decoded: &Decoded) -> bool {
    cpu.is_64bit() || inside_limit(cpu, decoded.length)
}
