//! Calls and returns that are not paired, or between which the code, its page, or the processor's mode changes.
//! The interpreter says what is right.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use trapgate_engine::{Exit, NoDevices, Signal, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::GuestMemory;
use trapgate_x86::descriptor::access;
use trapgate_x86::profile::Level;
use trapgate_x86::registers::{gpr, sreg};
use trapgate_x86::{CpuProfile, CpuState, Segment};

use crate::guest::{CODE, MEMORY, Random, TABLES, contents, memory, run, state, unseen};

/// Where the stack begins.
const STACK: u64 = 0x7_0000;

/// How an engine came to its end: processor and memory.
type End = (Exit, CpuState, Vec<u8>);

/// A piece of a program, at an address.
type Piece = (u64, Vec<u8>);

/// Code with places for rel32: `None` is one, to the address.
fn code(start: u64, parts: &[(&[u8], Option<u64>)]) -> Piece {
    let mut bytes = Vec::new();
    for (raw, target) in parts {
        bytes.extend_from_slice(raw);
        if let Some(target) = target {
            let next = start + bytes.len() as u64 + 4;
            bytes.extend_from_slice(&(target.wrapping_sub(next) as u32).to_le_bytes());
        }
    }
    (start, bytes)
}

/// Writes a program and page tables that map all of memory to itself, and gives the processor that is to run it.
fn write(memory: &GuestMemory, pieces: &[Piece]) -> CpuState {
    let put = |gpa: u64, bytes: &[u8]| memory.write(gpa, bytes).expect("it lies in memory");
    for (level, entry) in [(0, 0x1000), (0x1000, 0x2000), (0x2000, 0x3000)] {
        put(TABLES + level, &((TABLES + entry) | 7).to_le_bytes());
    }
    for page in 0..MEMORY >> 12 {
        put(TABLES + 0x3000 + page * 8, &(page << 12 | 7).to_le_bytes());
    }
    for (start, bytes) in pieces {
        put(*start, bytes);
    }
    let mut start = state(&mut Random(0x51ab_1e5e_ed0f_ca11));
    start.gpr[gpr::RSP] = STACK;
    start
}

/// Runs a program on all engines, and gives the state at its end.
fn agree(pieces: &[Piece], set: impl Fn(&mut CpuState)) -> CpuState {
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let mut ends = Vec::new();
    for engine in 0..4 {
        let memory = memory();
        let mut start = write(&memory, pieces);
        set(&mut start);
        let (guest, profile) = (Arc::clone(&memory), profile.clone());
        let mut vcpu: Box<dyn Vcpu> = match engine {
            0 => Box::new(Interpreter::new(guest, Box::new(NoDevices), profile, 0, 1)),
            1 | 2 => {
                let mut jit = Translating::new(guest, Box::new(NoDevices), profile, 0, 1)
                    .expect("the host can run translated code");
                if engine == 2 {
                    jit.be_exact();
                }
                Box::new(jit)
            }
            _ => Box::new(
                Lockstep::new(guest, Box::new(NoDevices), profile, 0, 1)
                    .expect("the host can run translated code"),
            ),
        };
        let (exit, mut end) = run(&mut *vcpu, &start);
        if engine == 1 {
            let expected = ends.first().map_or(0, |(_, end, _): &End| end.rflags);
            end.rflags ^= (end.rflags ^ expected) & unseen(&exit);
        }
        assert!(
            matches!(exit, Exit::Halted | Exit::ShutDown),
            "{exit:?} on engine {engine}"
        );
        ends.push((exit, end, contents(&memory)));
    }
    let (exit, expected, bytes) = ends.swap_remove(0);
    for (other, end, contents) in ends {
        assert_eq!(exit, other);
        assert_eq!(expected, end);
        assert!(bytes == contents, "memory differs");
    }
    expected
}

