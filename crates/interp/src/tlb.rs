//! The software translation lookaside buffer.
//!
//! Four direct-mapped tables, one for each kind of access the processor makes by itself (see
//! [`View`]). Entries carry an address-space tag, so a CR3 load only changes the tag; and since processes
//! like to use the same addresses, the index of those that are not of all address spaces depends on it. An entry's
//! write tag is there only while the page is dirty in the guest's tables and has no trace flags.
//!
//! Behind them four smaller tables have translations of 2 MiB, where the guest has pages that are large and lie in RAM in one piece: a
//! miss in a program's large memory is then none of the guest's page tables.
#![allow(unsafe_code)]

use std::mem::offset_of;

use trapgate_memory::HostAddress;

/// With whose rights memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum View {
    /// Supervisor; user pages are out of bounds if SMAP says so. Also implicit accesses.
    Supervisor = 0,
    /// Supervisor with EFLAGS.AC, or without SMAP.
    SupervisorUser = 1,
    /// User.
    User = 2,
    /// Alignment checks or data breakpoints are on: nothing is cached, every access is slow. The
    /// rights are those of the view that would be current otherwise.
    Checked = 3,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads data.
    Read,
    /// Stores data.
    Write,
    /// Fetches instructions.
    Execute,
}

/// Entries in each table.
const ENTRIES: usize = 4096;
const VIEWS: usize = 4;
/// A tag that no access has: its address-space tag is never given out.
const NEVER: u64 = u64::MAX;
/// Position of the address-space tag above the page number in a tag.
const SPACE_SHIFT: u32 = 52;
const SPACE_TAG_BITS: u32 = 64 - SPACE_SHIFT;
/// Address-space tags are 1 to this.
const LAST_SPACE: u64 = 0xffe;

/// Address spaces whose translations of a page have an index of their own; others share these.
const GROUPS: u64 = 16;
/// What the index of a translation differs by from group to group.
const GROUP_STEP: u64 = ENTRIES as u64 / GROUPS;

/// Entries in each table of large translations: as much as half a GiB of memory.
const LARGE_ENTRIES: usize = 256;
/// Bytes of a large translation, as a power of two.
const LARGE_SHIFT: u32 = 21;
/// Bytes of a large translation.
pub(crate) const LARGE_BYTES: u64 = 1 << LARGE_SHIFT;
/// By how much less their indices differ from group to group, as a power of two.
const LARGE_TWIST_SHIFT: u32 = (ENTRIES / LARGE_ENTRIES).trailing_zeros();

/// A cached translation of one page, or of a large one.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Entry {
    read: u64,
    write: u64,
    execute: u64,
    /// Added to a linear address gives the host address.
    addend: u64,
}

const EMPTY: Entry = Entry {
    read: NEVER,
    write: NEVER,
    execute: NEVER,
    addend: 0,
};

impl Entry {
    fn of(tag: u64, rights: Rights, addend: u64) -> Self {
        let given = |right: bool| if right { tag } else { NEVER };
        Self {
            read: given(rights.read),
            write: given(rights.write),
            execute: given(rights.execute),
            addend,
        }
    }

    fn tag(&self, access: Access) -> u64 {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
            Access::Execute => self.execute,
        }
    }
}

/// Which cached translations became wrong: for an engine that keeps copies of them.
#[derive(Debug, Default)]
pub struct Changes {
    /// Whether anything below is set.
    pub any: bool,
    /// All of them.
    pub all: bool,
    /// All but those of global pages: another address space became the current one.
    pub space: bool,
    /// Those of the pages of these linear addresses.
    pub pages: Vec<u64>,
    /// The right to write to these host pages.
    pub revoked: Vec<u64>,
    /// Whether anyone takes what is written here.
    wanted: bool,
}

impl Changes {
    /// Starts over.
    pub fn clear(&mut self) {
        self.any = false;
        self.all = false;
        self.space = false;
        self.pages.clear();
        self.revoked.clear();
    }
}

