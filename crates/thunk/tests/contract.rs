//! What the interpreter relies on: descriptions of operands, refusals, pending exceptions, and that
//! nothing a guest does reaches the host.
#![allow(unsafe_code)]

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use trapgate_thunk::{
    Access, Class, ElementMask, EnvironmentFormat, FxsaveImage, MemoryOperand, Outcome,
    RegisterFile, Thunk, ThunkCache, ThunkError, Unsupported, Vector, X87Pointers, x87_opcode,
};

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::new(bitness, bytes, DecoderOptions::NONE).decode()
}

fn thunk(bytes: &[u8]) -> Thunk {
    ThunkCache::new()
        .thunk(&decode(64, bytes))
        .expect("a supported instruction")
}

fn refusal(bitness: u32, bytes: &[u8]) -> Unsupported {
    match ThunkCache::new().thunk(&decode(bitness, bytes)) {
        Err(ThunkError::Unsupported { reason, .. }) => reason,
        other => panic!("{bytes:02x?}: {other:?}"),
    }
}

#[repr(C, align(64))]
struct Operand([u8; 128]);

/// x87 registers with this value in ST0, nothing else.
fn with_st0(value: [u8; 10]) -> RegisterFile {
    let mut registers = RegisterFile::new();
    registers.x87.set_status_word(7 << 11);
    registers.x87.0[4] = 0x80;
    registers.x87.set_stack_register(0, value);
    registers
}

const ONE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];

#[test]
fn memory_operands_are_described() {
    let plain = |size, access, alignment| MemoryOperand {
        size,
        access,
        alignment,
        checked_alignment: match size {
            2 | 4 | 8 => size,
            10 => 8,
            _ => 1,
        },
        locked: false,
        bit_offset: false,
        mask: None,
    };
    let locked = |operand| MemoryOperand {
        locked: true,
        ..operand
    };
    let table: [(&[u8], Class, MemoryOperand); 18] = [
        // paddd xmm1, [rax]; movups xmm1, [rax]; movaps [rax], xmm1; movsd xmm1, [rax]
        (
            &[0x66, 0x0f, 0xfe, 0x08],
            Class::Sse,
            plain(16, Access::Read, 16),
        ),
        (&[0x0f, 0x10, 0x08], Class::Sse, plain(16, Access::Read, 1)),
        (
            &[0x0f, 0x29, 0x08],
            Class::Sse,
            plain(16, Access::Write, 16),
        ),
        (
            &[0xf2, 0x0f, 0x10, 0x08],
            Class::Sse,
            plain(8, Access::Read, 1),
        ),
        // cvttss2si r8d, [rbp + 0]; vcvttsd2si eax, [rax]
        (
            &[0xf3, 0x44, 0x0f, 0x2c, 0x45, 0],
            Class::Sse,
            plain(4, Access::Read, 1),
        ),
        (
            &[0xc5, 0xfb, 0x2c, 0x00],
            Class::Avx,
            plain(8, Access::Read, 1),
        ),
        // pcmpestri xmm1, [rax], 0
        (
            &[0x66, 0x0f, 0x3a, 0x61, 0x08, 0],
            Class::Sse,
            plain(16, Access::Read, 1),
        ),
        // vpaddd ymm1, ymm2, [rax]; vmovdqa ymm1, [rax]; vmovdqa xmm1, [rax]
        (
            &[0xc5, 0xed, 0xfe, 0x08],
            Class::Avx,
            plain(32, Access::Read, 1),
        ),
        (
            &[0xc5, 0xfd, 0x6f, 0x08],
            Class::Avx,
            plain(32, Access::Read, 32),
        ),
        (
            &[0xc5, 0xf9, 0x6f, 0x08],
            Class::Avx,
            plain(16, Access::Read, 16),
        ),
        // fstp tbyte [rax]; paddd mm1, [rax]; andn eax, ebx, [rax]
        (&[0xdb, 0x38], Class::X87, plain(10, Access::Write, 1)),
        (&[0x0f, 0xfe, 0x08], Class::Mmx, plain(8, Access::Read, 1)),
        (
            &[0xc4, 0xe2, 0x60, 0xf2, 0x00],
            Class::VexInteger,
            plain(4, Access::Read, 1),
        ),
        // lock xadd [rax], ecx; xchg [rax], cl; lock cmpxchg16b [rax]
        (
            &[0xf0, 0x0f, 0xc1, 0x08],
            Class::Integer,
            locked(plain(4, Access::ReadWrite, 1)),
        ),
        (
            &[0x86, 0x08],
            Class::Integer,
            locked(plain(1, Access::ReadWrite, 1)),
        ),
        (
            &[0xf0, 0x48, 0x0f, 0xc7, 0x08],
            Class::Integer,
            locked(plain(16, Access::ReadWrite, 16)),
        ),
        // bt [rax], ecx
        (
            &[0x0f, 0xa3, 0x08],
            Class::Integer,
            MemoryOperand {
                bit_offset: true,
                ..plain(4, Access::Read, 1)
            },
        ),
        // vpmaskmovq [rax], ymm2, ymm1
        (
            &[0xc4, 0xe2, 0xed, 0x8e, 0x08],
            Class::Avx,
            MemoryOperand {
                mask: Some(ElementMask {
                    register: 2,
                    element_size: 8,
                }),
                ..plain(32, Access::Write, 1)
            },
        ),
    ];
    for (bytes, class, operand) in table {
        let thunk = thunk(bytes);
        assert_eq!(
            (thunk.class, thunk.memory),
            (class, Some(operand)),
            "{bytes:02x?}"
        );
    }
}

