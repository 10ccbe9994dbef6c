//! Accesses across the end of a page, where host code finds both pages in the table.
//!
//! The instruction runs on a copy: the last bytes of the first page and the first ones of the second, side by side. If
//! it writes, a second copy of its code does, after which the bytes that it may have written go to their pages. Only
//! instructions that were seen to do it often are made so; others go to the interpreter, which takes ten times as long.

use std::mem::offset_of;

use crate::context::{HOST_OFFSET, page_offset};
use crate::emit::{Alu, Mem, RAX, RBX, RCX, RDI, RDX, RSI, RSP, condition};
use crate::instruction::Plan;
use crate::memory::Missed;
use crate::registers::ADDRESS;
use crate::stubs::{self, ENTRY_SHIFT, entry_mask};
use crate::unit::{Aside, Writer};

/// Bytes that are copied of each page: as many as the largest access has.
const HALF: usize = 32;

/// An access across the end of a page.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Crossing {
    copy: [[u8; HALF]; 2],
    /// Where its first byte is in the copy.
    start: u64,
    /// Host addresses of its parts, and their bytes.
    parts: [Part; 2],
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Part {
    host: u64,
    bytes: u64,
}

const START: u32 = offset_of!(Crossing, start) as u32;
const PARTS: u32 = offset_of!(Crossing, parts) as u32;

fn host_of(part: u32) -> u32 {
    PARTS + part * size_of::<Part>() as u32 + offset_of!(Part, host) as u32
}

fn bytes_of(part: u32) -> u32 {
    PARTS + part * size_of::<Part>() as u32 + offset_of!(Part, bytes) as u32
}

/// Code for an access that may cross, out of the way.
pub(crate) struct Cross {
    jump: usize,
    retry: u64,
    site: u32,
    /// Addresses of the stubs: that makes the copy, and that writes it back.
    cross: u64,
    spread: u64,
    size: u32,
    /// What runs on the copy, if it writes; else that is where the other goes on.
    code: Option<Vec<u8>>,
    /// Where to go on.
    next: u64,
}

impl Writer<'_> {
    /// The code from `hit` to here, of which the access was translated last, may be run on a copy.
    pub(crate) fn may_cross(&mut self, plan: &Plan, size: usize, hit: usize) {
        if size > HALF {
            return;
        }
        let view = self.mode.view();
        let found = self.asides.iter_mut().rev().find_map(|aside| match aside {
            &mut Aside::Miss {
                jump,
                retry,
                site,
                missed: Missed::Table,
                ..
            } => Some((aside, jump, retry, site)),
            _ => None,
        });
        let Some((aside, jump, retry, site)) = found else {
            return;
        };
        let here = self.asm.here();
        let code = plan.writes_memory.then(|| self.asm.bytes[hit..].to_vec());
        let start = here - (self.asm.bytes.len() - hit) as u64;
        *aside = Aside::Cross(Cross {
            jump,
            retry,
            site,
            cross: self.stubs.cross[view][usize::from(plan.writes_memory)],
            spread: self.stubs.spread,
            size: size as u32,
            next: if code.is_some() { here } else { start },
            code,
        });
        self.site_of(site).crosses = true;
    }

    /// Writes the code that is out of the way.
    pub(crate) fn crossed(&mut self, cross: &Cross) {
        self.asm.patch(cross.jump, self.asm.here());
        self.asm.call(cross.cross);
        self.asm.jump(cross.next);
        let copied = self.asm.bytes.len() - 4;
        self.asm.word(cross.size);
        // As after a miss.
        self.asm.jump(cross.retry);
        self.asm.word(cross.site);
        if let Some(code) = &cross.code {
            self.asm.patch(copied, self.asm.here());
            self.asm.raw(code);
            self.asm.call(cross.spread);
            self.asm.jump(cross.next);
        }
    }
}

/// Bytes of the jump that follows the call of the stub. What they are followed by is the access's size, then what follows
/// the call of a miss.
const JUMP: i32 = 5;
const MISSED: i32 = JUMP + 4;

