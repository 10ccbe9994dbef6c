use super::*;
use crate::effects::ResetCause;
use crate::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE};

const X2APIC: u64 = map::LOCAL_APIC_ADDRESS | 0xc00;
const MSR_EOI: u32 = 0x80b;
const MSR_ICR: u32 = 0x830;

fn chipset(cpus: usize) -> Chipset {
    Chipset::new(ChipsetConfig {
        cpus,
        com2: true,
        ..ChipsetConfig::default()
    })
    .unwrap()
}

/// All vCPUs in x2APIC mode and enabled; LINT0 masked, the 8259As left alone.
fn x2apic(cpus: usize) -> Chipset {
    let mut chipset = chipset(cpus);
    for cpu in 0..cpus {
        chipset
            .apic_msr_write(cpu, MSR_APIC_BASE, X2APIC, 0)
            .unwrap();
        chipset.apic_msr_write(cpu, 0x80f, 0x1ff, 0).unwrap();
        chipset.apic_msr_write(cpu, 0x835, 0x1_0700, 0).unwrap();
    }
    chipset
}

/// The 8259As as Linux sets them up, with `unmasked` interrupts let through.
fn with_pics(chipset: &mut Chipset, unmasked: u16) {
    for (port, vector, cascade, mask) in [
        (0x20, 0x30, 4, !unmasked as u8 & !4),
        (0xa0, 0x38, 2, (!unmasked >> 8) as u8),
    ] {
        for (port, value) in [
            (port, 0x11),
            (port + 1, vector),
            (port + 1, cascade),
            (port + 1, 1),
            (port + 1, mask),
        ] {
            assert!(chipset.port_write(port, 1, value.into(), 0));
        }
    }
}

fn redirect(chipset: &mut Chipset, pin: u32, entry: u64) {
    for (index, value) in [
        (0x11 + 2 * pin, (entry >> 32) as u32),
        (0x10 + 2 * pin, entry as u32),
    ] {
        chipset.mmio_write(0, map::IO_APIC_ADDRESS, &index.to_le_bytes(), 0);
        chipset.mmio_write(0, map::IO_APIC_ADDRESS + 0x10, &value.to_le_bytes(), 0);
    }
}

fn end(chipset: &mut Chipset, cpu: usize) {
    chipset.apic_msr_write(cpu, MSR_EOI, 0, 0).unwrap();
}

fn signals(chipset: &mut Chipset) -> Vec<(usize, CpuSignal)> {
    chipset
        .take_effects()
        .signals
        .iter()
        .map(|signal| (signal.cpu, signal.kind))
        .collect()
}

const LEVEL: u64 = 1 << 15;

#[test]
fn configurations_that_cannot_be_are_refused() {
    let config = ChipsetConfig::default;
    let build = |config| Chipset::new(config).err();
    assert_eq!(
        build(ChipsetConfig {
            cpus: 0,
            ..config()
        }),
        Some(ConfigError::Cpus(0))
    );
    assert_eq!(
        build(ChipsetConfig {
            cpus: 256,
            ..config()
        }),
        Some(ConfigError::Cpus(256))
    );
    assert_eq!(
        build(ChipsetConfig {
            tsc_hz: 0,
            ..config()
        }),
        Some(ConfigError::TscRate)
    );
    assert_eq!(
        build(ChipsetConfig {
            physical_address_bits: 64,
            ..config()
        }),
        Some(ConfigError::PhysicalAddressBits(64))
    );
    assert_eq!(
        build(ChipsetConfig {
            cpus: 255,
            ..config()
        }),
        None
    );
}

