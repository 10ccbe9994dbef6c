use super::*;
use crate::ticks::time_of;

const TSC_HZ: u64 = 2_500_000_000;
const ENABLED: u64 = 0x1ff;
const X2APIC: u64 = LOCAL_APIC_ADDRESS | BASE_ENABLE | BASE_X2APIC;

const MSR_TPR: u32 = 0x808;
const MSR_EOI: u32 = 0x80b;
const MSR_SVR: u32 = 0x80f;
const MSR_ESR: u32 = 0x828;
const MSR_ICR: u32 = 0x830;
const MSR_LVT_TIMER: u32 = 0x832;
const MSR_LVT_LINT0: u32 = 0x835;
const MSR_LVT_LINT1: u32 = 0x836;
const MSR_LVT_ERROR: u32 = 0x837;
const MSR_INITIAL_COUNT: u32 = 0x838;
const MSR_CURRENT_COUNT: u32 = 0x839;
const MSR_DIVIDE: u32 = 0x83e;

/// APIC 1 in xAPIC mode, enabled by software.
fn xapic() -> LocalApic {
    let mut apic = LocalApic::new(1, TSC_HZ, 46);
    write(&mut apic, 0xf0, ENABLED as u32);
    apic
}

/// The same in x2APIC mode.
fn x2apic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, TSC_HZ, 46);
    apic.msr_write(MSR_APIC_BASE, X2APIC, 0).unwrap();
    apic.msr_write(MSR_SVR, ENABLED, 0).unwrap();
    apic
}

fn write(apic: &mut LocalApic, offset: u64, value: u32) -> ApicAction {
    apic.mmio_write(offset, &value.to_le_bytes(), 0)
}

fn read(apic: &mut LocalApic, offset: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data, 0);
    u32::from_le_bytes(data)
}

fn set(apic: &mut LocalApic, msr: u32, value: u64, now: u64) {
    apic.msr_write(msr, value, now).unwrap();
}

fn get(apic: &mut LocalApic, msr: u32, now: u64) -> u64 {
    apic.msr_read(msr, now).unwrap()
}

// Priorities

#[test]
fn accepted_interrupt_is_taken_and_ended() {
    let mut apic = xapic();
    assert!(apic.accept(0x51, false));
    assert_eq!(read(&mut apic, 0x220), 1 << 0x11);
    assert_eq!(apic.acknowledge(), Some(0x51));
    assert_eq!(read(&mut apic, 0x220), 0);
    assert_eq!(read(&mut apic, 0x120), 1 << 0x11);
    assert_eq!(write(&mut apic, 0xb0, 0), ApicAction::None);
    assert_eq!(read(&mut apic, 0x120), 0);
}

#[test]
fn higher_vectors_are_taken_first_and_nest() {
    let mut apic = xapic();
    apic.accept(0x41, false);
    apic.accept(0x52, false);
    assert_eq!(apic.acknowledge(), Some(0x52));
    assert_eq!(apic.deliverable(), None);
    apic.accept(0x61, false);
    assert_eq!(apic.acknowledge(), Some(0x61));
    write(&mut apic, 0xb0, 0);
    assert_eq!(apic.deliverable(), None);
    write(&mut apic, 0xb0, 0);
    assert_eq!(apic.acknowledge(), Some(0x41));
}

/// Vectors of one class (of 16) do not interrupt each other.
#[test]
fn same_priority_class_waits() {
    let mut apic = xapic();
    apic.accept(0x51, false);
    apic.acknowledge();
    apic.accept(0x5f, false);
    assert_eq!(apic.deliverable(), None);
}

#[test]
fn task_priority_holds_its_class_and_those_below_back() {
    let mut apic = xapic();
    write(&mut apic, 0x80, 0x50);
    apic.accept(0x5f, false);
    assert_eq!(apic.deliverable(), None);
    apic.accept(0x60, false);
    assert_eq!(apic.deliverable(), Some(0x60));
    write(&mut apic, 0x80, 0x60);
    assert_eq!(apic.deliverable(), None);
}

#[test]
fn cr8_is_the_class_of_the_task_priority() {
    let mut apic = xapic();
    write(&mut apic, 0x80, 0x57);
    assert_eq!(apic.cr8(), 5);
    apic.set_cr8(9);
    assert_eq!(read(&mut apic, 0x80), 0x90);
}

