//! A local APIC's state, between the chipset's form and the kernel's (`struct kvm_lapic_state`: the
//! register page of SDM vol. 3A, table 11-1).

use trapgate_chipset::lapic::{LocalApicState, TimerState, VectorSet};

/// Bytes of the kernel's register page.
pub(crate) const PAGE: usize = 1024;

/// Offsets in the page.
mod at {
    pub(super) const ID: usize = 0x20;
    pub(super) const TPR: usize = 0x80;
    pub(super) const LDR: usize = 0xd0;
    pub(super) const DFR: usize = 0xe0;
    pub(super) const SVR: usize = 0xf0;
    pub(super) const ISR: usize = 0x100;
    pub(super) const TMR: usize = 0x180;
    pub(super) const IRR: usize = 0x200;
    pub(super) const ESR: usize = 0x280;
    pub(super) const ICR: usize = 0x300;
    pub(super) const ICR_HIGH: usize = 0x310;
    /// In the order of [`super::LocalApicState::lvt`].
    pub(super) const LVT: [usize; 7] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x2f0];
    pub(super) const INITIAL: usize = 0x380;
    pub(super) const CURRENT: usize = 0x390;
    pub(super) const DIVIDE: usize = 0x3e0;
}

const X2APIC: u64 = 3 << 10;
/// Delivery status and remote IRR of a local vector table entry.
const LVT_STATUS: u32 = 1 << 12 | 1 << 14;
/// Bits of the interrupt command that are kept: all but delivery status and what is reserved.
const ICR_KEPT: u32 = 0x000c_cfff;
/// TSC-deadline mode in the timer's entry, bits 18:17.
const DEADLINE_MODE: u32 = 2;
const PERIODIC_MODE: u32 = 1;

/// What the kernel has of a local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KernelLapic {
    /// IA32_APIC_BASE.
    pub(crate) apic_base: u64,
    pub(crate) page: [u8; PAGE],
    /// IA32_TSC_DEADLINE.
    pub(crate) deadline: u64,
}

impl KernelLapic {
    fn get(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.page[offset..offset + 4]);
        u32::from_le_bytes(bytes)
    }

    fn put(&mut self, offset: usize, value: u32) {
        self.page[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn vectors(&self, offset: usize) -> VectorSet {
        let mut registers = std::array::from_fn(|index| self.get(offset + 16 * index));
        // Illegal vectors have no place (SDM vol. 3A, 11.5.2), but wait in the kernel when a guest sends them.
        registers[0] &= 0xffff_0000;
        VectorSet::from_registers(registers)
    }

    fn put_vectors(&mut self, offset: usize, set: &VectorSet) {
        for index in 0..8 {
            self.put(offset + 16 * usize::from(index), set.register(index));
        }
    }
}

/// Nanoseconds of a step of the timer's count, which runs at 1 GHz in both.
fn step(divide: u32) -> u64 {
    let code = divide & 3 | divide >> 1 & 4;
    if code == 7 { 1 } else { 2 << code }
}

fn mode(timer_entry: u32) -> u32 {
    timer_entry >> 17 & 3
}

/// For the kernel: the APIC of processor `id` at `now`, nanoseconds of VM time.
pub(crate) fn to_kernel(id: u32, state: &LocalApicState, now: u64) -> KernelLapic {
    let LocalApicState {
        apic_base,
        tpr,
        ldr,
        dfr,
        svr,
        isr,
        irr,
        tmr,
        esr,
        // The kernel has none that are not in the register.
        errors: _,
        icr,
        lvt,
        // Wires, which the kernel has of its own.
        lint: _,
        timer,
    } = state;
    let TimerState {
        divide,
        initial,
        expires,
        tsc_deadline,
        // The processor's.
        tsc_offset: _,
    } = timer;
    let mut kernel = KernelLapic {
        apic_base: *apic_base,
        page: [0; PAGE],
        deadline: *tsc_deadline,
    };
    let is_x2apic = apic_base & X2APIC == X2APIC;
    kernel.put(at::ID, if is_x2apic { id } else { id << 24 });
    kernel.put(at::TPR, *tpr);
    kernel.put(at::LDR, *ldr);
    kernel.put(at::DFR, *dfr);
    kernel.put(at::SVR, *svr);
    kernel.put_vectors(at::ISR, isr);
    kernel.put_vectors(at::TMR, tmr);
    kernel.put_vectors(at::IRR, irr);
    kernel.put(at::ESR, *esr);
    kernel.put(at::ICR, *icr as u32);
    kernel.put(at::ICR_HIGH, (icr >> 32) as u32);
    for (offset, entry) in at::LVT.into_iter().zip(lvt) {
        kernel.put(offset, *entry);
    }
    kernel.put(at::DIVIDE, *divide);
    let step = step(*divide);
    let period = u64::from(*initial) * step;
    let left = expires.map(|at| at.saturating_sub(now));
    let count = match (mode(lvt[0]), left) {
        (DEADLINE_MODE, _) | (_, None) => 0,
        // Zero, or beyond the period, is not something that the kernel goes on from.
        (PERIODIC_MODE, Some(left)) if period != 0 => (left.max(1) - 1) % period / step + 1,
        (_, Some(left)) => (left / step).max(1),
    };
    kernel.put(at::CURRENT, count as u32);
    // A count that has ended: the kernel would let it end again.
    let ended = mode(lvt[0]) == 0 && left.is_none();
    kernel.put(at::INITIAL, if ended { 0 } else { *initial });
    kernel
}

/// What the timer of a processor does that has left the guest, as far as its registers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// It does not count, or counts in TSC ticks.
    Idle,
    /// Nanoseconds that are left.
    Counts(u64),
    /// Its count has ended; the interrupt may still wait in the kernel, where nobody sees it.
    Ended,
}