#[test]
fn pit_interrupts_through_the_pic_in_virtual_wire_mode() {
    let mut chipset = chipset(1);
    with_pics(&mut chipset, 1 << 0);
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        chipset.port_write(port, 1, value, 0);
    }
    let due = chipset.next_deadline().unwrap();
    assert!((10_000_000..10_002_000).contains(&due), "{due}");
    chipset.advance(due - 1);
    assert!(!chipset.interrupt_pending(0));
    chipset.advance(due);
    assert_eq!(signals(&mut chipset), [(0, CpuSignal::Interrupt)]);
    assert_eq!(chipset.take_interrupt(0), Some(0x30));
    assert!(!chipset.interrupt_pending(0));
    chipset.port_write(0x20, 1, 0x20, due);
    let next = chipset.next_deadline().unwrap();
    chipset.advance(next);
    assert_eq!(chipset.take_interrupt(0), Some(0x30));
}

#[test]
fn pit_comes_in_at_pin_2_of_the_io_apic() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 2, 0x31);
    let due = chipset.next_deadline().unwrap();
    chipset.advance(due);
    assert_eq!(chipset.take_interrupt(0), Some(0x31));
}

#[test]
fn timer_masked_everywhere_has_no_deadline() {
    let mut chipset = x2apic(1);
    assert_eq!(chipset.next_deadline(), None);
    // Let through by the 8259A, but stopped at LINT0.
    with_pics(&mut chipset, 1 << 0);
    assert_eq!(chipset.next_deadline(), None);
    chipset.apic_msr_write(0, 0x835, 0x700, 0).unwrap();
    assert!(chipset.next_deadline().is_some());
}

#[test]
fn tick_of_a_masked_timer_waits_at_the_8259a() {
    let mut chipset = chipset(1);
    with_pics(&mut chipset, 0);
    let hour = 3_600_000_000_000;
    chipset.port_write(0x21, 1, 0xfe, hour);
    assert_eq!(chipset.take_interrupt(0), Some(0x30));
}

#[test]
fn external_line_reaches_pic_and_io_apic() {
    let mut chipset = chipset(1);
    with_pics(&mut chipset, 1 << 5);
    chipset.set_line(5, true, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x35));
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 5, 0x45);
    chipset.set_line(5, true, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x45));
}

/// A level-triggered interrupt whose line is still high at end of interrupt is delivered again.
#[test]
fn level_interrupt_is_redelivered_until_the_line_falls() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 17, 0x51 | LEVEL);
    chipset.set_line(17, true, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x51));
    assert!(!chipset.interrupt_pending(0));
    end(&mut chipset, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x51));
    chipset.set_line(17, false, 0);
    end(&mut chipset, 0);
    assert!(!chipset.interrupt_pending(0));
}

#[test]
fn level_interrupt_waits_for_an_apic_that_is_disabled() {
    let mut chipset = x2apic(1);
    chipset.apic_msr_write(0, 0x80f, 0xff, 0).unwrap();
    redirect(&mut chipset, 17, 0x51 | LEVEL);
    chipset.set_line(17, true, 0);
    assert!(!chipset.interrupt_pending(0));
    chipset.apic_msr_write(0, 0x80f, 0x1ff, 0).unwrap();
    assert_eq!(chipset.take_interrupt(0), Some(0x51));
}

#[test]
fn gsi_out_of_range_is_ignored() {
    let mut chipset = x2apic(1);
    chipset.set_line(24, true, 0);
    chipset.set_line(u32::MAX, true, 0);
    assert!(!chipset.has_effects());
}

#[test]
fn shared_line_stays_high_until_every_source_released_it() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, map::SCI_GSI, 0x59 | LEVEL);
    chipset.port_write(map::PM1A_EVENT_PORT + 2, 2, 1 << 8, 0);
    chipset.set_line(map::SCI_GSI, true, 0);
    chipset.press_power_button(0);
    chipset.set_line(map::SCI_GSI, false, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x59));
    end(&mut chipset, 0);
    assert!(chipset.interrupt_pending(0));
    chipset.port_write(map::PM1A_EVENT_PORT, 2, 1 << 8, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x59));
    end(&mut chipset, 0);
    assert!(!chipset.interrupt_pending(0));
}

