//! Prepares the stock image and prints where its files are. With arguments it also writes `session.cpio` next to the
//! working directory, for a session that runs them: append it to the initramfs to try the image under another VMM.
//!
//! `cargo run -p trapgate-image --example stock -- [--terminal] [COMMAND…]`

use std::time::Instant;
use trapgate_image::{CacheDir, ImageError, Phase, Session, session_archive, stock};

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}\n  fix: {}", error.fix());
        std::process::exit(1);
    }
}

fn run() -> Result<(), ImageError> {
    let start = Instant::now();
    let mut last = None;
    let image = stock(
        &CacheDir::from_env()?,
        &mut |phase: Phase, done: u64, total: Option<u64>| {
            if last != Some(phase) {
                eprintln!(
                    "{:6.2} s  {phase} ({done} of {total:?})",
                    start.elapsed().as_secs_f64()
                );
                last = Some(phase);
            }
        },
    )?;
    eprintln!(
        "{:6.3} s  done: {}, {}",
        start.elapsed().as_secs_f64(),
        image.kernel_version,
        image.origin
    );
    println!("{}\n{}", image.kernel.display(), image.initramfs.display());

    let mut command: Vec<_> = std::env::args_os().skip(1).collect();
    let terminal = command.first().is_some_and(|a| a == "--terminal");
    if terminal {
        command.remove(0);
    }
    let env = vec![
        ("TERM".into(), "xterm".into()),
        ("COLUMNS".into(), "100".into()),
        ("LINES".into(), "30".into()),
    ];
    let archive = session_archive(&Session {
        command,
        env,
        terminal,
    })?;
    std::fs::write("session.cpio", archive).map_err(|source| ImageError::Cache {
        action: "cannot write",
        path: "session.cpio".into(),
        source,
    })
}
