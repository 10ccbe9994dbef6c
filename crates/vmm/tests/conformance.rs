//! The guests that show what a CPU does, on KVM: they print what every correct CPU makes them print
//! (`boot_builtin.rs` holds the interpreter to the same text).
//!
//! A paravirtual KVM emulates supervisor code, and runs user code on a processor that it has not
//! virtualized. What it gets wrong is in [`PARAVIRTUAL_FAULTS`], line by line: that no engine of ours can mend. On
//! virtualization hardware nothing is forgiven but what the kernel does not check ([`LENIENT`]).
//!
//! On a paravirtual KVM the interrupt controllers are ours: its kernel's local APIC shows nothing in service
//! while a handler runs, and QEMU 7.2 with `-accel kvm`, which uses it, has five lines of `interrupts`
//! wrong.

mod boot;

use boot::{Transcript, skipped};
use trapgate_guests::Program;
use trapgate_vmm::{
    Content, EngineChoice, EngineKind, Hooks, Host, Machine, MachineConfig, Outcome, choose,
};

/// How a program's output differs.
struct Faults {
    program: &'static str,
    /// Beginnings of lines that are missing, or say something else. Each must stand for at least one.
    wrong: &'static [&'static str],
    /// As those, but some hosts have them right.
    perhaps: &'static [&'static str],
    /// The line before which the emulator gives up.
    gives_up_before: Option<&'static str>,
    why: &'static str,
}

const NONE: Faults = Faults {
    program: "",
    wrong: &[],
    perhaps: &[],
    gives_up_before: None,
    why: "",
};

/// Programs and beginnings of lines that Linux itself (6.18) gets wrong: its local APIC and the MSRs
/// that it keeps take writes that the architecture refuses. Which, depends on the host.
const LENIENT: &[(&str, &str)] = &[
    // Its 8259A keep an edge whose line has fallen, and know no special mask at the end of an interrupt.
    ("controllers", "edge: high 0x10"),
    ("controllers", "end of interrupt, which passes"),
    ("controllers", "still in special mask mode"),
    ("controllers", "out of it"),
    ("controllers", "after the keyboard's end"),
    ("controllers", "high and low again"),
    // Its local APIC notes no errors, and takes reserved bits of its registers.
    ("controllers", "vector 15"),
    ("controllers", "self-ipi with vector 15"),
    ("controllers", "read of a reserved register"),
    ("controllers", "write of a reserved register"),
    ("controllers", "timer with vector 5"),
    ("controllers", "error interrupt"),
    ("controllers", "error status"),
    ("controllers", "x2apic, write of"),
    // Virtualization hardware knows the host's width of physical addresses only.
    ("legacy", "large page, bit 40"),
    ("legacy", "large page, bit 51"),
    ("legacy", "directory entry, bit"),
    ("legacy", "page, bit"),
    ("legacy", "pointer with bit 40"),
    ("legacy", "32-bit, large page, address bit"),
    ("paging", "pml4: r"),
    ("paging", "pdpt: ."),
    ("paging", "directory: ."),
    ("paging", "page: -"),
    ("identity", "an address of 49 bits"),
    ("identity", "fmask, a bit of the upper half"),
    ("interrupts", "x2apic, end of interrupt with 1"),
    ("interrupts", "x2apic, a reserved bit of the task priority"),
];

