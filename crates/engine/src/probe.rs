//! What the host offers to the engines: facts, and no decisions.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use std::arch::x86_64::__cpuid;

/// The engines that there are, or are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// The CPU's virtualization hardware, through the host kernel.
    Kvm,
    /// The binary translator.
    Jit,
    /// The interpreter.
    Interp,
    /// Translator and interpreter, compared block by block.
    Lockstep,
}

impl EngineKind {
    /// Every engine, the fastest first.
    pub const ALL: [Self; 4] = [Self::Kvm, Self::Jit, Self::Interp, Self::Lockstep];

    /// The name by which it is asked for.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Jit => "jit",
            Self::Interp => "interp",
            Self::Lockstep => "lockstep",
        }
    }

    /// Whether the processors of one machine must not run at the same time.
    pub const fn takes_turns(self) -> bool {
        matches!(self, Self::Interp | Self::Jit | Self::Lockstep)
    }
}

impl std::fmt::Display for EngineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Virtualization hardware of the host's processor, as CPUID shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hardware {
    /// Intel VT-x (CPUID.1:ECX bit 5).
    Vmx,
    /// AMD-V (CPUID.8000_0001:ECX bit 2).
    Svm,
}

/// What became of opening `/dev/kvm`.
#[derive(Debug)]
pub enum KvmDevice {
    /// It opens.
    Opens,
    /// There is no such device.
    Missing,
    /// It is there and this user may not open it.
    NoPermission,
    /// It is there and does not open.
    Fails(io::Error),
}

/// What KVM is on this host: the device and the processor together.
#[derive(Debug)]
pub enum Kvm {
    /// The device opens and the processor has virtualization hardware.
    Hardware(Hardware),
    /// The device opens but CPUID shows no virtualization hardware: what is behind it emulates
    /// supervisor code, and is orders of magnitude slower for unmodified kernels.
    Paravirtual,
    /// This user may not open the device.
    NoPermission {
        /// The hardware, so that asking for permission is known to be worth it.
        hardware: Option<Hardware>,
    },
    /// There is no device.
    NoDevice {
        /// The hardware, so that loading the module is known to be worth it.
        hardware: Option<Hardware>,
    },
    /// The device does not open for some other reason.
    Broken(io::Error),
}

impl Kvm {
    fn new(device: KvmDevice, hardware: Option<Hardware>) -> Self {
        match (device, hardware) {
            (KvmDevice::Opens, Some(hardware)) => Self::Hardware(hardware),
            (KvmDevice::Opens, None) => Self::Paravirtual,
            (KvmDevice::NoPermission, hardware) => Self::NoPermission { hardware },
            (KvmDevice::Missing, hardware) => Self::NoDevice { hardware },
            (KvmDevice::Fails(error), _) => Self::Broken(error),
        }
    }

    /// Whether the device opens.
    pub fn opens(&self) -> bool {
        matches!(self, Self::Hardware(_) | Self::Paravirtual)
    }

    /// Whether it can run guests, and runs them on the hardware.
    pub fn is_hardware(&self) -> bool {
        matches!(self, Self::Hardware(_))
    }
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hardware(Hardware::Vmx) => f.write_str("/dev/kvm opens, with Intel VT-x"),
            Self::Hardware(Hardware::Svm) => f.write_str("/dev/kvm opens, with AMD-V"),
            Self::Paravirtual => f.write_str(
                "/dev/kvm opens, but the CPU shows neither vmx nor svm: a paravirtual KVM, which is slow for unmodified kernels",
            ),
            Self::NoPermission { hardware: Some(_) } => {
                f.write_str("no permission to open /dev/kvm")
            }
            Self::NoPermission { hardware: None } => f.write_str(
                "no permission to open /dev/kvm, and the CPU shows neither vmx nor svm",
            ),
            Self::NoDevice { hardware: Some(_) } => {
                f.write_str("there is no /dev/kvm, though the CPU could")
            }
            Self::NoDevice { hardware: None } => {
                f.write_str("there is no /dev/kvm, and the CPU shows neither vmx nor svm")
            }
            Self::Broken(error) => write!(f, "/dev/kvm does not open: {error}"),
        }
    }
}

/// Facts about the host.
#[derive(Debug)]
pub struct Host {
    /// What the processor calls itself.
    pub cpu: String,
    /// Its virtualization hardware.
    pub hardware: Option<Hardware>,
    /// Whether it runs under a hypervisor itself (CPUID.1:ECX bit 31), and that one's signature if
    /// it can be read.
    pub hypervisor: Option<String>,
    /// Features that engines and CPU profiles look for, and whether they are there.
    pub features: Vec<(&'static str, bool)>,
    /// Processors that this process may use.
    pub cores: usize,
    /// Bytes of RAM, and how many of them are available; `None` where the host does not say.
    pub memory: Option<(u64, u64)>,
    /// KVM.
    pub kvm: Kvm,
}

impl Host {
    /// Looks at the host. Takes some milliseconds at most, and changes nothing.
    pub fn probe() -> Self {
        let hardware = hardware();
        Self {
            cpu: brand(),
            hardware,
            hypervisor: hypervisor(),
            features: features(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory: std::fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| memory(&text)),
            kvm: Kvm::new(kvm_device(Path::new("/dev/kvm")), hardware),
        }
    }

