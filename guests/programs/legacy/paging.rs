//! 32-bit and PAE paging (SDM vol. 3A 5.3, 5.4, 5.6 to 5.8).

use runtime::cpu::{self, msr};
use runtime::{print, println};

use crate::machine::*;
use crate::pieces;

pieces! { "32"
    m_read: [] "mov eax, [edi]";
    m_write: [] "mov [edi], eax";
    m_jump: [] "jmp edi";
    // Read, let the entry at ESI become EBX, forget as the name says, read again.
    m_remap_invlpg: ["mov eax, [edi]", "mov [esi], ebx", "invlpg [edi]"] "mov edx, [edi]";
    m_remap_cr3: ["mov eax, [edi]", "mov [esi], ebx", "mov ecx, cr3", "mov cr3, ecx"] "mov edx, [edi]";
    m_remap_pge: ["mov eax, [edi]", "mov [esi], ebx", "mov ecx, cr4", "xor ecx, 0x80", "mov cr4, ecx"] "mov edx, [edi]";
    m_remap_pg: ["mov eax, [edi]", "mov [esi], ebx", "mov ecx, cr0", "btr ecx, 31", "mov cr0, ecx", "bts ecx, 31", "mov cr0, ecx"] "mov edx, [edi]";
    m_remap_smep: ["mov eax, [edi]", "mov [esi], ebx", "mov ecx, cr4", "bts ecx, 20", "mov cr4, ecx"] "mov edx, [edi]";
    m_remap_pse: ["mov eax, [edi]", "mov [esi], ebx", "mov ecx, cr4", "xor ecx, 0x10", "mov cr4, ecx"] "mov edx, [edi]";
    m_leave_pae: ["mov eax, [edi]", "mov ecx, cr4", "btr ecx, 5", "mov cr4, ecx"] "mov edx, [edi]";
    m_write_cr3: [] "mov cr3, edi";
    m_write_cr0: [] "mov cr0, edi";
    m_write_cr4: [] "mov cr4, edi";
    m_switch: [] ".byte 0xEA\n.long 0\n.word 0x38";
}

const PG: u32 = 1 << 31;
const WP: u32 = 1 << 16;
const PSE: u32 = 1 << 4;
const PAE: u32 = 1 << 5;
const PGE: u32 = 1 << 7;
const SMEP: u32 = 1 << 20;
const SMAP: u32 = 1 << 21;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

/// Where the pages in question are.
const WINDOW: u32 = 0x4000_0000;

#[repr(C, align(4096))]
struct Page([u64; 512]);
static mut DIRECTORY: Page = Page([0; 512]);
static mut SECOND_DIRECTORY: Page = Page([0; 512]);
static mut TABLE: Page = Page([0; 512]);
static mut POINTERS: Page = Page([0; 512]);
static mut LOW_TABLE: Page = Page([0; 512]);
static mut OTHER_TABLE: Page = Page([0; 512]);
static mut FRAME: Page = Page([0; 512]);
static mut OTHER_FRAME: Page = Page([0; 512]);

fn place(page: *const Page) -> u32 {
    page as u32
}

/// What the window's page holds: UD2, for whoever jumps there.
const CONTENT: u32 = 0x1111_0B0F;

/// How addresses are translated: entries of four or of eight bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Narrow,
    Pae,
}

impl Mode {
    fn entry(self, table: u32, index: u32) -> u64 {
        // SAFETY: the tables are this program's own.
        unsafe {
            match self {
                Mode::Narrow => (table as *const u32)
                    .add(index as usize)
                    .read_volatile()
                    .into(),
                Mode::Pae => (table as *const u64).add(index as usize).read_volatile(),
            }
        }
    }

    fn set(self, table: u32, index: u32, entry: u64) {
        // SAFETY: as above.
        unsafe {
            match self {
                Mode::Narrow => (table as *mut u32)
                    .add(index as usize)
                    .write_volatile(entry as u32),
                Mode::Pae => (table as *mut u64)
                    .add(index as usize)
                    .write_volatile(entry),
            }
        }
    }

