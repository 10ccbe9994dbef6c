use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::ProtocolError;
use crate::driver::{
    BUFFERS, Driver, EVENT_INDEX, INDIRECT, NEEDS_RESET, PATIENCE, RAM, Random, common, eventually,
};

const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
/// Where the guest gets control messages.
const MESSAGES: u64 = BUFFERS + 0x10_0000;
const MESSAGE_ROOM: u64 = 0x100;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<(Vec<u8>, Vec<bool>)>>);

impl PortOutput for Log {
    fn write(&mut self, data: &[u8]) {
        self.0.lock().unwrap().0.extend_from_slice(data);
    }
    fn guest_open(&mut self, open: bool) {
        self.0.lock().unwrap().1.push(open);
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
    }
    fn opened(&self) -> Vec<bool> {
        self.0.lock().unwrap().1.clone()
    }
}

/// Stops at each write until it is let go on.
struct Gate {
    reached: Sender<Vec<u8>>,
    go_on: Receiver<()>,
}

impl PortOutput for Gate {
    fn write(&mut self, data: &[u8]) {
        // The test may be over.
        let _ = self.reached.send(data.to_vec());
        let _ = self.go_on.recv();
    }
}

fn port(name: &str, is_console: bool, output: impl PortOutput) -> PortConfig {
    PortConfig {
        name: name.to_owned(),
        is_console,
        output: Box::new(output),
    }
}

/// A console on its own.
fn single() -> (Driver, ConsoleHandle, Log) {
    let log = Log::default();
    let console = Console::new(vec![port("", true, log.clone())]).unwrap();
    let handle = console.handle();
    (Driver::new(console), handle, log)
}

/// A guest with a console and two named ports, that has taken in the first control messages.
struct Guest {
    driver: Driver,
    handle: ConsoleHandle,
    logs: [Log; 3],
}

impl Guest {
    fn new() -> Self {
        let logs = [Log::default(), Log::default(), Log::default()];
        let console = Console::new(vec![
            port("console", true, logs[0].clone()),
            port("trapgate.stdin", false, logs[1].clone()),
            port("trapgate.stdout", false, logs[2].clone()),
        ])
        .unwrap();
        let handle = console.handle();
        let mut driver = Driver::new(console);
        assert_eq!(driver.offered() & 3, 3);
        driver.start(3);
        let mut guest = Self {
            driver,
            handle,
            logs,
        };
        guest.offer_message_room();
        guest
    }

    fn offer_message_room(&mut self) {
        for index in 0..8 {
            self.give_message_room(index);
        }
    }

    fn give_message_room(&mut self, index: u16) {
        let gpa = MESSAGES + MESSAGE_ROOM * u64::from(index);
        let piece = [(gpa, MESSAGE_ROOM as u32, true)];
        self.driver.send(CONTROL_RX, index, &piece);
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.driver.memory.write(BUFFERS, &message).unwrap();
        self.driver.request(CONTROL_TX, &[(BUFFERS, 8, false)]);
    }

    /// The next control message: port, event, value, and what follows.
    #[track_caller]
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let (head, written) = self.driver.wait_used(CONTROL_RX);
        let bytes = self
            .driver
            .read(MESSAGES + MESSAGE_ROOM * u64::from(head), written as usize);
        self.give_message_room(head);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (word(0).into(), word(4), word(6), bytes[8..].to_vec())
    }

    /// Makes port `port` ready and lets a program open it.
    fn bring_up(&mut self, port: u32, messages: usize) {
        self.say(port, event::PORT_READY, 1);
        for _ in 0..messages {
            self.hear();
        }
        self.say(port, event::PORT_OPEN, 1);
    }

    /// Gives port `port` room for input.
    fn give_room(&mut self, port: u16, length: u32) {
        let queue = receive_queue(port);
        let gpa = BUFFERS + 0x1000 * (u64::from(port) + 1);
        self.driver.send(queue, 0, &[(gpa, length, true)]);
    }

    /// What came on port `port`.
    #[track_caller]
    fn take(&mut self, port: u16) -> Vec<u8> {
        let (_, written) = self.driver.wait_used(receive_queue(port));
        let gpa = BUFFERS + 0x1000 * (u64::from(port) + 1);
        self.driver.read(gpa, written as usize)
    }

    fn write(&mut self, port: u16, text: &str) {
        self.driver
            .memory
            .write(BUFFERS + 0x800, text.as_bytes())
            .unwrap();
        let piece = [(BUFFERS + 0x800, text.len() as u32, false)];
        self.driver.request(receive_queue(port) + 1, &piece);
    }
}

