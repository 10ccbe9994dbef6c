//! Little-endian fields of untrusted bytes.

/// `N` bytes at `offset`, if they are all there.
pub(crate) fn bytes<const N: usize>(data: &[u8], offset: usize) -> Option<[u8; N]> {
    data.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// A 16-bit field.
pub(crate) fn u16_at(data: &[u8], offset: usize) -> Option<u16> {
    bytes(data, offset).map(u16::from_le_bytes)
}

/// A 32-bit field.
pub(crate) fn u32_at(data: &[u8], offset: usize) -> Option<u32> {
    bytes(data, offset).map(u32::from_le_bytes)
}

/// A 64-bit field.
pub(crate) fn u64_at(data: &[u8], offset: usize) -> Option<u64> {
    bytes(data, offset).map(u64::from_le_bytes)
}

/// The text from `offset` to the next NUL, if there is one; what is not UTF-8 is replaced.
pub(crate) fn text_at(data: &[u8], offset: usize) -> Option<String> {
    let tail = data.get(offset..)?;
    let length = tail.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&tail[..length]).into_owned())
}
