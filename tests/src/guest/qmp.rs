//! QEMU's monitor (QMP): enough of it to migrate a guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long QEMU may take to answer, and to listen at its start.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the monitor's socket, which may still be about to appear.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let give_up = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < give_up => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => {
                    let words = format!("connect to QEMU's monitor {}", socket.display());
                    return Err(error).context(words);
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).context("monitor")?;
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        qmp.line().context("the monitor's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let bytes = self.reader.read_line(&mut line).context("read from the monitor")?;
        ensure!(bytes > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).with_context(|| format!("the monitor said {line:?}"))
    }

    /// Runs a command and returns what it returned. Errors: what QEMU says against it.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.reader.get_mut(), "{request}").context("write to the monitor")?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            // An event.
        }
    }

    /// Migrates the guest to a QEMU that waits at `socket`; returns when it runs there.
    pub fn migrate(&mut self, socket: &Path, patience: Duration) -> Result<()> {
        let uri = format!("unix:{}", socket.display());
        self.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 1u64 << 32, "downtime-limit": 3000 }),
        )?;
        self.execute("migrate", json!({ "uri": uri }))?;
        let give_up = Instant::now() + patience;
        loop {
            let state = self.execute("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("the migration failed: {state}"),
                _ => ensure!(Instant::now() < give_up, "the migration does not end: {state}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
