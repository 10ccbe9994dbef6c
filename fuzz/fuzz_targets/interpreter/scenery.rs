//! A guest that is set up enough for everything to happen to it: descriptor tables with a segment and
//! a gate of each kind, task state, page tables of each format, and a processor in the chosen mode.

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use trapgate_memory::GuestMemory;
use trapgate_x86::paging::pte;
use trapgate_x86::registers::{cr0, cr4, dr, efer, gpr, rflags, sreg, xcr0};
use trapgate_x86::{CpuProfile, CpuState, Descriptor, InterruptShadow, Segment, TableRegister};

use crate::code::{Piece, assemble};

/// Bytes of guest memory, from address 0. The page tables map more.
pub const RAM: u64 = 0x6_0000;
/// Code of the guest; the first pages hold its tables.
pub const CODE: u64 = 0x1_0000;
/// Bytes before the end of a page at which code starts that shall cross it.
const BEFORE_PAGE_END: u64 = 8;
const DATA: u64 = 0x4_0000;
const STACK: u64 = 0x3_0000;

/// Every gate leads here: one place for 64-bit code, one for the others.
const HANDLER: u64 = 0x700;
const HANDLER_64: u64 = 0x780;
const GDT: u64 = 0x1000;
const LDT: u64 = 0x1800;
const IDT: u64 = 0x2000;
const IDT_64: u64 = 0x3000;
/// Task state: of the task that runs, of another, and 64-bit.
const TSS: u64 = 0x5000;
const OTHER_TSS: u64 = 0x5800;
const TSS_64: u64 = 0x6000;
const TSS_LIMIT: u64 = 0x67;
/// 4-level page tables; PAE uses the third level of them.
const PML4: u64 = 0x8000;
const PDPT: u64 = 0x9000;
const PAGE_DIRECTORY: u64 = 0xa000;
const PAGE_TABLE: u64 = 0xb000;
const DIRECTORY_32: u64 = 0xc000;
const TABLE_32: u64 = 0xd000;
const PDPT_PAE: u64 = 0xe000;

const CODE_64: u16 = 0x08;
const DATA_32: u16 = 0x10;
const CODE_32: u16 = 0x18;
const CODE_16: u16 = 0x20;
const DATA_16: u16 = 0x28;
const USER_CODE_64: u16 = 0x33;
const USER_DATA_32: u16 = 0x3b;
const USER_CODE_32: u16 = 0x43;
const USER_CODE_16: u16 = 0x4b;
const USER_DATA_16: u16 = 0x53;
const TASK: u16 = 0x58;
const TASK_64: u16 = 0x60;
const OTHER_TASK: u16 = 0x70;
const CALL_GATE: u16 = 0x78;
const LOCAL_TABLE: u16 = 0x90;

