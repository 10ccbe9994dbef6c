//! Walking the guest's page tables (SDM vol. 3A, chapter 5).

use trapgate_memory::HostAddress;
use trapgate_x86::Exception;
use trapgate_x86::paging::{fault, pte};
use trapgate_x86::profile::PHYSICAL_ADDRESS_BITS;
use trapgate_x86::registers::{cr0, cr4, efer};

use crate::cpu::{Cpu, Stop};
use crate::tlb::{Access, View};

/// Where a linear address leads, and what may be done there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    /// Guest-physical address of the byte.
    pub(crate) gpa: u64,
    /// The view may write (the dirty bit is set already, or there is none).
    pub(crate) write: bool,
    /// The view may fetch instructions.
    pub(crate) execute: bool,
    /// Bytes of the page.
    pub(crate) page_bytes: u64,
    /// The page is in every address space (CR4.PGE, and G in its entry).
    pub(crate) global: bool,
}

/// Bits 51 to 12 of an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Frame bits beyond the physical address width.
const BEYOND: u64 = FRAME & !((1 << PHYSICAL_ADDRESS_BITS) - 1);

/// An entry used by a walk: where it lies and what it held.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: u64,
    value: u64,
}

/// What a walk found before rights are looked at.
struct Walk {
    used: [Used; 4],
    levels: usize,
    /// Bytes of the 64-bit or 32-bit entries.
    entry_bytes: u64,
    /// Entries that have an accessed bit start here (PAE's top level has none).
    page_bytes: u64,
    frame: u64,
    writable: bool,
    user: bool,
    no_execute: bool,
}

/// How a walk fails: the error code bits P and RSVD.
struct WalkFault(u32);

const NOT_PRESENT: WalkFault = WalkFault(0);
const RESERVED: WalkFault = WalkFault(fault::P | fault::RSVD);

impl Cpu {
    /// Translates a linear address for an access in a view, setting accessed and dirty bits.
    pub(crate) fn translate(
        &mut self,
        linear: u64,
        access: Access,
        view: View,
    ) -> Result<Translation, Stop> {
        if self.sys.cr0 & cr0::PG == 0 {
            return Ok(Translation {
                gpa: linear & 0xffff_ffff,
                write: true,
                execute: true,
                page_bytes: 4096,
                global: false,
            });
        }
        self.walks += 1;
        loop {
            let walk = if self.sys.efer & efer::LMA != 0 {
                self.walk_four_level(linear)
            } else if self.sys.cr4 & cr4::PAE != 0 {
                self.walk_pae(linear)
            } else {
                self.walk_32bit(linear)
            };
            let walk = match walk {
                Ok(walk) => walk,
                Err(WalkFault(code)) => return Err(self.page_fault(linear, access, view, code)),
            };
            let Some((write, execute)) = self.rights(&walk, access, view) else {
                return Err(self.page_fault(linear, access, view, fault::P));
            };
            let leaf = walk.used[walk.levels - 1].value;
            let dirty = leaf & pte::D != 0;
            if !self.set_accessed_dirty(&walk, access == Access::Write) {
                // Another processor changed an entry: look again.
                continue;
            }
            return Ok(Translation {
                gpa: walk.frame | linear & (walk.page_bytes - 1),
                write: write && (dirty || access == Access::Write),
                execute,
                page_bytes: walk.page_bytes,
                global: leaf & pte::G != 0 && self.sys.cr4 & cr4::PGE != 0,
            });
        }
    }

    #[cold]
    fn page_fault(&mut self, linear: u64, access: Access, view: View, code: u32) -> Stop {
        let mut code = code;
        match access {
            Access::Read => {}
            Access::Write => code |= fault::W,
            // Bit 4 shows fetches only while NX or SMEP can make them fault.
            Access::Execute => {
                let nx = self.sys.efer & efer::NXE != 0 && self.sys.cr4 & cr4::PAE != 0;
                if nx || self.sys.cr4 & cr4::SMEP != 0 {
                    code |= fault::I;
                }
            }
        }
        if view == View::User {
            code |= fault::U;
        }
        self.raise(Exception::page_fault(linear, code))
    }

