//! What machines tell of what they do: `--stats`, `--perf`, and `trapgate top`.

use std::time::Duration;

use serde_json::Value;

use crate::harness::{finish, finish_with, start, stdout_of, trapgate};
use crate::machines::Place;

/// The words of a line.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn stats_say_at_the_end_where_the_time_went() {
    let line = ["run", "-q", "--engine", "jit", "--stats", "builtin"];
    let run = finish_with(trapgate(&line), b"primes 20000\n");
    assert_eq!(run.code(), Some(0), "{run:?}");
    assert!(run.out().contains("2262") && !run.out().contains("statistics"));

    let said = &run.stderr;
    assert!(said.starts_with("trapgate: statistics of "), "{said}");
    let row = |name: &[&str]| {
        let found = said.lines().find(|line| words(line).starts_with(name));
        words(found.unwrap_or_else(|| panic!("{name:?} in {said}"))).len() - name.len()
    };
    // Count, time of each, time of all, share and its sign.
    for cost in [
        &["translated", "code"][..],
        &["translation"],
        &["call", "out"],
    ] {
        assert!(row(cost) >= 5, "{said}");
    }
    // Value and rate.
    for counter in [&["instructions"][..], &["direct", "exits", "linked"]] {
        assert_eq!(row(counter), 2, "{said}");
    }
}

#[test]
fn stats_of_the_interpreter_are_its_counters() {
    let line = ["run", "-q", "--engine", "interp", "--stats", "builtin"];
    let run = finish(trapgate(&line));
    assert_eq!(run.code(), Some(0), "{run:?}");
    assert!(run.stderr.contains("blocks decoded"), "{run:?}");
    assert!(!run.stderr.contains("translated"), "{run:?}");
}

#[test]
fn perf_finds_names_for_translated_code() {
    // Given a guest that has started
    let mut child = start(trapgate(&[
        "run", "-q", "--engine", "jit", "--perf", "builtin",
    ]));
    let path = format!("/tmp/perf-{}.map", child.pid().as_raw_nonzero());
    stdout_of(&mut child).expect("built-in guest");
    child.wait();

    let map = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut last = 0;
    let mut kernel = 0;
    for line in map.lines() {
        let fields: Vec<&str> = line.splitn(3, ' ').collect();
        let [start, size, name] = fields[..] else {
            panic!("{line}");
        };
        let start = u64::from_str_radix(start, 16).unwrap();
        let size = u64::from_str_radix(size, 16).unwrap();
        assert!(start >= last && size > 0, "pieces lie in order: {line}");
        last = start + size;
        kernel += u64::from(name.starts_with("kernel "));
    }
    assert!(map.contains(" stub enter\n") && kernel > 10, "{map}");
}

#[test]
fn engine_without_translated_code_has_nothing_for_perf() {
    let run = finish(trapgate(&[
        "run", "--engine", "interp", "--perf", "builtin",
    ]));
    assert_eq!(run.code(), Some(120), "{run:?}");
    assert!(run.stderr.contains("--engine jit"), "{run:?}");
}

#[test]
fn top_tells_what_each_machine_does() {
    let place = Place::new();
    assert_eq!(place.done("top").out(), "No machine runs.\n");
    place.done("run --detach -q --name a --engine jit --stats builtin");
    place.done("run --detach -q --name b --engine interp builtin");

    let shown = place.done("top --once").out();
    let mut lines = shown.lines();
    assert!(lines.next().unwrap().starts_with("NAME"), "{shown}");
    for name in [["a", "running", "jit"], ["b", "running", "interp"]] {
        assert!(words(lines.next().unwrap()).starts_with(&name), "{shown}");
    }

    let json: Value = serde_json::from_slice(&place.done("top --json a").stdout).unwrap();
    let [machine] = &json.as_array().unwrap()[..] else {
        panic!("{json}");
    };
    assert_eq!(
        (&machine["name"], &machine["engine"]),
        (&"a".into(), &"jit".into())
    );
    assert!(machine["seconds"].as_f64().unwrap() >= 1.0);
    // Translations, links, misses by kind, calls of the interpreter, invalidations.
    for total in [
        "translations",
        "direct_exits",
        "direct_exits_linked",
        "indirect_lookups",
        "tlb_refills",
        "tlb_misses",
        "device_accesses",
        "page_crossings",
        "traced_writes",
        "call_outs",
        "units_dropped",
        "code_flushes",
    ] {
        assert!(machine["per_second"][total].is_f64(), "{total}: {json}");
    }
    let chained = machine["ratios"]["direct_exits_linked"].as_f64().unwrap();
    assert!(chained > 0.0, "{json}");
    assert!(
        machine["levels"]["code_bytes"].as_u64().unwrap() > 0,
        "{json}"
    );

    let shown = place.done("top --once a").out();
    for line in ["of the direct exits, are linked", "units dropped"] {
        assert!(shown.contains(&format!("\n{line} ")), "{shown}");
    }

    let missing = place.finish("top nobody");
    assert_eq!(missing.code(), Some(120), "{missing:?}");
    assert!(missing.stderr.contains("nobody"), "{missing:?}");
}

#[test]
fn top_has_a_screen_of_its_own_and_gives_the_terminal_back() {
    let place = Place::new();
    place.done("run --detach -q --name a builtin");
    for leave in ["q", "\u{3}"] {
        let mut top = place.on_terminal("top a");
        top.screen.expect("\u{1b}[?1049h");
        top.screen.expect("NAME");
        // Once more a second later.
        top.screen.expect("NAME");
        top.press(leave);
        top.screen.expect("\u{1b}[?1049l");
        assert_eq!(top.end(), Some(0));
    }
}

#[test]
fn top_ends_with_its_machine() {
    let place = Place::new();
    place.done("run --detach -q --name a builtin");
    let mut top = place.on_terminal("top a");
    top.screen.expect("NAME");
    std::thread::sleep(Duration::from_millis(100));
    place.done("stop --now a");
    top.screen.expect("`a` has ended");
    assert_eq!(top.end(), Some(0));
}