impl stubs::Writer<'_> {
    /// Makes a copy of both parts of an access and returns with [`ADDRESS`] in the copy. RCX is the offset of the table's
    /// entry whose page was subtracted from [`ADDRESS`]. If the access does not cross, or one of the pages is not in the
    /// table, it is a miss like others.
    pub(crate) fn cross(&mut self, view: usize, write: bool, refill: u64) -> u64 {
        let start = self.asm.here();
        let table = self.at.tlb(view);
        let crossing = self.at.crossing();
        let field = |offset: u32| Mem::low(crossing + offset);
        let page = Mem::offset(table + page_offset(write), RCX);
        self.asm.alu_load(Alu::Add, ADDRESS, page);
        let saved = [RAX, RDX, RBX];
        for register in saved {
            self.asm.push(register);
        }
        self.asm.load(RBX, Mem::at(RSP, saved.len() as i32 * 8));
        self.asm.load32(RBX, Mem::at(RBX, JUMP));
        // RDX: the page. RCX: what is left of it. RBX: what is more than that.
        self.asm.mov(RDX, ADDRESS);
        self.asm.alu_imm(true, Alu::And, RDX, -4096);
        self.asm.lea(true, RCX, Mem::at(RDX, 4096));
        self.asm.alu(true, Alu::Sub, RCX, ADDRESS);
        self.asm.store(field(bytes_of(0)), RCX);
        self.asm.alu(true, Alu::Sub, RBX, RCX);
        self.asm.jump_if(condition::BE, self.asm.here());
        let mut failures = vec![self.asm.bytes.len() - 4];
        self.asm.store(field(bytes_of(1)), RBX);
        for part in [0, 1] {
            self.asm.rorx32(RAX, RDX, 12 - ENTRY_SHIFT);
            self.asm.alu_imm(false, Alu::And, RAX, entry_mask(view));
            let entry = |offset: u32| Mem::offset(table + offset, RAX);
            self.asm.compare_load(RDX, entry(page_offset(write)));
            self.asm.jump_if(condition::NE, self.asm.here());
            failures.push(self.asm.bytes.len() - 4);
            self.asm.load(RBX, entry(HOST_OFFSET));
            // Whole words are copied: the last ones of this page, or the first ones.
            if part == 0 {
                self.asm.lea(true, RBX, Mem::at(RBX, 4096 - HALF as i32));
            }
            for word in (0..HALF as i32).step_by(8) {
                self.asm.load(RAX, Mem::at(RBX, word));
                let to = part as i32 * HALF as i32 + word;
                self.asm.store(field(to as u32), RAX);
            }
            if part == 0 {
                self.asm.lea(true, RBX, Mem::at(RBX, HALF as i32));
                self.asm.alu(true, Alu::Sub, RBX, RCX);
                // The page after the last one is none.
                self.asm.alu_imm(true, Alu::Add, RDX, 4096);
                self.asm.jump_if(condition::E, self.asm.here());
                failures.push(self.asm.bytes.len() - 4);
            }
            self.asm.store(field(host_of(part)), RBX);
        }
        self.asm.mov_imm(ADDRESS, u64::from(crossing) + HALF as u64);
        self.asm.alu(true, Alu::Sub, ADDRESS, RCX);
        self.asm.store(field(START), ADDRESS);
        for register in saved.into_iter().rev() {
            self.asm.pop(register);
        }
        self.asm.raw(&[0xc3]);
        for failure in failures {
            self.asm.patch(failure, self.asm.here());
        }
        for register in saved.into_iter().rev() {
            self.asm.pop(register);
        }
        self.asm.pop(RCX);
        self.asm.lea(true, RCX, Mem::at(RCX, MISSED));
        self.asm.push(RCX);
        self.asm.jump(refill);
        start
    }

    /// Writes the copy of an access back, and nothing around it: others may have written that. Neither the flags nor a
    /// register but RCX change.
    pub(crate) fn spread(&mut self) -> u64 {
        let start = self.asm.here();
        let field = |offset: u32| Mem::low(self.at.crossing() + offset);
        self.asm.push(RSI);
        self.asm.push(RDI);
        self.asm.load(RSI, field(START));
        for part in [0, 1] {
            self.asm.load(RDI, field(host_of(part)));
            self.asm.load(RCX, field(bytes_of(part)));
            self.asm.raw(&[0xf3, 0xa4]); // rep movsb
        }
        self.asm.pop(RDI);
        self.asm.pop(RSI);
        self.asm.raw(&[0xc3]);
        start
    }
}