    /// The first 16 MiB one to one, in large pages, for ring 3 too if it is to run; the window's directory entry
    /// and its first page.
    fn prepare(self, low: u64, directory: u64, page: u64) {
        for table in [
            &raw const DIRECTORY,
            &raw const SECOND_DIRECTORY,
            &raw const TABLE,
            &raw const POINTERS,
        ] {
            for index in 0..512 {
                Mode::Pae.set(place(table), index, 0);
            }
        }
        let (first, table) = (place(&raw const DIRECTORY), place(&raw const TABLE));
        let size: u64 = match self {
            Mode::Narrow => 4 << 20,
            Mode::Pae => 2 << 20,
        };
        for index in 0..(16 << 20) / size {
            self.set(first, index as u32, index * size | P | W | PS | low);
        }
        match self {
            Mode::Narrow => self.set(first, WINDOW >> 22, u64::from(table) | directory),
            Mode::Pae => {
                let (pointers, second) = (
                    place(&raw const POINTERS),
                    place(&raw const SECOND_DIRECTORY),
                );
                self.set(pointers, 0, u64::from(first) | P);
                self.set(pointers, 1, u64::from(second) | P);
                self.set(second, 0, u64::from(table) | directory);
            }
        }
        self.set(table, 0, u64::from(place(&raw const FRAME)) | page);
    }

    fn set_directory(self, entry: u64) {
        match self {
            Mode::Narrow => self.set(place(&raw const DIRECTORY), WINDOW >> 22, entry),
            Mode::Pae => self.set(place(&raw const SECOND_DIRECTORY), 0, entry),
        }
    }

    fn directory(self) -> u64 {
        match self {
            Mode::Narrow => self.entry(place(&raw const DIRECTORY), WINDOW >> 22),
            Mode::Pae => self.entry(place(&raw const SECOND_DIRECTORY), 0),
        }
    }

    fn page(self) -> u64 {
        self.entry(place(&raw const TABLE), 0)
    }

    fn state(self, ring: u8, code: Code) -> State {
        let state = match ring {
            0 => State::ring0(code),
            _ => State::ring3(code),
        };
        let (cr3, cr4) = match self {
            Mode::Narrow => (place(&raw const DIRECTORY), PSE),
            Mode::Pae => (place(&raw const POINTERS), PAE),
        };
        State {
            cr0: CR0 | PG,
            cr3,
            cr4,
            // What is written leaves the page as it is.
            eax: CONTENT,
            edi: WINDOW,
            ..state
        }
    }
}

pub fn show() {
    // SAFETY: this program's own pages.
    unsafe {
        (&raw mut FRAME).cast::<u32>().write_volatile(CONTENT);
        (&raw mut OTHER_FRAME)
            .cast::<u32>()
            .write_volatile(0x2222_0B0F);
    }
    println!(
        "32-bit paging, rights of ring 0 / ring 3 by the bits of directory entry and page (u user, w writable)"
    );
    matrix_of_levels();
    println!("pae paging, the same with no-execute (n)");
    matrix_with_no_execute();
    for mode in [Mode::Narrow, Mode::Pae] {
        faults(mode);
        accessed_and_dirty(mode);
        forgetting(mode);
    }
    forgetting_formats();
    high_pages();
    reserved();
    pointers();
    task_switch();
    reset();
}

const ACCESSES: [(char, Piece, u32); 3] =
    [('r', m_read, 0), ('w', m_write, 2), ('x', m_jump, 0x10)];

/// Whether it is allowed; a fault must have this error code, CR2, and address.
fn allowed(
    mode: Mode,
    ring: u8,
    access: usize,
    change: impl FnOnce(&mut State),
    fetch_bit: bool,
) -> bool {
    let (_, piece, bit) = ACCESSES[access];
    let code = Code::new(piece);
    let mut state = mode.state(ring, code);
    change(&mut state);
    let outcome = run(&state);
    if outcome.vector == 6 {
        return true;
    }
    let bit = if bit == 0x10 && !fetch_bit { 0 } else { bit };
    let expected = 1 | bit | if ring == 3 { 4 } else { 0 };
    let eip = if access == 2 { WINDOW } else { code.at };
    if (outcome.vector, outcome.error, outcome.cr2, outcome.eip) != (14, expected, WINDOW, eip) {
        print!(" wrong: ");
        print_event(&outcome);
        print!(" cr2 {:#x} ", outcome.cr2);
    }
    false
}

