//! Host code that is there once: the way in, the way out, and calls of Rust functions.

use trapgate_interp::{Layout, Level};

use crate::adapt::Lesson;
use crate::context::{
    Addresses, CLASSES, Entry, HOST_OFFSET, MOST_LOCAL, TARGETS, TLB_ENTRIES, VIEWS, page_offset,
};
use crate::emit::{
    Alu, Asm, Mem, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSP, condition,
};
use crate::registers::{ADDRESS, HOME, SPARE};
use crate::statistics::Cell;

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stubs {
    /// `extern "sysv64" fn() -> u32`: runs the host code at `target`; gives one of [`exit`].
    pub(crate) enter: u64,
    /// Called when an entry of the table misses, by view and write: RCX is the entry's offset. All of these are
    /// called with a jump to try again after the call, and the site's number after that; the flags and RCX are
    /// lost.
    pub(crate) refill: [[u64; 2]; VIEWS],
    /// The same for a slot: RCX is its address.
    pub(crate) find: [[u64; 2]; VIEWS],
    /// Called when an access may lie across the end of a page, by view and write: see [`crate::crossing`].
    pub(crate) cross: [[u64; 2]; VIEWS],
    /// Called after a store to such a place.
    pub(crate) spread: u64,
    /// Called to run a site's instruction on the interpreter, with the site's number in RCX; goes on at the next
    /// instruction or elsewhere.
    pub(crate) operate: u64,
    /// Called, with the exit's number after the call: leave with [`exit::LINK`]; the flags are in the host's.
    pub(crate) link_host: u64,
    /// The same; the flags are in memory.
    pub(crate) link_memory: u64,
    /// Jumped to: leave with [`exit::GO`]; RIP is stored, the flags are in the host's.
    pub(crate) go_host: u64,
    /// Jumped to: leave with [`exit::GO`]; RIP is stored, the flags are in memory.
    pub(crate) go_memory: u64,
    /// Called, with the site's number after the call: leave with [`exit::INDIRECT`]; the target is in
    /// [`ADDRESS`], the flags are in memory.
    pub(crate) indirect: u64,
    /// Jumped to after a RET: no call is remembered, or one from elsewhere. The target is in [`ADDRESS`], the site's number
    /// stored, the flags are in memory.
    pub(crate) no_call: [u64; CLASSES],
    /// Jumped to, with the exit's number in RCX: leave with [`exit::CALL`] or [`exit::RETURN`]; the flags are in memory.
    pub(crate) at_call: u64,
    pub(crate) at_return: u64,
    pub(crate) other_call: [u64; CLASSES],
    /// Called to load the guest's x87 registers: see [`crate::x87`]. The flags and RCX are lost; ZF is set if it was
    /// possible.
    pub(crate) load_x87: u64,
}

impl Stubs {
    /// Their names and where they begin, for people.
    pub(crate) fn names(&self) -> Vec<(u64, String)> {
        let Self {
            enter,
            refill,
            find,
            cross,
            spread,
            operate,
            link_host,
            link_memory,
            go_host,
            go_memory,
            indirect,
            no_call,
            other_call: _,
            at_call,
            at_return,
            load_x87,
        } = self;
        let mut names = vec![
            (*enter, "stub enter".to_owned()),
            (*operate, "stub call-out".to_owned()),
            (*link_host, "stub link, flags in the host's".to_owned()),
            (*link_memory, "stub link".to_owned()),
            (*go_host, "stub leave, flags in the host's".to_owned()),
            (*go_memory, "stub leave".to_owned()),
            (*indirect, "stub indirect".to_owned()),
            (no_call[0], "stub return".to_owned()),
            (*at_call, "stub leave at a call".to_owned()),
            (*at_return, "stub leave at a return".to_owned()),
            (*load_x87, "stub load x87".to_owned()),
            (*spread, "stub spread".to_owned()),
        ];
        for (slot, stubs) in [refill, find].into_iter().enumerate() {
            for (index, start) in stubs.as_flattened().iter().enumerate() {
                let (kind, detail) = Cell::of_refill(index / 2, index % 2, slot).name();
                names.push((*start, format!("stub {kind} {detail}")));
            }
        }
        for start in cross.as_flattened() {
            names.push((*start, "stub cross".to_owned()));
        }
        names.sort();
        names
    }
}

