//! The guest's registers as thunks see them.

use crate::x87::FxsaveImage;

/// MXCSR after reset: all exceptions masked, round to nearest (SDM vol. 1 10.2.3).
pub const MXCSR_DEFAULT: u32 = 0x1f80;

/// One vector register (YMM, 256 bits, little endian). Bytes 0..16 are the XMM register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Vector(pub [u8; 32]);

/// The registers a user-mode instruction computes with.
///
/// Thunks address the fields by their offset, so the layout is `repr(C)`; nothing in it points
/// anywhere, and every bit pattern is safe to run a thunk on.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct RegisterFile {
    /// General registers in encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15.
    pub gpr: [u64; 16],
    /// RFLAGS. Thunks read and write only CF, PF, AF, ZF, SF and OF, at their RFLAGS positions,
    /// and leave every other bit as it is.
    pub flags: u64,
    /// The guest's MXCSR. Reserved bits must be zero (LDMXCSR and FXRSTOR check that).
    pub mxcsr: u32,
    /// MXCSR while a thunk runs with unmasked guest exceptions.
    pub(crate) run_mxcsr: u32,
    /// The host's MXCSR, to be restored.
    pub(crate) host_mxcsr: u32,
    /// The host's x87 control word, to be restored.
    pub(crate) host_control_word: u16,
    reserved: [u8; 34],
    /// YMM0 … YMM15. Legacy SSE instructions leave bytes 16..32 as they are, VEX ones zero them.
    pub vector: [Vector; 16],
    /// x87 and MMX state. Bytes 160..512 are not state: running an x87 or MMX thunk writes there.
    pub x87: FxsaveImage,
    /// The header that makes an XSAVE area of [`Self::x87`] (SDM vol. 1 13.4.2), for engines that load it with
    /// XRSTOR: XSTATE_BV, then zeros.
    pub x87_header: [u64; 8],
    /// Where a result goes that must not reach guest memory if its instruction faults; thunks use
    /// it, and the interpreter may use it as a bounce buffer for [`crate::MemoryOperand`]s with no
    /// SIMD floating point.
    pub(crate) scratch: [u64; 8],
}

impl RegisterFile {
    /// All zero but the control words: x87 as after FNINIT, MXCSR as after reset.
    pub fn new() -> Self {
        Self {
            gpr: [0; 16],
            flags: 0x2,
            mxcsr: MXCSR_DEFAULT,
            run_mxcsr: MXCSR_DEFAULT,
            host_mxcsr: MXCSR_DEFAULT,
            host_control_word: 0x37f,
            reserved: [0; 34],
            vector: [Vector::default(); 16],
            x87: FxsaveImage::new(),
            x87_header: [1, 0, 0, 0, 0, 0, 0, 0],
            scratch: [0; 8],
        }
    }

    /// XMM register `index` as a 128-bit integer.
    pub fn xmm(&self, index: usize) -> u128 {
        let mut low = [0; 16];
        low.copy_from_slice(&self.vector[index].0[..16]);
        u128::from_le_bytes(low)
    }

    /// Writes XMM register `index`; the upper half of the YMM register stays.
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        self.vector[index].0[..16].copy_from_slice(&value.to_le_bytes());
    }
}

impl Default for RegisterFile {
    fn default() -> Self {
        Self::new()
    }
}

/// Byte offsets of the fields, for the code emitter.
pub(crate) mod offset {
    use super::RegisterFile;
    use core::mem::offset_of;

    pub(crate) const FLAGS: i32 = offset_of!(RegisterFile, flags) as i32;
    pub(crate) const MXCSR: i32 = offset_of!(RegisterFile, mxcsr) as i32;
    pub(crate) const RUN_MXCSR: i32 = offset_of!(RegisterFile, run_mxcsr) as i32;
    pub(crate) const HOST_MXCSR: i32 = offset_of!(RegisterFile, host_mxcsr) as i32;
    pub(crate) const HOST_CONTROL_WORD: i32 = offset_of!(RegisterFile, host_control_word) as i32;
    pub(crate) const X87: i32 = offset_of!(RegisterFile, x87) as i32;
    pub(crate) const SCRATCH: i32 = offset_of!(RegisterFile, scratch) as i32;

    pub(crate) const fn gpr(index: u8) -> i32 {
        offset_of!(RegisterFile, gpr) as i32 + 8 * index as i32
    }

    pub(crate) const fn vector(index: u8) -> i32 {
        offset_of!(RegisterFile, vector) as i32 + 32 * index as i32
    }

    // MOVAPS and FXSAVE fault on a misaligned address.
    const _: () = assert!(offset_of!(RegisterFile, vector) % 64 == 0);
    const _: () = assert!(offset_of!(RegisterFile, x87) % 64 == 0);
    const _: () = assert!(offset_of!(RegisterFile, gpr) == 0);
    // The header of an XSAVE area follows the legacy region.
    const _: () =
        assert!(offset_of!(RegisterFile, x87_header) == offset_of!(RegisterFile, x87) + 512);
}
