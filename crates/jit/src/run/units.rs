//! Units: they are found, made, linked to one another, and thrown away.

use trapgate_engine::Exit as RunExit;
use trapgate_interp::cpu::Stop;
use trapgate_memory::{HostAddress, PAGE_SIZE};
use trapgate_x86::Exception;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{gpr, rflags};

use super::{Block, Mapping, Number, UNIT, key, mapping_of};
use crate::adapt::Lesson;
use crate::clock::host_counter;
use crate::context::{Context, MOST_LOCAL, NO_TARGET, TARGETS};
use crate::mode::Mode;
use crate::perf_map;
use crate::statistics::Cell;
use crate::unit::Request;

impl Context {
    /// Host code for RIP, in the present mode; `None` if it can't be translated.
    pub(super) fn find_here(&mut self) -> Result<Option<(u64, Mode)>, Stop> {
        let Some(mode) = Mode::of(&self.interp.cpu) else {
            return Ok(None);
        };
        self.rust.access = self.interp.cpu.system_flags & rflags::AC != 0;
        let rip = self.wrapped_rip(mode);
        if let Some(target) = self.known_target(rip, mode) {
            return Ok(Some((target, mode)));
        }
        let Some(block) = self.find(rip, mode, true)? else {
            return Ok(None);
        };
        self.know_target(rip, mode, block);
        Ok(Some((self.rust.blocks[block as usize].entry, mode)))
    }

    /// RIP, after an instruction that may have been the last below 4 GiB in compatibility mode.
    pub(super) fn wrapped_rip(&mut self, mode: Mode) -> u64 {
        let rip = &mut self.interp.cpu.rip;
        *rip = mode.wrap(*rip);
        *rip
    }

    /// The block at a linear address.
    pub(super) fn find(&mut self, rip: u64, mode: Mode, memory: bool) -> Result<Option<u32>, Stop> {
        let cpu = &mut self.interp.cpu;
        if !is_canonical(rip) {
            return cpu.gp0();
        }
        let Some(host) = cpu.fetch(rip)? else {
            return Ok(None);
        };
        // Some mappings are of pages where nothing could be translated, so no other limit bounds them.
        let units = self.rust.room.limits().units;
        if self.rust.mapped.len() >= units || self.rust.blocks.len() >= units {
            self.make_room();
        }
        let mapping = self.mapping(rip, host, mode)?;
        let half = (rip >> 63) as usize;
        if self.rust.page_users[half] != mode.is_user() {
            self.rust.page_users[half] = mode.is_user();
            self.pages.forget_half(half);
        }
        self.set_page(rip, mapping);
        let found = self.rust.found.get(&key(mapping, rip, mode));
        if let Some(block) = found.and_then(|found| found[usize::from(memory)].get())
            && self.second_in_force(rip, mode, block)?
        {
            return Ok(Some(block));
        }
        Ok(self.charged(|context| {
            context.rust.statistics.count(Cell::TRANSLATION);
            let begun = host_counter();
            let block = context.translate(rip, mode, memory, host, mapping);
            context.rust.room.translated(begun);
            block
        }))
    }

    /// Bits of the mode that a block is for.
    pub(super) fn bits_of(&self, block: u32) -> u32 {
        Mode(self.rust.blocks[block as usize].key as u8).bits()
    }

    /// The mapping of a code page, just fetched from, is in force.
    pub(super) fn set_page(&mut self, linear: u64, mapping: u32) {
        if self.pages.get(linear) != mapping {
            self.pages.set(linear, mapping);
            if self.rust.local_code.len() < MOST_LOCAL && self.interp.cpu.fetched_locally(linear) {
                self.rust.local_code.push(linear);
            }
        }
    }

