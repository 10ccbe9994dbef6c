//! Kernel modules: reading what they say of themselves, the order to load them in, and the index files that
//! `modprobe` wants. Debian's packages hold no `modules.dep`: it is made when they are installed, so we make ours.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use object::{Object, ObjectSection};

use crate::ImageError;

/// Larger modules are refused: a damaged length must not take all memory. Bytes, unpacked.
const LARGEST: u64 = 64 << 20;

/// A kernel module, unpacked.
#[derive(Debug)]
pub(crate) struct Module {
    /// Its path under `/lib/modules/VERSION/`, ending in `.ko`.
    pub(crate) path: String,
    /// The ELF file, with its signature if it has one.
    pub(crate) data: Vec<u8>,
    /// Names of the modules that must be loaded before it.
    depends: Vec<String>,
    /// Patterns of the devices it drives, and other names it is asked for by.
    aliases: Vec<String>,
}

/// The modules of one kernel that an initramfs takes, by name.
#[derive(Debug, Default)]
pub(crate) struct ModuleSet {
    modules: BTreeMap<String, Module>,
    /// The lines of `modules.builtin`: what the kernel has without a module.
    builtin: String,
}

/// The name of the module in this file, if it is one: `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is
/// `virtio_rng`. The kernel takes `-` and `_` in names of modules for the same.
pub(crate) fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))?;
    (!stem.is_empty()).then(|| stem.replace('-', "_"))
}

impl ModuleSet {
    /// Takes the module at `path` (under `/lib/modules/VERSION/`), whose file, possibly compressed, is `file`.
    pub(crate) fn insert(&mut self, path: &str, file: &[u8]) -> Result<(), ImageError> {
        let damaged = |detail: String| ImageError::Module {
            path: path.into(),
            detail,
        };
        let name = name_of(path).ok_or_else(|| damaged("it is not named like one".into()))?;
        let data = unpack(file).map_err(|e| damaged(e.to_string()))?;
        let mut module = Module {
            path: path[..path.rfind(".ko").unwrap_or(path.len())].to_owned() + ".ko",
            data: Vec::new(),
            depends: Vec::new(),
            aliases: Vec::new(),
        };
        for (key, value) in module_info(&data).map_err(damaged)? {
            match key {
                "depends" => {
                    module.depends.extend(
                        value
                            .split(',')
                            .filter(|d| !d.is_empty())
                            .map(|d| d.replace('-', "_")),
                    );
                }
                // An alias stands in a line of a text file.
                "alias" if !value.contains(char::is_whitespace) => {
                    module.aliases.push(value.into())
                }
                _ => {}
            }
        }
        module.data = data;
        self.modules.insert(name, module);
        Ok(())
    }

    /// Takes the text of `modules.builtin`.
    pub(crate) fn set_builtin(&mut self, text: &str) {
        self.builtin = text.into();
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// What modules here depend on and that is neither here nor built into the kernel.
    pub(crate) fn missing(&self) -> BTreeSet<String> {
        let builtin: BTreeSet<String> = self.builtin.lines().filter_map(name_of).collect();
        let depends = self.modules.values().flat_map(|m| &m.depends);
        depends
            .filter(|d| !self.contains(d) && !builtin.contains(*d))
            .cloned()
            .collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.values()
    }

    /// The modules of these names that are here, and all that they depend on, each after its dependencies.
    pub(crate) fn load_order<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Vec<&Module> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.visit(name, &mut seen, &mut order);
        }
        order
    }

    fn visit<'s>(&'s self, name: &str, seen: &mut BTreeSet<&'s str>, order: &mut Vec<&'s Module>) {
        // The set's own key, which lives as long as the result does.
        let Some((name, module)) = self.modules.get_key_value(name) else {
            return;
        };
        // Also ends the walk should modules depend on each other in a circle.
        if !seen.insert(name) {
            return;
        }
        for dependency in &module.depends {
            self.visit(dependency, seen, order);
        }
        order.push(module);
    }

    /// `modules.dep`: a module, then all it depends on, the first to load at the end.
    pub(crate) fn dep_file(&self) -> String {
        let mut text = String::new();
        for (name, module) in &self.modules {
            text.push_str(&module.path);
            text.push(':');
            for dependency in self.load_order([name.as_str()]).iter().rev().skip(1) {
                text.push(' ');
                text.push_str(&dependency.path);
            }
            text.push('\n');
        }
        text
    }

    /// `modules.alias`.
    pub(crate) fn alias_file(&self) -> String {
        let lines = self
            .modules
            .iter()
            .flat_map(|(name, m)| m.aliases.iter().map(move |a| format!("alias {a} {name}\n")));
        lines.collect()
    }

    /// `modules.builtin`.
    pub(crate) fn builtin_file(&self) -> &str {
        &self.builtin
    }
}

/// Unpacks a module's file, whatever its name says of how it is packed.
fn unpack(file: &[u8]) -> std::io::Result<Vec<u8>> {
    let reader: Box<dyn Read + '_> = match file {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Box::new(lzma_rust2::XzReader::new(file, true)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Box::new(ruzstd::decoding::StreamingDecoder::new(file).map_err(std::io::Error::other)?)
        }
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(file)),
        _ => Box::new(file),
    };
    let mut data = Vec::new();
    reader.take(LARGEST + 1).read_to_end(&mut data)?;
    if data.len() as u64 > LARGEST {
        return Err(std::io::Error::other(format!(
            "it unpacks to more than {} MiB",
            LARGEST >> 20
        )));
    }
    Ok(data)
}

