//! What apt's lists say of packages, and which of them make a guest.

use crate::ImageError;

/// Packages that depend on the distribution's newest kernel, the leanest first; a distribution has one or two of them.
pub(crate) const KERNELS: &[&str] = &[
    "linux-image-cloud-amd64",
    "linux-image-virtual",
    "linux-image-amd64",
    "linux-image-generic",
];
const BUSYBOX: &str = "busybox-static";

/// What apt's lists say of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// Length of the .deb file, bytes.
    pub(crate) size: u64,
    /// Names only; of alternatives the first.
    depends: Vec<String>,
}

impl Package {
    /// A stanza that `apt-cache show` prints, if the package can be fetched: one that is merely installed has no
    /// `Filename` and `Size`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let fields = text
            .lines()
            .take_while(|l| !l.is_empty())
            .filter_map(|l| l.split_once(": "));
        let (mut name, mut version, mut size, mut file, mut depends) =
            (None, None, None, None, Vec::new());
        for (key, value) in fields {
            match key {
                "Package" => name = Some(value.to_owned()),
                "Version" => version = Some(value.trim().to_owned()),
                "Size" => size = value.trim().parse().ok(),
                "Filename" => file = Some(()),
                "Depends" | "Pre-Depends" => {
                    let first_word = |d: &str| {
                        d.split_whitespace()
                            .next()
                            .map(|w| w.split(':').next().unwrap_or(w).to_owned())
                    };
                    depends.extend(value.split(',').filter_map(first_word));
                }
                _ => {}
            }
        }
        file?;
        let proper =
            |s: &String| s.bytes().all(|b| b.is_ascii_graphic() && b != b'/') && !s.is_empty();
        Some(Self {
            name: name.filter(proper)?,
            version: version.filter(proper)?,
            size: size?,
            depends,
        })
    }

    /// Whether a kernel or its modules may be in it: named like `linux-image-6.1.0-56-cloud-amd64`. Modules that Ubuntu
    /// calls extra are for devices that we haven't got.
    fn holds_kernel(name: &str) -> bool {
        let kinds = [
            "linux-image-",
            "linux-image-unsigned-",
            "linux-modules-",
            "linux-binary-",
        ];
        kinds.iter().any(|k| {
            name.strip_prefix(k)
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    }
}

/// The packages to fetch, the one with the kernel first. `show` asks the lists for packages, and leaves out those that
/// they don't know; it takes about a second, whatever the number.
pub(crate) fn resolve(
    kernels: &[&str],
    show: &dyn Fn(&[&str]) -> Vec<Package>,
) -> Result<Vec<Package>, ImageError> {
    let unknown = |names: &[&str]| ImageError::NoSuchPackage {
        names: names.join(", "),
    };
    let mut known = show(&[kernels, &[BUSYBOX]].concat());
    let mut take = |name: &str| {
        known
            .iter()
            .position(|p| p.name == name)
            .map(|at| known.swap_remove(at))
    };
    let meta = kernels
        .iter()
        .find_map(|name| take(name))
        .ok_or_else(|| unknown(kernels))?;
    let busybox = take(BUSYBOX).ok_or_else(|| unknown(&[BUSYBOX]))?;

    let mut packages: Vec<Package> = Vec::new();
    let mut open = meta.depends;
    loop {
        open.retain(|name| {
            Package::holds_kernel(name) && !packages.iter().any(|p| p.name == *name)
        });
        open.sort();
        open.dedup();
        if open.is_empty() {
            break;
        }
        let names: Vec<&str> = open.iter().map(String::as_str).collect();
        let found = show(&names);
        let lacking: Vec<&str> = names
            .into_iter()
            .filter(|n| !found.iter().any(|p| p.name == *n))
            .collect();
        if !lacking.is_empty() {
            return Err(unknown(&lacking));
        }
        open = found
            .iter()
            .flat_map(|p| p.depends.iter().cloned())
            .collect();
        packages.extend(found);
    }
    packages.sort_by_key(|p| !p.name.starts_with("linux-image-"));
    if packages.is_empty() {
        return Err(unknown(&[&format!(
            "a kernel that {} depends on",
            meta.name
        )]));
    }
    packages.push(busybox);
    Ok(packages)
}

/// A stanza of a package that can be fetched.
#[cfg(test)]
pub(crate) fn test_stanza(name: &str, depends: &str) -> String {
    format!(
        "Package: {name}\nVersion: 1:2.3-4\nDepends: {depends}\nFilename: pool/{name}.deb\nSize: 1000\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `apt-cache show` says in a world of these packages.
    fn world(packages: &[(&str, &str)]) -> impl Fn(&[&str]) -> Vec<Package> {
        let all: Vec<Package> = packages
            .iter()
            .map(|(n, d)| Package::parse(&test_stanza(n, d)).unwrap())
            .collect();
        move |names| {
            all.iter()
                .filter(|p| names.contains(&p.name.as_str()))
                .cloned()
                .collect()
        }
    }

    fn names(packages: &[Package]) -> Vec<&str> {
        packages.iter().map(|p| p.name.as_str()).collect()
    }

    #[test]
    fn a_stanza_is_read() {
        let text = "Package: linux-image-cloud-amd64\nSource: linux-signed-amd64 (6.1.192+2)\nVersion: 6.1.192-2\n\
                    Pre-Depends: a:any\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), b | c, d\n\
                    Description: Linux\n more: text\nFilename: pool/x.deb\nSize: 1504\n";

        let package = Package::parse(text).unwrap();

        assert_eq!(
            (
                package.name.as_str(),
                package.version.as_str(),
                package.size
            ),
            ("linux-image-cloud-amd64", "6.1.192-2", 1504)
        );
        assert_eq!(
            package.depends,
            ["a", "linux-image-6.1.0-56-cloud-amd64", "b", "d"]
        );
    }

    #[test]
    fn a_package_that_cannot_be_fetched_is_no_package() {
        let whole = test_stanza("busybox-static", "");
        assert!(Package::parse(&whole).is_some());
        for line in ["Package", "Version", "Filename", "Size"] {
            let without: String = whole
                .lines()
                .filter(|l| !l.starts_with(line))
                .map(|l| format!("{l}\n"))
                .collect();
            assert_eq!(Package::parse(&without), None, "{line}");
        }
        for improper in ["a/b", "a b", ""] {
            assert_eq!(
                Package::parse(&test_stanza(improper, "")),
                None,
                "{improper:?}"
            );
        }
    }

    #[test]
    fn debian_has_kernel_and_modules_in_one_package() {
        let show = world(&[
            (
                "linux-image-cloud-amd64",
                "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)",
            ),
            (
                "linux-image-6.1.0-56-cloud-amd64",
                "kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool",
            ),
            ("linux-image-amd64", "linux-image-6.1.0-56-amd64"),
            ("busybox-static", ""),
        ]);

        assert_eq!(
            names(&resolve(KERNELS, &show).unwrap()),
            ["linux-image-6.1.0-56-cloud-amd64", "busybox-static"]
        );
    }

    #[test]
    fn ubuntu_has_modules_in_a_package_of_their_own() {
        let show = world(&[
            ("linux-image-virtual", "linux-image-6.8.0-31-generic"),
            (
                "linux-image-generic",
                "linux-image-6.8.0-31-generic, linux-modules-extra-6.8.0-31-generic",
            ),
            (
                "linux-image-6.8.0-31-generic",
                "kmod, linux-base, linux-modules-6.8.0-31-generic",
            ),
            ("linux-modules-6.8.0-31-generic", "wireless-regdb"),
            ("busybox-static", "libc6"),
        ]);

        assert_eq!(
            names(&resolve(KERNELS, &show).unwrap()),
            [
                "linux-image-6.8.0-31-generic",
                "linux-modules-6.8.0-31-generic",
                "busybox-static"
            ]
        );
    }

    #[test]
    fn what_no_list_knows_is_named() {
        for (packages, named) in [
            (vec![], "linux-image-cloud-amd64"),
            (vec![("busybox-static", "")], "linux-image-virtual"),
            (
                vec![
                    ("linux-image-amd64", "linux-image-6.1-amd64"),
                    ("linux-image-6.1-amd64", ""),
                ],
                "busybox-static",
            ),
            (
                vec![
                    ("linux-image-amd64", "linux-image-6.1-amd64"),
                    ("busybox-static", ""),
                ],
                "linux-image-6.1-amd64",
            ),
            (
                vec![("linux-image-amd64", "nothing"), ("busybox-static", "")],
                "linux-image-amd64",
            ),
        ] {
            let error = resolve(KERNELS, &world(&packages)).unwrap_err();
            assert!(
                matches!(&error, ImageError::NoSuchPackage { names } if names.contains(named)),
                "{error}"
            );
        }
    }
}
