//! Workloads that are programs of busybox.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::random::{Random, mix_bytes};
use crate::{NotRun, Setting, Work};

/// A shell's script that counts, compares and cuts strings; starts nothing.
const BUILTINS: &str = "
i=0 s=1 t=
while [ $i -lt $N ]; do
    s=$(((s * 31 + i) % 65521))
    case $s in
    *7) t=${s%7} ;;
    1*) t=${s#1}x ;;
    *) t=$s ;;
    esac
    [ \"$t\" = 12x ] && echo found $i
    i=$((i + 1))
done
echo $s $t
";

const FORK_EXEC: &str = "
i=0
while [ $i -lt $N ]; do
    $BUSYBOX true && i=$((i + 1))
done
echo $i
";

const PIPELINE: &str = "
$BUSYBOX seq $N | $BUSYBOX sed s/7/x/ | $BUSYBOX grep x | $BUSYBOX tr x a | $BUSYBOX cut -c1-4 | $BUSYBOX sort | $BUSYBOX uniq -c
";

/// A shell of busybox's with a script that reads its size from `$N`.
fn script(setting: &Setting, text: &'static str, size: u64) -> Work {
    let size = (size / setting.scale).to_string();
    let busybox = setting.busybox.clone();
    Box::new(move || {
        let mut command = Command::new(&busybox);
        command
            .args(["sh", "-c", text])
            .env_clear()
            .env("N", &size)
            .env("BUSYBOX", &busybox);
        output(&mut command)
    })
}

/// Runs a program that must end well; the check is that of what it prints.
fn output(command: &mut Command) -> Result<u64, String> {
    let ended = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start {:?}: {error}", command.get_program()))?;
    if !ended.status.success() {
        let error = String::from_utf8_lossy(&ended.stderr);
        return Err(format!("{}: {}", ended.status, error.trim()));
    }
    Ok(mix_bytes(&ended.stdout))
}

pub(crate) fn shell(setting: &Setting) -> Work {
    script(setting, BUILTINS, 50_000)
}

pub(crate) fn fork_exec(setting: &Setting) -> Work {
    script(setting, FORK_EXEC, 500)
}

pub(crate) fn pipeline(setting: &Setting) -> Work {
    script(setting, PIPELINE, 200_000)
}

pub(crate) fn dd(setting: &Setting) -> Work {
    let count = 500_000 / setting.scale;
    let busybox = setting.busybox.clone();
    Box::new(move || {
        let ended = Command::new(&busybox)
            .args(["dd", "if=/dev/zero", "of=/dev/null", "bs=1"])
            .arg(format!("count={count}"))
            .output()
            .map_err(|error| format!("cannot start dd: {error}"))?;
        let said = String::from_utf8_lossy(&ended.stderr);
        if said.contains(&format!("{count}+0 records out")) {
            Ok(count)
        } else {
            Err(format!("dd said {said:?}"))
        }
    })
}

/// Words that repeat as those of a text do.
fn text(size: usize, random: &mut Random) -> Vec<u8> {
    let words: Vec<Vec<u8>> = (0..2000)
        .map(|_| {
            let length = 2 + random.next() % 9;
            (0..length)
                .map(|_| b'a' + (random.next() % 26) as u8)
                .collect()
        })
        .collect();
    let mut text = Vec::with_capacity(size + 16);
    while text.len() < size {
        // The product favours the first words.
        let (a, b) = (random.next() % 2000, random.next() % 2000);
        text.extend_from_slice(&words[(a * b / 2000) as usize]);
        text.push(if a % 11 == 0 { b'\n' } else { b' ' });
    }
    text.truncate(size);
    text
}

fn failed(what: &str, path: &Path) -> impl Fn(std::io::Error) -> String {
    let what = format!("cannot {what} {}", path.display());
    move |error| format!("{what}: {error}")
}

/// Files of up to 16 KiB in so many directories, with their paths.
fn tree(directories: u64) -> impl Iterator<Item = (String, Vec<u8>)> {
    let mut random = Random(7);
    let all = text(64 << 10, &mut random);
    (0..directories * 64).map(move |file| {
        let from = (random.next() % (48 << 10)) as usize;
        let size = (random.next() % (16 << 10)) as usize;
        let path = format!("tree/{}/of/this/tree/file-{}", file / 64, file % 64);
        (path, all[from..from + size].to_vec())
    })
}

/// A file as it stands in an archive (POSIX.1-1988, ustar), with owner and times that are the same everywhere.
fn member(path: &str, content: &[u8]) -> Vec<u8> {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644\x000000000\x000000000");
    put(124, &format!("{:011o}\x0000000000000", content.len()));
    // While it is summed, the sum is spaces.
    put(148, "        0");
    put(257, "ustar\x0000");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut member = [&block[..], content].concat();
    member.resize(member.len().next_multiple_of(512), 0);
    member
}

pub(crate) fn gzip(setting: &Setting) -> Result<Work, NotRun> {
    let path = setting.work.join("tree.tar");
    let mut archive = Vec::new();
    for (name, content) in tree(8 / setting.scale.min(8)) {
        archive.extend(member(&name, &content));
    }
    archive.resize(archive.len() + 1024, 0);
    fs::write(&path, archive).map_err(failed("write", &path))?;
    let busybox = setting.busybox.clone();
    let packed = setting.work.join("tree.tar.gz");
    Ok(Box::new(move || {
        let open = File::open(&path).map_err(failed("read", &path))?;
        let create = File::create(&packed).map_err(failed("write", &packed))?;
        let status = Command::new(&busybox)
            .arg("gzip")
            .stdin(open)
            .stdout(create)
            .status()
            .map_err(|error| format!("cannot start gzip: {error}"))?;
        if !status.success() {
            return Err(format!("gzip: {status}"));
        }
        let bytes = fs::read(&packed).map_err(failed("read", &packed))?;
        // Without the header, which has the time in it (RFC 1952, 2.3).
        Ok(mix_bytes(bytes.get(10..).unwrap_or_default()))
    }))
}

pub(crate) fn tar(setting: &Setting) -> Result<Work, NotRun> {
    for (name, content) in tree(48 / setting.scale.min(48)) {
        let path = setting.work.join(name);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed("make", directory))?;
        }
        fs::write(&path, content).map_err(failed("write", &path))?;
    }
    let (work, busybox) = (setting.work.clone(), setting.busybox.clone());
    Ok(Box::new(move || {
        let copy = work.join("copy");
        let mut command = Command::new(&busybox);
        command
            .args([
                "sh",
                "-c",
                "mkdir copy && $BUSYBOX tar -c -f all.tar tree && $BUSYBOX tar -x -f all.tar -C copy \
                 && $BUSYBOX rm -r copy && $BUSYBOX tar -t -f all.tar | $BUSYBOX sort",
            ])
            .current_dir(&work)
            .env_clear()
            .env("BUSYBOX", &busybox);
        let check = output(&mut command)?;
        if copy.exists() {
            return Err("the copy was not removed".to_owned());
        }
        Ok(check)
    }))
}
