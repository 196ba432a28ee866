//! Goal: snapshots that are asked for by the line are as exact and as durable as any, with the store there or away, and before a
//! kill of the agent; whoever misuses a stream hurts neither the disk nor others.
//!
//! Method: `snap stream` and bare connections on a real agent; a chunk is written before each snapshot, and what is in the store
//! afterwards is compared byte by byte.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::agent::find_binary;
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{
    CHUNK, Content, Disk, San, control, detach, ensure_same, fill_log, in_the_store, until,
};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
/// Nothing here takes this long; what does hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// As the agent has it.
const STREAMS_MAX: usize = 64;
/// Snapshots of a stream that are under way, likewise.
const UNANSWERED_MAX: usize = 64;

/// `snap stream db`, under way; it ends with the test.
struct Stream {
    child: Child,
    labels: Option<ChildStdin>,
    answers: Option<BufReader<ChildStdout>>,
    failures: BufReader<ChildStderr>,
}

impl Stream {
    fn start(rig: &mut AgentRig) -> Result<Self> {
        let mut command = Command::new(find_binary()?);
        command
            .arg("--run-dir")
            .arg(rig.config().run_dir())
            .args(["--json", "snap", "stream", "db"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let labels = child.stdin.take();
        let answers = child.stdout.take().map(BufReader::new);
        let failures = BufReader::new(child.stderr.take().context("standard error")?);
        Ok(Self { child, labels, answers, failures })
    }

    fn ask(&mut self, label: &str) -> Result<()> {
        let labels = self.labels.as_mut().context("it was ended")?;
        Ok(writeln!(labels, "{label}")?)
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        let answers = self.answers.as_mut().context("nobody reads it")?;
        ensure!(answers.read_line(&mut line)? > 0, "no answer: {:?}", self.child.wait());
        Ok(serde_json::from_str(&line)?)
    }

    fn cut(&mut self, label: &str) -> Result<u64> {
        self.ask(label)?;
        let answer = self.answer()?;
        ensure!(answer["label"] == label && answer["place"] == "log", "{answer}");
        answer["lsn"].as_u64().context("an LSN")
    }

    /// What it says instead of an answer.
    fn failure(&mut self) -> Result<String> {
        let mut line = String::new();
        self.failures.read_line(&mut line)?;
        Ok(line)
    }

    /// How it ends once there is no more to ask: exit code, and what it said of failures.
    fn end(mut self) -> Result<(Option<i32>, String)> {
        drop(self.labels.take());
        let mut rest = String::new();
        self.answers.as_mut().context("nobody reads it")?.read_to_string(&mut rest)?;
        ensure!(rest.is_empty(), "one more answer than there were labels: {rest}");
        let mut words = String::new();
        self.failures.read_to_string(&mut words)?;
        Ok((self.child.wait()?.code(), words))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn snapshots_by_the_line_are_exact_with_the_store_there_away_and_before_a_kill() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let mut stream = Stream::start(&mut rig)?;
    let (mut now, mut cuts) = (Content::new(), BTreeMap::new());
    for n in 0..60u8 {
        if n == 30 {
            rig.agent()?.drain()?;
            san.cut();
        }
        let at = u64::from(n) * 7 % (DISK / CHUNK as u64) * CHUNK as u64;
        disk.write(at, n + 1)?;
        now.insert(at, n + 1);
        let label = if n % 3 == 0 { format!("number {n}") } else { String::new() };
        cuts.insert(stream.cut(&label)?, now.clone());
    }
    ensure!(cuts.len() == 60, "an LSN came twice");
    rig.kill()?;
    let _ = stream.ask("too late");
    let (code, words) = stream.end()?;
    ensure!(code == Some(4) && words.contains("went away"), "{code:?}: {words}");
    rig.start().context("start without the store")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.write(0, 200)?;
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    rig.agent()?.drain()?;
    let list = control(&rig, "snap list db --oldest-first")?;
    let listed = list["snapshots"].as_array().context("a list")?;
    ensure!(listed.iter().filter_map(|row| row["lsn"].as_u64()).eq(cuts.keys().copied()), "{list}");
    for (lsn, content) in &cuts {
        let what = format!("db@{lsn}");
        ensure_same(&in_the_store(&rig, &what)?, DISK, content, &what)?;
    }
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn what_cannot_be_taken_is_said_and_the_stream_goes_on() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let (code, words) = Stream::start(&mut rig)?.end()?;
    ensure!(code == Some(6) && words.contains("'db' is not attached"), "{code:?}: {words}");
    rig.agent()?.attach("db")?;
    let (code, words) = Stream::start(&mut rig)?.end()?;
    ensure!(code == Some(0) && words.is_empty(), "{code:?}: {words}");
    let mut stream = Stream::start(&mut rig)?;
    stream.ask(&"x".repeat(65))?;
    stream.ask(&"x".repeat(3000))?;
    stream.ask("1834")?;
    // Labels of schedules are theirs.
    stream.ask("auto 10s 2026-11-22T08:00:00.000Z")?;
    stream.cut("good")?;
    let (code, words) = stream.end()?;
    for words_of_one in ["64 bytes", "is a number", "schedules", "4 of 5 snapshots"] {
        ensure!(words.contains(words_of_one), "'{words_of_one}' is not in: {words}");
    }
    ensure!(code == Some(2), "{code:?}");
    // One of a disk that goes and comes back.
    let mut stream = Stream::start(&mut rig)?;
    stream.cut("before")?;
    detach(&rig)?;
    stream.ask("meanwhile")?;
    let failure = stream.failure()?;
    ensure!(failure.contains("not attached to this host"), "{failure}");
    rig.agent()?.attach("db")?;
    stream.cut("after")?;
    let (code, words) = stream.end()?;
    ensure!(code == Some(6) && words.contains("1 of 3 snapshots"), "{code:?}: {words}");
    let list = control(&rig, "snap list db")?["snapshots"].to_string();
    ensure!(list.contains("after") && !list.contains("meanwhile"), "{list}");
    // Who is read by nobody takes no more.
    let mut stream = Stream::start(&mut rig)?;
    stream.cut("read")?;
    drop(stream.answers.take());
    wait_until(|| Ok(stream.ask("unread").is_err()))?;
    ensure!(stream.child.wait()?.code() == Some(0));
    rig.shut_down()?;
    rig.check_store()
}

/// A bare connection that is a stream of snapshots of `db`, or what it was answered instead.
fn connect(rig: &mut AgentRig, head: &str, more: &str) -> Result<(UnixStream, String)> {
    let mut stream = UnixStream::connect(rig.config().run_dir().join("control.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET /v1/vdis/db/snapshots/stream HTTP/1.1\r\nhost: x\r\n{head}\r\n{more}")?;
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? > 0 {
        head.push(byte[0]);
    }
    Ok((stream, String::from_utf8_lossy(&head).into_owned()))
}

const UPGRADE: &str = "connection: Upgrade\r\nupgrade: ballast-snapshots\r\n";

#[test]
fn misuse_of_a_stream_hurts_nobody_else() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;

    for without in ["", "connection: Upgrade\r\nupgrade: websocket\r\n"] {
        let head = connect(&mut rig, without, "")?.1;
        ensure!(head.starts_with("HTTP/1.1 400"), "{without}: {head}");
    }
    // What comes before the answer's head counts, and what makes no sense is answered.
    let lines = "{\"tag\":7}\n7\n\0\n{\"tag\":8,\"label\":\"x\"}\n";
    let (stream, head) = connect(&mut rig, UPGRADE, lines)?;
    ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
    let mut answers = BufReader::new(stream).lines();
    // What is refused at once may come first.
    let mut said: Vec<String> = answers.by_ref().take(4).collect::<Result<_, _>>()?;
    said.sort();
    let is_taken = |said: &str, tag: u64| {
        said.contains(&format!("\"tag\":{tag}")) && said.contains("\"lsn\":")
    };
    ensure!(said[0].contains("error") && said[1].contains("makes no sense"), "{said:?}");
    ensure!(is_taken(&said[2], 7) && is_taken(&said[3], 8), "{said:?}");
    // A line without an end is cut off.
    let (mut stream, _) = connect(&mut rig, UPGRADE, "")?;
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    let mut words = String::new();
    let _ = stream.read_to_string(&mut words);
    ensure!(words.contains("asks for nothing") && words.lines().count() == 1, "{words}");

    // Who does not listen is cut off, before long; the disk goes on.
    let (mut deaf, _) = connect(&mut rig, UPGRADE, "")?;
    deaf.set_write_timeout(Some(PATIENCE))?;
    let cut_off = loop {
        if let Err(error) = deaf.write_all(b"{\"label\":\"deaf\"}\n") {
            break error.kind();
        }
    };
    // It would block if the agent had only ceased to read.
    ensure!(matches!(cut_off, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{cut_off}");
    disk.write(0, 1)?;
    // What it asked for and the agent had not begun with by then is not taken.
    let mut heard = Vec::new();
    let _ = deaf.read_to_end(&mut heard);
    let answered = heard.iter().filter(|byte| **byte == b'\n').count();
    let taken = labelled(&rig, "deaf")?;
    ensure!(
        answered > 100 && (answered..=answered + UNANSWERED_MAX).contains(&taken),
        "{answered} of {taken} were answered"
    );
    // Who listens is not, however much was asked at once; nor who says no more.
    let (mut eager, _) = connect(&mut rig, UPGRADE, "")?;
    let mut listener = eager.try_clone()?;
    let heard = std::thread::spawn(move || -> Result<String> {
        let mut said = String::new();
        listener.read_to_string(&mut said)?;
        Ok(said)
    });
    eager.write_all("{}\n".repeat(1000).as_bytes())?;
    eager.shutdown(Shutdown::Write)?;
    let heard = heard.join().expect("the thread")?;
    let lsns: Vec<u64> = heard
        .lines()
        .map(|line| serde_json::from_str::<Value>(line)?["lsn"].as_u64().context("an LSN"))
        .collect::<Result<_>>()?;
    ensure!(lsns.len() == 1000 && lsns.is_sorted_by(|a, b| a < b), "{} answers", lsns.len());

    // No more than so many, and each place comes back.
    drop((answers, stream, deaf, eager));
    let mut open = Vec::new();
    let refused = loop {
        let (stream, head) = connect(&mut rig, UPGRADE, "")?;
        if !head.starts_with("HTTP/1.1 101") {
            break head;
        }
        open.push(stream);
        ensure!(open.len() <= STREAMS_MAX, "there are more than {STREAMS_MAX}");
    };
    ensure!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    control(&rig, "snap create db --label still")?;
    open.clear();
    wait_until(|| {
        let (stream, head) = connect(&mut rig, UPGRADE, "")?;
        if head.starts_with("HTTP/1.1 101") {
            open.push(stream);
        }
        Ok(open.len() == STREAMS_MAX)
    })?;
    disk.write(0, 2)?;
    drop(disk);
    // They do not keep the agent from ending.
    rig.shut_down()?;
    drop(open);
    rig.check_store()
}

/// How many snapshots of `db` have this label.
fn labelled(rig: &AgentRig, label: &str) -> Result<usize> {
    let (mut found, mut beyond) = (0, 0);
    loop {
        let page = control(rig, &format!("snap list db --oldest-first --beyond {beyond}"))?;
        let rows = page["snapshots"].as_array().context("a list")?;
        let Some(last) = rows.last() else { return Ok(found) };
        beyond = last["lsn"].as_u64().context("an LSN")?;
        found += rows.iter().filter(|row| row["label"] == label).count();
    }
}

#[test]
fn a_stream_that_waits_for_room_in_the_log_ends_with_its_client() -> Result<()> {
    const DEAD: usize = 8;
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 64MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    san.cut();
    fill_log(&rig, &mut disk, 64 * MIB)?;
    let held = |rig: &AgentRig| -> Result<usize> {
        let pid = rig.agent()?.process().pid();
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    };
    let (mut waiting, _) = connect(&mut rig, UPGRADE, "{\"label\":\"waits\"}\n")?;
    let before = held(&rig)?;
    let mut dead = Vec::new();
    for _ in 0..DEAD {
        dead.push(connect(&mut rig, UPGRADE, "{\"label\":\"dead\"}\n")?.0);
    }
    wait_until(|| Ok(held(&rig)? >= before + DEAD))?;
    drop(dead);
    // The SAN's sessions come and go meanwhile.
    wait_until(|| Ok(held(&rig)? < before + DEAD / 2))?;
    san.restore();
    ensure!(disk.answer()?, "the write that waited failed");
    let mut said = vec![0; 1024];
    let len = waiting.read(&mut said)?;
    ensure!(String::from_utf8_lossy(&said[..len]).contains("\"lsn\":"), "{said:?}");
    drop((waiting, disk));
    rig.shut_down()?;
    rig.check_store()
}

fn wait_until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < PATIENCE, "it never comes");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
