use std::sync::{Arc, Mutex};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::driver::{
    BUFFERS, Driver, EVENT_INDEX, INDIRECT, NEEDS_RESET, RAM, Random, VERSION_1, common,
};
use crate::{Chain, DeviceState, DeviceType, SavedDevice};

#[derive(Default)]
struct Log {
    activations: Vec<u64>,
    doorbells: Vec<u16>,
    resets: usize,
    config: Vec<(u64, Vec<u8>)>,
}

/// Gives every request back at once, on the processor's thread.
struct Echo {
    log: Arc<Mutex<Log>>,
    queues: Vec<Option<Virtqueue>>,
    notifier: Option<Arc<Notifier>>,
}

impl Echo {
    fn new() -> (Self, Arc<Mutex<Log>>) {
        let log = Arc::new(Mutex::new(Log::default()));
        let echo = Self {
            log: Arc::clone(&log),
            queues: Vec::new(),
            notifier: None,
        };
        (echo, log)
    }
}

impl Device for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 4]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        self.log
            .lock()
            .unwrap()
            .config
            .push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) {
        self.log
            .lock()
            .unwrap()
            .activations
            .push(activation.features);
        self.queues = activation.queues;
        self.notifier = Some(activation.notifier);
    }
    fn notify(&mut self, queue: u16) {
        self.log.lock().unwrap().doorbells.push(queue);
        let mut chain = Chain::default();
        let Some(ring) = &mut self.queues[usize::from(queue)] else {
            return;
        };
        let mut echo = || -> Result<(), ProtocolError> {
            while ring.pop(&mut chain)? {
                ring.push(chain.head, chain.writable.len() as u32)?;
                ring.signal()?;
            }
            Ok(())
        };
        if let Err(error) = echo() {
            self.notifier.as_ref().unwrap().fail(error);
        }
    }
    fn reset(&mut self) {
        self.log.lock().unwrap().resets += 1;
        self.queues.clear();
    }
    fn pause(&mut self) {}
    fn resume(&mut self) {}
    fn save(&mut self) -> SavedDevice {
        let position = |queue: &Option<Virtqueue>| queue.as_ref().map(Virtqueue::position);
        let mut queues: Vec<_> = self.queues.iter().map(position).collect();
        queues.resize(2, None);
        SavedDevice {
            queues,
            state: DeviceState::Entropy,
        }
    }
    fn restore(
        &mut self,
        state: &DeviceState,
        activation: Option<Activation>,
    ) -> Result<(), StateError> {
        assert_eq!(*state, DeviceState::Entropy);
        if let Some(activation) = activation {
            self.activate(activation);
        }
        Ok(())
    }
}

fn echo() -> (Driver, Arc<Mutex<Log>>) {
    let (device, log) = Echo::new();
    (Driver::new(device), log)
}

#[test]
fn configuration_space_names_the_device_and_all_five_structures() {
    let (driver, _) = echo();
    assert_eq!(driver.config(0), 0x1044_1af4);
    assert_eq!(driver.config(8), 0xff00_0001);
    assert_eq!(driver.config(0x3c) >> 8 & 0xff, 1);
    let mut kinds: Vec<_> = driver.structures.keys().copied().collect();
    kinds.sort_unstable();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert!(driver.capabilities.contains_key(&0x11));
}

#[test]
fn negotiated_features_reach_the_device_and_settle() {
    let (mut driver, log) = echo();
    assert_eq!(
        driver.offered(),
        1 << 5 | VERSION_1 | EVENT_INDEX | INDIRECT
    );
    driver.start(1 << 5 | INDIRECT);
    driver.set_features(0);
    assert_eq!(
        log.lock().unwrap().activations,
        [1 << 5 | INDIRECT | VERSION_1]
    );
    driver.set_common(common::DRIVER_FEATURE_SELECT, &[0; 4]);
    let settled = u32::from_le_bytes(driver.common(common::DRIVER_FEATURE));
    assert_eq!(u64::from(settled), 1 << 5 | INDIRECT);
}

#[test]
fn features_ok_does_not_stick_for_legacy_or_unknown_features() {
    let (driver, log) = echo();
    for features in [0, 1 << 5, VERSION_1 | 1 << 6, VERSION_1 | 1 << 63] {
        driver.set_status(0);
        driver.set_status(0b0011);
        driver.set_features(features);
        driver.set_status(0b1011);
        assert_eq!(driver.status(), 0b0011, "{features:#x}");
    }
    // Whoever goes on all the same has broken the device.
    driver.set_status(0b0111);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(log.lock().unwrap().activations.is_empty());
}

