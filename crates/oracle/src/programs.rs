//! Random programs: branches, loops, calls, returns, string instructions, flags across blocks, code that changes code,
//! exceptions in the middle.
//!
//! A program is a number of pieces of equal room, each of which ends with a jump to some other. A counter in memory brings
//! it to its end. The parts of a piece that are just computing come from whoever asks for the program.

use crate::random::Random;

/// Bytes of a piece at most.
pub const PIECE: u64 = 208;
/// Pieces of a program.
pub const PIECES: u64 = 24;

/// Code under construction.
pub struct Code {
    /// Its linear address.
    pub start: u64,
    /// What there is of it.
    pub bytes: Vec<u8>,
}

impl Code {
    /// No code yet.
    pub fn at(start: u64) -> Self {
        Self {
            start,
            bytes: Vec::new(),
        }
    }

    /// Where the next byte goes.
    pub fn next(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Bytes.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Four bytes.
    pub fn word(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// A rel32 or a displacement relative to RIP, after which the instruction has `more` bytes.
    pub fn to(&mut self, target: u64, more: u64) -> &mut Self {
        let next = self.next() + 4 + more;
        self.word(target.wrapping_sub(next) as u32)
    }
}

/// Where a program and what it uses lie, all within 2 GiB.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The first piece.
    pub base: u64,
    /// How many more jumps the program may make: a dword.
    pub counter: u64,
    /// Addresses of the pieces, quadwords.
    pub table: u64,
    /// Data to work on, and bytes of it.
    pub data: (u64, u64),
    /// Where the stack pointer starts.
    pub stack: u64,
    /// Where nothing is mapped, below 2 GiB.
    pub nowhere: u64,
    /// Where to jump to at the end; HLT if `None`.
    pub end: Option<u64>,
}

/// Writes parts that just compute.
pub trait Computing {
    /// Some instructions that do not jump. Where outcomes are compared with the host's, they leave no undefined flags.
    fn compute(&mut self, place: &Place, random: &mut Random, code: &mut Code);
}

/// A program under construction.
pub struct Program<'a, C> {
    /// Where all choices come from.
    pub random: &'a mut Random,
    /// Writes what just computes.
    pub computing: &'a mut C,
    /// Where it lies.
    pub place: Place,
}

/// CMP AL, imm8: defines all flags.
const COMPARE: [u8; 2] = [0x3c, 0x40];

/// nop dword [rax]
const FILLER: [u8; 4] = [0x0f, 0x1f, 0x40, 0];
/// Opcodes that have one byte as operand and leave all flags defined: MOV to AL, CL, DL, BL, CH, DH, BH; ADD, ADC, SBB,
/// SUB, CMP of AL.
const HEADS: [u8; 12] = [
    0xb0, 0xb1, 0xb2, 0xb3, 0xb5, 0xb6, 0xb7, 0x04, 0x14, 0x1c, 0x2c, 0x3c,
];
/// What a fourth byte, whatever it is, makes whole; 0 stands for any. As many instructions as one, two or three.
const MIDDLES: [[u8; 3]; 9] = [
    [0x0f, 0x1f, 0x40], // nop dword [rax + …]
    [0x48, 0x8d, 0x40], // lea rax, [rax + …]
    [0x04, 0, 0x2c],    // add al, …; sub al, …
    [0xb1, 0, 0x3c],    // mov cl, …; cmp al, …
    [0x66, 0x90, 0xb2], // nop; mov dl, …
    [0x90, 0x90, 0x14], // nop; nop; adc al, …
    [0xeb, 0x02, 0xcc], // jmp over the rest
    [0xf8, 0xf9, 0x1c], // clc; stc; sbb al, …
    [0x48, 0x83, 0xc3], // add rbx, …
];