#[test]
fn instructions_of_the_interpreter_are_refused_with_the_reason() {
    let table: [(u32, &[u8], Unsupported); 22] = [
        (64, &[0x0f, 0x05], Unsupported::ControlFlow), // syscall
        (64, &[0x74, 0x00], Unsupported::ControlFlow), // je
        (64, &[0xcc], Unsupported::ControlFlow),       // int3
        (64, &[0x50], Unsupported::Stack),             // push rax
        (64, &[0x9d], Unsupported::Stack),             // popfq
        (64, &[0xf3, 0xa4], Unsupported::String),      // rep movsb
        (64, &[0x48, 0xf7, 0xf1], Unsupported::Divide), // div rcx
        (64, &[0x0f, 0xa2], Unsupported::NotComputing), // cpuid
        (64, &[0x0f, 0x31], Unsupported::NotComputing), // rdtsc
        (64, &[0x0f, 0x22, 0xc0], Unsupported::NotComputing), // mov cr0, rax
        (64, &[0x8e, 0xd8], Unsupported::NotComputing), // mov ds, eax
        (64, &[0xf3, 0x0f, 0xae, 0xc0], Unsupported::NotComputing), // rdfsbase eax
        (64, &[0xfd], Unsupported::NotComputing),      // std
        (64, &[0x0f, 0x01, 0xd0], Unsupported::NotComputing), // xgetbv
        (64, &[0x0f, 0xae, 0x10], Unsupported::StateImage), // ldmxcsr
        (64, &[0x0f, 0xae, 0xe8], Unsupported::CacheControl), // lfence
        (64, &[0x8d, 0x00], Unsupported::Address),     // lea
        (64, &[0x66, 0x0f, 0xf7, 0xca], Unsupported::MaskedStore), // maskmovdqu
        (
            64,
            &[0xc4, 0xe2, 0x69, 0x90, 0x0c, 0x18],
            Unsupported::Gather,
        ), // vpgatherdd
        (
            64,
            &[0x62, 0xf1, 0x6d, 0x48, 0xfe, 0xcb],
            Unsupported::Encoding,
        ), // vpaddd zmm
        (32, &[0x27], Unsupported::Only32Bit),         // daa
        (64, &[0x06], Unsupported::Invalid),
    ];
    for (bitness, bytes, reason) in table {
        assert_eq!(refusal(bitness, bytes), reason, "{bytes:02x?}");
    }
}