    /// Whether a feature of [`Self::features`] is there.
    pub fn has(&self, feature: &str) -> bool {
        self.features.contains(&(feature, true))
    }
}

fn kvm_device(path: &Path) -> KvmDevice {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => KvmDevice::Opens,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => KvmDevice::Missing,
            io::ErrorKind::PermissionDenied => KvmDevice::NoPermission,
            // A device node without a driver behind it (ENXIO, ENODEV).
            _ if matches!(error.raw_os_error(), Some(6 | 19)) => KvmDevice::Missing,
            _ => KvmDevice::Fails(error),
        },
    }
}

fn hardware() -> Option<Hardware> {
    if __cpuid(1).ecx & 1 << 5 != 0 {
        return Some(Hardware::Vmx);
    }
    let extended = __cpuid(0x8000_0000).eax;
    (extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0).then_some(Hardware::Svm)
}

fn text(registers: &[u32]) -> String {
    let bytes: Vec<u8> = registers
        .iter()
        .flat_map(|register| register.to_le_bytes())
        .collect();
    let text = String::from_utf8_lossy(&bytes);
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
        .to_owned()
}

fn brand() -> String {
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return "unnamed".to_owned();
    }
    let registers: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .map(__cpuid)
        .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .collect();
    text(&registers)
}

fn hypervisor() -> Option<String> {
    (__cpuid(1).ecx & 1 << 31 != 0).then(|| {
        let leaf = __cpuid(0x4000_0000);
        text(&[leaf.ebx, leaf.ecx, leaf.edx])
    })
}

fn features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($($name:tt),*) => { vec![$(($name, std::is_x86_feature_detected!($name))),*] };
    }
    detect![
        "sse3",
        "ssse3",
        "sse4.1",
        "sse4.2",
        "popcnt",
        "cmpxchg16b",
        "pclmulqdq",
        "aes",
        "rdrand",
        "rdseed",
        "movbe",
        "lzcnt",
        "bmi1",
        "bmi2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f"
    ]
}

/// Total and available bytes from the text of `/proc/meminfo`.
fn memory(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn device_and_hardware_together_tell_the_kinds_of_kvm_apart() {
        let vmx = Some(Hardware::Vmx);
        let missing = || io::Error::from_raw_os_error(5);
        assert!(Kvm::new(KvmDevice::Opens, vmx).is_hardware());
        assert!(matches!(Kvm::new(KvmDevice::Opens, None), Kvm::Paravirtual));
        assert!(matches!(
            Kvm::new(KvmDevice::NoPermission, vmx),
            Kvm::NoPermission { hardware: Some(_) }
        ));
        assert!(matches!(
            Kvm::new(KvmDevice::Missing, None),
            Kvm::NoDevice { hardware: None }
        ));
        assert!(matches!(
            Kvm::new(KvmDevice::Fails(missing()), vmx),
            Kvm::Broken(_)
        ));
    }

    #[test]
    fn device_that_is_missing_and_one_that_opens_are_told_apart() {
        let directory = std::env::temp_dir();
        let path = directory.join(format!("trapgate-probe-{}", std::process::id()));
        assert!(matches!(kvm_device(&path), KvmDevice::Missing));
        std::fs::write(&path, "").unwrap();
        assert!(matches!(kvm_device(&path), KvmDevice::Opens));
        // A superuser may open everything, so this may open all the same.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
        assert!(matches!(
            kvm_device(&path),
            KvmDevice::NoPermission | KvmDevice::Opens
        ));
        std::fs::remove_file(&path).unwrap();
        // A directory opens for nobody's writing.
        assert!(matches!(kvm_device(&directory), KvmDevice::Fails(_)));
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       1024 kB\nMemFree:          10 kB\nMemAvailable:    512 kB\n";
        assert_eq!(memory(text), Some((1 << 20, 512 << 10)));
        assert_eq!(memory("MemTotal: lots\n"), None);
    }

    #[test]
    fn probe_sees_this_host() {
        let host = Host::probe();
        assert!(host.cores >= 1);
        assert!(!host.cpu.is_empty());
        assert_eq!(host.features.len(), 19);
        assert!(!host.has("no such feature"));
    }
}
