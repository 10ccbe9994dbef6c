//! Tests with outcomes that are made up: no host need be as these are.

use super::*;
use crate::host::Vendor;
use crate::layout::{self, PAGE, RECORD};
use crate::record::put;

const INTEL: Host = Host {
    vendor: Vendor::Intel,
    fdp_on_exceptions: true,
};
const AMD: Host = Host {
    vendor: Vendor::Amd,
    fdp_on_exceptions: true,
};
/// xsaveopt fs:[eax-0Fh]
const XSAVEOPT: [u8; 5] = [0x64, 0x0f, 0xae, 0x70, 0xf1];

fn piece(bytes: &[u8], bits: u32) -> Piece {
    Piece::new(0, bytes.to_vec(), layout::code(0) + 0x100, bits)
}

/// Before, natively and on an engine: nothing but a vector and where it was raised.
struct Outcomes {
    piece: Piece,
    input: Vec<u8>,
    native: Vec<u8>,
    engine: Vec<u8>,
}

impl Outcomes {
    fn new(piece: Piece, start: &Start, vectors: [u64; 2]) -> Self {
        let mut input = vec![0; RECORD];
        start.write(&mut input);
        let [native, engine] = vectors.map(|vector| {
            let mut record = vec![0; RECORD];
            put(&mut record, at::VECTOR, vector);
            put(&mut record, at::RIP, piece.ip);
            record[at::XSAVE + 512] = 7;
            record
        });
        Self {
            piece,
            input,
            native,
            engine,
        }
    }

    fn judge(&self, host: Host) -> Judgement {
        differences(
            host,
            Some(&self.piece),
            &self.input,
            &self.native,
            &self.engine,
        )
    }
}

/// XSAVEOPT whose area begins 12 bytes before the end of a segment of 4 GiB.
fn over_the_end(vectors: [u64; 2]) -> Outcomes {
    let mut start = Start {
        compatibility: true,
        bases: [layout::data(0) + PAGE + 0xc, 0],
        windows: [
            Window {
                address: layout::data(0) + PAGE,
                quads: 8,
            },
            Window::default(),
        ],
        ..Start::default()
    };
    start.gpr[gpr::RAX] = 3;
    Outcomes::new(piece(&XSAVEOPT, 32), &start, vectors)
}

#[test]
fn what_was_done_before_a_fault_over_the_end_of_a_segment_is_open() {
    assert!(over_the_end([13, 13]).judge(INTEL).open);
    assert!(!over_the_end([vector::NONE; 2]).judge(INTEL).open);

    // As much where a window shows it.
    let mut outcomes = over_the_end([13, 13]);
    outcomes.native[at::MEMORY] = 0x7f;
    let judgement = outcomes.judge(INTEL);
    assert_eq!(judgement.differences, Vec::<String>::new());
    assert_eq!(judgement.waived, BTreeSet::from([Waiver::SegmentEnd]));
    assert!(judgement.open);

    // As much of a state that is restored.
    let mut outcomes = over_the_end([13, 14]);
    outcomes.native[at::XSAVE + 160] = 0x7f;
    let judgement = outcomes.judge(INTEL);
    assert_eq!(judgement.differences, Vec::<String>::new());
    assert!(judgement.open);

    // Registers stay as they were.
    let mut outcomes = over_the_end([13, 14]);
    outcomes.native[at::GPR] = 0x7f;
    assert_eq!(outcomes.judge(INTEL).differences.len(), 1);

    // Without a fault it counts.
    let mut outcomes = over_the_end([vector::NONE; 2]);
    outcomes.native[at::MEMORY] = 0x7f;
    assert_eq!(outcomes.judge(INTEL).differences.len(), 1);
}

#[test]
fn x87_pointers_count_on_amd_while_an_exception_is_pending() {
    let start = Start::default();
    let mut outcomes = Outcomes::new(piece(&[0x90], 64), &start, [vector::NONE; 2]);
    outcomes.engine[at::XSAVE + 8] = 0x12;
    let waiver = Waiver::Amd(Way::ErrorPointers);
    assert_eq!(outcomes.judge(AMD).waived, BTreeSet::from([waiver]));
    assert_eq!(outcomes.judge(AMD).differences.len(), 0);
    assert_eq!(outcomes.judge(INTEL).differences.len(), 1);

    for record in [&mut outcomes.native, &mut outcomes.engine] {
        record[at::XSAVE + 2] = 0x80;
    }
    // Those of another instruction, and those that are lost.
    outcomes.native[at::XSAVE + 8] = 0x13;
    assert_eq!(outcomes.judge(AMD).differences.len(), 1);
    outcomes.native[at::XSAVE + 8] = 0;
    assert_eq!(outcomes.judge(AMD).differences.len(), 0);
}

