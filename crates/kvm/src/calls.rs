//! Calls of the kernel's that `kvm-ioctls` does not have.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_IRQCHIP_IOAPIC, kvm_device_attr, kvm_interrupt, kvm_ioapic_state,
    kvm_ioeventfd, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_msrs,
    kvm_pic_state, kvm_run, kvm_sregs2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::controllers::{KernelIoApic, PAGE};

/// The kernel's `_IO` macro family (`include/uapi/asm-generic/ioctl.h`).
const fn number(direction: u32, number: u32, size: usize) -> u64 {
    const KVMIO: u32 = 0xae;
    (direction << 30 | (size as u32) << 16 | KVMIO << 8 | number) as u64
}

const WRITE: u32 = 1;
const READ: u32 = 2;

const KVM_GET_MP_STATE: u64 = number(READ, 0x98, size_of::<kvm_mp_state>());
const KVM_INTERRUPT: u64 = number(WRITE, 0x86, size_of::<kvm_interrupt>());
const KVM_GET_SREGS2: u64 = number(READ, 0xcc, size_of::<kvm_sregs2>());
const KVM_SET_SREGS2: u64 = number(WRITE, 0xcd, size_of::<kvm_sregs2>());
const KVM_GET_MSRS: u64 = number(READ | WRITE, 0x88, size_of::<kvm_msrs>());
const KVM_SET_MSRS: u64 = number(WRITE, 0x89, size_of::<kvm_msrs>());
const KVM_SET_SIGNAL_MASK: u64 = number(WRITE, 0x8b, 4);
const KVM_GET_LAPIC: u64 = number(READ, 0x8e, size_of::<kvm_lapic_state>());
const KVM_SET_LAPIC: u64 = number(WRITE, 0x8f, size_of::<kvm_lapic_state>());
const KVM_IOEVENTFD: u64 = number(WRITE, 0x79, size_of::<kvm_ioeventfd>());
const KVM_GET_DEVICE_ATTR: u64 = number(WRITE, 0xe2, size_of::<kvm_device_attr>());
const KVM_SET_DEVICE_ATTR: u64 = number(WRITE, 0xe1, size_of::<kvm_device_attr>());

fn result(returned: i32) -> io::Result<()> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// KVM_INTERRUPT: queues an external interrupt for delivery, without an irqchip in the kernel.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's; the kernel reads a `kvm_interrupt`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const argument) })
}

/// KVM_GET_MP_STATE, for what it does beside telling: the processor accepts INIT and start-up IPIs that wait.
pub(crate) fn accept_startup(vcpu: &impl AsRawFd) -> io::Result<()> {
    let mut state = kvm_mp_state::default();
    // SAFETY: the descriptor is a vCPU's; the kernel writes a `kvm_mp_state`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_MP_STATE, &raw mut state) })
}

/// KVM_GET_SREGS2.
pub(crate) fn sregs2(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the descriptor is a vCPU's; the kernel writes a `kvm_sregs2`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS2, &raw mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2.
pub(crate) fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the descriptor is a vCPU's; the kernel reads a `kvm_sregs2`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS2, &raw const *sregs) })
}

/// KVM_VCPU_TSC_OFFSET: what is added to the host's TSC, scaled.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the descriptor is a vCPU's; the kernel writes a `u64` at the attribute's address, which
    // lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) })?;
    Ok(offset)
}

/// As [`tsc_offset`], the other way.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the descriptor is a vCPU's; the kernel reads a `u64` at the attribute's address, which
    // lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) })
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: kvm_bindings::KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
        flags: 0,
    }
}

/// An access to a port that the kernel reports.
pub(crate) struct PortAccess<'a> {
    pub(crate) port: u16,
    /// Bytes of each element: 1, 2 or 4.
    pub(crate) size: usize,
    pub(crate) is_input: bool,
    /// One element, or as many as a string instruction moves.
    pub(crate) data: &'a mut [u8],
}