fn print_rights(mode: Mode, count: usize, cr0: u32, fetch_bit: bool) {
    for ring in [0, 3] {
        for (access, (letter, ..)) in ACCESSES.into_iter().enumerate().take(count) {
            let yes = allowed(mode, ring, access, |state| state.cr0 |= cr0, fetch_bit);
            print!("{}", if yes { letter } else { '-' });
        }
        if ring == 0 {
            print!("/");
        }
    }
}

fn flags(bits: u64) -> u64 {
    P | if bits & 2 != 0 { U } else { 0 } | if bits & 1 != 0 { W } else { 0 }
}

fn matrix_of_levels() {
    for cr0 in [0, WP] {
        for directory in 0..4 {
            print!(
                "wp {} {}:",
                u8::from(cr0 != 0),
                ["--", "-w", "u-", "uw"][directory as usize]
            );
            for page in 0..4 {
                Mode::Narrow.prepare(U, flags(directory), flags(page));
                print!(" ");
                print_rights(Mode::Narrow, 2, cr0, false);
            }
            println!();
        }
    }
}

fn matrix_with_no_execute() {
    for directory in [0, NX] {
        for cr0 in [0, WP] {
            print!(
                "wp {} {}:",
                u8::from(cr0 != 0),
                if directory == 0 { "uw-" } else { "uwn" }
            );
            for page in 0..8 {
                let no_execute = if page & 4 != 0 { NX } else { 0 };
                Mode::Pae.prepare(U, directory | P | U | W, flags(page) | no_execute);
                print!(" ");
                print_rights(Mode::Pae, 3, cr0, true);
            }
            println!();
        }
    }
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Narrow => "32-bit",
        Mode::Pae => "pae",
    }
}

/// One line: an access and its exception.
fn tell(mode: Mode, what: &str, ring: u8, piece: Piece, change: impl FnOnce(&mut State)) {
    let code = Code::new(piece);
    let mut state = mode.state(ring, code);
    change(&mut state);
    let outcome = run(&state);
    print!("{}, {what}: ", name(mode));
    if outcome.vector == 6 && [code.after, WINDOW].contains(&outcome.eip) {
        println!("no exception");
        return;
    }
    print_event(&outcome);
    if outcome.vector == 14 {
        print!(" cr2 {:#x}", outcome.cr2);
    }
    println!();
}

/// Error codes (5.7). A fetch is told apart while it could be refused as such: NX with PAE, or SMEP.
fn faults(mode: Mode) {
    let full = P | U | W;
    for (level, directory, page) in [("table", 0, full), ("page", full, 0)] {
        for ring in [0u8, 3] {
            for (access, piece) in [
                ("read", m_read as Piece),
                ("write", m_write),
                ("fetch", m_jump),
            ] {
                mode.prepare(U, directory, page);
                print!("no {level}, ring {ring}, {access}; ");
                tell(mode, "not present", ring, piece, |_| ());
            }
        }
    }
    mode.prepare(0, full, full);
    tell(mode, "smep, fetch from a user page", 0, m_jump, |state| {
        state.cr4 |= SMEP
    });
    tell(mode, "smep, read of a user page", 0, m_read, |state| {
        state.cr4 |= SMEP
    });
    tell(mode, "smap, read of a user page", 0, m_read, |state| {
        state.cr4 |= SMAP
    });
    tell(mode, "smap, write of a user page", 0, m_write, |state| {
        state.cr4 |= SMAP
    });
    tell(mode, "smap, ac, read of a user page", 0, m_read, |state| {
        state.cr4 |= SMAP;
        state.eflags |= 1 << 18;
    });
    mode.prepare(0, full, 0);
    tell(mode, "smep, fetch, not present", 0, m_jump, |state| {
        state.cr4 |= SMEP
    });
    // A dword across the end of the page, the next is missing.
    mode.prepare(U, full, full);
    tell(
        mode,
        "read across the end of the page",
        0,
        m_read,
        |state| state.edi = WINDOW + 4094,
    );
    tell(
        mode,
        "write across the end of the page",
        3,
        m_write,
        |state| state.edi = WINDOW + 4093,
    );
    with_efer(!NXE, || {
        mode.prepare(U, full, 0);
        tell(mode, "no nx, fetch, not present", 0, m_jump, |_| ());
        if mode == Mode::Pae {
            mode.prepare(U, full, full | NX);
            tell(mode, "no nx, read of a page with bit 63", 0, m_read, |_| ());
        }
    });
}