#[test]
fn processor_priority_is_the_higher_of_task_and_service() {
    let mut apic = xapic();
    write(&mut apic, 0x80, 0x35);
    assert_eq!(read(&mut apic, 0xa0), 0x35);
    apic.accept(0x51, false);
    apic.acknowledge();
    assert_eq!(read(&mut apic, 0xa0), 0x50);
    write(&mut apic, 0x80, 0x57);
    assert_eq!(read(&mut apic, 0xa0), 0x57);
}

#[test]
fn end_of_a_level_interrupt_is_broadcast() {
    let mut apic = xapic();
    apic.accept(0x51, true);
    assert_eq!(read(&mut apic, 0x1a0), 1 << 0x11);
    apic.acknowledge();
    assert_eq!(write(&mut apic, 0xb0, 0), ApicAction::BroadcastEoi(0x51));
}

#[test]
fn broadcast_of_the_end_can_be_suppressed() {
    let mut apic = xapic();
    write(&mut apic, 0xf0, 0x11ff);
    apic.accept(0x51, true);
    apic.acknowledge();
    assert_eq!(write(&mut apic, 0xb0, 0), ApicAction::None);
}

#[test]
fn end_of_interrupt_with_nothing_in_service_is_harmless() {
    let mut apic = xapic();
    assert_eq!(write(&mut apic, 0xb0, 0), ApicAction::None);
}

/// A processor that asks and acknowledges in two steps would be given the spurious vector here (SDM vol. 3A, 12.9). Ours does
/// both in one, so it takes nothing, and the interrupt waits.
#[test]
fn priority_that_rises_before_the_interrupt_is_taken_leaves_no_spurious_one() {
    let mut apic = xapic();
    apic.accept(0x51, false);
    assert_eq!(apic.deliverable(), Some(0x51));
    write(&mut apic, 0x80, 0x60);
    assert_eq!(apic.deliverable(), None);
    assert_eq!(apic.acknowledge(), None);
    assert_eq!(read(&mut apic, 0x170), 0);
    write(&mut apic, 0x80, 0);
    assert_eq!(apic.acknowledge(), Some(0x51));
}

// Enabling

#[test]
fn disabled_by_software_it_accepts_nothing_and_masks_its_table() {
    let mut apic = xapic();
    write(&mut apic, 0x350, 0x700);
    assert!(apic.accepts_ext_int());
    write(&mut apic, 0xf0, 0xff);
    assert!(!apic.accept(0x51, false));
    assert!(!apic.accepts_ext_int());
    write(&mut apic, 0x350, 0x700);
    assert_eq!(read(&mut apic, 0x350), 0x10700);
    assert_eq!(write(&mut apic, 0xf0, 0x1ff), ApicAction::Enabled);
}

#[test]
fn interrupts_accepted_before_it_was_disabled_are_kept() {
    let mut apic = xapic();
    apic.accept(0x51, false);
    write(&mut apic, 0xf0, 0xff);
    assert_eq!(apic.acknowledge(), Some(0x51));
}

#[test]
fn disabled_globally_the_pins_are_intr_and_nmi() {
    let mut apic = xapic();
    set(&mut apic, MSR_APIC_BASE, LOCAL_APIC_ADDRESS, 0);
    assert_eq!(apic.page(), None);
    assert!(apic.accepts_ext_int());
    assert!(apic.set_lint(1, true));
    assert_eq!(apic.msr_read(MSR_TPR, 0), Err(GeneralProtection));
}

#[test]
fn changes_of_mode_that_do_not_exist_are_refused() {
    let enabled = LOCAL_APIC_ADDRESS | BASE_ENABLE;
    let mut apic = xapic();
    // Extended without enabled.
    assert_eq!(
        apic.msr_write(MSR_APIC_BASE, LOCAL_APIC_ADDRESS | BASE_X2APIC, 0),
        Err(GeneralProtection)
    );
    set(&mut apic, MSR_APIC_BASE, X2APIC, 0);
    // From x2APIC back to xAPIC.
    assert_eq!(
        apic.msr_write(MSR_APIC_BASE, enabled, 0),
        Err(GeneralProtection)
    );
    set(&mut apic, MSR_APIC_BASE, LOCAL_APIC_ADDRESS, 0);
    // From disabled to x2APIC.
    assert_eq!(
        apic.msr_write(MSR_APIC_BASE, X2APIC, 0),
        Err(GeneralProtection)
    );
    set(&mut apic, MSR_APIC_BASE, enabled, 0);
    assert_eq!(apic.page(), Some(LOCAL_APIC_ADDRESS));
}

