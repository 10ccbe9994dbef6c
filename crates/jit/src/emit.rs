//! Host instructions, byte by byte: the few that surround the guest's own.

/// A host general register, by encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(pub(crate) u8);

pub(crate) const RAX: Reg = Reg(0);
pub(crate) const RCX: Reg = Reg(1);
pub(crate) const RDX: Reg = Reg(2);
pub(crate) const RBX: Reg = Reg(3);
pub(crate) const RSP: Reg = Reg(4);
pub(crate) const RBP: Reg = Reg(5);
pub(crate) const RSI: Reg = Reg(6);
pub(crate) const RDI: Reg = Reg(7);
pub(crate) const R9: Reg = Reg(9);
pub(crate) const R10: Reg = Reg(10);
pub(crate) const R11: Reg = Reg(11);
pub(crate) const R12: Reg = Reg(12);
pub(crate) const R13: Reg = Reg(13);
pub(crate) const R14: Reg = Reg(14);
pub(crate) const R15: Reg = Reg(15);

/// A memory operand of host code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub(crate) base: Option<Reg>,
    /// Register and log2 of its scale.
    pub(crate) index: Option<(Reg, u8)>,
    pub(crate) displacement: i32,
}

impl Mem {
    /// `[base + displacement]`
    pub(crate) fn at(base: Reg, displacement: i32) -> Self {
        Self {
            base: Some(base),
            index: None,
            displacement,
        }
    }

    /// An address below 2 GiB.
    pub(crate) fn low(address: u32) -> Self {
        Self {
            base: None,
            index: None,
            displacement: address as i32,
        }
    }

    /// `[offset + address]`, with an address below 2 GiB.
    pub(crate) fn offset(address: u32, offset: Reg) -> Self {
        Self::at(offset, address as i32)
    }

    /// `[index × 8 + address]`, an array of 64-bit values below 2 GiB.
    pub(crate) fn array(address: u32, index: Reg) -> Self {
        Self {
            base: None,
            index: Some((index, 3)),
            displacement: address as i32,
        }
    }
}

/// Condition codes of Jcc, as the manual numbers them (SDM vol. 1, appendix B).
pub(crate) mod condition {
    pub(crate) const B: u8 = 2;
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const AE: u8 = 3;
    pub(crate) const BE: u8 = 6;
    pub(crate) const A: u8 = 7;
}

/// Two-operand arithmetic, by the number in its opcode.
#[derive(Clone, Copy)]
#[repr(u8)]
pub(crate) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A rel8 whose target is not known yet.
#[must_use]
pub(crate) struct Short(usize);

/// Code under construction, which will lie at a known address.
#[derive(Debug, Default)]
pub(crate) struct Asm {
    pub(crate) bytes: Vec<u8>,
    /// Address of the first byte.
    base: u64,
}

impl Asm {
    /// Starts over, at `base`.
    pub(crate) fn start(&mut self, base: u64) {
        self.bytes.clear();
        self.base = base;
    }

    /// Address of the next byte.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    /// REX (if need be), opcode, ModRM, SIB, displacement of an instruction with a memory operand.
    fn memory(&mut self, wide: bool, opcode: &[u8], register: u8, operand: Mem) {
        let index = operand.index.map_or(0, |(index, _)| index.0);
        let base = operand.base.map_or(0, |base| base.0);
        let rex = u8::from(wide) << 3 | (register >> 3) << 2 | (index >> 3) << 1 | base >> 3 | 0x40;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(opcode);
        self.modrm_memory(register, operand);
    }

    fn modrm_memory(&mut self, register: u8, operand: Mem) {
        let register = (register & 7) << 3;
        let displacement = operand.displacement;
        match (operand.base, operand.index) {
            (None, index) => {
                let (number, scale) = index.map_or((4, 0), |(index, scale)| (index.0 & 7, scale));
                self.raw(&[register | 4, scale << 6 | number << 3 | 5]);
                self.imm32(displacement);
            }
            (Some(base), index) => {
                let sib = index.is_some() || base.0 & 7 == 4;
                let short = i8::try_from(displacement).is_ok();
                let mode = match displacement {
                    0 if base.0 & 7 != 5 => 0,
                    _ if short => 0x40,
                    _ => 0x80,
                };
                if sib {
                    let (number, scale) =
                        index.map_or((4, 0), |(index, scale)| (index.0 & 7, scale));
                    self.raw(&[mode | register | 4, scale << 6 | number << 3 | base.0 & 7]);
                } else {
                    self.bytes.push(mode | register | base.0 & 7);
                }
                match mode {
                    0 => {}
                    0x40 => self.bytes.push(displacement as u8),
                    _ => self.imm32(displacement),
                }
            }
        }
    }