fn receive_queue(port: u16) -> u16 {
    if port == 0 { 0 } else { 2 * port + 2 }
}

mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

#[test]
fn lone_console_works_both_ways_without_control_messages() {
    let (mut driver, handle, log) = single();
    assert_eq!(driver.offered() & 3, 1);
    driver.start(0);
    assert_eq!(driver.rings.len(), 2);
    driver.memory.write(BUFFERS, b"hello, world").unwrap();
    driver.request(1, &[(BUFFERS, 5, false), (BUFFERS + 5, 7, false)]);
    assert!(handle.drain(PATIENCE));
    assert_eq!(log.text(), "hello, world");
    assert_eq!(log.opened(), [true]);

    // Input that comes before there is room for it waits.
    assert_eq!(handle.input(0, b"ls -l\n"), 6);
    driver.send(0, 0, &[(BUFFERS, 4, true), (BUFFERS + 0x100, 64, true)]);
    assert_eq!(driver.wait_used(0), (0, 6));
    assert_eq!(driver.read(BUFFERS, 4), b"ls -");
    assert_eq!(driver.read(BUFFERS + 0x100, 2), b"l\n");
    // And input that comes after is there at once.
    driver.send(0, 0, &[(BUFFERS, 64, true)]);
    handle.input(0, b"x");
    assert_eq!(driver.take_used(0), Some((0, 1)));
    driver.sink.wait(0x41);
    driver.sink.wait(0x42);
}

#[test]
fn lone_console_learns_its_size_from_configuration() {
    let (mut driver, handle, _log) = single();
    handle.resize(80, 25);
    driver.start(1);
    // As soon as it runs, since Linux looks only when it is told to.
    driver.sink.wait(0x40);
    assert_eq!(driver.device_config::<4>(0), [80, 0, 25, 0]);
    let generation = driver.common::<1>(common::GENERATION);
    handle.resize(132, 43);
    driver.sink.wait(0x40);
    assert_eq!(driver.device_config::<4>(0), [132, 0, 43, 0]);
    assert_ne!(driver.common::<1>(common::GENERATION), generation);
    // The same size again is no news.
    handle.resize(132, 43);
    assert!(driver.sink.take().is_empty());
}

#[test]
fn ports_are_added_named_and_opened() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.device_config::<4>(4), 3_u32.to_le_bytes());
    guest.say(0, event::DEVICE_READY, 1);
    for port in 0..3 {
        assert_eq!(guest.hear(), (port, event::PORT_ADD, 1, vec![]));
    }
    guest.say(0, event::PORT_READY, 1);
    assert_eq!(guest.hear(), (0, event::CONSOLE_PORT, 1, vec![]));
    assert_eq!(guest.hear(), (0, event::PORT_OPEN, 1, vec![]));
    assert_eq!(guest.hear(), (0, event::PORT_NAME, 1, b"console".to_vec()));
    guest.say(1, event::PORT_READY, 1);
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 1, vec![]));
    let name = b"trapgate.stdin".to_vec();
    assert_eq!(guest.hear(), (1, event::PORT_NAME, 1, name));
}