#[test]
fn reserved_bits_of_the_base_are_refused() {
    let mut apic = xapic();
    for bit in [0, 7, 9, 46, 63] {
        let value = LOCAL_APIC_ADDRESS | BASE_ENABLE | 1 << bit;
        assert_eq!(
            apic.msr_write(MSR_APIC_BASE, value, 0),
            Err(GeneralProtection),
            "bit {bit}"
        );
    }
}

#[test]
fn registers_move_with_the_base() {
    let mut apic = xapic();
    set(&mut apic, MSR_APIC_BASE, 0x1234_5000 | BASE_ENABLE, 0);
    assert_eq!(apic.page(), Some(0x1234_5000));
}

#[test]
fn only_the_first_is_the_bootstrap_processor() {
    assert_eq!(
        get(&mut LocalApic::new(0, TSC_HZ, 46), MSR_APIC_BASE, 0),
        0xfee0_0900
    );
    assert_eq!(
        get(&mut LocalApic::new(1, TSC_HZ, 46), MSR_APIC_BASE, 0),
        0xfee0_0800
    );
}

#[test]
fn reset_keeps_id_and_mode() {
    let mut apic = x2apic(0x25);
    apic.accept(0x51, false);
    apic.set_cr8(3);
    apic.reset();
    assert!(apic.is_x2apic());
    assert_eq!(get(&mut apic, 0x802, 0), 0x25);
    assert_eq!(get(&mut apic, 0x80d, 0), 0x0002_0020);
    assert_eq!(
        (get(&mut apic, MSR_TPR, 0), get(&mut apic, MSR_SVR, 0)),
        (0, 0xff)
    );
    assert_eq!(apic.deliverable(), None);
}

// Registers

#[test]
fn registers_after_reset() {
    let mut apic = LocalApic::new(1, TSC_HZ, 46);
    let expected = [
        (0x20, 0x0100_0000),
        (0x30, 0x0106_0014),
        (0x80, 0),
        (0xd0, 0),
        (0xe0, 0xffff_ffff),
        (0xf0, 0xff),
        (0x2f0, 0x1_0000),
        (0x320, 0x1_0000),
        (0x330, 0x1_0000),
        (0x340, 0x1_0000),
        (0x350, 0x1_0000),
        (0x360, 0x1_0000),
        (0x370, 0x1_0000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(read(&mut apic, offset), value, "offset {offset:#x}");
    }
}

#[test]
fn reserved_bits_are_dropped_in_xapic_mode() {
    let mut apic = xapic();
    let expected = [
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, 0xffff_ffff),
        (0x2f0, 0x1_07ff),
        (0x320, 0x7_00ff),
        (0x350, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x380, 0xffff_ffff),
        (0x3e0, 0xb),
    ];
    for (offset, value) in expected {
        write(&mut apic, offset, u32::MAX);
        assert_eq!(read(&mut apic, offset), value, "offset {offset:#x}");
    }
}

#[test]
fn reserved_bits_are_refused_in_x2apic_mode() {
    let cases = [
        (MSR_TPR, 0x100),
        (MSR_EOI, 1),
        (MSR_SVR, 1 << 13),
        (MSR_ESR, 1),
        (MSR_ICR, 1 << 13),
        (MSR_ICR, 1 << 20),
        (MSR_LVT_TIMER, 1 << 19),
        (MSR_LVT_ERROR, 1 << 8),
        (MSR_INITIAL_COUNT, 1 << 32),
        (MSR_DIVIDE, 4),
        (0x83f, 0x100),
    ];
    let mut apic = x2apic(1);
    for (msr, value) in cases {
        assert_eq!(
            apic.msr_write(msr, value, 0),
            Err(GeneralProtection),
            "{msr:#x} {value:#x}"
        );
    }
}

