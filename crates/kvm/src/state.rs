//! The complete state, between our form and the kernel's: pure functions.

use kvm_bindings::{kvm_debugregs, kvm_regs, kvm_xsave};
use trapgate_x86::registers::{cr0, cr4, efer};
use trapgate_x86::state::ParavirtualMsrs;
use trapgate_x86::{Activity, CpuProfile, CpuState, Exception, SystemState, Vector};

use crate::events::Events;
use crate::registers::{Special, from_debug, from_regs, to_debug, to_regs};
use crate::{image, msrs};

/// A processor's state as far as the kernel has it.
pub(crate) struct KernelState {
    pub(crate) regs: kvm_regs,
    pub(crate) special: Special,
    pub(crate) debug: kvm_debugregs,
    pub(crate) xcr0: u64,
    pub(crate) xsave: kvm_xsave,
    pub(crate) events: Events,
    pub(crate) msrs: Vec<(u32, u64)>,
}

/// What the local APIC's model says of the processor's registers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ApicRegisters {
    /// CR8.
    pub(crate) task_priority: u8,
    /// IA32_APIC_BASE.
    pub(crate) base: u64,
}

/// State that stays with us: the system state that the kernel does not keep.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ours {
    /// Of this only what [`join`] takes is meant, and the MSRs that the kernel does not know.
    pub(crate) system: SystemState,
}

/// Whether the processor walks page tables by PDPTEs (SDM vol. 3A, 5.4.1).
fn uses_pdptes(control0: u64, control4: u64, extended: u64) -> bool {
    control0 & cr0::PG != 0 && control4 & cr4::PAE != 0 && extended & efer::LMA == 0
}

/// Takes a state apart: what the kernel gets, and what we keep. The TSC's offset and what the processor does
/// ([`Activity`]) are the caller's to set.
pub(crate) fn split(
    state: &CpuState,
    profile: &CpuProfile,
    kept: &[u32],
    apic: ApicRegisters,
) -> (KernelState, Ours) {
    let CpuState {
        gpr,
        rip,
        rflags,
        xsave,
        system,
        pending,
        interrupt,
    } = state;
    let SystemState {
        segments,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr0,
        cr2,
        cr3,
        cr4,
        xcr0,
        pdptes,
        dr,
        dr6,
        dr7,
        efer,
        // As MSRs, below.
        star: _,
        lstar: _,
        cstar: _,
        sfmask: _,
        kernel_gs_base: _,
        sysenter_cs: _,
        sysenter_esp: _,
        sysenter_eip: _,
        tsc_aux: _,
        tsc_adjust: _,
        pat: _,
        spec_ctrl: _,
        // The caller's.
        tsc_offset: _,
        activity: _,
        // Ours.
        misc_enable: _,
        mcg_status: _,
        mtrrs: _,
        paravirtual:
            ParavirtualMsrs {
                system_time: _,
                wall_clock: _,
            },
        shadow,
        nmi_blocked,
        nmi_pending,
    } = system;
    // The kernel delivers a page fault with whatever CR2 holds.
    let fault = match pending {
        Some(Exception {
            vector: Vector::PF,
            address,
            ..
        }) => *address,
        _ => *cr2,
    };
    let kernel = KernelState {
        regs: to_regs(gpr, *rip, *rflags),
        special: Special {
            segments: *segments,
            ldtr: *ldtr,
            tr: *tr,
            gdtr: *gdtr,
            idtr: *idtr,
            cr0: *cr0,
            cr2: fault,
            cr3: *cr3,
            cr4: *cr4,
            cr8: apic.task_priority.into(),
            efer: *efer,
            apic_base: apic.base,
            pdptes: uses_pdptes(*cr0, *cr4, *efer).then_some(*pdptes),
        },
        debug: to_debug(dr, *dr6, *dr7),
        xcr0: *xcr0,
        xsave: image::to_kvm(xsave),
        events: Events {
            exception: *pending,
            interrupt: *interrupt,
            shadow: *shadow,
            nmi_pending: *nmi_pending,
            nmi_blocked: *nmi_blocked,
        },
        msrs: msrs::values(system, profile, kept),
    };
    let ours = Ours {
        system: system.clone(),
    };
    (kernel, ours)
}

