//! That lockstep finds what it is there for: translators with one fault each.

use iced_x86::{Code, Instruction, MemoryOperand, Register};
use trapgate_memory::RamRange;
use trapgate_x86::Segment;
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{cr0, cr4, efer, sreg};

use super::*;

const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
/// Mapped, and no RAM.
const DEVICE: u64 = 0x10_0000;

/// A processor in 64-bit mode at `code`, with RBX = 3, RDI at data, RSI at a device and a stack.
fn lockstep(code: &[u8]) -> Lockstep {
    let memory = Arc::new(
        GuestMemory::new(&[RamRange {
            start: 0,
            length: DEVICE,
        }])
        .unwrap(),
    );
    let put = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes()).unwrap();
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    // A large page.
    put(TABLES + 0x2000, 0x87);
    memory.write(CODE, code).unwrap();
    let mut state = CpuState::default();
    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    system.cr3 = TABLES;
    system.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    system.efer = efer::LME | efer::LMA;
    system.segments = [Segment::flat(0x10, access::WRITABLE | access::DB); 6];
    system.segments[sreg::CS] = Segment::flat(0x08, access::CODE | access::READABLE | access::L);
    state.rip = CODE;
    state.rflags = 2;
    state.gpr[gpr::RBX] = 3;
    state.gpr[gpr::RDI] = DATA;
    state.gpr[gpr::RSI] = DEVICE;
    state.gpr[gpr::RSP] = DATA + 0x8000;
    let profile = CpuProfile::new(Level::V2, 1_000_000_000);
    let mut vcpu = Lockstep::new(memory, Box::new(NoDevices), profile, 0, 1).unwrap();
    vcpu.set_state(&state).unwrap();
    vcpu
}

/// Runs it, and gives what it reports.
fn report(vcpu: &mut Lockstep) -> String {
    let exit = vcpu.run();
    assert!(matches!(exit, RunExit::Failed(_)), "{exit:?}");
    vcpu.explain().unwrap()
}

/// The line after "the instruction at fault".
fn culprit(report: &str) -> &str {
    let (_, rest) = report.split_once("the instruction at fault:\n").unwrap();
    rest.lines().next().unwrap()
}

#[rustfmt::skip]
const LOOP: [u8; 24] = [
    0xb9, 100, 0, 0, 0,       // mov ecx, 100
    // loop:
    0x48, 0x01, 0xd8,         // add rax, rbx
    0x48, 0x89, 0x07,         // mov [rdi], rax
    0x50,                     // push rax
    0x48, 0x8b, 0x16,         // mov rdx, [rsi]: a device
    0x59 - 1,                 // pop rax
    0x83, 0xe9, 0x01,         // sub ecx, 1
    0x75, 0xf0,               // jnz loop
    0x74, 0x00,               // jz on
    0xf4,                     // on: hlt
];

#[test]
fn translator_without_a_fault_agrees_to_the_end() {
    let mut vcpu = lockstep(&LOOP);
    assert_eq!(vcpu.run(), RunExit::Halted);
    let state = vcpu.state();
    assert_eq!(state.gpr[gpr::RAX], 300);
    assert_eq!(state.gpr[gpr::RDX], u64::MAX);
    let compared = vcpu.compared();
    assert!(compared.blocks >= 200, "{compared:?}");
    assert!(compared.instructions >= 600, "{compared:?}");
    // The loads from the device.
    assert!(compared.once >= 100, "{compared:?}");
    assert_eq!(compared.disturbed + compared.again, 0, "{compared:?}");
}

#[test]
fn wrong_arithmetic_is_found_with_its_instruction_and_both_codes() {
    let mut vcpu = lockstep(&LOOP);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Add_rm64_r64 || instruction.code() == Code::Add_r64_rm64 {
            instruction.set_code(Code::Sub_rm64_r64);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("0x8005: 4801d8"), "{report}");
    assert!(culprit(&report).contains("add rax,rbx"), "{report}");
    let values = "rax          0x0000000000000000 0x0000000000000003 0xfffffffffffffffd";
    assert!(report.contains(values), "{report}");
    let (_, code) = report.split_once("guest code:\n").unwrap();
    let (guest, host) = code.split_once("host code:\n").unwrap();
    assert!(guest.contains("add rax,rbx"), "{report}");
    assert!(guest.contains("mov [rdi],rax"), "{report}");
    assert!(host.contains("sub rax,rbx"), "{report}");
}

#[test]
fn wrong_flag_is_found() {
    // cmp rbx, 3; setz al; hlt
    let mut vcpu = lockstep(&[0x48, 0x83, 0xfb, 3, 0x0f, 0x94, 0xc0, 0xf4]);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Cmp_rm64_imm8 {
            instruction.set_immediate8to64(4);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("cmp rbx,"), "{report}");
    assert!(report.contains("rflags"), "{report}");
}