/// Where cached translations lie in this process: for host code that looks them up itself. An entry is good for a
/// linear address if its tag is the upper bits of the address (see [`Level::shift`]) with the word at [`Layout::tags`] for its half above them; its addend makes
/// the address a host address.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Translations of pages, and large ones.
    pub levels: [Level; 2],
    /// Address of two words: the current address space's tag, and that of global pages of the upper half.
    pub tags: u64,
    /// Address of two words, which go with the tags: see [`Level::twist_shift`].
    pub twists: u64,
    /// Bytes of an entry.
    pub entry_bytes: u64,
    /// Offset of the tag for loads in an entry.
    pub read: i32,
    /// Offset of the tag for stores.
    pub write: i32,
    /// Offset of the addend.
    pub addend: i32,
}

/// Tables of translations of one size.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Address of the first view's first entry.
    pub entries: u64,
    /// Entries of each view, a power of two.
    pub per_view: u64,
    /// Bits of an address that are not in its tag.
    pub shift: u8,
    /// The index is the lowest bits of what is in the tag XOR the word at [`Layout::twists`] shifted right by this.
    pub twist_shift: u8,
}

/// The four tables and the address-space tags.
#[derive(Debug)]
pub(crate) struct Tlb {
    entries: Box<[Entry; ENTRIES * VIEWS]>,
    large_entries: Box<[Entry; LARGE_ENTRIES * VIEWS]>,
    /// Whether there may be large translations.
    takes_large: bool,
    pub(crate) changes: Changes,
    /// Start of the current view's table.
    table: usize,
    /// The current address space's tag, shifted to its place; and that of global pages of the upper half of the
    /// address space, which a kernel's are. What is not global there is found by [`Self::find`] alone.
    tags: [u64; 2],
    /// What the index of a translation with each tag differs by.
    twists: [u64; 2],
    next_space: u64,
    /// Address-space tag of each PCID, 0 if it has none.
    spaces: Box<[u16; 4096]>,
    /// Linear address range of large pages seen, lower and upper half: (start, end).
    large: [(u64, u64); 2],
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            entries: vec![EMPTY; ENTRIES * VIEWS]
                .into_boxed_slice()
                .try_into()
                .unwrap_or_else(|_| unreachable!("the vector has that length")),
            large_entries: Box::new([EMPTY; LARGE_ENTRIES * VIEWS]),
            takes_large: true,
            changes: Changes::default(),
            table: 0,
            tags: [1 << SPACE_SHIFT, 2 << SPACE_SHIFT],
            twists: [twist(1), 0],
            next_space: 3,
            spaces: vec![0; 4096]
                .into_boxed_slice()
                .try_into()
                .unwrap_or_else(|_| unreachable!("the vector has that length")),
            large: [(u64::MAX, 0); 2],
        }
    }

    /// From now on [`Changes`] are noted.
    pub(crate) fn note_changes(&mut self) {
        self.changes.wanted = true;
    }

    /// Whether the cached translation of an address in the upper half is of the current address space only.
    pub(crate) fn is_local(&self, view: View, linear: u64) -> bool {
        let entry = &self.entries[self.local_slot(view as usize * ENTRIES, linear)];
        let local = self.local_tag(linear);
        linear >> 63 != 0 && (entry.read == local || entry.write == local || entry.execute == local)
    }

    fn local_tag(&self, linear: u64) -> u64 {
        (linear >> 12) | self.tags[0]
    }

    /// The current address space's tag.
    pub(crate) fn space(&self) -> u64 {
        self.tags[0]
    }

    /// Where host code finds cached translations.
    pub(crate) fn layout(&self) -> Layout {
        let pages = Level {
            entries: self.entries.as_ptr() as u64,
            per_view: ENTRIES as u64,
            shift: 12,
            twist_shift: 0,
        };
        let large = Level {
            entries: self.large_entries.as_ptr() as u64,
            per_view: LARGE_ENTRIES as u64,
            shift: LARGE_SHIFT as u8,
            twist_shift: LARGE_TWIST_SHIFT as u8,
        };
        Layout {
            levels: [pages, large],
            tags: &raw const self.tags as u64,
            twists: &raw const self.twists as u64,
            entry_bytes: size_of::<Entry>() as u64,
            read: offset_of!(Entry, read) as i32,
            write: offset_of!(Entry, write) as i32,
            addend: offset_of!(Entry, addend) as i32,
        }
    }

    /// Where the translation of an address is that has the tag for its half of the address space.
    #[inline(always)]
    fn slot(&self, table: usize, linear: u64) -> usize {
        Self::twisted(table, linear, self.twists[(linear >> 63) as usize])
    }

    /// Where one is that is of the current address space only.
    fn local_slot(&self, table: usize, linear: u64) -> usize {
        Self::twisted(table, linear, self.twists[0])
    }

    #[inline(always)]
    fn twisted(table: usize, linear: u64, twist: u64) -> usize {
        (table + ((linear >> 12) ^ twist) as usize % ENTRIES) % (ENTRIES * VIEWS)
    }

    /// Makes a view the current one.
    #[inline(always)]
    pub(crate) fn set_view(&mut self, view: View) {
        self.table = view as usize * ENTRIES;
    }

    #[inline(always)]
    fn tag(&self, linear: u64) -> u64 {
        (linear >> 12) | self.tags[(linear >> 63) as usize]
    }

    /// Host address of `size` bytes for reading in the current view, if cached and in one page.
    #[inline(always)]
    pub(crate) fn read(&self, linear: u64, size: u64) -> Option<HostAddress> {
        let entry = &self.entries[self.slot(self.table, linear)];
        if entry.read == self.tag(linear) && linear & 0xfff <= 0x1000 - size {
            Some(host(entry, linear))
        } else {
            None
        }
    }

    /// Host address of `size` bytes for writing in the current view, if cached and in one page.
    #[inline(always)]
    pub(crate) fn write(&self, linear: u64, size: u64) -> Option<HostAddress> {
        let entry = &self.entries[self.slot(self.table, linear)];
        if entry.write == self.tag(linear) && linear & 0xfff <= 0x1000 - size {
            Some(host(entry, linear))
        } else {
            None
        }
    }

    /// Host address of `size` bytes, whatever the access and view.
    pub(crate) fn find(
        &self,
        view: View,
        access: Access,
        linear: u64,
        size: u64,
    ) -> Option<HostAddress> {
        let table = view as usize * ENTRIES;
        let places = [
            (self.slot(table, linear), self.tag(linear)),
            (self.local_slot(table, linear), self.local_tag(linear)),
        ];
        let entry = places.into_iter().find_map(|(slot, wanted)| {
            let entry = &self.entries[slot];
            (entry.tag(access) == wanted).then_some(entry)
        })?;
        (linear & 0xfff <= 0x1000 - size).then(|| host(entry, linear))
    }

    /// Caches a translation. `page` is the host address of the linear address's page.
    pub(crate) fn insert(&mut self, view: View, linear: u64, page: HostAddress, rights: Rights) {
        let table = view as usize * ENTRIES;
        let (tag, slot) = if rights.global {
            (self.tag(linear), self.slot(table, linear))
        } else {
            (self.local_tag(linear), self.local_slot(table, linear))
        };
        let addend = (page.as_ptr() as u64).wrapping_sub(linear & !0xfff);
        self.entries[slot] = Entry::of(tag, rights, addend);
    }

    /// There are no large translations from now on: each page is asked for by itself.
    pub(crate) fn refuse_large(&mut self) {
        self.takes_large = false;
        self.large_entries.fill(EMPTY);
    }

    /// The index of a large translation, and its tag.
    fn large_slot(&self, view: View, linear: u64, half: usize) -> (usize, u64) {
        let number = linear >> LARGE_SHIFT;
        let index = (number ^ self.twists[half] >> LARGE_TWIST_SHIFT) as usize % LARGE_ENTRIES;
        (
            view as usize * LARGE_ENTRIES + index,
            number | self.tags[half],
        )
    }

    /// Caches the translation of the [`LARGE_BYTES`] that hold a linear address and begin at the host address `start`.
    pub(crate) fn insert_large(
        &mut self,
        view: View,
        linear: u64,
        start: HostAddress,
        rights: Rights,
    ) {
        if !self.takes_large {
            return;
        }
        let half = if rights.global {
            (linear >> 63) as usize
        } else {
            0
        };
        let (slot, tag) = self.large_slot(view, linear, half);
        let addend = (start.as_ptr() as u64).wrapping_sub(linear & !(LARGE_BYTES - 1));
        self.large_entries[slot] = Entry::of(tag, rights, addend);
    }

    /// Looks for an address among the large translations, and caches what there is for its page.
    pub(crate) fn find_large(
        &mut self,
        view: View,
        access: Access,
        linear: u64,
    ) -> Option<HostAddress> {
        for half in [(linear >> 63) as usize, 0] {
            let (slot, tag) = self.large_slot(view, linear, half);
            let entry = self.large_entries[slot];
            if entry.tag(access) != tag {
                continue;
            }
            let found = host(&entry, linear);
            let rights = Rights {
                read: entry.read == tag,
                write: entry.write == tag,
                execute: entry.execute == tag,
                global: half == 1,
            };
            self.insert(view, linear, found.page_start(), rights);
            return Some(found);
        }
        None
    }

    /// Notes that the linear address is mapped by a page of `bytes`, larger than the smallest.
    pub(crate) fn note_large(&mut self, linear: u64, bytes: u64) {
        let start = linear & !(bytes - 1);
        let range = &mut self.large[(linear >> 63) as usize];
        range.0 = range.0.min(start);
        range.1 = range.1.max(start.wrapping_add(bytes - 1));
    }

    /// INVLPG: forgets one page, in every address space (it may be global).
    pub(crate) fn flush_page(&mut self, linear: u64) {
        let (start, end) = self.large[(linear >> 63) as usize];
        if start <= linear && linear <= end {
            self.flush_all();
            return;
        }
        if self.changes.wanted {
            self.changes.any = true;
            self.changes.pages.push(linear);
        }
        self.empty(linear);
    }

    /// Empties every place where the translation of an address may be, of whatever address space.
    fn empty(&mut self, linear: u64) {
        for view in 0..VIEWS {
            for group in 0..GROUPS {
                let slot = Self::twisted(view * ENTRIES, linear, twist(group));
                self.entries[slot] = EMPTY;
            }
        }
    }

    /// Forgets everything, global pages too.
    pub(crate) fn flush_all(&mut self) {
        self.changes.any = true;
        self.changes.all = true;
        self.spaces.fill(0);
        self.large = [(u64::MAX, 0); 2];
        let spaces = [0, 1].map(|_| self.new_space());
        self.tags = spaces.map(|space| space << SPACE_SHIFT);
        self.twists[0] = twist(spaces[0]);
    }

    /// Forgets the address space of one PCID (all of them if it is the current one's tag only).
    pub(crate) fn flush_pcid(&mut self, pcid: u16, current: bool) {
        self.spaces[usize::from(pcid & 0xfff)] = 0;
        if current {
            self.switch(pcid, false);
        }
    }

    /// MOV to CR3: makes the address space of `pcid` the current one; `keep` what was cached for it.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        let index = usize::from(pcid & 0xfff);
        let known = u64::from(self.spaces[index]);
        let space = if keep && known != 0 {
            known
        } else {
            let space = self.new_space();
            self.spaces[index] = space as u16;
            space
        };
        let tag = space << SPACE_SHIFT;
        if self.tags[0] != tag {
            self.changes.any = true;
            self.changes.space = true;
        }
        self.tags[0] = tag;
        self.twists[0] = twist(space);
    }

    fn new_space(&mut self) -> u64 {
        if self.next_space > LAST_SPACE {
            self.entries.fill(EMPTY);
            self.large_entries.fill(EMPTY);
            self.spaces.fill(0);
            self.next_space = 1;
            // Tags mean something else from here on.
            self.changes.any = true;
            self.changes.all = true;
        }
        self.next_space += 1;
        self.next_space - 1
    }

    /// Takes another's address-space tags, for a processor that follows its processor: what is cached is right for
    /// as long as that one's cached translations are.
    pub(crate) fn take_tags(&mut self, other: &Self) {
        self.tags = other.tags;
        self.twists = other.twists;
    }

    /// Forgets everything, whatever its tags.
    pub(crate) fn forget(&mut self) {
        self.entries.fill(EMPTY);
        self.large_entries.fill(EMPTY);
        self.large = [(u64::MAX, 0); 2];
    }

    /// As [`Self::flush_page`], and leaves the tags as they are.
    pub(crate) fn forget_page(&mut self, linear: u64) {
        let (start, end) = self.large[(linear >> 63) as usize];
        if start <= linear && linear <= end {
            self.forget();
            return;
        }
        self.empty(linear);
    }

    /// Forgets the right to write to any page.
    pub(crate) fn forget_writes(&mut self) {
        let all = self.entries.iter_mut();
        for entry in all.chain(&mut *self.large_entries) {
            entry.write = NEVER;
        }
    }

    /// Takes the right to write away from every translation to the page at `page`: it got a trace.
    pub(crate) fn revoke_write(&mut self, page: HostAddress) {
        let page = page.as_ptr() as u64 & !0xfff;
        if self.changes.wanted {
            self.changes.any = true;
            self.changes.revoked.push(page);
        }
        for entry in self.entries.iter_mut().filter(|entry| entry.write != NEVER) {
            // The shift drops the address-space tag; bits 63 to 52 of a canonical address repeat
            // bit 51, which the sign extension restores.
            let linear = ((entry.write << SPACE_TAG_BITS) as i64 >> SPACE_TAG_BITS) as u64;
            if (linear << 12).wrapping_add(entry.addend) == page {
                entry.write = NEVER;
            }
        }
        let large = self.large_entries.iter_mut();
        for entry in large.filter(|entry| entry.write != NEVER) {
            // The shift drops the address-space tag: what is left of the address lies below it.
            let start = (entry.write << LARGE_SHIFT).wrapping_add(entry.addend);
            if page.wrapping_sub(start) < LARGE_BYTES {
                entry.write = NEVER;
            }
        }
    }
}