/// What the fuzzer chooses of the guest.
#[derive(Arbitrary, Debug)]
pub struct Guest {
    mode: Mode,
    paging: Paging,
    user: bool,
    crosses_page: bool,
    cr0: u8,
    cr4: u32,
    no_execute: bool,
    rflags: u32,
    registers: [Value; 16],
    breakpoints: Option<(u8, u32)>,
    shadow: u8,
    /// Fields of tables overwritten.
    bends: Vec<(u16, u64)>,
    handler: Vec<Piece>,
    code: Vec<Piece>,
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Mode {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    Compatibility,
    Long,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Paging {
    None,
    Bits32,
    Pae,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Small(u8),
    Data(u16),
    Code(u8),
    Table(u16),
    Any(u64),
}

impl Value {
    fn get(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Data(offset) => DATA + u64::from(offset),
            Self::Code(offset) => CODE + u64::from(offset),
            Self::Table(gpa) => gpa.into(),
            Self::Any(value) => value,
        }
    }
}

/// A segment descriptor of these access rights, in the format of [`Segment::access`].
fn descriptor(base: u64, limit: u64, access: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (access & 0xf0ff) << 40
        | (limit & 0xf_0000) << 32
        | (base >> 24 & 0xff) << 56
}

/// A gate's first eight bytes.
fn gate(kind: u64, selector: u16, offset: u64) -> u64 {
    (offset & 0xffff) | u64::from(selector) << 16 | kind << 40 | (offset >> 16 & 0xffff) << 48
}

/// The first pages of guest memory in the making.
struct Painter(Vec<u8>);

impl Painter {
    fn bytes(&mut self, gpa: u64, bytes: &[u8]) {
        let start = gpa as usize;
        self.0[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn quad(&mut self, gpa: u64, value: u64) {
        self.bytes(gpa, &value.to_le_bytes());
    }

    fn double(&mut self, gpa: u64, value: u32) {
        self.bytes(gpa, &value.to_le_bytes());
    }

    fn descriptors(&mut self) {
        const FLAT: u64 = 0xf_ffff;
        for (selector, base, limit, access) in [
            (CODE_64, 0, FLAT, 0xa09b),
            (DATA_32, 0, FLAT, 0xc093),
            (CODE_32, 0, FLAT, 0xc09b),
            (CODE_16, CODE, 0xffff, 0x009b),
            (DATA_16, 0, 0xffff, 0x0093),
            (USER_CODE_64, 0, FLAT, 0xa0fb),
            (USER_DATA_32, 0, FLAT, 0xc0f3),
            (USER_CODE_32, 0, FLAT, 0xc0fb),
            (USER_CODE_16, CODE, 0xffff, 0x00fb),
            (USER_DATA_16, 0, 0xffff, 0x00f3),
            (TASK, TSS, TSS_LIMIT, 0x008b),
            (TASK_64, TSS_64, TSS_LIMIT, 0x008b),
            (OTHER_TASK, OTHER_TSS, TSS_LIMIT, 0x0089),
            (LOCAL_TABLE, LDT, 0xff, 0x0082),
        ] {
            self.quad(
                GDT + u64::from(selector & !7),
                descriptor(base, limit, access),
            );
        }
        self.quad(LDT, descriptor(0, FLAT, 0xc0f3));
        self.quad(LDT + 8, descriptor(0, FLAT, 0xc0fb));
    }

    /// Gates of each kind for each vector, and the call gate. Vector 8 is a task, vectors 2 and 18
    /// have stacks of their own.
    fn gates(&mut self, long: bool) {
        let kind = |vector: u64| [0x8e, 0x8f, 0xee, 0xef][(vector % 4) as usize];
        for vector in 0..256 {
            // Real mode's vectors; the first tables lie behind them.
            self.double(vector * 4, HANDLER as u32);
            self.quad(IDT + vector * 8, gate(kind(vector), CODE_32, HANDLER));
            let stack = if matches!(vector, 2 | 8 | 18) {
                1 << 32
            } else {
                0
            };
            let gate = gate(kind(vector), CODE_64, HANDLER_64) | stack;
            self.quad(IDT_64 + vector * 16, gate);
        }
        self.quad(IDT + 8 * 8, gate(0xe5, OTHER_TASK, 0));
        let call = if long {
            gate(0xec, CODE_64, HANDLER_64)
        } else {
            gate(0xec, CODE_32, HANDLER) | 2 << 32
        };
        self.quad(GDT + u64::from(CALL_GATE), call);
        self.quad(GDT + u64::from(CALL_GATE) + 8, 0);
    }

    fn tasks(&mut self) {
        for (task, stack) in [(TSS, STACK - 0x4000), (OTHER_TSS, STACK - 0x5000)] {
            for ring in 0..3 {
                self.double(task + 4 + 8 * ring, (stack - 0x100 * ring) as u32);
                self.double(task + 8 + 8 * ring, u32::from(DATA_32) | ring as u32);
            }
            self.double(task + 0x1c, DIRECTORY_32 as u32);
            self.double(task + 0x20, HANDLER as u32);
            self.double(task + 0x24, rflags::ONE as u32);
            self.double(task + 0x38, stack as u32);
            for (index, selector) in [DATA_32, CODE_32, DATA_32, DATA_32, DATA_32, DATA_32]
                .into_iter()
                .enumerate()
            {
                self.double(task + 0x48 + 4 * index as u64, selector.into());
            }
            // The interrupt redirection and I/O permission bit maps start here.
            self.double(task + 0x64, 0x44 << 16);
        }
        for stack in 0..10 {
            self.quad(TSS_64 + 4 + 8 * stack, STACK - 0x6000 - 0x100 * stack);
        }
    }

    /// Everything is mapped to itself, in pages of each size.
    fn page_tables(&mut self) {
        let all = pte::P | pte::W | pte::U;
        self.quad(PML4, PDPT | all);
        // The upper half too, for kernels.
        self.quad(PML4 + 511 * 8, PDPT | all);
        for index in [0, 510, 511] {
            self.quad(PDPT + index * 8, PAGE_DIRECTORY | all);
        }
        self.quad(PDPT + 8, pte::PS | all);
        self.quad(PAGE_DIRECTORY, PAGE_TABLE | all);
        self.quad(PAGE_DIRECTORY + 8, 0x20_0000 | pte::PS | pte::G | all);
        for page in 0..512 {
            self.quad(PAGE_TABLE + page * 8, page << 12 | all);
        }
        self.double(DIRECTORY_32, (TABLE_32 | all) as u32);
        self.double(DIRECTORY_32 + 4, (pte::PS | all) as u32);
        for page in 0..1024 {
            self.double(TABLE_32 + page * 4, (page << 12 | all) as u32);
        }
        self.quad(PDPT_PAE, PAGE_DIRECTORY | pte::P);
    }
}

/// What lies before the code.
fn tables(long: bool) -> Vec<u8> {
    let mut painter = Painter(vec![0; CODE as usize]);
    painter.descriptors();
    painter.gates(long);
    painter.tasks();
    painter.page_tables();
    painter.0
}

impl Guest {
    fn is_long(&self) -> bool {
        matches!(self.mode, Mode::Long | Mode::Compatibility)
    }

    fn is_protected(&self) -> bool {
        self.mode != Mode::Real
    }

    /// Privilege level.
    fn ring(&self) -> u16 {
        match self.mode {
            Mode::Real => 0,
            Mode::Virtual8086 => 3,
            _ => 3 * u16::from(self.user),
        }
    }

    fn code_start(&self) -> u64 {
        if self.crosses_page {
            CODE + 0x1000 - BEFORE_PAGE_END
        } else {
            CODE
        }
    }

    /// Lays out guest memory, which is all zeros.
    pub fn paint(&self, memory: &GuestMemory) {
        static TABLES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [false, true].map(tables));
        const LONGEST: usize = 0x1000;
        let mut painter = Painter(TABLES[usize::from(self.is_long())].clone());
        let handler = assemble(&self.handler, 0x40);
        painter.bytes(HANDLER, &handler);
        painter.bytes(HANDLER_64, &handler);
        for &(gpa, value) in &self.bends {
            painter.quad(u64::from(gpa).min(CODE - 8), value);
        }
        let code = assemble(&self.code, LONGEST);
        for (gpa, bytes) in [(0, &painter.0), (self.code_start(), &code)] {
            memory
                .write(gpa, bytes)
                .expect("the scenery lies in memory");
        }
    }

    /// Makes it one that the translator translates: in 64-bit mode, with page tables that the guest does not change.
    /// What a cached translation of a changed table leads to would be the processor's choice.
    #[allow(dead_code)]
    pub fn translate(&mut self) {
        self.mode = Mode::Long;
        self.cr0 |= 1 << 1;
        self.bends.retain(|(gpa, _)| u64::from(*gpa) + 8 <= PML4);
        // CR3, and large pages that lead to the tables.
        self.bends.push((PDPT as u16 + 8, 0));
        for page in PML4 >> 12..CODE >> 12 {
            let entry = page << 12 | pte::P | pte::U;
            self.bends.push(((PAGE_TABLE + page * 8) as u16, entry));
        }
    }

    /// The boot processor as it starts.
    pub fn state(&self, profile: &CpuProfile) -> CpuState {
        let mut state = CpuState {
            gpr: self.registers.map(Value::get),
            ..CpuState::default()
        };
        state.gpr[gpr::RSP] = match self.mode {
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 0xf000,
            _ => STACK + (state.gpr[gpr::RSP] & 0xff),
        };
        let vm = if self.mode == Mode::Virtual8086 {
            rflags::VM
        } else {
            0
        };
        let free = rflags::DEFINED & !rflags::VM;
        state.rflags = u64::from(self.rflags) & free | rflags::ONE | vm;
        state.rip = match self.mode {
            Mode::Protected32 | Mode::Compatibility | Mode::Long => self.code_start(),
            _ => self.code_start() - CODE,
        };
        self.set_control_registers(&mut state, profile);
        self.set_segments(&mut state);
        let system = &mut state.system;
        system.gdtr = TableRegister {
            base: GDT,
            limit: 0xff,
        };
        let (base, limit) = match self.mode {
            Mode::Real => (0, 0x3ff),
            _ if self.is_long() => (IDT_64, 0xfff),
            _ => (IDT, 0x7ff),
        };
        system.idtr = TableRegister { base, limit };
        system.star = u64::from(USER_DATA_32 - 8) << 48 | u64::from(CODE_64) << 32;
        system.lstar = HANDLER_64;
        system.cstar = HANDLER_64;
        system.sfmask = rflags::IF | rflags::TF;
        system.sysenter_cs = CODE_64.into();
        system.sysenter_esp = STACK;
        system.sysenter_eip = if self.is_long() { HANDLER_64 } else { HANDLER };
        system.shadow = match self.shadow {
            1 => InterruptShadow::Sti,
            2 => InterruptShadow::MovSs,
            _ => InterruptShadow::None,
        };
        if let Some((which, control)) = self.breakpoints {
            let addresses = [self.code_start(), self.code_start() + 2, DATA, STACK];
            system.dr.copy_from_slice(&addresses);
            system.dr.rotate_left(usize::from(which & 3));
            system.dr7 = u64::from(control) & 0xffff_23ff | dr::DR7_ONE;
        }
        state
    }

    fn set_control_registers(&self, state: &mut CpuState, profile: &CpuProfile) {
        let system = &mut state.system;
        let bit = |number: u8, bit: u64| if self.cr0 & 1 << number != 0 { bit } else { 0 };
        // Inverted where a bit makes most instructions fail.
        system.cr0 = cr0::ET
            | bit(0, cr0::MP)
            | bit(1, cr0::WP)
            | bit(2, cr0::AM)
            | bit(3, cr0::NE)
            | if self.cr0 & 0xf0 == 0x10 { cr0::TS } else { 0 }
            | if self.cr0 & 0xf0 == 0x20 { cr0::EM } else { 0 };
        if self.is_protected() {
            system.cr0 |= cr0::PE;
        }
        let free = profile.cr4_mask() & !(cr4::PAE | cr4::PCIDE | cr4::OSFXSR);
        system.cr4 = u64::from(self.cr4) & free;
        if self.cr4 & 1 == 0 {
            system.cr4 |= cr4::OSFXSR;
        }
        system.xcr0 = xcr0::X87 | u64::from(self.cr4 >> 30) << 1 & profile.xcr0_mask();
        if system.xcr0 & xcr0::SSE == 0 {
            system.xcr0 &= !xcr0::AVX;
        }
        let execute = if self.no_execute { efer::NXE } else { 0 };
        system.efer = efer::SCE | execute;
        if self.is_long() {
            system.cr0 |= cr0::PG;
            system.cr3 = PML4;
            system.cr4 |= cr4::PAE | u64::from(self.cr4) & cr4::PCIDE;
            system.efer |= efer::LME | efer::LMA;
        } else if self.is_protected() {
            match self.paging {
                Paging::None => {}
                Paging::Bits32 => {
                    system.cr0 |= cr0::PG;
                    system.cr3 = DIRECTORY_32;
                }
                Paging::Pae => {
                    system.cr0 |= cr0::PG;
                    system.cr3 = PDPT_PAE;
                    system.cr4 |= cr4::PAE;
                    system.pdptes = [PAGE_DIRECTORY | pte::P, 0, 0, 0];
                }
            }
        }
    }

    fn set_segments(&self, state: &mut CpuState) {
        let system = &mut state.system;
        let real_code = Segment::real((CODE >> 4) as u16, true);
        let real_data = Segment::real((DATA >> 4) as u16, false);
        if self.mode == Mode::Real {
            system.segments = [real_data; 6];
            system.segments[sreg::CS] = real_code;
            return;
        }
        let user = self.ring() == 3;
        let load = |base: u64, limit: u64, access: u64, selector: u16| {
            Descriptor(descriptor(base, limit, access)).segment(selector)
        };
        let flat = |access: u64, selector: u16| load(0, 0xf_ffff, access, selector);
        system.tr = if self.is_long() {
            load(TSS_64, TSS_LIMIT, 0x8b, TASK_64)
        } else {
            load(TSS, TSS_LIMIT, 0x8b, TASK)
        };
        system.ldtr = load(LDT, 0xff, 0x82, LOCAL_TABLE);
        if self.mode == Mode::Virtual8086 {
            // As IRET makes them (SDM vol. 3A, 21.2.1).
            system.segments = [Segment {
                access: 0xf3,
                ..real_data
            }; 6];
            system.segments[sreg::CS] = Segment {
                access: 0xf3,
                ..real_code
            };
            return;
        }
        let code = match (self.mode, user) {
            (Mode::Long, false) => flat(0xa09b, CODE_64),
            (Mode::Long, true) => flat(0xa0fb, USER_CODE_64),
            (Mode::Protected16, false) => load(CODE, 0xffff, 0x9b, CODE_16),
            (Mode::Protected16, true) => load(CODE, 0xffff, 0xfb, USER_CODE_16),
            (_, false) => flat(0xc09b, CODE_32),
            (_, true) => flat(0xc0fb, USER_CODE_32),
        };
        let data = match (self.mode, user) {
            (Mode::Protected16, false) => load(0, 0xffff, 0x93, DATA_16),
            (Mode::Protected16, true) => load(0, 0xffff, 0xf3, USER_DATA_16),
            (_, false) => flat(0xc093, DATA_32),
            (_, true) => flat(0xc0f3, USER_DATA_32),
        };
        system.segments = [data; 6];
        system.segments[sreg::CS] = code;
        system.segments[sreg::GS].base = DATA;
        system.kernel_gs_base = DATA + 0x1000;
    }
}
