//! Goal: `make demo` works, and leaves nothing behind, neither at its end nor on Ctrl-C.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn start() -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.env_remove("SAN").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("demo")
}

/// The demo's folder, from the line that names the disk's socket.
fn folder_of(line: &str) -> Option<&Path> {
    let (_, socket) = line.split_once("guests reach it at ")?;
    Path::new(socket.trim()).ancestors().find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("demo-"))
    })
}

#[test]
fn it_tells_its_story_to_the_end() {
    let output = start().wait_with_output().expect("demo");
    let (said, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{errors}");
    for part in [
        "kill -9",
        "the store is cut off",
        "DOWN for",
        "RUNWAY",
        "the drain has begun by itself",
        "a snapshot of the disk was taken without the store",
        "with the right checksums; fsck: clean",
        "gave back what only the snapshot held",
        "vhost-user-blk-pci",
        "cloud-hypervisor",
    ] {
        assert!(said.contains(part), "nothing of '{part}' in:\n{said}");
    }
    let folder = said.lines().find_map(folder_of).expect("the disk's socket");
    assert!(!folder.exists(), "{} is left behind", folder.display());
}

#[test]
fn ctrl_c_ends_it_and_leaves_nothing_behind() {
    let mut demo = start();
    let mut lines = BufReader::new(demo.stdout.take().expect("stdout")).lines();
    let line = lines.find(|line| line.as_ref().is_ok_and(|line| folder_of(line).is_some()));
    let line = line.and_then(Result::ok).unwrap_or_else(|| {
        let mut errors = String::new();
        let _ = demo.stderr.take().map(|mut pipe| pipe.read_to_string(&mut errors));
        panic!("the demo ended early: {errors}");
    });
    let folder = folder_of(&line).expect("the disk's socket");
    assert!(folder.exists());
    kill(Pid::from_raw(demo.id() as i32), Signal::SIGINT).expect("SIGINT");
    assert_eq!(demo.wait().expect("demo").code(), Some(130));
    assert!(!folder.exists(), "{} is left behind", folder.display());
}
