//! Virtual calls: a program of many small objects, as C++ and scripting languages run them.

use crate::random::{Random, mix};
use crate::{Setting, Work};

trait Node {
    fn take(&mut self, value: u64) -> u64;
    fn weight(&self) -> u64;
}

macro_rules! nodes {
    ($($name:ident($this:ident, $value:ident) $body:expr;)*) => {
        $(
            struct $name {
                state: u64,
            }

            impl Node for $name {
                fn take(&mut self, $value: u64) -> u64 {
                    let $this = self;
                    $body
                }

                fn weight(&self) -> u64 {
                    self.state & 0xff
                }
            }
        )*

        fn node(kind: u64, state: u64) -> Box<dyn Node> {
            const MAKE: &[fn(u64) -> Box<dyn Node>] = &[$(|state| Box::new($name { state }),)*];
            MAKE[kind as usize % MAKE.len()](state)
        }
    };
}

nodes! {
    Counter(this, value) { this.state += 1; value + this.state };
    Adder(this, value) value.wrapping_add(this.state);
    Mixer(this, value) { this.state = this.state.rotate_left(7) ^ value; this.state };
    Largest(this, value) { this.state = this.state.max(value >> 8); this.state };
    Scale(this, value) value.wrapping_mul(this.state | 1);
    Toggle(this, value) {
        this.state = !this.state;
        if this.state & 1 == 1 { value ^ this.state } else { value }
    };
    Delay(this, value) std::mem::replace(&mut this.state, value);
    Choose(this, value) if value & 4 == 0 { value >> 1 } else { value.wrapping_add(this.state) };
}

pub(crate) fn run(setting: &Setting) -> Work {
    let passes = 16_000 / setting.scale;
    Box::new(move || {
        let mut random = Random(3);
        let mut nodes: Vec<Box<dyn Node>> = (0..1000)
            .map(|_| node(random.next(), random.next()))
            .collect();
        let mut value = 0;
        for _ in 0..passes {
            for node in &mut nodes {
                value = node.take(value);
                value ^= node.weight();
            }
        }
        Ok(nodes
            .iter()
            .fold(value, |all, node| mix(all, node.weight())))
    })
}