#[test]
fn x2apic_registers_are_read_or_written_only_where_they_may_be() {
    let mut apic = x2apic(1);
    for msr in [
        0x802,
        0x803,
        0x80a,
        0x80d,
        0x810,
        0x817,
        0x818,
        0x827,
        MSR_CURRENT_COUNT,
    ] {
        assert_eq!(
            apic.msr_write(msr, 0, 0),
            Err(GeneralProtection),
            "write {msr:#x}"
        );
        assert!(apic.msr_read(msr, 0).is_ok(), "read {msr:#x}");
    }
    for msr in [MSR_EOI, 0x83f] {
        assert_eq!(
            apic.msr_read(msr, 0),
            Err(GeneralProtection),
            "read {msr:#x}"
        );
        assert!(apic.msr_write(msr, 0, 0).is_ok(), "write {msr:#x}");
    }
    for msr in [
        0x800, 0x804, 0x809, 0x80c, 0x80e, 0x829, 0x831, 0x83a, 0x840,
    ] {
        assert_eq!(
            apic.msr_read(msr, 0),
            Err(GeneralProtection),
            "read {msr:#x}"
        );
        assert_eq!(
            apic.msr_write(msr, 0, 0),
            Err(GeneralProtection),
            "write {msr:#x}"
        );
    }
}

#[test]
fn x2apic_registers_are_not_there_in_xapic_mode() {
    let mut apic = xapic();
    assert_eq!(apic.msr_read(0x802, 0), Err(GeneralProtection));
    assert_eq!(apic.msr_write(MSR_EOI, 0, 0), Err(GeneralProtection));
}

#[test]
fn accesses_between_registers_or_of_odd_size_do_nothing() {
    let mut apic = xapic();
    assert_eq!(apic.mmio_write(0x84, &[0xff; 4], 0), ApicAction::None);
    assert_eq!(apic.mmio_write(0x80, &[0xff; 2], 0), ApicAction::None);
    assert_eq!(read(&mut apic, 0x80), 0);
    let mut data = [0xee; 8];
    apic.mmio_read(0x34, &mut data, 0);
    assert_eq!(data, [0; 8]);
    let mut byte = [0; 1];
    apic.mmio_read(0x32, &mut byte, 0);
    assert_eq!(byte, [0x06]);
}

// Errors

#[test]
fn errors_show_after_the_status_is_written() {
    let mut apic = xapic();
    apic.accept(0x0f, false);
    assert_eq!(read(&mut apic, 0x280), 0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), ERROR_RECEIVE_ILLEGAL_VECTOR);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 0);
}

/// Also if nobody has looked at the timer since it expired.
#[test]
fn timer_with_an_illegal_vector_is_an_error_when_the_status_is_written() {
    let mut apic = xapic();
    apic.mmio_write(0x3e0, &0xbu32.to_le_bytes(), 0);
    apic.mmio_write(0x320, &5u32.to_le_bytes(), 0);
    apic.mmio_write(0x380, &1000u32.to_le_bytes(), 0);
    apic.mmio_write(0x280, &[0; 4], 2000);
    assert_eq!(read(&mut apic, 0x280), ERROR_RECEIVE_ILLEGAL_VECTOR);
}

#[test]
fn error_interrupts_once_until_the_status_is_written() {
    let mut apic = xapic();
    write(&mut apic, 0x370, 0xfe);
    apic.accept(5, false);
    assert_eq!(apic.acknowledge(), Some(0xfe));
    write(&mut apic, 0xb0, 0);
    apic.accept(5, false);
    assert_eq!(apic.deliverable(), None);
    write(&mut apic, 0x280, 0);
    apic.accept(5, false);
    assert_eq!(apic.deliverable(), Some(0xfe));
}

#[test]
fn register_that_is_not_there_is_an_error() {
    let mut apic = xapic();
    read(&mut apic, 0x3f0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), ERROR_ILLEGAL_REGISTER);
    write(&mut apic, 0x400, 0);
    write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), ERROR_ILLEGAL_REGISTER);
}

#[test]
fn interrupt_command_with_an_illegal_vector_is_an_error() {
    let mut apic = x2apic(1);
    assert_eq!(apic.msr_write(MSR_ICR, 0x4_000f, 0), Ok(ApicAction::None));
    set(&mut apic, MSR_ESR, 0, 0);
    assert_eq!(
        get(&mut apic, MSR_ESR, 0),
        u64::from(ERROR_SEND_ILLEGAL_VECTOR)
    );
}

