//! Goal: in a snapshot that was taken with `--quiesce` the guest's file systems are whole, with all that was written before it and never synced, and
//! the guest runs on afterwards, whoever is killed meanwhile.
//!
//! Method: a real guest with a real qemu-ga, two disks with ext4 that writes nothing by itself. Of a plain snapshot and of one with the
//! guest frozen, clones are looked at by a second guest: does the journal have to be replayed, which files are there? Then the
//! command, and then the agent, is killed while the guest is frozen for a snapshot.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::agent::find_binary;
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::guest::{Guest, GuestOptions};
use tests::single::control;

/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);
/// Files that the guest writes to each disk.
const FILES: &str = "8";

/// Writes files, and never syncs. Then ticks, and makes much dirty when it is told to, so that the next freeze takes its time.
const WRITER: &str = r#"
    echo 0 >/proc/sys/vm/dirty_writeback_centisecs
    echo 90 >/proc/sys/vm/dirty_ratio
    echo 80 >/proc/sys/vm/dirty_background_ratio
    mkdir /tmp/data
    for place in "0 /mnt" "1 /tmp/data"; do
        mkfs.ext4 -q "$(disk ${place% *})"
        mount -t ext4 -o commit=1000 "$(disk ${place% *})" ${place#* }
    done
    sync
    for n in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=/tmp/file bs=64k count=8 2>/dev/null
        cat /tmp/file >/mnt/file$n
        cat /tmp/file >/tmp/data/file$n
        sum=$(sha256sum </tmp/file)
        result written "${sum%% *}  /mnt/file$n"
    done
    guest_agent
    (n=0; while [ ! -e /tmp/stop ]; do echo $n >/mnt/tick; result tick $n; n=$((n + 1)); sleep 0.1; done) &
    ticker=$!
    result ready-to-freeze yes
    while read -r word && [ $word != stop ]; do
        case $word in
        more) dd if=/dev/urandom of=/mnt/dirty bs=64k count=768 2>/dev/null && result dirty yes ;;
        sysrq) echo j >/proc/sysrq-trigger ;;
        esac
    done
    touch /tmp/stop
    wait $ticker
    if dmesg | grep -E 'EXT4-fs error|I/O error'; then exit 13; fi
"#;

/// Looks at the disks one by one.
const JUDGE: &str = r#"
    for n in 0 1 2; do
        disk=$(disk $n)
        result unclean "$(dumpe2fs -h "$disk" 2>/dev/null | grep -c needs_recovery)"
        e2fsck -fn "$disk" >/tmp/fsck 2>&1 && result fsck clean || result fsck "$?"
        dmesg -c >/dev/null
        mount -t ext4 "$disk" /mnt
        result replayed "$(dmesg | grep -c 'recovery complete')"
        result whole "$(sha256sum -c /sums 2>/dev/null | grep -c ': OK$')"
        umount /mnt
    done
"#;

#[test]
fn a_frozen_guest_is_whole_in_its_snapshots_and_runs_on() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(2 << 30), 512 << 20)?;
    rig.start()?;
    let sockets = ["vm", "data"].map(|name| {
        rig.agent()?.create(name, 256 << 20)?;
        rig.agent()?.attach(name)
    });
    let disks = sockets.into_iter().collect::<Result<Vec<_>>>()?;
    let options =
        GuestOptions { disks, job: WRITER.into(), guest_agent: true, ..GuestOptions::default() };
    let mut guest = Guest::boot(&rig.dir().join("writer"), &options)?;
    guest.wait_for("ready-to-freeze")?;
    let agent = guest.agent_socket().display().to_string();

    let plain = control(&rig, "snap create vm --label plain")?;
    ensure!(plain["quiesced"] == false, "{plain}");
    let refused = control(&rig, "snap create vm data").unwrap_err().to_string();
    ensure!(refused.contains("several disks at once need --quiesce"), "{refused}");
    let set = control(&rig, &format!("snap create vm data --quiesce --guest-agent {agent}"))?;
    let snapshots = set["snapshots"].as_array().context("snapshots")?.clone();
    ensure!(set["quiesced"] == true && snapshots.len() == 2, "{set}");
    // The third is that with the tools.
    ensure!(set["file_systems"] == 3, "{set}");
    expect_ticks(&mut guest)?;
    what_cannot_be_frozen(&rig, &agent)?;
    frozen_by_others(&mut guest, &rig, &agent)?;

    killed_command(&mut guest, &rig, &agent)?;
    killed_agent(&mut guest, &mut rig, &agent)?;
    let last = control(&rig, &format!("snap create vm --quiesce --guest-agent {agent}"))?;
    ensure!(last["quiesced"] == true && last["lsn"].is_u64(), "{last}");
    let sums: String = guest
        .results()
        .iter()
        .filter(|(key, _)| key == "written")
        .fold(String::new(), |sums, (_, sum)| sums + sum + "\n");
    guest.say("stop")?;
    guest.finish()?;

    let ids = [&plain, &snapshots[0], &snapshots[1]];
    judge(&rig, &ids, sums)?;
    rig.shut_down()?;
    rig.check_store()
}

