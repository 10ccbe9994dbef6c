//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use trapgate_api::directory::Name;
use trapgate_vmm::{DiskConfig, EngineChoice, EngineKind, Level};

use crate::{disk_argument, size, status};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "trapgate",
    version,
    about = "Runs virtual machines, with or without virtualization hardware",
    long_about = "Runs virtual machines on any x86-64 Linux host, with or without virtualization hardware, \
                  without root and without a daemon.",
    after_help = EXAMPLES,
    after_long_help = EXAMPLES,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) action: Action,
}

const EXAMPLES: &str = "\
Examples:
  trapgate run                   boots Linux to a shell; the first run fetches a kernel
  trapgate run -- uname -a       runs one command in a fresh Linux, and prints what it prints
  trapgate run builtin           boots a tiny guest that needs no download
  trapgate run --detach          boots Linux in the background; trapgate console attaches to it
  trapgate ps                    lists the machines that run; trapgate top shows what they do
  trapgate snapshot NAME DIR     saves one while it runs; trapgate restore DIR goes on from there
  trapgate doctor                says what this host offers, and what it lacks

`trapgate run --help` says more.";

// Beside the commands' lines: clap drops what is said of this at their arguments.

const STOP: &str = "\
Ask a machine to shut down, and stop it if it doesn't.

Presses the machine's power button, which asks the guest to shut down, and resumes the machine if it is paused. If the \
guest is still there after a while, the machine is stopped as if its power cord were pulled. If you interrupt this \
command before, the guest has been asked but is not forced.";

const CONSOLE: &str = "\
Attach this terminal to a machine's; Ctrl-] detaches, and the machine goes on.

First you see what the guest wrote last (up to 16 KiB), then what it writes, and your keys go to it. Several may be \
attached at once. Without a terminal, standard input goes to the guest, and this ends with the machine.";

const TOP: &str = "\
Show what machines do, second by second; q or Ctrl-C leaves.

Of each machine: the host's processor time that it takes, millions of guest instructions a second where they are counted, \
how often translated code or the guest was left (EXITS), misses of the engine's translation cache that were looked up \
(MISSES) and that translated code filled itself (REFILLS), instructions done by the interpreter for translated code \
(CALLOUTS), code translated or decoded, halts, and how often others called a processor. Below: what the engine spends its \
time on, by instruction. Times and instructions of the translator are known of machines started with \
`trapgate run --stats`, others are ranked by count. With a NAME also all counters of that machine.

If standard input or output is no terminal it prints what one second showed.";

const STATS: &str = "\
When the machine has ended, say on standard error where the host's time went: what the engine did, ranked by the time it \
took, and all counters. Of the translator: translated code, instructions done by the interpreter, misses, translation, \
and so on. It is time by the clock, so what the host gave to others counts. Measuring, and counting every guest instruction, \
slows the translator down by about a tenth.";

const PERF: &str = "\
Tell `perf` which guest code translated code belongs to, in /tmp/perf-PID.map, so that `perf report` shows blocks of the \
guest by address: `kernel ffffffff81000000`, or `user 401000 @9f000` with the guest-physical address, since user programs \
share addresses. The file stays there for `perf report`. Only for the translator. Example: \
`perf record -o data trapgate run --engine jit --perf -- COMMAND; perf report -i data`.";

const RUN: &str = "Boots a machine and connects this terminal to it.\n\n\
        With no IMAGE it boots your distribution's own Linux kernel, fetched once with your package manager, \
        to a shell. With a COMMAND it runs just that: what it prints and its exit status become trapgate's, \
        and its input is trapgate's input.\n\n\
        In an interactive session the key Ctrl-] leaves at once, as if the power cord were pulled.";

const RESTORE: &str = "Lets a machine go on from a snapshot, connected to this terminal or to trapgate's input and output, as \
        `trapgate run` connects one.\n\n\
        Nothing is read but what the guest touches, and nothing is written to the snapshot: any number of machines may go \
        on from it. Its files must stay as they are for as long. Disks are not in it: they are expected where they were \
        (and one that can be written serves one machine at a time), unless `machine.json` in the directory is changed to name others.\n\n\
        For the guest no time has passed. Its clocks go on where they stood, so its time of day is late. The machine's \
        real-time clock is right: `hwclock -s -u` in the guest sets the time of day by it.";