#[test]
fn guest_code_is_named_as_its_level_reads_it() {
    // rep bsf eax, ebx; hlt: TZCNT is of v3.
    let mut vcpu = lockstep(&[0xf3, 0x0f, 0xbc, 0xc3, 0xf4]);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Bsf_r32_rm32 {
            instruction.set_code(Code::Bsr_r32_rm32);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("bsf eax,ebx"), "{report}");
}

#[test]
fn store_of_the_wrong_value_is_found() {
    // nop; mov [rdi], rbx; hlt
    let mut vcpu = lockstep(&[0x90, 0x48, 0x89, 0x1f, 0xf4]);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Mov_rm64_r64 {
            instruction.set_op1_register(Register::RDI);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("mov [rdi],rbx"), "{report}");
    let values = "0x10000      0x0000000000000000 0x0000000000000003 0x0000000000010000";
    assert!(report.contains(values), "{report}");
}

#[test]
fn store_that_should_not_be_is_found() {
    // mov rax, [rdi]; hlt: the translator exchanges, and the memory holds zeros as RAX does.
    let mut vcpu = lockstep(&[0x48, 0x8b, 0x07, 0xf4]);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Mov_r64_rm64 {
            let memory = MemoryOperand::with_base(Register::RDI);
            let (length, ip) = (instruction.len(), instruction.ip());
            *instruction = Instruction::with2(Code::Xchg_rm64_r64, memory, Register::RAX).unwrap();
            instruction.set_len(length);
            instruction.set_ip(ip);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("mov rax,[rdi]"), "{report}");
    assert!(report.contains("writes to 0x10000"), "{report}");
}

#[test]
fn branch_the_wrong_way_is_found() {
    // xor eax, eax; jz +1; hlt; hlt
    let mut vcpu = lockstep(&[0x31, 0xc0, 0x74, 0x01, 0xf4, 0xf4]);
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Je_rel8_64 {
            instruction.set_code(Code::Jne_rel8_64);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("0x8002: 7401"), "{report}");
}

#[test]
fn exception_that_the_translator_does_not_raise_is_found() {
    // mov rcx, [rbp]; hlt: RBP is zero, or else the access would go to what is not mapped.
    let mut vcpu = lockstep(&[0x48, 0x8b, 0x4d, 0x00, 0xf4]);
    let mut state = vcpu.state();
    state.gpr[gpr::RBP] = 1 << 40;
    vcpu.set_state(&state).unwrap();
    vcpu.translate_wrongly(|instruction| {
        if instruction.code() == Code::Mov_r64_rm64 {
            instruction.set_memory_base(Register::RDI);
        }
    });
    let report = report(&mut vcpu);
    assert!(culprit(&report).contains("mov rcx,[rbp]"), "{report}");
    assert!(report.contains("run ended with Exception"), "{report}");
}

#[test]
fn code_that_changes_itself_agrees() {
    #[rustfmt::skip]
    let code = [
        0x48, 0x8d, 0x15, 0x07, 0, 0, 0, // lea rdx, [rip + 7]: the immediate below
        0xb9, 50, 0, 0, 0,               // mov ecx, 50
        // loop:
        0x90,                            // nop
        0xb0, 0,                         // mov al, 0
        0x00, 0xc3,                      // add bl, al
        0xfe, 0x02,                      // inc byte [rdx]
        0xff, 0xc9,                      // dec ecx
        0x75, 0xf5,                      // jnz loop
        0xf4,                            // hlt
    ];
    let mut vcpu = lockstep(&code);
    assert_eq!(vcpu.run(), RunExit::Halted);
    // The sum of 0 to 49, and 3.
    assert_eq!(vcpu.state().gpr[gpr::RBX], (1225 + 3) & 0xff);
}

#[test]
fn reserved_flags_that_are_popped_are_not_pushed_again() {
    #[rustfmt::skip]
    let code = [
        0x68, 0x28, 0, 0, 0, // push 0x28: two reserved bits set, bit 1 clear
        0x9d,                // popfq
        0x9c,                // pushfq
        0x58,                // pop rax
        0xf4,                // hlt
    ];
    let mut vcpu = lockstep(&code);
    assert_eq!(vcpu.run(), RunExit::Halted);
    assert_eq!(vcpu.state().gpr[gpr::RAX], 2);
}

#[test]
fn page_under_two_addresses_is_read_as_it_was_written() {
    let mut vcpu = lockstep(&[
        0x48, 0x8b, 0x03, // mov rax, [rbx]: cached
        0x48, 0x89, 0x3f, // mov [rdi], rdi
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0xf4, // hlt
    ]);
    // The second large page is the first one again.
    let memory = Arc::clone(&vcpu.jit.whole().interp.cpu.memory);
    memory
        .write(TABLES + 0x2008, &0x87u64.to_le_bytes())
        .unwrap();
    let mut state = vcpu.state();
    state.gpr[gpr::RBX] = DATA + (2 << 20);
    vcpu.set_state(&state).unwrap();
    assert_eq!(vcpu.run(), RunExit::Halted);
    assert_eq!(vcpu.state().gpr[gpr::RAX], DATA);
    assert_eq!(vcpu.compared().again, 1);
}
