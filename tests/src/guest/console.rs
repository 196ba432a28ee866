//! The job's serial line: result lines are collected, all lines go to a log file, the last ones
//! stay in memory.
//!
//! The kernel's console is another serial port, so kernel messages never break a result line in
//! two. A guest that floods its line cannot fill the rig's memory: beyond [`RESULTS_MAX`] results
//! the reader stops.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a result line begins with.
pub const RESULT_MARK: &str = "BALLAST-RESULT ";
/// Results kept of one guest; a job that reports more is taken for broken.
pub const RESULTS_MAX: usize = 100_000;
/// Lines kept for error messages.
const TAIL_LINES_MAX: usize = 40;
/// Longest line taken over; the rest of a longer one counts as the next line.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// Key and value of a result line, or `None` for any other line.
pub fn parse_result(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.trim_end().strip_prefix(RESULT_MARK)?.split_once('=')?;
    (!key.is_empty() && !key.contains(' ')).then_some((key, value))
}

#[derive(Debug, Default)]
struct State {
    results: Vec<(String, String)>,
    tail: VecDeque<String>,
    closed: bool,
}

/// Reads a guest's line on a thread of its own until the line closes.
#[derive(Debug)]
pub struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

impl Console {
    /// Reads `line` to its end and copies it to `log`.
    pub fn read(line: impl Read + Send + 'static, mut log: impl Write + Send + 'static) -> Console {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let for_reader = Arc::clone(&shared);
        let reader = std::thread::spawn(move || {
            let mut line = BufReader::new(line);
            let mut bytes = Vec::new();
            while let Ok(1..) = {
                bytes.clear();
                line.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes)
            } {
                let _ = log.write_all(&bytes);
                let text = String::from_utf8_lossy(&bytes);
                let mut state = lock(&for_reader.0);
                if state.tail.len() == TAIL_LINES_MAX {
                    state.tail.pop_front();
                }
                state.tail.push_back(text.trim_end().to_owned());
                if let Some((key, value)) = parse_result(&text) {
                    if state.results.len() == RESULTS_MAX {
                        break;
                    }
                    state.results.push((key.to_owned(), value.to_owned()));
                    for_reader.1.notify_all();
                }
            }
            lock(&for_reader.0).closed = true;
            for_reader.1.notify_all();
        });
        Console { shared, reader: Some(reader) }
    }

    /// All results so far, in the order reported.
    pub fn results(&self) -> Vec<(String, String)> {
        lock(&self.shared.0).results.clone()
    }

    /// The first result with this key at or after position `from`, and the position after it;
    /// `None` after `patience`. Returns at once when the line is closed and there is none.
    pub fn wait_for(&self, key: &str, from: usize, patience: Duration) -> Option<(usize, String)> {
        let find = |state: &State| {
            let found = state.results.iter().enumerate().skip(from).find(|(_, (k, _))| k == key);
            found.map(|(position, (_, value))| (position + 1, value.clone()))
        };
        let (state, condition) = &*self.shared;
        let (state, _) = condition
            .wait_timeout_while(lock(state), patience, |s| !s.closed && find(s).is_none())
            .unwrap_or_else(PoisonError::into_inner);
        find(&state)
    }

    /// True when the guest's side is closed (QEMU has ended) and everything was read.
    pub fn is_closed(&self) -> bool {
        lock(&self.shared.0).closed
    }

    /// The last lines, for error messages.
    pub fn tail(&self) -> String {
        Vec::from(lock(&self.shared.0).tail.clone()).join("\n")
    }

    /// Waits until the line is closed and read to its end. The process that holds the line must
    /// have ended.
    pub fn join(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_result_lines_are_results() {
        assert_eq!(parse_result("BALLAST-RESULT ready=6.1.0\r\n"), Some(("ready", "6.1.0")));
        assert_eq!(parse_result("BALLAST-RESULT a=b=c"), Some(("a", "b=c")));
        assert_eq!(parse_result("BALLAST-RESULT a="), Some(("a", "")));
        assert_eq!(parse_result("BALLAST-RESULT =b"), None);
        assert_eq!(parse_result("BALLAST-RESULT two words=b"), None);
        assert_eq!(parse_result("+ result a b"), None);
        assert_eq!(parse_result("BALLAST-RESULT"), None);
    }

    #[test]
    fn results_are_found_by_key_from_a_position() {
        let text =
            "noise\nBALLAST-RESULT a=1\nBALLAST-RESULT b=2\n\u{1}\u{2}\nBALLAST-RESULT a=3\n";
        let mut console = Console::read(text.as_bytes(), std::io::sink());
        console.join();
        let patience = Duration::from_secs(60);
        assert!(console.is_closed());
        assert_eq!(console.wait_for("a", 0, patience), Some((1, "1".to_owned())));
        assert_eq!(console.wait_for("a", 1, patience), Some((3, "3".to_owned())));
        assert_eq!(console.wait_for("c", 0, patience), None);
        assert!(console.tail().starts_with("noise\n"));
    }

    #[test]
    fn a_flood_without_newlines_ends_in_bounded_memory() {
        let mut console = Console::read(std::io::repeat(b'x').take(40 << 20), std::io::sink());
        console.join();
        assert!(console.tail().len() <= TAIL_LINES_MAX * (LINE_BYTES_MAX as usize + 1));
        assert!(console.results().is_empty());
    }
}
