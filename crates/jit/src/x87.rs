//! x87 and MMX: the guest's registers are in the host's while guest code uses them.
//!
//! They are loaded by the first instruction of a unit that finds them elsewhere, and saved by the stub that goes from
//! host code to Rust code. So Rust code finds them in the processor's image, always, and the host's x87 as the ABI
//! wants it: empty, with the usual control word.
//!
//! An unmasked exception would be a signal to this process. So they are loaded only while the guest masks all
//! exceptions, and a control word that does not is the interpreter's to load; with such a one the interpreter does all
//! x87 and MMX instructions. With all exceptions masked none is ever pending, and FOP and FDP do not change.
//!
//! The guest's control word is in the image at all times. So are its FIP, FOP and FDP: what the host has of these are
//! addresses of host code, and nobody reads them. FIP follows from where the guest is: it is stored when a unit is left,
//! and each [`Site`] knows what it is there.

use iced_x86::Mnemonic;

use crate::context::Context;
use crate::emit::{Alu, Mem, RAX, RBP, RBX, RCX, RDX, Reg, condition};
use crate::instruction::Guest;
use crate::registers::{ADDRESS, SPARE};
use crate::stubs;
use crate::unit::{Aside, Site, Writer};

/// The guest's x87 registers are in the host's.
const HOST: u32 = 0;
/// They are in the image.
pub(crate) const IMAGE: u32 = 1;
/// They are in the image, and host code that is about to go on needs them in the host's.
const WANTED: u32 = 2;

/// Where the image has the status word, FOP, FIP and FDP.
const STATUS: u32 = 2;
const OPCODE: u32 = 6;
const INSTRUCTION: u32 = 8;
const DATA: u32 = 16;

/// ES and B in the status word, which say that an unmasked exception is pending.
const SUMMARY: u16 = 0x8080;
/// The exceptions' masks in the control word.
const MASKS: u8 = 0x3f;
/// The x87's state in XSAVE's mask of components.
const COMPONENT: u64 = 1;

/// Whether the host may run an x87 instruction in place. The others load or show all of the state, FIP included.
pub(crate) fn is_native(mnemonic: Mnemonic) -> bool {
    is_recorded(mnemonic) || matches!(mnemonic, Mnemonic::Fnclex | Mnemonic::Fnstsw)
}

/// Whether an x87 instruction's address becomes FIP: it is no control instruction (SDM vol. 1, 8.1.8).
pub(crate) fn is_recorded(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        Fldcw, Fldenv, Fnclex, Fndisi, Fneni, Fninit, Fnsave, Fnsetpm, Fnstcw, Fnstenv, Fnstsw,
        Frstor, Wait,
    };
    !matches!(
        mnemonic,
        Fldcw
            | Fldenv
            | Fnclex
            | Fndisi
            | Fneni
            | Fninit
            | Fnsave
            | Fnsetpm
            | Fnstcw
            | Fnstenv
            | Fnstsw
            | Frstor
            | Wait
    )
}

/// Whether an x87 instruction writes its memory operand; the others read it.
pub(crate) fn stores(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Fbstp, Fist, Fistp, Fisttp, Fnstsw, Fst, Fstp};
    matches!(
        mnemonic,
        Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fnstsw
    )
}

impl Writer<'_> {
    /// The x87's registers must be the guest's, or else the interpreter does the instruction.
    pub(crate) fn want_x87(&mut self, guest: &Guest) {
        if self.x87 {
            return;
        }
        self.give_up_flags(guest.live_in);
        self.asm
            .alu_memory_imm32(Alu::Cmp, Mem::low(self.at.x87()), HOST as i32);
        self.asm.jump_if(condition::NE, self.asm.here());
        let jump = self.asm.bytes.len() - 4;
        // What comes after the interpreter did it relies on them too.
        self.x87 = true;
        let site = self.site(guest);
        let site = self.add_site(site);
        self.asides.push(Aside::LoadX87 {
            jump,
            retry: self.asm.here(),
            site,
        });
    }

    /// FLDCW of a word that masks all exceptions.
    pub(crate) fn load_control_word(&mut self, guest: &Guest) {
        self.want_x87(guest);
        self.give_up_flags(guest.live_in);
        self.operand(guest, 2, false, 1);
        // Read once: others may write to the guest's memory meanwhile.
        let word = Mem::low(self.at.stash());
        self.asm.load16(SPARE, Mem::at(ADDRESS, 0));
        self.asm.store32(word, SPARE);
        self.asm.not(SPARE);
        self.asm.test_byte(SPARE, MASKS);
        self.operate_if(guest, condition::NE);
        self.asm.control_word(false, word);
        self.asm.control_word(true, Mem::low(self.at.x87_image()));
    }

    /// Makes the address of the last x87 instruction FIP. SPARE is lost.
    pub(crate) fn store_x87_pointer(&mut self) {
        let Some(address) = self.last_x87.take() else {
            return;
        };
        let pointer = Mem::low(self.at.x87_image() + INSTRUCTION);
        match i32::try_from(address as i64) {
            Ok(value) => self.asm.store_imm(pointer, value),
            Err(_) => {
                self.asm.mov_imm(SPARE, address);
                self.asm.store(pointer, SPARE);
            }
        }
    }
}