#[test]
fn multiport_console_is_told_its_size_when_ready_and_when_it_changes() {
    let mut guest = Guest::new();
    guest.handle.resize(80, 25);
    guest.say(0, event::PORT_READY, 1);
    assert_eq!(guest.hear().1, event::CONSOLE_PORT);
    assert_eq!(guest.hear(), (0, event::RESIZE, 0, vec![80, 0, 25, 0]));
    guest.hear();
    guest.hear();
    guest.handle.resize(100, 30);
    assert_eq!(guest.hear(), (0, event::RESIZE, 0, vec![100, 0, 30, 0]));
}

#[test]
fn only_the_newest_size_waits_for_a_slow_guest() {
    let mut guest = Guest::new();
    guest.bring_up(0, 3);
    guest.driver.bus.pause();
    for columns in 1..1000 {
        guest.handle.resize(columns, 10);
    }
    guest.driver.bus.resume();
    assert_eq!(guest.hear(), (0, event::RESIZE, 0, vec![231, 3, 10, 0]));
    guest.say(1, event::PORT_READY, 1);
    assert_eq!(guest.hear().1, event::PORT_OPEN);
}

#[test]
fn input_waits_for_a_reader_and_ends_after_its_last_byte() {
    let mut guest = Guest::new();
    guest.give_room(1, 4);
    assert_eq!(guest.handle.input(1, b"abcdef"), 6);
    guest.handle.close_input(1);
    guest.say(1, event::PORT_READY, 1);
    guest.hear();
    guest.hear();
    // Not open yet: Linux would drop it.
    assert_eq!(guest.driver.take_used(4), None);
    guest.say(1, event::PORT_OPEN, 1);
    assert_eq!(guest.take(1), b"abcd");
    assert_eq!(guest.driver.take_used(CONTROL_RX), None);
    guest.give_room(1, 4);
    assert_eq!(guest.take(1), b"ef");
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 0, vec![]));
    // No more is accepted, and no one waits for ever.
    assert_eq!(guest.handle.input(1, b"x"), 0);
    assert!(!guest.handle.wait_for_room(1));
    assert!(!guest.handle.input_all(1, b"x"));
}

#[test]
fn end_of_empty_input_is_told_right_after_the_port_was_opened() {
    let mut guest = Guest::new();
    guest.handle.close_input(1);
    guest.say(1, event::PORT_READY, 1);
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 1, vec![]));
    assert_eq!(guest.hear().1, event::PORT_NAME);
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 0, vec![]));
}

#[test]
fn output_goes_to_its_port_and_closing_comes_last() {
    let mut guest = Guest::new();
    guest.bring_up(2, 2);
    guest.write(2, "to stdout");
    guest.write(0, "to console");
    guest.say(2, event::PORT_OPEN, 0);
    assert!(guest.handle.drain(PATIENCE));
    assert_eq!(guest.logs[2].text(), "to stdout");
    assert_eq!(guest.logs[2].opened(), [true, false]);
    assert_eq!(guest.logs[0].text(), "to console");
    assert_eq!(guest.logs[1].text(), "");
}

#[test]
fn feeder_waits_for_room_and_no_byte_is_lost() {
    let mut guest = Guest::new();
    guest.bring_up(1, 2);
    let sent: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    let feeder = {
        let (handle, sent) = (guest.handle.clone(), sent.clone());
        thread::spawn(move || {
            assert!(handle.input_all(1, &sent));
            handle.close_input(1);
        })
    };
    let mut received = Vec::new();
    while received.len() < sent.len() {
        guest.give_room(1, 4096);
        received.extend(guest.take(1));
    }
    feeder.join().unwrap();
    assert!(received == sent);
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 0, vec![]));
}

#[test]
fn full_buffer_accepts_what_fits() {
    let (_driver, handle, _log) = single();
    assert_eq!(handle.input(0, &[0; 60 << 10]), 60 << 10);
    assert_eq!(handle.input(0, &[0; 60 << 10]), 4 << 10);
    assert_eq!(handle.input(0, &[0; 1]), 0);
    assert_eq!(handle.input(7, &[0; 1]), 0);
}