    /// Whether the next page, if the block goes on there, is what it was; if not the block is dropped.
    pub(super) fn second_in_force(
        &mut self,
        rip: u64,
        mode: Mode,
        block: u32,
    ) -> Result<bool, Stop> {
        let second = self.rust.blocks[block as usize].second;
        if second == 0 {
            return Ok(true);
        }
        let next = mode.next_page(rip);
        if let Some(host) = self.interp.cpu.fetch(next)?
            && self.mapping(next, host, mode)? == second
        {
            self.set_page(next, second);
            return Ok(true);
        }
        self.drop_block(block);
        Ok(false)
    }

    pub(super) fn mapping(&mut self, rip: u64, host: HostAddress, mode: Mode) -> Result<u32, Stop> {
        let page = (rip >> 12) << 1 | u64::from(mode.is_user());
        let key = (page, host.as_ptr() as u64);
        if let Some(&number) = self.rust.mappings.get(&key) {
            return Ok(number);
        }
        let gpa = self.interp.cpu.fetch_physical(rip)?;
        self.rust.mapped.push(Mapping {
            gpa: gpa & !(PAGE_SIZE - 1),
        });
        // Numbers start at 1: 0 is no mapping.
        let number = self.rust.mapped.len() as u32;
        self.rust.mappings.insert(key, number);
        Ok(number)
    }

    pub(super) fn translate(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
    ) -> Option<u32> {
        let limits = self.rust.room.limits();
        if self.rust.code.used() + UNIT > limits.code || self.rust.bytes() > limits.bytes {
            self.make_room();
            // The mapping's number is gone with the rest; next time.
            return None;
        }
        self.translate_on(rip, mode, memory, host, mapping, None)
            .or_else(|| self.translate_crossing(rip, mode, memory, host, mapping))
    }

    /// Translates an instruction that begins on one page and ends on the next.
    pub(super) fn translate_crossing(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
    ) -> Option<u32> {
        if rip & 0xfff <= 0xfff - 15 {
            return None;
        }
        let next = mode.next_page(rip);
        // A fault of the second page's fetch is the interpreter's to find.
        if !is_canonical(next) {
            return None;
        }
        let second_host = self.interp.cpu.fetch(next).ok()??;
        let second = self.mapping(next, second_host, mode).ok()?;
        let gpa = self.rust.mapped[second as usize - 1].gpa;
        self.interp.cpu.watch_code(gpa, 15);
        self.set_page(next, second);
        let block = self.translate_on(
            rip,
            mode,
            memory,
            host,
            mapping,
            Some((second, second_host)),
        )?;
        let first = self.rust.mapped[mapping as usize - 1].gpa;
        if first != gpa {
            self.rust.put_on_page(block, 1, gpa);
        }
        Some(block)
    }