/// What a cached translation allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
    /// The page is in every address space.
    pub(crate) global: bool,
}

/// What the indices of an address space's translations differ by.
fn twist(space: u64) -> u64 {
    space % GROUPS * GROUP_STEP
}

#[inline(always)]
fn host(entry: &Entry, linear: u64) -> HostAddress {
    // SAFETY: the addend was made in `insert` from an address that `GuestMemory` gave for this
    // page, and the tag compare says that `linear` lies in that page. The `Cpu` that owns this TLB
    // keeps the `GuestMemory` alive.
    unsafe { HostAddress::new(linear.wrapping_add(entry.addend) as *mut u8) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Rights = Rights {
        read: true,
        write: true,
        execute: true,
        global: false,
    };
    const LOWER: u64 = 0x40_1000;
    const UPPER: u64 = 0xffff_8880_0040_5000;

    fn page(number: u64) -> HostAddress {
        // SAFETY: nobody accesses memory there.
        unsafe { HostAddress::new((number << 12) as *mut u8) }
    }

    fn found(tlb: &Tlb, linear: u64) -> Option<u64> {
        let host = tlb.find(View::User, Access::Write, linear, 1)?;
        Some(host.as_ptr() as u64 >> 12)
    }

    /// Two address spaces, each with a page of its own at both addresses; the second is current.
    fn two_spaces() -> Tlb {
        let mut tlb = Tlb::new();
        for pcid in [1, 2] {
            tlb.switch(pcid, true);
            for linear in [LOWER, UPPER] {
                tlb.insert(View::User, linear, page(u64::from(pcid)), ALL);
            }
        }
        tlb
    }

    #[test]
    fn address_spaces_do_not_take_each_other_s_translations_of_the_same_addresses() {
        let mut tlb = two_spaces();
        for pcid in [1, 2, 1] {
            tlb.switch(pcid, true);
            for linear in [LOWER, UPPER] {
                assert_eq!(found(&tlb, linear), Some(pcid.into()), "{linear:#x}");
            }
        }
        tlb.switch(3, true);
        assert_eq!(found(&tlb, LOWER), None);
        assert_eq!(found(&tlb, UPPER), None);
    }

    #[test]
    fn page_is_forgotten_in_every_address_space() {
        for linear in [LOWER, UPPER] {
            let mut tlb = two_spaces();
            tlb.flush_page(linear);
            for pcid in [1, 2] {
                tlb.switch(pcid, true);
                assert_eq!(found(&tlb, linear), None, "{linear:#x}");
                assert_eq!(found(&tlb, linear ^ 0x3000), None);
                assert!(found(&tlb, LOWER ^ UPPER ^ linear).is_some());
            }
        }
    }

    #[test]
    fn global_page_of_the_upper_half_is_in_every_address_space() {
        let mut tlb = two_spaces();
        let global = Rights {
            global: true,
            ..ALL
        };
        tlb.insert(View::User, UPPER + 0x1000, page(7), global);
        for pcid in [1, 9] {
            tlb.switch(pcid, true);
            assert_eq!(found(&tlb, UPPER + 0x1000), Some(7));
        }
    }

    /// A large translation of the lower half at 4 MiB, from host page 0x1000 on.
    fn large(rights: Rights) -> Tlb {
        let mut tlb = Tlb::new();
        tlb.note_large(2 * LARGE_BYTES, LARGE_BYTES);
        tlb.insert_large(View::User, 2 * LARGE_BYTES, page(0x1000), rights);
        tlb
    }

    fn in_large(tlb: &mut Tlb, access: Access, number: u64) -> Option<u64> {
        let linear = 2 * LARGE_BYTES + (number << 12) + 5;
        let found = tlb.find_large(View::User, access, linear);
        found.map(|host| host.as_ptr() as u64)
    }

    #[test]
    fn large_translation_is_one_of_all_its_pages_and_of_no_others() {
        let mut tlb = large(ALL);
        for number in [0, 1, 511] {
            let host = (0x1000 + number) << 12 | 5;
            assert_eq!(in_large(&mut tlb, Access::Write, number), Some(host));
            // It is there as one of a page from then on.
            assert_eq!(
                found(&tlb, 2 * LARGE_BYTES + (number << 12)),
                Some(0x1000 + number)
            );
        }
        assert_eq!(in_large(&mut tlb, Access::Read, 512), None);
        assert_eq!(found(&tlb, 2 * LARGE_BYTES + 0x2000), None);
        tlb.switch(7, true);
        assert_eq!(in_large(&mut tlb, Access::Read, 1), None);
        tlb.switch(0, true);
        tlb.flush_page(2 * LARGE_BYTES + 0x5000);
        assert_eq!(in_large(&mut tlb, Access::Read, 1), None);
    }

    #[test]
    fn large_translation_of_the_upper_half_is_of_every_address_space_if_it_is_global() {
        for global in [false, true] {
            let mut tlb = Tlb::new();
            let rights = Rights { global, ..ALL };
            tlb.insert_large(View::User, UPPER, page(0x1000), rights);
            let find = |tlb: &mut Tlb| tlb.find_large(View::User, Access::Read, UPPER).is_some();
            assert!(find(&mut tlb));
            assert_eq!(tlb.is_local(View::User, UPPER), !global);
            tlb.switch(7, true);
            assert_eq!(find(&mut tlb), global);
        }
    }

    #[test]
    fn trace_on_one_page_takes_the_right_to_write_from_the_whole_large_translation() {
        for (number, stays) in [
            (0x0fff, true),
            (0x1000, false),
            (0x11ff, false),
            (0x1200, true),
        ] {
            let mut tlb = large(ALL);
            tlb.revoke_write(page(number));
            let write = in_large(&mut tlb, Access::Write, 9).is_some();
            assert_eq!(write, stays, "{number:#x}");
            assert!(in_large(&mut tlb, Access::Read, 9).is_some());
        }
    }
}