#[test]
fn message_signalled_interrupt_reaches_its_processor() {
    let mut chipset = x2apic(3);
    chipset.send_msi(0xfee0_2000, 0x41);
    assert_eq!(signals(&mut chipset), [(2, CpuSignal::Interrupt)]);
    assert_eq!(chipset.take_interrupt(2), Some(0x41));
    chipset.send_msi(0xfee0_9000, 0x41);
    chipset.send_msi(0x1000, 0x41);
    assert!(!chipset.has_effects());
}

#[test]
fn lowest_priority_goes_to_the_least_busy_and_takes_turns() {
    let mut chipset = x2apic(3);
    chipset.set_cr8(0, 9);
    let took = [0x41, 0x42, 0x43, 0x44].map(|vector| {
        // Logical: processors 0 to 2 of cluster 0.
        chipset.send_msi(0xfee0_700c, vector);
        let cpu = (0..3).find(|&cpu| chipset.take_interrupt(cpu) == Some(vector as u8));
        end(&mut chipset, cpu.unwrap());
        cpu
    });
    assert_eq!(took, [Some(1), Some(2), Some(1), Some(2)]);
}

#[test]
fn ipi_shorthands_reach_whom_they_name() {
    let mut chipset = x2apic(3);
    let cases: [(u64, [bool; 3]); 3] = [
        (1, [false, true, false]),
        (2, [true, true, true]),
        (3, [true, false, true]),
    ];
    for (shorthand, expected) in cases {
        chipset
            .apic_msr_write(1, MSR_ICR, shorthand << 18 | 0x51, 0)
            .unwrap();
        let taken = [0, 1, 2].map(|cpu| chipset.take_interrupt(cpu) == Some(0x51));
        assert_eq!(taken, expected);
        (0..3).for_each(|cpu| end(&mut chipset, cpu));
    }
}

#[test]
fn ipi_reaches_every_logical_destination() {
    let mut chipset = x2apic(4);
    chipset
        .apic_msr_write(0, MSR_ICR, 0x0000_000a_0000_0851, 0)
        .unwrap();
    assert_eq!(
        [0, 1, 2, 3].map(|cpu| chipset.interrupt_pending(cpu)),
        [false, true, false, true]
    );
}

/// How Linux starts a processor: INIT, de-assert, two start-up IPIs.
#[test]
fn start_up_sequence_is_signalled() {
    let mut chipset = x2apic(2);
    for icr in [0xc500, 0x8500, 0x469a, 0x69a] {
        chipset
            .apic_msr_write(0, MSR_ICR, 1 << 32 | icr, 0)
            .unwrap();
    }
    assert_eq!(
        signals(&mut chipset),
        [
            (1, CpuSignal::Init),
            (1, CpuSignal::Sipi(0x9a)),
            (1, CpuSignal::Sipi(0x9a))
        ]
    );
}

#[test]
fn init_resets_the_local_apic() {
    let mut chipset = x2apic(2);
    chipset.send_msi(0xfee0_1000, 0x41);
    chipset.apic_msr_write(1, 0x832, 0x30, 0).unwrap();
    chipset.apic_msr_write(1, 0x838, 1000, 0).unwrap();
    chipset
        .apic_msr_write(0, MSR_ICR, 1 << 32 | 0x4500, 0)
        .unwrap();
    assert!(!chipset.interrupt_pending(1));
    assert_eq!(chipset.next_deadline(), None);
}

#[test]
fn nmi_is_signalled() {
    let mut chipset = x2apic(2);
    chipset
        .apic_msr_write(0, MSR_ICR, 3 << 18 | 0x400, 0)
        .unwrap();
    assert_eq!(signals(&mut chipset), [(1, CpuSignal::Nmi)]);
}

#[test]
fn pending_changes_with_the_task_priority() {
    let mut chipset = x2apic(1);
    chipset.set_cr8(0, 5);
    chipset.send_msi(0xfee0_0000, 0x55);
    assert!(!chipset.interrupt_pending(0));
    assert_eq!(chipset.take_interrupt(0), None);
    chipset.set_cr8(0, 4);
    assert_eq!(chipset.cr8(0), 4);
    assert_eq!(signals(&mut chipset), [(0, CpuSignal::Interrupt)]);
    assert_eq!(chipset.take_interrupt(0), Some(0x55));
}

