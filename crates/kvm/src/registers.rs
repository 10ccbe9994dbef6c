//! Registers between our form and the kernel's: pure functions, each with its inverse.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs2};
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::sreg;
use trapgate_x86::{Segment, TableRegister};

/// General registers, RIP, RFLAGS.
pub(crate) fn to_regs(gpr: &[u64; 16], rip: u64, rflags: u64) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = *gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

/// The inverse of [`to_regs`].
pub(crate) fn from_regs(regs: &kvm_regs) -> ([u64; 16], u64, u64) {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = *regs;
    let gpr = [
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
    ];
    (gpr, rip, rflags)
}

fn bit(access: u32, bit: u32) -> u8 {
    u8::from(access & bit != 0)
}

/// A segment register. The kernel's fields are the bits of the access rights.
pub(crate) fn to_segment(segment: &Segment) -> kvm_segment {
    let Segment {
        selector,
        base,
        limit,
        access: rights,
    } = *segment;
    kvm_segment {
        base,
        limit,
        selector,
        type_: (rights & access::TYPE) as u8,
        present: bit(rights, access::P),
        dpl: segment.dpl(),
        db: bit(rights, access::DB),
        s: bit(rights, access::S),
        l: bit(rights, access::L),
        g: bit(rights, access::G),
        avl: bit(rights, access::AVL),
        unusable: bit(rights, access::UNUSABLE),
        padding: 0,
    }
}

/// The inverse of [`to_segment`].
pub(crate) fn from_segment(segment: &kvm_segment) -> Segment {
    let kvm_segment {
        base,
        limit,
        selector,
        type_,
        present,
        dpl,
        db,
        s,
        l,
        g,
        avl,
        unusable,
        padding: _,
    } = *segment;
    let flag = |set: u8, bit: u32| if set != 0 { bit } else { 0 };
    let rights = u32::from(type_) & access::TYPE
        | (u32::from(dpl) << access::DPL_SHIFT) & access::DPL
        | flag(present, access::P)
        | flag(db, access::DB)
        | flag(s, access::S)
        | flag(l, access::L)
        | flag(g, access::G)
        | flag(avl, access::AVL)
        | flag(unusable, access::UNUSABLE);
    Segment {
        selector,
        base,
        limit,
        access: rights,
    }
}

fn to_table(table: &TableRegister) -> kvm_dtable {
    let TableRegister { base, limit } = *table;
    kvm_dtable {
        base,
        limit,
        padding: [0; 3],
    }
}

fn from_table(table: &kvm_dtable) -> TableRegister {
    let kvm_dtable {
        base,
        limit,
        padding: _,
    } = *table;
    TableRegister { base, limit }
}

/// What the kernel has in its special registers, in our words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Special {
    pub(crate) segments: [Segment; 6],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: TableRegister,
    pub(crate) idtr: TableRegister,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// Task priority.
    pub(crate) cr8: u64,
    pub(crate) efer: u64,
    pub(crate) apic_base: u64,
    /// Where PAE paging uses them.
    pub(crate) pdptes: Option<[u64; 4]>,
}

impl Special {
    pub(crate) fn to_sregs(&self) -> kvm_sregs2 {
        let Self {
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            pdptes,
        } = self;
        kvm_sregs2 {
            cs: to_segment(&segments[sreg::CS]),
            ds: to_segment(&segments[sreg::DS]),
            es: to_segment(&segments[sreg::ES]),
            fs: to_segment(&segments[sreg::FS]),
            gs: to_segment(&segments[sreg::GS]),
            ss: to_segment(&segments[sreg::SS]),
            tr: to_segment(tr),
            ldt: to_segment(ldtr),
            gdt: to_table(gdtr),
            idt: to_table(idtr),
            cr0: *cr0,
            cr2: *cr2,
            cr3: *cr3,
            cr4: *cr4,
            cr8: *cr8,
            efer: *efer,
            apic_base: *apic_base,
            flags: if pdptes.is_some() {
                kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID.into()
            } else {
                0
            },
            pdptrs: pdptes.unwrap_or_default(),
        }
    }