#[test]
fn code_of_16_and_32_bit_modes_runs() {
    // lock xadd [mem], eax with 32-bit and 16-bit addressing and operand-size prefix
    for (bitness, bytes) in [
        (32, &[0xf0, 0x0f, 0xc1, 0x03][..]),
        (16, &[0x66, 0xf0, 0x0f, 0xc1, 0x07][..]),
    ] {
        let thunk = ThunkCache::new()
            .thunk(&decode(bitness, bytes))
            .expect("xadd");
        let mut registers = RegisterFile::new();
        registers.gpr[0] = 5;
        let mut memory = [7, 0, 0, 0];
        assert_eq!(
            thunk.run_buffered(&mut registers, &mut memory),
            Outcome::Done
        );
        assert_eq!((registers.gpr[0], memory), (7, [12, 0, 0, 0]), "{bitness}");
    }
    // inc edi, whose opcode is a REX prefix in 64-bit mode
    let instruction = decode(32, &[0x47]);
    assert_eq!(instruction.code(), Code::Inc_r32);
    let thunk = ThunkCache::new().thunk(&instruction).expect("inc");
    let mut registers = RegisterFile::new();
    registers.gpr[7] = 0xffff_ffff;
    registers.flags = 1;
    assert_eq!(thunk.run_registers(&mut registers), Outcome::Done);
    assert_eq!((registers.gpr[7], registers.flags), (0, 0x55)); // CF stays, PF AF ZF
}

#[test]
fn bit_offset_counts_modulo_the_operand() {
    // bts [rax], rcx with an offset of 64 × 5 + 3: the interpreter moved the address
    let thunk = thunk(&[0x48, 0x0f, 0xab, 0x08]);
    let mut registers = RegisterFile::new();
    registers.gpr[1] = 64 * 5 + 3;
    registers.flags = 0x40 | 1;
    let mut memory = [0; 8];
    assert_eq!(
        thunk.run_buffered(&mut registers, &mut memory),
        Outcome::Done
    );
    assert_eq!(memory, [8, 0, 0, 0, 0, 0, 0, 0]);
    // CF is the old bit; ZF stays (SDM vol. 2A, BTS); the register too.
    assert_eq!((registers.flags, registers.gpr[1]), (0x40, 64 * 5 + 3));
}

#[test]
fn unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let mut cache = ThunkCache::new();
    let mut make = |bytes: &[u8]| cache.thunk(&decode(64, bytes)).expect("x87");
    // Given fld1 on the stack, zero divide unmasked,
    let mut registers = with_st0(ONE);
    registers.x87.set_control_word(0x37b);
    // when it is divided by an integer zero in memory,
    let mut zero = [0; 4];
    let divide = make(&[0xda, 0x30]); // fidiv dword [rax]
    assert!(divide.waiting);
    assert_eq!(
        divide.run_buffered(&mut registers, &mut zero),
        Outcome::Done
    );
    // then ST0 stays, and ZE, ES and B are set.
    assert_eq!(registers.x87.stack_register(0), ONE);
    assert_eq!(registers.x87.status_word() & 0x80ff, 0x8084);
    assert!(registers.x87.exception_pending());
    // Waiting instructions find it pending and change nothing,
    let before = registers.clone();
    for bytes in [
        &[0xd8, 0xc0][..],
        &[0x0f, 0x77],
        &[0x9b],
        &[0x0f, 0xfe, 0xca],
    ] {
        assert_eq!(
            make(bytes).run_registers(&mut registers),
            Outcome::X87Pending,
            "{bytes:02x?}"
        );
        assert_eq!(registers.x87.0[..160], before.x87.0[..160]);
    }
    // FNSTSW AX doesn't wait, and FNCLEX clears it.
    let status = make(&[0xdf, 0xe0]);
    assert!(!status.waiting);
    registers.gpr[0] = u64::MAX;
    assert_eq!(status.run_registers(&mut registers), Outcome::Done);
    assert_eq!(
        registers.gpr[0],
        0xffff_ffff_ffff_0000 | u64::from(before.x87.status_word())
    );
    assert_eq!(
        make(&[0xdb, 0xe2]).run_registers(&mut registers),
        Outcome::Done
    );
    assert!(!registers.x87.exception_pending());
    assert_eq!(
        make(&[0xd8, 0xc0]).run_registers(&mut registers),
        Outcome::Done
    );
    assert_eq!(registers.x87.stack_register(0)[8..], [0x00, 0x40]); // 2.0
}

