//! Translator and interpreter run the same code from the same state and must agree in every register and
//! byte of memory.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use trapgate_engine::{Exit, Observe, Refused, Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_jit::Translating;
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr0, cr4, efer, sreg};
use trapgate_x86::{CpuProfile, CpuState, Segment};

/// Bytes of memory, from address 0.
const MEMORY: u64 = 1 << 20;
const TABLES: u64 = 0x1000;
/// Where data lies: page tables are below.
const DATA: u64 = 0x1_0000;
/// Where code lies.
const CODE: u64 = 0x8_0000;

/// A world without devices.
struct Empty;

impl World for Empty {
    fn read_memory(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_memory(&mut self, _: u64, _: &[u8]) {}
    fn read_port(&mut self, _: u16, _: u8) -> u32 {
        u32::MAX
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

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn memory() -> Arc<GuestMemory> {
    let ranges = [RamRange {
        start: 0,
        length: MEMORY,
    }];
    Arc::new(GuestMemory::new(&ranges).expect("a MiB can be reserved"))
}

/// Page tables: the first 16 MiB are mapped to memory by 4 KiB pages, round and round, so that neighbours
/// in linear memory are not always neighbours in memory.
fn fill(memory: &GuestMemory, random: &mut Random) {
    let put = |gpa: u64, value: u64| {
        memory
            .write(gpa, &value.to_le_bytes())
            .expect("the tables lie in memory");
    };
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    put(TABLES + 0x2000, (TABLES + 0x3000) | 7);
    for page in 0..512u64 {
        let address = page << 12;
        let entry = if (DATA..CODE).contains(&address) && random.below(8) == 0 {
            // Somewhere else in the data, or nowhere, or read-only.
            match random.below(4) {
                0 => 0,
                1 => address | 5,
                _ => (DATA + (random.below((CODE - DATA) >> 12) << 12)) | 7,
            }
        } else if address < MEMORY {
            address | 7
        } else {
            0
        };
        put(TABLES + 0x3000 + page * 8, entry);
    }
    let mut bytes = vec![0; (CODE - DATA) as usize];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    memory.write(DATA, &bytes).expect("data lies in memory");
}

fn state(random: &mut Random) -> CpuState {
    let mut state = CpuState::default();
    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    system.cr3 = TABLES;
    system.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::PGE | cr4::OSXSAVE;
    system.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    system.xcr0 = 7;
    let data = Segment::flat(0x10, access::WRITABLE | access::DB);
    system.segments = [data; 6];
    system.segments[sreg::CS] = Segment::flat(0x08, access::CODE | access::READABLE | access::L);
    system.segments[sreg::FS].base = DATA + 0x3000;
    system.segments[sreg::GS].base = DATA + 0x7000;
    // Any exception is a triple fault, after which both must look alike.
    system.idtr.limit = 0;
    for register in &mut state.gpr {
        *register = match random.below(6) {
            0 => random.next(),
            1 => random.below(64),
            2 => random.next() as u32 as u64,
            _ => DATA + 0x1000 + random.below(CODE - DATA - 0x2000),
        };
        if random.below(2) == 0 {
            *register &= !15;
        }
    }
    state.rip = CODE;
    state.rflags = 2 | random.next() & 0x8d5;
    for byte in &mut state.xsave.0[160..416] {
        *byte = random.next() as u8;
    }
    // Some vectors hold reasonable floating-point numbers.
    for register in 0..8 {
        let at = 160 + register * 16;
        let number = random.below(1000) as f64 / 8.0;
        state.xsave.0[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    state.xsave.0[512] = 7;
    state
}

/// Runs of instructions as compilers make them: those of this very program.
fn instructions() -> Vec<u8> {
    let path = std::env::var("TRAPGATE_TEST_CODE").unwrap_or("/proc/self/exe".to_owned());
    let file = std::fs::read(path).expect("this program can be read");
    let half = file.len() / 4;
    file[half..].to_vec()
}

fn sequence(code: &[u8], random: &mut Random) -> (Vec<u8>, Vec<Instruction>) {
    let mut at = random.below(code.len() as u64 - 256) as usize;
    let most = 1 + random.below(14);
    let (mut bytes, mut list) = (Vec::new(), Vec::new());
    let (mut tries, mut undefined) = (0, 0);
    while (list.len() as u64) < most && tries < 40 && at + 16 < code.len() {
        tries += 1;
        let mut decoder = Decoder::with_ip(64, &code[at..at + 16], 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            at += 1;
            continue;
        }
        let length = instruction.len();
        let harmless = instruction.flow_control() == FlowControl::Next
            && !instruction.is_privileged()
            && !matches!(
                instruction.mnemonic(),
                iced_x86::Mnemonic::Rdtsc
                    | iced_x86::Mnemonic::Rdtscp
                    | iced_x86::Mnemonic::Rdrand
                    | iced_x86::Mnemonic::Rdseed
            )
            && !instruction.is_string_instruction();
        // What the manual leaves undefined must not be looked at.
        let reads_undefined = instruction.rflags_read() & undefined != 0
            || (undefined != 0 && instruction.mnemonic() == iced_x86::Mnemonic::Pushfq);
        if harmless && !reads_undefined {
            let defined = instruction.rflags_written()
                | instruction.rflags_cleared()
                | instruction.rflags_set();
            undefined = undefined & !defined | instruction.rflags_undefined();
            bytes.extend_from_slice(&code[at..at + length]);
            let mut here = instruction;
            here.set_ip(CODE + (bytes.len() - length) as u64);
            list.push(here);
        }
        at += length;
    }
    (bytes, list)
}

fn run(vcpu: &mut dyn Vcpu, start: &CpuState) -> (Exit, CpuState) {
    vcpu.set_state(start).expect("the state is sound");
    let exit = vcpu.run();
    (exit, vcpu.state())
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    memory.read(0, &mut bytes).expect("all of it is memory");
    bytes
}

#[test]
fn straight_code_of_compilers_does_the_same_on_both() {
    let code = instructions();
    let seed = std::env::var("TRAPGATE_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(0x1234_5678_9abc_def1);
    let cases: u64 = std::env::var("TRAPGATE_TEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(3000);
    let mut random = Random(seed);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let (left, right) = (memory(), memory());
    let mut interp = Interpreter::new(Arc::clone(&left), Box::new(Empty), profile.clone(), 0, 1);
    let mut jit = Translating::new(Arc::clone(&right), Box::new(Empty), profile, 0, 1)
        .expect("the host can run translated code");
    jit.be_exact();
    let mut halted = 0;
    for case in 0..cases {
        let case_seed = random.next() | 1;
        let mut random = Random(case_seed);
        let mut twin = Random(case_seed);
        fill(&left, &mut random);
        fill(&right, &mut twin);
        let (mut bytes, list) = sequence(&code, &mut random);
        bytes.extend_from_slice(&[0xf4; 16]);
        for memory in [&left, &right] {
            memory.write(CODE, &bytes).expect("code lies in memory");
        }
        let start = state(&mut random);
        let (exit, mut expected) = run(&mut interp, &start);
        let (other_exit, mut found) = run(&mut jit, &start);
        halted += u64::from(exit == Exit::Halted);
        // Flags that the manual leaves undefined are another test's.
        let undefined = list.iter().fold(0, |flags, instruction| {
            flags | instruction.rflags_undefined()
        });
        let undefined = undefined_flags(undefined);
        expected.rflags &= !undefined;
        found.rflags &= !undefined;
        let same = exit == other_exit && expected == found && contents(&left) == contents(&right);
        if !same {
            eprintln!("case {case} seed {case_seed}");
            for instruction in &list {
                let offset = (instruction.ip() - CODE) as usize;
                let bytes = &bytes[offset..offset + instruction.len()];
                eprintln!(
                    "  {:x} {:?} {:02x?}",
                    instruction.ip(),
                    instruction.code(),
                    bytes
                );
            }
            eprintln!("interpreter {exit:?}, translator {other_exit:?}");
            for index in 0..16 {
                eprintln!(
                    "  {index:2} {:016x} {:016x} {:016x}{}",
                    start.gpr[index],
                    expected.gpr[index],
                    found.gpr[index],
                    if expected.gpr[index] == found.gpr[index] {
                        ""
                    } else {
                        " <<"
                    }
                );
            }
            eprintln!("rip {:x} {:x}", expected.rip, found.rip);
            eprintln!(
                "rflags {:x} {:x} from {:x}",
                expected.rflags, found.rflags, start.rflags
            );
            if expected.xsave != found.xsave {
                for at in (0..832).step_by(8) {
                    if expected.xsave.0[at..at + 8] != found.xsave.0[at..at + 8] {
                        eprintln!(
                            "  xsave {at}: {:02x?} {:02x?}",
                            &expected.xsave.0[at..at + 8],
                            &found.xsave.0[at..at + 8]
                        );
                    }
                }
            }
            let (a, b) = (contents(&left), contents(&right));
            for at in (0..a.len()).filter(|&at| a[at] != b[at]).take(16) {
                eprintln!("  memory {at:x}: {:x} {:x}", a[at], b[at]);
            }
            panic!("translator and interpreter differ");
        }
    }
    eprintln!("{halted} of {cases} cases ran to the end");
    assert!(halted > cases / 5, "{halted} of {cases}");
}

fn undefined_flags(decoder: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [
        (B::CF, 1),
        (B::PF, 4),
        (B::AF, 0x10),
        (B::ZF, 0x40),
        (B::SF, 0x80),
        (B::OF, 0x800),
    ]
    .iter()
    .filter(|(bit, _)| decoder & bit != 0)
    .map(|(_, flag)| flag)
    .sum()
}

/// A loop with a jump out of the middle of a unit, and an instruction that is called out for.
#[test]
fn whoever_observes_costs_gets_every_instruction_counted() {
    let code = [
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0xf6, 0xc1, 0x01, // test cl, 1
        0x74, 0x02, // jz over the next
        0xff, 0xc0, // inc eax
        0xff, 0xc9, // dec ecx
        0x75, 0xf5, // jnz to the test
        0x0f, 0xa2, // cpuid
        0xf4, // hlt
    ];
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let observe = Observe {
        costs: true,
        perf_map: false,
    };
    let (left, right) = (memory(), memory());
    for memory in [&left, &right] {
        fill(memory, &mut Random(1));
        memory.write(CODE, &code).expect("code lies in memory");
    }
    let mut interp = Interpreter::new(left, Box::new(Empty), profile.clone(), 0, 1);
    let mut jit = Translating::observed(right, Box::new(Empty), profile, 0, 1, observe)
        .expect("the host can run translated code");
    let start = state(&mut Random(1));

    let ends = [run(&mut interp, &start), run(&mut jit, &start)];

    assert_eq!(ends[0].0, Exit::Halted);
    assert_eq!(ends[0].1.gpr, ends[1].1.gpr);
    assert_eq!(interp.instructions(), 1 + 1000 * 4 + 500 + 2);
    assert_eq!(jit.instructions(), interp.instructions());

    let costs = jit.costs().expect("it knows them").costs();
    let cost = |kind: &str, detail: &str| {
        let found = costs
            .iter()
            .find(|cost| cost.kind == kind && cost.detail == detail);
        found.unwrap_or_else(|| panic!("{kind} {detail} in {costs:?}"))
    };
    assert_eq!(cost("call_out", "cpuid").count, 1);
    assert!(cost("translated_code", "").nanoseconds > Some(0));
    let counters = jit.counters();
    let counter = |name: &str| {
        let found = counters.iter().find(|counter| counter.name() == name);
        found.map(|counter| counter.get())
    };
    assert_eq!(counter("translations"), Some(cost("translation", "").count));
    assert!(counter("direct_exits_linked") > Some(0));
}

#[test]
fn nobody_who_does_not_ask_pays_for_time() {
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let memory = memory();
    fill(&memory, &mut Random(1));
    memory
        .write(CODE, &[0x0f, 0xa2, 0xf4])
        .expect("code lies in memory");
    let mut jit = Translating::new(memory, Box::new(Empty), profile, 0, 1)
        .expect("the host can run translated code");
    run(&mut jit, &state(&mut Random(1)));
    let costs = jit.costs().expect("it knows them").costs();
    assert!(costs.iter().any(|cost| cost.detail == "cpuid"));
    assert!(costs.iter().all(|cost| cost.nanoseconds.is_none()));
}