#[test]
fn recursion_deeper_than_any_memory_of_it_returns_all_the_way() {
    let f = CODE + 0x100;
    let end = agree(
        &[
            // mov ecx, 20000; call f; hlt
            code(
                CODE,
                &[(&[0xb9, 0x20, 0x4e, 0, 0, 0xe8], Some(f)), (&[0xf4], None)],
            ),
            // dec ecx; jz +5; call f; inc rbx; ret
            code(
                f,
                &[
                    (&[0xff, 0xc9, 0x74, 5, 0xe8], Some(f)),
                    (&[0x48, 0xff, 0xc3, 0xc3], None),
                ],
            ),
        ],
        |start| start.gpr[gpr::RBX] = 0,
    );
    assert_eq!(end.gpr[gpr::RBX], 20_000);
}

#[test]
fn return_goes_where_the_stack_says_and_not_where_it_was_called_from() {
    let f = CODE + 0x100;
    let end = agree(
        &[
            // mov ecx, 3000; call f; hlt; inc rbx; dec ecx; jnz to the call; hlt
            code(
                CODE,
                &[
                    (&[0xb9, 0xb8, 0x0b, 0, 0, 0xe8], Some(f)),
                    (
                        &[0xf4, 0x48, 0xff, 0xc3, 0xff, 0xc9, 0x75, 0xf3, 0xf4],
                        None,
                    ),
                ],
            ),
            // add qword [rsp], 1; ret
            code(f, &[(&[0x48, 0x83, 0x04, 0x24, 1, 0xc3], None)]),
        ],
        |start| start.gpr[gpr::RBX] = 0,
    );
    assert_eq!(end.gpr[gpr::RBX], 3000);
}

#[test]
fn calls_that_never_return_do_not_pile_up() {
    let f = CODE + 0x100;
    let end = agree(
        &[
            // mov ecx, 30000; mov rbx, rsp; call f; hlt
            code(
                CODE,
                &[
                    (&[0xb9, 0x30, 0x75, 0, 0, 0x48, 0x89, 0xe3, 0xe8], Some(f)),
                    (&[0xf4], None),
                ],
            ),
            // mov rsp, rbx; dec ecx; jnz to the call; hlt
            code(
                f,
                &[
                    (&[0x48, 0x89, 0xdc, 0xff, 0xc9, 0x0f, 0x85], Some(CODE + 8)),
                    (&[0xf4], None),
                ],
            ),
        ],
        |_| {},
    );
    assert_eq!(end.gpr[gpr::RCX], 0);
}

#[test]
fn code_after_a_call_may_change_until_the_return() {
    let f = CODE + 0x100;
    let end = agree(
        &[
            // mov ecx, 300; xor eax, eax; call f; add eax, 0x11111111; dec ecx; jnz to the call; hlt
            code(
                CODE,
                &[
                    (&[0xb9, 0x2c, 1, 0, 0, 0x31, 0xc0, 0xe8], Some(f)),
                    (
                        &[0x05, 0x11, 0x11, 0x11, 0x11, 0xff, 0xc9, 0x75, 0xf2, 0xf4],
                        None,
                    ),
                ],
            ),
            // mov [the immediate], ecx; ret
            code(f, &[(&[0x89, 0x0d], Some(CODE + 13)), (&[0xc3], None)]),
        ],
        |_| {},
    );
    assert_eq!(end.gpr[gpr::RAX], 300 * 301 / 2);
}