#[test]
fn reset_forgets_queues_features_and_vectors() {
    let (mut driver, log) = echo();
    driver.start(0);
    driver.set_status(0);
    assert_eq!(log.lock().unwrap().resets, 1);
    driver.set_common(common::QUEUE_SELECT, &1_u16.to_le_bytes());
    assert_eq!(driver.common::<2>(common::QUEUE_SIZE), [4, 0]);
    assert_eq!(driver.common::<2>(common::QUEUE_ENABLE), [0, 0]);
    assert_eq!(driver.common::<8>(common::QUEUE_DESC), [0; 8]);
    assert_eq!(driver.common::<2>(common::QUEUE_VECTOR), [0xff, 0xff]);
    assert_eq!(driver.common::<2>(common::CONFIG_VECTOR), [0xff, 0xff]);
    driver.ring(0);
    assert!(log.lock().unwrap().doorbells.is_empty());
}

#[test]
fn each_queue_interrupts_with_its_own_message() {
    let (mut driver, _) = echo();
    driver.start(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    driver.request(1, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.sink.take(), [0x41, 0x42]);
    assert!(!driver.line.level());
    assert_eq!(driver.isr(), 0);
}

#[test]
fn without_msix_the_line_is_asserted_until_isr_is_read() {
    let (mut driver, _) = echo();
    driver.start_without_msix(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    assert!(driver.line.level());
    assert_eq!(driver.config(4) >> 16 & 8, 8);
    assert_eq!(driver.isr(), 1);
    assert!(!driver.line.level());
    assert_eq!(driver.config(4) >> 16 & 8, 0);
    assert_eq!(driver.isr(), 0);
    assert!(driver.sink.take().is_empty());
}

#[test]
fn intx_disable_releases_the_line_and_gives_it_back() {
    let (mut driver, _) = echo();
    driver.start_without_msix(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    driver.set_config(4, &0x0402_u16.to_le_bytes());
    assert!(!driver.line.level());
    driver.set_config(4, &0x0002_u16.to_le_bytes());
    assert!(driver.line.level());
}

#[test]
fn masked_vector_waits_in_the_pending_bits() {
    let (mut driver, _) = echo();
    driver.start(0);
    let control = driver.msix_table + 16 + 12;
    driver.poke(control, &1_u32.to_le_bytes());
    driver.request(0, &[(BUFFERS, 1, false)]);
    assert!(driver.sink.take().is_empty());
    let pba = driver.structures[&1] + MSIX_PBA.start;
    assert_eq!(driver.peek::<8>(pba), 2_u64.to_le_bytes());
    driver.poke(control, &0_u32.to_le_bytes());
    assert_eq!(driver.sink.take(), [0x41]);
}

#[test]
fn vector_beyond_the_table_reads_back_as_none() {
    let (driver, _) = echo();
    driver.set_common(common::CONFIG_VECTOR, &3_u16.to_le_bytes());
    assert_eq!(driver.common::<2>(common::CONFIG_VECTOR), [0xff, 0xff]);
    driver.set_common(common::CONFIG_VECTOR, &2_u16.to_le_bytes());
    assert_eq!(driver.common::<2>(common::CONFIG_VECTOR), [2, 0]);
}

#[test]
fn driver_that_wants_no_interrupts_gets_none() {
    let (mut driver, _) = echo();
    driver.start(0);
    driver.memory.write(driver.rings[0].avail, &[1, 0]).unwrap();
    driver.request(0, &[(BUFFERS, 1, false)]);
    assert!(driver.sink.take().is_empty());
}

#[test]
fn event_index_holds_interrupts_back_until_the_buffer_it_names() {
    let (mut driver, _) = echo();
    driver.start(EVENT_INDEX);
    let ring = driver.rings[0];
    let used_event = ring.avail + 4 + 2 * u64::from(ring.size);
    driver
        .memory
        .write(used_event, &2_u16.to_le_bytes())
        .unwrap();
    for _ in 0..2 {
        driver.send(0, 0, &[(BUFFERS, 1, false)]);
    }
    assert!(driver.sink.take().is_empty());
    driver.send(0, 0, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.sink.take(), [0x41]);
}

#[test]
fn queue_with_bad_size_or_place_breaks_the_device_at_driver_ok() {
    for (field, value) in [
        (common::QUEUE_SIZE, 0_u64),
        (common::QUEUE_SIZE, 3),
        (common::QUEUE_SIZE, 32),
        (common::QUEUE_DESC, 0x1_0001),
        (common::QUEUE_DRIVER, 0x1_0001),
        (common::QUEUE_DRIVER, 0),
        (common::QUEUE_DEVICE, 0x1_0002),
        (common::QUEUE_DEVICE, RAM),
        (common::QUEUE_DESC, !0xf),
    ] {
        let (driver, log) = echo();
        driver.enable_msix();
        driver.prepare(0);
        driver.set_common(common::CONFIG_VECTOR, &[0, 0]);
        for place in [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ] {
            driver.set_common(place, &(0x1_0000 + 0x1000 * place).to_le_bytes());
        }
        let width = if field == common::QUEUE_SIZE { 2 } else { 8 };
        driver.set_common(field, &value.to_le_bytes()[..width]);
        driver.set_common(common::QUEUE_ENABLE, &[1, 0]);
        driver.set_status(0b1111);
        assert_eq!(driver.status(), 0b1111 | NEEDS_RESET, "{field} {value:#x}");
        assert_eq!(driver.sink.take(), [0x40]);
        assert!(log.lock().unwrap().activations.is_empty());
    }
}

#[test]
fn enabled_queue_does_not_move() {
    let (mut driver, _) = echo();
    driver.start(0);
    driver.set_common(common::QUEUE_SELECT, &[0, 0]);
    driver.set_common(common::QUEUE_DESC, &[0xff; 8]);
    driver.set_common(common::QUEUE_SIZE, &[1, 0]);
    assert_eq!(
        driver.common::<8>(common::QUEUE_DESC),
        0x1_0000_u64.to_le_bytes()
    );
    assert_eq!(driver.common::<2>(common::QUEUE_SIZE), [16, 0]);
}

#[test]
fn queue_that_does_not_exist_reads_as_zero() {
    let (driver, _) = echo();
    driver.set_common(common::QUEUE_SELECT, &[2, 0]);
    driver.set_common(common::QUEUE_SIZE, &[8, 0]);
    driver.set_common(common::QUEUE_ENABLE, &[1, 0]);
    driver.set_common(common::QUEUE_VECTOR, &[1, 0]);
    assert_eq!(driver.common::<2>(common::QUEUE_SIZE), [0, 0]);
    assert_eq!(driver.common::<2>(common::QUEUE_ENABLE), [0, 0]);
    assert_eq!(driver.common::<2>(common::QUEUE_VECTOR), [0xff, 0xff]);
}

#[test]
fn window_is_reached_through_configuration_space_too() {
    let (driver, log) = echo();
    let access = driver.capabilities[&0x105];
    let place = |offset: u32, length: u32| {
        driver.set_config(access + 8, &offset.to_le_bytes());
        driver.set_config(access + 12, &length.to_le_bytes());
    };
    place(common::NUM_QUEUES as u32, 2);
    assert_eq!(driver.config(access + 16) & 0xffff, 2);
    place(DEVICE_CONFIG.start as u32 + 6, 2);
    driver.set_config(access + 16, &[7, 8, 9, 9]);
    assert_eq!(log.lock().unwrap().config, [(6, vec![7, 8])]);
    // Where it points nowhere, nothing happens.
    for (offset, length) in [(1, 2), (0, 3), (0x8000, 4), (u32::MAX - 3, 4)] {
        place(offset, length);
        driver.set_config(access + 16, &[1; 4]);
        driver.config(access + 16);
    }
    assert_eq!(log.lock().unwrap().config.len(), 1);
}

#[test]
fn machine_reset_puts_function_and_device_back() {
    let (mut driver, log) = echo();
    driver.start(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    driver.sink.take();
    driver.bus.reset();
    assert_eq!(driver.status(), 0);
    assert_eq!(log.lock().unwrap().resets, 1);
    let at = driver.capabilities[&0x11];
    assert_eq!(driver.config(at) >> 31, 0);
    driver.start(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.sink.take(), [0x41]);
}

#[test]
fn chains_of_every_lawful_shape_are_taken() {
    let (mut driver, _) = echo();
    driver.start(INDIRECT);
    let table = BUFFERS + 0x1_0000;
    // All entries, in one chain.
    let full: Vec<_> = (0..16).map(|_| (BUFFERS, 1, true)).collect();
    assert_eq!(driver.request(0, &full), 16);
    // Empty buffers count for nothing.
    assert_eq!(
        driver.request(0, &[(BUFFERS, 0, false), (BUFFERS, 0, true)]),
        0
    );
    // One entry, then a table (2.7.5.3.2).
    driver.describe(table, 0, &[(BUFFERS, 4, true), (RAM - 4, 4, true)]);
    let desc = driver.rings[0].desc;
    driver.set_descriptor(desc, 0, (BUFFERS, 1), (1, 7));
    driver.set_descriptor(desc, 7, (table, 32), (4, 0));
    driver.offer(0, 0);
    driver.ring(0);
    assert_eq!(driver.wait_used(0), (0, 2));
    // A table with more entries than the ring, though no more than the device's largest.
    driver.set_status(0);
    driver.prepare(INDIRECT);
    driver.set_queues_up(2);
    driver.set_status(0b1111);
    driver.describe(table, 0, &full);
    driver.set_descriptor(driver.rings[0].desc, 1, (table, 256), (4, 0));
    driver.offer(0, 1);
    driver.ring(0);
    assert_eq!(driver.wait_used(0), (1, 16));
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn unlawful_chains_break_the_device_and_a_reset_heals_it() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const TABLE: u16 = 4;
    let table = BUFFERS + 0x1_0000;
    type Descriptors<'a> = &'a [(u64, u32, u16, u16)];
    let cases: [(Descriptors<'_>, &str); 11] = [
        (&[(BUFFERS, 1, NEXT, 0)], "too long"),
        (&[(BUFFERS, 1, NEXT, 1), (BUFFERS, 0, NEXT, 0)], "too long"),
        (&[(BUFFERS, 1, NEXT, 16)], "descriptor 16"),
        (&[(RAM - 1, 2, 0, 0)], "not all RAM"),
        (&[(u64::MAX, 1, WRITE, 0)], "not all RAM"),
        (&[(0, u32::MAX, WRITE, 0)], "not all RAM"),
        (
            &[(BUFFERS, 1, NEXT | WRITE, 1), (BUFFERS, 1, 0, 0)],
            "after a writable",
        ),
        (&[(table, 8, TABLE, 0)], "indirect"),
        (&[(table, 0, TABLE, 0)], "indirect"),
        (&[(table, 16, TABLE | NEXT, 1)], "indirect"),
        (&[(RAM, 16, TABLE, 0)], "not all RAM"),
    ];
    let (mut driver, _) = echo();
    for (descriptors, why) in cases {
        driver.start(INDIRECT);
        let desc = driver.rings[0].desc;
        for (index, &(gpa, length, flags, next)) in (0..).zip(descriptors) {
            driver.set_descriptor(desc, index, (gpa, length), (flags, next));
        }
        driver.sink.take();
        driver.offer(0, 0);
        driver.ring(0);
        let failure = driver.wait_for_failure().to_string();
        assert!(failure.contains(why), "{failure}, not {why}");
        assert_eq!(driver.sink.take(), [0x40]);
        assert_eq!(driver.take_used(0), None);

        driver.start(INDIRECT);
        assert_eq!(driver.request(0, &[(BUFFERS, 1, true)]), 1);
    }
}

#[test]
fn table_inside_a_table_and_tables_not_negotiated_are_refused() {
    let table = BUFFERS;
    for features in [INDIRECT, 0] {
        let (mut driver, _) = echo();
        driver.start(features);
        driver.set_descriptor(table, 0, (table, 16), (4, 0));
        driver.set_descriptor(driver.rings[0].desc, 0, (table, 16), (4, 0));
        driver.offer(0, 0);
        driver.ring(0);
        assert_eq!(
            driver.wait_for_failure(),
            ProtocolError::Indirect { queue: 0 }
        );
    }
}

#[test]
fn wild_available_index_breaks_the_device() {
    let (mut driver, log) = echo();
    driver.start(0);
    let index = 17_u16.to_le_bytes();
    driver
        .memory
        .write(driver.rings[0].avail + 2, &index)
        .unwrap();
    driver.ring(0);
    assert_eq!(
        driver.wait_for_failure(),
        ProtocolError::AvailableIndex { queue: 0 }
    );
    // It hears no doorbell until it is reset.
    driver.ring(0);
    assert_eq!(log.lock().unwrap().doorbells, [0]);
}

#[test]
fn any_register_access_is_survived() {
    let (mut driver, _) = echo();
    let base = driver.structures[&1];
    let mut random = Random(0x5eed_0001);
    for round in 0..200_000 {
        // The window soon moves away, or closes.
        if round % 500 == 0 {
            driver.bus.reset();
            driver.start(INDIRECT);
        }
        let length = 1 + random.below(8) as usize;
        let bytes = random.next().to_le_bytes();
        let gpa = if random.below(4) == 0 {
            driver.config_gpa(random.below(0x100))
        } else {
            // Mostly the common structure.
            let region = [0x40, 0x40, 0x40, BAR_LENGTH][random.below(4) as usize];
            base + random.below(region)
        };
        // Messages go to addresses that the guest chose: not to be checked by the sink.
        let table = base + MSIX_TABLE.start;
        if random.below(2) == 0 {
            driver.bus.memory_read(gpa, &mut [0; 8][..length]);
        } else if !(table..table + MSIX_TABLE.length).contains(&(gpa + 7)) {
            driver.bus.memory_write(gpa, &bytes[..length]);
        }
    }
    driver.sink.take();
    driver.bus.reset();
    driver.start(0);
    driver.request(0, &[(BUFFERS, 1, false)]);
    assert_eq!(driver.sink.take(), [0x41]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_restored_function_reads_and_saves_as_the_one_that_was_saved(
        runs in any::<bool>(),
        writes in vec((prop_oneof![0u64..0x40, 0x4000u64..0x4040], any::<u16>()), 0..24),
    ) {
        let (mut driver, _) = echo();
        if runs {
            driver.start(1 << 5);
            driver.request(0, &[(BUFFERS, 8, true)]);
        }
        let window = driver.structures[&1];
        for (offset, value) in writes {
            // A reset would leave little to look at.
            let resets = (19..=20).contains(&offset);
            driver.poke(window + offset, &if resets { [0xff; 2] } else { value.to_le_bytes() });
        }
        let common = |driver: &Driver| -> Vec<[u8; 4]> {
            (0..0x40).step_by(4).map(|field| driver.common(field)).collect()
        };
        let before = common(&driver);

        let (device, _) = Echo::new();
        let restored = driver.moved(|| device);

        prop_assert_eq!(common(&restored), before);
    }

    #[test]
    fn a_state_with_any_number_changed_is_refused_or_does_no_harm(
        index in 0usize..24,
        to in prop_oneof![any::<u64>(), 0u64..0x1_0000, Just(u64::MAX)],
    ) {
        let (mut driver, _) = echo();
        driver.start(1 << 5 | EVENT_INDEX);
        driver.request(0, &[(BUFFERS, 8, true)]);
        let (device, _) = Echo::new();
        if let Some(mut changed) = driver.takes_changed(index, to, || device) {
            changed.send(0, 0, &[(BUFFERS, 8, true)]);
            changed.bus.reset();
        }
    }
}

#[test]
fn a_line_that_is_held_is_held_after_a_restore_and_falls_when_its_cause_is_read() {
    let (mut driver, _) = echo();
    driver.start_without_msix(0);
    driver.request(0, &[(BUFFERS, 8, true)]);
    assert!(driver.line.level());
    let (device, _) = Echo::new();
    let restored = driver.moved(|| device);
    assert!(restored.line.level());
    assert_eq!(restored.isr(), 1);
    assert!(!restored.line.level());
}

#[test]
fn a_broken_device_stays_broken_until_it_is_reset() {
    let (mut driver, _) = echo();
    driver.start(0);
    driver.offer(0, 99);
    driver.ring(0);
    driver.wait_for_failure();
    let (device, log) = Echo::new();
    let mut restored = driver.moved(|| device);
    restored.ring(0);
    assert_eq!(restored.status() & NEEDS_RESET, NEEDS_RESET);
    assert!(log.lock().unwrap().doorbells.is_empty());
    restored.start(0);
    restored.request(0, &[(BUFFERS, 8, true)]);
}
