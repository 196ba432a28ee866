//! What happened, as one number: two runs of a seed must come to the same. `SIM_TRACE=1` prints every step.

use parking_lot::Mutex;
use tokio::time::Instant;

/// Running hash over everything that was noted.
#[derive(Debug)]
pub struct Trace {
    state: Mutex<State>,
    verbose: bool,
}

#[derive(Debug)]
struct State {
    hash: u64,
    steps: u64,
    began: Option<Instant>,
}

impl Trace {
    pub fn new() -> Self {
        let state = State { hash: 0xcbf2_9ce4_8422_2325, steps: 0, began: None };
        Self { state: Mutex::new(state), verbose: std::env::var_os("SIM_TRACE").is_some() }
    }

    /// A life begins: its clock starts at nought.
    pub fn begin_life(&self) {
        self.state.lock().began = Some(Instant::now());
    }

    /// It ended: what is noted between lives has no time.
    pub fn end_life(&self) {
        self.state.lock().began = None;
    }

    pub fn note(&self, words: [u64; 4]) {
        let mut state = self.state.lock();
        let now = state.began.map_or(0, |began| began.elapsed().as_millis() as u64);
        for word in words.into_iter().chain([now]) {
            state.hash = (state.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        state.steps += 1;
        if self.verbose {
            eprintln!("{:8} {now:9} ms  {words:x?}", state.steps);
        }
    }

    pub fn hash(&self) -> u64 {
        self.state.lock().hash
    }
}