#[test]
fn page_of_the_caller_may_be_another_by_the_time_of_the_return() {
    let (f, caller, other) = (CODE, CODE + 0x1000, CODE + 0x2000);
    // nop; call f; add eax, …; dec ecx; jnz to the call; hlt
    let page = |start: u64, add: u8| {
        let (_, bytes) = code(
            caller,
            &[
                (&[0x90, 0xe8], Some(f)),
                (&[0x83, 0xc0, add, 0xff, 0xc9, 0x75, 0xf4, 0xf4], None),
            ],
        );
        (start, bytes)
    };
    let mut swap = vec![0x48, 0x81, 0x34, 0x25];
    let entry = (TABLES + 0x3000 + (caller >> 12) * 8) as u32;
    swap.extend_from_slice(&entry.to_le_bytes());
    swap.extend_from_slice(&((caller ^ other) as u32).to_le_bytes());
    swap.extend_from_slice(&[0x0f, 0x01, 0x3c, 0x25]);
    swap.extend_from_slice(&(caller as u32).to_le_bytes());
    swap.push(0xc3);
    let end = agree(
        &[
            // xor qword [entry], …; invlpg [caller]; ret
            (f, swap),
            page(caller, 1),
            page(other, 100),
        ],
        |start| {
            start.rip = caller;
            start.gpr[gpr::RAX] = 0;
            start.gpr[gpr::RCX] = 201;
        },
    );
    assert_eq!(end.gpr[gpr::RAX], 101 * 100 + 100);
}

#[test]
fn return_in_another_mode_does_not_run_code_of_the_caller_s() {
    let f = CODE + 0x100;
    let end = agree(
        &[
            // mov ecx, 2; call f; addps xmm0, xmm0; dec ecx; jnz to the call; hlt
            code(
                CODE,
                &[
                    (&[0xb9, 2, 0, 0, 0, 0xe8], Some(f)),
                    (&[0x0f, 0x58, 0xc0, 0xff, 0xc9, 0x75, 0xf4, 0xf4], None),
                ],
            ),
            // cmp ecx, 1; jne to the end; mov rax, cr0; or eax, 8; mov cr0, rax; ret
            code(
                f,
                &[(
                    &[
                        0x83, 0xf9, 1, 0x75, 9, 0x0f, 0x20, 0xc0, 0x83, 0xc8, 8, 0x0f, 0x22, 0xc0,
                        0xc3,
                    ],
                    None,
                )],
            ),
        ],
        |_| {},
    );
    assert_eq!(end.rip, CODE + 10, "ADDPS faults when CR0.TS is set");
}

/// CALL to the next instruction, as code does that wants to know where it is, and RET to it, on a stack across the end of
/// a page, which the interpreter sees to.
#[test]
fn calls_and_returns_to_the_next_instruction_go_there() {
    for pad in [0, 1] {
        let mut start = vec![0x90; pad];
        // mov ecx, 100
        start.extend_from_slice(&[0xb9, 100, 0, 0, 0]);
        let head = start.len() as u64;
        // call the next; pop rax
        start.extend_from_slice(&[0xe8, 0, 0, 0, 0, 0x58]);
        // lea rdx, [the next but one]; call rdx; pop rbx
        start.extend_from_slice(&[0x48, 0x8d, 0x15, 2, 0, 0, 0, 0xff, 0xd2, 0x5b]);
        // lea rdx, [the next but two]; push rdx; ret; inc rsi
        start.extend_from_slice(&[0x48, 0x8d, 0x15, 2, 0, 0, 0, 0x52, 0xc3, 0x48, 0xff, 0xc6]);
        let end = agree(
            &[code(
                CODE,
                &[
                    (&start, None),
                    // dec ecx; jnz
                    (&[0xff, 0xc9, 0x0f, 0x85], Some(CODE + head)),
                    (&[0xf4], None),
                ],
            )],
            |start| {
                start.gpr[gpr::RSP] = STACK + 4;
                start.gpr[gpr::RSI] = 0;
            },
        );
        assert_eq!(end.gpr[gpr::RSI], 100);
        assert_eq!(end.gpr[gpr::RAX], CODE + head + 5);
        assert_eq!(end.gpr[gpr::RSP], STACK + 4);
    }
}

/// CALL to an address that is not canonical faults before it pushes anything.
#[test]
fn call_to_nowhere_pushes_nothing() {
    let end = agree(
        &[
            // mov rax, 1 << 60; call rax
            code(
                CODE,
                &[(&[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x10, 0xff, 0xd0], None)],
            ),
            // What would be overwritten.
            (STACK - 8, vec![0x5a; 8]),
        ],
        |_| {},
    );
    assert_eq!((end.rip, end.gpr[gpr::RSP]), (CODE + 10, STACK));
}

