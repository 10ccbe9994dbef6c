use std::os::unix::fs::FileExt;
use std::sync::Arc;

use tempfile::NamedTempFile;
use trapgate_memory::{TraceFlags, TraceListener};

use super::*;
use crate::driver::{
    BUFFERS, Driver, EVENT_INDEX, INDIRECT, NEEDS_RESET, Piece, RAM, Random, eventually,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SECTORS: u64 = 2048;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

/// Byte `at` of the image.
fn pattern(at: u64) -> u8 {
    (at / 512 * 7 + at % 251) as u8
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    let bytes: Vec<_> = (0..SECTORS * SECTOR).map(pattern).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

fn block(read_only: bool) -> (Driver, NamedTempFile) {
    let image = image();
    let disk = Disk::open(image.path(), read_only).unwrap();
    let mut driver = Driver::new(Block::new(disk, "root-disk").unwrap());
    let features = driver.offered();
    driver.start(features & !EVENT_INDEX);
    (driver, image)
}

fn set_header(driver: &Driver, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.memory.write(HEADER, &header).unwrap();
    driver.memory.write(STATUS, &[0xee]).unwrap();
}

/// Sends a request with these data buffers; gives its status and how much was written.
#[track_caller]
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    set_header(driver, kind, sector);
    let mut pieces = vec![(HEADER, 16, false)];
    pieces.extend(data);
    pieces.push((STATUS, 1, true));
    let written = driver.request(0, &pieces);
    (driver.read(STATUS, 1)[0], written)
}

fn on_disk(image: &NamedTempFile, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    image.as_file().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn configuration_tells_capacity_and_limits() {
    let (driver, _image) = block(false);
    assert_eq!(driver.device_config::<8>(0), SECTORS.to_le_bytes());
    assert_eq!(driver.device_config::<4>(12), 254_u32.to_le_bytes());
    assert_eq!(driver.device_config::<4>(20), 512_u32.to_le_bytes());
    assert_eq!(driver.device_config::<4>(0x400), [0; 4]);
    let expected = [2, 6, 9, 13, 14]
        .iter()
        .fold(0, |bits, bit| bits | 1 << bit);
    assert_eq!(driver.offered() & 0xff_ffff, expected);
}

#[test]
fn read_scatters_into_buffers_of_any_size() {
    let (mut driver, _image) = block(false);
    let pieces = [
        (DATA, 1, true),
        (DATA + 0x2000, 1000, true),
        (RAM - 535, 535, true),
    ];
    assert_eq!(request(&mut driver, IN, 3, &pieces), (OK, 1537));
    let mut found = driver.read(DATA, 1);
    found.extend(driver.read(DATA + 0x2000, 1000));
    found.extend(driver.read(RAM - 535, 535));
    let expected: Vec<_> = (3 * 512..6 * 512).map(pattern).collect();
    assert_eq!(found, expected);
    driver.sink.wait(0x41);
}

#[test]
fn header_and_status_may_share_buffers_with_the_data() {
    let (mut driver, image) = block(false);
    // Header split, and its second half in one buffer with the data.
    set_header(&driver, OUT, 1);
    driver.memory.write(HEADER + 16, &[0x5a; 512]).unwrap();
    let pieces = [
        (HEADER, 3, false),
        (HEADER + 3, 525, false),
        (DATA, 1, true),
    ];
    assert_eq!(driver.request(0, &pieces), 1);
    assert_eq!(driver.read(DATA, 1), [OK]);
    assert_eq!(on_disk(&image, 512, 512), [0x5a; 512]);
    // Data and status in one.
    set_header(&driver, IN, 1);
    assert_eq!(
        driver.request(0, &[(HEADER, 16, false), (DATA, 513, true)]),
        513
    );
    assert_eq!(driver.read(DATA, 512), [0x5a; 512]);
    assert_eq!(driver.read(DATA + 512, 1), [OK]);
}

#[test]
fn request_with_as_many_buffers_as_allowed_is_served() {
    let (mut driver, image) = block(false);
    let table = BUFFERS + 0x10_0000;
    for (kind, write) in [(OUT, false), (IN, true)] {
        set_header(&driver, kind, 5);
        let mut pieces = vec![(HEADER, 16, false)];
        // Every second half-sector of a stretch of memory.
        pieces.extend((0..254).map(|index| (DATA + 512 * index, 256, write)));
        pieces.push((STATUS, 1, true));
        if kind == OUT {
            let data: Vec<_> = (0..254 * 512).map(|at| (at / 512) as u8).collect();
            driver.memory.write(DATA, &data).unwrap();
        } else {
            driver.memory.write(DATA, &[0xff; 254 * 512]).unwrap();
        }
        driver.describe(table, 0, &pieces);
        let desc = driver.rings[0].desc;
        driver.set_descriptor(desc, 9, (table, 256 * 16), (4, 0));
        driver.offer(0, 9);
        driver.ring(0);
        driver.wait_used(0);
        assert_eq!(driver.read(STATUS, 1), [OK]);
    }
    for index in 0..254 {
        let expected = [index as u8; 256];
        assert_eq!(on_disk(&image, 5 * 512 + 256 * index, 256), expected);
        assert_eq!(driver.read(DATA + 512 * index, 256), expected);
        assert_eq!(driver.read(DATA + 512 * index + 256, 256), [0xff; 256]);
    }
}

#[test]
fn what_was_written_is_read_back_after_flush() {
    let (mut driver, image) = block(false);
    driver.memory.write(DATA, &[0x77; 4096]).unwrap();
    assert_eq!(
        request(&mut driver, OUT, 8, &[(DATA, 4096, false)]),
        (OK, 1)
    );
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(
        request(&mut driver, IN, 8, &[(DATA + 0x1000, 4096, true)]),
        (OK, 4097)
    );
    assert_eq!(driver.read(DATA + 0x1000, 4096), [0x77; 4096]);
    assert_eq!(on_disk(&image, 4096, 4096), [0x77; 4096]);
    assert_eq!(on_disk(&image, 8192, 1), [pattern(8192)]);
}

#[test]
fn driver_without_flush_is_served() {
    let (mut driver, image) = block(false);
    driver.start(0);
    driver.memory.write(DATA, &[0x78; 512]).unwrap();
    assert_eq!(request(&mut driver, OUT, 0, &[(DATA, 512, false)]), (OK, 1));
    assert_eq!(on_disk(&image, 0, 512), [0x78; 512]);
}

#[test]
fn requests_beyond_the_end_or_of_odd_length_fail_and_touch_nothing() {
    let (mut driver, image) = block(false);
    driver.memory.write(DATA, &[0xcc; 2048]).unwrap();
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 511),
    ] {
        for (kind, write) in [(IN, true), (OUT, false)] {
            let result = request(&mut driver, kind, sector, &[(DATA, length, write)]);
            assert_eq!(result, (IO_ERROR, 1), "{kind} {sector:#x} {length}");
        }
    }
    assert_eq!(driver.read(DATA, 2048), [0xcc; 2048]);
    let end = (SECTORS - 1) * SECTOR;
    let expected: Vec<_> = (end..end + SECTOR).map(pattern).collect();
    assert_eq!(on_disk(&image, end, 512), expected);
    assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn image_that_shrank_underneath_gives_an_error_not_a_hang() {
    let (mut driver, image) = block(false);
    image.as_file().set_len(512).unwrap();
    let result = request(&mut driver, IN, 0, &[(DATA, 1024, true)]);
    assert_eq!(result, (IO_ERROR, 1));
}

#[test]
fn serial_is_padded_and_cut_to_the_room_there_is() {
    let (mut driver, _image) = block(false);
    driver.memory.write(DATA, &[0xff; 32]).unwrap();
    assert_eq!(
        request(&mut driver, GET_ID, 0, &[(DATA, 20, true)]),
        (OK, 21)
    );
    assert_eq!(driver.read(DATA, 20), *b"root-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(request(&mut driver, GET_ID, 0, &[(DATA, 4, true)]), (OK, 5));
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn write_zeroes_and_discard_clear_their_ranges_only() {
    let (mut driver, image) = block(false);
    for (kind, flags, sector) in [
        (WRITE_ZEROES, 0, 16),
        (WRITE_ZEROES, 1, 32),
        (DISCARD, 0, 48),
    ] {
        let mut ranges = range(sector, 8, flags);
        ranges.extend(range(sector + 9, 1, flags));
        driver.memory.write(DATA, &ranges).unwrap();
        assert_eq!(request(&mut driver, kind, 0, &[(DATA, 32, false)]), (OK, 1));
        for (at, cleared) in [(0, true), (7, true), (8, false), (9, true), (10, false)] {
            let byte = (sector + at) * SECTOR + 5;
            let expected = if cleared { 0 } else { pattern(byte) };
            // A host that cannot discard leaves the data.
            let found = on_disk(&image, byte, 1)[0];
            assert!(
                found == expected || kind == DISCARD && found == pattern(byte),
                "{kind} {at}"
            );
        }
    }
}

#[test]
fn bad_ranges_are_refused_before_any_is_touched() {
    let (mut driver, image) = block(false);
    let good = range(0, 1, 0);
    for (kind, bad, expected) in [
        (DISCARD, range(0, 1, 1), UNSUPPORTED),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED),
        (DISCARD, range(SECTORS, 1, 0), IO_ERROR),
        (DISCARD, range(u64::MAX, 1, 0), IO_ERROR),
        (WRITE_ZEROES, range(0, u32::MAX, 0), IO_ERROR),
        (WRITE_ZEROES, vec![0; 8], IO_ERROR),
        (WRITE_ZEROES, range(0, 0, 0).repeat(16), IO_ERROR),
    ] {
        let mut ranges = good.clone();
        ranges.extend(bad);
        driver.memory.write(DATA, &ranges).unwrap();
        let piece = (DATA, ranges.len() as u32, false);
        assert_eq!(request(&mut driver, kind, 0, &[piece]), (expected, 1));
    }
    assert_eq!(request(&mut driver, DISCARD, 0, &[]), (IO_ERROR, 1));
    assert_eq!(on_disk(&image, 5, 1), [pattern(5)]);
}

#[test]
fn read_only_disk_says_so_and_refuses_every_change() {
    let (mut driver, image) = block(true);
    assert_eq!(driver.offered() & 1 << 5, 1 << 5);
    driver
        .memory
        .write(DATA, &range(0, 1, 0).repeat(32))
        .unwrap();
    for (kind, length) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
        let result = request(&mut driver, kind, 0, &[(DATA, length, false)]);
        assert_eq!(result, (IO_ERROR, 1), "{kind}");
    }
    assert_eq!(request(&mut driver, IN, 0, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(on_disk(&image, 5, 1), [pattern(5)]);
}

#[test]
fn unknown_request_is_unsupported() {
    let (mut driver, _image) = block(false);
    assert_eq!(
        request(&mut driver, 99, 0, &[(DATA, 512, true)]),
        (UNSUPPORTED, 1)
    );
}

#[test]
fn request_without_header_or_status_breaks_the_device() {
    let cases: [&[Piece]; 4] = [
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(HEADER, 16, false)],
        &[(STATUS, 1, true)],
        &[(HEADER, 0, false)],
    ];
    for pieces in cases {
        let (mut driver, _image) = block(false);
        driver.send(0, 0, pieces);
        assert_eq!(
            driver.wait_for_failure(),
            ProtocolError::ShortRequest { queue: 0 }
        );
    }
}

#[test]
fn paused_device_leaves_memory_alone_until_it_goes_on() {
    let (mut driver, _image) = block(false);
    driver.bus.pause();
    set_header(&driver, IN, 0);
    driver.send(
        0,
        0,
        &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)],
    );
    assert_eq!(driver.read(STATUS, 1), [0xee]);
    driver.bus.resume();
    assert_eq!(driver.wait_used(0), (0, 513));
    assert_eq!(driver.read(STATUS, 1), [OK]);
}