// Interrupt commands

fn sent(action: ApicAction) -> Ipi {
    match action {
        ApicAction::Send(ipi) => ipi,
        other => panic!("{other:?} sends nothing"),
    }
}

#[test]
fn xapic_command_takes_its_destination_from_the_high_half() {
    let mut apic = xapic();
    write(&mut apic, 0x310, 0x0300_0000);
    let ipi = sent(write(&mut apic, 0x300, 0x4051));
    assert_eq!(ipi.message.destination, Destination::Physical(3));
    assert_eq!(
        (ipi.message.vector, ipi.message.delivery),
        (0x51, Delivery::Fixed)
    );
    assert_eq!(read(&mut apic, 0x300), 0x4051);
}

#[test]
fn x2apic_command_is_one_write_with_a_wide_destination() {
    let mut apic = x2apic(1);
    let ipi = sent(apic.msr_write(MSR_ICR, 0x0001_0002_0000_0851, 0).unwrap());
    assert_eq!(ipi.message.destination, Destination::Logical(0x0001_0002));
    let ipi = sent(apic.msr_write(MSR_ICR, 0xffff_ffff_0000_0051, 0).unwrap());
    assert_eq!(ipi.message.destination, Destination::All);
    let ipi = sent(apic.msr_write(MSR_ICR, 0x0000_00ff_0000_0051, 0).unwrap());
    assert_eq!(ipi.message.destination, Destination::Physical(0xff));
}

#[test]
fn shorthands_are_decoded() {
    let mut apic = x2apic(1);
    let shorthands = [
        (0, Shorthand::None),
        (1, Shorthand::ToSelf),
        (2, Shorthand::AllIncludingSelf),
        (3, Shorthand::AllExcludingSelf),
    ];
    for (bits, shorthand) in shorthands {
        assert_eq!(
            sent(apic.msr_write(MSR_ICR, bits << 18 | 0x51, 0).unwrap()).shorthand,
            shorthand
        );
    }
}

/// Linux asserts and then de-asserts INIT; only the first does anything.
#[test]
fn init_deassert_is_ignored() {
    let mut apic = xapic();
    assert_eq!(
        sent(write(&mut apic, 0x300, 0xc500)).message.delivery,
        Delivery::Init
    );
    assert_eq!(write(&mut apic, 0x300, 0x8500), ApicAction::None);
}

#[test]
fn self_ipi_register_interrupts_the_writer() {
    let mut apic = x2apic(1);
    set(&mut apic, 0x83f, 0x77, 0);
    assert_eq!(apic.deliverable(), Some(0x77));
}

// Destinations

#[test]
fn physical_destination_is_the_id() {
    let apic = xapic();
    assert!(apic.is_addressed(Destination::Physical(1)));
    assert!(!apic.is_addressed(Destination::Physical(2)));
    assert!(apic.is_addressed(Destination::All));
}

#[test]
fn flat_logical_destination_is_a_mask() {
    let mut apic = xapic();
    write(&mut apic, 0xd0, 0x0200_0000);
    assert!(apic.is_addressed(Destination::Logical(0x02)));
    assert!(apic.is_addressed(Destination::Logical(0x83)));
    assert!(!apic.is_addressed(Destination::Logical(0xfd)));
    assert!(!apic.is_addressed(Destination::Logical(0)));
}

#[test]
fn cluster_logical_destination_is_a_cluster_and_a_mask() {
    let mut apic = xapic();
    write(&mut apic, 0xe0, 0x0fff_ffff);
    write(&mut apic, 0xd0, 0x2400_0000);
    assert!(apic.is_addressed(Destination::Logical(0x24)));
    assert!(apic.is_addressed(Destination::Logical(0x2f)));
    assert!(!apic.is_addressed(Destination::Logical(0x14)));
    assert!(!apic.is_addressed(Destination::Logical(0x2b)));
    // Cluster 15 is all of them.
    assert!(apic.is_addressed(Destination::Logical(0xf4)));
}

#[test]
fn x2apic_logical_id_follows_from_the_id() {
    let mut apic = x2apic(0x25);
    assert_eq!(get(&mut apic, 0x80d, 0), 0x0002_0020);
    assert!(apic.is_addressed(Destination::Logical(0x0002_0021)));
    assert!(!apic.is_addressed(Destination::Logical(0x0001_0020)));
    assert!(!apic.is_addressed(Destination::Logical(0x0002_0010)));
}