/// Flags are handed to a function, and it hands others back.
#[test]
fn flags_pass_through_calls_and_returns() {
    let f = CODE + 0x100;
    let mut take = vec![0x48, 0x8d, 0x15];
    take.extend_from_slice(&((f - (CODE + 14)) as u32).to_le_bytes());
    // setc bl; or mov bl, al; nop, after which nobody needs what the function gives
    let ends = [[0x0f, 0x92, 0xc3], [0x88, 0xc3, 0x90]].map(|take_back| {
        agree(
            &[
                // mov ecx, 40000; nop; nop; lea rdx, [f]; add eax, eax; call rdx; …; add esi, ebx; dec ecx; jnz; hlt
                code(
                    CODE,
                    &[
                        (&[0xb9, 0x40, 0x9c, 0, 0, 0x90, 0x90], None),
                        (&take, None),
                        (&[0x01, 0xc0, 0xff, 0xd2], None),
                        (&take_back, None),
                        (&[0x01, 0xde, 0xff, 0xc9, 0x0f, 0x85], Some(CODE + 7)),
                        (&[0xf4], None),
                    ],
                ),
                // adc eax, 1; rol edi, 1; ret
                code(f, &[(&[0x83, 0xd0, 1, 0xd1, 0xc7, 0xc3], None)]),
            ],
            |start| {
                start.gpr[gpr::RAX] = 0x1357_9bdf;
                start.gpr[gpr::RDI] = 0xf0f0_5a5a;
                start.gpr[gpr::RBX] = 0;
                start.gpr[gpr::RSI] = 0;
            },
        )
    });
    assert_eq!(
        ends[0].gpr[gpr::RSI],
        40_000 / 2,
        "half of RDI's bits are set"
    );
}

/// What may overwrite the flags and may leave them is not taken to overwrite them, behind a jump where it is looked for.
#[test]
fn flags_that_an_instruction_leaves_alone_are_still_there() {
    let instructions: [&[u8]; 11] = [
        &[0xf3, 0xa6],                   // repe cmpsb
        &[0xf2, 0xa7],                   // repne cmpsd
        &[0xf2, 0xae],                   // repne scasb
        &[0xf3, 0x48, 0xaf],             // repe scasq
        &[0xd3, 0xe0],                   // shl eax, cl
        &[0x48, 0xd3, 0xf8],             // sar rax, cl
        &[0xd3, 0xd0],                   // rcl eax, cl
        &[0x0f, 0xa5, 0xd8],             // shld eax, ebx, cl
        &[0xc1, 0xe0, 0x20],             // shl eax, 32
        &[0x48, 0x0f, 0xac, 0xd8, 0x40], // shrd rax, rbx, 64
        &[0x0f, 0x20, 0xd8],             // mov rax, cr3
    ];
    for instruction in instructions {
        let mut parts = instruction.to_vec();
        // seto bl; sete dl; pushfq; pop rbp; hlt
        parts.extend_from_slice(&[0x0f, 0x90, 0xc3, 0x0f, 0x94, 0xc2, 0x9c, 0x5d, 0xf4]);
        // cmp al, al; jmp
        let first: &[u8] = &[0x38, 0xc0, 0xe9];
        let end = agree(
            &[
                code(CODE, &[(first, Some(CODE + 0x80))]),
                (CODE + 0x80, parts),
            ],
            |start| {
                start.gpr[gpr::RCX] = 0;
                start.gpr[gpr::RSI] = 0x6_0000;
                start.gpr[gpr::RDI] = 0x6_0000;
                start.rflags = 2;
            },
        );
        assert_eq!(end.gpr[gpr::RDX] as u8, 1, "{instruction:x?}");
        assert_eq!(end.gpr[gpr::RBP], 0x46, "{instruction:x?}");
    }
}