/// What trapgate can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Boot a machine: to a shell, or to run one command
    #[command(long_about = RUN)]
    Run(RunArguments),
    /// List the machines that run
    #[command(after_help = status::CLIENT_HELP)]
    Ps(PsArguments),
    /// Show what machines do, second by second
    #[command(long_about = TOP, after_help = status::CLIENT_HELP)]
    Top(TopArguments),
    /// Stand a machine still, its clock too
    #[command(after_help = status::CLIENT_HELP)]
    Pause(MachineArguments),
    /// Let a paused machine go on
    #[command(after_help = status::CLIENT_HELP)]
    Resume(MachineArguments),
    /// Ask a machine to shut down, and stop it if it doesn't
    #[command(long_about = STOP)]
    Stop(StopArguments),
    /// Save a machine to a directory; it goes on afterwards
    #[command(after_help = status::CLIENT_HELP)]
    Snapshot(SnapshotArguments),
    /// Let a saved machine go on, connected to this terminal
    #[command(long_about = RESTORE)]
    Restore(RestoreArguments),
    /// Attach this terminal to a machine's; Ctrl-] detaches
    #[command(long_about = CONSOLE)]
    Console(ConsoleArguments),
    /// Say what this host offers, and what each missing thing costs
    Doctor(DoctorArguments),
}

/// Arguments of `trapgate run`.
#[derive(Args, Debug)]
#[command(
    after_help = "See `trapgate run --help` for examples and exit statuses.",
    after_long_help = run_help()
)]
pub(crate) struct RunArguments {
    /// What to boot: `linux` (the default), `builtin`, or a kernel's file
    #[arg(
        value_name = "IMAGE",
        long_help = "What to boot:\n  \
            linux    your distribution's kernel with a small userland (the default)\n  \
            builtin  a tiny guest that comes with trapgate: it says hello, computes, and powers off\n  \
            FILE     a kernel, as with --kernel"
    )]
    pub(crate) image: Option<OsString>,

    /// Boot this kernel: bzImage (vmlinuz), ELF (vmlinux), or multiboot
    #[arg(
        long,
        value_name = "FILE",
        long_help = "Boot this kernel: a Linux bzImage (vmlinuz), an ELF file with a PVH note such as vmlinux, \
            or a multiboot 1 kernel. Its console is the serial port, ttyS0."
    )]
    pub(crate) kernel: Option<PathBuf>,

    /// Give the kernel this initial RAM disk
    #[arg(
        long,
        value_name = "FILE",
        long_help = "Give the kernel this initial RAM disk (initramfs). Without --kernel it takes the place of \
            trapgate's own beside the stock kernel; the console is then the serial port, ttyS0."
    )]
    pub(crate) initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        long_help = "The kernel's command line. With the stock kernel it is added to trapgate's own, and the last \
            word on a matter wins. With a kernel of yours it is all that the kernel gets; without it a Linux kernel \
            gets `console=ttyS0 panic=-1`."
    )]
    pub(crate) cmdline: Option<String>,

    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: u32,

    /// Memory of the guest, such as 512M or 2G
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "512M",
        value_parser = size::parse,
        long_help = "Memory of the guest, such as 512M or 2G (units are powers of 1024). \
            What the guest does not touch costs nothing."
    )]
    pub(crate) memory: u64,

    /// Attach a disk: a raw image or a block device; `,ro` makes it read-only
    #[arg(
        long = "disk",
        value_name = "path=FILE[,ro]",
        value_parser = DiskParser,
        long_help = "Attach a disk: a raw image or a block device. With `,ro` the guest can't write to it. \
            May be repeated; the guest sees /dev/vda, /dev/vdb, and so on. A comma in a name is written twice."
    )]
    pub(crate) disks: Vec<DiskConfig>,

    /// What runs the guest's instructions
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = Engine::Auto)]
    pub(crate) engine: Engine,

    /// Instructions of the guest's processors; without it the most that the host has
    #[arg(
        long,
        value_enum,
        value_name = "LEVEL",
        long_help = "Instructions of the guest's processors: a level of the x86-64 psABI. Without it they have the highest \
            that the host has. A machine that is to go on from its snapshot on another host must not have more than that \
            host."
    )]
    pub(crate) cpu: Option<Cpu>,

    /// Give the machine a name; without one it is called vm1, vm2, and so on
    #[arg(
        long,
        value_name = "NAME",
        long_help = "Give the machine a name, by which `trapgate ps`, `console`, `stop` and the others know it: letters, \
            digits, `-`, `_` and `.`. No two machines of yours that run have the same. Without it the machine gets the \
            first of vm1, vm2, and so on that is free."
    )]
    pub(crate) name: Option<Name>,

    /// Run the machine in the background, and print its name
    #[arg(
        long,
        short,
        conflicts_with = "verbose",
        long_help = "Run the machine in the background: print its name and end as soon as it runs. Its terminal waits for \
            `trapgate console NAME`. What trapgate has to say of it later is in the file NAME.log beside its control \
            socket, in $XDG_RUNTIME_DIR/trapgate or else in trapgate-UID in the directory for temporary files; \
            the file goes away if all went well."
    )]
    pub(crate) detach: bool,

    /// Print nothing of trapgate's own but errors
    #[arg(long, short)]
    pub(crate) quiet: bool,

    /// Show what the guest's kernel says, on standard error
    #[arg(long, short, conflicts_with = "quiet")]
    pub(crate) verbose: bool,

    /// When the machine has ended, say where the host's time went
    #[arg(long, long_help = STATS)]
    pub(crate) stats: bool,

    /// Tell `perf` which guest code translated code belongs to
    #[arg(long, long_help = PERF)]
    pub(crate) perf: bool,

    /// Run this in the guest in place of a shell
    #[arg(
        last = true,
        value_name = "COMMAND",
        long_help = "Run this in the guest in place of a shell, and end with its exit status. It is a program and \
            its arguments; for pipes and variables use a shell: `-- sh -c 'ls | wc -l'`."
    )]
    pub(crate) command: Vec<OsString>,
}

