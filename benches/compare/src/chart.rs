//! The report as a bar chart: time ÷ native for each workload, in the scale of logarithms, and the boot in seconds.

use std::fmt::Write;

use crate::catalog::Kind;
use crate::report::{Lost, Ratios, Report, Row};
use crate::subject::Subject;

const WIDTH: f64 = 960.0;
/// Where the bars' area begins and ends; labels are left of it, and the ratios right of it.
const LEFT: f64 = 150.0;
const RIGHT: f64 = 780.0;
/// The middle of the column of ratios.
const RATIO: f64 = 890.0;
const BAR: f64 = 11.0;
/// From one pair of bars to the next.
const PITCH: f64 = 32.0;
/// Where the first row may begin.
const TOP: f64 = 112.0;

/// Those that have bars, with their colours: a blue and an orange that can be told apart by the colour-blind
/// (Okabe, Ito 2008).
const BARS: [(Subject, &str); 2] = [(Subject::Trapgate, "#0072b2"), (Subject::Tcg, "#e69f00")];

const STYLE: &str = "\
text { font: 13px 'DejaVu Sans', Verdana, sans-serif; fill: #222 }
.title { font-size: 18px; font-weight: bold }
.group { font-weight: bold }
.small { font-size: 11px; fill: #555 }
.value { font-size: 11px }
.end { text-anchor: end }
.middle { text-anchor: middle }
.mean { font-weight: bold }
.grid { stroke: #ddd }
.one { stroke: #555 }";

/// A drawing that grows downwards.
struct Drawing {
    body: String,
    /// Where the next row begins.
    y: f64,
}

impl Drawing {
    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let text = escaped(text);
        // Writing to a String does not fail, here as below.
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" class="{class}">{text}</text>"#
        );
    }

    fn bar(&mut self, from: f64, to: f64, y: f64, colour: &str) {
        let (x, width) = (from.min(to), (to - from).abs().max(1.0));
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{colour}"/>"#
        );
    }

    fn line(&mut self, x: f64, from: f64, to: f64, class: &str) {
        let _ = writeln!(
            self.body,
            r#"<line x1="{x:.1}" y1="{from:.1}" x2="{x:.1}" y2="{to:.1}" class="{class}"/>"#
        );
    }

    /// A pair of bars for the values that are there, each with its text at its end.
    fn row(
        &mut self,
        name: &str,
        class: &str,
        ends: [Option<(f64, f64, String)>; 2],
        ratio: Option<f64>,
    ) {
        let middle = self.y + BAR + 4.0;
        self.text(LEFT - 10.0, middle, &format!("end {class}"), name);
        for (index, end) in ends.into_iter().enumerate() {
            let y = self.y + index as f64 * (BAR + 1.0);
            if let Some((from, to, value)) = end {
                self.bar(from, to, y, BARS[index].1);
                self.text(from.max(to) + 5.0, y + BAR - 1.5, "value", &value);
            }
        }
        if let Some(ratio) = ratio {
            self.text(
                RATIO,
                middle,
                &format!("middle {class}"),
                &format!("{ratio:.1}"),
            );
        }
        self.y += PITCH;
    }

    fn heading(&mut self, text: &str) {
        self.y += 8.0;
        self.text(LEFT - 10.0, self.y + 12.0, "end group", text);
        self.y += 22.0;
    }
}

/// A scale of logarithms between two ratios.
struct Scale {
    least: f64,
    most: f64,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (least, most) = values.fold((1.0_f64, 2.0_f64), |(least, most), value| {
            (least.min(value), most.max(value))
        });
        let most = ticks().find(|tick| *tick >= most).unwrap_or(most);
        Self { least, most }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value / self.least).ln() / (self.most / self.least).ln();
        LEFT + share * (RIGHT - LEFT)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        ticks().filter(|tick| (self.least..=self.most).contains(tick))
    }
}

/// 1, 2, 5, 10 and so on, and two below.
fn ticks() -> impl Iterator<Item = f64> {
    let decades = (0..6).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
    [0.2, 0.5].into_iter().chain(decades)
}

