//! Measured figures, as a table for people and as JSON for programs.

use std::error::Error;
use std::fmt::Write;

/// What SPECIFICATION.md promises of a figure. Shown beside it; nothing fails here.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Promise {
    AtMost(f64),
    AtLeast(f64),
}

/// One figure.
struct Figure {
    name: String,
    unit: &'static str,
    /// One value for each run.
    runs: Vec<f64>,
    promise: Option<Promise>,
    /// The same on the host, natively.
    host: Option<f64>,
}

impl Figure {
    fn median(&self) -> f64 {
        let mut runs = self.runs.clone();
        runs.sort_by(f64::total_cmp);
        let middle = runs.len() / 2;
        if runs.len().is_multiple_of(2) {
            (runs[middle - 1] + runs[middle]) / 2.0
        } else {
            runs[middle]
        }
    }

    fn spread(&self) -> String {
        let least = self.runs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if self.runs.len() > 1 {
            format!("{} … {}", number(least), number(most))
        } else {
            String::new()
        }
    }
}

/// All figures of one run of this program.
pub(crate) struct Report {
    /// What was measured on, as names and values.
    pub(crate) host: Vec<(&'static str, String)>,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

impl Report {
    pub(crate) fn new(host: Vec<(&'static str, String)>) -> Self {
        Self {
            host,
            figures: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds a figure; `runs` has at least one value.
    pub(crate) fn add(&mut self, name: impl Into<String>, unit: &'static str, runs: &[f64]) {
        self.promised(name, unit, runs, None, None);
    }

    /// As [`Self::add`], with what is promised, and what it is on the host in the same run of this
    /// program.
    pub(crate) fn promised(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        runs: &[f64],
        promise: Option<Promise>,
        host: Option<f64>,
    ) {
        if !runs.is_empty() {
            self.figures.push(Figure {
                name: name.into(),
                unit,
                runs: runs.to_vec(),
                promise,
                host,
            });
        }
    }

    /// Adds a line for people.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Says that figures are missing, and why, at once and at the end.
    pub(crate) fn skip(&mut self, what: &str, error: &dyn Error) {
        let note = format!("skipped `{what}`: {error}");
        eprintln!("{note}");
        self.note(note);
    }

    pub(crate) fn table(&self) -> String {
        let head = ["figure", "median", "", "promised", "host", "slower", "runs"];
        let mut rows = vec![head.map(str::to_owned)];
        rows.extend(self.figures.iter().map(|figure| {
            let promise = figure.promise.map(|promise| match promise {
                Promise::AtMost(most) => format!("≤ {}", number(most)),
                Promise::AtLeast(least) => format!("≥ {}", number(least)),
            });
            let slower = figure
                .host
                .map(|host| format!("{} ×", number(host / figure.median())));
            [
                figure.name.clone(),
                number(figure.median()),
                figure.unit.to_owned(),
                promise.unwrap_or_default(),
                figure.host.map(number).unwrap_or_default(),
                slower.unwrap_or_default(),
                figure.spread(),
            ]
        }));
        let widths: [usize; 7] = std::array::from_fn(|column| {
            let lengths = rows.iter().map(|row| length(&row[column]));
            lengths.max().unwrap_or(0)
        });
        let mut text = String::new();
        for (name, value) in &self.host {
            let _ = writeln!(text, "{name}: {value}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        if self.figures.is_empty() {
            return text;
        }
        text.push('\n');
        for row in &rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let space = " ".repeat(widths[column] - length(cell));
                let numeric = [1, 3, 4, 5].contains(&column);
                let (before, after) = if numeric {
                    (&space[..], "")
                } else {
                    ("", &space[..])
                };
                let _ = write!(line, "{before}{cell}{after}  ");
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    pub(crate) fn json(&self) -> String {
        let host: Vec<String> = self
            .host
            .iter()
            .map(|(name, value)| format!("{}: {}", quoted(name), quoted(value)))
            .collect();
        let notes: Vec<String> = self.notes.iter().map(|note| quoted(note)).collect();
        let figures: Vec<String> = self
            .figures
            .iter()
            .map(|figure| {
                let runs: Vec<String> = figure.runs.iter().map(f64::to_string).collect();
                let promise = match figure.promise {
                    None => String::new(),
                    Some(Promise::AtMost(most)) => format!(", \"at_most\": {most}"),
                    Some(Promise::AtLeast(least)) => format!(", \"at_least\": {least}"),
                };
                let host = match figure.host {
                    None => String::new(),
                    Some(host) => format!(", \"host\": {host}"),
                };
                format!(
                    "    {{\"name\": {}, \"unit\": {}, \"median\": {}, \"runs\": [{}]{promise}{host}}}",
                    quoted(&figure.name),
                    quoted(figure.unit),
                    figure.median(),
                    runs.join(", "),
                )
            })
            .collect();
        format!(
            "{{\n  \"host\": {{{}}},\n  \"notes\": [{}],\n  \"figures\": [\n{}\n  ]\n}}",
            host.join(", "),
            notes.join(", "),
            figures.join(",\n"),
        )
    }
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.01 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A JSON string (RFC 8259, 7).
fn quoted(text: &str) -> String {
    let mut json = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            control if control < ' ' => {
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
    json
}