#[test]
fn tsc_deadline_is_the_next_deadline_and_interrupts() {
    let mut chipset = x2apic(2);
    chipset.apic_msr_write(1, 0x832, 2 << 17 | 0xef, 0).unwrap();
    chipset
        .apic_msr_write(1, MSR_TSC_DEADLINE, 5000, 100)
        .unwrap();
    assert_eq!(chipset.next_deadline(), Some(5000));
    chipset.advance(5000);
    assert_eq!(chipset.take_interrupt(1), Some(0xef));
    assert_eq!(chipset.next_deadline(), None);
}

#[test]
fn tsc_deadline_set_late_interrupts_at_once() {
    let mut chipset = x2apic(1);
    chipset.apic_msr_write(0, 0x832, 2 << 17 | 0xef, 0).unwrap();
    chipset
        .apic_msr_write(0, MSR_TSC_DEADLINE, 50, 100)
        .unwrap();
    assert!(chipset.interrupt_pending(0));
}

#[test]
fn xapic_page_is_its_own_processors() {
    let mut chipset = chipset(2);
    for cpu in 0..2 {
        let mut id = [0; 4];
        assert!(chipset.mmio_read(cpu, map::LOCAL_APIC_ADDRESS + 0x20, &mut id, 0));
        assert_eq!(u32::from_le_bytes(id), (cpu as u32) << 24);
    }
    chipset.apic_msr_write(0, MSR_APIC_BASE, X2APIC, 0).unwrap();
    assert!(!chipset.mmio_read(0, map::LOCAL_APIC_ADDRESS, &mut [0; 4], 0));
    assert_eq!(
        (chipset.apic_page(0), chipset.apic_page(1)),
        (None, Some(map::LOCAL_APIC_ADDRESS))
    );
}

#[test]
fn processor_that_is_not_there_has_no_apic() {
    let mut chipset = chipset(1);
    assert_eq!(
        chipset.apic_msr_read(1, MSR_APIC_BASE, 0),
        Err(GeneralProtection)
    );
    assert_eq!(
        chipset.apic_msr_write(1, MSR_APIC_BASE, X2APIC, 0),
        Err(GeneralProtection)
    );
    assert!(!chipset.mmio_read(1, map::LOCAL_APIC_ADDRESS, &mut [0; 4], 0));
    assert!(!chipset.interrupt_pending(7));
    assert_eq!(chipset.take_interrupt(7), None);
}

#[test]
fn serial_output_and_input_with_interrupts() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 4, 0x44);
    chipset.port_write(0x3fc, 1, 0x0b, 0);
    chipset.port_write(0x3f9, 1, 0x01, 0);
    for byte in *b"hi" {
        chipset.port_write(0x3f8, 1, byte.into(), 0);
    }
    assert_eq!(chipset.take_effects().serial[0], b"hi");
    assert_eq!(chipset.serial_receive(0, b"xy", 0), 1);
    assert_eq!(chipset.take_interrupt(0), Some(0x44));
    assert_eq!(chipset.port_read(0x3f8, 1, 0), Some(b'x'.into()));
    assert!(chipset.take_effects().serial_room[0]);
}

/// The transmitter-empty interrupt is an edge for each byte, although no time passes.
#[test]
fn every_byte_sent_is_an_edge_at_the_io_apic() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 4, 0x44);
    chipset.port_write(0x3fc, 1, 0x0b, 0);
    chipset.port_write(0x3f9, 1, 0x02, 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x44));
    end(&mut chipset, 0);
    chipset.port_write(0x3f8, 1, b'x'.into(), 0);
    assert_eq!(chipset.take_interrupt(0), Some(0x44));
}