impl<C: Computing> Program<'_, C> {
    /// The address of some piece.
    pub fn any_piece(&mut self) -> u64 {
        self.place.base + self.random.below(PIECES) * PIECE
    }

    fn data(&mut self) -> u64 {
        let (start, length) = self.place.data;
        start + self.random.below(length - 8)
    }

    /// Ends the program if it has jumped often enough.
    pub fn count(&self, code: &mut Code) {
        code.raw(&[0xff, 0x0d]).to(self.place.counter, 0); // dec dword [counter]
        match self.place.end {
            None => {
                code.raw(&[0x79, 0x01, 0xf4]); // jns +1; hlt
            }
            Some(end) => {
                code.raw(&[0x79, 0x05, 0xe9]).to(end, 0); // jns +5; jmp end
            }
        }
    }

    /// One thing that a program does.
    fn part(&mut self, code: &mut Code) {
        let small = self.random.next() as u8;
        match self.random.below(32) {
            0..=11 => self.computing.compute(&self.place, self.random, code),
            12..=14 => self.string(code),
            15 | 16 => {
                // pushfq; pop rax; and eax, arithmetic flags and IF; push rax; popfq
                code.raw(&[0x9c, 0x58, 0x25]).word(0xad5).raw(&[0x50, 0x9d]);
            }
            17 | 18 => {
                // sahf; setc al; adc ebx, ecx; lahf
                code.raw(&[0x9e, 0x0f, 0x92, 0xc0, 0x11, 0xcb, 0x9f]);
            }
            19..=21 => self.modify(code),
            22 => {
                // mov ecx, small; cdq; idiv ecx
                code.raw(&[0xb9]).word((small & 3).into());
                code.raw(&[0x99, 0xf7, 0xf9]).raw(&COMPARE);
            }
            23 => match small % 8 {
                0 => {
                    code.raw(&[0x0f, 0x0b]); // ud2
                }
                // A load, and a store, where nothing is mapped.
                1 => {
                    code.raw(&[0x48, 0x8b, 0x04, 0x25])
                        .word(self.place.nowhere as u32);
                }
                2 => {
                    code.raw(&[0x48, 0x89, 0x04, 0x25])
                        .word(self.place.nowhere as u32);
                }
                // A return to an address that is not canonical.
                3 => {
                    code.raw(&[0x48, 0xb8]).raw(&(1u64 << 60).to_le_bytes());
                    code.raw(&[0x50, 0xc3]);
                }
                _ => {}
            },
            24..=26 => {
                // cmp eax, small; cmovl rdx, r10; setg [data]
                let data = self.data();
                code.raw(&[0x83, 0xf8, small, 0x49, 0x0f, 0x4c, 0xd2]);
                code.raw(&[0x0f, 0x9f, 0x05]).to(data, 0);
            }
            27 | 28 => {
                // mov ecx, few; rol rax, 1; add r11, rax; loop
                code.raw(&[0xb9]).word(u32::from(small & 15) + 1);
                code.raw(&[0x48, 0xd1, 0xc0, 0x49, 0x01, 0xc3, 0xe2, 0xf8]);
            }
            _ => {
                // lock xadd [data], eax; and edx, fff; bts [data], edx
                let data = self.data() & !7;
                let bits = self.place.data.0;
                code.raw(&[0xf0, 0x0f, 0xc1, 0x05]).to(data, 0);
                code.raw(&[0x81, 0xe2]).word(0xfff);
                code.raw(&[0x0f, 0xab, 0x15]).to(bits, 0).raw(&COMPARE);
            }
        }
    }

    /// Changes another piece's code, or what comes next in this one.
    fn modify(&mut self, code: &mut Code) {
        let target = self.any_piece();
        let small = self.random.next() as u8;
        let head = HEADS[self.random.below(HEADS.len() as u64) as usize];
        let [a, b, c] = {
            let mut middle = MIDDLES[self.random.below(MIDDLES.len() as u64) as usize];
            if middle[1] == 0 {
                middle[1] = small;
            }
            middle
        };
        match self.random.below(8) {
            // Its first instruction's operand.
            0 | 1 => {
                code.raw(&[0xc6, 0x05]).to(target + 1, 1).raw(&[small]);
            }
            // Its operation.
            2 => {
                code.raw(&[0xc6, 0x05]).to(target, 1).raw(&[head]);
            }
            // Both.
            3 => {
                code.raw(&[0x66, 0xc7, 0x05])
                    .to(target, 2)
                    .raw(&[head, small]);
            }
            // What follows, which becomes more instructions, or fewer.
            4 => {
                code.raw(&[0xc7, 0x05])
                    .to(target + 2, 4)
                    .raw(&[a, b, c, small]);
            }
            // The end of one instruction and the beginning of the next.
            5 => {
                code.raw(&[0xc7, 0x05])
                    .to(target + 1, 4)
                    .raw(&[small, a, b, c]);
            }
            // All of it.
            6 => {
                // mov eax, …; mov [target], eax; and two bytes more
                code.raw(&[0xb8]).raw(&[head, small, a, b]);
                code.raw(&[0x89, 0x05]).to(target, 0);
                code.raw(&[0x66, 0xc7, 0x05])
                    .to(target + 4, 2)
                    .raw(&[c, small]);
            }
            // The instruction behind the store.
            _ => {
                let next = code.next() + 12;
                code.raw(&[0xc7, 0x05]).to(next, 4).raw(&[a, b, c, small]);
                code.raw(&COMPARE).raw(&FILLER);
                return;
            }
        }
        // Flags that only the code before it was changed would have overwritten need not be there for the new.
        code.raw(&COMPARE);
    }

    fn string(&mut self, code: &mut Code) {
        let (to, from) = (self.data(), self.data());
        code.raw(&[0x48, 0x8d, 0x3d]).to(to, 0); // lea rdi, [to]
        code.raw(&[0x48, 0x8d, 0x35]).to(from, 0); // lea rsi, [from]
        let most = [4, 64, 64, 500, 5000][self.random.below(5) as usize];
        code.raw(&[0xb9]).word(self.random.below(most) as u32); // mov ecx, count
        let down = self.random.below(4) == 0;
        if down {
            code.raw(&[0xfd]); // std
        }
        let opcodes = [
            0xa4, 0xa5, 0xaa, 0xab, 0xa4, 0xaa, 0xac, 0xad, 0xa6, 0xa7, 0xae, 0xaf,
        ];
        let opcode = self.random.pick(&opcodes);
        match self.random.below(4) {
            0 => {}
            1 => code.bytes.push(0xf2),
            _ => code.bytes.push(0xf3),
        }
        match self.random.below(4) {
            0 if opcode & 1 != 0 => code.bytes.push(0x66),
            1 => code.bytes.push(0x48),
            _ => {}
        }
        code.raw(&[opcode]);
        if down {
            code.raw(&[0xfc]); // cld
        }
    }

    /// How a piece ends: always somewhere else.
    fn end(&mut self, code: &mut Code) {
        let (target, other) = (self.any_piece(), self.any_piece());
        self.count(code);
        match self.random.below(8) {
            0..=2 => {
                let condition = self.random.below(16) as u8;
                code.raw(&[0x0f, 0x80 | condition]).to(target, 0);
            }
            3 => {
                code.raw(&[0xe8]).to(target, 0); // call
            }
            4 => {
                code.raw(&[0xc3]); // ret
            }
            5 => {
                // lea rax, [target]; push rax; ret
                code.raw(&[0x48, 0x8d, 0x05])
                    .to(target, 0)
                    .raw(&[0x50, 0xc3]);
            }
            6 => {
                let entry = self.place.table + self.random.below(PIECES) * 8;
                // call or jmp [entry]
                let form = if self.random.below(2) == 0 {
                    0x15
                } else {
                    0x25
                };
                code.raw(&[0xff, form]).to(entry, 0);
            }
            _ => {}
        }
        code.raw(&[0xe9]).to(other, 0); // jmp
    }

    /// A piece.
    pub fn piece(&mut self, number: u64) -> Code {
        let mut code = Code::at(self.place.base + number * PIECE);
        // mov al, imm8 and a long NOP: what other pieces change.
        code.raw(&[0xb0, number as u8]).raw(&FILLER);
        if self.random.below(2) == 0 {
            code.raw(&[0x48, 0x8d, 0x25]).to(self.place.stack, 0); // lea rsp, [stack]
        }
        for _ in 0..1 + self.random.below(3) {
            let before = code.bytes.len();
            self.part(&mut code);
            if code.bytes.len() > PIECE as usize - 48 {
                code.bytes.truncate(before);
                break;
            }
        }
        self.end(&mut code);
        assert!(code.bytes.len() <= PIECE as usize);
        code
    }
}