/// A second guest looks at a plain snapshot, then at two of a frozen guest.
fn judge(rig: &AgentRig, snapshots: &[&Value], sums: String) -> Result<()> {
    let mut disks = Vec::new();
    for (n, snapshot) in snapshots.iter().enumerate() {
        let id = snapshot["id"].as_str().with_context(|| format!("no id in {snapshot}"))?;
        control(rig, &format!("vdi create clone{n} --from {id}"))?;
        disks.push(rig.agent()?.attach(&format!("clone{n}"))?);
    }
    let files = vec![("/sums".to_owned(), sums.into_bytes())];
    let options = GuestOptions { disks, job: JUDGE.into(), files, ..GuestOptions::default() };
    let found = Guest::boot(&rig.dir().join("judge"), &options)?.finish()?.results;
    let of = |key: &str| -> Vec<&str> {
        found.iter().filter(|(k, _)| k == key).map(|(_, value)| value.as_str()).collect()
    };
    ensure!(of("unclean") == ["1", "0", "0"], "needs_recovery: {:?}", of("unclean"));
    ensure!(of("replayed") == ["1", "0", "0"], "journals replayed: {:?}", of("replayed"));
    ensure!(of("fsck")[1..] == ["clean", "clean"], "{:?}", of("fsck"));
    ensure!(of("whole") == ["0", FILES, FILES], "files: {:?}", of("whole"));
    Ok(())
}

fn expect_ticks(guest: &mut Guest) -> Result<()> {
    guest.skip_reported();
    // One may have been said and not been read before.
    for _ in 0..3 {
        let tick = guest.wait_for_at_most("tick", PATIENCE)?;
        tick.context("the guest does not write any more")?;
    }
    Ok(())
}

/// Somebody else's socket, and one of nobody: nothing is taken, or what was asked for instead.
fn what_cannot_be_frozen(rig: &AgentRig, agent: &str) -> Result<()> {
    let before = snapshots(rig)?;
    let create = |how: &str, socket: &str| {
        control(rig, &format!("snap create vm --quiesce{how} --guest-agent {socket}"))
    };
    let nobody = format!("{agent}.not");
    let refused = create("", &nobody).unwrap_err().to_string();
    ensure!(
        refused.contains("no snapshot was taken") && refused.contains("nobody listens"),
        "{refused}"
    );
    // As libvirt does.
    let holder = UnixStream::connect(agent)?;
    let refused = create("", agent).unwrap_err().to_string();
    ensure!(refused.contains("virsh domfsfreeze"), "{refused}");
    drop(holder);
    ensure!(snapshots(rig)? == before);
    let taken = create("=try", &nobody)?;
    ensure!(taken["quiesced"] == false, "{taken}");
    ensure!(taken["not_quiesced_because"].as_str().is_some_and(|why| why.contains("nobody")));
    ensure!(snapshots(rig)? == before + 1);
    Ok(())
}

