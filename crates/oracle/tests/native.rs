//! The native child: what it tells, and that it is confined.

use trapgate_oracle::bench::{Bench, Times, arena};
use trapgate_oracle::engine::Kind;
use trapgate_oracle::host::Host;
use trapgate_oracle::judge::differences;
use trapgate_oracle::layout::{self, CODE_AT, IN_AT, PAGE, record as at, vector};
use trapgate_oracle::native;
use trapgate_oracle::record::{Start, Window, of_mut, put, quad};
use trapgate_x86::profile::Level;

/// Runs code in slot 0 natively and on the interpreter; gives both outcomes and the record that went in.
fn run(code: &[u8], start: Start) -> Option<(Vec<u8>, Vec<u8>, Vec<u8>)> {
    let (input, native, ours) = run_on(&[Kind::Interpreter], code, start)?;
    Some((input, native, ours.expect("there is one engine")))
}

/// The record that went in, natively, and on the engine if there is one.
type Records = (Vec<u8>, Vec<u8>, Option<Vec<u8>>);

/// Runs code in slot 0 natively and on at most one engine.
fn run_on(engines: &[Kind], code: &[u8], start: Start) -> Option<Records> {
    if let Err(error) = native::usable() {
        eprintln!("skipped: {error}");
        return None;
    }
    let mut bench = Bench::new(Level::V2, engines, false).expect("it is usable");
    let mut arena = arena();
    arena[CODE_AT..CODE_AT + PAGE as usize].fill(0xcc);
    arena[CODE_AT..CODE_AT + code.len()].copy_from_slice(code);
    let end = layout::code(0) + code.len() as u64;
    let jump = layout::EXIT.wrapping_sub(end + 5) as u32;
    arena[CODE_AT + code.len()] = 0xe9;
    arena[CODE_AT + code.len() + 1..][..4].copy_from_slice(&jump.to_le_bytes());
    let record = of_mut(&mut arena[IN_AT..], 0);
    record[at::XSAVE..at::XSAVE + 2].copy_from_slice(&0x37f_u16.to_le_bytes());
    record[at::XSAVE + 24..at::XSAVE + 28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    record[at::XSAVE + 512] = 3;
    Start {
        rip: layout::code(0),
        flags: 0x202,
        ..start
    }
    .write(record);
    let input = record.to_vec();
    let mut times = Times::default();
    bench
        .run(&mut arena, 1, 0, 1, &mut times)
        .expect("nothing dies");
    let (native, mut outcomes) = bench.outcome(0);
    let native = native.to_vec();
    let ours = outcomes.next().map(<[u8]>::to_vec);
    Some((input, native, ours))
}

#[test]
fn a_case_starts_and_ends_with_all_its_registers() {
    let data = layout::data(0) + PAGE;
    let start = Start {
        gpr: std::array::from_fn(|index| {
            if index == 0 {
                data
            } else {
                0x1111 * index as u64
            }
        }),
        bases: [data, 0x7000_1234_5678],
        windows: [
            Window {
                address: data,
                quads: 2,
            },
            Window::default(),
        ],
        ..Start::default()
    };
    // add rcx, rdx; mov [rax], rcx
    let Some((_, native, ours)) = run(&[0x48, 0x01, 0xd1, 0x48, 0x89, 0x08], start) else {
        return;
    };
    for record in [&native, &ours] {
        assert_eq!(quad(record, at::VECTOR), vector::NONE);
        assert_eq!(quad(record, at::GPR + 8), 0x3333);
        assert_eq!(quad(record, at::GPR + 15 * 8), 0xffff);
        assert_eq!(quad(record, at::BASES + 8), 0x7000_1234_5678);
        assert_eq!(quad(record, at::MEMORY), 0x3333);
    }
}

#[test]
fn a_fault_is_told_with_its_address_and_error_code() {
    let mut start = Start::default();
    start.gpr[0] = layout::data(0) + 3 * PAGE + 5;
    // mov [rax], rcx
    let Some((_, native, ours)) = run(&[0x48, 0x89, 0x08], start) else {
        return;
    };
    for record in [&native, &ours] {
        assert_eq!(quad(record, at::VECTOR), 14);
        assert_eq!(quad(record, at::ERROR), 6);
        assert_eq!(quad(record, at::ADDRESS), layout::data(0) + 3 * PAGE + 5);
        assert_eq!(quad(record, at::RIP), layout::code(0));
    }
}

/// Linux's number of getpid.
#[test]
fn no_case_calls_the_system() {
    let mut start = Start::default();
    start.gpr[0] = 39;
    // The engines' guest has no kernel that would answer.
    let Some((_, native, _)) = run_on(&[], &[0x0f, 0x05], start) else {
        return;
    };
    assert_eq!(quad(&native, at::VECTOR), vector::SYSTEM_CALL);
}

#[test]
fn a_case_without_end_is_ended() {
    let Some((_, native, ours)) = run(&[0xeb, 0xfe], Start::default()) else {
        return;
    };
    assert_eq!(quad(&native, at::VECTOR), vector::TIMEOUT);
    assert_eq!(quad(&ours, at::VECTOR), vector::TIMEOUT);
}

#[test]
fn every_part_of_an_outcome_is_compared() {
    let data = layout::data(0) + PAGE;
    let start = Start {
        windows: [
            Window {
                address: data,
                quads: 2,
            },
            Window::default(),
        ],
        ..Start::default()
    };
    let Some((input, native, ours)) = run(&[0x90], start) else {
        return;
    };
    let host = Host::new();
    assert_eq!(
        differences(host, None, &input, &native, &ours).differences,
        Vec::<String>::new()
    );
    let parts = [
        at::GPR + 3 * 8,
        at::FLAGS,
        at::RIP,
        at::VECTOR,
        at::ERROR,
        at::ADDRESS,
        at::BASES,
        at::SELECTORS + 1,
        at::STACK_SEGMENT,
        at::XSAVE + 1,
        at::XSAVE + 24,
        at::XSAVE + 28,
        at::XSAVE + 32,
        at::XSAVE + 170,
        at::XSAVE + 420,
        at::XSAVE + 520,
        at::MEMORY + 9,
    ];
    for part in parts {
        let mut wrong = ours.clone();
        let byte = part & !7;
        let value = quad(&wrong, byte) ^ 1 << ((part & 7) * 8 + 2);
        put(&mut wrong, byte, value);
        // Components that are not in use have initial values, whatever bytes there are.
        let mut expected = native.clone();
        expected[at::XSAVE + 512] = 3;
        wrong[at::XSAVE + 512] = 3;
        let found = differences(host, None, &input, &expected, &wrong).differences;
        assert_eq!(found.len(), 1, "offset {part:#x}: {found:?}");
    }
}