fn run_help() -> String {
    format!(
        "\
Examples:
  trapgate run                                         a shell in a fresh Linux; poweroff or Ctrl-] ends it
  trapgate run -- sh -c 'cat /proc/cpuinfo; exit 7'    prints it, and exits 7
  echo hello | trapgate run -- wc -c                   input goes to the command
  trapgate run --disk path=disk.img                    /dev/vda in the guest is disk.img
  trapgate run --cpus 2 --memory 1G                    a larger machine
  trapgate run --kernel bzImage --initrd initrd.img    a kernel of your own, on the serial port

{}",
        status::HELP
    )
}

/// Arguments of `trapgate ps`.
#[derive(Args, Debug)]
pub(crate) struct PsArguments {
    /// Print JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `trapgate top`.
#[derive(Args, Debug)]
pub(crate) struct TopArguments {
    /// Show this machine alone, and all that it counts
    pub(crate) name: Option<Name>,

    /// Look for one second, print what it showed, and end
    #[arg(long)]
    pub(crate) once: bool,

    /// The same as JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// A machine that runs.
#[derive(Args, Debug)]
pub(crate) struct MachineArguments {
    /// Name of the machine, see `trapgate ps`
    pub(crate) name: Name,
}

/// Arguments of `trapgate stop`.
#[derive(Args, Debug)]
#[command(after_help = status::CLIENT_HELP)]
pub(crate) struct StopArguments {
    /// Name of the machine, see `trapgate ps`
    pub(crate) name: Name,

    /// Pull the power cord at once
    #[arg(long)]
    pub(crate) now: bool,

    /// How long the guest may take to shut down
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 30,
        conflicts_with = "now",
        value_parser = clap::value_parser!(u32).range(..=86_400)
    )]
    pub(crate) grace: u32,
}

/// Arguments of `trapgate snapshot`.
#[derive(Args, Debug)]
pub(crate) struct SnapshotArguments {
    /// Name of the machine, see `trapgate ps`
    pub(crate) name: Name,

