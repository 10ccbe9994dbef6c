//! The complete architectural state of a processor, which belongs to no engine.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::descriptor::{Segment, TableRegister, access};
use crate::exception::Exception;
use crate::hexadecimal;
use crate::registers::{MXCSR_RESET, cr0, dr, rflags};

/// What the processor does when it is let run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// HLT: waits for an interrupt.
    Halted,
    /// An application processor after INIT.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Events that the last instruction holds off for one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InterruptShadow {
    /// Nothing is held off.
    #[default]
    None,
    /// After STI: maskable interrupts are.
    Sti,
    /// After MOV or POP to SS: interrupts and debug traps are.
    MovSs,
}

/// Memory type range registers; they change nothing here but must read back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtrrs {
    /// IA32_MTRR_DEF_TYPE.
    #[serde(with = "hexadecimal")]
    pub default_type: u64,
    /// The eleven fixed ranges, in the order of their numbers.
    #[serde(with = "hexadecimal::array")]
    pub fixed: [u64; 11],
    /// Base and mask of eight variable ranges.
    #[serde(with = "hexadecimal::pairs")]
    pub variable: [(u64, u64); 8],
}

/// The MSRs of the paravirtual interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParavirtualMsrs {
    /// KVM_SYSTEM_TIME(_NEW): guest-physical address of the clock, bit 0 enables.
    #[serde(with = "hexadecimal")]
    pub system_time: u64,
    /// KVM_WALL_CLOCK(_NEW): guest-physical address.
    #[serde(with = "hexadecimal")]
    pub wall_clock: u64,
}

/// What system software sees and sets: everything but the user-visible registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemState {
    /// ES, CS, SS, DS, FS, GS; the bases of FS and GS are the MSRs' too.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    #[serde(with = "hexadecimal")]
    pub cr0: u64,
    /// CR2.
    #[serde(with = "hexadecimal")]
    pub cr2: u64,
    /// CR3.
    #[serde(with = "hexadecimal")]
    pub cr3: u64,
    /// CR4.
    #[serde(with = "hexadecimal")]
    pub cr4: u64,
    /// XCR0.
    #[serde(with = "hexadecimal")]
    pub xcr0: u64,
    /// Page-directory-pointer entries loaded by PAE paging (SDM vol. 3A, 5.4.1).
    #[serde(with = "hexadecimal::array")]
    pub pdptes: [u64; 4],
    /// DR0 to DR3.
    #[serde(with = "hexadecimal::array")]
    pub dr: [u64; 4],
    /// DR6.
    #[serde(with = "hexadecimal")]
    pub dr6: u64,
    /// DR7.
    #[serde(with = "hexadecimal")]
    pub dr7: u64,
    /// IA32_EFER.
    #[serde(with = "hexadecimal")]
    pub efer: u64,
    /// STAR.
    #[serde(with = "hexadecimal")]
    pub star: u64,
    /// LSTAR.
    #[serde(with = "hexadecimal")]
    pub lstar: u64,
    /// CSTAR.
    #[serde(with = "hexadecimal")]
    pub cstar: u64,
    /// SFMASK.
    #[serde(with = "hexadecimal")]
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    #[serde(with = "hexadecimal")]
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    #[serde(with = "hexadecimal")]
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    #[serde(with = "hexadecimal")]
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    #[serde(with = "hexadecimal")]
    pub sysenter_eip: u64,
    /// TSC_AUX.
    #[serde(with = "hexadecimal")]
    pub tsc_aux: u64,
    /// What is added to the VM clock's ticks to give the TSC.
    #[serde(with = "hexadecimal")]
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    #[serde(with = "hexadecimal")]
    pub tsc_adjust: u64,
    /// IA32_PAT.
    #[serde(with = "hexadecimal")]
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    #[serde(with = "hexadecimal")]
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL.
    #[serde(with = "hexadecimal")]
    pub spec_ctrl: u64,
    /// IA32_MCG_STATUS.
    #[serde(with = "hexadecimal")]
    pub mcg_status: u64,
    /// The MTRRs.
    pub mtrrs: Mtrrs,
    /// MSRs of the paravirtual interfaces.
    pub paravirtual: ParavirtualMsrs,
    /// Held off by the last instruction.
    pub shadow: InterruptShadow,
    /// An NMI is being handled: others wait for IRET.
    pub nmi_blocked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// What the processor does.
    pub activity: Activity,
}

/// Bytes in an [`XsaveImage`]: legacy region, header and AVX component in standard format.
pub const XSAVE_BYTES: usize = 832;

/// x87, SSE and AVX state as XSAVE writes it in standard format (SDM vol. 1, 13.4).
#[derive(Clone, PartialEq, Eq)]
pub struct XsaveImage(pub Box<[u8; XSAVE_BYTES]>);

impl std::fmt::Debug for XsaveImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("XsaveImage")
    }
}

/// As hexadecimal digits.
impl Serialize for XsaveImage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        hex::serialize(self.0.as_slice(), serializer)
    }
}

impl<'de> Deserialize<'de> for XsaveImage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes: Vec<u8> = hex::deserialize(deserializer)?;
        let length = bytes.len();
        match bytes.try_into() {
            Ok(bytes) => Ok(Self(Box::new(bytes))),
            Err(_) => Err(D::Error::invalid_length(length, &"832 bytes")),
        }
    }
}