    pub(super) fn translate_on(
        &mut self,
        rip: u64,
        mode: Mode,
        memory: bool,
        host: HostAddress,
        mapping: u32,
        second: Option<(u32, HostAddress)>,
    ) -> Option<u32> {
        let gpa = self.rust.mapped[mapping as usize - 1].gpa;
        // Mark first, then read: a write in between is then seen.
        self.interp.cpu.watch_code(gpa + (rip & 0xfff), 1);
        let rust = &mut self.rust;
        host.read(&mut rust.page[..PAGE_SIZE as usize]);
        let bytes = match second {
            None => PAGE_SIZE as usize,
            Some((_, second)) => {
                second.read(&mut rust.page[PAGE_SIZE as usize..]);
                rust.page.len()
            }
        };
        let request = Request {
            rip,
            mode,
            memory,
            page: &rust.page[..bytes],
            mapping,
            second: second.map(|(mapping, _)| mapping),
            first_site: rust.sites.len() as u32,
            first_exit: rust.exits.len() as u32,
            lessons: rust.lessons.on_page(gpa),
            exact: rust.exact,
            counting: rust.statistics.timed(),
        };
        let first_site = request.first_site;
        let place = rust.code.next();
        let unit = rust
            .translator
            .translate(request, place, &mut self.interp, &mut rust.ops)?;
        let bytes = rust.translator.asm.bytes.len();
        if bytes > UNIT {
            return None;
        }
        rust.code.append(&rust.translator.asm.bytes);
        rust.statistics.units += 1;
        rust.statistics.instructions += u64::from(unit.instructions);
        rust.statistics.host_bytes += bytes as u64;
        rust.statistics.exits += unit.exits.len() as u64;
        if let Some(perf) = &rust.perf {
            let name = perf_map::unit(mode.is_user(), rip, gpa);
            perf.add([(place, bytes as u64, name)]);
        }
        rust.sites.extend_from_slice(&unit.sites);
        rust.exits.extend_from_slice(&unit.exits);
        let number = rust.blocks.len() as u32;
        let key = key(mapping, rip, mode);
        let found = rust.found.entry(key).or_default();
        found[usize::from(memory)] = Number::of(number);
        if unit.any_flags {
            found[usize::from(!memory)] = Number::of(number);
        }
        rust.blocks.push(Block {
            pc: rip,
            checked: unit.checked,
            entry: unit.entry,
            key,
            incoming: Number::NONE,
            next_on_page: [Number::NONE; 2],
            first_site,
            second: second.map_or(0, |(mapping, _)| mapping),
            has_landing: unit.has_landing,
            alive: true,
        });
        rust.put_on_page(number, 0, gpa);
        let cpu = &mut self.interp.cpu;
        let first = unit.length.min(PAGE_SIZE - (rip & 0xfff));
        cpu.watch_code(gpa + (rip & 0xfff), first);
        for (start, end) in unit.seen {
            cpu.watch_code(gpa + u64::from(start), u64::from(end - start));
        }
        Some(number)
    }

    /// Host code jumped where nothing was yet.
    pub(super) fn link(&mut self) -> Option<RunExit> {
        let number = self.site;
        let exit = self.rust.exits[number as usize];
        self.rust.statistics.count(Cell::LINK);
        self.interp.cpu.rip = exit.target;
        // Whatever changed meanwhile is seen to first, and the link made another time.
        let cpu = &self.interp.cpu;
        let watched = self.rust.watch.is_some();
        if watched || cpu.signals.any() || cpu.attention || Mode::of(cpu) != Some(exit.mode) {
            return None;
        }
        let units = self.rust.statistics.flushes;
        match self.find(exit.target, exit.mode, exit.memory) {
            Ok(Some(block)) if self.rust.statistics.flushes == units => {
                let rust = &mut self.rust;
                let target = &mut rust.blocks[block as usize];
                let to = if exit.far {
                    target.checked
                } else {
                    target.entry
                };
                // An exit that is linked does not come here, so it is in no other block's list.
                let exit = &mut rust.exits[number as usize];
                exit.linked = Number::of(block);
                exit.next = std::mem::replace(&mut target.incoming, Number::of(number));
                let exit = *exit;
                rust.code.patch(exit.patch, to);
                rust.statistics.links += 1;
                None
            }
            // The fault comes again when the run loop looks; nothing has changed.
            Ok(_) | Err(_) => None,
        }
    }

    /// Host code jumped through a register to what was not in the table.
    pub(super) fn indirect(&mut self) -> Option<Stop> {
        self.rust.statistics.indirect += 1;
        self.rust.statistics.count(Cell::INDIRECT);
        let rip = self.interp.cpu.rip;
        if !is_canonical(rip) {
            // The transfer itself faults.
            let site = self.rust.sites[self.site as usize];
            let cpu = &mut self.interp.cpu;
            let pointer = &mut cpu.regs.gpr[gpr::RSP];
            *pointer = pointer.wrapping_sub(site.popped as u64);
            cpu.rip = site.rip;
            return Some(cpu.raise(Exception::gp(0)));
        }
        let cpu = &self.interp.cpu;
        if self.rust.watch.is_some() || cpu.signals.any() || cpu.attention {
            return None;
        }
        let mode = Mode::of(cpu)?;
        if let Ok(Some(block)) = self.find(rip, mode, true) {
            self.know_target(rip, mode, block);
        }
        None
    }

