//! `trapgate top`: what the machines do that run, second by second.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::stdio::stdin;
use serde_json::{Value, json};
use trapgate_api::client::ClientError;
use trapgate_api::data::{Counters, Info, Kind, Nothing};
use trapgate_api::directory::Name;
use trapgate_api::operation::{GetCounters, GetInfo};

use crate::arguments::TopArguments;
use crate::clients::{client, open, print, printable};
use crate::event::Event;
use crate::failure::Failure;
use crate::stats::{RATIOS, Ratio, columns, grouped, words};
use crate::{signals, status, terminal};

/// From one look to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a machine may take to answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Lines of costs where there is no screen that could be full.
const MOST: usize = 20;
/// Lines of a machine's costs beside other machines.
const FEW: usize = 10;
/// Rows and columns of a terminal that does not know.
const SCREEN: (u16, u16) = (80, 24);

/// What a machine said of itself.
struct Look {
    info: Info,
    counters: Counters,
    when: Instant,
}

/// One machine, as it is looked at.
struct Watched {
    name: Name,
    before: Option<Look>,
    now: Option<Look>,
}

/// Shows what machines do, until the person has seen enough.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn top(arguments: &TopArguments) -> Result<u8, Failure> {
    let TopArguments { name, once, json } = arguments;
    let (events, inbox) = channel();
    let mut watched = Vec::new();
    look(&mut watched, name.as_ref())?;
    let screen = terminal::stdin_is_terminal() && terminal::stdout_is_terminal();
    if *once || *json || !screen {
        thread::sleep(PERIOD);
        look(&mut watched, name.as_ref())?;
        let rates: Vec<Rates> = watched.iter().map(Rates::of).collect();
        return print(&if *json {
            let values: Vec<Value> = rates.iter().map(Rates::value).collect();
            format!("{:#}\n", Value::from(values))
        } else {
            page(&rates, name.is_some(), MOST)
        });
    }
    signals::watch(events.clone())?;
    terminal::take_screen()
        .map_err(|error| Failure::new(status::HOST, "cannot use this terminal").cause(error))?;
    watch_keys(events)?;
    let result = follow(&mut watched, name.as_ref(), &inbox);
    terminal::restore();
    result
}

/// Draws the page again and again.
fn follow(
    watched: &mut Vec<Watched>,
    name: Option<&Name>,
    inbox: &Receiver<Event>,
) -> Result<u8, Failure> {
    let mut next = Instant::now() + PERIOD;
    loop {
        if let Some(status) = draw(watched, name)? {
            return Ok(status);
        }
        match inbox.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(Event::Leave) => return Ok(status::SUCCESS),
            // As other programs of this name: whoever presses Ctrl-C has seen enough.
            Ok(Event::Signal(signal)) if signal == signal_hook::consts::SIGINT => {
                return Ok(status::SUCCESS);
            }
            Ok(Event::Signal(signal)) => return Ok(signals::exit_status(signal)),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => {
                next += PERIOD;
                // After we were stopped, there is nothing to be made up for.
                next = next.max(Instant::now());
                match look(watched, name) {
                    Ok(()) => {}
                    // It was there: that it has ended is no failure.
                    Err(Unseen::Gone(machine, _)) => {
                        terminal::restore();
                        terminal::say(&format!("trapgate: `{machine}` has ended"));
                        return Ok(status::SUCCESS);
                    }
                    Err(Unseen::Failure(failure)) => return Err(failure),
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::defect("the event channel broke"));
            }
        }
    }
}

/// Draws the page; gives our exit status if that is not possible any more.
fn draw(watched: &[Watched], name: Option<&Name>) -> Result<Option<u8>, Failure> {
    let (width, height) = terminal::size().unwrap_or(SCREEN);
    let (width, height) = (usize::from(width), usize::from(height));
    let rates: Vec<Rates> = watched.iter().map(Rates::of).collect();
    let text = page(&rates, name.is_some(), height);
    let mut frame = "\x1b[H".to_owned();
    let lines = ["trapgate top: each second anew; q leaves", ""];
    for line in lines.into_iter().chain(text.lines()).take(height - 1) {
        frame.extend(line.chars().take(width));
        frame += "\x1b[K\n";
    }
    frame += "\x1b[J";
    let status = print(&frame)?;
    Ok((status != status::SUCCESS).then_some(status))
}