    /// May the view do this access? Gives its rights to write and execute, or `None`
    /// (SDM vol. 3A, 5.6.1).
    fn rights(&self, walk: &Walk, access: Access, view: View) -> Option<(bool, bool)> {
        let (read, write, execute);
        if view == View::User {
            read = walk.user;
            write = walk.user && walk.writable;
            execute = walk.user && !walk.no_execute;
        } else {
            let smap = walk.user && view == View::Supervisor && self.sys.cr4 & cr4::SMAP != 0;
            let smep = walk.user && self.sys.cr4 & cr4::SMEP != 0;
            read = !smap;
            write = !smap && (walk.writable || self.sys.cr0 & cr0::WP == 0);
            execute = !smep && !walk.no_execute;
        }
        let allowed = match access {
            Access::Read => read,
            Access::Write => write,
            Access::Execute => execute,
        };
        // A page that may be executed but not read (SMAP) can't be cached as readable; the caller
        // takes the read right from here being `Some` for a read.
        allowed.then_some((write, execute && read))
    }

    /// Sets the accessed bits of all entries and the dirty bit of the last, atomically. Says
    /// whether no entry had changed meanwhile.
    fn set_accessed_dirty(&mut self, walk: &Walk, write: bool) -> bool {
        for (level, used) in walk.used[..walk.levels].iter().enumerate() {
            let leaf = level == walk.levels - 1;
            let mut wanted = used.value | pte::A;
            if leaf && write {
                wanted |= pte::D;
            }
            // PAE's top level is in registers and marked by a zero address of its entry.
            if wanted == used.value || used.gpa == 0 {
                continue;
            }
            if !self.exchange_entry(used.gpa, used.value, wanted, walk.entry_bytes) {
                return false;
            }
        }
        true
    }

    fn exchange_entry(&mut self, gpa: u64, old: u64, new: u64, bytes: u64) -> bool {
        // Entries outside RAM can't be changed, and don't come here twice.
        let Some(host) = self.table_entry(gpa) else {
            return true;
        };
        let done = if bytes == 8 {
            host.compare_exchange_u64(old, new).is_ok()
        } else {
            host.compare_exchange_u32(old as u32, new as u32).is_ok()
        };
        if done && self.apart.as_mut().is_some_and(|apart| apart.walks(gpa)) {
            return done;
        }
        if done && !self.memory.flags(gpa).is_empty() {
            self.report_write(gpa, bytes);
        }
        done
    }

    /// Where an entry of the page tables lies in this process.
    #[inline]
    fn table_entry(&mut self, gpa: u64) -> Option<HostAddress> {
        if let Some(apart) = &mut self.apart
            && let Some(host) = apart.table_entry(gpa)
        {
            return Some(host);
        }
        self.memory.host(gpa)
    }

    fn entry(&mut self, gpa: u64, bytes: u64) -> u64 {
        match self.table_entry(gpa) {
            Some(host) if bytes == 8 => host.load_u64(),
            Some(host) => u64::from(host.load_u32()),
            // An open bus reads as ones.
            None => u64::MAX >> (64 - bytes * 8),
        }
    }

    fn no_execute_reserved(&self) -> u64 {
        if self.sys.efer & efer::NXE == 0 {
            pte::NX
        } else {
            0
        }
    }

    fn walk_four_level(&mut self, linear: u64) -> Result<Walk, WalkFault> {
        let reserved = BEYOND | self.no_execute_reserved();
        self.walk_levels(linear, self.sys.cr3 & FRAME, 4, reserved)
    }

    fn walk_pae(&mut self, linear: u64) -> Result<Walk, WalkFault> {
        let pointer = self.sys.pdptes[(linear >> 30 & 3) as usize];
        if pointer & pte::P == 0 {
            return Err(NOT_PRESENT);
        }
        // Bits 62 to 52 are reserved here, unlike in 4-level paging.
        let reserved = BEYOND | self.no_execute_reserved() | 0x7ff0_0000_0000_0000;
        self.walk_levels(linear, pointer & FRAME, 2, reserved)
    }

