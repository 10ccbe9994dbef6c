//! The few host instructions that surround the guest's. RDI holds the register file throughout.

/// Host general registers, by encoding.
pub(crate) mod host_register {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RBX: u8 = 3;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const R8: u8 = 8;
    pub(crate) const R9: u8 = 9;
    pub(crate) const R10: u8 = 10;
    pub(crate) const R11: u8 = 11;
}

const RDI: u8 = 7;

/// A forward jump whose target isn't known yet.
#[must_use]
pub(crate) struct Jump(usize);

/// Code under construction.
#[derive(Debug, Default)]
pub(crate) struct Emitter {
    bytes: Vec<u8>,
}

impl Emitter {
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// ModRM (and displacement) for `[rdi + offset]`.
    fn file_operand(&mut self, register: u8, offset: i32) {
        let register = (register & 7) << 3;
        match i8::try_from(offset) {
            Ok(short) => self.raw(&[0x40 | register | RDI, short as u8]),
            Err(_) => {
                self.bytes.push(0x80 | register | RDI);
                self.raw(&offset.to_le_bytes());
            }
        }
    }

    /// An instruction with a register (or opcode extension) and `[rdi + offset]`.
    pub(crate) fn with_file(&mut self, wide: bool, opcode: &[u8], register: u8, offset: i32) {
        let rex = 0x40 | u8::from(wide) << 3 | (register >> 3) << 2;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(opcode);
        self.file_operand(register, offset);
    }

    /// `mov r64, [rdi + offset]`
    pub(crate) fn load64(&mut self, register: u8, offset: i32) {
        self.with_file(true, &[0x8b], register, offset);
    }

    /// `mov [rdi + offset], r64`
    pub(crate) fn store64(&mut self, register: u8, offset: i32) {
        self.with_file(true, &[0x89], register, offset);
    }

    /// `mov r32, [rdi + offset]`
    pub(crate) fn load32(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x8b], register, offset);
    }

    /// `mov [rdi + offset], r32`
    pub(crate) fn store32(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x89], register, offset);
    }

    /// `movzx r32, byte [rdi + offset]`
    pub(crate) fn load8(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x0f, 0xb6], register, offset);
    }

    /// `mov [rdi + offset], r8b` and up (not a legacy high-byte register).
    pub(crate) fn store8(&mut self, register: u8, offset: i32) {
        debug_assert!(!(4..8).contains(&register));
        self.with_file(false, &[0x88], register, offset);
    }

    /// `movzx r32, word [rdi + offset]`
    pub(crate) fn load16(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x0f, 0xb7], register, offset);
    }

    /// `mov [rdi + offset], r16`
    pub(crate) fn store16(&mut self, register: u8, offset: i32) {
        self.bytes.push(0x66);
        self.with_file(false, &[0x89], register, offset);
    }

    /// `movaps xmm, [rdi + offset]`
    pub(crate) fn load_xmm(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x0f, 0x28], register, offset);
    }

    /// `movaps [rdi + offset], xmm`
    pub(crate) fn store_xmm(&mut self, register: u8, offset: i32) {
        self.with_file(false, &[0x0f, 0x29], register, offset);
    }

    fn vex_move(&mut self, opcode: u8, wide: bool, register: u8, offset: i32) {
        let second = 0x78 | u8::from(register < 8) << 7 | u8::from(wide) << 2;
        self.raw(&[0xc5, second, opcode]);
        self.file_operand(register, offset);
    }

    /// `vmovaps xmm/ymm, [rdi + offset]`
    pub(crate) fn load_vex(&mut self, wide: bool, register: u8, offset: i32) {
        self.vex_move(0x28, wide, register, offset);
    }

    /// `vmovaps [rdi + offset], ymm`
    pub(crate) fn store_ymm(&mut self, register: u8, offset: i32) {
        self.vex_move(0x29, true, register, offset);
    }

    /// `ldmxcsr [rdi + offset]`
    pub(crate) fn ldmxcsr(&mut self, offset: i32) {
        self.with_file(false, &[0x0f, 0xae], 2, offset);
    }

    /// `stmxcsr [rdi + offset]`
    pub(crate) fn stmxcsr(&mut self, offset: i32) {
        self.with_file(false, &[0x0f, 0xae], 3, offset);
    }

    /// A conditional jump forward, to be [`Emitter::land`]ed.
    pub(crate) fn jump_if(&mut self, condition: Condition) -> Jump {
        self.raw(&[0x0f, 0x80 | condition as u8, 0, 0, 0, 0]);
        Jump(self.bytes.len())
    }

    /// Makes `jump` arrive here.
    pub(crate) fn land(&mut self, jump: Jump) {
        let distance = (self.bytes.len() - jump.0) as i32;
        self.bytes[jump.0 - 4..jump.0].copy_from_slice(&distance.to_le_bytes());
    }

    /// Where the next instruction goes.
    pub(crate) fn here(&self) -> usize {
        self.bytes.len()
    }

    /// A conditional jump back to `target`, a result of [`Emitter::here`].
    pub(crate) fn jump_back_if(&mut self, condition: Condition, target: usize) {
        self.raw(&[0x0f, 0x80 | condition as u8]);
        let distance = target as i32 - (self.bytes.len() as i32 + 4);
        self.raw(&distance.to_le_bytes());
    }

    /// `mov eax, status; ret`
    pub(crate) fn return_status(&mut self, status: u32) {
        match status {
            0 => self.raw(&[0x31, 0xc0]),
            _ => {
                self.bytes.push(0xb8);
                self.raw(&status.to_le_bytes());
            }
        }
        self.bytes.push(0xc3);
    }
}

/// Condition codes as encoded.
#[derive(Clone, Copy)]
pub(crate) enum Condition {
    /// ZF
    Zero = 4,
    /// Not ZF
    NotZero = 5,
}