/// The access of which KVM_EXIT_IO tells.
pub(crate) fn port_access(run: &mut kvm_run) -> PortAccess<'_> {
    // SAFETY: every member of the union is plain data of integers, so that reading any is
    // defined; the caller has just seen KVM_EXIT_IO.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let start = (&raw mut *run).cast::<u8>();
    // SAFETY: the kernel gives the offset of the data from the start of the mapping of `run`,
    // which is several pages long and lives as long as the vCPU that `run` is borrowed from.
    let data = unsafe {
        std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), io.count as usize * size)
    };
    PortAccess {
        port: io.port,
        size,
        is_input: u32::from(io.direction) == KVM_EXIT_IO_IN,
        data,
    }
}

/// What KVM_EXIT_MMIO asks for.
pub(crate) struct MemoryAccess<'a> {
    pub(crate) gpa: u64,
    pub(crate) is_write: bool,
    /// What is written, or the place for what is read: 8 bytes at most.
    pub(crate) data: &'a mut [u8],
}

/// The access of which KVM_EXIT_MMIO tells.
pub(crate) fn memory_access(run: &mut kvm_run) -> MemoryAccess<'_> {
    // SAFETY: as in `port_access`, for an exit of this kind.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    MemoryAccess {
        gpa: mmio.phys_addr,
        is_write: mmio.is_write != 0,
        data: &mut mmio.data[..length],
    }
}

/// Answers KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR: the value that was read, or anything if it
/// was a write; `None` raises #GP(0).
pub(crate) fn answer_msr(run: &mut kvm_run, value: Option<u64>) {
    // SAFETY: as in `port_access`, for an exit of this kind.
    let msr = unsafe { &mut run.__bindgen_anon_1.msr };
    msr.error = value.is_none().into();
    msr.data = value.unwrap_or_default();
}

/// The kernel's code of the internal error that it reports.
pub(crate) fn suberror(run: &kvm_run) -> u64 {
    // SAFETY: as in `port_access`, for an exit of this kind.
    unsafe { run.__bindgen_anon_1.internal.suberror }.into()
}

/// Another descriptor of the same processor.
pub(crate) fn duplicate(vcpu: &VcpuFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned()
}

/// `struct kvm_msrs` with one entry.
#[repr(C)]
struct OneMsr {
    header: kvm_msrs,
    entry: kvm_msr_entry,
}

impl OneMsr {
    fn new(index: u32, data: u64) -> Self {
        Self {
            header: kvm_msrs {
                nmsrs: 1,
                ..kvm_msrs::default()
            },
            entry: kvm_msr_entry {
                index,
                data,
                ..kvm_msr_entry::default()
            },
        }
    }
}

/// KVM_GET_MSRS of one.
pub(crate) fn msr(vcpu: &OwnedFd, index: u32) -> io::Result<u64> {
    let mut argument = OneMsr::new(index, 0);
    // SAFETY: the descriptor is a vCPU's; the kernel reads and writes the header and as many
    // entries as it names, which is one.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_MSRS, &raw mut argument) };
    one(done)?;
    Ok(argument.entry.data)
}

/// KVM_SET_MSRS of one.
pub(crate) fn set_msr(vcpu: &OwnedFd, index: u32, data: u64) -> io::Result<()> {
    let argument = OneMsr::new(index, data);
    // SAFETY: as in `msr`, but that the kernel only reads.
    one(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_MSRS, &raw const argument) })
}

/// The kernel tells how many MSRs it has dealt with.
fn one(done: i32) -> io::Result<()> {
    result(done)?;
    if done != 1 {
        return Err(io::Error::other("the MSR is not known"));
    }
    Ok(())
}

/// IA32_APIC_BASE.
pub(crate) fn apic_base(vcpu: &impl AsRawFd) -> io::Result<u64> {
    Ok(sregs2(vcpu)?.apic_base)
}

/// As [`apic_base`], the other way.
pub(crate) fn set_apic_base(vcpu: &impl AsRawFd, base: u64) -> io::Result<()> {
    let mut sregs = sregs2(vcpu)?;
    sregs.apic_base = base;
    set_sregs2(vcpu, &sregs)
}