#[test]
fn device_writes_are_traced() {
    struct Heard(std::sync::Mutex<Vec<(u64, u64)>>);
    impl TraceListener for Heard {
        fn written(&self, gpa: u64, length: u64) {
            self.0.lock().unwrap().push((gpa, length));
        }

        fn wants(&self, _gpa: u64) -> bool {
            true
        }
    }
    let (mut driver, _image) = block(false);
    let heard = Arc::new(Heard(std::sync::Mutex::default()));
    let traces = driver.memory.traces();
    traces.listen(TraceFlags::CODE, Arc::clone(&heard) as _);
    let page = driver.memory.page_index(DATA + 0x1000).unwrap();
    traces.set(page, TraceFlags::CODE);
    request(&mut driver, IN, 0, &[(DATA + 0xe00, 1024, true)]);
    assert_eq!(*heard.0.lock().unwrap(), [(DATA + 0x1000, 512)]);
}

#[test]
fn many_requests_in_flight_all_come_back() {
    let (mut driver, _image) = block(false);
    let features = driver.offered();
    driver.start(features);
    set_header(&driver, IN, 0);
    let desc = driver.rings[0].desc;
    for round in 0..50 {
        for index in 0..85 {
            let status = STATUS + u64::from(index);
            let data = DATA + 512 * u64::from(index);
            let pieces = [(HEADER, 16, false), (data, 512, true), (status, 1, true)];
            driver.describe(desc, 3 * index, &pieces);
            driver.offer(0, 3 * index);
            driver.ring(0);
        }
        let mut heads: Vec<_> = (0..85).map(|_| driver.wait_used(0).0 / 3).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..85).collect::<Vec<_>>(), "round {round}");
    }
    driver.sink.wait(0x41);
}

