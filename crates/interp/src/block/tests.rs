use super::*;
use crate::testing::{PAGE_TABLES, WINDOW, long_cpu, map_window};
use trapgate_memory::TraceListener as _;

/// Writes a block: MOV EAX, `value`; JMP.
fn put(cpu: &Cpu, gpa: u64, value: u32) {
    let mut code = vec![0xb8];
    code.extend(value.to_le_bytes());
    code.extend([0xeb, 0x10]);
    cpu.memory.write(gpa, &code).unwrap();
}

/// What the block at `rip` puts into EAX.
fn found(blocks: &mut Blocks, cpu: &mut Cpu, rip: u64) -> u64 {
    cpu.rip = rip;
    blocks.find(cpu).unwrap();
    blocks.ops()[0].immediate
}

#[test]
fn blocks_are_found_in_whatever_order_they_run() {
    let (mut cpu, _) = long_cpu();
    let mut blocks = Blocks::new();
    // Two on a page, pages that share a slot of those entered lately, and blocks that share one of the table.
    let places: Vec<u64> = (0..80)
        .map(|n| 0x10_0000 + n / 2 * 0x4000 + n % 2 * 0x40)
        .collect();
    for (value, &place) in places.iter().enumerate() {
        put(&cpu, place, value as u32);
    }
    let mut number = 1;
    for _ in 0..2000 {
        // Each follows up to three others.
        number = (number * 13 + number % 3) % places.len();
        assert_eq!(found(&mut blocks, &mut cpu, places[number]), number as u64);
    }
    let decoded = blocks.decoded;
    for (value, &place) in places.iter().enumerate() {
        found(&mut blocks, &mut cpu, place);
        assert_eq!(found(&mut blocks, &mut cpu, places[0]), 0);
        assert_eq!(found(&mut blocks, &mut cpu, place), value as u64);
    }
    assert!(blocks.decoded <= places.len() as u64 && decoded > 2);
}

#[test]
fn block_that_was_written_over_is_not_found_after_the_one_before_it() {
    let (mut cpu, _) = long_cpu();
    let mut blocks = Blocks::new();
    let (first, second) = (0x10_0000, 0x10_1000);
    put(&cpu, first, 1);
    put(&cpu, second, 2);
    for _ in 0..3 {
        found(&mut blocks, &mut cpu, first);
        assert_eq!(found(&mut blocks, &mut cpu, second), 2);
    }
    for value in [3, 4] {
        put(&cpu, second, value);
        // No interpreter listens to this memory's traces.
        cpu.code.written(second, 5);
        blocks.drop_stale(&mut cpu);
        found(&mut blocks, &mut cpu, first);
        assert_eq!(found(&mut blocks, &mut cpu, second), u64::from(value));
    }
    assert_eq!(blocks.decoded, 4);
}

#[test]
fn after_all_blocks_were_thrown_away_none_follows_another() {
    let (mut cpu, _) = long_cpu();
    let mut blocks = Blocks::new();
    let places = [0x10_0000, 0x10_0040, 0x10_0080];
    for (value, place) in places.iter().enumerate() {
        put(&cpu, *place, value as u32);
    }
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        for number in order.into_iter().cycle().take(9) {
            assert_eq!(found(&mut blocks, &mut cpu, places[number]), number as u64);
        }
        blocks.clear(&mut cpu);
        assert_eq!((blocks.blocks.len(), blocks.map.len()), (1, 0));
    }
    assert_eq!(blocks.decoded, 9);
}

#[test]
fn page_that_was_mapped_elsewhere_is_fetched_from_there_once_its_translation_is_dropped() {
    let (mut cpu, _) = long_cpu();
    let mut blocks = Blocks::new();
    put(&cpu, 0x10_0000, 1);
    put(&cpu, 0x20_0000, 2);
    put(&cpu, 0x40_0000, 4);
    map_window(&cpu, 0x20_0000);
    for _ in 0..3 {
        assert_eq!(found(&mut blocks, &mut cpu, 0x10_0000), 1);
        assert_eq!(found(&mut blocks, &mut cpu, WINDOW), 2);
    }
    map_window(&cpu, 0x40_0000);
    cpu.tlb.flush_page(WINDOW);
    cpu.fetch_epoch += 1;
    assert_eq!(found(&mut blocks, &mut cpu, 0x10_0000), 1);
    assert_eq!(found(&mut blocks, &mut cpu, WINDOW), 4);
}

#[test]
fn block_that_crosses_a_page_is_found_only_while_its_second_page_stays() {
    let (mut cpu, _) = long_cpu();
    let mut blocks = Blocks::new();
    put(&cpu, 0x10_0000, 1);
    map_window(&cpu, 0x20_0000);
    // MOV EAX, imm32 that begins before WINDOW, with 2 and 4 behind it.
    let before = 0x3fff_fffd;
    let tables = PAGE_TABLES + 0x2000 + 511 * 8;
    cpu.memory
        .write(tables, &0x60_00e7u64.to_le_bytes())
        .unwrap();
    cpu.memory
        .write(0x60_0000 + 0x1f_fffd, &[0xb8, 9, 0])
        .unwrap();
    cpu.memory.write(0x20_0000, &[2, 0, 0xeb, 0]).unwrap();
    cpu.memory.write(0x40_0000, &[4, 0, 0xeb, 0]).unwrap();
    for _ in 0..3 {
        found(&mut blocks, &mut cpu, 0x10_0000);
        assert_eq!(found(&mut blocks, &mut cpu, before), 0x2_0009);
    }
    map_window(&cpu, 0x40_0000);
    cpu.tlb.flush_page(WINDOW);
    cpu.fetch_epoch += 1;
    found(&mut blocks, &mut cpu, 0x10_0000);
    assert_eq!(found(&mut blocks, &mut cpu, before), 0x4_0009);
}