const NXE: u64 = 1 << 11;

fn with_efer(mask: u64, body: impl FnOnce()) {
    let old = cpu::read_msr(msr::EFER);
    cpu::write_msr(msr::EFER, old & mask);
    body();
    cpu::write_msr(msr::EFER, old);
}

/// 5.8. A directory entry that names a table has no dirty bit, PAE's pointers neither of them.
fn accessed_and_dirty(mode: Mode) {
    for (what, piece) in [("read", m_read as Piece), ("write", m_write)] {
        mode.prepare(0, P | W, P | W);
        run(&mode.state(0, Code::new(piece)));
        let (directory, page) = (mode.directory(), mode.page());
        print!(
            "{}, {what}: directory a {} bit 6 {}, page a {} d {}",
            name(mode),
            u8::from(directory & A != 0),
            u8::from(directory & D != 0),
            u8::from(page & A != 0),
            u8::from(page & D != 0)
        );
        mode.set_directory(P | W | PS);
        run(&mode.state(0, Code::new(piece)));
        let directory = mode.directory();
        print!(
            "; large page a {} d {}",
            u8::from(directory & A != 0),
            u8::from(directory & D != 0)
        );
        if mode == Mode::Pae {
            let pointer = mode.entry(place(&raw const POINTERS), 1);
            print!("; pointer {:#x}", pointer & 0xFFF);
        }
        println!();
    }
}

/// 5.10.4.1. (Nothing is promised of CR0.WP, CR4.SMAP and EFER.NXE.)
fn forgetting(mode: Mode) {
    for (what, piece, page, cr4) in [
        ("invlpg", m_remap_invlpg as Piece, 0, 0),
        ("cr3", m_remap_cr3, 0, 0),
        ("invlpg of a global page", m_remap_invlpg, G, PGE),
        ("cr4.pge off", m_remap_pge, G, PGE),
        ("cr4.pge on", m_remap_pge, G, 0),
        ("cr0.pg off and on", m_remap_pg, G, PGE),
        ("cr4.smep on", m_remap_smep, 0, 0),
    ] {
        mode.prepare(0, P | W, P | W | page);
        remapped(mode, what, piece, page, |state| state.cr4 |= cr4);
    }
}

/// One line: what the window's page holds before and after the piece.
fn remapped(mode: Mode, what: &str, piece: Piece, page: u64, change: impl FnOnce(&mut State)) {
    let mut state = mode.state(0, Code::new(piece));
    state.esi = place(&raw const TABLE);
    state.ebx = place(&raw const OTHER_FRAME) | (P | W | page) as u32;
    change(&mut state);
    let outcome = run(&state);
    println!(
        "{}, remapped, {what}: {:#x} {:#x}",
        name(mode),
        outcome.eax >> 16,
        outcome.edx >> 16
    );
}

