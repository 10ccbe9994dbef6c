//! The entropy device (virtio 1.2, 5.4): random bytes from the host's kernel.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use trapgate_memory::GuestMemory;
use trapgate_pci::StateError;

use crate::queue::{copy_in, length};
use crate::worker::{Job, Worker};
use crate::{
    Activation, Chain, Device, DeviceState, DeviceType, Notifier, ProtocolError, SavedDevice,
    Virtqueue,
};

/// A request gets no more than this, however much it asks for: the standard wants one byte at
/// least, and this bounds a step of the worker.
const MOST: u64 = 64 << 10;

struct Active {
    queue: Virtqueue,
    memory: Arc<GuestMemory>,
    notifier: Arc<Notifier>,
}

#[derive(Default)]
struct Source {
    active: Option<Active>,
    chain: Chain,
}

impl Source {
    fn serve(active: &mut Active, chain: &mut Chain) -> Result<bool, ProtocolError> {
        let Active { queue, memory, .. } = active;
        if !queue.pop(chain)? {
            return Ok(false);
        }
        let wanted = length(&chain.writable).min(MOST);
        if wanted == 0 {
            return Err(ProtocolError::ShortRequest {
                queue: queue.index(),
            });
        }
        let mut block = [0; 4096];
        let mut written = 0;
        while written < wanted {
            let size = block.len().min((wanted - written) as usize);
            let random = fill(&mut block[..size]);
            written += copy_in(memory, &chain.writable, written, random) as u64;
            if random.len() < size {
                break;
            }
        }
        queue.push(chain.head, written as u32)?;
        queue.signal()?;
        Ok(true)
    }
}

/// Random bytes, as many as the host gives: all, unless it forbids the call.
fn fill(block: &mut [u8]) -> &[u8] {
    let mut done = 0;
    while done < block.len() {
        match getrandom(&mut block[done..], GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    &block[..done]
}

impl Job for Source {
    type Outside = ();

    fn step(&mut self, (): &mut ()) -> bool {
        let Some(active) = &mut self.active else {
            return false;
        };
        Self::serve(active, &mut self.chain).unwrap_or_else(|error| {
            if let Some(active) = self.active.take() {
                active.notifier.fail(error);
            }
            false
        })
    }
}

/// An entropy source.
pub struct Entropy {
    worker: Worker<Source>,
}

impl Entropy {
    /// A source, with its thread; the error is that of starting it.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            worker: Worker::start("entropy", Source::default(), ())?,
        })
    }
}

impl Device for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) {
        let Activation {
            features: _,
            memory,
            notifier,
            queues,
        } = activation;
        let queue = queues.into_iter().next().flatten();
        self.worker.visit(|source| {
            source.active = queue.map(|queue| Active {
                queue,
                memory,
                notifier,
            });
        });
        self.worker.kick();
    }

    fn notify(&mut self, _queue: u16) {
        self.worker.kick();
    }

    fn reset(&mut self) {
        self.worker.visit(|source| source.active = None);
    }

    fn pause(&mut self) {
        self.worker.pause();
    }

    fn resume(&mut self) {
        self.worker.resume();
    }

    fn save(&mut self) -> SavedDevice {
        self.worker.visit(|source| {
            let Source {
                active,
                // Empty between two requests.
                chain: _,
            } = source;
            let queue = active.as_ref().map(|active| active.queue.position());
            SavedDevice {
                queues: vec![queue],
                state: DeviceState::Entropy,
            }
        })
    }

    fn restore(
        &mut self,
        state: &DeviceState,
        activation: Option<Activation>,
    ) -> Result<(), StateError> {
        let DeviceState::Entropy = state else {
            return Err(state.of_another("entropy"));
        };
        self.worker.pause();
        if let Some(activation) = activation {
            self.activate(activation);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{BUFFERS, Driver};

    fn entropy() -> Driver {
        let mut driver = Driver::new(Entropy::new().unwrap());
        driver.start(0);
        driver
    }

    #[test]
    fn a_request_that_waits_is_served_after_a_restore() {
        let mut driver = entropy();
        assert_eq!(driver.request(0, &[(BUFFERS, 16, true)]), 16);
        driver.bus.pause();
        driver.send(0, 0, &[(BUFFERS, 32, true)]);
        let mut driver = driver.moved(|| Entropy::new().unwrap());
        driver.bus.resume();
        assert_eq!(driver.wait_used(0), (0, 32));
        assert_ne!(driver.read(BUFFERS, 32), [0; 32]);
    }

    #[test]
    fn buffers_are_filled_with_bytes_that_differ_each_time() {
        let mut driver = entropy();
        let pieces = [(BUFFERS, 5000, true), (BUFFERS + 0x4000, 100, true)];
        assert_eq!(driver.request(0, &pieces), 5100);
        let first = driver.read(BUFFERS, 5000);
        driver.request(0, &pieces);
        let second = driver.read(BUFFERS, 5000);
        assert_ne!(first, second);
        // 5000 random bytes without one of the 256 values: less likely than 1 in 10^6.
        let mut seen = [false; 256];
        first
            .iter()
            .for_each(|byte| seen[usize::from(*byte)] = true);
        assert_eq!(seen, [true; 256]);
        assert_ne!(driver.read(BUFFERS + 0x4000, 100), [0; 100]);
        driver.sink.wait(0x41);
    }

    #[test]
    fn huge_request_gets_a_part_of_what_it_asks_for() {
        let mut driver = entropy();
        assert_eq!(driver.request(0, &[(BUFFERS, 1 << 20, true)]), 64 << 10);
        assert_eq!(driver.read(BUFFERS + (64 << 10), 64), [0; 64]);
    }

    #[test]
    fn request_with_no_room_breaks_the_device() {
        let mut driver = entropy();
        driver.send(0, 0, &[(BUFFERS, 64, false)]);
        let expected = ProtocolError::ShortRequest { queue: 0 };
        assert_eq!(driver.wait_for_failure(), expected);
    }
}