/// Nobody but who froze it thaws it; and the way out that is told to people.
fn frozen_by_others(guest: &mut Guest, rig: &AgentRig, agent: &str) -> Result<()> {
    let ask = |command: &str| ask_directly(agent, command);
    let froze = ask("guest-fsfreeze-freeze")?;
    ensure!(froze.contains("\"return\": 3"), "{froze}");
    let command = format!("snap create vm --quiesce --guest-agent {agent}");
    let refused = control(rig, &command).unwrap_err().to_string();
    ensure!(refused.contains("frozen already"), "{refused}");
    let state = ask("guest-fsfreeze-status")?;
    ensure!(state.contains("frozen"), "it was thawed: {state}");
    guest.say("sysrq")?;
    expect_ticks(guest)?;
    let thawed = ask("guest-fsfreeze-thaw")?;
    ensure!(thawed.contains("\"return\": 0"), "{thawed}");
    Ok(())
}

/// Says a command to the guest agent, past Ballast, and returns its answer.
fn ask_directly(agent: &str, command: &str) -> Result<String> {
    let mut stream = UnixStream::connect(agent)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // What a command that gave up waiting had sent is answered to us: all of that comes before the answer to this.
    let sync = r#"{"execute": "guest-sync-delimited", "arguments": {"id": 123456}}"#;
    stream.write_all(&[&[0xff], sync.as_bytes(), b"\n"].concat())?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.contains("123456") {
        reader.read_until(0xff, &mut Vec::new())?;
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "the guest agent went away");
    }
    writeln!(reader.get_mut(), "{{\"execute\": \"{command}\"}}")?;
    line.clear();
    reader.read_line(&mut line)?;
    Ok(line)
}

fn snapshots(rig: &AgentRig) -> Result<usize> {
    let list = control(rig, "snap list vm")?;
    Ok(list["snapshots"].as_array().context("a list")?.len())
}

/// What the agent has noted of frozen guests.
fn note(rig: &AgentRig) -> Result<String> {
    let file = rig.agent()?.config().run_dir().join("frozen-guests.json");
    Ok(std::fs::read_to_string(file).unwrap_or_default())
}

fn is_owed(note: &str) -> bool {
    note.contains("agent.sock")
}

/// A command under way whose guest is freezing.
fn begin(guest: &mut Guest, rig: &AgentRig, agent: &str) -> Result<Child> {
    guest.say("more")?;
    guest.wait_for("dirty")?;
    let run_dir = rig.agent()?.config().run_dir();
    let mut command = Command::new(find_binary()?);
    command.arg("--run-dir").arg(run_dir).args(["snap", "create", "vm", "--label", "killed"]);
    command.args(["--quiesce", "--freeze-timeout", "2m", "--guest-agent", agent]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_until("a note of the freeze", || Ok(is_owed(&note(rig)?)))?;
    Ok(child)
}

fn wait_until(what: &str, mut wanted: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !wanted()? {
        ensure!(Instant::now() < end, "never {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The agent carries on to the end.
fn killed_command(guest: &mut Guest, rig: &AgentRig, agent: &str) -> Result<()> {
    let before = snapshots(rig)?;
    let mut child = begin(guest, rig, agent)?;
    child.kill()?;
    child.wait()?;
    ensure!(is_owed(&note(rig)?), "it was thawed before the command was killed: nothing was tried");
    wait_until("a thaw", || Ok(!is_owed(&note(rig)?)))?;
    ensure!(snapshots(rig)? == before + 1, "the snapshot was taken all the same");
    expect_ticks(guest)
}

/// The next agent thaws.
fn killed_agent(guest: &mut Guest, rig: &mut AgentRig, agent: &str) -> Result<()> {
    for _ in 0..5 {
        let mut child = begin(guest, rig, agent)?;
        let file = rig.agent()?.config().run_dir().join("frozen-guests.json");
        rig.kill()?;
        child.wait()?;
        let was_owed = is_owed(&read(&file)?);
        rig.start()?;
        wait_until("a thaw", || Ok(!is_owed(&note(rig)?)))?;
        expect_ticks(guest)?;
        if was_owed {
            return Ok(());
        }
    }
    bail!("the agent was never killed before it had thawed the guest")
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))
}
