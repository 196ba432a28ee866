//! What the demo prints: one line per event, with the time since the start.

use std::fmt::Display;
use std::io::Write;
use std::time::{Duration, Instant};

/// Prints a line. A reader who has gone (`make demo | head`) does not end the demo halfway.
pub fn line(text: impl Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints the events of one run.
#[derive(Debug)]
pub struct Report {
    started: Instant,
}

impl Report {
    /// Starts the clock and prints the title.
    pub fn new(title: impl Display) -> Report {
        line(format_args!("{title}\n"));
        Report { started: Instant::now() }
    }

    /// Something happened.
    pub fn event(&self, text: impl Display) {
        let seconds = self.started.elapsed().as_secs_f64();
        line(format_args!("{seconds:6.1} s  {text}"));
    }

    /// More about the event before.
    pub fn detail(&self, text: impl Display) {
        line(format_args!("{:8}  {text}", ""));
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// Bytes for people: `3.5 MiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A duration for people: `340 ms`, `12.3 s`.
pub fn time(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(1023), "1023 bytes");
        assert_eq!(size(3 << 19), "1.5 MiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
        assert_eq!(time(Duration::from_millis(999)), "999 ms");
        assert_eq!(time(Duration::from_millis(12_340)), "12.3 s");
    }
}
