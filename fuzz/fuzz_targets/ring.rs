//! A virtqueue and the inflight region of its front end, both filled and changed at any moment by somebody hostile,
//! through deaths of the process that serves them.
//!
//! The input is a script: sizes and places, both memories, then steps. Whatever they hold, no step may panic or loop, every
//! head that is taken has a place in the ring, and after a death no request is served twice.

#![no_main]

use ballast_fuzz::Script;
use ballast_vhost::fuzzing::HostileRing;
use libfuzzer_sys::fuzz_target;

/// Steps of one run.
const STEPS_MAX: usize = 256;

fuzz_target!(|input: &[u8]| {
    let mut script = Script::new(input);
    let shape = script.byte();
    // Mostly rings that can be; now and then any number.
    let size = if shape & 0x80 == 0 { 1 << (shape & 7) } else { script.number(2) as u16 };
    let places = match shape & 0x40 {
        0 => [0, 0x1000, 0x2000],
        _ => [0; 3].map(|_: u16| script.number(2) as u16),
    };
    let (guest_len, region_len) = (script.number(2) as usize, script.number(2) as usize);
    let (guest, region) = (script.bytes(guest_len), script.bytes(region_len));
    let mut ring = HostileRing::new(guest, region, size, places, shape & 0x20 != 0);
    // Index and base agree in most runs, or nothing would ever be taken.
    ring.start(script.number(2) as u16, 0, 0, 0);
    for _ in 0..STEPS_MAX {
        if script.is_over() {
            break;
        }
        let step = script.byte();
        match step & 7 {
            0 => {
                let (base, queue) = (script.number(2) as u16, u16::from(script.byte() & 3));
                let (offset, short) = match step & 8 {
                    0 => (0, 0),
                    _ => (script.number(2) << 6, script.number(2)),
                };
                ring.start(base, queue, offset, short);
            }
            1..=3 => ring.pop(),
            4 | 5 => ring.push(script.byte(), step & 8 == 0),
            kind => {
                let at = script.number(2) as u16;
                let len = usize::from(step >> 3 & 15) + 1;
                ring.scribble(kind == 7, at, script.bytes(len));
            }
        }
    }
});