#[test]
fn second_serial_port_is_there_if_configured() {
    assert_eq!(chipset(1).port_read(0x2fb, 1, 0), Some(3));
    assert_eq!(
        Chipset::new(ChipsetConfig::default())
            .unwrap()
            .port_read(0x2fb, 1, 0),
        None
    );
}

#[test]
fn keys_interrupt_one_after_the_other() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 1, 0x41);
    chipset.key(0x1e, true, 0);
    chipset.key(0x1e, false, 0);
    for expected in [0x1e, 0x9e] {
        assert_eq!(chipset.take_interrupt(0), Some(0x41));
        assert_eq!(chipset.port_read(0x60, 1, 0), Some(expected));
        end(&mut chipset, 0);
    }
    assert!(!chipset.interrupt_pending(0));
}

#[test]
fn power_off_reset_and_exit_are_requested() {
    let request = |writes: &[(u16, u8, u32)]| {
        let mut chipset = chipset(1);
        for &(port, size, value) in writes {
            assert!(chipset.port_write(port, size, value, 0));
        }
        chipset.take_effects().power
    };
    let off = u32::from(map::SLEEP_TYPE_S5) << 10 | 1 << 13;
    assert_eq!(
        request(&[(map::PM1A_CONTROL_PORT, 2, off)]),
        Some(PowerRequest::Off)
    );
    assert_eq!(request(&[(map::PM1A_CONTROL_PORT, 2, 1 << 13)]), None);
    let reset = |cause| Some(PowerRequest::Reset(cause));
    assert_eq!(
        request(&[(map::RESET_PORT, 1, map::RESET_VALUE.into())]),
        reset(ResetCause::ResetControl)
    );
    assert_eq!(request(&[(map::RESET_PORT, 1, 2)]), None);
    assert_eq!(
        request(&[(0x64, 1, 0xfe)]),
        reset(ResetCause::KeyboardController)
    );
    assert_eq!(request(&[(0x92, 1, 1)]), reset(ResetCause::FastReset));
    assert_eq!(
        request(&[(map::DEBUG_EXIT_PORT, 4, 3)]),
        Some(PowerRequest::Exit(7))
    );
    assert_eq!(
        request(&[(0x64, 1, 0xfe), (map::DEBUG_EXIT_PORT, 1, 0)]),
        reset(ResetCause::KeyboardController)
    );
}

#[test]
fn pci_configuration_is_left_to_pci() {
    let mut chipset = chipset(1);
    assert!(!chipset.port_write(0xcf8, 4, 0x8000_0600, 0));
    assert_eq!(chipset.port_read(0xcf8, 4, 0), None);
    assert_eq!(chipset.port_read(0xcfc, 2, 0), None);
    assert!(!chipset.has_effects());
}

#[test]
fn wide_accesses_are_split_into_bytes() {
    let mut chipset = chipset(1);
    chipset.port_write(0x20, 2, 0x5500 | 0x0b, 0);
    assert_eq!(chipset.port_read(0x21, 1, 0), Some(0x55));
    // Port 0x21 is the master's mask; nobody answers at 0x22 to 0x24.
    assert_eq!(chipset.port_read(0x21, 4, 0), Some(0xffff_ff55));
    let ticks = chipset.port_read(map::PM_TIMER_PORT, 4, 1_000_000_000);
    assert_eq!(ticks, Some(3_579_545));
}

#[test]
fn ports_of_nobody_are_unclaimed() {
    let mut chipset = chipset(1);
    for port in [0x00, 0x0f, 0x2e8, 0x1f7, 0x5ff, 0x640, 0xffff] {
        assert_eq!(chipset.port_read(port, 1, 0), None, "{port:#x}");
        assert!(!chipset.port_write(port, 1, 0, 0), "{port:#x}");
    }
    assert_eq!(chipset.port_read(0x80, 1, 0), Some(0));
}

#[test]
fn debug_console_collects_bytes() {
    let mut chipset = chipset(1);
    assert_eq!(chipset.port_read(0xe9, 1, 0), Some(0xe9));
    chipset.port_write(0xe9, 1, b'!'.into(), 0);
    let mut effects = Effects::default();
    chipset.swap_effects(&mut effects);
    assert_eq!(effects.debug, b"!");
    assert!(!chipset.has_effects());
}

