//! `--stats`: where the host's time went, when a machine has ended.

use std::fmt::Write as _;
use std::time::Duration;

use trapgate_api::data::{Cost, Counters, Kind, Unit};

/// Lines of the ranking.
const MOST: usize = 40;
/// The cost within whose time estimated ones lie.
const WHOLE: &str = "translated_code";

/// Rows of text in columns that stand under each other. The first `left` columns are aligned to the left, the others to
/// the right.
pub(crate) fn columns(rows: &[Vec<String>], left: usize) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let _ = if column < left {
                write!(line, "{gap}{cell:width$}")
            } else {
                write!(line, "{gap}{cell:>width$}")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A number with its thousands set apart.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A name as people write it.
pub(crate) fn words(name: &str) -> String {
    name.replace('_', " ")
}

/// The costs, the most expensive first, with the estimated ones taken out of that within which they lie.
pub(crate) fn ranked(costs: &[Cost]) -> Vec<Cost> {
    let estimated: u64 = costs
        .iter()
        .filter(|cost| cost.estimated)
        .filter_map(|cost| cost.nanoseconds)
        .sum();
    let mut ranked = costs.to_vec();
    for cost in ranked.iter_mut().filter(|cost| cost.kind == WHOLE) {
        cost.nanoseconds = cost.nanoseconds.map(|time| time.saturating_sub(estimated));
    }
    ranked.sort_by_key(|cost| std::cmp::Reverse((cost.nanoseconds, cost.count)));
    ranked
}

/// The report on a machine that ran for `elapsed`.
pub(crate) fn report(counters: &Counters, engine: &str, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let value = |name: &str| counters.get(name).map_or(0, |counter| counter.value);
    let mut text = format!(
        "trapgate: statistics of {seconds:.2} s on {engine}; {:.2} s of the host's processors\n",
        value("host_cpu") as f64 / 1e9,
    );
    text += &costs(&ranked(&counters.costs));
    text += &numbers(counters, seconds);
    text.truncate(text.trim_end().len());
    text
}

fn costs(costs: &[Cost]) -> String {
    if costs.is_empty() {
        return String::new();
    }
    let time = |cost: &Cost| cost.nanoseconds.unwrap_or(0);
    let whole = costs.iter().map(time).sum::<u64>().max(1) as f64;
    let heading = ["COST", "", "COUNT", "NS EACH", "SECONDS", "SHARE"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    let row = |kind: String, detail: String, count: u64, time: u64, estimated: bool| {
        let each = time as f64 / count.max(1) as f64;
        let about = if estimated { "~" } else { "" };
        vec![
            kind,
            detail,
            grouped(count),
            format!("{about}{}", grouped(each.round() as u64)),
            format!("{:.4}", time as f64 / 1e9),
            format!("{:.1} %", 100.0 * time as f64 / whole),
        ]
    };
    rows.extend(costs.iter().take(MOST).map(|cost| {
        row(
            words(&cost.kind),
            cost.detail.clone(),
            cost.count,
            time(cost),
            cost.estimated,
        )
    }));
    if let Some(rest @ [_, ..]) = costs.get(MOST..) {
        let (count, time) = (
            rest.iter().map(|cost| cost.count).sum(),
            rest.iter().map(time).sum(),
        );
        let kind = format!("{} others", rest.len());
        rows.push(row(kind, String::new(), count, time, false));
    }
    indented(&columns(&rows, 2))
}

/// What two counters say together, of all the time that the machine has run.
pub(crate) struct Ratio {
    /// For programs.
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) words: &'static str,
    part: &'static str,
    whole: &'static str,
}

pub(crate) const RATIOS: [Ratio; 2] = [
    Ratio {
        name: "direct_exits_linked",
        words: "of the direct exits, are linked",
        part: "direct_exits_linked",
        whole: "direct_exits",
    },
    Ratio {
        name: "host_bytes_of_an_instruction",
        words: "bytes of host code for a guest instruction",
        part: "translated_host_bytes",
        whole: "translated_instructions",
    },
];

impl Ratio {
    /// None if the engine counts no such things, or there were none.
    pub(crate) fn of(&self, counters: &Counters) -> Option<f64> {
        let value = |name| Some(counters.get(name)?.value as f64);
        let (part, whole) = (value(self.part)?, value(self.whole)?);
        (whole > 0.0).then(|| part / whole)
    }
}

fn numbers(counters: &Counters, seconds: f64) -> String {
    let mut rows = vec![
        ["COUNTER", "VALUE", "PER SECOND"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for counter in &counters.counters {
        let mut row = vec![words(&counter.name)];
        match counter.unit {
            Unit::Nanoseconds => {
                row.push(format!("{:.3} s", counter.value as f64 / 1e9));
            }
            Unit::Count | Unit::Bytes => row.push(grouped(counter.value)),
        }
        if counter.kind == Kind::Total && counter.unit != Unit::Nanoseconds {
            let rate = counter.value as f64 / seconds.max(1e-9);
            row.push(grouped(rate.round() as u64));
        }
        rows.push(row);
    }
    rows.extend(RATIOS.iter().filter_map(|ratio| {
        let value = ratio.of(counters)?;
        Some(vec![ratio.words.to_owned(), format!("{value:.2}")])
    }));
    indented(&columns(&rows, 1))
}

fn indented(text: &str) -> String {
    let lines = text.lines().map(|line| format!("  {line}\n"));
    format!("\n{}", lines.collect::<String>())
}

#[cfg(test)]
pub(crate) mod tests {
    use trapgate_api::data::Counter;

    use super::*;

    pub(crate) fn cost(kind: &str, detail: &str, count: u64, nanoseconds: Option<u64>) -> Cost {
        Cost {
            kind: kind.to_owned(),
            detail: detail.to_owned(),
            count,
            nanoseconds,
            estimated: false,
        }
    }

    pub(crate) fn counter(name: &str, unit: Unit, kind: Kind, value: u64) -> Counter {
        Counter {
            name: name.to_owned(),
            help: String::new(),
            unit,
            kind,
            value,
            cpus: Vec::new(),
        }
    }

    fn machine() -> Counters {
        Counters {
            clock_ns: 0,
            counters: vec![
                counter("host_cpu", Unit::Nanoseconds, Kind::Total, 1_500_000_000),
                counter("halts", Unit::Count, Kind::Total, 1_234_567),
                counter("code_bytes", Unit::Bytes, Kind::Level, 4096),
                counter("direct_exits", Unit::Count, Kind::Total, 200),
                counter("direct_exits_linked", Unit::Count, Kind::Total, 150),
            ],
            costs: vec![
                cost("call_out", "rdtsc", 1000, Some(300_000_000)),
                cost("translated_code", "", 10, Some(700_000_000)),
                Cost {
                    estimated: true,
                    ..cost("tlb_refill", "user read", 10_000_000, Some(100_000_000))
                },
            ],
        }
    }

    #[test]
    fn report_ranks_by_time_and_counts_nothing_twice() {
        let text = report(&machine(), "jit", Duration::from_secs(2));
        assert_eq!(
            text,
            "\
trapgate: statistics of 2.00 s on jit; 1.50 s of the host's processors

  COST                             COUNT     NS EACH  SECONDS   SHARE
  translated code                     10  60,000,000   0.6000  60.0 %
  call out         rdtsc           1,000     300,000   0.3000  30.0 %
  tlb refill       user read  10,000,000         ~10   0.1000  10.0 %

  COUNTER                              VALUE  PER SECOND
  host cpu                           1.500 s
  halts                            1,234,567     617,284
  code bytes                           4,096
  direct exits                           200         100
  direct exits linked                    150          75
  of the direct exits, are linked       0.75"
        );
    }

    #[test]
    fn what_is_beyond_the_end_of_the_ranking_is_summed() {
        let all: Vec<Cost> = (0..MOST as u64 + 3)
            .map(|index| cost("call_out", &index.to_string(), 2, Some(1_000_000 - index)))
            .collect();
        let text = costs(&all);
        let last = text.lines().last().unwrap();
        assert!(last.trim_start().starts_with("3 others"), "{text}");
        assert!(last.contains(" 6 "), "{text}");
    }

    #[test]
    fn engine_that_knows_no_costs_tells_its_counters() {
        let mut machine = machine();
        machine.costs.clear();
        let text = report(&machine, "interp", Duration::from_secs(2));
        assert!(!text.contains("COST ") && text.contains("halts"), "{text}");
    }

    #[test]
    fn thousands_are_set_apart() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1234567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
