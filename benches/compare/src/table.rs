//! The report as a table, for a terminal and for a document.

use std::fmt::Write;

use crate::report::{Mean, Ratios, Report, Row};
use crate::subject::Subject;

const HEAD: [&str; 9] = [
    "workload",
    "kind",
    "native",
    "trapgate",
    "TCG",
    "trapgate÷native",
    "TCG÷native",
    "TCG÷trapgate",
    "spread",
];

/// The workloads, the boot and the means, as a table in Markdown.
pub(crate) fn markdown(report: &Report) -> String {
    let line = |cells: [String; 9]| format!("| {} |\n", cells.join(" | "));
    let rule = std::array::from_fn(|column| if column < 2 { "---" } else { "--:" }.to_owned());
    let head = [line(HEAD.map(str::to_owned)), line(rule)];
    head.into_iter().chain(body(report).map(line)).collect()
}

fn body(report: &Report) -> impl Iterator<Item = [String; 9]> {
    let rows = report.workloads.iter().chain(&report.boot).map(cells);
    let means = report.means.iter();
    let of_fastest = report.means.iter().take(1);
    rows.chain(means.map(|mean| mean_cells("mean", mean, &mean.ratios)))
        .chain(of_fastest.map(|mean| mean_cells("mean of fastest", mean, &mean.ratios_of_least)))
}

/// The report, for a terminal.
pub(crate) fn table(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    for (name, value) in &report.about {
        let _ = writeln!(text, "{name}: {value}");
    }
    if let Some(engine) = &report.engine {
        let _ = writeln!(text, "engine: {engine}");
    }
    let _ = writeln!(text, "rounds: {}", report.rounds);
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text.push('\n');

    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(body(report));
    align(&rows, &mut text);
    if !report.memory_mib.is_empty() {
        let memory: Vec<String> = report
            .memory_mib
            .iter()
            .map(|(subject, mib)| format!("{} {mib:.0} MiB", subject.name()))
            .collect();
        let _ = writeln!(
            text,
            "\nresident beyond guest RAM, at most: {}",
            memory.join(", ")
        );
    }
    if !report.targets.is_empty() {
        text.push('\n');
    }
    for target in &report.targets {
        let judgement = if target.met { "met   " } else { "missed" };
        let _ = writeln!(text, "{judgement}  {}: {}", target.text, target.measured);
    }
    for row in &report.workloads {
        for (subject, reason) in &row.not_run {
            let _ = writeln!(
                text,
                "not run: {} under {}: {reason}",
                row.name,
                subject.name()
            );
        }
    }
    for lost in &report.failures {
        let _ = writeln!(
            text,
            "failed: {} under {}: {}",
            lost.workload,
            lost.subject.name(),
            lost.reason
        );
    }
    text
}

fn cells(row: &Row) -> [String; 9] {
    let seconds = |subject| {
        row.median(subject)
            .map(|median| format!("{median:.3} s"))
            .unwrap_or_default()
    };
    let spread = row
        .times
        .values()
        .map(|times| times.spread)
        .fold(0.0, f64::max);
    let [a, b, c] = ratios(&row.ratios);
    [
        row.name.to_owned(),
        row.kind.map_or("", |kind| kind.name()).to_owned(),
        seconds(Subject::Native),
        seconds(Subject::Trapgate),
        seconds(Subject::Tcg),
        a,
        b,
        c,
        format!("{:.0} %", spread * 100.0),
    ]
}

fn mean_cells(name: &str, mean: &Mean, of: &Ratios) -> [String; 9] {
    let [a, b, c] = ratios(of);
    let none = String::new;
    [
        format!("{name} ({})", mean.workloads),
        mean.of.to_owned(),
        none(),
        none(),
        none(),
        a,
        b,
        c,
        none(),
    ]
}

fn ratios(ratios: &Ratios) -> [String; 3] {
    [
        ratios.trapgate_over_native,
        ratios.tcg_over_native,
        ratios.tcg_over_trapgate,
    ]
    .map(|ratio| ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default())
}

/// The first two columns begin at the left, the others end at the right.
fn align<const N: usize>(rows: &[[String; N]], text: &mut String) {
    let length = |cell: &String| cell.chars().count();
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| length(&row[column]))
            .max()
            .unwrap_or(0)
    });
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let _ = if column < 2 {
                write!(line, "{cell:width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing;

    #[test]
    fn table_has_a_line_for_each_workload_and_columns_that_end_together() {
        let text = table(&testing::report());
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        let words = |start| line(start).split_whitespace().collect::<Vec<_>>();
        assert_eq!(
            words("crc"),
            [
                "crc", "compute", "1.000", "s", "2.000", "s", "8.000", "s", "2.00", "8.00", "4.00",
                "425", "%"
            ]
        );
        assert_eq!(
            words("boot"),
            ["boot", "1.250", "s", "2.500", "s", "2.00", "20", "%"]
        );
        assert_eq!(
            words("mean (3)"),
            ["mean", "(3)", "all", "2.83", "18.57", "2.83"]
        );
        assert_eq!(line("crc").chars().count(), line("boot").chars().count());
        assert!(text.contains("not run: avx2 under trapgate: no AVX2"));
        assert!(text.contains("resident beyond guest RAM, at most: trapgate 90 MiB"));
    }

    #[test]
    fn markdown_has_the_same_cells() {
        let text = markdown(&testing::report());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[2],
            "| crc | compute | 1.000 s | 2.000 s | 8.000 s | 2.00 | 8.00 | 4.00 | 425 % |"
        );
        assert!(
            lines.iter().all(|line| line.matches('|').count() == 10),
            "{text}"
        );
        assert_eq!(lines.len(), 2 + 3 + 1 + 3 + 1);
    }

    #[test]
    fn nothing_measured_is_a_table_without_means() {
        let text = table(&testing::nothing());
        assert!(!text.contains("mean"));
        assert!(!text.contains("met"));
    }
}
