//! What the kernel's interrupts, by their numbers (GSIs), lead to; and the messages of devices, which have numbers
//! of their own where event file descriptors can carry them (irqfd).

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::VmFd;
use trapgate_chipset::map::{IO_APIC_PINS, TIMER_GSI};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::KvmError;
use crate::error::{call, named};

/// The number under which the kernel's interval timer raises its interrupt. No device of ours uses it.
const PIT_GSI: u32 = 0;
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
    /// The kernel's interval timer is connected.
    pit: bool,
    /// Whether messages are carried by events.
    by_event: bool,
    carried: Vec<Carried>,
    /// The last message that no event carried.
    candidate: Option<Message>,
    sent: u64,
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

    /// Connects the kernel's interval timer to the controllers, or disconnects it.
    pub(crate) fn connect_pit(&self, machine: &VmFd, connected: bool) -> Result<(), KvmError> {
        let mut state = self.state();
        if state.pit == connected {
            return Ok(());
        }
        state.pit = connected;
        state.apply(machine)
    }

    /// Sends a message; one that nobody takes is lost, as on the bus.
    ///
    /// A message is carried by an event from the second time on that it is sent without another such between. So
    /// a guest that gives its devices ever new ones does not have the table written for each.
    pub(crate) fn send(&self, machine: &VmFd, message: Message) -> Result<(), KvmError> {
        // Anything else is no interrupt (SDM vol. 3A, 11.11.1), and the kernel would say so.
        if message.0 >> 20 != 0xfee {
            return Ok(());
        }
        let mut state = self.state();
        if state.by_event && state.carry(machine, message) {
            return Ok(());
        }
        drop(state);
        let (address, data) = message;
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        machine
            .signal_msi(message)
            .map_err(call("KVM_SIGNAL_MSI"))?;
        Ok(())
    }

    /// Returns when every message that was sent has arrived: the kernel may deliver what an event carries after the event
    /// was signalled, but not after it stopped listening.
    pub(crate) fn settle(&self, machine: &VmFd) -> Result<(), KvmError> {
        for (gsi, carried) in (IO_APIC_PINS..).zip(&mut self.state().carried) {
            carried.close(machine, gsi)?;
        }
        Ok(())
    }

    /// How many messages are carried by events.
    pub(crate) fn carried(&self) -> usize {
        self.state().carried.len()
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
        if self.pit {
            entries.push(to_pin(PIT_GSI, KVM_IRQCHIP_IOAPIC, TIMER_GSI));
            entries.push(to_pin(PIT_GSI, KVM_IRQCHIP_PIC_MASTER, 0));
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