/// See [`Timer`].
pub(crate) fn timer(page: &[u8; PAGE]) -> Timer {
    let kernel = KernelLapic {
        apic_base: 0,
        page: *page,
        deadline: 0,
    };
    if mode(kernel.get(at::LVT[0])) == DEADLINE_MODE || kernel.get(at::INITIAL) == 0 {
        return Timer::Idle;
    }
    match kernel.get(at::CURRENT) {
        0 => Timer::Ended,
        count => Timer::Counts(u64::from(count) * step(kernel.get(at::DIVIDE))),
    }
}

/// The inverse of [`to_kernel`]. `initial` is the initial count that the kernel was not given because it
/// had ended; `expires` is when the count ends, in nanoseconds of VM time, as it was when the processor
/// left the guest: in the kernel it goes on.
pub(crate) fn from_kernel(
    kernel: &KernelLapic,
    initial: u32,
    expires: Option<u64>,
) -> LocalApicState {
    let lvt = at::LVT.map(|offset| kernel.get(offset) & !LVT_STATUS);
    let divide = kernel.get(at::DIVIDE) & 0xb;
    let counted = kernel.get(at::INITIAL);
    let counts = mode(lvt[0]) != DEADLINE_MODE && counted != 0;
    LocalApicState {
        apic_base: kernel.apic_base,
        tpr: kernel.get(at::TPR) & 0xff,
        ldr: kernel.get(at::LDR),
        dfr: kernel.get(at::DFR) | 0x0fff_ffff,
        svr: kernel.get(at::SVR) & 0x13ff,
        isr: kernel.vectors(at::ISR),
        irr: kernel.vectors(at::IRR),
        tmr: kernel.vectors(at::TMR),
        esr: kernel.get(at::ESR) & 0xff,
        errors: 0,
        icr: u64::from(kernel.get(at::ICR) & ICR_KEPT) | u64::from(kernel.get(at::ICR_HIGH)) << 32,
        lvt,
        lint: [false; 2],
        timer: TimerState {
            divide,
            initial: if mode(lvt[0]) == 0 && counted == 0 {
                initial
            } else {
                counted
            },
            expires: expires.filter(|_| counts),
            tsc_deadline: if mode(lvt[0]) == DEADLINE_MODE {
                kernel.deadline
            } else {
                0
            },
            tsc_offset: 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn vectors() -> impl Strategy<Value = VectorSet> {
        prop::collection::vec(16u8.., 0..20).prop_map(VectorSet::from)
    }

    prop_compose! {
        fn timer_state()(
            mode in 0u32..3,
            divide in prop::sample::select(vec![0u32, 1, 2, 3, 8, 9, 10, 11]),
            initial in 1u32..,
            count in 1u32..,
            runs: bool,
            tsc_deadline: u64,
        ) -> (u32, TimerState) {
            let count = u64::from(count.min(initial));
            let counts = mode != 2 && (runs || mode == 1);
            let state = TimerState {
                divide,
                initial: if mode == 2 { 0 } else { initial },
                expires: counts.then_some(NOW + count * step(divide)),
                tsc_deadline: if mode == 2 { tsc_deadline } else { 0 },
                tsc_offset: 0,
            };
            (mode, state)
        }
    }

    prop_compose! {
        fn state()(
            x2apic: bool,
            (tpr, ldr, dfr) in (0u32..256, 0u32..256, 0u32..16),
            (svr, esr, command_high) in (any::<u32>(), 0u32..256, any::<u32>()),
            command in any::<u32>(),
            [isr, irr, tmr] in prop::array::uniform3(vectors()),
            mut lvt: [u32; 7],
            (mode, timer) in timer_state(),
        ) -> LocalApicState {
            for entry in &mut lvt {
                *entry &= 0x1_a7ff & !LVT_STATUS;
            }
            lvt[0] = lvt[0] & 0x1_00ff | mode << 17;
            LocalApicState {
                apic_base: 0xfee0_0900 | if x2apic { X2APIC } else { 0 },
                tpr,
                ldr: ldr << 24,
                dfr: dfr << 28 | 0x0fff_ffff,
                svr: svr & 0x13ff,
                isr, irr, tmr, esr,
                errors: 0,
                icr: u64::from(command & ICR_KEPT) | u64::from(command_high) << 32,
                lvt,
                lint: [false; 2],
                timer,
            }
        }
    }

    proptest! {
        #[test]
        fn state_comes_back(state in state()) {
            let kernel = to_kernel(3, &state, NOW);
            let expires = match timer(&kernel.page) {
                Timer::Counts(left) => Some(NOW + left),
                Timer::Idle | Timer::Ended => None,
            };
            prop_assert_eq!(from_kernel(&kernel, state.timer.initial, expires), state);
        }
    }

    #[test]
    fn id_lies_where_its_mode_has_it() {
        let mut state = from_kernel(
            &KernelLapic {
                apic_base: 0xfee0_0800,
                page: [0; PAGE],
                deadline: 0,
            },
            0,
            None,
        );
        assert_eq!(to_kernel(5, &state, NOW).get(at::ID), 5 << 24);
        state.apic_base |= X2APIC;
        assert_eq!(to_kernel(5, &state, NOW).get(at::ID), 5);
    }

    /// The chipset would refuse the state.
    #[test]
    fn illegal_vectors_are_not_taken_from_the_kernel() {
        let mut kernel = KernelLapic {
            apic_base: 0xfee0_0800,
            page: [0; PAGE],
            deadline: 0,
        };
        kernel.put(at::IRR, 0x8001_ffff);
        let state = from_kernel(&kernel, 0, None);
        assert_eq!(state.irr, VectorSet::from(vec![16, 31]));
    }

    /// The kernel would let an ended count end again, and interrupt once too often.
    #[test]
    fn count_that_has_ended_is_not_given_to_the_kernel() {
        let mut state = from_kernel(
            &KernelLapic {
                apic_base: 0xfee0_0800,
                page: [0; PAGE],
                deadline: 0,
            },
            0,
            None,
        );
        state.timer.initial = 1000;
        let kernel = to_kernel(0, &state, NOW);
        assert_eq!((kernel.get(at::INITIAL), kernel.get(at::CURRENT)), (0, 0));
        assert_eq!(from_kernel(&kernel, 1000, None).timer.initial, 1000);
    }
}
