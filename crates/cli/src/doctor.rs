//! `trapgate doctor`: what this host offers, and what each missing thing costs.

use std::fmt::{self, Write};
use std::path::Path;

use rustix::fs::{Access, MemfdFlags, access, memfd_create, statvfs};
use serde_json::{Value, json};
use trapgate_image::{CacheDir, StockImage, cached};
use trapgate_vmm::probe::Kvm;
use trapgate_vmm::{EngineChoice, EngineKind, EngineReport, Host, Level, choose, engines};

use crate::arguments::DoctorArguments;
use crate::failure::Failure;
use crate::{size, status, terminal};

/// Space that the first run takes in the cache, bytes, with some to spare.
const CACHE_SPACE: u64 = 96 << 20;
/// With less memory to spare a guest of the default size may not find it.
const AMPLE_MEMORY: u64 = 1 << 30;

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// As it should be.
    Good,
    /// Guests run, and something is slower or not there.
    Lacking,
    /// No guest runs.
    Fatal,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "ok",
            Self::Lacking => "lacking",
            Self::Fatal => "missing",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
struct Finding {
    name: &'static str,
    state: State,
    /// What there is.
    what: String,
    /// What its lack costs, and what would help.
    cost: Option<String>,
}

impl Finding {
    fn good(name: &'static str, what: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Good,
            what: what.into(),
            cost: None,
        }
    }

    fn lacking(name: &'static str, what: impl Into<String>, cost: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Lacking,
            what: what.into(),
            cost: Some(cost.into()),
        }
    }

    fn fatal(name: &'static str, what: impl Into<String>, cost: impl Into<String>) -> Self {
        Self {
            state: State::Fatal,
            ..Self::lacking(name, what, cost)
        }
    }
}

/// All that was found.
struct Report {
    engines: Vec<EngineReport>,
    /// What `trapgate run` takes, and why.
    choice: Result<(String, String), String>,
    findings: Vec<Finding>,
}

/// Looks at the host and prints the report.
///
/// # Errors
/// None today; the exit status tells whether guests can run.
pub(crate) fn doctor(arguments: &DoctorArguments) -> Result<u8, Failure> {
    let report = Report::new();
    let text = if arguments.json {
        let mut text = format!("{:#}", report.json());
        text.push('\n');
        text
    } else {
        report.text()
    };
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), rest) {
            Ok(count) => rest = &rest[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::PIPE) => return Ok(status::SIGNAL + 13),
            Err(error) => {
                return Err(
                    Failure::new(status::HOST, "cannot write to standard output").cause(error),
                );
            }
        }
    }
    Ok(report.status())
}

impl Report {
    fn new() -> Self {
        let host = Host::probe();
        let choice = choose(EngineChoice::Auto, host.level(), &host)
            .map(|choice| (choice.kind.to_string(), choice.reason))
            .map_err(|error| error.to_string());
        let cache = CacheDir::from_env();
        let mut findings = processor(&host);
        let engines = engines(&host);
        let usable = engines
            .iter()
            .find(|engine| engine.kind == EngineKind::Kvm)
            .map_or(Err(String::new()), |engine| engine.usable.clone());
        findings.extend([kvm(&host, &usable), memory(&host), memfd()]);
        match cache {
            Ok(cache) => {
                let image = cached(&cache);
                findings.push(kernel(image.as_ref()));
                findings.push(cache_directory(cache.path(), image.is_some()));
            }
            Err(error) => findings.push(Finding::lacking(
                "cache",
                error.to_string(),
                format!("`trapgate run` can boot no stock kernel; {}", error.fix()),
            )),
        }
        findings.push(console());
        Self {
            engines,
            choice,
            findings,
        }
    }

