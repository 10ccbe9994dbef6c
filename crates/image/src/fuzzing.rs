//! The readers of files that others wrote, for the fuzz target: what goes from a package into an image, without the
//! package manager and the cache around it.

use std::path::{Path, PathBuf};

use crate::modules::{ModuleSet, test_module};
use crate::{ImageError, Origin, deb, host, initramfs};

/// The initramfs that comes of a package.
///
/// # Errors
/// Any that a damaged package gives.
pub fn initramfs_of_package(package: PathBuf) -> Result<Vec<u8>, ImageError> {
    let origin = Origin::Package {
        name: "fuzz".into(),
        version: "1".into(),
    };
    let parts = deb::parts(&[package], origin, &mut |_, _, _| {})?;
    Ok(initramfs::build(&parts))
}

/// The text of the index files of a set of modules, path and file of each.
///
/// # Errors
/// That of a damaged module.
pub fn index_of_modules(
    builtin: &str,
    modules: &[(String, Vec<u8>)],
) -> Result<String, ImageError> {
    let mut set = ModuleSet::default();
    set.set_builtin(builtin);
    for (path, file) in modules {
        set.insert(path, file)?;
    }
    let missing: String = set.missing().into_iter().collect();
    Ok(missing + &set.dep_file() + &set.alias_file())
}

/// The version that a kernel's header names.
///
/// # Errors
/// If it is not a kernel.
pub fn kernel_version(file: &[u8]) -> Result<String, ImageError> {
    host::check_kernel(Path::new("vmlinuz"), file)
}

/// Why a file is not a static busybox.
///
/// # Errors
/// Why, if it is not.
pub fn check_busybox(file: &[u8]) -> Result<(), String> {
    host::check_busybox(file)
}

/// The least that passes for a kernel of this version.
pub fn sample_kernel(version: &str) -> Vec<u8> {
    host::test_kernel(version)
}

/// The least that passes for a static busybox.
pub fn sample_busybox() -> Vec<u8> {
    host::test_busybox()
}

/// A module that says this of itself.
pub fn sample_module(depends: &str, aliases: &[&str]) -> Vec<u8> {
    test_module(depends, aliases)
}