/// The bits that say how entries are read (13.9; 5.10.4.1 names PAE alone). The first 4 MiB need small pages then.
fn forgetting_formats() {
    let low = place(&raw const SECOND_DIRECTORY);
    for (what, cr4) in [("cr4.pse on", 0), ("cr4.pse off", PSE)] {
        Mode::Narrow.prepare(0, P | W, P | W);
        low_pages(low);
        remapped(Mode::Narrow, what, m_remap_pse, 0, |state| state.cr4 = cr4);
    }
    // Both formats at once: the pointers are also a directory, whose first entry names the directory as a table. That has
    // 4 KiB pages from the third word on, for 32-bit paging; PAE finds the first 2 MiB in its first two words.
    Mode::Pae.prepare(0, P | W, P | W);
    let (pointers, directory) = (place(&raw const POINTERS), place(&raw const DIRECTORY));
    for index in 0..512 {
        Mode::Pae.set(
            place(&raw const LOW_TABLE),
            index,
            u64::from(index << 12) | P | W,
        );
    }
    low_pages_behind(directory, 2);
    Mode::Pae.set(directory, 0, u64::from(place(&raw const LOW_TABLE)) | P | W);
    Mode::Narrow.set(
        pointers,
        WINDOW >> 22,
        u64::from(place(&raw const OTHER_TABLE)) | P | W,
    );
    Mode::Narrow.set(
        place(&raw const OTHER_TABLE),
        0,
        u64::from(place(&raw const OTHER_FRAME)) | P | W,
    );
    remapped(Mode::Pae, "cr4.pae off", m_leave_pae, 0, |_| ());
}

/// Lets 32-bit paging find the first 4 MiB in small pages, in this table.
fn low_pages(table: u32) {
    low_pages_behind(table, 0);
    Mode::Narrow.set(place(&raw const DIRECTORY), 0, u64::from(table) | P | W);
}

fn low_pages_behind(table: u32, first: u32) {
    for index in first..1024 {
        Mode::Narrow.set(table, index, u64::from(index << 12) | P | W);
    }
}

/// Bits 13 to 20 of a large page's entry are bits 32 to 39 of its address (5.3, PSE-36; table 5-4): there is no memory,
/// and ones are read.
fn high_pages() {
    let frame = place(&raw const FRAME);
    let base = u64::from(frame) & !0x3F_FFFF;
    print!("32-bit, large page, address bit:");
    for bit in [0].into_iter().chain(13..=20) {
        let high = if bit == 0 { 0 } else { 1 << bit };
        Mode::Narrow.prepare(0, 0, 0);
        Mode::Narrow.set_directory(base | high | P | W | PS);
        let mut state = Mode::Narrow.state(0, Code::new(m_read));
        state.edi = WINDOW + (frame & 0x3F_FFFF);
        print!(
            " {} {:#x}",
            if bit == 0 { 0 } else { bit + 19 },
            run(&state).eax
        );
    }
    println!();
}

/// Bits that must be zero, and PAT, which may be one (figures 5-4, 5-7; table 5-6, 5-10, 5-11). The physical address has 40 bits.
fn reserved() {
    let large = |mode: Mode, what: &str, bits: u64| {
        mode.prepare(0, 0, 0);
        mode.set_directory(P | W | PS | bits);
        tell(mode, what, 0, m_read, |_| ());
    };
    let table = u64::from(place(&raw const TABLE));
    large(Mode::Narrow, "large page, bit 21", 1 << 21);
    large(Mode::Narrow, "large page, bit 12 (pat)", 1 << 12);
    // Without CR4.PSE bit 7 means nothing. (The low pages need tables then.)
    Mode::Narrow.prepare(0, 0, P | W);
    low_pages(place(&raw const SECOND_DIRECTORY));
    Mode::Narrow.set_directory(table | P | W | PS);
    tell(
        Mode::Narrow,
        "bit 7 of the directory entry without pse",
        0,
        m_read,
        |state| state.cr4 = 0,
    );
    let pae = |what: &str, directory: u64, page: u64| {
        Mode::Pae.prepare(0, directory, page);
        tell(Mode::Pae, what, 0, m_read, |_| ());
    };
    Mode::Narrow.prepare(0, P | W, P | W | 1 << 7);
    tell(Mode::Narrow, "page, bit 7 (pat)", 0, m_read, |_| ());
    large(Mode::Pae, "large page, bit 12 (pat)", 1 << 12);
    pae("page, bit 7 (pat)", P | W, P | W | 1 << 7);
    for bit in [13u32, 20, 40, 51, 52, 62] {
        print!("large page, bit {bit}; ");
        large(Mode::Pae, "reserved", 1 << bit);
    }
    for bit in [40u32, 51, 52, 62] {
        print!("directory entry, bit {bit}; ");
        pae("reserved", P | W | 1 << bit, P | W);
        print!("page, bit {bit}; ");
        pae("reserved", P | W, P | W | 1 << bit);
    }
    Mode::Pae.prepare(U, P | U | W | 1 << 52, P | U | W);
    tell(Mode::Pae, "reserved, ring 3, write", 3, m_write, |_| ());
    tell(Mode::Pae, "reserved, ring 3, fetch", 3, m_jump, |_| ());
    pae("not present, and reserved bits", 1 << 52, P | W);
}

