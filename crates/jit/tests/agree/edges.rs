//! Accesses where memory begins and ends: each byte goes to the guest's memory, or to the world, and nowhere else.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use trapgate_engine::{Exit, NoDevices, Refused, Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::{GuestMemory, pc_ram_ranges};
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{gpr, sreg};
use trapgate_x86::{CpuProfile, CpuState, Segment};

use crate::guest::{Random, state};

const GIB: u64 = 1 << 30;
/// 3 GiB below the hole for devices, the others above.
const MEMORY: u64 = 5 * GIB;
/// Where memory ends, begins again, and ends.
const EDGES: [u64; 3] = [3 * GIB, 4 * GIB, 6 * GIB];
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
/// Bytes on both sides of an edge that are compared.
const AROUND: u64 = 3 * 4096;

/// What is where there is no memory.
fn outside(gpa: u64) -> u8 {
    (gpa as u8).wrapping_mul(3) ^ 0x5a
}

/// What memory holds at first.
fn inside(gpa: u64) -> u8 {
    (gpa as u8).wrapping_mul(7) ^ 0x11
}

/// What was written where there is no memory.
type Written = Arc<Mutex<BTreeMap<u64, u8>>>;

/// A world that is told of accesses outside of memory.
struct Outside(Written);

impl World for Outside {
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]) {
        let written = self.0.lock().unwrap();
        for (at, byte) in (gpa..).zip(data) {
            *byte = written.get(&at).copied().unwrap_or(outside(at));
        }
    }
    fn write_memory(&mut self, gpa: u64, data: &[u8]) {
        self.0
            .lock()
            .unwrap()
            .extend((gpa..).zip(data.iter().copied()));
    }
    fn read_port(&mut self, port: u16, size: u8) -> u32 {
        NoDevices.read_port(port, size)
    }
    fn write_port(&mut self, _: u16, _: u8, _: u32) {}
    fn take_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn read_apic_msr(&mut self, _: u32) -> Result<u64, Refused> {
        Err(Refused)
    }
    fn write_apic_msr(&mut self, _: u32, _: u64) -> Result<(), Refused> {
        Err(Refused)
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8) {}
    fn clock(&mut self) -> u64 {
        0
    }
    fn epoch(&mut self) -> u64 {
        0
    }
    fn set_tsc_offset(&mut self, _: u64) {}
}

fn is_memory(gpa: u64) -> bool {
    gpa < 3 * GIB || (4 * GIB..6 * GIB).contains(&gpa)
}

/// An access of `[RDI]`: its code, how many bytes it reads, and what it writes given what it read. Registers hold
/// [`NUMBER`] in every byte.
struct Case {
    name: &'static str,
    code: &'static [u8],
    read: usize,
    writes: fn(&[u8]) -> Vec<u8>,
}

const NUMBER: u8 = 0x77;