/// The report as SVG.
pub(crate) fn svg(report: &Report) -> String {
    let mut drawing = Drawing {
        body: String::new(),
        y: TOP,
    };
    let engine = report.engine.as_deref().unwrap_or("none");
    drawing.text(
        20.0,
        30.0,
        "title",
        "Time ÷ native: the same programs in a guest and on its host",
    );
    let about = report.about.iter().find(|(name, _)| *name == "host");
    let host = about.map_or("", |(_, host)| host);
    let qemu = report.about.iter().find(|(name, _)| *name == "QEMU");
    let qemu = qemu.map_or(String::new(), |(_, qemu)| {
        let version = qemu.split_whitespace().next().unwrap_or_default();
        format!("; QEMU {version}")
    });
    let line =
        format!("{host}; one virtual processor, engine {engine}{qemu}; medians, logarithmic scale");
    drawing.text(20.0, 50.0, "small", &line);
    legend(&mut drawing);

    let ratios = report.workloads.iter().map(|row| &row.ratios);
    let values = ratios.flat_map(|ratios| [ratios.trapgate_over_native, ratios.tcg_over_native]);
    let scale = Scale::of(values.flatten());
    let ends = |ratios: &Ratios| {
        [ratios.trapgate_over_native, ratios.tcg_over_native]
            .map(|value| value.map(|value| (scale.at(1.0), scale.at(value), short(value))))
    };
    // In the place of a bar that is missing.
    let missing = |row: &Row, subject: Subject| {
        let failed = |lost: &Lost| lost.subject == subject && lost.workload == row.name;
        let why = if row.not_run.contains_key(&subject) {
            "not run"
        } else if report.failures.iter().any(failed) {
            "failed"
        } else {
            return None;
        };
        Some((scale.at(1.0), scale.at(1.0), why.to_owned()))
    };
    for kind in [Kind::Compute, Kind::System] {
        let rows: Vec<_> = report
            .workloads
            .iter()
            .filter(|row| row.kind == Some(kind))
            .collect();
        if rows.is_empty() {
            continue;
        }
        drawing.heading(kind.name());
        for row in rows {
            let [trapgate, tcg] = ends(&row.ratios);
            let ends = [
                trapgate.or_else(|| missing(row, Subject::Trapgate)),
                tcg.or_else(|| missing(row, Subject::Tcg)),
            ];
            drawing.row(row.name, "", ends, row.ratios.tcg_over_trapgate);
        }
        if let Some(mean) = report.means.iter().find(|mean| mean.of == kind.name()) {
            drawing.row(
                "geometric mean",
                "mean",
                ends(&mean.ratios),
                mean.ratios.tcg_over_trapgate,
            );
        }
    }
    if let Some(mean) = report
        .means
        .iter()
        .find(|mean| mean.of == "all" && mean.workloads > 1)
    {
        drawing.heading("all");
        drawing.row(
            "geometric mean",
            "mean",
            ends(&mean.ratios),
            mean.ratios.tcg_over_trapgate,
        );
    }
    let bottom = drawing.y;
    let mut grid = Drawing {
        body: String::new(),
        y: 0.0,
    };
    if !report.workloads.is_empty() {
        for tick in scale.ticks() {
            let class = if tick == 1.0 { "one" } else { "grid" };
            grid.line(scale.at(tick), TOP, bottom, class);
            grid.text(scale.at(tick), TOP - 6.0, "small middle", &tick.to_string());
        }
    }
    boot(report, &mut drawing);
    let height = drawing.y + 12.0;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" width="{WIDTH}" height="{height:.0}">
<style>{STYLE}</style>
<rect width="100%" height="100%" fill="#fff"/>
{}{}</svg>
"##,
        grid.body, drawing.body
    )
}

fn legend(drawing: &mut Drawing) {
    let mut x = LEFT;
    for (subject, colour) in BARS {
        drawing.bar(x, x + 14.0, 68.0, colour);
        drawing.text(x + 20.0, 78.0, "", subject.name());
        x += 110.0;
    }
    drawing.text(RATIO, 78.0, "middle", "TCG ÷ trapgate");
}

fn boot(report: &Report, drawing: &mut Drawing) {
    let Some(boot) = &report.boot else {
        return;
    };
    let seconds = BARS.map(|(subject, _)| boot.median(subject));
    let most = seconds.iter().flatten().copied().fold(0.0, f64::max);
    if most == 0.0 {
        return;
    }
    drawing.heading("boot, in seconds");
    let ends = seconds.map(|value| {
        let length = |value: f64| value / most * (RIGHT - LEFT) * 0.9;
        value.map(|value| (LEFT, LEFT + length(value), format!("{value:.2} s")))
    });
    drawing.row("start to init", "", ends, boot.ratios.tcg_over_trapgate);
}

/// Two or three digits that count.
fn short(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else if value < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// Text in XML (1.0, 2.4).
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing;

    #[test]
    fn scale_ends_at_a_round_number_and_holds_all_values() {
        let scale = Scale::of([1.5, 37.0].into_iter());
        assert_eq!((scale.least, scale.most), (1.0, 50.0));
        assert!((scale.at(1.0) - LEFT).abs() < 1e-9);
        assert!((scale.at(50.0) - RIGHT).abs() < 1e-9);
        assert_eq!(
            scale.ticks().collect::<Vec<_>>(),
            [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
        );

        // Something that is faster in the guest.
        let scale = Scale::of([0.8].into_iter());
        assert!(scale.at(0.8) >= LEFT && scale.at(1.0) > scale.at(0.8));
    }

    #[test]
    fn every_workload_that_ran_has_its_bars_and_its_numbers() {
        let report = testing::report();

        let svg = svg(&report);

        // Three workloads, three means and the boot have two bars each; two more explain the colours, and one is
        // the ground.
        assert_eq!(svg.matches("<rect").count(), 2 * 7 + 2 + 1);
        for text in [
            "crc",
            "avx2",
            "geometric mean",
            "not run",
            "2.50 s",
            ">8.00<",
        ] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn drawing_is_well_formed_whatever_is_in_a_name() {
        let mut report = testing::report();
        report.about = vec![("host", "a <processor> & more".to_owned())];

        let svg = svg(&report);

        assert!(svg.contains("a &lt;processor&gt; &amp; more"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn nothing_measured_is_drawn_without_bars() {
        let svg = svg(&testing::nothing());
        assert_eq!(svg.matches("<rect").count(), 3);
        assert!(svg.ends_with("</svg>\n"));
    }
}