/// Why host code came back.
pub(crate) mod exit {
    /// A direct jump that leads nowhere yet; the site says which.
    pub(crate) const LINK: u32 = 0;
    /// Look what is to be done at RIP.
    pub(crate) const GO: u32 = 1;
    /// As `GO`, after an indirect jump whose target was not in the table.
    pub(crate) const INDIRECT: u32 = 2;
    /// A called function says so: it left the reason in the context.
    pub(crate) const STOP: u32 = 3;
    /// At a CALL that finds its stack full, or a signal raised; the site is its exit.
    pub(crate) const CALL: u32 = 4;
    /// At a landing, where patience ended or a signal is raised; the site is its exit.
    pub(crate) const RETURN: u32 = 5;
    /// How many there are.
    pub(crate) const COUNT: usize = 6;
}

/// What a called function answers.
pub(crate) mod answer {
    /// Try again, or go on.
    pub(crate) const RETURN: u64 = 0;
    /// Leave with [`super::exit::STOP`]. Any other value is host code to go on at.
    pub(crate) const LEAVE: u64 = 1;
}

/// Bytes of the jump that follows the call of a miss.
const RETRY: i32 = 5;

/// The offset of an entry is a page number shifted by this.
pub(crate) const ENTRY_SHIFT: u8 = size_of::<Entry>().trailing_zeros() as u8;

/// The bits of a shifted linear address that are the offset of its entry.
pub(crate) fn entry_mask(view: usize) -> i32 {
    (TLB_ENTRIES[view] as i32 - 1) << ENTRY_SHIFT
}

pub(crate) struct Writer<'a> {
    pub(crate) asm: &'a mut Asm,
    pub(crate) at: Addresses,
    /// The guest may use AVX: registers are 256 bits wide.
    wide: bool,
}

