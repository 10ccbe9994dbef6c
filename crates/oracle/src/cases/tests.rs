use super::*;
use crate::layout::RECORD;

/// What XRSTOR demands of a header in standard format (SDM vol. 1, 13.8.1).
fn is_restorable(record: &[u8], components: u64) -> bool {
    let header = &record[at::XSAVE + 512..at::XSAVE + 576];
    quad(header, 0) & !components == 0 && header[8..24].iter().all(|byte| *byte == 0)
}

#[test]
fn registers_that_no_profile_has_are_left_out() {
    // vpshufb ymm16{z}, ymm23, [r10d]; the same of xmm22; vpgatherdd ymm1{k1}, [rax+ymm23].
    let codes: [&[u8]; 3] = [
        &[0x67, 0x62, 0xc2, 0x45, 0xb0, 0x00, 0x02],
        &[0x62, 0xc2, 0x4d, 0x00, 0x00, 0x02],
        &[0x62, 0xf2, 0x7d, 0x21, 0x90, 0x0c, 0x38],
    ];
    for avx in [false, true] {
        let maker = Maker::new(avx);
        let mut random = Random(1);
        let mut record = vec![0; RECORD];
        for code in codes {
            let piece = Piece::new(0, code.to_vec(), layout::code(0), 64);
            for _ in 0..100 {
                let climate = Climate::pick(&mut random);
                maker.make(&piece, climate, &mut random, &mut record);
                assert!(is_restorable(&record, maker.components), "{code:02x?}");
            }
        }
    }
}