#[test]
fn dropped_device_frees_a_waiting_feeder() {
    let (driver, handle, _log) = single();
    handle.input(0, &[0; 64 << 10]);
    let feeder = thread::spawn(move || handle.input_all(0, b"more"));
    drop(driver);
    assert!(!feeder.join().unwrap());
}

#[test]
fn host_that_does_not_read_stops_its_own_port_only() {
    let ((reached, arrivals), (let_go, go_on)) = (channel(), channel());
    let log = Log::default();
    let console = Console::new(vec![
        port("slow", false, Gate { reached, go_on }),
        port("quick", false, log.clone()),
    ]);
    let console = console.unwrap();
    let handle = console.handle();
    let mut driver = Driver::new(console);
    driver.start(3);
    driver.memory.write(BUFFERS, b"abcd").unwrap();
    driver.send(1, 0, &[(BUFFERS, 2, false)]);
    assert_eq!(arrivals.recv().unwrap(), b"ab");
    // The slow one is in the middle of a write.
    driver.request(5, &[(BUFFERS, 4, false)]);
    eventually("output of the quick port", || log.text() == "abcd");
    assert!(!handle.drain(Duration::from_millis(1)));
    // Neither pause nor reset waits for it.
    driver.bus.pause();
    driver.bus.resume();
    driver.start(3);
    let_go.send(()).unwrap();
    driver.send(1, 0, &[(BUFFERS + 2, 2, false)]);
    assert_eq!(arrivals.recv().unwrap(), b"cd");
    let_go.send(()).unwrap();
    assert!(handle.drain(PATIENCE));
}

#[test]
fn device_whose_output_is_stuck_can_be_dropped() {
    let ((reached, arrivals), (let_go, go_on)) = (channel(), channel());
    let console = Console::new(vec![port("", true, Gate { reached, go_on })]).unwrap();
    let mut driver = Driver::new(console);
    driver.start(0);
    driver.send(1, 0, &[(BUFFERS, 2, false)]);
    arrivals.recv().unwrap();
    drop(driver);
    let_go.send(()).unwrap();
}

#[test]
fn output_larger_than_a_batch_arrives_whole() {
    let (mut driver, handle, log) = single();
    driver.start(0);
    let text: String = (0..300_000)
        .map(|at| char::from(b'a' + (at % 23) as u8))
        .collect();
    driver.memory.write(BUFFERS, text.as_bytes()).unwrap();
    driver.request(
        1,
        &[
            (BUFFERS, 100_000, false),
            (BUFFERS + 100_000, 200_000, false),
        ],
    );
    assert!(handle.drain(PATIENCE));
    assert!(log.text() == text);
}

#[test]
fn what_was_queued_before_a_reset_is_written() {
    let ((reached, arrivals), (let_go, go_on)) = (channel(), channel());
    let console = Console::new(vec![port("", true, Gate { reached, go_on })]).unwrap();
    let handle = console.handle();
    let mut driver = Driver::new(console);
    driver.start(0);
    driver.memory.write(BUFFERS, b"first last words").unwrap();
    driver.send(1, 0, &[(BUFFERS, 6, false)]);
    assert_eq!(arrivals.recv().unwrap(), b"first ");
    // The thread is in the middle of a write, as one that has no processor.
    driver.send(1, 1, &[(BUFFERS + 6, 5, false)]);
    driver.send(1, 2, &[(BUFFERS + 11, 5, false)]);
    driver.bus.reset();
    // What the guest makes of its memory then is nothing to it.
    driver.memory.write(BUFFERS, &[b'?'; 16]).unwrap();
    let_go.send(()).unwrap();
    assert_eq!(arrivals.recv().unwrap(), b"last words");
    let_go.send(()).unwrap();
    assert!(handle.drain(PATIENCE));
}