#[test]
fn x87_pointers_are_the_interpreters() {
    // Given pointers that the interpreter recorded,
    let mut registers = with_st0(ONE);
    registers
        .x87
        .set_pointers(0x1234_5678_9abc, 0x1c1, Some(0xdef0));
    // when instructions run, then no host address replaces them,
    let mut memory = [0; 8];
    for (bytes, pointers) in [
        (&[0xd8, 0xc0][..], X87Pointers::Instruction), // fadd st, st
        (&[0xdd, 0x10], X87Pointers::InstructionAndData), // fst qword [rax]
        (&[0xd9, 0x38], X87Pointers::Unchanged),       // fnstcw [rax]
        (&[0x0f, 0x77], X87Pointers::Unchanged),       // emms
    ] {
        let thunk = thunk(bytes);
        assert_eq!(thunk.x87_pointers, pointers, "{bytes:02x?}");
        assert_eq!(
            thunk.run_buffered(&mut registers, &mut memory),
            Outcome::Done
        );
        let image = &registers.x87;
        assert_eq!(
            (
                image.instruction_pointer(),
                image.opcode(),
                image.data_pointer()
            ),
            (0x1234_5678_9abc, 0x1c1, 0xdef0)
        );
    }
    // and FNINIT clears them.
    assert_eq!(
        thunk(&[0xdb, 0xe3]).run_registers(&mut registers),
        Outcome::Done
    );
    assert_eq!(registers.x87.0[..24], FxsaveImage::new().0[..24]);
}

#[test]
fn x87_opcode_skips_prefixes() {
    assert_eq!(x87_opcode(&[0xd8, 0xc1]), Some(0x0c1));
    assert_eq!(
        x87_opcode(&[0x64, 0x66, 0xdd, 0x35, 0, 0, 0, 0]),
        Some(0x535)
    );
    assert_eq!(x87_opcode(&[0x41, 0xdf, 0x38]), Some(0x738));
    assert_eq!(x87_opcode(&[0x90, 0xd8]), None);
    assert_eq!(x87_opcode(&[0xd8]), None);
}

#[test]
fn environments_come_back_as_they_were_stored() {
    for format in [
        EnvironmentFormat::Protected32,
        EnvironmentFormat::Protected16,
        EnvironmentFormat::Real32,
        EnvironmentFormat::Real16,
    ] {
        // Given an image with registers of every tag and TOP in the middle,
        let mut image = FxsaveImage::new();
        image.set_control_word(0x27f);
        image.set_status_word(3 << 11 | 0x4000);
        image.0[4] = 0b1010_1011;
        for index in 0..8 {
            image.set_stack_register(index, [index as u8, 0, 0, 0, 0, 0, 0, 0x80, 1, 0x40]);
        }
        image.set_pointers(0xabcd, 0x5ff, Some(0x1234));
        if format == EnvironmentFormat::Protected16 {
            image.set_pointers(0xabcd, 0, Some(0x1234)); // has no room for FOP
        }
        let original = image.clone();
        // when it is saved and restored,
        let mut bytes = vec![0; format.size() + 80];
        image.save(format, &mut bytes);
        assert_eq!(image.0[..24], FxsaveImage::new().0[..24]);
        image.restore(format, &bytes);
        // then nothing is lost.
        assert_eq!(image.0[..160], original.0[..160], "{format:?}");
    }
}

#[test]
fn real_mode_environment_has_linear_addresses() {
    let mut image = FxsaveImage::new();
    image.set_pointers(0xf_1234, 0x123, Some(0xa_5678));
    let mut bytes = [0; 14];
    image.store_environment(EnvironmentFormat::Real16, &mut bytes);
    assert_eq!(bytes[6..], [0x34, 0x12, 0x23, 0xf1, 0x78, 0x56, 0x00, 0xa0]);
    let mut bytes = [0; 28];
    image.store_environment(EnvironmentFormat::Real32, &mut bytes);
    assert_eq!(bytes[12..20], [0x34, 0x12, 0xff, 0xff, 0x23, 0xf1, 0, 0]);
    assert_eq!(bytes[20..], [0x78, 0x56, 0xff, 0xff, 0, 0xa0, 0, 0]);
}

#[test]
fn vzeroupper_reaches_eight_registers_outside_64_bit_mode() {
    let mut cache = ThunkCache::new();
    for (bitness, zeroed) in [(64, 16), (32, 8)] {
        let thunk = cache
            .thunk(&decode(bitness, &[0xc5, 0xf8, 0x77]))
            .expect("vzeroupper");
        let mut registers = RegisterFile::new();
        registers.vector = [Vector([1; 32]); 16];
        assert_eq!(thunk.run_registers(&mut registers), Outcome::Done);
        for (number, vector) in registers.vector.iter().enumerate() {
            assert_eq!(vector.0[..16], [1; 16]);
            assert_eq!(
                vector.0[16..],
                [u8::from(number >= zeroed); 16],
                "{bitness} {number}"
            );
        }
    }
}