/// Reports that q was pressed.
fn watch_keys(events: Sender<Event>) -> Result<(), Failure> {
    let watch = move || {
        let mut keys = [0; 64];
        loop {
            match rustix::io::read(stdin(), &mut keys) {
                Ok(0) => return,
                Ok(count) if keys[..count].iter().any(|key| b"qQ\x04".contains(key)) => {
                    let _ = events.send(Event::Leave);
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    };
    let thread = thread::Builder::new().name("keys".to_owned()).spawn(watch);
    thread
        .map(drop)
        .map_err(|error: io::Error| Failure::defect(format!("cannot start a thread: {error}")))
}

/// Why nothing is to be seen.
enum Unseen {
    /// The machine that was asked for is not there.
    Gone(Name, ClientError),
    Failure(Failure),
}

impl From<Failure> for Unseen {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<Unseen> for Failure {
    fn from(unseen: Unseen) -> Self {
        match unseen {
            Unseen::Gone(name, error) => Self::client("watch", &name, &error),
            Unseen::Failure(failure) => failure,
        }
    }
}

/// Asks the machines. With a name it is that one, which must be there.
fn look(watched: &mut Vec<Watched>, name: Option<&Name>) -> Result<(), Unseen> {
    let names: Vec<Name> = match name {
        Some(name) => vec![name.clone()],
        None => {
            let found = open()?
                .machines()
                .map_err(|error| Failure::directory(&error))?;
            found.into_iter().map(|found| found.name).collect()
        }
    };
    // One that does not answer does not hold the others up.
    let asked: Vec<_> = names
        .into_iter()
        .map(|name| {
            let asks = name.clone();
            (name, thread::spawn(move || ask(&asks)))
        })
        .collect();
    let mut former = std::mem::take(watched);
    for (machine, thread) in asked {
        let answer = thread
            .join()
            .map_err(|_| Failure::defect("a thread that asked a machine ended unexpectedly"))?;
        let now = match answer {
            Ok(look) => Some(look),
            Err(error @ (ClientError::NoSuchMachine { .. } | ClientError::Ended { .. })) => {
                if name.is_some() {
                    return Err(Unseen::Gone(machine, error));
                }
                continue;
            }
            Err(_) => None,
        };
        let before = former.iter().position(|other| other.name == machine);
        let before = before.and_then(|index| former.swap_remove(index).now);
        // Another may have got its name.
        let before = before.filter(|before| {
            now.as_ref()
                .is_none_or(|now| now.info.pid == before.info.pid)
        });
        watched.push(Watched {
            name: machine,
            before,
            now,
        });
    }
    Ok(())
}

fn ask(name: &Name) -> Result<Look, ClientError> {
    let no_place = |_| ClientError::NoSuchMachine { name: name.clone() };
    let client = client(name).map_err(no_place)?;
    let info = client.call::<GetInfo>(&Nothing {}, Some(ANSWER))?;
    let counters = match client.call::<GetCounters>(&Nothing {}, Some(ANSWER)) {
        // Between two machines: its guest restarts.
        Err(ClientError::Refused(_)) => Counters::default(),
        counters => counters?,
    };
    Ok(Look {
        info,
        counters,
        when: Instant::now(),
    })
}

/// A cost, per second.
#[derive(Debug)]
struct CostRate {
    kind: String,
    detail: String,
    count: f64,
    /// Host nanoseconds, if they are measured.
    nanoseconds: Option<f64>,
    estimated: bool,
}

/// What a machine did between two looks.
struct Rates<'a> {
    name: &'a Name,
    info: Option<&'a Info>,
    seconds: f64,
    /// Events and nanoseconds per second, by counter.
    totals: BTreeMap<&'a str, f64>,
    levels: BTreeMap<&'a str, u64>,
    /// Since the machine began.
    ratios: Vec<(&'static Ratio, f64)>,
    /// The most expensive first; where no time is measured, the most frequent.
    costs: Vec<CostRate>,
}

impl<'a> Rates<'a> {
    fn of(watched: &'a Watched) -> Self {
        let mut rates = Self {
            name: &watched.name,
            info: watched.now.as_ref().map(|now| &now.info),
            seconds: 0.0,
            totals: BTreeMap::new(),
            levels: BTreeMap::new(),
            ratios: Vec::new(),
            costs: Vec::new(),
        };
        let Some(now) = &watched.now else {
            return rates;
        };
        for counter in &now.counters.counters {
            if counter.kind == Kind::Level {
                rates.levels.insert(&counter.name, counter.value);
            }
        }
        rates.ratios = RATIOS
            .iter()
            .filter_map(|ratio| Some((ratio, ratio.of(&now.counters)?)))
            .collect();
        let Some(before) = &watched.before else {
            return rates;
        };
        rates.seconds = now.when.duration_since(before.when).as_secs_f64();
        let per_second = |more: u64| more as f64 / rates.seconds.max(1e-3);
        for counter in &now.counters.counters {
            let former = before.counters.get(&counter.name);
            if counter.kind == Kind::Total
                && let Some(former) = former
            {
                // It began again if the guest did.
                let more = counter.value.saturating_sub(former.value);
                rates.totals.insert(&counter.name, per_second(more));
            }
        }
        let former: BTreeMap<_, _> = before
            .counters
            .costs
            .iter()
            .map(|cost| ((&cost.kind, &cost.detail), cost))
            .collect();
        for cost in &now.counters.costs {
            let former = former.get(&(&cost.kind, &cost.detail));
            let count = cost
                .count
                .saturating_sub(former.map_or(0, |cost| cost.count));
            let time = cost.nanoseconds.map(|time| {
                let former = former.and_then(|cost| cost.nanoseconds).unwrap_or(0);
                time.saturating_sub(former)
            });
            if count > 0 || time.is_some_and(|time| time > 0) {
                rates.costs.push(CostRate {
                    kind: cost.kind.clone(),
                    detail: cost.detail.clone(),
                    count: per_second(count),
                    nanoseconds: time.map(per_second),
                    estimated: cost.estimated,
                });
            }
        }
        let rank = |cost: &CostRate| (cost.nanoseconds.unwrap_or(0.0), cost.count);
        rates.costs.sort_by(|a, b| {
            rank(b)
                .partial_cmp(&rank(a))
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        rates
    }

    fn total(&self, name: &str) -> Option<f64> {
        self.totals.get(name).copied()
    }

    /// Whether all guest instructions are counted: the translator does so only if it measures.
    fn counts_instructions(&self) -> bool {
        let measures = |cost: &CostRate| cost.nanoseconds.is_some();
        self.costs.is_empty() || self.costs.iter().any(measures)
    }

    fn value(&self) -> Value {
        let Some(info) = self.info else {
            return json!({ "name": self.name.as_str(), "state": "unresponsive" });
        };
        let costs = self.costs.iter().map(|cost| {
            json!({
                "kind": cost.kind,
                "detail": cost.detail,
                "per_second": cost.count,
                "nanoseconds_per_second": cost.nanoseconds,
                "estimated": cost.estimated,
            })
        });
        let ratios = self.ratios.iter().map(|(ratio, value)| (ratio.name, value));
        json!({
            "name": info.name,
            "pid": info.pid,
            "state": info.state,
            "engine": info.engine.name,
            "cpus": info.cpus,
            "seconds": self.seconds,
            "per_second": self.totals,
            "levels": self.levels,
            "ratios": ratios.collect::<BTreeMap<_, _>>(),
            "costs": costs.collect::<Vec<_>>(),
        })
    }

    /// The line of the table.
    fn row(&self) -> Vec<String> {
        let Some(info) = self.info else {
            return vec![self.name.to_string(), "unresponsive".to_owned()];
        };
        let rate = |name: &str| match self.total(name) {
            Some(rate) => grouped(rate.round() as u64),
            None => "-".to_owned(),
        };
        let cpu = self.total("host_cpu").map(|time| time / 1e7);
        let instructions = self
            .total("instructions")
            .filter(|&rate| rate > 0.0 && self.counts_instructions());
        let tenths = |number: Option<f64>| {
            number.map_or_else(|| "-".to_owned(), |number| format!("{number:.1}"))
        };
        // In the words of each engine.
        let of = |names: &[&str]| {
            let name = names.iter().find(|name| self.totals.contains_key(*name));
            rate(name.unwrap_or(&""))
        };
        vec![
            printable(&info.name),
            info.state.to_string(),
            printable(&info.engine.name),
            info.cpus.to_string(),
            tenths(cpu),
            tenths(instructions.map(|rate| rate / 1e6)),
            of(&["exits", "code_entries"]),
            of(&["tlb_misses", "page_walks"]),
            rate("tlb_refills"),
            rate("call_outs"),
            of(&["translations", "blocks_decoded"]),
            rate("halts"),
            rate("kicks"),
        ]
    }

    /// The machine's costs, if it knows any.
    fn ranking(&self, most: usize) -> String {
        let heading = ["COST", "", "PER SECOND", "NS EACH", "TIME"];
        let measured = self.costs.iter().any(|cost| cost.nanoseconds.is_some());
        let shown = if measured { 5 } else { 3 };
        let mut rows = vec![
            heading[..shown]
                .iter()
                .map(|&cell| cell.to_owned())
                .collect(),
        ];
        for cost in self.costs.iter().take(most) {
            let mut row = vec![
                words(&printable(&cost.kind)),
                printable(&cost.detail),
                grouped(cost.count.round() as u64),
            ];
            if let Some(time) = cost.nanoseconds {
                let about = if cost.estimated { "~" } else { "" };
                let each = (time / cost.count.max(1e-3)).round();
                row.push(match cost.count {
                    0.0 => "-".to_owned(),
                    _ => format!("{about}{}", grouped(each as u64)),
                });
                row.push(format!("{:.1} %", time / 1e7));
            }
            rows.push(row);
        }
        columns(&rows, 2)
    }

    /// All counters of the machine.
    fn numbers(&self) -> String {
        let mut rows = Vec::new();
        for (name, rate) in &self.totals {
            let rate = if *name == "host_cpu" {
                format!("{:.1} %", rate / 1e7)
            } else {
                grouped(rate.round() as u64)
            };
            rows.push(vec![words(&printable(name)), rate, "a second".to_owned()]);
        }
        for (name, value) in &self.levels {
            rows.push(vec![words(&printable(name)), grouped(*value)]);
        }
        for (ratio, value) in &self.ratios {
            rows.push(vec![ratio.words.to_owned(), format!("{value:.2}")]);
        }
        // The units stand to the left.
        columns(&rows, 1)
    }
}

/// What is shown of machines, in about `height` lines. Of one machine, asked for by name, it is everything.
fn page(machines: &[Rates<'_>], named: bool, height: usize) -> String {
    if machines.is_empty() {
        return "No machine runs.\n".to_owned();
    }
    let heading = [
        "NAME",
        "STATE",
        "ENGINE",
        "CPUS",
        "CPU%",
        "MINSTR/S",
        "EXITS/S",
        "MISSES/S",
        "REFILLS/S",
        "CALLOUTS/S",
        "TRANSL/S",
        "HALTS/S",
        "KICKS/S",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(machines.iter().map(Rates::row));
    let mut text = columns(&rows, 3);
    let known: Vec<&Rates<'_>> = machines
        .iter()
        .filter(|machine| !machine.costs.is_empty())
        .collect();
    let room = height.saturating_sub(rows.len() + 4);
    let most = if named {
        room.max(FEW)
    } else {
        (room / known.len().max(1)).saturating_sub(3).clamp(3, FEW)
    };
    for machine in known {
        if !named && machines.len() > 1 {
            text += &format!("\n{}\n", machine.name);
        } else {
            text.push('\n');
        }
        text += &machine.ranking(most.min(MOST));
    }
    if named {
        for machine in machines.iter().filter(|machine| !machine.totals.is_empty()) {
            text.push('\n');
            text += &machine.numbers();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use trapgate_api::data::{Engine, State, Unit};

    use super::*;
    use crate::stats::tests::{cost, counter};

    fn looked(counters: Counters, when: Instant) -> Look {
        Look {
            info: Info {
                name: "a\u{1b}".to_owned(),
                pid: 7,
                state: State::Running,
                guest: "a test".to_owned(),
                engine: Engine {
                    name: "jit".to_owned(),
                    reason: "a test".to_owned(),
                },
                cpus: 1,
                memory_bytes: 1 << 20,
                started_unix_seconds: 0,
                uptime_seconds: 1.0,
                has_terminal: false,
                version: "0".to_owned(),
            },
            counters,
            when,
        }
    }

    fn counters(factor: u64, timed: bool) -> Counters {
        let time = |time: u64| timed.then_some(time * factor);
        Counters {
            clock_ns: 0,
            counters: vec![
                counter(
                    "host_cpu",
                    Unit::Nanoseconds,
                    Kind::Total,
                    1_000_000_000 * factor,
                ),
                counter("instructions", Unit::Count, Kind::Total, 5_000_000 * factor),
                counter("code_entries", Unit::Count, Kind::Total, 3000 * factor),
                counter("code_bytes", Unit::Bytes, Kind::Level, 4096),
            ],
            costs: vec![
                cost("call_out", "rdtsc", 2000 * factor, time(100_000_000)),
                cost("call_out", "cpuid", 20 * factor, time(700_000_000)),
                cost("event", "", 4, timed.then_some(4)),
            ],
        }
    }

    /// Two seconds in which everything doubles.
    fn watched(timed: bool) -> Watched {
        let now = Instant::now();
        let then = now.checked_sub(Duration::from_secs(2)).unwrap();
        Watched {
            name: "a".parse().unwrap(),
            before: Some(looked(counters(1, timed), then)),
            now: Some(looked(counters(2, timed), now)),
        }
    }

    #[test]
    fn page_shows_rates_of_what_happened_between_two_looks() {
        let watched = watched(true);
        let page = page(&[Rates::of(&watched)], false, 24);
        assert_eq!(
            page,
            "\
NAME  STATE    ENGINE  CPUS  CPU%  MINSTR/S  EXITS/S  MISSES/S  REFILLS/S  CALLOUTS/S  TRANSL/S  HALTS/S  KICKS/S
a\u{b7}    running  jit        1  50.0       2.5    1,500         -          -           -         -        -        -

COST             PER SECOND     NS EACH    TIME
call out  cpuid          10  35,000,000  35.0 %
call out  rdtsc       1,000      50,000   5.0 %
"
        );
    }

    #[test]
    fn without_times_the_most_frequent_comes_first_and_instructions_are_not_guessed() {
        let watched = watched(false);
        let rates = Rates::of(&watched);
        assert_eq!(rates.row()[5], "-");
        assert_eq!(
            rates.ranking(9),
            "\
COST             PER SECOND
call out  rdtsc       1,000
call out  cpuid          10
"
        );
    }

    #[test]
    fn guest_that_began_again_has_no_negative_rates() {
        let mut watched = watched(true);
        std::mem::swap(
            &mut watched.before.as_mut().unwrap().counters,
            &mut watched.now.as_mut().unwrap().counters,
        );
        let rates = Rates::of(&watched);
        assert_eq!(rates.total("code_entries"), Some(0.0));
        assert!(rates.costs.is_empty());
    }

    #[test]
    fn machine_that_says_nothing_is_named() {
        let watched = Watched {
            now: None,
            before: None,
            ..watched(true)
        };
        let rates = Rates::of(&watched);
        assert_eq!(rates.row(), ["a", "unresponsive"]);
        assert_eq!(rates.value()["state"], "unresponsive");
    }
}
