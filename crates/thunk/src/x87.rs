//! The x87 state image, and the environment formats that FSTENV and FSAVE write of it.

/// x87 and MMX state in the FXSAVE64 format (SDM vol. 1 table 10-2), bytes 0..160:
/// FCW FSW FTW(abridged) FOP, FIP (64 bits) at 8, FDP (64 bits) at 16, ST0 … ST7 at 32 in steps of
/// 16. MXCSR at 24 and everything from 160 on is not state here: thunks write there.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct FxsaveImage(pub [u8; 512]);

impl FxsaveImage {
    /// As after FNINIT, with all registers zero.
    pub fn new() -> Self {
        let mut image = Self([0; 512]);
        image.initialise();
        image
    }

    /// FNINIT: control words and pointers as after reset; the registers keep their bits but are
    /// tagged empty.
    pub fn initialise(&mut self) {
        self.renumber(0);
        self.0[..24].fill(0);
        self.set_control_word(0x37f);
    }

    /// FCW.
    pub fn control_word(&self) -> u16 {
        self.word(0)
    }

    /// Sets FCW. Bits 7 and 13 … 15 are reserved and read as zero, bit 6 as one.
    pub fn set_control_word(&mut self, value: u16) {
        self.set_word(0, value & 0x1f3f | 0x40);
    }

    /// FSW. ES and B may be out of date with respect to FCW; see
    /// [`FxsaveImage::exception_pending`].
    pub fn status_word(&self) -> u16 {
        self.word(2)
    }

    /// Sets FSW.
    pub fn set_status_word(&mut self, value: u16) {
        self.set_word(2, value);
    }

    /// FTW, abridged: bit `i` set if physical register `i` isn't empty.
    pub fn tags(&self) -> u8 {
        self.0[4]
    }

    /// FIP: the last non-control instruction's address.
    pub fn instruction_pointer(&self) -> u64 {
        self.quad(8)
    }

    /// FDP: its memory operand's address.
    pub fn data_pointer(&self) -> u64 {
        self.quad(16)
    }

    /// FOP: its opcode, 11 bits.
    pub fn opcode(&self) -> u16 {
        self.word(6)
    }

    /// All exceptions are masked, so that none can become pending.
    pub fn masks_all(&self) -> bool {
        self.control_word() & 0x3f == 0x3f
    }

    /// An unmasked exception is pending: the next waiting instruction raises #MF.
    pub fn exception_pending(&self) -> bool {
        self.status_word() & !self.control_word() & 0x3f != 0
    }

    /// ST(`index`), 80 bits.
    pub fn stack_register(&self, index: usize) -> [u8; 10] {
        let mut value = [0; 10];
        value.copy_from_slice(&self.0[32 + 16 * index..][..10]);
        value
    }

    /// Sets ST(`index`) without tagging it.
    pub fn set_stack_register(&mut self, index: usize, value: [u8; 10]) {
        self.0[32 + 16 * index..][..10].copy_from_slice(&value);
    }

    /// MM`index`: an MMX register has a place of its own, whichever is the top of the stack.
    pub fn mmx_register(&self, index: usize) -> [u8; 8] {
        let top = usize::from(self.status_word() >> 11 & 7);
        let mut value = [0; 8];
        value.copy_from_slice(&self.stack_register(index.wrapping_sub(top) & 7)[..8]);
        value
    }

    /// What every MMX instruction but EMMS does: TOP becomes 0, and all registers valid
    /// (SDM vol. 1, 9.5.1).
    pub fn enter_mmx(&mut self) {
        let top = usize::from(self.status_word() >> 11 & 7);
        self.0[32..160].rotate_right(16 * top);
        self.set_status_word(self.status_word() & !(7 << 11));
        self.0[4] = 0xff;
    }

    /// Records the last x87 instruction's address alone.
    pub fn set_instruction_pointer(&mut self, instruction: u64) {
        self.0[8..16].copy_from_slice(&instruction.to_le_bytes());
    }

    /// Records the last x87 instruction: its address, opcode ([`x87_opcode`]) and, for a memory
    /// operand, the operand's address (SDM vol. 1 8.1.8). FCS and FDS read as zero.
    pub fn set_pointers(&mut self, instruction: u64, opcode: u16, data: Option<u64>) {
        self.set_word(6, opcode & 0x7ff);
        self.set_instruction_pointer(instruction);
        if let Some(data) = data {
            self.0[16..24].copy_from_slice(&data.to_le_bytes());
        }
    }