    /// Something happened so often that time is lost by it: the unit where it did last, which is the one before `after`,
    /// is made anew.
    pub(crate) fn adapt(&mut self, after: usize, rip: u64, lesson: Lesson) {
        if !self.rust.lessons.is_often(lesson) {
            return;
        }
        let Some(number) = after.checked_sub(1) else {
            return;
        };
        let block = &self.rust.blocks[number];
        let gpa = self.rust.mapped[mapping_of(block.key) as usize - 1].gpa;
        // Units are counted on when all code goes.
        let next = self.rust.statistics.units;
        let unit = next - (self.rust.blocks.len() - number) as u64;
        if block.alive && self.rust.lessons.note(gpa, rip, lesson, unit, next) {
            self.drop_block(number as u32);
        }
    }

    /// Throws units away whose code the interpreter threw away.
    pub(super) fn see_dropped(&mut self) {
        let dropped = self.interp.take_dropped();
        if !dropped.all && dropped.pages.is_empty() {
            return;
        }
        let span = self.rust.statistics.start();
        self.rust.statistics.count(Cell::INVALIDATION);
        if dropped.all {
            self.forget_all_code();
        } else {
            for page in dropped.pages {
                let mut next = self.rust.on_page.remove(&page).unwrap_or_default();
                while let Some(number) = next.get() {
                    let block = self.rust.blocks[number as usize];
                    let first = self.rust.mapped[mapping_of(block.key) as usize - 1].gpa;
                    next = block.next_on_page[usize::from(first >> 12 != page)];
                    self.drop_block(number);
                }
            }
        }
        self.rust.statistics.stop(span);
    }

    pub(super) fn drop_block(&mut self, number: u32) {
        let rust = &mut self.rust;
        let block = &mut rust.blocks[number as usize];
        if !block.alive {
            return;
        }
        block.alive = false;
        let has_landing = block.has_landing;
        rust.statistics.dropped += 1;
        if let Some(found) = rust.found.get_mut(&block.key) {
            for found in found.iter_mut() {
                if *found == Number::of(number) {
                    *found = Number::NONE;
                }
            }
            if *found == [Number::NONE; 2] {
                rust.found.remove(&block.key);
            }
        }
        let mut next = std::mem::take(&mut block.incoming);
        while let Some(exit) = next.get() {
            let exit = &mut rust.exits[exit as usize];
            next = exit.next;
            exit.linked = Number::NONE;
            rust.code.patch(exit.patch, exit.stub);
        }
        let slot = block.pc as usize % TARGETS;
        for targets in &mut self.targets {
            if targets.host[slot] == block.checked {
                targets.linear[slot] = NO_TARGET;
            }
        }
        if has_landing {
            self.forget_calls();
        }
    }

    /// Throws everything away because there is too much of it.
    fn make_room(&mut self) {
        self.rust.room.is_full();
        self.forget_all_code();
    }

    /// Throws everything away.
    pub(super) fn forget_all_code(&mut self) {
        let rust = &mut self.rust;
        rust.statistics.flushes += 1;
        rust.code.rewind(rust.stubs_end, UNIT);
        rust.sites.clear();
        rust.ops.clear();
        // Number 0 means none.
        self.interp.clear();
        if let Some(op) = self.interp.cpu.lower_one(&[0x90]) {
            rust.ops.push(op);
        }
        rust.exits.clear();
        rust.blocks.clear();
        rust.found.clear();
        rust.mappings.clear();
        rust.mapped.clear();
        rust.on_page.clear();
        self.pages.clear();
        for targets in &mut self.targets {
            targets.linear.fill(NO_TARGET);
        }
        self.forget_calls();
        self.interp.take_dropped();
    }
}
