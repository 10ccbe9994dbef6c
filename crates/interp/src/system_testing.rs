//! Processors with descriptor tables, to test events, transfers and segment loads on.

use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{rflags, sreg};
use trapgate_x86::{Exception, Segment, TableRegister, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::decode::decode;
use crate::segments::vm86_segment;
use crate::testing::{long_cpu, protected_cpu};

/// Where things lie.
pub(crate) const GDT: u64 = 0x10000;
pub(crate) const IDT: u64 = 0x11000;
pub(crate) const LDT: u64 = 0x12000;
pub(crate) const TSS: u64 = 0x13000;
/// Top of the stack that the processor starts with.
pub(crate) const STACK: u64 = 0x20000;
/// Top of the level-0 stack that the TSS names.
pub(crate) const STACK0: u64 = 0x21000;
/// Top of the stack that the TSS has as IST 1.
pub(crate) const IST1: u64 = 0x22008;
/// Where the processor starts.
pub(crate) const CODE: u64 = 0x40000;
/// Where handlers of gates made by [`Bench::gate`] start.
pub(crate) const HANDLER: u64 = 0x50000;

// Selectors of both tables; the descriptors' levels are those of the names.
pub(crate) const CODE0: u16 = 0x08;
pub(crate) const DATA0: u16 = 0x10;
pub(crate) const CODE3: u16 = 0x1b;
pub(crate) const DATA3: u16 = 0x23;
/// 64-bit code of level 3 in the table of long mode.
pub(crate) const CODE3_64: u16 = 0x2b;
pub(crate) const TASK: u16 = 0x30;
/// Conforming code of level 0.
pub(crate) const CONFORMING: u16 = 0x40;
/// Level-0 code that is not present.
pub(crate) const ABSENT_CODE: u16 = 0x48;
/// Level-0 data that is not present.
pub(crate) const ABSENT_DATA: u16 = 0x50;
/// Level-0 data that can't be written.
pub(crate) const READ_ONLY: u16 = 0x58;
/// 16-bit code of level 0, 64 KiB.
pub(crate) const CODE16: u16 = 0x60;
/// Level-0 code that can't be read.
pub(crate) const EXECUTE_ONLY: u16 = 0x68;
/// A place for tests' own descriptors, 16 bytes.
pub(crate) const SPARE: u16 = 0x70;
/// Beyond the table.
pub(crate) const OUTSIDE: u16 = 0x80;

const CODE_ACCESS: u32 = access::P | access::S | access::CODE | access::READABLE;
const DATA_ACCESS: u32 = access::P | access::S | access::WRITABLE;
const BIG: u32 = access::DB | access::G;
const DPL3: u32 = access::DPL;

/// A descriptor as it lies in memory; the limit in units of the granularity.
pub(crate) fn descriptor(base: u32, limit: u32, access: u32) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(access & 0xf0ff) << 40
        | (limit & 0xf_0000) << 32
        | (base >> 24) << 56
}

/// A gate; `access` is its type and more, `low` the byte at bit 32 (parameters, or IST).
pub(crate) fn gate(selector: u16, offset: u64, access: u32, low: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(low) << 32
        | u64::from(access & 0xff) << 40
        | (offset & 0xffff_0000) << 32
}

/// A processor in a mode, and short ways to look at it.
pub(crate) struct Bench {
    pub(crate) cpu: Cpu,
}

impl Bench {
    /// Protected mode at level 0 with tables, interrupts enabled.
    pub(crate) fn protected() -> Self {
        let (cpu, _) = protected_cpu();
        let mut bench = Self { cpu };
        bench.common(access::DB);
        bench.put(
            GDT + u64::from(TASK),
            descriptor(TSS as u32, 0x67, access::P | system::TSS_BUSY),
        );
        bench.put(GDT + u64::from(CODE3_64 & !7), 0);
        // The level-0 stack.
        bench.put32(TSS + 4, STACK0 as u32);
        bench.put32(TSS + 8, u32::from(DATA0));
        bench.cpu.sys.tr = Segment {
            selector: TASK,
            base: TSS,
            limit: 0x67,
            access: access::P | system::TSS_BUSY,
        };
        bench
    }