impl Writer<'_> {
    /// Guest registers to memory, but for [`RCX`] and [`ADDRESS`], which hold none.
    fn save(&mut self) {
        for (index, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                self.asm.store(Mem::low(self.at.gpr(index)), *home);
            }
        }
        for index in 0..16 {
            let address = self.at.vector(usize::from(index));
            self.asm.vector(self.wide, true, index, address);
        }
        if self.wide {
            self.asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        self.asm.mxcsr(true, Mem::low(self.at.mxcsr()));
        self.save_x87();
    }

    /// Vector registers from memory; the flags are lost. Upper halves that are zero stay as VZEROUPPER leaves them:
    /// loaded, even with zeros, they make each change between SSE and VEX instructions cost dozens of cycles.
    fn restore_vectors(&mut self) {
        let load = |asm: &mut Asm, wide: bool| {
            for index in 0..16 {
                let address = self.at.vector(usize::from(index));
                asm.vector(wide, false, index, address);
            }
        };
        if !self.wide {
            load(self.asm, false);
            return;
        }
        let upper = |index: usize| self.at.vector(index) + 16;
        self.asm.vector(false, false, 0, upper(0));
        for index in 1..16 {
            self.asm.or_vector(0, upper(index));
        }
        self.asm.raw(&[0x66, 0x0f, 0x38, 0x17, 0xc0]); // ptest xmm0, xmm0
        self.asm.jump_if(condition::NE, self.asm.here());
        let used = self.asm.bytes.len() - 4;
        load(self.asm, false);
        self.asm.jump(self.asm.here());
        let done = self.asm.bytes.len() - 4;
        self.asm.patch(used, self.asm.here());
        load(self.asm, true);
        self.asm.patch(done, self.asm.here());
    }

    /// The other registers.
    fn restore(&mut self) {
        self.asm.mxcsr(false, Mem::low(self.at.mxcsr()));
        for (index, home) in HOME.iter().enumerate() {
            if let Some(home) = home {
                self.asm.load(*home, Mem::low(self.at.gpr(index)));
            }
        }
    }

    /// The flags to memory; RCX is lost.
    fn save_flags(&mut self) {
        self.asm.mov(RCX, RAX);
        self.asm.flags_to_ax();
        self.asm.store_ax(Mem::low(self.at.flags()));
        self.asm.mov(RAX, RCX);
    }

    /// The flags from memory, before the registers are restored: RAX is lost.
    fn restore_flags(&mut self) {
        self.asm.load32(RAX, Mem::low(self.at.flags()));
        self.asm.flags_from_ax();
    }

    /// From host code's stack to the thread's.
    fn leave_stack(&mut self) {
        self.asm.store(Mem::low(self.at.stack()), RSP);
        self.asm.load(RSP, Mem::low(self.at.host_stack()));
    }

    /// Back to whoever called `enter`, from the thread's stack; EAX is the answer.
    fn leave(&mut self) {
        self.asm.mxcsr(false, Mem::low(self.at.host_mxcsr()));
        self.asm.alu_imm(true, Alu::Add, RSP, 8);
        for register in [R15, R14, R13, R12, RBP, RBX] {
            self.asm.pop(register);
        }
        self.asm.raw(&[0xc3]);
    }

    /// Notes the number of the site that called: it lies `offset` bytes after the return address.
    fn note_site(&mut self, offset: i32) {
        self.asm.load(RCX, Mem::at(RSP, 0));
        self.asm.load32(RCX, Mem::at(RCX, offset));
        self.asm.store32(Mem::low(self.at.site()), RCX);
    }

    /// Counts a miss. From time to time Rust code looks at one.
    fn lose_patience(&mut self, lesson: Lesson, miss: u64) {
        let patience = Mem::low(self.at.patience(lesson));
        self.asm.alu_memory_imm32(Alu::Sub, patience, 1);
        self.asm.jump_if(condition::E, miss);
    }

    /// Fetches a translation into a slot, whose address is in RCX, from the table. [`ADDRESS`] is what the
    /// linear address is more than the slot's page.
    fn find(&mut self, view: usize, write: bool, refill: u64, miss: u64) -> u64 {
        let start = self.asm.here();
        let page = |write| Mem::at(RCX, page_offset(write) as i32);
        self.asm.alu_load(Alu::Add, ADDRESS, page(write));
        self.lose_patience(Lesson::Wanders, miss);
        self.asm.push(RAX);
        self.asm.push(RDX);
        self.asm.rorx32(RAX, ADDRESS, 12 - ENTRY_SHIFT);
        self.asm.alu_imm(false, Alu::And, RAX, entry_mask(view));
        self.asm.mov(RDX, ADDRESS);
        self.asm.alu_imm(true, Alu::And, RDX, -4096);
        // It is there and was missed: the access crosses the page's end.
        self.asm.compare_load(RDX, page(write));
        self.asm.jump_if(condition::E, self.asm.here());
        let crosses = self.asm.bytes.len() - 4;
        let table = self.at.tlb(view);
        let entry = |offset: u32| Mem::offset(table + offset, RAX);
        self.asm.compare_load(RDX, entry(page_offset(write)));
        self.asm.jump_if(condition::NE, self.asm.here());
        let unknown = self.asm.bytes.len() - 4;
        self.asm.store(page(write), RDX);
        self.asm.compare_load(RDX, entry(page_offset(!write)));
        let both = self.asm.short_if(condition::E);
        self.asm.load(RDX, Mem::low(self.at.unmatched()));
        self.asm.land(both);
        self.asm.store(page(!write), RDX);
        self.asm.load(RAX, entry(HOST_OFFSET));
        self.asm.store(Mem::at(RCX, HOST_OFFSET as i32), RAX);
        let count = self.at.refills(view, write, true);
        self.asm.increment(Mem::low(count));
        self.asm.pop(RDX);
        self.asm.pop(RAX);
        self.asm.raw(&[0xc3]);
        for (jump, target) in [(crosses, miss), (unknown, refill)] {
            self.asm.patch(jump, self.asm.here());
            self.asm.pop(RDX);
            self.asm.pop(RAX);
            self.asm.jump(target);
        }
        start
    }

    /// Fetches a translation into the table from the processor's own TLB; if it is not there, a Rust function
    /// looks further. There are two ways in: at the first, RCX is the offset of the entry whose page was
    /// subtracted from [`ADDRESS`].
    fn refill(&mut self, tlb: Layout, view: usize, write: bool, miss: u64) -> (u64, u64) {
        let subtracted = self.asm.here();
        let table = self.at.tlb(view);
        self.asm.alu_load(
            Alu::Add,
            ADDRESS,
            Mem::offset(table + page_offset(write), RCX),
        );
        let start = self.asm.here();
        self.lose_patience(Lesson::Crowded, miss);
        let saved = [RAX, RDX, RBX];
        for register in saved {
            self.asm.push(register);
        }
        // RDX: the entry of the processor's TLB. RBX: the tag.
        self.asm.mov(RCX, ADDRESS);
        self.asm.shr(RCX, 63);
        let [pages_level, large] = tlb.levels;
        let by_half = |word| Mem::array(word as u32, RCX);
        let of_space = |word| Mem::low(word as u32);
        self.tagged(tlb, pages_level, view, by_half);
        let (tag, other) = if write {
            (tlb.write, tlb.read)
        } else {
            (tlb.read, tlb.write)
        };
        self.asm.compare_load(RBX, Mem::at(RDX, tag));
        self.asm.jump_if(condition::NE, self.asm.here());
        let unknown = self.asm.bytes.len() - 4;
        // What is not of every address space is listed.
        self.asm.alu(false, Alu::Or, RCX, RCX);
        self.asm.jump_if(condition::E, self.asm.here());
        let local = self.asm.bytes.len() - 4;
        let known = self.asm.here();
        // RAX: the entry of the table. RCX: the page.
        self.asm.rorx32(RAX, ADDRESS, 12 - ENTRY_SHIFT);
        self.asm.alu_imm(false, Alu::And, RAX, entry_mask(view));
        self.asm.mov(RCX, ADDRESS);
        self.asm.alu_imm(true, Alu::And, RCX, -4096);
        let pages = |write| Mem::offset(table + page_offset(write), RAX);
        // It is there and was missed: the access crosses the page's end.
        self.asm.compare_load(RCX, pages(write));
        self.asm.jump_if(condition::E, self.asm.here());
        let crosses = self.asm.bytes.len() - 4;
        self.asm.store(pages(write), RCX);
        self.asm.compare_load(RBX, Mem::at(RDX, other));
        self.asm.mov(RBX, RCX);
        let both = self.asm.short_if(condition::E);
        self.asm.alu_imm(true, Alu::Xor, RBX, 0x1000);
        self.asm.land(both);
        self.asm.store(pages(!write), RBX);
        self.asm.alu_load(Alu::Add, RCX, Mem::at(RDX, tlb.addend));
        self.asm.store(Mem::offset(table + HOST_OFFSET, RAX), RCX);
        let count = self.at.refills(view, write, false);
        self.asm.increment(Mem::low(count));
        for register in saved.into_iter().rev() {
            self.asm.pop(register);
        }
        self.asm.raw(&[0xc3]);
        // It is there for this address space alone. Then it is listed, to be forgotten with it; if the list is full
        // all are.
        self.asm.patch(local, self.asm.here());
        let local = self.asm.here();
        let count = Mem::low(self.at.local_count(view));
        self.asm.load32(RCX, count);
        self.asm.alu_imm(false, Alu::Cmp, RCX, MOST_LOCAL as i32);
        self.asm.jump_if(condition::AE, known);
        self.asm
            .store(Mem::array(self.at.local_list(view), RCX), ADDRESS);
        self.asm.alu_memory_imm32(Alu::Add, count, 1);
        self.asm.jump(known);
        // In the upper half it may be of all spaces or of this one; and then it may be part of a large one.
        self.asm.patch(unknown, self.asm.here());
        for level in [pages_level, large] {
            if level.shift == large.shift {
                self.tagged(tlb, level, view, by_half);
                self.asm.compare_load(RBX, Mem::at(RDX, tag));
                let elsewhere = self.asm.short_if(condition::NE);
                self.asm.alu(false, Alu::Or, RCX, RCX);
                self.asm.jump_if(condition::E, local);
                self.asm.jump(known);
                self.asm.land(elsewhere);
            }
            let lower = self.asm.short_if_rcx_zero();
            self.tagged(tlb, level, view, of_space);
            self.asm.compare_load(RBX, Mem::at(RDX, tag));
            self.asm.jump_if(condition::E, local);
            self.asm.land(lower);
        }
        self.asm.patch(crosses, self.asm.here());
        for register in saved.into_iter().rev() {
            self.asm.pop(register);
        }
        self.asm.jump(miss);
        (subtracted, start)
    }

    /// The entry of the processor's TLB for [`ADDRESS`] to RDX, and its tag to RBX, by the word of tags and twists at
    /// `which`. RAX is lost.
    fn tagged(&mut self, tlb: Layout, level: Level, view: usize, which: impl Fn(u64) -> Mem) {
        self.asm.mov(RBX, ADDRESS);
        self.asm.shr(RBX, level.shift);
        self.asm.load(RAX, which(tlb.twists));
        if level.twist_shift != 0 {
            self.asm.shr(RAX, level.twist_shift);
        }
        self.asm.mov(RDX, RBX);
        self.asm.alu(true, Alu::Xor, RDX, RAX);
        self.asm.alu_load(Alu::Or, RBX, which(tlb.tags));
        self.asm
            .alu_imm(false, Alu::And, RDX, level.per_view as i32 - 1);
        self.asm.shl32(RDX, tlb.entry_bytes.trailing_zeros() as u8);
        let entries = level.entries + view as u64 * level.per_view * tlb.entry_bytes;
        self.asm.mov_imm(RAX, entries);
        self.asm.alu(true, Alu::Add, RDX, RAX);
    }

    fn leave_with(&mut self, reason: u32) -> u64 {
        let start = self.asm.here();
        self.save();
        self.asm.mov_imm(RAX, u64::from(reason));
        self.leave_stack();
        self.leave();
        start
    }
}