#[test]
fn legacy_hpet_takes_over_from_the_pit() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 2, 0x31);
    let hpet = |chipset: &mut Chipset, offset: u64, value: u64| {
        assert!(chipset.mmio_write(0, map::HPET_ADDRESS + offset, &value.to_le_bytes(), 0));
    };
    hpet(&mut chipset, 0x10, 3);
    assert_eq!(chipset.next_deadline(), None);
    hpet(&mut chipset, 0x100, 0x4c);
    hpet(&mut chipset, 0x108, 100_000);
    for tick in 1..5 {
        assert_eq!(chipset.next_deadline(), Some(tick * 1_000_000));
        chipset.advance(tick * 1_000_000);
        assert_eq!(chipset.take_interrupt(0), Some(0x31));
        end(&mut chipset, 0);
    }
}

#[test]
fn rtc_interrupts_at_irq_8_until_register_c_is_read() {
    let mut chipset = x2apic(1);
    redirect(&mut chipset, 8, 0x48);
    for (port, value) in [(0x70, 0x0b), (0x71, 0x42)] {
        chipset.port_write(port, 1, value, 0);
    }
    for _ in 0..3 {
        let due = chipset.next_deadline().unwrap();
        chipset.advance(due);
        assert_eq!(chipset.take_interrupt(0), Some(0x48));
        end(&mut chipset, 0);
        assert_eq!(chipset.next_deadline(), None);
        chipset.port_write(0x70, 1, 0x0c, due);
        assert_eq!(chipset.port_read(0x71, 1, due), Some(0xc0));
    }
}

#[test]
fn time_that_seems_to_run_backwards_is_held() {
    let mut chipset = chipset(1);
    let late = chipset.port_read(map::PM_TIMER_PORT, 4, 2_000_000_000);
    assert_eq!(
        chipset.port_read(map::PM_TIMER_PORT, 4, 1_000_000_000),
        late
    );
}

#[test]
fn clones_behave_alike() {
    let mut one = x2apic(2);
    redirect(&mut one, 2, 0x31);
    let mut other = one.clone();
    for chipset in [&mut one, &mut other] {
        let due = chipset.next_deadline().unwrap();
        chipset.advance(due);
    }
    assert_eq!(one.take_interrupt(0), other.take_interrupt(0));
    assert_eq!(format!("{one:?}"), format!("{other:?}"));
}

// Hostile guests

/// SplitMix64, so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Values that are all bits, few bits, small, or anything.
    fn value(&mut self) -> u64 {
        match self.below(5) {
            0 => u64::MAX,
            1 => 0,
            2 => 1 << self.below(64),
            3 => self.below(0x400),
            _ => self.next(),
        }
    }
}

const PORTS: &[u16] = &[
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, 0x60, 0x64,
    0x92, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x2f8, 0x2fc, 0x80, 0xe9, 0xf4,
    0xcf8, 0xcf9, 0x600, 0x602, 0x604, 0x608, 0x620, 0x622, 0x63f, 0xffff,
];