impl stubs::Writer<'_> {
    /// The x87's registers to the image, if they are the guest's. All general registers are lost.
    pub(crate) fn save_x87(&mut self) {
        const KEPT: [(Reg, u32); 2] = [(RBX, INSTRUCTION), (RBP, DATA)];
        let image = self.at.x87_image();
        let state = Mem::low(self.at.x87());
        self.asm.load32(RCX, state);
        let elsewhere = self.asm.short_unless_rcx_zero();
        for (register, at) in KEPT {
            self.asm.load(register, Mem::low(image + at));
        }
        self.asm.load16(RCX, Mem::low(image + OPCODE));
        self.asm.mov_imm(RAX, COMPONENT);
        self.asm.mov_imm(RDX, 0);
        self.asm.state(true, Mem::low(image));
        for (register, at) in KEPT {
            self.asm.store(Mem::low(image + at), register);
        }
        self.asm.store16(Mem::low(image + OPCODE), RCX);
        self.asm.raw(&[0xdb, 0xe3]); // fninit
        self.asm.store_imm32(state, IMAGE);
        self.asm.land(elsewhere);
    }

    /// Writes the stub that loads the x87's registers.
    pub(crate) fn load_x87(&mut self) -> u64 {
        let start = self.asm.here();
        let image = self.at.x87_image();
        self.asm.load16(RCX, Mem::low(image));
        self.asm.not(RCX);
        self.asm.test_byte(RCX, MASKS);
        let masked = self.asm.short_if(condition::E);
        self.asm.raw(&[0xc3]);
        self.asm.land(masked);
        // Nothing is pending, but the guest may have loaded an image that says so.
        self.asm.and_memory16(Mem::low(image + STATUS), !SUMMARY);
        self.asm.push(RAX);
        self.asm.push(RDX);
        self.asm.mov_imm(RAX, COMPONENT);
        self.asm.mov_imm(RDX, 0);
        self.asm.store(Mem::low(self.at.x87_header()), RAX);
        self.asm.state(false, Mem::low(image));
        self.asm.store_imm32(Mem::low(self.at.x87()), HOST);
        self.asm.pop(RDX);
        self.asm.pop(RAX);
        self.asm.alu(false, Alu::Cmp, RCX, RCX);
        self.asm.raw(&[0xc3]);
        start
    }

    /// Loads them if Rust code said that they are wanted. The flags and RCX are lost.
    pub(crate) fn load_x87_if_wanted(&mut self, load: u64) {
        let state = Mem::low(self.at.x87());
        self.asm.alu_memory_imm32(Alu::Cmp, state, WANTED as i32);
        let unwanted = self.asm.short_if(condition::NE);
        self.asm.call(load);
        self.asm.land(unwanted);
    }
}

impl Context {
    /// FIP at a site.
    pub(crate) fn take_x87_pointer(&mut self, site: &Site) {
        if site.x87_behind != 0 {
            let address = site.rip.wrapping_sub(u64::from(site.x87_behind));
            self.interp.cpu.regs.x87.set_instruction_pointer(address);
        }
    }

    /// Host code goes on in the unit of a site. All exceptions are masked if it relies on the x87's registers.
    pub(crate) fn give_x87(&mut self, site: &Site) {
        if site.x87 {
            self.x87 = WANTED;
        }
    }
}
