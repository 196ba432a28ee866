//! `snap stream`: a snapshot for each line of standard input, over one connection.

use super::agent_commands::at;
use super::output::Output;
use super::report;
use super::snap::name_of;
use crate::api::snapshots::{SnapAnswered, SnapAsked};
use crate::control::SNAPSHOT_STREAM;
use crate::control::client::{Client, Upgraded};
use crate::error::{Failure, Kind, Result};
use std::io::{self, BufRead, Read};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines, ReadHalf, WriteHalf};
use tokio::sync::mpsc::{Receiver, channel};

/// Longest line that is taken for a label: some labels are refused by themselves.
const LINE_BYTES_MAX: u64 = 4096;
/// Snapshots that are asked for and not answered, at most.
const UNANSWERED_MAX: usize = 64;

/// Takes snapshots until standard input ends.
pub async fn run(client: &Client, vdi: &str, out: Output) -> Result<()> {
    let stream = client.upgrade(&at(vdi, "/snapshots/stream")?, SNAPSHOT_STREAM).await?;
    let (answers, asking) = tokio::io::split(stream);
    let (answers, unanswered) = (BufReader::new(answers).lines(), 0);
    let mut talk =
        Talk { client, answers, asking, out, unanswered, asked: 0, failed: 0, kind: None };
    let mut labels = labels();
    let mut more = true;
    while more || talk.unanswered > 0 {
        tokio::select! {
            label = labels.recv(), if more && talk.unanswered < UNANSWERED_MAX => match label {
                Some(Ok(label)) => talk.ask(label).await?,
                Some(Err(error)) => {
                    talk.asked += 1;
                    let words = "standard input cannot be read";
                    talk.refuse(talk.asked, &Failure::caused(Kind::Usage, words, &error));
                    more = false;
                }
                None => more = false,
            },
            answer = talk.answers.next_line() => more &= talk.hear(answer)?,
        }
    }
    talk.end()
}

/// Lines of standard input, read by a thread that ends with the process: nothing else gets out of such a read.
fn labels() -> Receiver<io::Result<String>> {
    let (read, labels) = channel(1);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        while let Some(label) = label_from(&mut input).transpose() {
            let is_end = label.is_err();
            if read.blocking_send(label).is_err() || is_end {
                return;
            }
        }
    });
    labels
}

fn label_from(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    input.take(LINE_BYTES_MAX).read_line(&mut line)?;
    if line.len() as u64 == LINE_BYTES_MAX && !line.ends_with('\n') {
        return Err(io::Error::other(format!("a line has {LINE_BYTES_MAX} bytes and more")));
    }
    let label = line.strip_suffix('\n').unwrap_or(&line);
    Ok((!line.is_empty()).then(|| label.to_owned()))
}

struct Talk<'a> {
    client: &'a Client,
    answers: Lines<BufReader<ReadHalf<Upgraded>>>,
    asking: WriteHalf<Upgraded>,
    out: Output,
    unanswered: usize,
    asked: u64,
    failed: u64,
    /// Of the first failure.
    kind: Option<Kind>,
}

impl Talk<'_> {
    async fn ask(&mut self, label: String) -> Result<()> {
        self.asked += 1;
        // The agent takes a line of some length for no line at all.
        if let Err(words) = blockstore::SnapshotLabel::new(label.clone()) {
            self.refuse(self.asked, &Failure::new(Kind::Usage, words));
            return Ok(());
        }
        let line = serde_json::to_string(&SnapAsked { tag: Some(self.asked), label });
        let line =
            line.map_err(|error| Failure::caused(Kind::Failed, "cannot write a line", &error))?;
        let line = line + "\n";
        let sent = self.asking.write_all(line.as_bytes()).await;
        sent.and(self.asking.flush().await).map_err(|error| self.client.gone(&error))?;
        self.unanswered += 1;
        Ok(())
    }

    /// False if nobody is told any more.
    fn hear(&mut self, answer: io::Result<Option<String>>) -> Result<bool> {
        let answer = answer.map_err(|error| self.client.gone(&error))?;
        let answer = answer.ok_or_else(|| {
            let ended = io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} snapshots have no answer, and may be taken or not", self.unanswered),
            );
            self.client.gone(&ended)
        })?;
        self.unanswered = self.unanswered.saturating_sub(1);
        match serde_json::from_str(&answer).map_err(|error| self.client.not_understood(&error))? {
            SnapAnswered::Taken { snapped, .. } => self.out.line(&snapped, name_of),
            SnapAnswered::Failed { tag, error } => {
                self.refuse(tag.unwrap_or_default(), &error);
                Ok(true)
            }
        }
    }

    /// Tells of it, and goes on.
    fn refuse(&mut self, line: u64, failure: &Failure) {
        report(&failure.clone().within(format_args!("line {line}")), self.out.json);
        self.failed += 1;
        self.kind.get_or_insert(failure.kind);
    }

    fn end(self) -> Result<()> {
        let Some(kind) = self.kind else { return Ok(()) };
        let words = format!(
            "{} of {} snapshots are not known to be taken: see above",
            self.failed, self.asked
        );
        Err(Failure::new(kind, words))
    }
}