/// The kernel returns to where a program made a call, and reads there what programs may not; then the program tries.
#[test]
fn return_at_another_level_does_not_run_code_of_the_caller_s() {
    let (kernel, f, back, secret) = (CODE + 0x200, CODE + 0x100, CODE + 6, 0x6_0000u64);
    // The kernel's half of the address space shows the same memory.
    let upper = 511 << 39 | 0xffff << 48;
    let mut entry = vec![0x68];
    entry.extend_from_slice(&(back as u32).to_le_bytes());
    entry.push(0xc3);
    // mov rax, [secret]; dec edx; jz to the end; lea rcx, [start]; mov r11d, 2; sysret
    let mut after = vec![0x48, 0x8b, 0x04, 0x25];
    after.extend_from_slice(&(secret as u32).to_le_bytes());
    after.extend_from_slice(&[0xff, 0xca, 0x74, 16, 0x48, 0x8d, 0x0d]);
    let end = agree(
        &[
            (
                TABLES + 511 * 8,
                ((TABLES + 0x1000) | 7).to_le_bytes().to_vec(),
            ),
            (
                TABLES + 0x3000 + (secret >> 12) * 8,
                (secret | 3).to_le_bytes().to_vec(),
            ),
            // nop; call f; …
            code(
                CODE,
                &[
                    (&[0x90, 0xe8], Some(f)),
                    (&after, Some(CODE)),
                    (&[0x41, 0xbb, 2, 0, 0, 0, 0x48, 0x0f, 0x07], None),
                    // The end: lea rcx, [secret's reader]; mov r11d, 2; sysret
                    (&[0x48, 0x8d, 0x0d], Some(CODE + 0x300)),
                    (&[0x41, 0xbb, 2, 0, 0, 0, 0x48, 0x0f, 0x07], None),
                ],
            ),
            // syscall
            code(f, &[(&[0x0f, 0x05], None)]),
            // push back; ret
            (kernel, entry),
            // jmp back: as a program.
            code(CODE + 0x300, &[(&[0xe9], Some(back))]),
        ],
        |start| {
            start.gpr[gpr::RDX] = 500;
            start.system.lstar = upper | kernel;
            start.system.star = 0x10 << 48 | 0x08 << 32;
            let level = access::DPL;
            let data = Segment::flat(0x1b, access::WRITABLE | access::DB | level);
            start.system.segments = [data; 6];
            start.system.segments[sreg::CS] =
                Segment::flat(0x23, access::CODE | access::READABLE | access::L | level);
        },
    );
    assert_eq!((end.gpr[gpr::RDX], end.rip), (0, back));
}

/// A function that calls itself twice, 60 deep: what takes longer than the world will last is interrupted.
#[test]
fn calls_notice_a_signal() {
    let memory = memory();
    let f = CODE + 0x100;
    let pieces = [
        // mov ecx, 60; call f; hlt
        code(
            CODE,
            &[(&[0xb9, 60, 0, 0, 0, 0xe8], Some(f)), (&[0xf4], None)],
        ),
        // dec ecx; jz to the end; nop; call f; nop; call f; inc ecx; ret
        code(
            f,
            &[
                (&[0xff, 0xc9, 0x74, 12, 0x90, 0xe8], Some(f)),
                (&[0x90, 0xe8], Some(f)),
                (&[0xff, 0xc1, 0xc3], None),
            ],
        ),
    ];
    let start = write(&memory, &pieces);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let mut vcpu = Translating::new(memory, Box::new(NoDevices), profile, 0, 1)
        .expect("the host can run translated code");
    vcpu.be_exact();
    let signals = vcpu.signals();
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(run(&mut vcpu, &start).0));
    std::thread::sleep(Duration::from_millis(100));
    signals.raise(Signal::Kick);
    let exit = wait.recv_timeout(Duration::from_secs(60));
    assert_eq!(exit, Ok(Exit::Kicked));
}
