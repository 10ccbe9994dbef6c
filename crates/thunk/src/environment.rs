//! x87 instructions that only move or check the state image: FNSTENV, FLDENV, FNSAVE, FRSTOR and
//! FWAIT. They aren't run on the host: its pointers (FIP, FDP) would name thunks, and AMD CPUs keep
//! none unless an exception is pending.
#![allow(unsafe_code)]

use iced_x86::Code;

use crate::registers::RegisterFile;
use crate::thunk::{
    Access, Class, EntryPoint, MemoryOperand, STATUS_DONE, STATUS_X87_PENDING, Thunk, X87Pointers,
};
use crate::x87::EnvironmentFormat::{Protected16, Protected32};
use crate::x87::FxsaveImage;

/// The thunk of an instruction of this kind. The environment has protected mode's format.
pub(crate) fn thunk(code: Code) -> Option<Thunk> {
    let (entry, size, access): (EntryPoint, usize, Access) = match code {
        Code::Wait => (wait, 0, Access::Read),
        Code::Fnstenv_m28byte => (store_environment_28, 28, Access::Write),
        Code::Fnstenv_m14byte => (store_environment_14, 14, Access::Write),
        Code::Fldenv_m28byte => (load_environment_28, 28, Access::Read),
        Code::Fldenv_m14byte => (load_environment_14, 14, Access::Read),
        Code::Fnsave_m108byte => (save_108, 108, Access::Write),
        Code::Fnsave_m94byte => (save_94, 94, Access::Write),
        Code::Frstor_m108byte => (restore_108, 108, Access::Read),
        Code::Frstor_m94byte => (restore_94, 94, Access::Read),
        _ => return None,
    };
    Some(Thunk {
        entry,
        fallible: access == Access::Read,
        class: Class::X87,
        waiting: access == Access::Read,
        uses_vector: false,
        simd_float: false,
        memory: (size != 0).then_some(MemoryOperand {
            size,
            access,
            alignment: 1,
            // That of the words it is made of.
            checked_alignment: if matches!(size, 28 | 108) { 4 } else { 2 },
            locked: false,
            bit_offset: false,
            mask: None,
        }),
        x87_pointers: X87Pointers::Unchanged,
        _code: None,
    })
}

unsafe extern "sysv64" fn wait(registers: *mut RegisterFile, _: *mut u8) -> u32 {
    // SAFETY: `Thunk::run` passes the register file it borrows.
    let registers = unsafe { &*registers };
    if registers.x87.exception_pending() {
        STATUS_X87_PENDING
    } else {
        STATUS_DONE
    }
}

/// Defines entry points that give `N` bytes of the operand to a method of the image.
macro_rules! store {
    ($($name:ident($size:literal) => $method:ident($format:ident);)*) => {$(
        unsafe extern "sysv64" fn $name(registers: *mut RegisterFile, memory: *mut u8) -> u32 {
            // SAFETY: `Thunk::run` passes the register file it borrows.
            let registers = unsafe { &mut *registers };
            let mut bytes = [0; $size];
            registers.x87.$method($format, &mut bytes);
            // SAFETY: `Thunk::run`'s caller vouches for this many bytes.
            unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), memory, $size) };
            STATUS_DONE
        }
    )*};
}

/// The same for operands that are read; these check for a pending exception first.
macro_rules! load {
    ($($name:ident($size:literal) => $method:ident($format:ident);)*) => {$(
        unsafe extern "sysv64" fn $name(registers: *mut RegisterFile, memory: *mut u8) -> u32 {
            // SAFETY: `Thunk::run` passes the register file it borrows.
            let registers = unsafe { &mut *registers };
            if registers.x87.exception_pending() {
                return STATUS_X87_PENDING;
            }
            let mut bytes = [0; $size];
            // SAFETY: `Thunk::run`'s caller vouches for this many bytes.
            unsafe { core::ptr::copy_nonoverlapping(memory, bytes.as_mut_ptr(), $size) };
            registers.x87.$method($format, &bytes);
            STATUS_DONE
        }
    )*};
}

store! {
    store_environment_28(28) => store_environment(Protected32);
    store_environment_14(14) => store_environment(Protected16);
    save_108(108) => save(Protected32);
    save_94(94) => save(Protected16);
}

load! {
    load_environment_28(28) => load_environment(Protected32);
    load_environment_14(14) => load_environment(Protected16);
    restore_108(108) => restore(Protected32);
    restore_94(94) => restore(Protected16);
}

impl FxsaveImage {
    /// FNSAVE: the environment, ST0 … ST7 after it, then FNINIT.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than the format's environment and 80 bytes.
    pub fn save(&mut self, format: crate::EnvironmentFormat, out: &mut [u8]) {
        let size = format.size();
        self.store_environment(format, &mut out[..size]);
        for index in 0..8 {
            out[size + 10 * index..][..10].copy_from_slice(&self.stack_register(index));
        }
        self.initialise();
    }

    /// FRSTOR: the inverse of [`FxsaveImage::save`].
    ///
    /// # Panics
    ///
    /// If `bytes` is shorter than the format's environment and 80 bytes.
    pub fn restore(&mut self, format: crate::EnvironmentFormat, bytes: &[u8]) {
        let size = format.size();
        self.load_environment(format, &bytes[..size]);
        for index in 0..8 {
            let mut value = [0; 10];
            value.copy_from_slice(&bytes[size + 10 * index..][..10]);
            self.set_stack_register(index, value);
        }
    }
}