    fn status(&self) -> u8 {
        let fatal = self.findings.iter().any(|f| f.state == State::Fatal);
        if fatal || self.choice.is_err() {
            status::HOST
        } else {
            status::SUCCESS
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "trapgate {} on this host\n\nEngines (what runs a guest's instructions)\n",
            env!("CARGO_PKG_VERSION")
        );
        // Writing to a string does not fail.
        for engine in &self.engines {
            let (state, why) = match &engine.usable {
                Ok(why) => ("usable", why),
                Err(why) => ("not usable", why),
            };
            let _ = writeln!(text, "  {:11} {state:10}  {why}", engine.kind.name());
            if !engine.in_kernel.is_empty() {
                let _ = writeln!(
                    text,
                    "  {:24}in the kernel: {}",
                    "",
                    engine.in_kernel.join(", ")
                );
            }
        }
        let _ = match &self.choice {
            Ok((kind, reason)) => writeln!(text, "  `trapgate run` takes {kind}: {reason}"),
            Err(reason) => writeln!(text, "  `trapgate run` can take none: {reason}"),
        };
        text += "\nHost\n";
        for finding in &self.findings {
            let _ = writeln!(
                text,
                "  {:11} {:10}  {}",
                finding.name, finding.state, finding.what
            );
            if let Some(cost) = &finding.cost {
                let _ = writeln!(text, "  {:24}cost: {cost}", "");
            }
        }
        text += if self.status() == status::SUCCESS {
            "\nGuests can run here: try `trapgate run`, or `trapgate run builtin`.\n"
        } else {
            "\nGuests can't run here, see `missing` above.\n"
        };
        text
    }

    fn json(&self) -> Value {
        let engines: Vec<Value> = self
            .engines
            .iter()
            .map(|engine| {
                let (Ok(reason) | Err(reason)) = &engine.usable;
                json!({
                    "name": engine.kind.name(),
                    "usable": engine.usable.is_ok(),
                    "reason": reason,
                    "in_kernel": engine.in_kernel,
                })
            })
            .collect();
        let findings: Vec<Value> = self
            .findings
            .iter()
            .map(|finding| {
                json!({
                    "name": finding.name,
                    "state": finding.state.to_string(),
                    "what": finding.what,
                    "cost": finding.cost,
                })
            })
            .collect();
        let (chosen, reason) = match &self.choice {
            Ok((kind, reason)) => (Some(kind), reason),
            Err(reason) => (None, reason),
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "can_run": self.status() == status::SUCCESS,
            "engines": engines,
            "chosen_engine": chosen,
            "chosen_because": reason,
            "host": findings,
        })
    }
}

fn processor(host: &Host) -> Vec<Finding> {
    let mut what = format!(
        "{}, {} for this process",
        host.cpu,
        plural(host.cores, "processor")
    );
    if let Some(hypervisor) = &host.hypervisor {
        what += &format!("; itself a guest of {}", named(hypervisor));
    }
    let (v2, v3) = (host.lacks(Level::V2), host.lacks(Level::V3));
    let level = if !v2.is_empty() {
        Finding::fatal(
            "level",
            format!("below x86-64-v2: no {}", v2.join(", ")),
            "guests are promised x86-64-v2, whose arithmetic runs on this processor",
        )
    } else if !v3.is_empty() {
        Finding::lacking(
            "level",
            format!("x86-64-v2; for v3 there is no {}", v3.join(", ")),
            "none: guests have x86-64-v2 here",
        )
    } else {
        Finding::good("level", "x86-64-v3")
    };
    vec![Finding::good("processor", what), level]
}

fn named(hypervisor: &str) -> &str {
    if hypervisor.is_empty() {
        "an unnamed hypervisor"
    } else {
        hypervisor
    }
}