    pub(crate) fn from_sregs(sregs: &kvm_sregs2) -> Self {
        let kvm_sregs2 {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        } = sregs;
        let valid = u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID);
        Self {
            segments: [es, cs, ss, ds, fs, gs].map(from_segment),
            ldtr: from_segment(ldt),
            tr: from_segment(tr),
            gdtr: from_table(gdt),
            idtr: from_table(idt),
            cr0: *cr0,
            cr2: *cr2,
            cr3: *cr3,
            cr4: *cr4,
            cr8: *cr8,
            efer: *efer,
            apic_base: *apic_base,
            pdptes: (flags & valid != 0).then_some(*pdptrs),
        }
    }
}

/// DR0 to DR3, DR6, DR7.
pub(crate) fn to_debug(dr: &[u64; 4], dr6: u64, dr7: u64) -> kvm_debugregs {
    kvm_debugregs {
        db: *dr,
        dr6,
        dr7,
        ..kvm_debugregs::default()
    }
}

/// The inverse of [`to_debug`].
pub(crate) fn from_debug(debug: &kvm_debugregs) -> ([u64; 4], u64, u64) {
    let kvm_debugregs {
        db,
        dr6,
        dr7,
        flags: _,
        reserved: _,
    } = *debug;
    (db, dr6, dr7)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment() -> impl Strategy<Value = Segment> {
        (any::<u16>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
            |(selector, base, limit, access)| Segment {
                selector,
                base,
                limit,
                access: access & (0xf0ff | access::UNUSABLE),
            },
        )
    }

    fn table() -> impl Strategy<Value = TableRegister> {
        (any::<u64>(), any::<u16>()).prop_map(|(base, limit)| TableRegister { base, limit })
    }

    proptest! {
        #[test]
        fn general_registers_come_back(gpr: [u64; 16], rip: u64, rflags: u64) {
            prop_assert_eq!(from_regs(&to_regs(&gpr, rip, rflags)), (gpr, rip, rflags));
        }

        #[test]
        fn debug_registers_come_back(dr: [u64; 4], dr6: u64, dr7: u64) {
            prop_assert_eq!(from_debug(&to_debug(&dr, dr6, dr7)), (dr, dr6, dr7));
        }

        #[test]
        fn special_registers_come_back(
            segments in prop::array::uniform6(segment()),
            [ldtr, tr] in prop::array::uniform2(segment()),
            [gdtr, idtr] in prop::array::uniform2(table()),
            [cr0, cr2, cr3, cr4, cr8, efer, apic_base] in any::<[u64; 7]>(),
            pdptes: Option<[u64; 4]>,
        ) {
            let special = Special {
                segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, cr8, efer, apic_base, pdptes,
            };
            prop_assert_eq!(Special::from_sregs(&special.to_sregs()), special);
        }
    }

    #[test]
    fn general_registers_keep_their_names() {
        let gpr = std::array::from_fn(|index| index as u64);
        let regs = to_regs(&gpr, 16, 17);
        assert_eq!([regs.rax, regs.rcx, regs.rdx, regs.rbx], [0, 1, 2, 3]);
        assert_eq!([regs.rsp, regs.rbp, regs.rsi, regs.rdi], [4, 5, 6, 7]);
        assert_eq!([regs.r8, regs.r15, regs.rip, regs.rflags], [8, 15, 16, 17]);
    }

    #[test]
    fn segments_keep_their_names() {
        let mut special = Special::from_sregs(&kvm_sregs2::default());
        for (index, segment) in special.segments.iter_mut().enumerate() {
            segment.selector = index as u16 + 1;
        }
        let sregs = special.to_sregs();
        let named = [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs];
        assert_eq!(named.map(|segment| segment.selector), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn long_mode_code_segment_has_its_bits_where_the_kernel_wants_them() {
        let code = Segment {
            selector: 8,
            base: 0,
            limit: 0xffff_ffff,
            access: 0xa09b,
        };
        let segment = to_segment(&code);
        assert_eq!((segment.type_, segment.s, segment.present), (0xb, 1, 1));
        assert_eq!((segment.l, segment.db, segment.g), (1, 0, 1));
        assert_eq!((segment.dpl, segment.unusable), (0, 0));
    }
}
