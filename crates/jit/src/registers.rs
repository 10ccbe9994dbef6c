//! Which host register holds which guest register.

use iced_x86::Register;

use crate::emit::{R9, R10, R11, RAX, RBP, RBX, RCX, RDI, RDX, Reg};

/// For an address, then the host address.
pub(crate) const ADDRESS: Reg = R11;
/// For an index, a count, or a guest register that lives in memory.
pub(crate) const SPARE: Reg = RCX;
/// The guest's RCX: RCX itself is the spare register because shifts count in it and JRCXZ is the one branch
/// that needs no flags.
pub(crate) const GUEST_RCX: Reg = R10;
/// The guest's RSP; the host's stays the host's.
pub(crate) const GUEST_RSP: Reg = R9;

/// Where each guest register lives; `None` for those that stay in memory: compilers use R9 to R11 least.
pub(crate) const HOME: [Option<Reg>; 16] = [
    Some(RAX),
    Some(GUEST_RCX),
    Some(RDX),
    Some(RBX),
    Some(GUEST_RSP),
    Some(RBP),
    Some(Reg(6)),
    Some(RDI),
    Some(Reg(8)),
    None,
    None,
    None,
    Some(Reg(12)),
    Some(Reg(13)),
    Some(Reg(14)),
    Some(Reg(15)),
];

/// The decoder's name of a host register, with the size of another.
pub(crate) fn named(register: Reg, size: usize) -> Register {
    const NAMES: [[Register; 16]; 4] = [
        [
            Register::AL,
            Register::CL,
            Register::DL,
            Register::BL,
            Register::SPL,
            Register::BPL,
            Register::SIL,
            Register::DIL,
            Register::R8L,
            Register::R9L,
            Register::R10L,
            Register::R11L,
            Register::R12L,
            Register::R13L,
            Register::R14L,
            Register::R15L,
        ],
        [
            Register::AX,
            Register::CX,
            Register::DX,
            Register::BX,
            Register::SP,
            Register::BP,
            Register::SI,
            Register::DI,
            Register::R8W,
            Register::R9W,
            Register::R10W,
            Register::R11W,
            Register::R12W,
            Register::R13W,
            Register::R14W,
            Register::R15W,
        ],
        [
            Register::EAX,
            Register::ECX,
            Register::EDX,
            Register::EBX,
            Register::ESP,
            Register::EBP,
            Register::ESI,
            Register::EDI,
            Register::R8D,
            Register::R9D,
            Register::R10D,
            Register::R11D,
            Register::R12D,
            Register::R13D,
            Register::R14D,
            Register::R15D,
        ],
        [
            Register::RAX,
            Register::RCX,
            Register::RDX,
            Register::RBX,
            Register::RSP,
            Register::RBP,
            Register::RSI,
            Register::RDI,
            Register::R8,
            Register::R9,
            Register::R10,
            Register::R11,
            Register::R12,
            Register::R13,
            Register::R14,
            Register::R15,
        ],
    ];
    NAMES[size.trailing_zeros() as usize & 3][usize::from(register.0)]
}

/// Number of a general register.
pub(crate) fn number(register: Register) -> usize {
    register.full_register().number()
}

/// AH, CH, DH or BH.
pub(crate) fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}