/// Whatever lies in the rings, the device either serves it or asks for a reset, and works after.
#[test]
fn rings_full_of_garbage_are_survived() {
    let (mut driver, _image) = block(false);
    let mut random = Random(0x5eed_0b10);
    let (mut served, mut broken) = (0, 0);
    for _ in 0..300 {
        driver.start(INDIRECT | EVENT_INDEX);
        let ring = driver.rings[0];
        let table = BUFFERS + 0x8000;
        for (target, index) in [ring.desc, table]
            .into_iter()
            .zip([0..256, 0..12])
            .flat_map(|(target, indices)| indices.map(move |index| (target, index)))
        {
            // Mostly header, data, status; each field is now and then something else.
            let mut bent = |usual: u64, other: [u64; 4]| match random.below(400) {
                pick @ 0..4 => other[pick as usize],
                _ => usual,
            };
            let data = DATA + 512 * u64::from(index);
            let usual = match (index % 3, index % 4) {
                (0, 0) if target != table => (table, 16 * 12, 4),
                (0, _) => (HEADER, 16, 1),
                (1, _) => (data, 512, 3),
                _ => (STATUS, 1, 2),
            };
            let gpa = bent(usual.0, [DATA, ring.desc, RAM - 8, u64::MAX]);
            let length = bent(usual.1, [0, 1, 4096, 0xffff_fff0]) as u32;
            let flags = bent(usual.2, [0, 1, 4, 0xffff]) as u16;
            let next = bent(u64::from(index) + 1, [0, 9, 255, 256]) as u16;
            driver.set_descriptor(target, index, (gpa, length), (flags, next));
        }
        set_header(&driver, random.below(14) as u32, random.below(SECTORS + 8));
        let offered = 1 + random.below(30) as u16;
        for _ in 0..offered {
            let inside = 3 * random.below(85);
            let head = if random.below(50) == 0 {
                random.below(260)
            } else {
                inside
            };
            driver.offer(0, head as u16);
        }
        driver.ring(0);
        eventually("served or broken", || {
            driver.used_index(0) == offered || driver.status() & NEEDS_RESET != 0
        });
        served += usize::from(driver.used_index(0));
        broken += usize::from(driver.status() & NEEDS_RESET != 0);
    }
    assert!(
        served > 1000 && (30..270).contains(&broken),
        "{served} {broken}"
    );
    driver.start(0);
    assert_eq!(request(&mut driver, IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn requests_that_wait_when_the_state_is_saved_are_served_after_it_is_restored() {
    // Given a disk that has served a request, with more in its queue when it is stopped
    let (mut driver, image) = block(false);
    assert_eq!(request(&mut driver, IN, 3, &[(DATA, 512, true)]).0, OK);
    driver.bus.pause();
    set_header(&driver, OUT, 5);
    driver.memory.write(DATA, &[0x77; 512]).unwrap();
    let pieces = [(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)];
    driver.send(0, 0, &pieces);
    driver.send(0, 8, &pieces);
    // When it goes on elsewhere
    let path = image.path().to_owned();
    let mut driver = driver.moved(|| Block::new(Disk::open(path, false).unwrap(), "root").unwrap());
    assert_eq!(driver.read(STATUS, 1), [0xee]);
    driver.bus.resume();
    // Then none of them is lost
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(driver.wait_used(0), (8, 1));
    assert_eq!(on_disk(&image, 5 * SECTOR, 512), [0x77; 512]);
    assert_eq!(request(&mut driver, IN, 5, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_disk_of_another_size_or_with_other_rights_is_refused() {
    let (driver, image) = block(false);
    driver.bus.pause();
    let state = driver.bus.save();
    drop(driver);
    let refused = |read_only: bool| {
        let disk = Disk::open(image.path(), read_only).unwrap();
        let other = Driver::new(Block::new(disk, "root").unwrap());
        other.bus.restore(&state).unwrap_err().to_string()
    };
    assert!(refused(true).contains("is read-only, and was writable"));
    image.as_file().set_len(512).unwrap();
    assert!(refused(false).contains("has 1 sectors"));
}