#[test]
fn message_signalled_interrupts_are_decoded() {
    let message = InterruptMessage::from_msi(0xfee0_3000, 0x0041).unwrap();
    assert_eq!(message.destination, Destination::Physical(3));
    assert_eq!(
        (message.delivery, message.vector, message.level),
        (Delivery::Fixed, 0x41, false)
    );
    // Redirection hint and logical mode.
    let message = InterruptMessage::from_msi(0xfee0_300c, 0xc041).unwrap();
    assert_eq!(message.destination, Destination::Logical(3));
    assert_eq!(
        (message.delivery, message.level),
        (Delivery::LowestPriority, true)
    );
    assert_eq!(InterruptMessage::from_msi(0xfeff_f000, 0).map(|_| ()), None);
    assert_eq!(InterruptMessage::from_msi(0x1_fee0_0000, 0), None);
}

// Local interrupts

#[test]
fn lint1_as_nmi_reports_rising_edges() {
    let mut apic = x2apic(0);
    assert!(!apic.set_lint(1, true));
    apic.set_lint(1, false);
    set(&mut apic, MSR_LVT_LINT1, 0x400, 0);
    assert!(apic.set_lint(1, true));
    assert!(!apic.set_lint(1, true));
}

#[test]
fn lint0_as_fixed_interrupt_uses_its_own_vector() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_LINT0, 0x31, 0);
    assert!(!apic.set_lint(0, true));
    assert_eq!(apic.deliverable(), Some(0x31));
    assert!(!apic.accepts_ext_int());
}

#[test]
fn virtual_wire_mode_lets_the_pic_through() {
    let mut apic = LocalApic::new(0, TSC_HZ, 46);
    assert!(!apic.accepts_ext_int());
    apic.set_virtual_wire();
    assert!(apic.accepts_ext_int());
    assert!(apic.set_lint(1, true));
}

// Timer

#[test]
fn one_shot_timer_counts_down_at_the_divided_rate() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    set(&mut apic, MSR_DIVIDE, 3, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1000, 500);
    assert_eq!(get(&mut apic, MSR_CURRENT_COUNT, 500 + 1600), 900);
    assert_eq!(apic.timer_deadline(), Some(16_500));
    apic.settle_timer(16_499);
    assert_eq!(apic.deliverable(), None);
    apic.settle_timer(16_500);
    assert_eq!(apic.acknowledge(), Some(0x30));
    assert_eq!(get(&mut apic, MSR_CURRENT_COUNT, 17_000), 0);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn divide_configuration_encodes_powers_of_two() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    let divisors = [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ];
    for (code, divisor) in divisors {
        set(&mut apic, MSR_DIVIDE, code, 0);
        set(&mut apic, MSR_INITIAL_COUNT, 1000, 0);
        assert_eq!(apic.timer_deadline(), Some(1000 * divisor), "{code:04b}");
    }
}

#[test]
fn new_divider_goes_on_from_the_current_count() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    set(&mut apic, MSR_DIVIDE, 0xb, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1000, 0);
    set(&mut apic, MSR_DIVIDE, 0, 400);
    assert_eq!(get(&mut apic, MSR_CURRENT_COUNT, 400), 600);
    assert_eq!(apic.timer_deadline(), Some(400 + 1200));
}

#[test]
fn periodic_timer_does_not_drift_and_merges_missed_ticks() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 1 << 17 | 0x30, 0);
    set(&mut apic, MSR_DIVIDE, 0xb, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1_000_000, 0);
    for tick in 1..100 {
        assert_eq!(apic.timer_deadline(), Some(tick * 1_000_000));
        apic.settle_timer(tick * 1_000_000 + 1234);
        assert_eq!(apic.acknowledge(), Some(0x30));
        set(&mut apic, MSR_EOI, 0, 0);
    }
    apic.settle_timer(205_500_000);
    assert_eq!(apic.acknowledge(), Some(0x30));
    set(&mut apic, MSR_EOI, 0, 0);
    assert_eq!(apic.deliverable(), None);
    assert_eq!(apic.timer_deadline(), Some(206_000_000));
}