/// Puts a state together again.
pub(crate) fn join(
    kernel: &KernelState,
    ours: &Ours,
    profile: &CpuProfile,
    tsc_offset: u64,
    activity: Activity,
) -> CpuState {
    let KernelState {
        regs,
        special,
        debug,
        xcr0,
        xsave,
        events,
        msrs,
    } = kernel;
    let Special {
        segments,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr0,
        cr2,
        cr3,
        cr4,
        // The local APIC's.
        cr8: _,
        efer,
        apic_base: _,
        pdptes,
    } = special;
    let Events {
        exception,
        interrupt,
        shadow,
        nmi_pending,
        nmi_blocked,
    } = *events;
    let (gpr, rip, rflags) = from_regs(regs);
    let (dr, dr6, dr7) = from_debug(debug);
    let SystemState {
        misc_enable,
        mcg_status,
        mtrrs,
        paravirtual,
        // Where the kernel has no such MSR: else it is overwritten below.
        tsc_aux,
        spec_ctrl,
        ..
    } = ours.system;
    let mut system = SystemState {
        segments: *segments,
        ldtr: *ldtr,
        tr: *tr,
        gdtr: *gdtr,
        idtr: *idtr,
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        xcr0: *xcr0,
        pdptes: pdptes
            .filter(|_| uses_pdptes(*cr0, *cr4, *efer))
            .unwrap_or(ours.system.pdptes),
        dr,
        dr6,
        dr7,
        efer: *efer,
        star: 0,
        lstar: 0,
        cstar: 0,
        sfmask: 0,
        kernel_gs_base: 0,
        sysenter_cs: 0,
        sysenter_esp: 0,
        sysenter_eip: 0,
        tsc_aux,
        tsc_offset,
        tsc_adjust: 0,
        pat: 0,
        misc_enable,
        spec_ctrl,
        mcg_status,
        mtrrs,
        paravirtual,
        shadow,
        nmi_blocked,
        nmi_pending,
        activity,
    };
    msrs::store(&mut system, msrs);
    CpuState {
        gpr,
        rip,
        rflags,
        xsave: image::from_kvm(xsave, profile.xcr0_mask()),
        system,
        pending: exception,
        interrupt,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use trapgate_x86::profile::Level;
    use trapgate_x86::registers::{MXCSR_MASK, dr, rflags};
    use trapgate_x86::state::{Mtrrs, XSAVE_BYTES};
    use trapgate_x86::{InterruptShadow, Segment, TableRegister, XsaveImage};

    use super::*;
    use crate::msrs::KERNELS;

    fn segment() -> impl Strategy<Value = Segment> {
        any::<(u16, u64, u32, u32)>().prop_map(|(selector, base, limit, access)| Segment {
            selector,
            base,
            limit,
            access: access & 0x1_f0ff,
        })
    }

    fn canonical() -> impl Strategy<Value = u64> {
        any::<i64>().prop_map(|value| (value << 16 >> 16) as u64)
    }

    fn mtrrs() -> impl Strategy<Value = Mtrrs> {
        any::<(u64, [u64; 11], [(u64, u64); 8])>().prop_map(|(default_type, fixed, variable)| {
            Mtrrs {
                default_type,
                fixed,
                variable,
            }
        })
    }

    prop_compose! {
        fn system()(
            segments in prop::array::uniform6(segment()),
            [ldtr, tr] in prop::array::uniform2(segment()),
            tables in any::<[(u64, u16); 2]>(),
            [cr0, cr2, cr3, cr4, efer, xcr0] in any::<[u64; 6]>(),
            (pdptes, dr, dr6, dr7) in any::<([u64; 4], [u64; 4], u64, u64)>(),
            (star, misc_enable, tsc_offset, tsc_adjust) in any::<(u64, u64, u64, u64)>(),
            addresses in prop::array::uniform5(canonical()),
            (sfmask, sysenter_cs, tsc_aux) in any::<(u32, u32, u32)>(),
            pat in prop::array::uniform8(prop::sample::select(vec![0u8, 1, 4, 5, 6, 7])),
            (spec_ctrl, mcg_status) in any::<(u64, u64)>(),
            (system_time, wall_clock) in any::<(u64, u64)>(),
            mtrrs in mtrrs(),
            shadow in prop::sample::select(vec![
                InterruptShadow::None, InterruptShadow::Sti, InterruptShadow::MovSs,
            ]),
            (nmi_blocked, nmi_pending) in any::<(bool, bool)>(),
            activity in prop::sample::select(vec![
                Activity::Running, Activity::Halted, Activity::WaitForSipi, Activity::Shutdown,
            ]),
        ) -> SystemState {
            let [gdtr, idtr] = tables.map(|(base, limit)| TableRegister { base, limit });
            let [lstar, cstar, kernel_gs_base, sysenter_esp, sysenter_eip] = addresses;
            SystemState {
                segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, xcr0, pdptes, dr, dr6, dr7,
                efer, star, lstar, cstar, sfmask: sfmask.into(), kernel_gs_base,
                sysenter_cs: sysenter_cs.into(), sysenter_esp, sysenter_eip,
                tsc_aux: tsc_aux.into(), tsc_offset, tsc_adjust, pat: u64::from_le_bytes(pat),
                misc_enable, spec_ctrl, mcg_status, mtrrs,
                paravirtual: ParavirtualMsrs { system_time, wall_clock },
                shadow, nmi_blocked, nmi_pending, activity,
            }
        }
    }

    prop_compose! {
        fn state()(
            (gpr, rip, rflags) in any::<([u64; 16], u64, u64)>(),
            seed in prop::collection::vec(any::<u8>(), 1..32),
            system in system(),
            vector in prop::option::of(prop::sample::select(vec![0u8, 1, 6, 8, 13, 14, 17])),
            (error_code, interrupt) in any::<(Option<u32>, Option<u8>)>(),
        ) -> CpuState {
            let mut image = [0; XSAVE_BYTES];
            for (byte, seed) in image.iter_mut().zip(seed.iter().cycle()) {
                *byte = seed | 1;
            }
            image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
            image[416..576].fill(0);
            image[512] = 7;
            CpuState {
                gpr, rip, rflags,
                xsave: XsaveImage(Box::new(image)),
                pending: vector.map(|vector| Exception {
                    vector: Vector(vector),
                    error_code,
                    // Else CR2 would change before the fault's delivery changes it.
                    address: if vector == 14 { system.cr2 } else { 0 },
                }),
                system,
                interrupt,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn state_taken_apart_is_the_state_put_together(state in state(), all: bool) {
            let profile = CpuProfile::new(Level::V3, 1_000_000_000);
            // With and without the MSRs that a kernel may not know.
            let kept = if all { &KERNELS[..] } else { &KERNELS[..10] };
            let (kernel, ours) = split(&state, &profile, kept, ApicRegisters::default());
            let system = &state.system;
            let back = join(&kernel, &ours, &profile, system.tsc_offset, system.activity);
            prop_assert_eq!(&back.system, system);
            prop_assert!(back.xsave == state.xsave);
            prop_assert_eq!(back, state);
        }
    }

    #[test]
    fn pending_page_fault_brings_its_address_in_cr2() {
        let profile = CpuProfile::new(Level::V2, 1_000_000_000);
        let state = CpuState {
            pending: Some(Exception::page_fault(0x1234, 2)),
            rflags: rflags::ONE,
            ..CpuState::default()
        };
        let (kernel, _) = split(&state, &profile, &KERNELS, ApicRegisters::default());
        assert_eq!(kernel.special.cr2, 0x1234);
        assert_eq!(kernel.debug.dr6, dr::DR6_ONES);
    }
}
