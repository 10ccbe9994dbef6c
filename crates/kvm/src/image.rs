//! The XSAVE image between our form and the kernel's, which is the same but for what is longer.

use kvm_bindings::kvm_xsave;
use trapgate_x86::XsaveImage;
use trapgate_x86::registers::{MXCSR_MASK, MXCSR_RESET, xcr0};
use trapgate_x86::state::XSAVE_BYTES;

/// Where MXCSR lies.
const MXCSR_AT: usize = 24;
/// Where its mask lies.
const MXCSR_MASK_AT: usize = 28;
/// Where what software may use begins, up to the header.
const LEGACY_END: usize = 416;
/// Where XSTATE_BV lies, and the rest of the header.
const HEADER: usize = 512;
/// Where the header ends.
const HEADER_END: usize = 576;

/// For the kernel. State components that are not in the image become initial.
pub(crate) fn to_kvm(image: &XsaveImage) -> kvm_xsave {
    let mut image = image.clone();
    let components = u64::from(image.0[HEADER]);
    let mut used = in_use(&mut image, components);
    // MXCSR has no component of its own: the kernel takes it with SSE's or AVX's only.
    if image.0[MXCSR_AT..MXCSR_MASK_AT] != MXCSR_RESET.to_le_bytes() {
        used |= xcr0::SSE;
    }
    image.0[HEADER] = used as u8;
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(image.0.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // The host may have a narrower mask, and would refuse the image for ours.
    xsave.region[MXCSR_MASK_AT / 4] = 0;
    xsave
}

/// From the kernel's; `mask` are the components that the profile has. Components that are initial are
/// not named in the image, whether the kernel did or not.
pub(crate) fn from_kvm(xsave: &kvm_xsave, mask: u64) -> XsaveImage {
    let mut bytes = Box::new([0; XSAVE_BYTES]);
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    bytes[MXCSR_MASK_AT..MXCSR_MASK_AT + 4].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    let components = u64::from(bytes[HEADER]) & mask;
    bytes[LEGACY_END..HEADER_END].fill(0);
    let mut image = XsaveImage(bytes);
    image.0[HEADER] = in_use(&mut image, components) as u8;
    image
}

/// Those of `components` that are not initial; the others are made so.
fn in_use(image: &mut XsaveImage, components: u64) -> u64 {
    let initial = XsaveImage::default();
    let mut used = 0;
    for (component, range) in [
        (xcr0::X87, 0..24),
        (xcr0::X87, 32..160),
        (xcr0::SSE, 160..416),
        (xcr0::AVX, HEADER_END..XSAVE_BYTES),
    ] {
        let initial = &initial.0[range.clone()];
        let bytes = &mut image.0[range];
        if components & component == 0 {
            bytes.copy_from_slice(initial);
        } else if bytes != initial {
            used |= component;
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX;

    fn image(seed: &[u8], components: u8) -> XsaveImage {
        let mut image = XsaveImage::default();
        for (byte, seed) in image.0.iter_mut().zip(seed.iter().cycle()) {
            *byte = *seed;
        }
        image.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        image.0[MXCSR_MASK_AT..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        image.0[LEGACY_END..HEADER_END].fill(0);
        image.0[HEADER] = components;
        image
    }

    proptest! {
        /// What one conversion makes of an image stays as it is from then on.
        #[test]
        fn image_comes_back(
            seed in prop::collection::vec(any::<u8>(), 1..64), components in 0..8u8,
        ) {
            let once = from_kvm(&to_kvm(&image(&seed, components)), ALL);
            prop_assert!(u64::from(once.0[HEADER]) & !u64::from(components) == 0);
            prop_assert_eq!(from_kvm(&to_kvm(&once), ALL).0, once.0);
        }
    }

    #[test]
    fn bytes_of_components_in_use_are_kept() {
        let full = image(&[0x5a, 0xa5, 3], 7);
        assert!(from_kvm(&to_kvm(&full), ALL).0 == full.0);
        let initial = XsaveImage::default();
        assert!(from_kvm(&to_kvm(&initial), ALL).0 == initial.0);
    }

    #[test]
    fn mxcsr_is_kept_while_every_component_is_initial() {
        let mut image = XsaveImage::default();
        image.0[MXCSR_AT..MXCSR_MASK_AT].copy_from_slice(&0x9fc0u32.to_le_bytes());
        let kernels = to_kvm(&image);
        assert_eq!(kernels.region[HEADER / 4], xcr0::SSE as u32);
        assert!(from_kvm(&kernels, ALL).0 == image.0);
    }

    #[test]
    fn components_that_the_profile_lacks_do_not_come_out() {
        let image = from_kvm(&to_kvm(&image(&[7], 7)), xcr0::X87 | xcr0::SSE);
        assert_eq!(image.0[HEADER], 3);
        assert!(image.0[HEADER_END..].iter().all(|&byte| byte == 0));
    }
}