const CASES: &[Case] = &[
    Case {
        name: "mov al, [rdi]",
        code: &[0x8a, 0x07],
        read: 1,
        writes: |_| vec![],
    },
    Case {
        name: "mov ax, [rdi]",
        code: &[0x66, 0x8b, 0x07],
        read: 2,
        writes: |_| vec![],
    },
    Case {
        name: "mov eax, [rdi]",
        code: &[0x8b, 0x07],
        read: 4,
        writes: |_| vec![],
    },
    Case {
        name: "mov rax, [rdi]",
        code: &[0x48, 0x8b, 0x07],
        read: 8,
        writes: |_| vec![],
    },
    Case {
        name: "movdqu xmm0, [rdi]",
        code: &[0xf3, 0x0f, 0x6f, 0x07],
        read: 16,
        writes: |_| vec![],
    },
    Case {
        name: "vmovdqu ymm0, [rdi]",
        code: &[0xc5, 0xfe, 0x6f, 0x07],
        read: 32,
        writes: |_| vec![],
    },
    Case {
        name: "mov [rdi], al",
        code: &[0x88, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 1],
    },
    Case {
        name: "mov [rdi], ax",
        code: &[0x66, 0x89, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 2],
    },
    Case {
        name: "mov [rdi], eax",
        code: &[0x89, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 4],
    },
    Case {
        name: "mov [rdi], rax",
        code: &[0x48, 0x89, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 8],
    },
    Case {
        name: "movdqu [rdi], xmm0",
        code: &[0xf3, 0x0f, 0x7f, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 16],
    },
    Case {
        name: "vmovdqu [rdi], ymm0",
        code: &[0xc5, 0xfe, 0x7f, 0x07],
        read: 0,
        writes: |_| vec![NUMBER; 32],
    },
    Case {
        name: "xor [rdi], rax",
        code: &[0x48, 0x31, 0x07],
        read: 0,
        writes: |old| old.iter().map(|byte| byte ^ NUMBER).take(8).collect(),
    },
    Case {
        name: "lock xor [rdi], eax",
        code: &[0xf0, 0x31, 0x07],
        read: 0,
        writes: |old| old.iter().map(|byte| byte ^ NUMBER).take(4).collect(),
    },
    Case {
        name: "xchg [rdi], rdx",
        code: &[0x48, 0x87, 0x17],
        read: 0,
        writes: |_| vec![NUMBER; 8],
    },
    Case {
        name: "rep stosb of 119",
        code: &[0x0f, 0xb6, 0xc9, 0xf3, 0xaa],
        read: 0,
        writes: |_| vec![NUMBER; NUMBER as usize],
    },
    Case {
        name: "rep stosq of 7",
        code: &[0x83, 0xe1, 0x07, 0xf3, 0x48, 0xab],
        read: 0,
        writes: |_| vec![NUMBER; 56],
    },
    Case {
        name: "stosd",
        code: &[0xab],
        read: 0,
        writes: |_| vec![NUMBER; 4],
    },
    Case {
        name: "push by rsp",
        code: &[0x48, 0x8d, 0x67, 0x08, 0x50],
        read: 0,
        writes: |_| vec![NUMBER; 8],
    },
    Case {
        name: "cmpxchg16b, unlike",
        code: &[0x48, 0x83, 0xe7, 0xf0, 0x48, 0x0f, 0xc7, 0x0f],
        read: 0,
        writes: |_| vec![],
    },
];

/// How an access is made, which decides where the translator finds its translation: in the table, or in a slot.
struct Form {
    name: &'static str,
    /// The code of a case, unless it has none in this form.
    code: fn(&Case) -> Option<Vec<u8>>,
    /// In compatibility mode at CPL 3, where HLT ends it by an exception.
    compatibility: bool,
    /// How far from the edge.
    distances: &'static [i64],
}

/// Where accesses of 1 to 32 bytes cross the edge, or just don't.
const NEAR: &[i64] = &[
    -33, -32, -31, -17, -16, -15, -9, -8, -7, -4, -3, -2, -1, 0, 1,
];

/// Each reads a byte of the page before first, by the same register: so the slot is that page's, and a check that lets one byte
/// too many pass finds it there.
const FORMS: &[Form] = &[
    Form {
        name: "in a loop",
        // mov ecx, 3; again: mov bl, [rdi - 0x200]; …; dec ecx; jnz again
        code: |case| Some(in_loop(plain(case)?)),
        compatibility: false,
        distances: NEAR,
    },
    Form {
        name: "by RSP",
        // mov rsp, rdi; mov bl, [rsp - 0x200]; … [rsp]
        code: |case| {
            let (_, before) = plain(case)?.split_last()?;
            let mut code = vec![0x48, 0x89, 0xfc, 0x8a, 0x9c, 0x24, 0, 0xfe, 0xff, 0xff];
            code.extend_from_slice(before);
            code.extend_from_slice(&[0x04, 0x24]);
            Some(code)
        },
        compatibility: false,
        distances: NEAR,
    },
    Form {
        name: "by FS",
        // sub rdi, FS's base; mov bl, fs:[rdi - 0x200]; … fs:[rdi]
        code: |case| {
            let base = start(0).system.segments[sreg::FS].base as u32;
            let mut code = vec![0x48, 0x81, 0xef];
            code.extend_from_slice(&base.to_le_bytes());
            code.extend_from_slice(&[0x64, 0x8a, 0x9f, 0, 0xfe, 0xff, 0xff, 0x64]);
            code.extend_from_slice(plain(case)?);
            Some(code)
        },
        compatibility: false,
        distances: NEAR,
    },
    Form {
        name: "in compatibility mode",
        code: |case| (!case.code.contains(&0x48)).then(|| case.code.to_vec()),
        compatibility: true,
        distances: NEAR,
    },
    Form {
        name: "in a loop in compatibility mode",
        code: |case| {
            let access = plain(case).filter(|access| !access.contains(&0x48))?;
            Some(in_loop(access))
        },
        compatibility: true,
        distances: NEAR,
    },
];