fn plural(count: usize, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

fn kvm(host: &Host, usable: &Result<String, String>) -> Finding {
    if let (true, Ok(what)) = (host.kvm.is_hardware(), usable) {
        return Finding::good("hardware", what);
    }
    let what = match usable {
        // The device opens, and lacks something.
        Err(reason) if host.kvm.opens() => format!("{}; {reason}", host.kvm),
        _ => host.kvm.to_string(),
    };
    let cost = "guests run in software, many times slower than on virtualization hardware";
    Finding::lacking(
        "hardware",
        what,
        format!("{cost}; {}", kvm_remedy(&host.kvm)),
    )
}

/// What to do about a KVM that is not taken by itself.
fn kvm_remedy(kvm: &Kvm) -> &'static str {
    match kvm {
        Kvm::Hardware(_) => "a newer kernel may help",
        Kvm::Paravirtual => {
            "ask who runs this host for a machine with nested virtualization; `--engine kvm` takes this one all the same"
        }
        Kvm::NoPermission { hardware: Some(_) } => {
            "join the group that owns it (`ls -l /dev/kvm`), often with `sudo usermod -aG kvm $USER`, and log in again"
        }
        Kvm::NoDevice { hardware: Some(_) } => {
            "load its module (`sudo modprobe kvm_intel`, or `kvm_amd`), or pass the device on to this container"
        }
        // There is a device, so that it would be a paravirtual one.
        Kvm::NoPermission { hardware: None } => {
            "ask who runs this host for a machine with nested virtualization; to take this one all the same with `--engine kvm`, join the group that owns it (`ls -l /dev/kvm`)"
        }
        Kvm::NoDevice { hardware: None } => {
            "turn virtualization on in the firmware, or, in a virtual machine, ask for nested virtualization"
        }
        Kvm::Broken(_) => "see the kernel's log (`dmesg`) for what is wrong with it",
    }
}

fn memory(host: &Host) -> Finding {
    let Some((total, available)) = host.memory else {
        return Finding::lacking(
            "memory",
            "the host does not say how much there is",
            "none, if there is enough",
        );
    };
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let what = format!("{} available of {}", mib(available), mib(total));
    if available < AMPLE_MEMORY {
        return Finding::lacking(
            "memory",
            what,
            "a guest that uses all of its memory may not find it; keep `--memory` small",
        );
    }
    Finding::good("memory", what)
}

fn memfd() -> Finding {
    match memfd_create("trapgate-doctor", MemfdFlags::CLOEXEC) {
        Ok(_) => Finding::good("memfd", "memory can be made (memfd_create)"),
        Err(error) => Finding::fatal(
            "memfd",
            format!("memfd_create fails: {error}"),
            "guests have no memory; allow the system call in this sandbox",
        ),
    }
}

fn kernel(image: Option<&StockImage>) -> Finding {
    if let Some(image) = image {
        return Finding::good(
            "kernel",
            format!(
                "Linux {} is in the cache, from {}",
                image.kernel_version, image.origin
            ),
        );
    }
    let missing: Vec<&str> = ["apt-get", "apt-cache"]
        .into_iter()
        .filter(|name| !in_path(name))
        .collect();
    if missing.is_empty() {
        return Finding::good(
            "kernel",
            "none in the cache yet; the first `trapgate run` fetches one with apt-get",
        );
    }
    Finding::lacking(
        "kernel",
        format!("none in the cache, and no {}", missing.join(", ")),
        "no kernel can be fetched: `trapgate run` needs a readable /boot/vmlinuz-* and a static busybox, or `--kernel`",
    )
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|d| access(d.join(program), Access::EXEC_OK).is_ok())
}

fn cache_directory(path: &Path, has_image: bool) -> Finding {
    // It is made when it is first needed.
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(path);
    let cost = if has_image {
        "none now, since there is a kernel in it; it can't be renewed"
    } else {
        "no kernel can be fetched; set XDG_CACHE_HOME to another directory"
    };
    let shown = path.display();
    if access(existing, Access::WRITE_OK).is_err() {
        return Finding::lacking("cache", format!("{shown} can't be written to"), cost);
    }
    let free = statvfs(existing).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
    if free < CACHE_SPACE {
        let need = size::show(CACHE_SPACE);
        let what = format!(
            "{shown} has {} MiB free; a kernel takes up to {need}",
            free >> 20
        );
        return Finding::lacking("cache", what, cost);
    }
    Finding::good("cache", format!("{shown}, {} MiB free", free >> 20))
}

