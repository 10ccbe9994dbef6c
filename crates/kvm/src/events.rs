//! Events that wait, between our form and the kernel's (`struct kvm_vcpu_events`,
//! `Documentation/virt/kvm/api.rst`, 4.31).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use trapgate_x86::{Exception, InterruptShadow, Vector};

/// Events that wait, in our words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events {
    /// An exception that is not delivered.
    pub(crate) exception: Option<Exception>,
    /// An acknowledged interrupt that is not delivered.
    pub(crate) interrupt: Option<u8>,
    /// Held off by the last instruction.
    pub(crate) shadow: InterruptShadow,
    /// An NMI waits.
    pub(crate) nmi_pending: bool,
    /// An NMI is being handled.
    pub(crate) nmi_blocked: bool,
}

impl Events {
    /// For the kernel. The address of a page fault is not part of it: it goes to CR2.
    pub(crate) fn to_kvm(self) -> kvm_vcpu_events {
        let Self {
            exception,
            interrupt,
            shadow,
            nmi_pending,
            nmi_blocked,
        } = self;
        let mut events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..kvm_vcpu_events::default()
        };
        if let Some(Exception {
            vector,
            error_code,
            address: _,
        }) = exception
        {
            events.exception.injected = 1;
            events.exception.nr = vector.0;
            events.exception.has_error_code = error_code.is_some().into();
            events.exception.error_code = error_code.unwrap_or_default();
        }
        if let Some(vector) = interrupt {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        events.interrupt.shadow = match shadow {
            InterruptShadow::None => 0,
            InterruptShadow::Sti => KVM_X86_SHADOW_INT_STI as u8,
            InterruptShadow::MovSs => KVM_X86_SHADOW_INT_MOV_SS as u8,
        };
        events.nmi.pending = nmi_pending.into();
        events.nmi.masked = nmi_blocked.into();
        events
    }

    /// From the kernel's, with CR2 for the address of a page fault.
    pub(crate) fn from_kvm(events: &kvm_vcpu_events, cr2: u64) -> Self {
        let waits = events.exception.injected | events.exception.pending != 0;
        // A software interrupt or exception whose delivery was interrupted is of the instruction at
        // RIP, which will be executed again: there is nothing to keep.
        let software = matches!(Vector(events.exception.nr), Vector::BP | Vector::OF);
        let exception = (waits && !software).then(|| Exception {
            vector: Vector(events.exception.nr),
            error_code: (events.exception.has_error_code != 0)
                .then_some(events.exception.error_code),
            address: if Vector(events.exception.nr) == Vector::PF {
                cr2
            } else {
                0
            },
        });
        let external = events.interrupt.injected != 0 && events.interrupt.soft == 0;
        let shadow = u32::from(events.interrupt.shadow);
        Self {
            exception,
            interrupt: external.then_some(events.interrupt.nr),
            shadow: if shadow & KVM_X86_SHADOW_INT_MOV_SS != 0 {
                InterruptShadow::MovSs
            } else if shadow & KVM_X86_SHADOW_INT_STI != 0 {
                InterruptShadow::Sti
            } else {
                InterruptShadow::None
            },
            // One whose delivery was interrupted is delivered again.
            nmi_pending: events.nmi.pending | events.nmi.injected != 0,
            nmi_blocked: events.nmi.masked != 0 && events.nmi.injected == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exception() -> impl Strategy<Value = Exception> {
        let vector = (0..32u8).prop_filter("of hardware", |vector| ![2, 3, 4].contains(vector));
        (vector, any::<Option<u32>>(), any::<u64>()).prop_map(|(vector, error_code, address)| {
            Exception {
                vector: Vector(vector),
                error_code,
                address: if vector == 14 { address } else { 0 },
            }
        })
    }

    proptest! {
        #[test]
        fn events_come_back(
            exception in prop::option::of(exception()),
            interrupt: Option<u8>,
            shadow in prop::sample::select(vec![
                InterruptShadow::None, InterruptShadow::Sti, InterruptShadow::MovSs,
            ]),
            nmi_pending: bool,
            nmi_blocked: bool,
        ) {
            let events = Events { exception, interrupt, shadow, nmi_pending, nmi_blocked };
            let cr2 = exception.map_or(0, |exception| exception.address);
            prop_assert_eq!(Events::from_kvm(&events.to_kvm(), cr2), events);
        }
    }

    #[test]
    fn interrupted_delivery_of_an_nmi_is_a_pending_nmi() {
        let mut events = kvm_vcpu_events::default();
        events.nmi.injected = 1;
        events.nmi.masked = 1;
        let events = Events::from_kvm(&events, 0);
        assert!(events.nmi_pending && !events.nmi_blocked);
    }

    #[test]
    fn software_interrupts_are_executed_again() {
        let mut events = kvm_vcpu_events::default();
        events.interrupt.injected = 1;
        events.interrupt.soft = 1;
        events.interrupt.nr = 0x80;
        assert_eq!(Events::from_kvm(&events, 0), Events::default());
        let mut events = kvm_vcpu_events::default();
        events.exception.injected = 1;
        events.exception.nr = Vector::BP.0;
        assert_eq!(Events::from_kvm(&events, 0), Events::default());
    }
}