    /// FNSTENV: writes the environment, then masks all exceptions. In the real-mode formats FIP and
    /// FDP are taken as linear addresses.
    ///
    /// # Panics
    ///
    /// If `out` isn't of the format's size.
    pub fn store_environment(&mut self, format: EnvironmentFormat, out: &mut [u8]) {
        let (instruction, data) = (
            self.instruction_pointer() as u32,
            self.data_pointer() as u32,
        );
        let opcode = u32::from(self.opcode());
        let low = |value: u32| value & 0xffff;
        let (control, status) = (
            u32::from(self.control_word()),
            u32::from(self.status_word()),
        );
        let tags = u32::from(self.full_tags());
        // Reserved halves of the 32-bit formats are stored as ones.
        let ones = |value: u32| value | 0xffff_0000;
        match format {
            EnvironmentFormat::Protected32 => put32(
                out,
                [
                    ones(control),
                    ones(status),
                    ones(tags),
                    instruction,
                    opcode << 16,
                    data,
                    ones(0),
                ],
            ),
            EnvironmentFormat::Real32 => put32(
                out,
                [
                    ones(control),
                    ones(status),
                    ones(tags),
                    ones(low(instruction)),
                    (instruction >> 16) << 12 | opcode,
                    ones(low(data)),
                    (data >> 16) << 12,
                ],
            ),
            EnvironmentFormat::Protected16 => {
                put16(out, [control, status, tags, instruction, 0, data, 0]);
            }
            EnvironmentFormat::Real16 => put16(
                out,
                [
                    control,
                    status,
                    tags,
                    instruction,
                    (instruction >> 16) << 12 | opcode,
                    data,
                    (data >> 16) << 12,
                ],
            ),
        }
        self.set_control_word(self.control_word() | 0x3f);
        self.update_summary();
    }

    /// FLDENV: the inverse of [`FxsaveImage::store_environment`].
    ///
    /// # Panics
    ///
    /// If `bytes` isn't of the format's size.
    pub fn load_environment(&mut self, format: EnvironmentFormat, bytes: &[u8]) {
        let wide = matches!(
            format,
            EnvironmentFormat::Protected32 | EnvironmentFormat::Real32
        );
        let words: [u32; 7] = core::array::from_fn(|index| {
            if wide {
                let mut word = [0; 4];
                word.copy_from_slice(&bytes[4 * index..][..4]);
                u32::from_le_bytes(word)
            } else {
                u32::from(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
            }
        });
        self.renumber(words[1] as u16);
        self.set_control_word(words[0] as u16);
        self.set_status_word(words[1] as u16);
        self.update_summary();
        self.0[4] = (0..8).fold(0, |tags, register| {
            tags | u8::from(words[2] >> (2 * register) & 3 != 3) << register
        });
        let high = |word: u32| (word >> 12) << 16;
        let (instruction, opcode, data) = match format {
            EnvironmentFormat::Protected32 => (words[3], words[4] >> 16, words[5]),
            // The format has no opcode.
            EnvironmentFormat::Protected16 => (words[3], 0, words[5]),
            EnvironmentFormat::Real32 | EnvironmentFormat::Real16 => (
                words[3] & 0xffff | high(words[4]),
                words[4],
                words[5] & 0xffff | high(words[6]),
            ),
        };
        self.set_pointers(u64::from(instruction), opcode as u16, Some(u64::from(data)));
    }

    /// TOP: the physical register that is ST0.
    fn top(&self) -> usize {
        usize::from(self.status_word() >> 11 & 7)
    }

    /// Registers stay where they are when TOP changes without a push or pop, but the image has them
    /// in stack order: puts them in the order for the status word to come.
    fn renumber(&mut self, status: u16) {
        let distance = usize::from(status >> 11 & 7) + 8 - self.top();
        let registers: [[u8; 10]; 8] =
            core::array::from_fn(|index| self.stack_register((index + distance) & 7));
        for (index, value) in registers.into_iter().enumerate() {
            self.set_stack_register(index, value);
        }
    }

    /// ES and B from the exception flags and their masks.
    fn update_summary(&mut self) {
        let summary = if self.exception_pending() { 0x8080 } else { 0 };
        self.set_status_word(self.status_word() & !0x8080 | summary);
    }

    /// FTW with two bits a register: valid, zero, special, empty (SDM vol. 1 8.1.7).
    fn full_tags(&self) -> u16 {
        let top = self.top();
        (0..8).fold(0, |tags, register| {
            let tag = if self.tags() >> register & 1 == 0 {
                3
            } else {
                tag_of(self.stack_register((register + 8 - top) & 7))
            };
            tags | tag << (2 * register)
        })
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn set_word(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn quad(&self, at: usize) -> u64 {
        let mut quad = [0; 8];
        quad.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(quad)
    }
}

impl Default for FxsaveImage {
    fn default() -> Self {
        Self::new()
    }
}

/// Tag of a register that isn't empty.
fn tag_of(value: [u8; 10]) -> u16 {
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    let integer_bit = value[7] & 0x80 != 0;
    match exponent {
        0x7fff => 2,
        0 if value[..8].iter().all(|&byte| byte == 0) => 1,
        0 => 2,
        _ if integer_bit => 0,
        _ => 2,
    }
}

fn put32(out: &mut [u8], words: [u32; 7]) {
    for (index, word) in words.into_iter().enumerate() {
        out[4 * index..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

fn put16(out: &mut [u8], words: [u32; 7]) {
    for (index, word) in words.into_iter().enumerate() {
        out[2 * index..][..2].copy_from_slice(&(word as u16).to_le_bytes());
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

impl EnvironmentFormat {
    /// Bytes of the environment; FSAVE adds 80.
    pub fn size(self) -> usize {
        match self {
            Self::Protected32 | Self::Real32 => 28,
            Self::Protected16 | Self::Real16 => 14,
        }
    }
}
