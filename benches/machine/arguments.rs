//! The benchmark's command line.

const HELP: &str = "\
Measures the figures of SPECIFICATION.md on this machine.

Usage: cargo bench -p trapgate-benches -- [OPTIONS]

  --only NAME[,NAME…]  only these: loops, boot, untouched, restore, transfer, clock
                         loops      guest instructions a second, beside the same code on the host
                         boot       the stock kernel from start to init; the VMM's memory at the shell
                         untouched  what RAM costs that a guest has not touched
                         restore    a guest of 1 GiB, 100 MiB of it touched: saved, and gone on from
                         transfer   disk and console
                         clock      the guest's clock against the host's, after 2 minutes
  --long               everything, `clock` too, which otherwise has to be asked for
  --runs N             runs of each, of which the median counts (3)
  --json               print JSON in place of a table
  --help               print this

Everything but `loops`, `untouched` and `restore` boots the stock kernel, which is fetched the first time.
";

/// Figures that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Loops,
    Boot,
    Untouched,
    Restore,
    Transfer,
    Clock,
}

impl Group {
    const ALL: [Self; 6] = [
        Self::Loops,
        Self::Boot,
        Self::Untouched,
        Self::Restore,
        Self::Transfer,
        Self::Clock,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loops => "loops",
            Self::Boot => "boot",
            Self::Untouched => "untouched",
            Self::Restore => "restore",
            Self::Transfer => "transfer",
            Self::Clock => "clock",
        }
    }

    /// Whether it boots the stock kernel.
    pub(crate) fn needs_linux(self) -> bool {
        matches!(self, Self::Boot | Self::Transfer | Self::Clock)
    }
}

/// What is to be measured, and how it is printed.
pub(crate) struct Arguments {
    only: Vec<Group>,
    long: bool,
    pub(crate) runs: usize,
    pub(crate) json: bool,
}

/// What the command line asks for.
pub(crate) enum Action {
    Measure(Arguments),
    /// This process is one that another started: see [`crate::child`].
    Child(String),
    Say(String),
}

impl Arguments {
    /// # Errors
    /// What is wrong with the arguments.
    pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Action, String> {
        let mut arguments = Self {
            only: Vec::new(),
            long: false,
            runs: 3,
            json: false,
        };
        let mut asked = false;
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("`{word}` needs a value"));
            match &word[..] {
                // Cargo says this to every benchmark, and not to what is run as a test.
                "--bench" => asked = true,
                crate::child::OPTION => return Ok(Action::Child(value()?)),
                "--help" | "-h" => return Ok(Action::Say(HELP.to_owned())),
                "--json" => arguments.json = true,
                "--long" => arguments.long = true,
                "--runs" => {
                    let runs = value()?;
                    arguments.runs = runs
                        .parse()
                        .ok()
                        .filter(|runs| (1..=100).contains(runs))
                        .ok_or(format!("`{runs}` is not a number from 1 to 100"))?;
                }
                "--only" => {
                    for name in value()?.split(',') {
                        let group = Group::ALL.into_iter().find(|group| group.name() == name);
                        arguments
                            .only
                            .push(group.ok_or(format!("there is no figure called `{name}`"))?);
                    }
                }
                _ => return Err(format!("unknown argument `{word}`")),
            }
        }
        if !asked {
            return Ok(Action::Say(
                "skipped: benchmarks run under `cargo bench` only\n".to_owned(),
            ));
        }
        Ok(Action::Measure(arguments))
    }

    pub(crate) fn groups(&self) -> impl Iterator<Item = Group> + '_ {
        Group::ALL.into_iter().filter(|group| {
            if self.only.is_empty() {
                self.long || *group != Group::Clock
            } else {
                self.only.contains(group)
            }
        })
    }
}
