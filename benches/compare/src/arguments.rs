//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use trapgate_vmm::EngineChoice;

use crate::catalog::{CATALOG, Entry};

/// The measure that is not a program: from the monitor's start to the guest's init.
pub(crate) const BOOT: &str = "boot";

/// Compares trapgate with the host and with QEMU's TCG.
#[derive(Debug, Parser)]
#[command(name = "trapgate-compare", after_help = workloads_help())]
pub(crate) struct Arguments {
    /// Only these workloads
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_name)]
    pub(crate) only: Vec<String>,
    /// How often everything is run; medians count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// The engine that trapgate uses: auto, kvm, jit or interp
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = parse_engine)]
    pub(crate) engine: String,
    /// What trapgate's guest has of x86-64: v2 or v3; without it what trapgate gives by itself
    #[arg(long, value_name = "LEVEL", value_parser = ["v2", "v3"])]
    pub(crate) level: Option<String>,
    /// Leave QEMU out
    #[arg(long)]
    pub(crate) no_qemu: bool,
    /// Leave trapgate out, to look at the others alone
    #[arg(long)]
    pub(crate) no_trapgate: bool,
    /// QEMU's program
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    pub(crate) qemu: PathBuf,
    /// QEMU's model of a processor
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub(crate) qemu_cpu: String,
    /// Everything eight times smaller, once: a look, not a figure
    #[arg(long)]
    pub(crate) quick: bool,
    /// Seconds that one workload or a boot may take
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) limit: u32,
    /// Write all figures to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the table to this file, as Markdown
    #[arg(long, value_name = "FILE")]
    pub(crate) markdown: Option<PathBuf>,
    /// Draw a bar chart to this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

impl Arguments {
    /// The workloads that are asked for.
    pub(crate) fn workloads(&self) -> impl Iterator<Item = &'static Entry> + '_ {
        CATALOG
            .iter()
            .filter(|entry| self.only.is_empty() || self.only.iter().any(|name| name == entry.name))
    }

    /// Whether the time to init is asked for.
    pub(crate) fn boot(&self) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == BOOT)
    }

    /// By which sizes are divided.
    pub(crate) fn scale(&self) -> u32 {
        if self.quick { 8 } else { 1 }
    }

    /// How often everything is run.
    pub(crate) fn rounds(&self) -> u32 {
        if self.quick { 1 } else { self.rounds }
    }

    /// What one workload or a boot may take.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.limit.into())
    }
}

fn parse_name(name: &str) -> Result<String, String> {
    if name == BOOT || CATALOG.iter().any(|entry| entry.name == name) {
        Ok(name.to_owned())
    } else {
        Err("there is no such workload; `--help` lists them".to_owned())
    }
}

fn parse_engine(name: &str) -> Result<String, String> {
    match name.parse::<EngineChoice>() {
        Ok(_) => Ok(name.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn workloads_help() -> String {
    let mut text = "Workloads:\n".to_owned();
    for entry in CATALOG {
        text += &format!(
            "  {:11} {:8} {}\n",
            entry.name,
            entry.kind.name(),
            entry.what
        );
    }
    text += &format!("  {BOOT:11} {:8} from start to init\n", "");
    text += "\nThe guest's kernel is fetched the first time, as `trapgate run` does. QEMU is not: where it is not\n\
             installed, trapgate is compared with the host alone.";
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("compare").chain(words.iter().copied()))
    }

    #[test]
    fn command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn without_options_everything_is_run() {
        let arguments = parse(&[]).unwrap();
        assert_eq!(arguments.workloads().count(), CATALOG.len());
        assert!(arguments.boot());
    }

    #[test]
    fn only_what_is_named_is_run() {
        let arguments = parse(&["--only", "crc,boot", "--only", "tar"]).unwrap();
        let names: Vec<&str> = arguments.workloads().map(|entry| entry.name).collect();
        assert_eq!(names, ["crc", "tar"]);
        assert!(arguments.boot());
        assert!(!parse(&["--only", "crc"]).unwrap().boot());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for words in [
            ["--only", "nothing"],
            ["--engine", "tcg"],
            ["--rounds", "0"],
            ["--limit", "-1"],
        ] {
            assert!(parse(&words).is_err(), "{words:?}");
        }
    }
}