/// What is wrong with the paravirtual KVM that these tests were written on (`kvm-pvm` of Linux
/// 6.18).
const PARAVIRTUAL_FAULTS: &[Faults] = &[
    Faults {
        program: "coprocessor",
        gives_up_before: Some("x87 while cr0.ts"),
        why: "its emulator knows no x87 and SSE instructions",
        ..NONE
    },
    Faults {
        program: "exceptions",
        wrong: &[
            "single step over mov ss",
            "#UD through a gate that is not present",
            "#DE on a stack that is not mapped",
            "ring 3, int 0x80",
            "ring 3, int3 through a ring 0 gate",
            "ring 3, cli with iopl 3",
            "ring 3, aligned read",
            "ring 3, misaligned read without ac",
            "data breakpoint on a write:",
            "data breakpoint on an access of 4 bytes",
            "i/o breakpoint",
            "debug registers while general detect is on",
        ],
        gives_up_before: Some("read of a user page, smap, ac set"),
        why: "INT in ring 3 is #UD, data breakpoints and the shadow of MOV SS are ignored, any two exceptions are a double fault, and STAC is not known",
        ..NONE
    },
    Faults {
        program: "identity",
        wrong: &[
            "cpuid 0x1.0",
            "cpuid 0x7.0",
            "cpuid 0xd.0",
            "cpuid 0xd.1",
            "all zeros: 0x3.0",
            "cpuid 0x80000001.0",
            "x86-64-v3, has",
            "osxsave",
            "pat, ",
            "pred cmd",
            "tsc: msr",
            "cr0:",
            "cr4:",
            "cr3, with pcids",
        ],
        // A host of AMD has it right.
        perhaps: &["spec ctrl"],
        gives_up_before: Some("without cr4.osxsave"),
        why: "CPUID's features are the host's, reserved bits are taken, the TSC cannot be moved, and XGETBV is not known",
    },
    Faults {
        program: "interrupts",
        wrong: &["iret: after 0"],
        why: "an interrupt that IRET lets in comes an instruction late",
        ..NONE
    },
    Faults {
        program: "modes",
        gives_up_before: Some("32-bit compatibility mode, after an interrupt"),
        why: "events are not delivered in compatibility mode",
        ..NONE
    },
    Faults {
        program: "paging",
        wrong: &[
            " 0    0",
            " 0    1",
            " 1    0",
            " 1    1",
            "1 GiB page",
            "pcid 1",
            "cr3 reads back",
            "invpcid",
            "cr4.pcide",
            "cr3, bit 63 with pcids",
            "cr3's low bits",
            "paging off with pcids",
        ],
        gives_up_before: Some("idt entry in a supervisor page"),
        why: "ring 3 gets #UD for the page faults of its instructions; there are no 1 GiB pages, no PCIDs, and no INT in ring 0",
        ..NONE
    },
    Faults {
        program: "segmentation",
        gives_up_before: Some("code limit 0x1f"),
        why: "an instruction behind its segment's limit is not refused but not known",
        ..NONE
    },
    Faults {
        program: "selfmod",
        wrong: &["the bytes before the boundary"],
        why: "a string instruction that faults in its second page has done nothing",
        ..NONE
    },
    Faults {
        program: "sensitive",
        wrong: &[
            "  flags: pushf",
            "  mov from cs 16 0x2b",
            "  push and pop of fs: local 0xf null 0x3",
            "  flags 0x2:",
            "  flags 0x3002:",
            "  flags 0x3202:",
            "  far call: own 0x2b",
            "  far jmp: own 0x2b",
            "  far ret: own 0x2b",
            "  local data: lar",
            "  local code: lar",
            "  in the gdt, not in its old limit: lar",
        ],
        gives_up_before: Some("ring 0, descriptors"),
        why: "ring 3 sees the host's selectors, descriptors and flags, IRET in ring 0 takes reserved flags, and LAR there is not known",
        ..NONE
    },
    Faults {
        program: "strings",
        wrong: &[
            "rep movsw up, destination is missing, across",
            "rep movsd up, destination is missing, across",
            "rep movsq up, destination is missing, across",
            "rep stosw up, destination is missing, across",
            "rep stosd up, destination is missing, across",
            "rep stosq up, destination is missing, across",
            "rep insw up, destination is missing",
            "rep insd up, destination is missing",
            "rep movsb of 5, single steps",
        ],
        why: "an element across a page that is missing is half written, INS does not count, and a single step is two rounds",
        ..NONE
    },
    Faults {
        program: "transfers",
        wrong: &[
            "int 0x30 from ring 3",
            "rsp0 at the top",
            "syscall",
            "sysret",
            "sysenter",
            "sysexit",
            "far call",
            "far return",
            "far jump",
            "iret to ring 3",
        ],
        gives_up_before: Some("null: lar3"),
        why: "ring 3 sees the host's selectors and flags, and far transfers there are #UD",
        ..NONE
    },
];

/// Programs that ask about nothing that a paravirtual KVM does: all their lines are right there.
const OUR_OWN: &[&str] = &["controllers", "processors", "timers"];

