//! Loads and stores at linear addresses.

use trapgate_memory::{HostAddress, PAGE_SIZE};
use trapgate_x86::Exception;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::sreg;

use crate::cpu::{Cpu, Stop};
use crate::op::{AddressForm, NO_REGISTER, Op, RIP_REGISTER};
use crate::tlb::{Access, LARGE_BYTES, Rights, View};
use crate::width::Width;

/// What a guest-physical page is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// RAM, at this host address. Writes to it must be reported if `traced`.
    Ram { host: HostAddress, traced: bool },
    /// A device, or nothing.
    Device,
}

/// A translated piece of an access: it lies in one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Guest-physical address; only meaningful for devices and traced RAM.
    pub(crate) gpa: u64,
    pub(crate) place: Place,
}

/// The exception for an address that is not canonical (SDM vol. 3A, 7.15).
fn not_canonical(segment: u8) -> Exception {
    if usize::from(segment) == sreg::SS {
        Exception::ss(0)
    } else {
        Exception::gp(0)
    }
}

impl Cpu {
    // Addresses of operands.

    /// The offset of an op's memory operand in its segment.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        let displacement = op.displacement as i64 as u64;
        match op.form {
            AddressForm::Base => {
                self.regs.gpr[usize::from(op.base) & 15].wrapping_add(displacement)
            }
            AddressForm::BaseIndex => self.regs.gpr[usize::from(op.base) & 15]
                .wrapping_add(self.regs.gpr[usize::from(op.index) & 15] << (op.index >> 4 & 3))
                .wrapping_add(displacement),
            AddressForm::Rip => self.rip.wrapping_add(displacement),
            AddressForm::General | AddressForm::None => self.general_offset(op),
        }
    }

    fn general_offset(&self, op: &Op) -> u64 {
        let mut offset = op.displacement as i64 as u64;
        match op.base {
            NO_REGISTER => {}
            RIP_REGISTER => offset = offset.wrapping_add(self.rip),
            base => offset = offset.wrapping_add(self.regs.gpr[usize::from(base) & 15]),
        }
        if op.index != NO_REGISTER {
            let index = self.regs.gpr[usize::from(op.index) & 15];
            offset = offset.wrapping_add(index << (op.index >> 4 & 3));
        }
        offset & Self::address_mask(op)
    }

    /// The linear address of an op's memory operand of `size` bytes, segment checked.
    #[inline(always)]
    pub fn operand_address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        if op.form == AddressForm::General {
            self.general_address(op, size, write)
        } else {
            Ok(self.offset(op))
        }
    }

    fn general_address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        let offset = self.general_offset(op);
        self.segment_address(usize::from(op.segment), offset, size, write)
    }

    // Explicit accesses, with the rights of the current view.

    /// Loads an op's memory operand.
    #[inline(always)]
    pub fn load<T: Width>(&mut self, op: &Op) -> Result<T, Stop> {
        let linear = self.operand_address(op, T::BYTES, false)?;
        self.read(linear, op.segment)
    }

    /// Stores an op's memory operand.
    #[inline(always)]
    pub fn store<T: Width>(&mut self, op: &Op, value: T) -> Result<(), Stop> {
        let linear = self.operand_address(op, T::BYTES, true)?;
        self.write(linear, op.segment, value)
    }

    /// Replaces an op's memory operand by what `change` makes of it, not atomically.
    #[inline(always)]
    pub fn modify<T: Width>(
        &mut self,
        op: &Op,
        change: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<(), Stop> {
        let linear = self.operand_address(op, T::BYTES, true)?;
        if let Some(host) = self.tlb.write(linear, T::BYTES) {
            let value = change(self, T::load(host));
            value.store(host);
            return Ok(());
        }
        self.modify_slow(linear, op.segment, change)
    }

    #[cold]
    fn modify_slow<T: Width>(
        &mut self,
        linear: u64,
        segment: u8,
        change: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<(), Stop> {
        // The check for writing comes first, so that a fault shows as one of a write.
        self.probe(linear, T::BYTES, Access::Write, segment)?;
        let old = self.read(linear, segment)?;
        let new = change(self, old);
        self.write(linear, segment, new)
    }

    /// Loads from a linear address; `segment` decides between #SS and #GP.
    #[inline(always)]
    pub fn read<T: Width>(&mut self, linear: u64, segment: u8) -> Result<T, Stop> {
        match self.tlb.read(linear, T::BYTES) {
            Some(host) => Ok(T::load(host)),
            None => self.read_slow(linear, segment, T::BYTES).map(T::from_u64),
        }
    }

    /// Stores to a linear address; `segment` decides between #SS and #GP.
    #[inline(always)]
    pub fn write<T: Width>(&mut self, linear: u64, segment: u8, value: T) -> Result<(), Stop> {
        match self.tlb.write(linear, T::BYTES) {
            Some(host) => {
                value.store(host);
                Ok(())
            }
            None => self.write_slow(linear, segment, value.to_u64(), T::BYTES),
        }
    }

    #[cold]
    fn read_slow(&mut self, linear: u64, segment: u8, size: u64) -> Result<u64, Stop> {
        self.check_explicit(linear, segment, size, Access::Read)?;
        let mut bytes = [0; 8];
        self.read_bytes_as(linear, &mut bytes[..size as usize], self.plain_view)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    fn write_slow(&mut self, linear: u64, segment: u8, value: u64, size: u64) -> Result<(), Stop> {
        self.check_explicit(linear, segment, size, Access::Write)?;
        self.write_bytes_as(
            linear,
            &value.to_le_bytes()[..size as usize],
            self.plain_view,
        )
    }

    /// The checks of an explicit access that come before translation: alignment where EFLAGS.AC asks for it, canonical
    /// address; and data breakpoints.
    pub(crate) fn check_explicit(
        &mut self,
        linear: u64,
        segment: u8,
        size: u64,
        access: Access,
    ) -> Result<(), Stop> {
        // Other sizes have requirements of their own, or none (SDM vol. 3A, table 7-7).
        let alignment = match size {
            2 | 4 | 8 => size,
            10 => 8,
            _ => 1,
        };
        self.check_access(linear, segment, size, alignment, access)
    }

    /// As [`Self::check_explicit`], of an access that has an alignment of its own.
    pub(crate) fn check_access(
        &mut self,
        linear: u64,
        segment: u8,
        size: u64,
        alignment: u64,
        access: Access,
    ) -> Result<(), Stop> {
        // The host CPU finds a misaligned address before one whose end is not canonical.
        let long = self.is_64bit();
        if long && !is_canonical(linear) {
            return Err(self.raise(not_canonical(segment)));
        }
        let checked = self.view == View::Checked;
        if checked {
            self.check_alignment(linear, alignment)?;
        }
        if long && !is_canonical(linear.wrapping_add(size.max(1) - 1)) {
            return Err(self.raise(not_canonical(segment)));
        }
        if checked {
            self.note_data_breakpoints(linear, size, access);
        }
        Ok(())
    }

    /// Whether the access could be done in the current view: faults as it would.
    pub(crate) fn probe(
        &mut self,
        linear: u64,
        size: u64,
        access: Access,
        segment: u8,
    ) -> Result<(), Stop> {
        self.check_explicit(linear, segment, size, access)?;
        self.probe_pages(linear, size, access)
    }

    /// As [`Self::probe`], of an operand that need not be aligned whatever EFLAGS.AC says.
    pub(crate) fn probe_elements(
        &mut self,
        linear: u64,
        size: u64,
        access: Access,
        segment: u8,
    ) -> Result<(), Stop> {
        self.check_access(linear, segment, size, 1, access)?;
        self.probe_pages(linear, size, access)
    }

    fn probe_pages(&mut self, linear: u64, size: u64, access: Access) -> Result<(), Stop> {
        let view = self.plain_view;
        let first = PAGE_SIZE - linear % PAGE_SIZE;
        self.piece(linear, access, view)?;
        let mut done = first;
        while done < size {
            self.piece(self.advance(linear, done), access, view)?;
            done += PAGE_SIZE;
        }
        Ok(())
    }

    // Implicit accesses: descriptor tables, task-state segments, frames of events.

    /// Loads with supervisor rights, whatever the privilege level.
    pub fn read_system<T: Width>(&mut self, linear: u64) -> Result<T, Stop> {
        let mut bytes = [0; 8];
        self.read_bytes_as(linear, &mut bytes[..T::BYTES as usize], View::Supervisor)?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// Stores with supervisor rights, whatever the privilege level.
    pub fn write_system<T: Width>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        let bytes = value.to_u64().to_le_bytes();
        self.write_bytes_as(linear, &bytes[..T::BYTES as usize], View::Supervisor)
    }

    /// Loads a run of bytes with the current view's rights.
    pub fn read_bytes(&mut self, linear: u64, data: &mut [u8], segment: u8) -> Result<(), Stop> {
        self.check_explicit(linear, segment, data.len() as u64, Access::Read)?;
        self.read_bytes_as(linear, data, self.plain_view)
    }

    /// Stores a run of bytes with the current view's rights; all of it or, on a fault, nothing.
    pub fn write_bytes(&mut self, linear: u64, data: &[u8], segment: u8) -> Result<(), Stop> {
        self.check_explicit(linear, segment, data.len() as u64, Access::Write)?;
        self.write_bytes_as(linear, data, self.plain_view)
    }

    /// As [`Self::read_bytes`], of an operand that need not be aligned whatever EFLAGS.AC says.
    pub(crate) fn read_elements(
        &mut self,
        linear: u64,
        data: &mut [u8],
        segment: u8,
    ) -> Result<(), Stop> {
        self.check_access(linear, segment, data.len() as u64, 1, Access::Read)?;
        self.read_bytes_as(linear, data, self.plain_view)
    }

    /// As [`Self::write_bytes`], of an operand that need not be aligned whatever EFLAGS.AC says.
    pub(crate) fn write_elements(
        &mut self,
        linear: u64,
        data: &[u8],
        segment: u8,
    ) -> Result<(), Stop> {
        self.check_access(linear, segment, data.len() as u64, 1, Access::Write)?;
        self.write_bytes_as(linear, data, self.plain_view)
    }

    /// Loads a run of bytes with a view's rights.
    pub(crate) fn read_bytes_as(
        &mut self,
        linear: u64,
        data: &mut [u8],
        view: View,
    ) -> Result<(), Stop> {
        let mut done = 0;
        while done < data.len() {
            let at = self.advance(linear, done as u64);
            let length = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(data.len() - done);
            let piece = self.piece(at, Access::Read, view)?;
            self.read_piece(piece, &mut data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// Stores a run of bytes with a view's rights; all of it or, on a fault, nothing.
    pub(crate) fn write_bytes_as(
        &mut self,
        linear: u64,
        data: &[u8],
        view: View,
    ) -> Result<(), Stop> {
        let first = ((PAGE_SIZE - linear % PAGE_SIZE) as usize).min(data.len());
        let piece = self.piece(linear, Access::Write, view)?;
        if first == data.len() {
            self.write_piece(piece, data);
            return Ok(());
        }
        // Translate every page before the first byte is written.
        let mut done = first;
        while done < data.len() {
            self.piece(self.advance(linear, done as u64), Access::Write, view)?;
            done += PAGE_SIZE as usize;
        }
        self.write_piece(piece, &data[..first]);
        let mut done = first;
        while done < data.len() {
            let length = (PAGE_SIZE as usize).min(data.len() - done);
            let at = self.advance(linear, done as u64);
            let piece = self.piece(at, Access::Write, view)?;
            self.write_piece(piece, &data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// A linear address `bytes` further on; outside 64-bit mode it wraps at 4 GiB.
    #[inline(always)]
    pub(crate) fn advance(&self, linear: u64, bytes: u64) -> u64 {
        let next = linear.wrapping_add(bytes);
        if self.is_64bit() {
            next
        } else if self.is_long() && linear > 0xffff_ffff {
            // Implicit accesses of compatibility mode use 64-bit addresses.
            next
        } else {
            next & 0xffff_ffff
        }
    }

    /// Translates one address, through the TLB, and says what lies there.
    pub(crate) fn piece(&mut self, linear: u64, access: Access, view: View) -> Result<Piece, Stop> {
        // A cached right to write means that the page has no traces; for loads they don't matter.
        let mut cached = self.tlb.find(view, access, linear, 1);
        if cached.is_none() && self.apart.is_none() {
            cached = self.tlb.find_large(view, access, linear);
        }
        if let Some(host) = cached {
            return Ok(Piece {
                gpa: 0,
                place: Place::Ram {
                    host,
                    traced: false,
                },
            });
        }
        let translation = self.translate(linear, access, view)?;
        if translation.page_bytes > PAGE_SIZE {
            self.tlb.note_large(linear, translation.page_bytes);
        }
        if self.apart.is_some() {
            return self.piece_apart(linear, access, view, translation);
        }
        let gpa = translation.gpa;
        let Some(host) = self.memory.host(gpa) else {
            return Ok(Piece {
                gpa,
                place: Place::Device,
            });
        };
        let traced = !self.memory.flags(gpa).is_empty();
        let page = self.memory.host(gpa & !(PAGE_SIZE - 1)).unwrap_or(host);
        let rights = Rights {
            // A page that the view may only execute must not be cached as readable.
            read: access != Access::Execute || translation.execute,
            write: translation.write && !traced,
            execute: translation.execute,
            global: translation.global,
        };
        self.tlb.insert(view, linear, page, rights);
        if translation.page_bytes >= LARGE_BYTES
            && let Some((start, traced)) = self.memory.run(gpa & !(LARGE_BYTES - 1), LARGE_BYTES)
        {
            let rights = Rights {
                write: translation.write && !traced,
                ..rights
            };
            self.tlb.insert_large(view, linear, start, rights);
        }
        Ok(Piece {
            gpa,
            place: Place::Ram { host, traced },
        })
    }

    /// Loads from a piece; `data` stays inside its page.
    pub(crate) fn read_piece(&mut self, piece: Piece, data: &mut [u8]) {
        match piece.place {
            Place::Ram { host, .. } => match data.len() {
                // One host instruction for what one guest instruction loads.
                2 => data.copy_from_slice(&host.load_u16().to_le_bytes()),
                4 => data.copy_from_slice(&host.load_u32().to_le_bytes()),
                8 => data.copy_from_slice(&host.load_u64().to_le_bytes()),
                _ => host.read(data),
            },
            Place::Device => {
                let mut gpa = piece.gpa;
                for chunk in data.chunks_mut(8) {
                    self.world.read_memory(gpa, chunk);
                    gpa += chunk.len() as u64;
                }
            }
        }
    }

    /// Stores to a piece; `data` stays inside its page.
    pub(crate) fn write_piece(&mut self, piece: Piece, data: &[u8]) {
        match piece.place {
            Place::Ram { host, traced } => {
                match *data {
                    [a, b] => host.store_u16(u16::from_le_bytes([a, b])),
                    [a, b, c, d] => host.store_u32(u32::from_le_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => {
                        host.store_u64(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                    }
                    _ => host.write(data),
                }
                if traced {
                    self.report_write(piece.gpa, data.len() as u64);
                }
            }
            Place::Device => {
                let mut gpa = piece.gpa;
                for chunk in data.chunks(8) {
                    self.world.write_memory(gpa, chunk);
                    gpa += chunk.len() as u64;
                }
            }
        }
    }

    /// Tells whoever traces the page of a write; `length` bytes from `gpa`, in one page.
    #[cold]
    pub(crate) fn report_write(&mut self, gpa: u64, length: u64) {
        if let Some(page) = self.memory.page_index(gpa) {
            self.memory.traces().report(page, gpa, length);
        }
        // If decoded code was hit, it must not run any further.
        self.end_block |= self.code.has_stale();
    }

    /// Stores guest-physical memory, as the processor's own writes to paravirtual structures.
    pub(crate) fn write_physical(&mut self, gpa: u64, data: &[u8]) {
        // Where there is no RAM the guest gave a bad address, and nothing happens.
        if self.memory.write(gpa, data).is_ok() {
            self.end_block |= self.code.has_stale();
        }
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Vector;
    use trapgate_x86::registers::gpr;

    use crate::testing::{fault, long_cpu};

    /// SDM vol. 1, 3.3.7.1.
    #[test]
    fn base_register_decides_between_ss_and_gp_unless_fs_or_gs_is_named() {
        let (in_rax, in_rbp): (&[u8], &[u8]) = (&[0x8b, 0x00], &[0x8b, 0x45, 0x00]);
        for (prefix, access, vector) in [
            (None, in_rax, Vector::GP),
            (None, in_rbp, Vector::SS),
            (Some(0x36), in_rax, Vector::GP),
            (Some(0x3e), in_rbp, Vector::SS),
            (Some(0x64), in_rbp, Vector::GP),
        ] {
            let (mut cpu, _) = long_cpu();
            cpu.regs.gpr[gpr::RAX] = 1 << 60;
            cpu.regs.gpr[gpr::RBP] = 1 << 60;
            let code: Vec<u8> = prefix.into_iter().chain(access.iter().copied()).collect();
            assert_eq!(fault(&mut cpu, &code), (vector, Some(0)), "{code:02x?}");
        }
    }

    /// The host CPU's order: an address that is not canonical, a misaligned one, one whose end is not canonical.
    #[test]
    fn alignment_check_comes_between_the_two_ends_of_an_operand() {
        use trapgate_x86::registers::{cr0, rflags};
        for (address, vector) in [
            ((1 << 47) + 1, Vector::GP),
            ((1 << 47) - 3, Vector::AC),
            ((1 << 47) - 4, Vector::AC),
        ] {
            let (mut cpu, _) = long_cpu();
            crate::testing::set_cpl(&mut cpu, 3);
            cpu.sys.cr0 |= cr0::AM;
            cpu.set_rflags(rflags::AC);
            cpu.regs.gpr[gpr::RAX] = address;
            // mov rcx, [rax]
            let raised = fault(&mut cpu, &[0x48, 0x8b, 0x08]);
            assert_eq!(raised, (vector, Some(0)), "{address:#x}");
        }
    }

    /// One large page with a traced page in it: the others may be written without a word, that one not.
    #[test]
    fn write_to_a_traced_page_of_a_large_one_is_seen() {
        use super::{Access, Place, View};
        use trapgate_memory::TraceFlags;
        use trapgate_x86::registers::{cr0, cr4};

        let (mut cpu, _) = crate::testing::protected_cpu();
        // 4 MiB at 4 MiB: present, writable, accessed, dirty.
        let entries = [0x83u32, 0x0040_00e3].map(u32::to_le_bytes).concat();
        cpu.memory
            .write(crate::testing::PAGE_TABLES, &entries)
            .expect("the table lies in memory");
        cpu.sys.cr3 = crate::testing::PAGE_TABLES;
        cpu.sys.cr4 |= cr4::PSE;
        cpu.sys.cr0 |= cr0::PG;
        cpu.update_mode();
        let traced = |cpu: &mut super::Cpu, linear| {
            let piece = cpu.piece(linear, Access::Write, View::Supervisor).ok();
            match piece.map(|piece| piece.place) {
                Some(Place::Ram { traced, .. }) => traced,
                place => panic!("{place:?}"),
            }
        };
        let page = cpu.memory.page_index(0x40_5000).expect("it is RAM");
        for trace in [false, true, false] {
            if trace {
                cpu.memory.traces().set(page, TraceFlags::CLEAN);
                let host = cpu.memory.host(0x40_5000).expect("it is RAM");
                cpu.tlb.revoke_write(host);
            } else {
                cpu.memory.traces().clear(page, TraceFlags::CLEAN);
                cpu.tlb.flush_all();
            }
            let before = cpu.walks;
            assert!(!traced(&mut cpu, 0x40_4000));
            assert!(!traced(&mut cpu, 0x40_6000));
            assert_eq!(traced(&mut cpu, 0x40_5000), trace);
            assert_eq!(traced(&mut cpu, 0x40_5000), trace);
            // Without a trace the first walk is for all of them.
            assert_eq!(cpu.walks - before == 1, !trace, "{trace}");
        }
    }
}