impl Default for XsaveImage {
    /// The initial state: FCW 0x37F, empty x87 stack, MXCSR 0x1F80, everything else zero.
    fn default() -> Self {
        let mut image = Box::new([0; XSAVE_BYTES]);
        image[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        image[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        image[28..32].copy_from_slice(&crate::registers::MXCSR_MASK.to_le_bytes());
        Self(image)
    }
}

/// The complete state of one processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// The general registers, as instructions number them.
    #[serde(with = "hexadecimal::array")]
    pub gpr: [u64; 16],
    /// RIP.
    #[serde(with = "hexadecimal")]
    pub rip: u64,
    /// RFLAGS.
    #[serde(with = "hexadecimal")]
    pub rflags: u64,
    /// x87, SSE and AVX state.
    pub xsave: XsaveImage,
    /// The rest.
    pub system: SystemState,
    /// An exception raised but not delivered.
    pub pending: Option<Exception>,
    /// Vector of an external interrupt that the interrupt controller gave away and that is not
    /// delivered yet: hardware can be stopped between the two. It comes before the next
    /// instruction, whatever RFLAGS.IF says now.
    pub interrupt: Option<u8>,
}

impl Default for SystemState {
    /// The state after power-up or reset (SDM vol. 3A, table 10-1).
    fn default() -> Self {
        let data = Segment::real(0, false);
        let mut code = Segment::real(0xf000, true);
        code.base = 0xffff_0000;
        let mut ldtr = Segment::real(0, false);
        ldtr.access = access::P | crate::descriptor::system::LDT;
        let mut tr = ldtr;
        tr.access = access::P | crate::descriptor::system::TSS_BUSY;
        let table = TableRegister {
            base: 0,
            limit: 0xffff,
        };
        Self {
            segments: [data, code, data, data, data, data],
            ldtr,
            tr,
            gdtr: table,
            idtr: table,
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: crate::registers::xcr0::X87,
            pdptes: [0; 4],
            dr: [0; 4],
            dr6: dr::DR6_ONES,
            dr7: dr::DR7_ONE,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            // Fast strings.
            misc_enable: 1,
            spec_ctrl: 0,
            mcg_status: 0,
            mtrrs: Mtrrs::default(),
            paravirtual: ParavirtualMsrs::default(),
            shadow: InterruptShadow::None,
            nmi_blocked: false,
            nmi_pending: false,
            activity: Activity::Running,
        }
    }
}

impl Default for CpuState {
    /// The state after power-up or reset (SDM vol. 3A, table 10-1).
    fn default() -> Self {
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::ONE,
            xsave: XsaveImage::default(),
            system: SystemState::default(),
            pending: None,
            interrupt: None,
        }
    }
}

impl CpuState {
    /// What INIT makes of a state: as reset, but for what INIT leaves alone (x87 and SSE state,
    /// MTRRs, TSC and some MSRs, CR0.CD and NW; SDM vol. 3A, table 10-1). The processor then waits
    /// for a start-up IPI unless it is the boot processor.
    pub fn init(&self, boot_processor: bool) -> Self {
        let old = &self.system;
        let system = SystemState {
            cr0: (old.cr0 & (cr0::CD | cr0::NW)) | cr0::ET,
            xcr0: old.xcr0,
            tsc_aux: old.tsc_aux,
            tsc_offset: old.tsc_offset,
            tsc_adjust: old.tsc_adjust,
            star: old.star,
            lstar: old.lstar,
            cstar: old.cstar,
            sfmask: old.sfmask,
            kernel_gs_base: old.kernel_gs_base,
            sysenter_cs: old.sysenter_cs,
            sysenter_esp: old.sysenter_esp,
            sysenter_eip: old.sysenter_eip,
            pat: old.pat,
            misc_enable: old.misc_enable,
            mtrrs: old.mtrrs,
            paravirtual: old.paravirtual,
            activity: if boot_processor {
                Activity::Running
            } else {
                Activity::WaitForSipi
            },
            ..SystemState::default()
        };
        Self {
            xsave: self.xsave.clone(),
            system,
            ..Self::default()
        }
    }

    /// What a start-up IPI with `vector` makes of a processor that waits for one: it runs in real
    /// mode from `vector` × 4096 (SDM vol. 3A, 9.4.4).
    pub fn start_up(&mut self, vector: u8) {
        let code = &mut self.system.segments[crate::registers::sreg::CS];
        *code = Segment::real(u16::from(vector) << 8, true);
        self.rip = 0;
        self.system.activity = Activity::Running;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_was_written_is_read_back() {
        let mut state = CpuState::default();
        state.gpr[7] = u64::MAX;
        state.rip = 0xffff_8000_1234_5678;
        state.xsave.0[831] = 0xab;
        state.system.mtrrs.variable[3] = (1 << 63, 5);
        state.system.activity = Activity::WaitForSipi;
        state.pending = Some(Exception::page_fault(u64::MAX, 7));
        let text = serde_json::to_string_pretty(&state).unwrap();
        assert!(text.contains(r#""rip": "0xffff800012345678""#), "{text}");
        assert_eq!(serde_json::from_str::<CpuState>(&text).unwrap(), state);
    }

    #[test]
    fn what_is_no_register_is_refused() {
        let good = serde_json::to_value(CpuState::default()).unwrap();
        for (field, bad) in [
            ("rip", serde_json::json!("0x+1")),
            ("rip", serde_json::json!("12")),
            ("rip", serde_json::json!("0x10000000000000000")),
            ("rip", serde_json::json!(12)),
            ("gpr", serde_json::json!(["0x0"])),
            ("xsave", serde_json::json!("00")),
            ("xsave", serde_json::json!("zz".repeat(832))),
            ("more", serde_json::json!(1)),
        ] {
            let mut state = good.clone();
            state[field] = bad;
            assert!(
                serde_json::from_value::<CpuState>(state).is_err(),
                "{field}"
            );
        }
        let mut segment = serde_json::to_value(Segment::default()).unwrap();
        segment["selector"] = "0x10000".into();
        assert!(serde_json::from_value::<Segment>(segment).is_err());
    }
}