    /// Directory to make; there must be nothing of this name
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

/// Arguments of `trapgate restore`.
#[derive(Args, Debug)]
#[command(
    after_help = RESTORE_EXAMPLES,
    after_long_help = restore_help()
)]
pub(crate) struct RestoreArguments {
    /// The directory that `trapgate snapshot` made
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,

    /// What runs the guest's instructions; it need not be what did when the snapshot was taken
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = Engine::Auto)]
    pub(crate) engine: Engine,

    /// Read all of the saved memory first, and compare it with its checksums
    #[arg(long)]
    pub(crate) check: bool,

    /// When the machine has ended, say where the host's time went
    #[arg(long, long_help = STATS)]
    pub(crate) stats: bool,

    /// Tell `perf` which guest code translated code belongs to
    #[arg(long, long_help = PERF)]
    pub(crate) perf: bool,

    /// Name of the machine, for `trapgate ps` and the like
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<Name>,

    /// Let it run in the background, and print its name
    #[arg(long, short)]
    pub(crate) detach: bool,

    /// Print nothing of trapgate's own but errors
    #[arg(long, short)]
    pub(crate) quiet: bool,

    /// Show what the guest's kernel says, on standard error
    #[arg(long, short, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
}

const RESTORE_EXAMPLES: &str = "\
Examples:
  trapgate run --detach --name a    a shell in the background
  trapgate snapshot a saved         saves it; it goes on
  trapgate restore saved            the same shell once more, here";

fn restore_help() -> String {
    format!("{RESTORE_EXAMPLES}\n\n{}", status::HELP)
}

/// Arguments of `trapgate console`.
#[derive(Args, Debug)]
#[command(after_help = status::CLIENT_HELP)]
pub(crate) struct ConsoleArguments {
    /// Name of the machine, see `trapgate ps`
    pub(crate) name: Name,
}

/// Arguments of `trapgate doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorArguments {
    /// Print JSON, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// The fastest one that this host and this version have
    Auto,
    /// The interpreter: runs everywhere
    Interp,
    /// The CPU's virtualization hardware, by way of /dev/kvm
    Kvm,
    /// The binary translator
    Jit,
    /// Translator and interpreter, compared after every block: slow, to find their faults
    Lockstep,
}

impl Engine {
    /// In the words of the machine's configuration.
    pub(crate) fn choice(self) -> EngineChoice {
        match self {
            Self::Auto => EngineChoice::Auto,
            Self::Interp => EngineChoice::Only(EngineKind::Interp),
            Self::Kvm => EngineChoice::Only(EngineKind::Kvm),
            Self::Jit => EngineChoice::Only(EngineKind::Jit),
            Self::Lockstep => EngineChoice::Only(EngineKind::Lockstep),
        }
    }
}

/// Instructions of the guest's processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cpu {
    /// Up to SSE4.2, POPCNT, CMPXCHG16B
    V2,
    /// v2 with AVX2, BMI, FMA, F16C, LZCNT, MOVBE
    V3,
}

impl Cpu {
    /// In the words of the machine's configuration.
    pub(crate) fn level(self) -> Level {
        match self {
            Self::V2 => Level::V2,
            Self::V3 => Level::V3,
        }
    }
}

/// Makes [`disk_argument::parse`] known to clap, which has no short way for file names that need not be text.
#[derive(Clone)]
struct DiskParser;

