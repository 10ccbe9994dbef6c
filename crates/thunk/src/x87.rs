//! The x87 state image and the environment instructions, which move it in other formats.

/// x87 and MMX state in the FXSAVE64 format (SDM vol. 1 table 10-2), bytes 0..160:
/// FCW FSW FTW(abridged) FOP, FIP (64 bits) at 8, FDP (64 bits) at 16, ST0 … ST7 at 32 in steps of
/// 16. MXCSR at 24 and everything from 160 on is not state here: thunks write there.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct FxsaveImage(pub [u8; 512]);

impl FxsaveImage {
    /// As after FNINIT.
    pub fn new() -> Self {
        let mut image = Self([0; 512]);
        image.set_control_word(0x37f);
        image
    }

    /// FCW.
    pub fn control_word(&self) -> u16 {
        self.word(0)
    }

    /// Sets FCW.
    pub fn set_control_word(&mut self, value: u16) {
        self.set_word(0, value);
    }

    /// FSW.
    pub fn status_word(&self) -> u16 {
        self.word(2)
    }

    /// Sets FSW.
    pub fn set_status_word(&mut self, value: u16) {
        self.set_word(2, value);
    }

    /// An unmasked exception is pending: the next waiting instruction raises #MF.
    pub fn exception_pending(&self) -> bool {
        self.status_word() & !self.control_word() & 0x3f != 0
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn set_word(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Records the last x87 instruction: its address, opcode ([`x87_opcode`]) and, for a memory
    /// operand, the operand's address (SDM vol. 1 8.1.8). FCS and FDS read as zero.
    pub fn set_pointers(&mut self, instruction: u64, opcode: u16, data: Option<u64>) {
        self.set_word(6, opcode & 0x7ff);
        self.0[8..16].copy_from_slice(&instruction.to_le_bytes());
        if let Some(data) = data {
            self.0[16..24].copy_from_slice(&data.to_le_bytes());
        }
    }
}

impl Default for FxsaveImage {
    fn default() -> Self {
        Self::new()
    }
}

/// The 11-bit x87 opcode (FOP) of an instruction's bytes: the low three bits of the escape byte
/// (D8 … DF) and ModRM. None if no escape byte follows the prefixes.
pub fn x87_opcode(bytes: &[u8]) -> Option<u16> {
    let escape = bytes.iter().position(|byte| {
        !matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
    })?;
    let (first, modrm) = (*bytes.get(escape)?, *bytes.get(escape + 1)?);
    (0xd8..=0xdf)
        .contains(&first)
        .then(|| u16::from(first & 7) << 8 | u16::from(modrm))
}

/// Layout of FSTENV's and FSAVE's environment (SDM vol. 1 8.1.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EnvironmentFormat {
    /// 28 bytes, protected mode.
    Protected32,
    /// 14 bytes, protected mode.
    Protected16,
    /// 28 bytes, real and virtual-8086 mode.
    Real32,
    /// 14 bytes, real and virtual-8086 mode.
    Real16,
}