/// The four pointers are checked when they are loaded (5.4.1), by MOV to CR3, CR0 and CR4.
fn pointers() {
    Mode::Pae.prepare(0, P | W, P | W);
    Mode::Pae.set(place(&raw const POINTERS), 1, 0);
    tell(Mode::Pae, "pointer not present", 0, m_read, |_| ());
    for bit in [1u32, 2, 5, 8, 40, 63] {
        for present in [P, 0] {
            Mode::Pae.prepare(0, P | W, P | W);
            // A second table of pointers, to be loaded: 32 bytes further.
            let pointers = place(&raw const POINTERS);
            for index in 0..4 {
                Mode::Pae.set(pointers, 4 + index, Mode::Pae.entry(pointers, index));
            }
            Mode::Pae.set(pointers, 7, present | 1 << bit);
            print!("pointer with bit {bit}, present {present}; ");
            tell(Mode::Pae, "mov to cr3", 0, m_write_cr3, |state| {
                state.edi = pointers + 32
            });
        }
    }
    Mode::Pae.prepare(0, P | W, P | W);
    Mode::Pae.set(place(&raw const POINTERS), 3, P | 2);
    tell(
        Mode::Pae,
        "bad pointer, paging on",
        0,
        m_write_cr0,
        |state| {
            state.cr0 = CR0;
            state.edi = CR0 | PG;
        },
    );
    // From 32-bit paging to PAE by CR4: the same page is a directory and a table of pointers.
    Mode::Narrow.prepare(0, P | W, P | W);
    tell(
        Mode::Narrow,
        "cr4.pae on, bad pointers",
        0,
        m_write_cr4,
        |state| state.edi = PSE | PAE,
    );
}

/// A task switch loads CR3 while paging is on (9.3).
fn task_switch() {
    reset();
    Mode::Narrow.prepare(0, P | W, P | W);
    let words = &mut task(1).words;
    words[7] = place(&raw const DIRECTORY);
    words[8] = Code::new(m_read).start;
    words[17] = WINDOW;
    let code = Code::new(m_switch);
    let mut state = Mode::Narrow.state(0, code);
    // The old task has no window.
    for index in 0..8 {
        let entry = Mode::Narrow.entry(place(&raw const DIRECTORY), index);
        Mode::Narrow.set(place(&raw const POINTERS), index, entry);
    }
    state.cr3 = place(&raw const POINTERS);
    let outcome = run(&state);
    println!(
        "task switch under paging: cr3 the new one {}, reads {:#x}",
        u8::from(outcome.cr3 == place(&raw const DIRECTORY)),
        outcome.eax >> 16
    );
    // No CR3 to save: the old task's stays what it was.
    println!("cr3 in the old task's segment: {:#x}", task(0).words[7]);
    // The new task's stack pointer and descriptor tables are read with the new tables; an image that is not mapped
    // in the old ones is a page fault of the old task.
    Mode::Narrow.prepare(0, P | W, P | W);
    set_descriptor(TASK_B, segment(WINDOW + 0x1000, TASK_LIMIT, 0x89, 0));
    // Which of its bytes is read first is not said anywhere.
    let outcome = run(&Mode::Narrow.state(0, code));
    print!("task whose segment has no page: ");
    print_event(&outcome);
    println!(" in {:#x}", outcome.tr);
}
