//! The agent's control socket over one connection that stays open: requests whose own time is to be measured, or that are
//! too many for a process each.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A stream of snapshots: a line asks for one, a line answers it.
#[derive(Debug)]
pub struct Stream(Control);

impl Stream {
    /// Takes a snapshot.
    ///
    /// # Errors
    /// When the agent refuses, with its words, or goes away.
    pub fn snap(&mut self) -> Result<()> {
        self.0.stream.get_mut().write_all(b"{}\n").context("ask for a snapshot")?;
        let answer = self.0.line()?;
        ensure!(answer.contains("\"lsn\""), "a snapshot was answered: {answer}");
        Ok(())
    }
}

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

    /// Makes the connection a stream of snapshots of a disk.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn stream(mut self, disk: &str) -> Result<Stream> {
        let path = format!("/v1/vdis/{disk}/snapshots/stream");
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: ballast\r\nconnection: upgrade\r\nupgrade: ballast-snapshots\r\n\r\n"
        );
        self.stream.get_mut().write_all(head.as_bytes()).context("ask for a stream")?;
        let status = self.line()?;
        ensure!(status.contains(" 101 "), "{path}: {status}");
        while !self.line()?.is_empty() {}
        Ok(Stream(self))
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