/// An access three times, which leaves what once does.
fn in_loop(access: &[u8]) -> Vec<u8> {
    let mut code = vec![0xb9, 3, 0, 0, 0, 0x8a, 0x9f, 0, 0xfe, 0xff, 0xff];
    code.extend_from_slice(access);
    code.extend_from_slice(&[0xff, 0xc9, 0x75]);
    code.push((access.len() as u8 + 10).wrapping_neg());
    code
}

/// The code of a case that is one instruction with `[rdi]` and may be repeated.
fn plain(case: &Case) -> Option<&'static [u8]> {
    (case.code.last() == Some(&0x07)).then_some(case.code)
}

/// A guest whose linear addresses are guest-physical ones.
fn guest() -> (Arc<GuestMemory>, Written) {
    let memory = Arc::new(GuestMemory::new(&pc_ram_ranges(MEMORY)).unwrap());
    let put = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes()).unwrap();
    put(TABLES, (TABLES + 0x1000) | 7);
    for page in 0..8 {
        put(TABLES + 0x1000 + page * 8, (page * GIB) | 0x87);
    }
    for edge in EDGES {
        for gpa in (edge - AROUND..edge + AROUND).filter(|&gpa| is_memory(gpa)) {
            memory.write(gpa, &[inside(gpa)]).unwrap();
        }
    }
    (memory, Written::default())
}

fn start(rdi: u64) -> CpuState {
    let mut state = state(&mut Random(1));
    state.system.cr3 = TABLES;
    state.gpr = [u64::from(NUMBER) * 0x0101_0101_0101_0101; 16];
    state.gpr[gpr::RDI] = rdi;
    state.rip = CODE;
    state.xsave.0[160..416].fill(NUMBER);
    // The upper halves of vector registers.
    state.xsave.0[576..832].fill(NUMBER);
    state
}

fn check(name: &str, vcpu: &mut dyn Vcpu, memory: &GuestMemory, written: &Written) {
    let all: Vec<i64> = (-70..4).collect();
    for case in CASES {
        let name = format!("{} on the {name}", case.name);
        let run = Run {
            name: &name,
            case,
            memory,
            written,
            compatibility: false,
        };
        around(vcpu, &run, case.code.to_vec(), &all);
    }
}

fn check_forms(name: &str, vcpu: &mut dyn Vcpu, memory: &GuestMemory, written: &Written) {
    let mut checked = 0;
    for form in FORMS {
        for case in CASES {
            let Some(code) = (form.code)(case) else {
                continue;
            };
            checked += 1;
            let name = format!("{} {} on the {name}", case.name, form.name);
            let run = Run {
                name: &name,
                case,
                memory,
                written,
                compatibility: form.compatibility,
            };
            around(vcpu, &run, code, form.distances);
        }
    }
    assert!(checked > 50, "{checked}");
}

/// A case as it is run.
struct Run<'a> {
    name: &'a str,
    case: &'a Case,
    memory: &'a GuestMemory,
    written: &'a Written,
    compatibility: bool,
}

fn around(vcpu: &mut dyn Vcpu, run: &Run<'_>, mut code: Vec<u8>, distances: &[i64]) {
    code.push(0xf4);
    run.memory.write(CODE, &code).unwrap();
    // In 32 bits the address after 4 GiB is 0.
    let edges = if run.compatibility {
        &EDGES[..1]
    } else {
        &EDGES
    };
    for &edge in edges {
        for &distance in distances {
            // The second time translations are cached, and the code is.
            for _ in 0..2 {
                one(vcpu, run, edge.wrapping_add_signed(distance), edge);
            }
        }
    }
}

