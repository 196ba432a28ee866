//! The daemon's control socket: any bytes, and requests that nearly make sense.
//!
//! The input is a script of requests to one daemon, which lives as long as the run and starts each input without disks.
//! Whatever comes in, no thread of it may panic, each request that was sent whole is answered, and afterwards the daemon
//! still tells its status.

#![no_main]

use ballast_fuzz::Script;
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// Requests of one input.
const REQUESTS_MAX: usize = 12;
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(10);
const NAMES: [&str; 3] = ["a", "b%2F", "control"];

fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("control-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the daemon");
        agent::fuzzing::daemon(&folder)
    })
}

/// Sends bytes, which may not be `whole`, and reads what comes until the end.
fn send(bytes: &[u8], whole: bool) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket()).expect("the daemon listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut answer = Vec::new();
    // The daemon may turn its back before it has read all.
    if stream.write_all(bytes).is_ok() {
        if !whole {
            let _ = stream.shutdown(Shutdown::Write);
        }
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("no answer in {PATIENCE:?}")
            }
            _ => {}
        }
    }
    answer
}

fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let len = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n\r\n"
    );
    send(&[head.as_bytes(), body].concat(), true)
}

/// One request as the script says.
fn step(script: &mut Script<'_>) {
    let kind = script.byte();
    if kind & 0xf0 == 0xf0 {
        let len = script.number(2) as usize;
        send(script.bytes(len), false);
        return;
    }
    let method = ["GET", "POST", "POST", "DELETE"][usize::from(kind >> 4 & 3)];
    let choice = script.byte();
    let name = NAMES[usize::from(choice >> 4) % NAMES.len()];
    let path = match choice & 15 {
        0 | 1 => "/v1/vdis".to_owned(),
        2 => format!("/v1/vdis/{name}"),
        3 | 4 if kind & 12 == 12 => format!("/v1/vdis/{name}%40{}/attach", script.byte() & 7),
        3 | 4 => format!("/v1/vdis/{name}/attach"),
        5 => format!("/v1/vdis/{name}/detach"),
        6 => format!("/v1/vdis/{name}/resize"),
        7 => format!("/v1/vdis/{name}/drill"),
        8 => "/v1/cache/drain".to_owned(),
        9 => "/v1/status".to_owned(),
        10 => "/v1/metrics".to_owned(),
        11 => format!("/v1/vdis/{name}/delete"),
        12 => format!("/v1/vdis/{name}/snapshots"),
        13 => {
            let what = ["list", "label", "delete"][usize::from(script.byte()) % 3];
            format!("/v1/vdis/{name}/snapshots/{what}")
        }
        14 if kind & 8 == 0 => "/v1/gc".to_owned(),
        14 => format!("/v1/vdis/{name}/schedule"),
        _ => {
            let len = usize::from(script.byte() & 31);
            let tail = script.bytes(len).escape_ascii().to_string().replace([' ', '\\'], "%");
            format!("/v1/vdis/{tail}")
        }
    };
    let number = script.number(8) >> (kind & 15) * 4;
    let body = match script.byte() & 15 {
        0 => Vec::new(),
        1 | 2 => format!(r#"{{"name":"{name}","size":{number}}}"#).into_bytes(),
        3 => format!(r#"{{"size":{number}}}"#).into_bytes(),
        4 => format!(r#"{{"time_ms":{number}}}"#).into_bytes(),
        5 => format!(r#"{{"force":{}}}"#, number & 1 == 0).into_bytes(),
        8 => format!(r#"{{"schedule":"every {number}ms keep {}"}}"#, number & 7).into_bytes(),
        9 => br#"{"schedule":"every 100ms keep 3, every 1h keep 2"}"#.to_vec(),
        10 => br#"{"read_only":true}"#.to_vec(),
        6 => format!(r#"{{"label":"{name}","snapshots":["{number}","{name}"]}}"#).into_bytes(),
        _ => {
            let len = script.number(2) as usize;
            script.bytes(len).to_vec()
        }
    };
    let answer = request(method, &path, &body);
    assert!(answer.starts_with(b"HTTP/1.1 "), "{method} {path}: no answer");
    let text = String::from_utf8_lossy(&answer);
    assert!(!text.contains("the agent failed inside"), "{method} {path}: {text}");
}

/// Leaves the daemon without disks.
fn clear() {
    let list = || {
        let answer = String::from_utf8_lossy(&request("GET", "/v1/vdis", b"")).into_owned();
        assert!(answer.starts_with("HTTP/1.1 200"), "the daemon is not well: {answer}");
        answer
    };
    let answer = list();
    let names = answer.split(r#""name":""#).skip(1).filter_map(|rest| rest.split('"').next());
    for (vdi, lsn) in names.filter_map(|name| name.split_once('@')) {
        // A snapshot that is attached, of a disk whose name needs no escapes.
        request("POST", &format!("/v1/vdis/{vdi}%40{lsn}/detach"), br#"{"force":true}"#);
    }
    let answer = list();
    for uuid in answer.split(r#""uuid":""#).skip(1).filter_map(|rest| rest.get(..36)) {
        request("DELETE", &format!("/v1/vdis/{uuid}/drill"), b"");
        request("POST", &format!("/v1/vdis/{uuid}/detach"), br#"{"force":true}"#);
        let path = format!("/v1/vdis/{uuid}/delete");
        let gone = request("POST", &path, br#"{"with_snapshots":true}"#);
        let gone = String::from_utf8_lossy(&gone);
        assert!(gone.starts_with("HTTP/1.1 200"), "a disk cannot be deleted: {gone}");
    }
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script::new(input);
    for _ in 0..REQUESTS_MAX {
        if script.is_over() {
            break;
        }
        step(&mut script);
    }
    clear();
});