#[test]
fn reset_keeps_so_much_and_no_more() {
    let ((reached, arrivals), (let_go, go_on)) = (channel(), channel());
    let console = Console::new(vec![port("", true, Gate { reached, go_on })]).unwrap();
    let handle = console.handle();
    let mut driver = Driver::new(console);
    driver.start(0);
    driver.send(1, 0, &[(BUFFERS, 1, false)]);
    assert_eq!(arrivals.recv().unwrap().len(), 1);
    // A buffer is as large as a guest says; here each of three is more than half of what is kept.
    const LARGE: u32 = 3 << 20;
    for index in 1..4 {
        driver.send(1, index, &[(0, LARGE, false)]);
    }
    driver.bus.reset();
    let mut kept = 0;
    while kept < 4 << 20 {
        let_go.send(()).unwrap();
        kept += arrivals.recv_timeout(PATIENCE).unwrap().len();
    }
    assert_eq!(kept, 4 << 20);
    let_go.send(()).unwrap();
    assert!(handle.drain(PATIENCE));
    assert!(arrivals.try_recv().is_err());
}

#[test]
fn reboot_starts_over_and_keeps_unread_input() {
    let mut guest = Guest::new();
    guest.bring_up(1, 2);
    guest.handle.input(1, b"kept");
    guest.driver.bus.reset();
    guest.driver.start(3);
    guest.offer_message_room();
    assert!(guest.handle.drain(PATIENCE));
    assert_eq!(guest.logs[1].opened(), [true, false]);
    guest.bring_up(1, 2);
    guest.give_room(1, 64);
    assert_eq!(guest.take(1), b"kept");
}

#[test]
fn driver_without_multiport_gets_the_first_port() {
    let mut guest = Guest::new();
    guest.driver.start(0);
    guest.handle.input(0, b"hi");
    guest.give_room(0, 64);
    assert_eq!(guest.take(0), b"hi");
}

#[test]
fn guest_that_takes_no_messages_is_not_listened_to_for_ever() {
    let mut guest = Guest::new();
    guest.driver.start(3);
    guest
        .driver
        .memory
        .write(BUFFERS, &[0, 0, 0, 0, 0, 0, 1, 0])
        .unwrap();
    let desc = guest.driver.rings[3].desc;
    guest.driver.describe(desc, 0, &[(BUFFERS, 8, false)]);
    for _ in 0..32 {
        guest.driver.offer(CONTROL_TX, 0);
    }
    guest.driver.ring(CONTROL_TX);
    assert!(guest.handle.drain(PATIENCE));
    // Three replies to each, and no more read once 64 wait.
    assert_eq!(guest.driver.used_index(CONTROL_TX), 22);
    for index in 0..32 {
        guest.give_message_room(index);
    }
    eventually("all messages read", || {
        guest.driver.used_index(CONTROL_TX) == 32
    });
}