fn random_step(chipset: &mut Chipset, random: &mut Random, now: u64) {
    let cpu = random.below(4) as usize;
    let value = random.value();
    let size = random.of(&[1, 1, 2, 4]);
    let length = random.of(&[1, 2, 4, 4, 4, 8]);
    let gpa = match random.below(4) {
        0 => map::IO_APIC_ADDRESS + random.of(&[0, 0x10, 0x10, 0x40, 0x13, 0xfff]),
        1 => map::HPET_ADDRESS + random.below(0x60) * 8 + random.of(&[0, 0, 4, 3]),
        2 => map::LOCAL_APIC_ADDRESS + random.below(0x42) * 16 + random.of(&[0, 0, 0, 2]),
        _ => random.next(),
    };
    let x2apic_register = 0x800 + random.below(0x40) as u32;
    let msr = random.of(&[MSR_APIC_BASE, MSR_TSC_DEADLINE, x2apic_register]);
    match random.below(14) {
        0..3 => {
            chipset.port_write(random.of(PORTS), size, value as u32, now);
        }
        3 => {
            chipset.port_read(random.of(PORTS), size, now);
        }
        4 | 5 => {
            chipset.mmio_write(cpu, gpa, &value.to_le_bytes()[..length], now);
        }
        6 => {
            chipset.mmio_read(cpu, gpa, &mut [0; 8][..length], now);
        }
        7 | 8 => {
            // Modes are entered on purpose: chance alone would hardly find them.
            let value = match (msr, random.below(3)) {
                (MSR_APIC_BASE, 0) => X2APIC,
                (MSR_APIC_BASE, 1) => map::LOCAL_APIC_ADDRESS | 0x800,
                (0x80f, _) => 0x1ff,
                (0x832, _) => value & 0x7_00ff,
                _ => value,
            };
            let _ = chipset.apic_msr_write(cpu, msr, value, now);
        }
        9 => {
            let _ = chipset.apic_msr_read(cpu, msr, now);
        }
        10 => chipset.set_line(random.below(26) as u32, value & 1 != 0, now),
        11 => chipset.send_msi(0xfee0_0000 | value & 0xf_ffff, random.next() as u32),
        12 => {
            chipset.serial_receive(cpu, &value.to_le_bytes(), now);
            chipset.key(value as u16, value & 0x1_0000 != 0, now);
        }
        _ => {
            chipset.set_cr8(cpu, value as u8);
            chipset.set_tsc_offset(cpu, random.value(), now);
        }
    }
}

/// Garbage in every register at random times: no panic, what the chipset says about itself holds, and
/// no timer asks to be woken again and again without time passing.
fn survive_garbage(seed: u64, steps: usize, longest_step: u64) -> u32 {
    let mut random = Random(seed);
    let mut chipset = chipset(4);
    let mut now = 0u64;
    let mut taken = 0;
    for step in 0..steps {
        now = now.saturating_add(random.below(longest_step));
        random_step(&mut chipset, &mut random, now);
        chipset.advance(now);
        if let Some(deadline) = chipset.next_deadline() {
            assert!(
                deadline > now,
                "seed {seed}, step {step}: deadline {deadline} at {now}"
            );
        }
        for cpu in 0..4 {
            let pending = chipset.interrupt_pending(cpu);
            assert_eq!(
                chipset.clone().take_interrupt(cpu).is_some(),
                pending,
                "seed {seed}, step {step}"
            );
            if pending && random.below(4) == 0 {
                chipset.take_interrupt(cpu);
                taken += 1;
                let _ = chipset.apic_msr_write(cpu, MSR_EOI, 0, now);
            }
        }
        let effects = chipset.take_effects();
        assert!(effects.signals.iter().all(|signal| signal.cpu < 4));
        assert!(
            effects.signals.len() < 100,
            "seed {seed}, step {step}: {} signals",
            effects.signals.len()
        );
        assert!(!chipset.has_effects());
    }
    taken
}

#[test]
fn garbage_within_microseconds_is_survived() {
    let taken: u32 = (0..20)
        .map(|seed| survive_garbage(seed, 5_000, 1_000))
        .sum();
    assert!(taken > 100, "the garbage interrupted only {taken} times");
}

#[test]
fn garbage_within_seconds_is_survived() {
    let taken: u32 = (100..120)
        .map(|seed| survive_garbage(seed, 5_000, 1_000_000_000))
        .sum();
    assert!(taken > 100, "the garbage interrupted only {taken} times");
}

#[test]
fn garbage_at_the_end_of_time_is_survived() {
    let taken: u32 = (200..220)
        .map(|seed| survive_garbage(seed, 2_000, u64::MAX / 1_000))
        .sum();
    assert!(taken > 100, "the garbage interrupted only {taken} times");
}
