//! What the kernel's interrupts, by their numbers (GSIs), lead to; and the messages of devices, which have numbers
//! of their own where event file descriptors can carry them (irqfd).

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::VmFd;
use trapgate_chipset::lapic::{Delivery, InterruptMessage};
use trapgate_chipset::map::{IO_APIC_PINS, TIMER_GSI};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::KvmError;
use crate::error::{call, named};

/// The most messages that are carried by events: a file descriptor each.
const MOST: usize = 64;

/// What a device writes, and where.
type Message = (u64, u32);

/// A message that an event carries. Its number follows from its place.
#[derive(Debug)]
struct Carried {
    message: Message,
    event: EventFd,
    /// The kernel listens to the event.
    open: bool,
    /// When it was last sent, in messages.
    last: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Whether messages are carried by events.
    by_event: bool,
    carried: Vec<Carried>,
    /// The last message that no event carried.
    candidate: Option<Message>,
    sent: u64,
    /// How many of these an event carried.
    sent_by_event: u64,
}

/// The kernel's table of interrupts.
#[derive(Debug)]
pub(crate) struct Routing {
    state: Mutex<State>,
}

impl Routing {
    /// The table of a machine that has interrupt controllers. `by_event`: messages may be carried by events.
    pub(crate) fn new(machine: &VmFd, by_event: bool) -> Result<Self, KvmError> {
        let state = State {
            by_event,
            ..State::default()
        };
        state.apply(machine)?;
        Ok(Self {
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message; one that nobody takes is lost, as on the bus.
    ///
    /// A message is carried by an event from the second time on that it is sent without another such between. So
    /// a guest that gives its devices ever new ones does not have the table written for each.
    pub(crate) fn send(&self, machine: &VmFd, message: Message) -> Result<(), KvmError> {
        if !is_taken(message) {
            return Ok(());
        }
        let mut state = self.state();
        if state.by_event && state.carry(machine, message) {
            return Ok(());
        }
        drop(state);
        let (address, data) = message;
        let signal = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        match machine.signal_msi(signal) {
            // Its -1 for a message that is for no processor.
            Err(error) if error.errno() == libc::EPERM => Ok(()),
            result => result.map(drop).map_err(call("KVM_SIGNAL_MSI")),
        }
    }

    /// Returns when every message that was sent has arrived: the kernel may deliver what an event carries after the event
    /// was signalled, but not after it stopped listening.
    pub(crate) fn settle(&self, machine: &VmFd) -> Result<(), KvmError> {
        for (gsi, carried) in (IO_APIC_PINS..).zip(&mut self.state().carried) {
            carried.close(machine, gsi)?;
        }
        Ok(())
    }

    /// How many messages events have carried.
    pub(crate) fn sent_by_event(&self) -> u64 {
        self.state().sent_by_event
    }
}

impl Carried {
    fn close(&mut self, machine: &VmFd, gsi: u32) -> Result<(), KvmError> {
        if self.open {
            machine
                .unregister_irqfd(&self.event, gsi)
                .map_err(call("KVM_IRQFD"))?;
            self.open = false;
        }
        Ok(())
    }

    fn send(&mut self, machine: &VmFd, gsi: u32) -> Result<(), KvmError> {
        if !self.open {
            machine
                .register_irqfd(&self.event, gsi)
                .map_err(call("KVM_IRQFD"))?;
            self.open = true;
        }
        self.event.write(1).map_err(named("an event's descriptor"))
    }
}

impl State {
    /// Whether the message was sent by an event. What goes wrong with one is no reason not to send it the other
    /// way, now and ever after.
    fn carry(&mut self, machine: &VmFd, message: Message) -> bool {
        let sent = self.try_to_carry(machine, message);
        self.by_event &= sent.is_ok();
        sent.unwrap_or(false)
    }

    fn try_to_carry(&mut self, machine: &VmFd, message: Message) -> Result<bool, KvmError> {
        self.sent += 1;
        let known = |carried: &Carried| carried.message == message;
        let index = match self.carried.iter().position(known) {
            Some(index) => index,
            None if self.candidate == Some(message) => self.admit(machine, message)?,
            None => {
                self.candidate = Some(message);
                return Ok(false);
            }
        };
        let carried = &mut self.carried[index];
        carried.last = self.sent;
        carried.send(machine, IO_APIC_PINS + index as u32)?;
        self.sent_by_event += 1;
        Ok(true)
    }

    /// Finds a message a place, if need be that of the one that was not sent for the longest time.
    fn admit(&mut self, machine: &VmFd, message: Message) -> Result<usize, KvmError> {
        let index = if self.carried.len() < MOST {
            self.carried.push(Carried {
                message,
                event: EventFd::new(EFD_NONBLOCK).map_err(named("an event's descriptor"))?,
                open: false,
                last: 0,
            });
            self.carried.len() - 1
        } else {
            let oldest = (0..MOST).min_by_key(|&index| self.carried[index].last);
            let index = oldest.unwrap_or(0);
            // What was sent arrives as what it was.
            self.carried[index].close(machine, IO_APIC_PINS + index as u32)?;
            self.carried[index].message = message;
            index
        };
        self.apply(machine)?;
        Ok(index)
    }

    /// Gives the kernel the table.
    fn apply(&self, machine: &VmFd) -> Result<(), KvmError> {
        let mut entries = Vec::new();
        // As the chipset has them: each is the I/O APIC's pin of its number, and the ISA interrupt of its number, but
        // for the timer's, which is ISA interrupt 0.
        for gsi in 1..IO_APIC_PINS {
            entries.push(to_pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
            match gsi {
                TIMER_GSI => entries.push(to_pin(gsi, KVM_IRQCHIP_PIC_MASTER, 0)),
                1..8 => entries.push(to_pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => entries.push(to_pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => {}
            }
        }
        for (gsi, carried) in (IO_APIC_PINS..).zip(&self.carried) {
            entries.push(to_message(gsi, carried.message));
        }
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::Lacks {
            what: "room for so many interrupt routes",
        })?;
        machine
            .set_gsi_routing(&table)
            .map_err(call("KVM_SET_GSI_ROUTING"))
    }
}

/// Whether it is an interrupt of a kind that a processor takes, as the chipset has it: the kernel would refuse another
/// address, and has a system management mode.
fn is_taken((address, data): Message) -> bool {
    InterruptMessage::from_msi(address, data).is_some_and(|message| match message.delivery {
        Delivery::Smi | Delivery::Reserved | Delivery::ExtInt => false,
        Delivery::Fixed
        | Delivery::LowestPriority
        | Delivery::Nmi
        | Delivery::Init
        | Delivery::StartUp => true,
    })
}

fn to_pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn to_message(gsi: u32, (address, data): Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi.address_lo = address as u32;
    entry.u.msi.address_hi = (address >> 32) as u32;
    entry.u.msi.data = data;
    entry
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::{Kvm, VcpuFd};

    use super::*;
    use crate::calls;
    use crate::skipped::skipped;

    /// Registers of a local APIC's page (SDM vol. 3A, table 11-1).
    const SVR: usize = 0xf0;
    const IRR: usize = 0x200;

    /// A table, in a machine with a processor that never runs: what arrives waits there.
    struct Bench {
        machine: VmFd,
        vcpu: VcpuFd,
        routing: Routing,
    }

    /// `None`, with a word about it, where there is no KVM with controllers.
    fn bench(by_event: bool) -> Option<Bench> {
        let Ok(kvm) = Kvm::new() else {
            skipped("no KVM here");
            return None;
        };
        let machine = kvm.create_vm().unwrap();
        if machine.create_irq_chip().is_err() {
            skipped("this KVM has no interrupt controllers");
            return None;
        }
        let vcpu = machine.create_vcpu(0).unwrap();
        let routing = Routing::new(&machine, by_event).unwrap();
        Some(Bench {
            machine,
            vcpu,
            routing,
        })
    }

    fn message(vector: u8) -> Message {
        (0xfee0_0000, vector.into())
    }

    impl Bench {
        fn send(&self, vector: u8) {
            self.routing.send(&self.machine, message(vector)).unwrap();
        }

        /// The vectors that have arrived since the last time.
        fn arrived(&self) -> Vec<u8> {
            self.routing.settle(&self.machine).unwrap();
            let mut page = calls::lapic(&self.vcpu).unwrap();
            let waits = |vector: &u8| {
                let byte = usize::from(vector / 32 * 16 + vector / 8 % 4);
                page[IRR + byte] >> (vector % 8) & 1 != 0
            };
            let vectors = (0..=255).filter(waits).collect();
            page[SVR..SVR + 2].copy_from_slice(&0x1ffu16.to_le_bytes());
            page[IRR..IRR + 0x80].fill(0);
            let vcpu = calls::duplicate(&self.vcpu).unwrap();
            calls::set_lapic(&vcpu, &page).unwrap();
            vectors
        }

        /// Vectors of the messages that have an event, in the order of their places.
        fn carried(&self) -> Vec<u8> {
            let state = self.routing.state();
            let vector = |carried: &Carried| carried.message.1 as u8;
            state.carried.iter().map(vector).collect()
        }
    }

    #[test]
    fn message_that_is_sent_twice_in_a_row_gets_an_event_and_arrives_each_time() {
        let Some(bench) = bench(true) else { return };
        bench.arrived();
        for (times, by_event) in [(1, 0), (2, 1), (3, 2), (4, 3)] {
            bench.send(0x41);
            assert_eq!(bench.arrived(), [0x41], "{times}");
            assert_eq!(bench.routing.sent_by_event(), by_event, "{times}");
        }
        assert_eq!(bench.carried(), [0x41]);
    }

    #[test]
    fn messages_that_take_turns_arrive_without_an_event() {
        let Some(bench) = bench(true) else { return };
        bench.arrived();
        for _ in 0..5 {
            bench.send(0x41);
            bench.send(0x52);
            assert_eq!(bench.arrived(), [0x41, 0x52]);
        }
        assert_eq!(bench.carried(), []);
    }

    #[test]
    fn longest_unsent_message_makes_room_when_all_places_are_taken() {
        let Some(bench) = bench(true) else { return };
        bench.arrived();
        let first = 0x20;
        let all: Vec<u8> = (first..).take(MOST).collect();
        for &vector in &all {
            bench.send(vector);
            bench.send(vector);
        }
        assert_eq!(
            (bench.arrived(), bench.carried()),
            (all.clone(), all.clone())
        );
        // The first was sent again since, so the second is the oldest; what was sent by its event is not lost.
        bench.send(first);
        bench.send(first + 1);
        for &vector in &all[2..] {
            bench.send(vector);
        }
        bench.send(first);
        bench.send(0xc1);
        bench.send(0xc1);
        let mut expected = all.clone();
        expected[1] = 0xc1;
        assert_eq!(bench.carried(), expected);
        let arrived: Vec<u8> = all.into_iter().chain([0xc1]).collect();
        assert_eq!(bench.arrived(), arrived);
        // The place is the new one's alone.
        bench.send(0xc1);
        assert_eq!(bench.arrived(), [0xc1]);
        bench.send(first + 1);
        assert_eq!(bench.arrived(), [first + 1]);
        assert_eq!(bench.carried(), expected);
    }

    #[test]
    fn message_whose_event_the_kernel_refuses_is_sent_the_other_way_from_then_on() {
        let Some(bench) = bench(true) else { return };
        bench.arrived();
        bench.send(0x41);
        bench.send(0x41);
        assert_eq!(bench.routing.sent_by_event(), 1);
        // The kernel still listens, and refuses to listen twice.
        bench.routing.state().carried[0].open = false;
        for _ in 0..3 {
            bench.send(0x41);
            bench.send(0x52);
            bench.send(0x52);
            assert_eq!(bench.arrived(), [0x41, 0x52]);
        }
        assert_eq!(bench.routing.sent_by_event(), 1);
    }

    #[test]
    fn messages_arrive_without_events_where_they_are_not_wanted() {
        let Some(bench) = bench(false) else { return };
        bench.arrived();
        for _ in 0..3 {
            bench.send(0x41);
            assert_eq!(bench.arrived(), [0x41]);
        }
        assert_eq!(bench.routing.sent_by_event(), 0);
    }
}