#[test]
fn messages_to_ports_that_do_not_exist_are_ignored() {
    let mut guest = Guest::new();
    for port in [3, 31, u32::MAX] {
        for event in 0..10 {
            guest.say(port, event, 0);
        }
    }
    guest.say(1, event::PORT_READY, 1);
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 1, vec![]));
    assert_eq!(guest.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn buffers_too_small_for_their_purpose_break_the_device() {
    // A control message that is cut off.
    let mut guest = Guest::new();
    guest.driver.send(CONTROL_TX, 0, &[(BUFFERS, 7, false)]);
    let failure = guest.driver.wait_for_failure();
    assert_eq!(failure, ProtocolError::ShortRequest { queue: 3 });
    // Room that holds no message.
    let mut guest = Guest::new();
    guest.driver.start(3);
    guest.driver.send(CONTROL_RX, 0, &[(BUFFERS, 7, true)]);
    guest
        .driver
        .memory
        .write(BUFFERS, &[0, 0, 0, 0, 0, 0, 1, 0])
        .unwrap();
    guest.driver.send(CONTROL_TX, 0, &[(BUFFERS, 8, false)]);
    let failure = guest.driver.wait_for_failure();
    assert_eq!(failure, ProtocolError::ShortRequest { queue: 2 });
    // Input buffers that hold nothing.
    let (mut driver, handle, _log) = single();
    driver.start(0);
    driver.send(0, 0, &[(BUFFERS, 64, false)]);
    handle.input(0, b"x");
    let failure = driver.wait_for_failure();
    assert_eq!(failure, ProtocolError::ShortRequest { queue: 0 });
}

/// Whatever lies in the rings, the device goes on or asks for a reset, and works after.
#[test]
fn rings_full_of_garbage_are_survived() {
    let mut guest = Guest::new();
    let mut random = Random(0x5eed_c025);
    let (mut served, mut broken) = (0, 0);
    for _ in 0..200 {
        guest.driver.start(3 | INDIRECT | EVENT_INDEX);
        for message in 0..64 {
            // Port, event and value.
            let [port, event, value] = [5, 9, 3].map(|end| random.below(end) as u8);
            let bytes = [port, 0, 0, 0, event, 0, value, 0];
            guest
                .driver
                .memory
                .write(BUFFERS + 8 * message, &bytes)
                .unwrap();
        }
        for queue in 0..8 {
            let ring = guest.driver.rings[queue];
            for index in 0..ring.size {
                // Mostly a buffer of the queue's own direction.
                let mut bent = |usual: u64, other: [u64; 4]| match random.below(4000) {
                    pick @ 0..4 => other[pick as usize],
                    _ => usual,
                };
                let write = if queue % 2 == 0 { 2 } else { 0 };
                let usual = BUFFERS + 8 * u64::from(index);
                let gpa = bent(usual, [0, ring.desc, RAM - 8, u64::MAX]);
                let length = bent(64, [0, 1, 7, 0xffff_fff0]) as u32;
                let flags = bent(write, [1, 3, 4, 0xffff]) as u16;
                let next = bent(u64::from(index), [0, 9, 31, 0x80]) as u16;
                guest
                    .driver
                    .set_descriptor(ring.desc, index, (gpa, length), (flags, next));
            }
            for _ in 0..random.below(u64::from(ring.size)) {
                let head = random.below(u64::from(ring.size)) as u16;
                guest.driver.offer(queue as u16, head);
            }
            guest.driver.ring(queue as u16);
            guest.handle.input(random.below(4) as usize, &[7; 100]);
            guest.handle.resize(random.next() as u16, 3);
        }
        assert!(guest.handle.drain(PATIENCE));
        served += (0..8)
            .map(|queue| usize::from(guest.driver.used_index(queue)))
            .sum::<usize>();
        broken += usize::from(guest.driver.status() & NEEDS_RESET != 0);
    }
    assert!(
        served > 1000 && (30..170).contains(&broken),
        "{served} {broken}"
    );
    guest.driver.start(3);
    guest.offer_message_room();
    guest.say(2, event::PORT_READY, 1);
    assert_eq!(guest.hear(), (2, event::PORT_OPEN, 1, vec![]));
    let before = guest.logs[2].0.lock().unwrap().0.len();
    guest.write(2, "alive");
    assert!(guest.handle.drain(PATIENCE));
    let written = guest.logs[2].0.lock().unwrap().0[before..].to_vec();
    assert!(written.ends_with(b"alive"));
}

fn lone(output: impl PortOutput) -> Console {
    Console::new(vec![port("", true, output)]).unwrap()
}

#[test]
fn output_of_which_a_part_was_taken_goes_on_where_it_stopped() {
    // Given a host that has taken a first batch of a large buffer
    let ((reached, arrivals), (let_go, go_on)) = (channel(), channel());
    let mut driver = Driver::new(lone(Gate { reached, go_on }));
    driver.start(0);
    let text: String = (0..300_000)
        .map(|at| char::from(b'a' + (at % 23) as u8))
        .collect();
    driver.memory.write(BUFFERS, text.as_bytes()).unwrap();
    driver.send(
        1,
        0,
        &[
            (BUFFERS, 100_000, false),
            (BUFFERS + 100_000, 200_000, false),
        ],
    );
    let taken = arrivals.recv().unwrap().len();
    assert!(taken < text.len());
    // When the machine goes on elsewhere
    let log = Log::default();
    let console = lone(log.clone());
    let handle = console.handle();
    let mut driver = driver.moved(|| console);
    drop(let_go);
    driver.bus.resume();
    // Then the rest arrives there, once
    assert_eq!(driver.wait_used(1), (0, 0));
    assert!(handle.drain(PATIENCE));
    assert!(log.text() == text[taken..], "{} bytes", log.text().len());
    assert_eq!(log.opened(), [true]);
}

#[test]
fn input_and_messages_that_wait_are_there_after_a_restore() {
    // Given a port that is open, with input, a new size, and an end that the guest has not seen
    let mut guest = Guest::new();
    guest.bring_up(0, 3);
    guest.bring_up(1, 2);
    guest.driver.bus.pause();
    guest.handle.input(1, b"kept");
    guest.handle.close_input(1);
    guest.handle.resize(100, 30);
    // When it goes on elsewhere
    let logs = [Log::default(), Log::default(), Log::default()];
    let console = Console::new(vec![
        port("console", true, logs[0].clone()),
        port("trapgate.stdin", false, logs[1].clone()),
        port("trapgate.stdout", false, logs[2].clone()),
    ])
    .unwrap();
    let handle = console.handle();
    let driver = guest.driver.moved(|| console);
    let mut guest = Guest {
        driver,
        handle,
        logs,
    };
    guest.driver.bus.resume();
    // Then nothing is lost, and the end comes after the input
    guest.give_room(1, 64);
    assert_eq!(guest.take(1), b"kept");
    assert_eq!(guest.hear(), (0, event::RESIZE, 0, vec![100, 0, 30, 0]));
    assert_eq!(guest.hear(), (1, event::PORT_OPEN, 0, vec![]));
    assert_eq!(guest.handle.input(1, b"more"), 0);
    guest.write(0, "hello");
    assert!(guest.handle.drain(PATIENCE));
    assert_eq!(guest.logs[0].text(), "hello");
    // And whoever takes the output now knows which ports are open
    assert_eq!(
        guest.logs.each_ref().map(Log::opened),
        [vec![true], vec![true], vec![]]
    );
}

#[test]
fn a_console_with_other_ports_is_refused() {
    let (driver, _handle, _log) = single();
    driver.bus.pause();
    let state = driver.bus.save();
    for ports in [
        vec![port("other", true, ())],
        vec![port("", true, ()), port("more", false, ())],
    ] {
        let other = Driver::new(Console::new(ports).unwrap());
        assert!(other.bus.restore(&state).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_state_with_any_number_changed_is_refused_or_does_no_harm(
        index in 0usize..60,
        to in prop_oneof![any::<u64>(), 0u64..0x1_0000, Just(u64::MAX)],
    ) {
        let mut guest = Guest::new();
        guest.bring_up(0, 3);
        guest.handle.input(1, b"waits");
        guest.handle.resize(100, 30);
        guest.driver.bus.pause();
        let make = || {
            let ports = ["console", "trapgate.stdin", "trapgate.stdout"];
            let ports = ports.map(|name| port(name, name == "console", ()));
            Console::new(ports.into()).unwrap()
        };
        if let Some(mut changed) = guest.driver.takes_changed(index, to, make) {
            changed.bus.resume();
            changed.send(1, 0, &[(BUFFERS, 8, false)]);
            changed.send(CONTROL_TX, 0, &[(BUFFERS, 8, false)]);
            changed.bus.pause();
            changed.bus.reset();
        }
    }
}
