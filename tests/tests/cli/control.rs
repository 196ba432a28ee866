//! Garbage on the control socket, and things in the way of sockets.

use super::{CONFLICT, Good, Scratch, ballast};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

/// Sends bytes; what comes back until the agent closes, or a quarter of a second of silence.
fn send(socket: &str, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_millis(250))).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn request(socket: &str, line: &str, body: &str) -> String {
    let length = body.len();
    send(socket, format!("{line} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}").as_bytes())
}

#[test]
fn garbage_is_answered_with_words_or_a_closed_connection() {
    let mut good = Good::start();
    let socket = format!("{}/control.sock", good.run_dir());
    for bytes in [
        &b""[..],
        b"\0\0\0\0",
        b"hello?\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/vdis HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/vdis HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"name\":",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff",
    ] {
        send(&socket, bytes);
    }
    send(&socket, &vec![b'a'; 1 << 20]);
    for (line, body, status, words) in [
        ("GET /", "", "400", "knows no request"),
        ("PUT /v1/status", "", "400", "knows no request"),
        ("GET /v1/vdis/%ff", "", "400", "name"),
        ("GET /v1/vdis/%zz", "", "", ""),
        ("POST /v1/vdis", "", "400", "makes no sense"),
        ("POST /v1/vdis", "{", "400", "makes no sense"),
        ("POST /v1/vdis", "[]", "400", "makes no sense"),
        ("POST /v1/vdis", r#"{"name":"x"}"#, "400", "size"),
        ("POST /v1/vdis", r#"{"name":"x","size":-1}"#, "400", "makes no sense"),
        ("POST /v1/vdis", r#"{"name":"x","size":4096,"frob":1}"#, "400", "frob"),
        ("POST /v1/vdis", r#"{"name":"a/b","size":4096}"#, "400", "a/b"),
        ("POST /v1/vdis", r#"{"name":"x","size":0}"#, "400", "0 bytes"),
        ("POST /v1/vdis/disk-1/detach", r#"{"force":"yes"}"#, "400", "makes no sense"),
        ("POST /v1/vdis/disk-1/resize", r#"{"size":18446744073709551615}"#, "400", ""),
        ("POST /v1/cache/drain", r#"{"vdi":7}"#, "400", "makes no sense"),
        ("POST /v1/vdis/nix/attach", "", "404", "nix"),
    ] {
        let answer = request(&socket, line, body);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{line} {body}: {answer}");
        assert!(
            answer.contains(words),
            "'{words}' is not in the answer to {line} {body}: {answer}"
        );
    }
    let large = format!(r#"{{"name":"{}","size":4096}}"#, "x".repeat(1 << 20));
    let answer = request(&socket, "POST /v1/vdis", &large);
    assert!(answer.is_empty() || answer.contains("error"), "{answer}");
    assert_eq!(good.ask(&["vdi", "list", "--json"]).json().as_array().unwrap().len(), 1);
    good.assert_unharmed();
}

#[test]
fn many_idle_connections_do_not_lock_the_operator_out() {
    let mut good = Good::start();
    let socket = format!("{}/control.sock", good.run_dir());
    let idle: Vec<_> = (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    good.ask(&["status"]).done();
    drop(idle);
    good.assert_unharmed();
}

#[test]
fn only_the_owner_may_use_the_control_socket() {
    let mut good = Good::start();
    let run_dir = good.run_dir();
    let mode = |name: &str| {
        std::fs::metadata(format!("{run_dir}/{name}")).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("control.sock"), 0o600);
    assert_eq!(mode("disk-1.sock"), 0o600);
    good.assert_unharmed();
}

#[test]
fn what_is_in_the_way_of_a_disks_socket_stays_and_is_named() {
    let mut good = Good::start();
    let run_dir = good.run_dir();
    good.ask(&["vdi", "create", "blocked", "--size", "16MiB"]).done();
    let path = format!("{run_dir}/blocked.sock");
    std::fs::write(&path, "precious").unwrap();
    good.ask(&["vdi", "attach", "blocked"])
        .refused(CONFLICT, &["'blocked'", &path, "not a socket"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
    let foreign = UnixListener::bind(&path).unwrap();
    good.ask(&["vdi", "attach", "blocked"])
        .refused(CONFLICT, &["'blocked'", &path, "another process"]);
    // It is not attached half-way: it can be deleted, or attached when the way is free.
    let info = good.ask(&["vdi", "info", "blocked", "--json"]).json();
    assert_eq!((&info["attached"], &info["state"]), (&false.into(), &"detached".into()));
    drop(foreign);
    assert_eq!(good.ask(&["vdi", "attach", "blocked"]).done().trim(), path);
    good.ask(&["vdi", "detach", "blocked"]).done();
    assert!(!std::path::Path::new(&path).exists());
    good.ask(&["vdi", "delete", "blocked"]).done();
    good.assert_unharmed();
}

#[test]
fn what_is_in_the_way_of_the_run_directory_is_named() {
    let scratch = Scratch::new();
    let size = ["--cache-size", "32MiB"];
    std::fs::write(scratch.path("run"), "a file").unwrap();
    scratch.agent("cache", &size).refused(1, &["/run"]);
    std::fs::remove_file(scratch.path("run")).unwrap();
    std::fs::create_dir(scratch.path("run")).unwrap();
    std::fs::write(scratch.path("run/control.sock"), "precious").unwrap();
    scratch.agent("cache", &size).refused(CONFLICT, &["control.sock", "not a socket"]);
    assert_eq!(scratch.content("run/control.sock"), b"precious");
    let deep = scratch.path(&"d".repeat(100));
    ballast([
        "agent",
        "--store",
        &scratch.store(),
        "--cache",
        &scratch.path("c"),
        "--run-dir",
        &deep,
    ])
    .refused(2, &["too long", "--run-dir"]);
}