fn one(vcpu: &mut dyn Vcpu, run: &Run<'_>, at: u64, edge: u64) {
    let Run {
        name,
        case,
        memory,
        written,
        compatibility,
    } = *run;
    let old: Vec<u8> = (at..at + 128)
        .map(|gpa| {
            if is_memory(gpa) {
                inside(gpa)
            } else {
                outside(gpa)
            }
        })
        .collect();
    let new = (case.writes)(&old);
    let mut begin = start(at);
    let mut end = Exit::Halted;
    if compatibility {
        let data = Segment::flat(0x2b, access::WRITABLE | access::DB | access::DPL);
        begin.system.segments = [data; 6];
        let code = access::CODE | access::READABLE | access::DB | access::DPL;
        begin.system.segments[sreg::CS] = Segment::flat(0x23, code);
        end = Exit::ShutDown;
    }
    vcpu.set_state(&begin).unwrap();
    let exit = vcpu.run();
    assert_eq!(exit, end, "{name} at {at:#x}");
    let state = vcpu.state();
    let found: Vec<u8> = match case.read {
        0 => vec![],
        1..=8 => state.gpr[gpr::RAX].to_le_bytes()[..case.read].to_vec(),
        16 => state.xsave.0[160..176].to_vec(),
        _ => [&state.xsave.0[160..176], &state.xsave.0[576..592]].concat(),
    };
    assert_eq!(found, old[..case.read], "{name} at {at:#x}");

    let mut around = vec![0; (2 * AROUND) as usize];
    let ranges = [(edge - AROUND, edge), (edge, edge + AROUND)];
    for ((from, to), bytes) in ranges.into_iter().zip(around.chunks_mut(AROUND as usize)) {
        if is_memory(from) {
            memory.read(from, bytes).unwrap();
        } else {
            bytes.copy_from_slice(&(from..to).map(outside).collect::<Vec<_>>());
        }
    }
    let mut lost = std::mem::take(&mut *written.lock().unwrap());
    // What a read-modify-write writes back unchanged is no matter.
    lost.retain(|&gpa, byte| {
        let after = new.get(gpa.wrapping_sub(at) as usize);
        after.is_some() || *byte != outside(gpa)
    });
    for (&gpa, &byte) in &lost {
        assert!(!is_memory(gpa), "{name} at {at:#x}: {gpa:#x} is memory");
        around[(gpa - (edge - AROUND)) as usize] = byte;
    }
    let base = edge - AROUND;
    for (gpa, byte) in (base..).zip(&around) {
        let plain = if is_memory(gpa) {
            inside(gpa)
        } else {
            outside(gpa)
        };
        let expected = new
            .get(gpa.wrapping_sub(at) as usize)
            .copied()
            .unwrap_or(plain);
        assert_eq!(*byte, expected, "{name} at {at:#x}: the byte at {gpa:#x}");
    }
    // As it was.
    for gpa in (at..at + new.len() as u64).filter(|&gpa| is_memory(gpa)) {
        memory.write(gpa, &[inside(gpa)]).unwrap();
    }
}

fn profile() -> CpuProfile {
    CpuProfile::new(Level::V3, 1_000_000_000)
}

#[test]
fn interpreter_reaches_memory_and_the_world_and_nothing_else() {
    let (memory, written) = guest();
    let world = Box::new(Outside(Arc::clone(&written)));
    let mut vcpu = Interpreter::new(Arc::clone(&memory), world, profile(), 0, 1);
    check("interpreter", &mut vcpu, &memory, &written);
}

#[test]
fn translator_reaches_memory_and_the_world_and_nothing_else() {
    let (memory, written) = guest();
    let world = Box::new(Outside(Arc::clone(&written)));
    let mut vcpu = Translating::new(Arc::clone(&memory), world, profile(), 0, 1).unwrap();
    check("translator", &mut vcpu, &memory, &written);
}

#[test]
fn lockstep_finds_no_difference_at_the_edges_of_memory() {
    let (memory, written) = guest();
    let world = Box::new(Outside(Arc::clone(&written)));
    let mut vcpu = Lockstep::new(Arc::clone(&memory), world, profile(), 0, 1).unwrap();
    check("lockstep", &mut vcpu, &memory, &written);
}

#[test]
fn every_way_to_a_translation_ends_where_memory_does() {
    let (memory, written) = guest();
    let world = || Box::new(Outside(Arc::clone(&written)));
    let guest = || Arc::clone(&memory);
    let mut interp = Interpreter::new(guest(), world(), profile(), 0, 1);
    check_forms("interpreter", &mut interp, &memory, &written);
    for exact in [false, true] {
        let mut jit = Translating::new(guest(), world(), profile(), 0, 1).unwrap();
        if exact {
            // Some accesses are then ready to be made on a copy.
            jit.be_exact();
        }
        check_forms("translator", &mut jit, &memory, &written);
    }
    let mut lockstep = Lockstep::new(guest(), world(), profile(), 0, 1).unwrap();
    check_forms("lockstep", &mut lockstep, &memory, &written);
}