    fn registers(&mut self, wide: bool, opcode: &[u8], register: u8, rm: u8) {
        let rex = u8::from(wide) << 3 | (register >> 3) << 2 | rm >> 3 | 0x40;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(opcode);
        self.bytes.push(0xc0 | (register & 7) << 3 | rm & 7);
    }

    /// `mov r64, r64`
    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        self.registers(true, &[0x89], from.0, to.0);
    }

    /// `mov r32, r32`
    pub(crate) fn mov32(&mut self, to: Reg, from: Reg) {
        self.registers(false, &[0x89], from.0, to.0);
    }

    /// The shortest MOV of a constant to a 64-bit register.
    pub(crate) fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            if to.0 >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xb8 | to.0 & 7);
            self.raw(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.registers(true, &[0xc7], 0, to.0);
            self.imm32(value);
        } else {
            self.raw(&[0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
            self.raw(&value.to_le_bytes());
        }
    }

    /// `mov r64, [m]`
    pub(crate) fn load(&mut self, to: Reg, from: Mem) {
        self.memory(true, &[0x8b], to.0, from);
    }

    /// `mov r32, [m]`
    pub(crate) fn load32(&mut self, to: Reg, from: Mem) {
        self.memory(false, &[0x8b], to.0, from);
    }

    /// `movzx r32, byte [m]`
    pub(crate) fn load8(&mut self, to: Reg, from: Mem) {
        self.memory(false, &[0x0f, 0xb6], to.0, from);
    }

    /// `movzx r32, word [m]`
    pub(crate) fn load16(&mut self, to: Reg, from: Mem) {
        self.memory(false, &[0x0f, 0xb7], to.0, from);
    }

    /// `mov r16, word [m]`: the rest of the register stays.
    pub(crate) fn load_word(&mut self, to: Reg, from: Mem) {
        self.bytes.push(0x66);
        self.memory(false, &[0x8b], to.0, from);
    }

    /// `mov word [m], r16`
    pub(crate) fn store16(&mut self, to: Mem, from: Reg) {
        self.bytes.push(0x66);
        self.memory(false, &[0x89], from.0, to);
    }

    /// `movzx r32, r16`
    pub(crate) fn zero_extend16(&mut self, to: Reg, from: Reg) {
        self.registers(false, &[0x0f, 0xb7], to.0, from.0);
    }

    /// `test byte [m], imm8`
    pub(crate) fn test_byte_memory(&mut self, operand: Mem, value: u8) {
        self.memory(false, &[0xf6], 0, operand);
        self.bytes.push(value);
    }

    /// `mov byte [m], r8`; the register is one of the first four.
    pub(crate) fn store8(&mut self, to: Mem, from: Reg) {
        debug_assert!(from.0 < 4);
        self.memory(false, &[0x88], from.0, to);
    }

    /// `movsxd r64, r32`
    pub(crate) fn sign_extend32(&mut self, to: Reg, from: Reg) {
        self.registers(true, &[0x63], to.0, from.0);
    }

    /// `mov [m], r64`
    pub(crate) fn store(&mut self, to: Mem, from: Reg) {
        self.memory(true, &[0x89], from.0, to);
    }

    /// `mov qword [m], imm32` (sign-extended)
    pub(crate) fn store_imm(&mut self, to: Mem, value: i32) {
        self.memory(true, &[0xc7], 0, to);
        self.imm32(value);
    }

    /// `mov [m], r32`
    pub(crate) fn store32(&mut self, to: Mem, from: Reg) {
        self.memory(false, &[0x89], from.0, to);
    }

    /// Data among the code.
    pub(crate) fn word(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    /// `mov dword [m], imm32`
    pub(crate) fn store_imm32(&mut self, to: Mem, value: u32) {
        self.memory(false, &[0xc7], 0, to);
        self.imm32(value as i32);
    }

    /// `lea r64, [m]` or `lea r32, [m]`
    pub(crate) fn lea(&mut self, wide: bool, to: Reg, from: Mem) {
        self.memory(wide, &[0x8d], to.0, from);
    }

    /// `op r64, [m]`
    pub(crate) fn alu_load(&mut self, op: Alu, to: Reg, from: Mem) {
        self.memory(true, &[(op as u8) << 3 | 3], to.0, from);
    }

    /// `op qword [m], r64`
    pub(crate) fn alu_store(&mut self, op: Alu, to: Mem, from: Reg) {
        self.memory(true, &[(op as u8) << 3 | 1], from.0, to);
    }

    /// `test r32, imm32`
    pub(crate) fn test_imm32(&mut self, register: Reg, value: u32) {
        self.registers(false, &[0xf7], 0, register.0);
        self.imm32(value as i32);
    }

    /// `shl r32, imm8`
    pub(crate) fn shl32(&mut self, register: Reg, count: u8) {
        self.registers(false, &[0xc1], 4, register.0);
        self.bytes.push(count);
    }

    /// `op r, r`
    pub(crate) fn alu(&mut self, wide: bool, op: Alu, to: Reg, from: Reg) {
        self.registers(wide, &[(op as u8) << 3 | 1], from.0, to.0);
    }

    /// `op r, imm`
    pub(crate) fn alu_imm(&mut self, wide: bool, op: Alu, to: Reg, value: i32) {
        if let Ok(value) = i8::try_from(value) {
            self.registers(wide, &[0x83], op as u8, to.0);
            self.bytes.push(value as u8);
        } else {
            self.registers(wide, &[0x81], op as u8, to.0);
            self.imm32(value);
        }
    }

    /// `inc qword [m]`
    pub(crate) fn increment(&mut self, operand: Mem) {
        self.memory(true, &[0xff], 0, operand);
    }

    /// `op dword [m], imm`
    pub(crate) fn alu_memory_imm32(&mut self, op: Alu, to: Mem, value: i32) {
        if let Ok(value) = i8::try_from(value) {
            self.memory(false, &[0x83], op as u8, to);
            self.bytes.push(value as u8);
        } else {
            self.memory(false, &[0x81], op as u8, to);
            self.imm32(value);
        }
    }

    /// `cmp byte [m], imm8`
    pub(crate) fn compare_byte(&mut self, to: Mem, value: u8) {
        self.memory(false, &[0x80], 7, to);
        self.bytes.push(value);
    }

    /// `cmp r64, [m]`
    pub(crate) fn compare_load(&mut self, register: Reg, with: Mem) {
        self.alu_load(Alu::Cmp, register, with);
    }

    /// `cmp r32, [m]`
    pub(crate) fn compare_load32(&mut self, register: Reg, with: Mem) {
        self.memory(false, &[0x3b], register.0, with);
    }

    /// `test r8, imm8`, low byte.
    pub(crate) fn test_byte(&mut self, register: Reg, value: u8) {
        self.raw(&[0x40 | register.0 >> 3, 0xf6, 0xc0 | register.0 & 7, value]);
    }

    /// `rorx r32, r32, imm8` (BMI2)
    pub(crate) fn rorx32(&mut self, to: Reg, from: Reg, count: u8) {
        let r = if to.0 >= 8 { 0 } else { 0x80 };
        let b = if from.0 >= 8 { 0 } else { 0x20 };
        self.raw(&[
            0xc4,
            r | 0x40 | b | 0x03,
            0x7b,
            0xf0,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
            count,
        ]);
    }

    /// `shr r64, imm8`
    pub(crate) fn shr(&mut self, register: Reg, count: u8) {
        self.registers(true, &[0xc1], 5, register.0);
        self.bytes.push(count);
    }

    /// `shl r64, imm8`
    pub(crate) fn shl(&mut self, register: Reg, count: u8) {
        self.registers(true, &[0xc1], 4, register.0);
        self.bytes.push(count);
    }

    /// `not r64`
    pub(crate) fn not(&mut self, register: Reg) {
        self.registers(true, &[0xf7], 2, register.0);
    }

    /// `imul r64, [m]`
    pub(crate) fn multiply_load(&mut self, register: Reg, by: Mem) {
        self.memory(true, &[0x0f, 0xaf], register.0, by);
    }

    /// `shr r32, imm8`
    pub(crate) fn shr32(&mut self, register: Reg, count: u8) {
        self.registers(false, &[0xc1], 5, register.0);
        self.bytes.push(count);
    }

    /// `sar r, imm8`
    pub(crate) fn sar(&mut self, wide: bool, register: Reg, count: u8) {
        self.registers(wide, &[0xc1], 7, register.0);
        self.bytes.push(count);
    }

    /// `lahf; seto al`: the arithmetic flags to AX.
    pub(crate) fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// `add al, 127; sahf`: the arithmetic flags from AX.
    pub(crate) fn flags_from_ax(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]);
    }

    /// `mov [m], ax`
    pub(crate) fn store_ax(&mut self, to: Mem) {
        self.bytes.push(0x66);
        self.memory(false, &[0x89], 0, to);
    }

    /// `jcc rel32`
    pub(crate) fn jump_if(&mut self, condition: u8, target: u64) {
        self.raw(&[0x0f, 0x80 | condition]);
        self.relative(target);
    }

    /// `jmp rel32`
    pub(crate) fn jump(&mut self, target: u64) {
        self.bytes.push(0xe9);
        self.relative(target);
    }

    /// `call rel32`
    pub(crate) fn call(&mut self, target: u64) {
        self.bytes.push(0xe8);
        self.relative(target);
    }

    fn relative(&mut self, target: u64) {
        let distance = target.wrapping_sub(self.here() + 4) as i64;
        debug_assert!(i32::try_from(distance).is_ok());
        self.imm32(distance as i32);
    }

    /// Sets the rel32 at `position` in the code to reach `target`.
    pub(crate) fn patch(&mut self, position: usize, target: u64) {
        let distance = target.wrapping_sub(self.base + position as u64 + 4) as i32;
        self.bytes[position..position + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// `jcc rel8` to somewhere ahead.
    pub(crate) fn short_if(&mut self, condition: u8) -> Short {
        self.raw(&[0x70 | condition, 0]);
        Short(self.bytes.len())
    }

    /// `jrcxz` over a short jump to somewhere ahead, which is taken unless RCX is zero.
    pub(crate) fn short_unless_rcx_zero(&mut self) -> Short {
        self.raw(&[0xe3, 2, 0xeb, 0]);
        Short(self.bytes.len())
    }

    /// `jrcxz rel8` to somewhere ahead.
    pub(crate) fn short_if_rcx_zero(&mut self) -> Short {
        self.raw(&[0xe3, 0]);
        Short(self.bytes.len())
    }

    /// The target of a short jump is here.
    pub(crate) fn land(&mut self, jump: Short) {
        let distance = self.bytes.len() - jump.0;
        assert!(distance < 128, "a short jump over {distance} bytes");
        self.bytes[jump.0 - 1] = distance as u8;
    }

    /// `jmp [m]`
    pub(crate) fn jump_memory(&mut self, target: Mem) {
        self.memory(false, &[0xff], 4, target);
    }

    /// `call [m]`
    pub(crate) fn call_memory(&mut self, target: Mem) {
        self.memory(false, &[0xff], 2, target);
    }

    /// `push qword [m]`
    pub(crate) fn push_memory(&mut self, from: Mem) {
        self.memory(false, &[0xff], 6, from);
    }

    /// `pop qword [m]`
    pub(crate) fn pop_memory(&mut self, to: Mem) {
        self.memory(false, &[0x8f], 0, to);
    }

    /// `ret`
    pub(crate) fn ret(&mut self) {
        self.bytes.push(0xc3);
    }

    /// `push r64`
    pub(crate) fn push(&mut self, register: Reg) {
        if register.0 >= 8 {
            self.bytes.push(0x41);
        }
        self.bytes.push(0x50 | register.0 & 7);
    }

    /// `pop r64`
    pub(crate) fn pop(&mut self, register: Reg) {
        if register.0 >= 8 {
            self.bytes.push(0x41);
        }
        self.bytes.push(0x58 | register.0 & 7);
    }

    /// `por xmm, [m]`
    pub(crate) fn or_vector(&mut self, register: u8, address: u32) {
        self.bytes.push(0x66);
        self.memory(false, &[0x0f, 0xeb], register, Mem::low(address));
    }

    /// `xsave64 [m]` or `xrstor64 [m]`; EDX:EAX says of which components.
    pub(crate) fn state(&mut self, store: bool, area: Mem) {
        let extension = if store { 4 } else { 5 };
        self.memory(true, &[0x0f, 0xae], extension, area);
    }

    /// `fnstcw [m]` or `fldcw [m]`
    pub(crate) fn control_word(&mut self, store: bool, operand: Mem) {
        let extension = if store { 7 } else { 5 };
        self.memory(false, &[0xd9], extension, operand);
    }

    /// `and word [m], imm16`
    pub(crate) fn and_memory16(&mut self, operand: Mem, value: u16) {
        self.bytes.push(0x66);
        self.memory(false, &[0x81], Alu::And as u8, operand);
        self.raw(&value.to_le_bytes());
    }

    /// `movaps [m], xmm` or `vmovaps [m], ymm`; `store` says which way.
    pub(crate) fn vector(&mut self, wide: bool, store: bool, register: u8, address: u32) {
        let opcode = if store { 0x29 } else { 0x28 };
        if wide {
            let r = if register >= 8 { 0 } else { 0x80 };
            self.raw(&[0xc5, r | 0x7c, opcode]);
            self.modrm_memory(register, Mem::low(address));
        } else {
            self.memory(false, &[0x0f, opcode], register, Mem::low(address));
        }
    }

    /// `ldmxcsr [m]` or `stmxcsr [m]`
    pub(crate) fn mxcsr(&mut self, store: bool, operand: Mem) {
        self.memory(false, &[0x0f, 0xae], 2 + u8::from(store), operand);
    }
}
