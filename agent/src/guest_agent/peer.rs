//! A guest agent for tests, in the place of a real one, that misbehaves as it is told.
//!
//! As with QEMU, one client is served at a time, the guest does what it was told in that order, whether its client is still there or not, and what it
//! answers to a client that is gone is read by the next one.

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;

/// What the guest agent does in place of what it should.
#[derive(Clone, Debug)]
pub enum Act {
    /// What it should.
    Well,
    /// Does it and does not answer.
    Mute,
    /// Neither does it nor answers.
    Deaf,
    /// Does it, and answers, after that time.
    Late(Duration),
    /// Does not do it and says this error.
    Refuse(&'static str),
    /// Does it and says this error.
    Complain(&'static str),
    /// Does it and sends these bytes for an answer.
    Say(Vec<u8>),
    /// Does it and ends the connection.
    Close,
}

/// See the module.
#[derive(Debug)]
pub struct Peer {
    pub socket: PathBuf,
    pub state: Arc<Mutex<State>>,
    pub dir: TempDir,
}

#[derive(Debug, Default)]
pub struct State {
    /// File systems that are frozen.
    pub frozen: u64,
    /// File systems that there are.
    pub mounted: u64,
    /// What was done, in order.
    pub events: Vec<String>,
    /// What to do to the next commands of that name, instead of what it should.
    pub acts: VecDeque<(&'static str, Act)>,
    /// For the client that is there, or the next one.
    unsent: Vec<u8>,
}

impl Peer {
    /// Listens in a folder of its own.
    pub fn new(acts: impl IntoIterator<Item = (&'static str, Act)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let state = State { mounted: 3, acts: acts.into_iter().collect(), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(serve(listener, Arc::clone(&state)));
        Self { socket, state, dir }
    }

    /// Something happened beside the guest.
    pub fn note(&self, what: &str) {
        self.state.lock().events.push(what.to_owned());
    }

    pub fn is_frozen(&self) -> bool {
        self.state.lock().frozen > 0
    }

    pub fn events(&self) -> String {
        self.state.lock().events.join(" ")
    }

    /// What a former client did not read.
    pub fn leave(&self, bytes: &[u8]) {
        self.state.lock().unsent.extend_from_slice(bytes);
    }
}

async fn serve(listener: UnixListener, state: Arc<Mutex<State>>) {
    let writer = Arc::new(tokio::sync::Mutex::new(None::<OwnedWriteHalf>));
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(guest(told, Arc::clone(&state), Arc::clone(&writer)));
    while let Ok((stream, _)) = listener.accept().await {
        let (read, write) = stream.into_split();
        *writer.lock().await = Some(write);
        send(&state, &writer).await;
        let mut lines = BufReader::new(read);
        let mut line = Vec::new();
        while let Ok(1..) = lines.read_until(b'\n', &mut line).await {
            let _ = tell.send(std::mem::take(&mut line));
        }
        *writer.lock().await = None;
    }
}

type Writer = Arc<tokio::sync::Mutex<Option<OwnedWriteHalf>>>;

async fn send(state: &Mutex<State>, writer: &Writer) {
    let mut writer = writer.lock().await;
    if let Some(open) = &mut *writer {
        let bytes = std::mem::take(&mut state.lock().unsent);
        if open.write_all(&bytes).await.is_err() {
            *writer = None;
        }
    }
}

async fn guest(
    mut told: mpsc::UnboundedReceiver<Vec<u8>>,
    state: Arc<Mutex<State>>,
    writer: Writer,
) {
    while let Some(line) = told.recv().await {
        let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
        let Ok(command) = serde_json::from_slice::<Value>(&line[start..]) else { continue };
        let name = command["execute"].as_str().unwrap_or_default().to_owned();
        let short = name.rsplit('-').next().unwrap_or_default().to_owned();
        let act = {
            let mut state = state.lock();
            let at = state.acts.iter().position(|(of, _)| *of == short);
            at.and_then(|at| state.acts.remove(at)).map_or(Act::Well, |(_, act)| act)
        };
        if let Act::Late(time) = act {
            tokio::time::sleep(time).await;
        }
        let mut answer = match act {
            Act::Deaf => continue,
            Act::Refuse(words) => {
                json!({ "error": { "class": "GenericError", "desc": words } }).to_string().into()
            }
            _ => state.lock().obey(&short, &command),
        };
        match act {
            Act::Mute => continue,
            Act::Close => {
                *writer.lock().await = None;
                continue;
            }
            Act::Complain(words) => {
                answer = json!({ "error": { "desc": words } }).to_string().into();
            }
            Act::Say(bytes) => answer = bytes,
            _ => {}
        }
        answer.push(b'\n');
        state.lock().unsent.extend(answer);
        send(&state, &writer).await;
    }
}

impl State {
    fn obey(&mut self, command: &str, whole: &Value) -> Vec<u8> {
        self.events.push(command.to_owned());
        let returned = match command {
            "status" => json!(if self.frozen > 0 { "frozen" } else { "thawed" }),
            "freeze" => {
                self.frozen = self.mounted;
                json!(self.frozen)
            }
            "thaw" => json!(std::mem::take(&mut self.frozen)),
            "delimited" => {
                let answer = json!({ "return": whole["arguments"]["id"] }).to_string();
                return [&[0xff], answer.as_bytes()].concat();
            }
            other => panic!("the guest agent was asked for {other}"),
        };
        json!({ "return": returned }).to_string().into()
    }
}
