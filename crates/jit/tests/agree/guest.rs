//! A guest in 64-bit mode for the tests: memory, page tables, registers, and code to choose from.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use trapgate_engine::{Exit, Vcpu};
use trapgate_memory::{GuestMemory, RamRange};
pub(crate) use trapgate_oracle::random::Random;
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::{cr0, cr4, efer, rflags, sreg};
use trapgate_x86::{CpuState, Segment};

/// Bytes of memory, from address 0.
pub(crate) const MEMORY: u64 = 1 << 20;
/// Where page tables lie.
pub(crate) const TABLES: u64 = 0x1000;
/// Where data lies: page tables are below.
pub(crate) const DATA: u64 = 0x1_0000;
/// Where code lies.
pub(crate) const CODE: u64 = 0x8_0000;

/// Memory of zeros.
pub(crate) fn memory() -> Arc<GuestMemory> {
    let ranges = [RamRange {
        start: 0,
        length: MEMORY,
    }];
    Arc::new(GuestMemory::new(&ranges).expect("a MiB can be reserved"))
}

/// Page tables: the first 16 MiB are mapped to memory by 4 KiB pages, round and round, so that neighbours
/// in linear memory are not always neighbours in memory.
pub(crate) fn fill(memory: &GuestMemory, random: &mut Random) {
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

/// A processor about to run what is at [`CODE`].
pub(crate) fn state(random: &mut Random) -> CpuState {
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
pub(crate) fn instructions() -> Vec<u8> {
    let path = std::env::var("TRAPGATE_TEST_CODE").unwrap_or("/proc/self/exe".to_owned());
    let file = std::fs::read(path).expect("this program can be read");
    let half = file.len() / 4;
    file[half..].to_vec()
}

/// Instructions that neither jump nor answer differently each time, of `code`.
pub(crate) fn sequence(code: &[u8], random: &mut Random) -> (Vec<u8>, Vec<Instruction>) {
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

/// ModRM and displacement of `[rip + …]`, which is `data` in code at `at` where `before` bytes of the instruction come
/// before and `after` follow.
pub(crate) fn relative(register: u8, at: u64, before: u64, after: u64, data: u64) -> [u8; 5] {
    let next = at + before + 5 + after;
    let [a, b, c, d] = (data.wrapping_sub(next) as u32).to_le_bytes();
    [register << 3 | 5, a, b, c, d]
}

/// Where an operand lies: now and then across the end of a page.
pub(crate) fn place(random: &mut Random) -> u64 {
    let page = DATA + (random.below(0x20) << 12);
    match random.below(6) {
        0 => page + 0xff6 + random.below(10),
        _ => page + random.below(0x100) * 8,
    }
}

/// Runs it from a state to its exit.
pub(crate) fn run(vcpu: &mut dyn Vcpu, start: &CpuState) -> (Exit, CpuState) {
    vcpu.set_state(start).expect("the state is sound");
    let exit = vcpu.run();
    (exit, vcpu.state())
}

/// Flags that need not be right at an end unless the translator is exact: those of an exception that nobody handles.
pub(crate) fn unseen(exit: &Exit) -> u64 {
    match exit {
        Exit::ShutDown => rflags::ARITHMETIC,
        _ => 0,
    }
}

/// All of memory.
pub(crate) fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    memory.read(0, &mut bytes).expect("all of it is memory");
    bytes
}

/// A number from the environment, for longer runs.
pub(crate) fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}