/// Lines of the programs that say how long something took.
fn is_timing(line: &str) -> bool {
    line.starts_with("note:") || line.starts_with("bench ")
}

/// The expected lines that did not come, in their order.
fn missing<'a>(expected: &'a str, printed: &str) -> Vec<&'a str> {
    let mut printed: Vec<&str> = printed
        .lines()
        .map(|line| line.trim_end_matches('\r'))
        .filter(|line| !is_timing(line))
        .collect();
    expected
        .lines()
        .filter(|line| match printed.iter().position(|said| said == line) {
            Some(at) => {
                printed.drain(..=at);
                false
            }
            None => true,
        })
        .collect()
}

fn check(program: &Program, printed: &str, ended: &Outcome, faults: &Faults) {
    let name = program.name;
    let expected = program.expected.unwrap();
    let end = faults.gives_up_before.map(|line| {
        expected
            .lines()
            .position(|said| said.starts_with(line))
            .unwrap_or_else(|| panic!("{name} does not say `{line}`"))
    });
    let lines: Vec<&str> = expected.lines().collect();
    let until: String = lines[..end.unwrap_or(lines.len())]
        .iter()
        .flat_map(|line| [line, "\n"])
        .collect();
    let missing = missing(&until, printed);
    let covered = |line: &str, by: &[&str]| by.iter().any(|begin| line.starts_with(begin));
    let lenient = |line: &str| {
        LENIENT
            .iter()
            .any(|&(program, begin)| program == name && line.starts_with(begin))
    };
    for line in &missing {
        assert!(
            covered(line, faults.wrong) || covered(line, faults.perhaps) || lenient(line),
            "{name}: `{line}` is not in\n{printed}"
        );
    }
    for begin in faults.wrong {
        assert!(
            missing.iter().any(|line| line.starts_with(begin)),
            "{name}: `{begin}` is right now: take it from the table"
        );
    }
    match end {
        None => assert!(matches!(ended, Outcome::PoweredOff), "{name}: {ended:?}"),
        Some(_) => assert!(
            matches!(ended, Outcome::Failed(failure) if failure.to_string().contains("emulate")),
            "{name}: {ended:?}\n{printed}"
        ),
    }
    println!(
        "{name}: {} of {} lines{}",
        end.unwrap_or(lines.len()) - missing.len(),
        lines.len(),
        if faults.why.is_empty() {
            String::new()
        } else {
            format!(" ({})", faults.why)
        }
    );
}

#[test]
fn guests_print_on_kvm_what_every_cpu_prints() {
    let host = Host::probe();
    // For the guests' level, which may be less than the host's.
    let level = MachineConfig::default().level;
    if let Err(error) = choose(EngineChoice::Only(EngineKind::Kvm), level, &host) {
        skipped(&error.to_string());
        return;
    }
    for program in trapgate_guests::all() {
        if program.expected.is_none() {
            continue;
        }
        if program.name == "hostile" {
            // Code, page tables and descriptors where no memory is: a hypervisor need not emulate that.
            println!("hostile: not on KVM");
            continue;
        }
        let known = PARAVIRTUAL_FAULTS
            .iter()
            .find(|faults| faults.program == program.name);
        let faults = match (host.kvm.is_hardware(), known) {
            (true, _) => &NONE,
            (false, Some(faults)) => faults,
            // What these ask is our own interrupt controllers there.
            (false, None) if OUR_OWN.contains(&program.name) => &NONE,
            // The chain leaves out what such a KVM lacks, and has tests of its own; the benchmark
            // takes a minute there; others have not been judged.
            (false, None) => {
                println!("{}: not on a paravirtual KVM", program.name);
                continue;
            }
        };
        let serial = Transcript::default();
        let sink = serial.clone();
        let config = MachineConfig {
            kernel: Content::from(program.image),
            engine: "kvm".parse().unwrap(),
            cpus: program.processors(),
            ..MachineConfig::default()
        };
        let hooks = Hooks {
            serial: Box::new(move |bytes| sink.add(bytes)),
            ..Hooks::default()
        };
        let machine = Machine::start(config, hooks).unwrap();
        let outcome = boot::end(&machine, &serial);
        check(program, &serial.text(), outcome, faults);
    }
}