impl TypedValueParser for DiskParser {
    type Value = DiskConfig;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<DiskConfig, clap::Error> {
        OsStringValueParser::new()
            .try_map(|text| disk_argument::parse(&text))
            .parse_ref(command, argument, value)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn run(arguments: &[&str]) -> RunArguments {
        let all = ["trapgate", "run"].iter().chain(arguments);
        match Arguments::try_parse_from(all).unwrap().action {
            Action::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    fn refused(arguments: &[&str]) -> clap::Error {
        let all = ["trapgate"].iter().chain(arguments);
        Arguments::try_parse_from(all).unwrap_err()
    }

    #[test]
    fn description_of_the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn defaults_make_a_small_machine() {
        let run = run(&[]);
        assert_eq!((run.cpus, run.memory), (1, 512 << 20));
        assert_eq!(run.engine, Engine::Auto);
        assert!(run.image.is_none() && run.command.is_empty() && run.disks.is_empty());
    }

    #[test]
    fn command_is_all_that_follows_two_hyphens() {
        let run = run(&["--memory", "1G", "--", "ls", "-l", "--memory", "--", "x"]);
        assert_eq!(run.command, ["ls", "-l", "--memory", "--", "x"]);
        assert_eq!(run.memory, 1 << 30);
        assert!(run.image.is_none());
    }

    #[test]
    fn image_and_command_are_told_apart() {
        let run = run(&["builtin", "--", "ls"]);
        assert_eq!(run.image.as_deref(), Some(OsStr::new("builtin")));
        assert_eq!(run.command, ["ls"]);
    }

    #[test]
    fn disks_keep_their_order() {
        let run = run(&["--disk", "path=b,ro", "--disk", "a"]);
        let disks: Vec<_> = run
            .disks
            .iter()
            .map(|d| (d.path.to_str().unwrap(), d.read_only))
            .collect();
        assert_eq!(disks, [("b", true), ("a", false)]);
    }

    #[test]
    fn kernel_command_line_may_start_with_a_hyphen() {
        assert_eq!(run(&["--cmdline", "-- init"]).cmdline.unwrap(), "-- init");
    }

    #[test]
    fn engines_are_named_as_the_machine_names_them() {
        for engine in Engine::value_variants() {
            let name = engine.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(engine.choice(), name.parse().unwrap(), "{name}");
        }
    }

    #[test]
    fn wrong_values_are_refused_with_their_reason() {
        for (arguments, complaint) in [
            (&["run", "--memory", "512"][..], "did you mean 512M"),
            (&["run", "--memory", "lots"], "number"),
            (&["run", "--cpus", "0"], "0"),
            (&["run", "--cpus", "two"], "two"),
            (&["run", "--disk", "a,rw"], "`rw`"),
            (&["run", "--engine", "tcg"], "interp"),
            (&["run", "--quiet", "--verbose"], "cannot be used with"),
        ] {
            let error = refused(arguments).to_string();
            assert!(error.contains(complaint), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn misspelt_flags_and_commands_get_a_suggestion() {
        for (arguments, suggestion) in [
            (&["run", "--memroy", "1G"][..], "--memory"),
            (&["run", "--dsk", "a"], "--disk"),
            (&["docter"], "doctor"),
        ] {
            let error = refused(arguments).to_string();
            assert!(error.contains(suggestion), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn machines_that_run_are_named_first() {
        for command in ["pause", "resume", "stop", "console"] {
            Arguments::try_parse_from(["trapgate", command, "web-1"]).unwrap();
            assert!(
                refused(&[command, "../x"])
                    .to_string()
                    .contains("cannot be")
            );
            assert!(refused(&[command]).to_string().contains("<NAME>"));
        }
        Arguments::try_parse_from(["trapgate", "snapshot", "web", "dir"]).unwrap();
        let stop = refused(&["stop", "x", "--now", "--grace", "1"]);
        assert!(stop.to_string().contains("cannot be used with"), "{stop}");
    }

    #[test]
    fn help_of_a_command_explains_what_its_line_does_not() {
        for (command, part) in [
            ("run", "its exit status become trapgate's"),
            ("stop", "power cord"),
            ("restore", "no time has passed"),
            ("console", "16 KiB"),
        ] {
            let text = refused(&[command, "--help"]).to_string();
            assert!(
                text.contains(part) && text.contains("Exit status"),
                "{text}"
            );
        }
    }

    #[test]
    fn machine_in_the_background_shows_no_kernel() {
        assert!(run(&["-dq", "--name", "x"]).detach);
        let error = refused(&["run", "--detach", "--verbose"]).to_string();
        assert!(error.contains("cannot be used with"), "{error}");
    }

    #[test]
    fn help_has_examples_and_statuses() {
        let error = refused(&["run", "--help"]);
        assert_eq!(error.kind(), ErrorKind::DisplayHelp);
        let text = error.to_string();
        for part in ["Examples:", "Exit status:", "Ctrl-]", "--disk", "123"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