    /// 64-bit mode at level 0 with tables, interrupts enabled.
    pub(crate) fn long() -> Self {
        let (cpu, _) = long_cpu();
        let mut bench = Self { cpu };
        bench.common(access::L);
        let code64 = CODE_ACCESS | access::L | access::G | DPL3;
        bench.put(
            GDT + u64::from(CODE3_64 & !7),
            descriptor(0, 0xfffff, code64),
        );
        bench.put(
            GDT + u64::from(TASK),
            descriptor(TSS as u32, 0x67, access::P | system::TSS_BUSY),
        );
        bench.put(GDT + u64::from(TASK) + 8, 0);
        bench.put(TSS + 4, STACK0);
        bench.put(TSS + 0x24, IST1);
        bench.cpu.sys.tr = Segment {
            selector: TASK,
            base: TSS,
            limit: 0x67,
            access: access::P | system::TSS_BUSY,
        };
        bench
    }

    /// Virtual-8086 mode with the tables of protected mode: CS is 0x4000, IP 0, SS 0x1000.
    pub(crate) fn vm86(iopl: u8) -> Self {
        let mut bench = Self::protected();
        let cpu = &mut bench.cpu;
        cpu.system_flags |= rflags::VM | u64::from(iopl) << rflags::IOPL_SHIFT;
        for (index, selector) in [0x1111, 0x4000, 0x1000, 0x3333, 0x4444, 0x5555]
            .iter()
            .enumerate()
        {
            cpu.sys.segments[index] = vm86_segment(*selector);
        }
        cpu.rip = 0;
        cpu.set_reg(4, 0x8000u32);
        cpu.update_mode();
        bench
    }

    /// `size` is the bit of the kernel's code segment.
    fn common(&mut self, size: u32) {
        let code = CODE_ACCESS | access::G;
        for (selector, limit, access) in [
            (CODE0, 0xfffff, code | size),
            (DATA0, 0xfffff, DATA_ACCESS | BIG),
            (CODE3, 0xfffff, CODE_ACCESS | BIG | DPL3),
            (DATA3, 0xfffff, DATA_ACCESS | BIG | DPL3),
            (CONFORMING, 0xfffff, code | size | access::CONFORMING),
            (ABSENT_CODE, 0xfffff, (code | size) & !access::P),
            (ABSENT_DATA, 0xfffff, (DATA_ACCESS | BIG) & !access::P),
            (READ_ONLY, 0xfffff, (DATA_ACCESS | BIG) & !access::WRITABLE),
            (CODE16, 0xffff, CODE_ACCESS),
            (EXECUTE_ONLY, 0xfffff, (code | size) & !access::READABLE),
        ] {
            self.put(GDT + u64::from(selector & !7), descriptor(0, limit, access));
        }
        let cpu = &mut self.cpu;
        cpu.sys.gdtr = TableRegister {
            base: GDT,
            limit: OUTSIDE - 1,
        };
        cpu.sys.idtr = TableRegister {
            base: IDT,
            limit: 0xfff,
        };
        cpu.sys.ldtr = Segment::null(0);
        cpu.sys.segments[sreg::CS].selector = CODE0;
        cpu.sys.segments[sreg::SS].selector = DATA0;
        cpu.set_reg(4, STACK);
        cpu.rip = CODE;
        cpu.set_rflags(rflags::IF);
    }

    /// Level 3 of protected mode, or 64-bit code of level 3 of long mode.
    pub(crate) fn user(mut self) -> Self {
        let cpu = &mut self.cpu;
        let code = if cpu.is_long() {
            Segment::flat(CODE3_64, access::CODE | access::READABLE | access::L | DPL3)
        } else {
            Segment::flat(CODE3, access::CODE | access::READABLE | access::DB | DPL3)
        };
        let data = Segment::flat(DATA3, access::WRITABLE | access::DB | DPL3);
        cpu.sys.segments = [data; 6];
        cpu.sys.segments[sreg::CS] = code;
        cpu.update_mode();
        assert_eq!(cpu.cpl, 3);
        self
    }

    /// Puts a gate to [`HANDLER`] in the IDT.
    pub(crate) fn gate(&mut self, vector: u8, selector: u16, access: u32, ist: u8) {
        let value = gate(selector, HANDLER, access, ist);
        if self.cpu.is_long() {
            self.put(IDT + u64::from(vector) * 16, value);
            self.put(IDT + u64::from(vector) * 16 + 8, 0);
        } else {
            self.put(IDT + u64::from(vector) * 8, value);
        }
    }