/// KVM_GET_LAPIC.
pub(crate) fn lapic(vcpu: &impl AsRawFd) -> io::Result<[u8; PAGE]> {
    let mut state = kvm_lapic_state::default();
    // SAFETY: the descriptor is a vCPU's; the kernel writes a `kvm_lapic_state`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_LAPIC, &raw mut state) })?;
    Ok(state.regs.map(|byte| byte as u8))
}

/// KVM_SET_LAPIC.
pub(crate) fn set_lapic(vcpu: &OwnedFd, page: &[u8; PAGE]) -> io::Result<()> {
    let state = kvm_lapic_state {
        regs: page.map(|byte| byte as libc::c_char),
    };
    // SAFETY: the descriptor is a vCPU's; the kernel reads a `kvm_lapic_state`, which lives.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_LAPIC, &raw const state) })
}

/// The PIC that KVM_GET_IRQCHIP gave.
pub(crate) fn pic_of(irqchip: &kvm_irqchip) -> kvm_pic_state {
    // SAFETY: every member of the union is plain data of integers, so that reading any is
    // defined.
    unsafe { irqchip.chip.pic }
}

/// The I/O APIC that KVM_GET_IRQCHIP gave.
pub(crate) fn io_apic_of(irqchip: &kvm_irqchip) -> KernelIoApic {
    // SAFETY: as in `pic_of`.
    let state = unsafe { irqchip.chip.ioapic };
    KernelIoApic {
        base: state.base_address,
        index: state.ioregsel,
        id: state.id,
        requests: state.irr,
        // SAFETY: as in `pic_of`.
        entries: state.redirtbl.map(|entry| unsafe { entry.bits }),
    }
}

/// The inverse of [`io_apic_of`].
pub(crate) fn io_apic_irqchip(state: &KernelIoApic) -> kvm_irqchip {
    let KernelIoApic {
        base,
        index,
        id,
        requests,
        entries,
    } = state;
    let mut ioapic = kvm_ioapic_state {
        base_address: *base,
        ioregsel: *index,
        id: *id,
        irr: *requests,
        ..kvm_ioapic_state::default()
    };
    for (kernel, bits) in ioapic.redirtbl.iter_mut().zip(entries) {
        kernel.bits = *bits;
    }
    let mut irqchip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..kvm_irqchip::default()
    };
    irqchip.chip.ioapic = ioapic;
    irqchip
}

/// KVM_SET_SIGNAL_MASK: the signals that are blocked while the kernel runs the processor, a bit each from
/// signal 1; `None` for the thread's own.
pub(crate) fn set_signal_mask(vcpu: &OwnedFd, blocked: Option<u64>) -> io::Result<()> {
    /// `struct kvm_signal_mask` with the kernel's own size of a signal set.
    #[repr(C, packed)]
    struct SignalMask {
        length: u32,
        set: u64,
    }
    let mask = blocked.map(|set| SignalMask { length: 8, set });
    let argument = mask
        .as_ref()
        .map_or(std::ptr::null(), |mask| &raw const *mask);
    // SAFETY: the descriptor is a vCPU's; the kernel reads a length and as many bytes, or nothing.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, argument) })
}

/// KVM_IOEVENTFD for writes of two bytes, whatever they are, at a guest-physical address: `on` or off.
/// (`kvm-ioctls` has either a value that must match, or writes of any length; for those the kernel takes reads for writes.)
pub(crate) fn ioeventfd(machine: &VmFd, event: &EventFd, gpa: u64, on: bool) -> io::Result<()> {
    let argument = kvm_ioeventfd {
        addr: gpa,
        len: 2,
        fd: event.as_raw_fd(),
        flags: if on {
            0
        } else {
            1 << kvm_bindings::kvm_ioeventfd_flag_nr_deassign
        },
        ..kvm_ioeventfd::default()
    };
    // SAFETY: the descriptor is a machine's; the kernel reads a `kvm_ioeventfd`, which lives, and keeps a reference of its own to
    // the event.
    result(unsafe { libc::ioctl(machine.as_raw_fd(), KVM_IOEVENTFD, &raw const argument) })
}