/// The pairs in a module's section `.modinfo`: NUL-terminated strings `key=value` (Linux, include/linux/moduleparam.h).
fn module_info(data: &[u8]) -> Result<Vec<(&str, &str)>, String> {
    let file = object::File::parse(data).map_err(|e| e.to_string())?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or("it has no section .modinfo")?;
    let bytes = section.data().map_err(|e| e.to_string())?;
    Ok(bytes
        .split(|&b| b == 0)
        .filter_map(|s| std::str::from_utf8(s).ok()?.split_once('='))
        .collect())
}

/// Packs bytes as `xz` does.
#[cfg(test)]
pub(crate) fn test_xz(data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let options = lzma_rust2::XzOptions::with_preset(0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(data).unwrap();
    writer.finish().unwrap()
}

/// A module with nothing but a section `.modinfo`, for tests.
#[cfg(any(test, fuzzing))]
pub(crate) fn test_module(depends: &str, aliases: &[&str]) -> Vec<u8> {
    let mut info = format!("license=GPL\0depends={depends}\0");
    for alias in aliases {
        info.push_str(&format!("alias={alias}\0"));
    }
    let names = b"\0.modinfo\0.shstrtab\0";
    let (info_at, names_at) = (64, 64 + info.len());
    let sections_at = (names_at + names.len()).next_multiple_of(8);

    // The file header (System V ABI, "ELF Header"): a relocatable file for x86-64 with three section headers.
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [1u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for word in [0u64, 0, sections_at as u64] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 0, 0, 64, 3, 2] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(info.as_bytes());
    elf.extend(names);
    elf.resize(sections_at, 0);
    let section = |name: u32, kind: u32, at: usize, size: usize| {
        let mut header = Vec::new();
        header.extend(name.to_le_bytes());
        header.extend(kind.to_le_bytes());
        for word in [0u64, 0, at as u64, size as u64, 0, 1, 0] {
            header.extend(word.to_le_bytes());
        }
        // sh_link and sh_info are one word here.
        header
    };
    elf.extend(section(0, 0, 0, 0));
    elf.extend(section(1, 1, info_at, info.len()));
    elf.extend(section(10, 3, names_at, names.len()));
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn set(modules: &[(&str, &str)]) -> ModuleSet {
        let mut set = ModuleSet::default();
        for (name, depends) in modules {
            set.insert(&format!("kernel/{name}.ko"), &test_module(depends, &[]))
                .unwrap();
        }
        set
    }

    fn order(set: &ModuleSet, name: &str) -> Vec<String> {
        set.load_order([name])
            .iter()
            .map(|m| name_of(&m.path).unwrap())
            .collect()
    }

    #[test]
    fn names_of_modules() {
        for (path, name) in [
            (
                "kernel/drivers/char/hw_random/virtio-rng.ko",
                Some("virtio_rng"),
            ),
            ("a/b.ko.xz", Some("b")),
            ("b.ko.zst", Some("b")),
            ("b.ko.gz", Some("b")),
            ("modules.order", None),
            ("b.ko.txt", None),
            (".ko", None),
        ] {
            assert_eq!(name_of(path).as_deref(), name, "{path}");
        }
    }

    #[test]
    fn dependencies_of_dependencies_are_loaded_first_and_once() {
        let set = set(&[
            ("a", "b,c"),
            ("b", "d"),
            ("c", "d"),
            ("d", ""),
            ("unrelated", ""),
        ]);

        assert_eq!(order(&set, "a"), ["d", "b", "c", "a"]);
    }

    #[test]
    fn a_circle_of_dependencies_ends() {
        let set = set(&[("a", "b"), ("b", "a")]);

        assert_eq!(order(&set, "a"), ["b", "a"]);
    }

    #[test]
    fn what_is_built_in_is_not_missing_but_what_is_nowhere_is() {
        let mut set = set(&[("ext4", "jbd2,crc16,mbcache"), ("mbcache", "")]);
        set.set_builtin("kernel/lib/crc16.ko\n");

        assert_eq!(set.missing().into_iter().collect::<Vec<_>>(), ["jbd2"]);
    }

    #[test]
    fn the_index_files_are_as_depmod_writes_them() {
        let mut set = set(&[("a", "b"), ("b", "c"), ("c", "")]);
        set.insert(
            "kernel/virtio-rng.ko",
            &test_module("", &["virtio:d00000004v*", "not one\nword"]),
        )
        .unwrap();

        assert_eq!(
            set.dep_file(),
            "kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\nkernel/virtio-rng.ko:\n"
        );
        assert_eq!(set.alias_file(), "alias virtio:d00000004v* virtio_rng\n");
    }

    #[test]
    fn compressed_modules_are_unpacked_and_renamed() {
        let plain = test_module("x", &[]);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&plain).unwrap();
        let zst = ruzstd::encoding::compress_to_vec(
            plain.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );

        for (path, packed) in [
            ("kernel/m.ko.gz", gz.finish().unwrap()),
            ("kernel/m.ko.zst", zst),
            ("kernel/m.ko.xz", test_xz(&plain)),
        ] {
            let mut set = ModuleSet::default();
            set.insert(path, &packed).unwrap();

            let module = set.iter().next().unwrap();
            assert_eq!(
                (module.path.as_str(), &module.data),
                ("kernel/m.ko", &plain),
                "{path}"
            );
        }
    }

    #[test]
    fn damaged_modules_are_refused() {
        let plain = test_module("", &[]);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&plain).unwrap();
        let gz = gz.finish().unwrap();

        for bytes in [
            &b""[..],
            b"not an ELF file",
            &plain[..100],
            &gz[..gz.len() / 2],
            b"\xfd7zXZ\0",
            b"\x28\xb5\x2f\xfd",
        ] {
            let result = ModuleSet::default().insert("kernel/m.ko", bytes);
            assert!(
                matches!(result, Err(ImageError::Module { .. })),
                "{bytes:?}"
            );
        }
    }
}
