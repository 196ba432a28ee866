//! The agent's control socket over one connection that stays open: requests whose own time is to be measured, or that are
//! too many for a process each.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(300);

/// A connection to an agent.
#[derive(Debug)]
pub struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Connects to the agent of a run directory.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join("control.sock");
        let stream = UnixStream::connect(&path)
            .with_context(|| format!("connect to the agent at {}", path.display()))?;
        stream.set_read_timeout(Some(TIMEOUT)).context("set a time limit")?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// GET.
    ///
    /// # Errors
    /// When the agent refuses, with its words, or goes away.
    pub fn get(&mut self, path: &str) -> Result<Value> {
        self.request("GET", path, "")
    }

    /// POST.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn post(&mut self, path: &str, body: &Value) -> Result<Value> {
        self.request("POST", path, &body.to_string())
    }

    fn request(&mut self, method: &str, path: &str, body: &str) -> Result<Value> {
        let what = || format!("{method} {path}");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: ballast\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(head.as_bytes()).with_context(what)?;
        let status = self.line().with_context(what)?;
        let mut length = 0;
        loop {
            let line = self.line().with_context(what)?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length =
                    value.trim().parse().with_context(|| format!("{method} {path}: {line}"))?;
            }
        }
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer).with_context(what)?;
        let text = String::from_utf8_lossy(&answer);
        ensure!(status.contains(" 2"), "{method} {path}: {status}: {text}");
        serde_json::from_str(&text).with_context(|| format!("{method} {path} was answered: {text}"))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "the agent closed the connection");
        Ok(line.trim_end().to_owned())
    }
}