#[test]
fn narrowing_store_waits_for_unmasked_exceptions() {
    // vcvtps2ph [rax], xmm1, 0 of a value that overflows a half
    let thunk = thunk(&[0xc4, 0xe3, 0x79, 0x1d, 0x08, 0]);
    let mut registers = RegisterFile::new();
    registers.set_xmm(1, u128::from(1e30_f32.to_bits()));
    registers.mxcsr = 0x1f80 & !0x400;
    let mut memory = [0xee; 8];
    assert_eq!(
        thunk.run_buffered(&mut registers, &mut memory),
        Outcome::SimdException
    );
    assert_eq!(memory, [0xee; 8]);
    registers.set_xmm(1, u128::from(1.0_f32.to_bits()));
    assert_eq!(
        thunk.run_buffered(&mut registers, &mut memory),
        Outcome::Done
    );
    assert_eq!(memory, [0, 0x3c, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn host_floating_point_control_survives_every_guest_mode() {
    fn control() -> (u32, u16) {
        let (mut mxcsr, mut word) = (0_u32, 0_u16);
        // SAFETY: stores 4 and 2 bytes to locals.
        unsafe {
            core::arch::asm!("stmxcsr [{}]", "fnstcw [{}]", in(reg) &mut mxcsr, in(reg) &mut word);
        }
        (mxcsr & !0x3f, word)
    }
    // Given a guest with everything unusual in its control words,
    let host = control();
    let mut registers = with_st0(ONE);
    registers.mxcsr = 0xffc0 & !0x1000;
    registers.x87.set_control_word(0xc7f);
    // when thunks of each kind run, raising or not,
    registers.set_xmm(1, u128::from(1.0_f64.to_bits()));
    registers.set_xmm(2, u128::from(3.0_f64.to_bits()));
    for bytes in [
        &[0xf2, 0x0f, 0x5e, 0xca][..], // divsd xmm1, xmm2: inexact, unmasked
        &[0xf2, 0x0f, 0x58, 0xca],     // addsd xmm1, xmm2
        &[0xd8, 0xc0],                 // fadd st, st
        &[0x66, 0x0f, 0x2d, 0xca],     // cvtpd2pi mm1, xmm2
        &[0x66, 0x0f, 0x2d, 0xc9],     // cvtpd2pi mm1, xmm1
    ] {
        let _ = thunk(bytes).run_registers(&mut registers);
        // then the host's are as before.
        assert_eq!(control(), host, "{bytes:02x?}");
    }
}

#[test]
fn locked_operations_are_atomic_on_shared_memory() {
    let counter = AtomicU64::new(0);
    let adding = || {
        let thunk = thunk(&[0xf0, 0x48, 0x0f, 0xc1, 0x08]); // lock xadd [rax], rcx
        let mut registers = RegisterFile::new();
        for _ in 0..100_000 {
            registers.gpr[1] = 1;
            // SAFETY: an aligned u64 that is only accessed atomically.
            let outcome = unsafe { thunk.run(&mut registers, counter.as_ptr().cast()) };
            assert_eq!(outcome, Outcome::Done);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(adding);
        scope.spawn(adding);
    });
    assert_eq!(counter.load(Ordering::SeqCst), 200_000);
}

/// The thunk doesn't depend on where the memory operand is, nor on the instruction's own address.
#[test]
fn instructions_that_compute_the_same_share_a_thunk() {
    let mut cache = ThunkCache::new();
    // add [rax], ecx; add fs:[rbx + 8 * rdx + 0x12345678], ecx; add [rip], ecx
    for bytes in [
        &[0x01, 0x08][..],
        &[0x64, 0x01, 0x8c, 0xd3, 0x78, 0x56, 0x34, 0x12],
        &[0x01, 0x0d, 0, 0, 0, 0],
    ] {
        cache.thunk(&decode(64, bytes)).expect("add");
    }
    assert_eq!(cache.len(), 1);
    cache
        .thunk(&decode(64, &[0xf0, 0x01, 0x08]))
        .expect("lock add");
    assert_eq!(cache.len(), 2);
}

#[test]
fn code_memory_is_bounded_and_comes_back() {
    // Given a cache of one chunk and a guest with a new instruction each time,
    let mut cache = ThunkCache::with_limit(64 << 10);
    let add = |immediate: u32| {
        let mut bytes = vec![0x05];
        bytes.extend_from_slice(&immediate.to_le_bytes());
        decode(64, &bytes)
    };
    // when thunks are held, then the cache says that it is full,
    let mut held = Vec::new();
    let error = (0..10_000).find_map(|immediate| match cache.thunk(&add(immediate)) {
        Ok(thunk) => {
            held.push(thunk);
            None
        }
        Err(error) => Some(error),
    });
    assert!(
        matches!(error, Some(ThunkError::Full { limit: 0x10000 })),
        "{error:?}"
    );
    assert!(held.len() > 500, "{}", held.len());
    // and those that are held still work.
    let mut registers = RegisterFile::new();
    for (immediate, thunk) in held.iter().enumerate() {
        registers.gpr[0] = 1;
        assert_eq!(thunk.run_registers(&mut registers), Outcome::Done);
        assert_eq!(registers.gpr[0], immediate as u64 + 1);
    }
    // When they are dropped, then any number can be made one after the other.
    drop(held);
    for immediate in 0..5_000 {
        let thunk = cache.thunk(&add(immediate)).expect("memory came back");
        registers.gpr[0] = 1;
        assert_eq!(thunk.run_registers(&mut registers), Outcome::Done);
        assert_eq!(registers.gpr[0], u64::from(immediate) + 1);
    }
}

#[test]
fn no_code_mapping_is_writable_and_executable() {
    let _thunk = thunk(&[0x66, 0x0f, 0xfe, 0xca]);
    let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
    let modes: Vec<&str> = maps
        .lines()
        .filter(|line| line.contains("trapgate-thunks"))
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    assert!(
        modes.contains(&"r-xs") && modes.contains(&"rw-s"),
        "{modes:?}"
    );
    assert!(
        !modes
            .iter()
            .any(|mode| mode.contains('w') && mode.contains('x')),
        "{modes:?}"
    );
}

#[test]
fn caches_and_thunks_move_between_threads() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<ThunkCache>();
    is_send::<Thunk>();
    is_sync::<Thunk>();
    is_send::<RegisterFile>();
}

/// Given random bytes as code in every mode, and registers that no CPU would hold,
/// when they have a thunk, then running it does the host no harm.
#[test]
fn hostile_guests_do_no_harm() {
    let mut seed = 7_u64;
    let mut random = move || {
        // xorshift64 (Marsaglia 2003)
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut cache = ThunkCache::with_limit(1 << 20);
    let mut operand = Operand([0; 128]);
    let (mut ran, mut pending, mut raised) = (0, 0, 0);
    for round in 0..400_000_u64 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&random().to_le_bytes());
        bytes[8..].copy_from_slice(&random().to_le_bytes());
        // Half of the rounds start in a two-byte opcode or an x87 one.
        match round % 8 {
            0 | 1 => bytes[0] = 0x0f,
            2 => bytes[..2].copy_from_slice(&[[0x66, 0xf2, 0xf3][(round / 8 % 3) as usize], 0x0f]),
            3 => bytes[0] = 0xd8 | bytes[0] & 7,
            4 => bytes[0] = 0xc5,
            _ => {}
        }
        let bitness = [16, 32, 64, 64][(random() % 4) as usize];
        let Ok(thunk) = cache.thunk(&decode(bitness, &bytes)) else {
            continue;
        };
        let mut registers = RegisterFile::new();
        registers.gpr = core::array::from_fn(|_| random());
        registers.flags = random();
        registers.mxcsr = random() as u32;
        for vector in &mut registers.vector {
            vector.0 = core::array::from_fn(|_| random() as u8);
        }
        for byte in &mut registers.x87.0 {
            *byte = random() as u8;
        }
        if round % 3 == 0 {
            registers.x87.set_control_word(0x37f);
        }
        // SAFETY: aligned and larger than any operand.
        match unsafe { thunk.run(&mut registers, operand.0.as_mut_ptr()) } {
            Outcome::Done => ran += 1,
            Outcome::X87Pending => pending += 1,
            Outcome::SimdException => raised += 1,
        }
    }
    assert!(
        ran > 10_000 && pending > 1000 && raised > 100,
        "{ran} {pending} {raised}"
    );
}
