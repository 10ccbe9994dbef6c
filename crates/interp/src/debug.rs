//! Debug registers and alignment checks (SDM vol. 3B, chapter 18; vol. 3A, 7.15, #AC).

use crate::cpu::{Cpu, Step};
use crate::tlb::Access;

impl Cpu {
    /// In [`crate::tlb::View::Checked`]: #AC for a misaligned access where EFLAGS.AC asks for it,
    /// and a note of the data breakpoints that the access hits.
    pub(crate) fn check_debug_and_alignment(
        &mut self,
        _linear: u64,
        _size: u64,
        _access: Access,
    ) -> Step {
        Ok(())
    }
}