#[test]
fn tiny_period_interrupts_at_most_every_20_microseconds() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 1 << 17 | 0x30, 0);
    set(&mut apic, MSR_DIVIDE, 0xb, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 7, 0);
    apic.settle_timer(7);
    let next = apic.timer_deadline().unwrap();
    assert!(next >= 7 + MIN_PERIOD_NS);
    assert_eq!(next % 7, 0);
    // The count the guest sees is still its own.
    assert!(get(&mut apic, MSR_CURRENT_COUNT, 10) <= 7);
}

#[test]
fn masked_timer_needs_no_wake_up_and_goes_on_when_unmasked() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 1 << 17 | 0x30, 0);
    set(&mut apic, MSR_DIVIDE, 0xb, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1_000_000, 0);
    set(&mut apic, MSR_LVT_TIMER, 1 << 17 | 1 << 16 | 0x30, 10);
    assert_eq!(apic.timer_deadline(), None);
    set(&mut apic, MSR_LVT_TIMER, 1 << 17 | 0x30, 2_500_000);
    assert_eq!(apic.deliverable(), None);
    assert_eq!(apic.timer_deadline(), Some(3_000_000));
}

#[test]
fn initial_count_of_zero_stops_the_timer() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1000, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 0, 0);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn tsc_deadline_is_met_to_the_nanosecond() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 2 << 17 | 0xef, 0);
    set(&mut apic, MSR_TSC_DEADLINE, 2_500_001, 100);
    let due = time_of(2_500_001, TSC_HZ);
    assert_eq!(due, 1_000_001);
    assert_eq!(apic.timer_deadline(), Some(due));
    apic.settle_timer(due - 1);
    assert_eq!(apic.deliverable(), None);
    assert_eq!(get(&mut apic, MSR_TSC_DEADLINE, due - 1), 2_500_001);
    apic.settle_timer(due);
    assert_eq!(apic.deliverable(), Some(0xef));
    assert_eq!(get(&mut apic, MSR_TSC_DEADLINE, due), 0);
}

#[test]
fn tsc_deadline_in_the_past_interrupts_at_once() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 2 << 17 | 0xef, 0);
    set(&mut apic, MSR_TSC_DEADLINE, 1, 1_000_000);
    assert_eq!(apic.deliverable(), Some(0xef));
}

#[test]
fn tsc_deadline_follows_the_processors_offset() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 2 << 17 | 0xef, 0);
    // This processor's TSC is a second behind.
    apic.set_tsc_offset(0u64.wrapping_sub(TSC_HZ), 2_000_000_000);
    set(&mut apic, MSR_TSC_DEADLINE, 2 * TSC_HZ, 2_000_000_000);
    assert_eq!(apic.timer_deadline(), Some(3_000_000_000));
    apic.set_tsc_offset(0, 2_000_000_000);
    assert_eq!(apic.deliverable(), Some(0xef));
}

#[test]
fn deadline_that_never_comes_is_none() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 2 << 17 | 0xef, 0);
    set(&mut apic, MSR_TSC_DEADLINE, u64::MAX, 1_000);
    assert_eq!(get(&mut apic, MSR_TSC_DEADLINE, 1_000), u64::MAX);
    assert!(
        apic.timer_deadline()
            .is_none_or(|deadline| deadline > 1 << 60)
    );
    set(&mut apic, MSR_TSC_DEADLINE, 0, 1_000);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn tsc_deadline_is_ignored_in_the_other_modes() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    set(&mut apic, MSR_TSC_DEADLINE, 5000, 0);
    assert_eq!(get(&mut apic, MSR_TSC_DEADLINE, 0), 0);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn change_to_or_from_tsc_deadline_disarms() {
    let mut apic = x2apic(0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    set(&mut apic, MSR_INITIAL_COUNT, 1000, 0);
    set(&mut apic, MSR_LVT_TIMER, 2 << 17 | 0x30, 0);
    assert_eq!(apic.timer_deadline(), None);
    set(&mut apic, MSR_INITIAL_COUNT, 1000, 0);
    assert_eq!(apic.timer_deadline(), None);
    set(&mut apic, MSR_TSC_DEADLINE, 5000, 0);
    set(&mut apic, MSR_LVT_TIMER, 0x30, 0);
    assert_eq!(apic.timer_deadline(), None);
}