    /// A present 32-bit or 64-bit interrupt gate to level 0.
    pub(crate) fn interrupt_gate(&mut self, vector: u8) {
        self.gate(vector, CODE0, access::P | system::INTERRUPT_GATE, 0);
    }

    pub(crate) fn put(&self, gpa: u64, value: u64) {
        self.cpu
            .memory
            .write(gpa, &value.to_le_bytes())
            .expect("in memory");
    }

    pub(crate) fn put32(&self, gpa: u64, value: u32) {
        self.cpu
            .memory
            .write(gpa, &value.to_le_bytes())
            .expect("in memory");
    }

    pub(crate) fn put16(&self, gpa: u64, value: u16) {
        self.cpu
            .memory
            .write(gpa, &value.to_le_bytes())
            .expect("in memory");
    }

    /// `N` values of `size` bytes from `gpa` upwards.
    pub(crate) fn get<const N: usize>(&self, gpa: u64, size: u64) -> [u64; N] {
        std::array::from_fn(|index| {
            let mut bytes = [0; 8];
            let place = gpa + index as u64 * size;
            self.cpu
                .memory
                .read(place, &mut bytes[..size as usize])
                .expect("in memory");
            u64::from_le_bytes(bytes)
        })
    }

    /// Pushes values of 4 or 8 bytes, the first first.
    pub(crate) fn push(&mut self, size: u64, values: &[u64]) {
        for &value in values {
            self.cpu.push(size, value).expect("there is a stack");
        }
    }

    /// Runs one instruction as the run loop would.
    pub(crate) fn run(&mut self, bytes: &[u8]) -> Step {
        let cpu = &mut self.cpu;
        let mut padded = bytes.to_vec();
        padded.extend([0x90; 16]);
        let op = decode(cpu, &padded, 1).expect("an instruction").ops[0];
        // An invalid one has no length.
        let length = usize::from(op.length);
        assert!(
            length == bytes.len() || length == 0,
            "{bytes:02x?} is one instruction"
        );
        let before = cpu.rip;
        cpu.rip = cpu.rip.wrapping_add(u64::from(op.length));
        let step = (op.handler)(cpu, &op);
        if step == Err(Stop::Fault) {
            cpu.rip = before;
        }
        step
    }

    /// Runs one instruction that does not fault.
    pub(crate) fn runs(&mut self, bytes: &[u8]) {
        let step = self.run(bytes);
        assert_eq!(step, Ok(()), "{bytes:02x?}: {:x?}", self.cpu.exception);
    }

    /// Runs one instruction that faults, and changes nothing.
    pub(crate) fn faults(&mut self, bytes: &[u8]) -> Exception {
        let before = self.registers();
        assert_eq!(self.run(bytes), Err(Stop::Fault), "{bytes:02x?}");
        assert_eq!(self.registers(), before, "{bytes:02x?} changed registers");
        self.cpu.exception
    }

    /// Everything that a fault leaves alone.
    pub(crate) fn registers(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let cpu = &self.cpu;
        (
            (cpu.regs.gpr, cpu.rip, cpu.rflags(), cpu.cpl, cpu.code_size),
            cpu.sys.segments,
            (
                cpu.sys.ldtr,
                cpu.sys.tr,
                cpu.sys.cr0,
                cpu.sys.cr3,
                cpu.pending,
            ),
        )
    }

    pub(crate) fn selector(&self, index: usize) -> u16 {
        self.cpu.sys.segments[index].selector
    }

    pub(crate) fn sp(&self) -> u64 {
        self.cpu.stack_pointer()
    }
}

/// #GP with a code.
pub(crate) fn gp(code: u32) -> Exception {
    Exception::gp(code)
}

/// #NP with a code.
pub(crate) fn np(code: u32) -> Exception {
    Exception::with_code(Vector::NP, code)
}

/// #TS with a code.
pub(crate) fn ts(code: u32) -> Exception {
    Exception::with_code(Vector::TS, code)
}

/// #SS with a code.
pub(crate) fn ss(code: u32) -> Exception {
    Exception::ss(code)
}