#[test]
fn a_bit_of_mxcsr_that_only_amd_has_is_no_engines() {
    let start = Start::default();
    let mut outcomes = Outcomes::new(piece(&[0x90], 64), &start, [vector::NONE; 2]);
    outcomes.native[at::XSAVE + 30] = 2;
    assert_eq!(outcomes.judge(AMD).differences.len(), 0);
    assert_eq!(outcomes.judge(INTEL).differences.len(), 1);

    for record in [&mut outcomes.native, &mut outcomes.engine] {
        record[at::XSAVE + 26] = 2;
    }
    assert_eq!(outcomes.judge(AMD).differences.len(), 1);
}

#[test]
fn a_branch_with_operand_size_prefix_is_another_one_on_amd() {
    let start = Start::default();
    // jmp, and the same with the prefix.
    let near = [0xe9, 0x10, 0, 0, 0];
    let prefixed = [0x66, 0xe9, 0x10, 0, 0, 0];
    for (bytes, bits, differences) in [(&near[..], 64, 1), (&prefixed, 64, 0), (&prefixed, 32, 1)] {
        let outcomes = Outcomes::new(piece(bytes, bits), &start, [6, vector::NONE]);
        let judgement = outcomes.judge(AMD);
        assert_eq!(judgement.differences.len(), differences, "{bytes:02x?}");
        assert_eq!(judgement.open, differences == 0);
        assert_eq!(outcomes.judge(INTEL).differences.len(), 1);
    }
}

#[test]
fn flags_of_a_comparison_of_strings_count_unless_it_faults_on_amd() {
    let start = Start::default();
    // repne scasb, and mov al, [rdi]
    for (bytes, vector, differences) in [
        (&[0xf2, 0xae][..], 14, 0),
        (&[0xf2, 0xae], vector::NONE, 1),
        (&[0x8a, 0x07], 14, 1),
    ] {
        let mut outcomes = Outcomes::new(piece(bytes, 64), &start, [vector; 2]);
        outcomes.native[at::FLAGS] = rflags::ZF as u8;
        assert_eq!(outcomes.judge(AMD).differences.len(), differences);
        assert_eq!(outcomes.judge(INTEL).differences.len(), 1);
    }
}

#[test]
fn parts_beyond_the_end_of_short_addresses_are_of_one_access() {
    let start = Start {
        compatibility: true,
        bases: [layout::data(0), 0],
        ..Start::default()
    };
    // xsave fs:[di], and with an offset of 32 bits.
    let short = [0x64, 0x67, 0x0f, 0xae, 0x25];
    let long = [0x64, 0x0f, 0xae, 0x27];
    for (bytes, beyond, differences) in [
        (&short[..], 0x100, 0),
        (&short, 0x1000, 1),
        (&long, 0x100, 1),
    ] {
        let mut outcomes = Outcomes::new(piece(bytes, 32), &start, [14; 2]);
        put(&mut outcomes.native, at::ADDRESS, layout::data(0) + 0xff00);
        put(&mut outcomes.engine, at::ADDRESS, layout::data(0) + beyond);
        let judgement = outcomes.judge(INTEL);
        assert_eq!(judgement.differences.len(), differences, "{bytes:02x?}");
    }
}

#[test]
fn restore_that_asks_for_more_on_amd_may_be_followed_by_a_fault() {
    let start = Start::default();
    // xrstor [rdi]
    let restore = piece(&[0x0f, 0xae, 0x2f], 64);
    let end = restore.ip + 3;
    let mut outcomes = Outcomes::new(restore, &start, [14; 2]);
    put(&mut outcomes.engine, at::RIP, end);
    put(&mut outcomes.engine, at::ADDRESS, end);
    put(&mut outcomes.native, at::ADDRESS, layout::data(0));
    let waiver = Waiver::Amd(Way::Area);
    assert_eq!(outcomes.judge(AMD).waived, BTreeSet::from([waiver]));
    assert_ne!(outcomes.judge(INTEL).differences.len(), 0);
}

#[test]
fn access_over_the_end_of_a_segment_may_find_a_selector_that_is_refused() {
    let mut start = Start {
        compatibility: true,
        ..Start::default()
    };
    // lds ebp, fs:[ecx], whose selector lies at 4 GiB.
    start.gpr[gpr::RCX] = 0xffff_fffc;
    let mut outcomes = Outcomes::new(piece(&[0x64, 0xc5, 0x29], 32), &start, [13, 13]);
    put(&mut outcomes.native, at::ERROR, 0x8c);
    let judgement = outcomes.judge(INTEL);
    assert_eq!(judgement.waived, BTreeSet::from([Waiver::SegmentEnd]));
    assert_eq!(judgement.differences.len(), 0);

    start.gpr[gpr::RCX] = 0x1000;
    let mut outcomes = Outcomes::new(piece(&[0x64, 0xc5, 0x29], 32), &start, [13, 13]);
    put(&mut outcomes.native, at::ERROR, 0x8c);
    assert_eq!(outcomes.judge(INTEL).differences.len(), 1);
}