impl Asm {
    /// The place of the linear address in [`ADDRESS`] in a table of jump targets to [`SPARE`]; "equal" if it is there.
    pub(crate) fn find_target(&mut self, at: Addresses, class: usize) {
        // The index is the lower half of the address's lower half.
        const { assert!(TARGETS == 1 << 16) };
        self.zero_extend16(SPARE, ADDRESS);
        self.compare_load(ADDRESS, Mem::array(at.targets_linear(class), SPARE));
    }
}

/// Writes the stubs.
pub(crate) fn write(asm: &mut Asm, at: Addresses, wide: bool, tlb: Layout) -> Stubs {
    let mut writer = Writer { asm, at, wide };
    let load_x87 = writer.load_x87();
    let enter = writer.asm.here();
    for register in [RBX, RBP, R12, R13, R14, R15] {
        writer.asm.push(register);
    }
    writer.asm.alu_imm(true, Alu::Sub, RSP, 8);
    writer.asm.mxcsr(true, Mem::low(at.host_mxcsr()));
    writer.asm.store(Mem::low(at.host_stack()), RSP);
    writer.restore_vectors();
    writer.restore_flags();
    writer.restore();
    writer.asm.load(RSP, Mem::low(at.stack()));
    writer.asm.jump_memory(Mem::low(at.target()));

    // What a called function answered beside "return": RAX is that.
    let elsewhere = writer.asm.here();
    writer
        .asm
        .alu_imm(true, Alu::Cmp, RAX, answer::LEAVE as i32);
    let going = writer.asm.short_if(condition::NE);
    writer.asm.mov_imm(RAX, u64::from(exit::STOP));
    writer.leave();
    writer.asm.land(going);
    writer.asm.store(Mem::low(at.resume()), RAX);
    writer.load_x87_if_wanted(load_x87);
    writer.restore_vectors();
    writer.restore_flags();
    writer.restore();
    writer.asm.load(RSP, Mem::low(at.stack()));
    // RET, as there was a CALL: else the host would expect the guest's returns one call too early.
    writer.asm.push_memory(Mem::low(at.resume()));
    writer.asm.ret();

    // Calls of Rust functions `extern "sysv64" fn(*mut Context) -> u64`.
    let call = |writer: &mut Writer<'_>, function: u32| {
        writer.asm.store(Mem::low(at.linear()), ADDRESS);
        writer.asm.pop_memory(Mem::low(at.resume()));
        writer.save();
        writer.leave_stack();
        writer.asm.mov_imm(RDI, u64::from(at.base()));
        writer.asm.call_memory(Mem::low(function));
        writer.asm.alu(true, Alu::Or, RAX, RAX);
        writer.asm.jump_if(condition::NE, elsewhere);
        writer.load_x87_if_wanted(load_x87);
        writer.restore_vectors();
        writer.restore();
        writer.asm.load(RSP, Mem::low(at.stack()));
        writer.asm.push_memory(Mem::low(at.resume()));
        writer.asm.load(ADDRESS, Mem::low(at.linear()));
        writer.asm.ret();
    };
    let miss = writer.asm.here();
    writer.note_site(RETRY);
    call(&mut writer, at.miss());
    let mut refill = [[0; 2]; VIEWS];
    let mut find = [[0; 2]; VIEWS];
    let mut cross = [[0; 2]; VIEWS];
    let spread = writer.spread();
    for view in 0..VIEWS {
        for write in [false, true] {
            let (subtracted, plain) = writer.refill(tlb, view, write, miss);
            refill[view][usize::from(write)] = subtracted;
            find[view][usize::from(write)] = writer.find(view, write, plain, miss);
            cross[view][usize::from(write)] = writer.cross(view, write, plain);
        }
    }
    let operate = writer.asm.here();
    writer.asm.store32(Mem::low(at.site()), RCX);
    call(&mut writer, at.operate());

    let link_host = writer.asm.here();
    writer.save_flags();
    let link_memory = writer.asm.here();
    writer.note_site(0);
    writer.asm.alu_imm(true, Alu::Add, RSP, 8);
    writer.leave_with(exit::LINK);
    let go_host = writer.asm.here();
    writer.save_flags();
    let go_memory = writer.leave_with(exit::GO);
    let indirect = writer.asm.here();
    writer.note_site(0);
    writer.asm.alu_imm(true, Alu::Add, RSP, 8);
    let noted = writer.asm.here();
    writer.asm.store(Mem::low(at.rip()), ADDRESS);
    writer.leave_with(exit::INDIRECT);

    // A RET that leads elsewhere goes by the table of jump targets.
    let (mut no_call, mut other_call) = ([0; CLASSES], [0; CLASSES]);
    for class in 0..CLASSES {
        no_call[class] = writer.asm.here();
        writer.asm.lea(true, RSP, Mem::at(RSP, -8));
        other_call[class] = writer.asm.here();
        writer
            .asm
            .alu_memory_imm32(Alu::Cmp, Mem::low(at.poll()), 0);
        writer.asm.jump_if(condition::E, noted);
        writer.asm.find_target(at, class);
        writer.asm.jump_if(condition::NE, noted);
        writer
            .asm
            .jump_memory(Mem::array(at.targets_host(class), SPARE));
    }
    let at_call = writer.asm.here();
    writer.asm.store32(Mem::low(at.site()), RCX);
    writer.leave_with(exit::CALL);
    let at_return = writer.asm.here();
    writer.asm.store32(Mem::low(at.site()), RCX);
    writer.leave_with(exit::RETURN);
    Stubs {
        enter,
        refill,
        find,
        cross,
        spread,
        operate,
        link_host,
        link_memory,
        go_host,
        go_memory,
        indirect,
        no_call,
        other_call,
        at_call,
        at_return,
        load_x87,
    }
}
