//! Arithmetic in doubles: bodies that attract each other.

use crate::random::{Random, mix};
use crate::{Setting, Work};

#[derive(Clone, Copy)]
struct Body {
    place: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

const STEP: f64 = 0.001;

fn advance(bodies: &mut [Body; 5]) {
    for first in 0..5 {
        for second in first + 1..5 {
            let (a, b) = (bodies[first], bodies[second]);
            let apart: [f64; 3] = std::array::from_fn(|axis| a.place[axis] - b.place[axis]);
            // Softened, so that bodies may meet.
            let square: f64 = apart.iter().map(|x| x * x).sum::<f64>() + 0.01;
            let pull = STEP / (square * square.sqrt());
            for axis in 0..3 {
                bodies[first].speed[axis] -= apart[axis] * b.mass * pull;
                bodies[second].speed[axis] += apart[axis] * a.mass * pull;
            }
        }
    }
    for body in bodies {
        for axis in 0..3 {
            body.place[axis] += body.speed[axis] * STEP;
        }
    }
}

pub(crate) fn run(setting: &Setting) -> Work {
    let steps = 2_000_000 / setting.scale;
    Box::new(move || {
        let mut random = Random(4);
        let mut number = || (random.next() >> 11) as f64 / (1_u64 << 53) as f64 - 0.5;
        let mut bodies = [(); 5].map(|()| Body {
            place: [number(), number(), number()],
            speed: [number(), number(), number()],
            mass: number() + 1.0,
        });
        for _ in 0..steps {
            advance(&mut bodies);
        }
        let places = bodies.iter().flat_map(|body| body.place);
        Ok(places.fold(0, |check, place| mix(check, place.to_bits())))
    })
}
