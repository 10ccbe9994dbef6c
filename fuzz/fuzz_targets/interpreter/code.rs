//! Guest code in pieces. Bytes that a fuzzer makes up are seldom an instruction of the longer opcode
//! maps; these are one more often than not.

use arbitrary::Arbitrary;

#[derive(Arbitrary, Debug)]
pub enum Piece {
    Bytes(Vec<u8>),
    Instruction(Instruction),
}

#[derive(Arbitrary, Debug)]
pub struct Instruction {
    prefixes: Option<[Prefix; 2]>,
    /// In other than 64-bit code this is INC or DEC.
    rex: Option<u8>,
    map: Map,
    opcode: u8,
    modrm: u8,
    immediate: u8,
    /// Bytes of displacement and immediate in all, repeated from the latter.
    tail: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Prefix {
    None,
    OperandSize,
    AddressSize,
    Lock,
    Repne,
    Rep,
    Fs,
    Gs,
}

/// Opcode maps (SDM vol. 2D, appendix A), and the way into the x87.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Map {
    One,
    Two,
    Three38,
    Three3a,
    Vex2(u8),
    Vex3(u8, u8),
    X87,
}

impl Instruction {
    fn write(&self, code: &mut Vec<u8>) {
        for prefix in self.prefixes.iter().flatten() {
            match prefix {
                Prefix::None => {}
                Prefix::OperandSize => code.push(0x66),
                Prefix::AddressSize => code.push(0x67),
                Prefix::Lock => code.push(0xf0),
                Prefix::Repne => code.push(0xf2),
                Prefix::Rep => code.push(0xf3),
                Prefix::Fs => code.push(0x64),
                Prefix::Gs => code.push(0x65),
            }
        }
        if let Some(rex) = self.rex {
            code.push(0x40 | rex & 0xf);
        }
        match self.map {
            Map::One => {}
            Map::Two => code.push(0x0f),
            Map::Three38 => code.extend([0x0f, 0x38]),
            Map::Three3a => code.extend([0x0f, 0x3a]),
            Map::Vex2(fields) => code.extend([0xc5, fields]),
            Map::Vex3(first, second) => {
                code.extend([0xc4, (first & !0x1f) | (1 + first % 3), second])
            }
            Map::X87 => {
                code.extend([0xd8 | self.opcode & 7, self.modrm]);
                return;
            }
        }
        code.extend([self.opcode, self.modrm]);
        code.extend(std::iter::repeat_n(
            self.immediate,
            usize::from(self.tail % 9),
        ));
    }
}

/// At most `most` bytes of code, and a HLT.
pub fn assemble(pieces: &[Piece], most: usize) -> Vec<u8> {
    let mut code = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Bytes(bytes) => code.extend(bytes),
            Piece::Instruction(instruction) => instruction.write(&mut code),
        }
    }
    code.truncate(most);
    code.push(0xf4);
    code
}