fn console() -> Finding {
    if !terminal::stdin_is_terminal() {
        return Finding::lacking(
            "terminal",
            "standard input is not a terminal",
            "a shell here reads its commands from standard input, and is not interactive",
        );
    }
    match terminal::size() {
        Some((columns, rows)) => Finding::good("terminal", format!("{columns} by {rows}")),
        None => Finding::lacking(
            "terminal",
            "it does not tell its size",
            "programs in the guest assume 80 by 24; tell them with `stty cols N rows N` there",
        ),
    }
}

#[cfg(test)]
mod tests {
    use trapgate_vmm::probe::Hardware;

    use super::*;

    fn report(findings: Vec<Finding>) -> Report {
        Report {
            engines: engines(&Host::probe()),
            choice: Ok(("interp".into(), "it is there".into())),
            findings,
        }
    }

    #[test]
    fn each_kind_of_kvm_has_its_own_remedy() {
        let hardware = Some(Hardware::Vmx);
        let kinds = [
            Kvm::Paravirtual,
            Kvm::NoPermission { hardware },
            Kvm::NoPermission { hardware: None },
            Kvm::NoDevice { hardware },
            Kvm::NoDevice { hardware: None },
            Kvm::Broken(std::io::Error::other("it does not answer")),
        ];
        let mut texts: Vec<String> = kinds
            .into_iter()
            .map(|kvm| {
                let host = Host {
                    kvm,
                    ..Host::probe()
                };
                let usable = Err(host.kvm.to_string());
                let finding = super::kvm(&host, &usable);
                assert_eq!(finding.state, State::Lacking);
                format!("{} {}", finding.what, finding.cost.unwrap())
            })
            .collect();
        for (text, word) in texts.iter().zip([
            "--engine kvm",
            "usermod",
            "the group that owns it",
            "modprobe",
            "firmware",
            "dmesg",
        ]) {
            assert!(text.contains(word), "{text}");
        }
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 6);
    }

    #[test]
    fn hardware_that_lacks_something_is_not_good() {
        let host = Host {
            kvm: Kvm::Hardware(Hardware::Svm),
            ..Host::probe()
        };
        assert_eq!(kvm(&host, &Ok("works".into())).state, State::Good);
        let finding = kvm(&host, &Err("it lacks smap".into()));
        assert_eq!(finding.state, State::Lacking);
        assert!(finding.what.contains("smap"), "{finding:?}");
    }

    #[test]
    fn what_is_missing_decides_over_the_status() {
        let good = Finding::good("a", "b");
        let lacking = Finding::lacking("a", "b", "c");
        let fatal = Finding::fatal("a", "b", "c");
        assert_eq!(report(vec![good.clone(), lacking.clone()]).status(), 0);
        assert_eq!(report(vec![good, lacking, fatal]).status(), status::HOST);
    }

    #[test]
    fn every_lack_says_what_it_costs() {
        let report = Report::new();
        assert!(report.findings.len() >= 7);
        for finding in &report.findings {
            assert_eq!(
                finding.cost.is_some(),
                finding.state != State::Good,
                "{finding:?}"
            );
        }
        let text = report.text();
        for word in ["kvm", "jit", "interp", "level", "memfd", "cache", "kernel"] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
    }

    #[test]
    fn json_says_the_same() {
        let json = report(vec![Finding::lacking("a", "b", "c")]).json();
        assert_eq!(json["can_run"], true);
        assert_eq!(json["engines"].as_array().unwrap().len(), 4);
        assert_eq!(json["host"][0]["state"], "lacking");
        assert_eq!(json["host"][0]["cost"], "c");
        assert_eq!(json["chosen_engine"], "interp");
    }

    #[test]
    fn cache_that_does_not_exist_yet_is_judged_by_where_it_would_be() {
        let directory = tempfile::tempdir().unwrap();
        let finding = cache_directory(&directory.path().join("a/b/c"), false);
        assert_ne!(finding.what, "");
        assert!(finding.what.contains("a/b/c"), "{finding:?}");
    }
}