    /// Walks tables of 512 64-bit entries, of which `levels` lie between `table` and the page.
    fn walk_levels(
        &mut self,
        linear: u64,
        mut table: u64,
        levels: u32,
        reserved: u64,
    ) -> Result<Walk, WalkFault> {
        let mut walk = Walk::new(8);
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let gpa = table + (linear >> shift & 0x1ff) * 8;
            let value = self.entry(gpa, 8);
            if value & pte::P == 0 {
                return Err(NOT_PRESENT);
            }
            let large = value & pte::PS != 0 && level > 0;
            if value & reserved != 0 || (large && level == 3) {
                return Err(RESERVED);
            }
            walk.step(gpa, value);
            if large || level == 0 {
                walk.page_bytes = 1 << shift;
                // Bit 12 of a large page's entry is PAT; the bits up to its size are reserved.
                if large && value & FRAME & (walk.page_bytes - 1) & !0x1000 != 0 {
                    return Err(RESERVED);
                }
                walk.frame = value & FRAME & !(walk.page_bytes - 1);
                return Ok(walk);
            }
            table = value & FRAME;
        }
        Err(NOT_PRESENT)
    }

    fn walk_32bit(&mut self, linear: u64) -> Result<Walk, WalkFault> {
        let mut walk = Walk::new(4);
        let gpa = (self.sys.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let value = self.entry(gpa, 4);
        if value & pte::P == 0 {
            return Err(NOT_PRESENT);
        }
        if value & pte::PS != 0 && self.sys.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20 to 13 are bits 39 to 32 of the address; bit 21 is reserved.
            if value & 1 << 21 != 0 {
                return Err(RESERVED);
            }
            walk.step(gpa, value);
            walk.page_bytes = 4 << 20;
            walk.frame = value & 0xffc0_0000 | (value >> 13 & 0xff) << 32;
            return Ok(walk);
        }
        walk.step(gpa, value);
        let gpa = (value & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let value = self.entry(gpa, 4);
        if value & pte::P == 0 {
            return Err(NOT_PRESENT);
        }
        walk.step(gpa, value);
        walk.page_bytes = 4096;
        walk.frame = value & 0xffff_f000;
        Ok(walk)
    }

    /// Loads the four page-directory-pointer entries that CR3 names (SDM vol. 3A, 5.4.1). `Err`
    /// where one has reserved bits set.
    pub(crate) fn load_pdptes(&mut self, cr3: u64) -> Result<[u64; 4], Stop> {
        let mut pointers = [0; 4];
        for (index, pointer) in pointers.iter_mut().enumerate() {
            let value = self.entry((cr3 & 0xffff_ffe0) + index as u64 * 8, 8);
            // Bits 2:1, 8:5 and those above the address width.
            if value & pte::P != 0 && value & (BEYOND | 0xfff0_0000_0000_01e6) != 0 {
                return self.gp0();
            }
            *pointer = value;
        }
        Ok(pointers)
    }
}

impl Walk {
    fn new(entry_bytes: u64) -> Self {
        Self {
            used: [Used::default(); 4],
            levels: 0,
            entry_bytes,
            page_bytes: 4096,
            frame: 0,
            writable: true,
            user: true,
            no_execute: false,
        }
    }

    fn step(&mut self, gpa: u64, value: u64) {
        self.used[self.levels] = Used { gpa, value };
        self.levels += 1;
        self.writable &= value & pte::W != 0;
        self.user &= value & pte::U != 0;
        if self.entry_bytes == 8 {
            self.no_execute |= value & pte::NX != 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PAGE_TABLES, protected_cpu};

    /// PSE-36 (SDM vol. 3A 5.3, table 5-4): bits 20 to 13 of a large page's entry are bits 39 to 32 of its address.
    #[test]
    fn large_page_of_32_bit_paging_can_lie_above_4_gib() {
        for (entry, gpa) in [
            (0x0040_0083u32, 0x40_2345),
            (0x0040_2083, 0x1_0040_2345),
            (0x0010_0083, 0x80_0000_2345),
            (0xffdf_e083, 0xff_ffc0_2345),
        ] {
            let (mut cpu, _) = protected_cpu();
            cpu.memory
                .write(PAGE_TABLES, &entry.to_le_bytes())
                .expect("the table lies in memory");
            cpu.sys.cr3 = PAGE_TABLES;
            cpu.sys.cr4 |= cr4::PSE;
            cpu.sys.cr0 |= cr0::PG;
            cpu.update_mode();
            let found = cpu.translate(0x2345, Access::Read, View::Supervisor).ok();
            assert_eq!(found.map(|page| page.gpa), Some(gpa), "{entry:#x}");
        }
    }
}
