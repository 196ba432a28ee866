//! Goal: what a real Linux guest fsynced on a Ballast disk is there afterwards, whatever was killed
//! meanwhile, and its file system is sound (P1, P2 at the level that users see).
//!
//! Method: guests in QEMU write files and report the checksum of each whose `fsync` returned. In
//! turn the agent is killed with -9 under a running guest, agent and guest are killed together (a
//! crash of the host), and the agent is ended by SIGTERM. After each, the next guest mounts the
//! disk (ext4 replays its journal), checks every file reported so far, and runs fsck. Once with the
//! store in a file, once on an iSCSI LUN.

use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::guest::workload::{Writer, await_service, verifier};
use tests::guest::{Guest, GuestOptions, Promises, San, StorePlace};

/// How long a guest may take to be served again after the agent is back.
const CARRY_ON_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn fsynced_files_survive_with_the_store_in_a_file() {
    fsynced_files_survive(San::File);
}

#[test]
fn fsynced_files_survive_with_the_store_on_an_iscsi_lun() {
    fsynced_files_survive(San::Iscsi);
}

/// One host: its agent, what serves its store, what its guests were promised.
struct Host {
    agent: AgentRig,
    socket: PathBuf,
    promises: Promises,
    _place: StorePlace,
    _folder: TempDir,
}

impl Host {
    /// With an empty disk, attached.
    fn new(san: San) -> Host {
        let folder = tempfile::tempdir().expect("temporary folder");
        let place = StorePlace::make(san, folder.path(), 4 << 30).expect("place for a store");
        let store = StoreSpec {
            environment: place.environment.clone(),
            ..StoreSpec::url(&place.url, place.bytes)
        };
        let mut agent = AgentRig::new(&store, 512 << 20).expect("format");
        agent.start().expect("agent");
        let running = agent.agent().expect("agent");
        running.create("vm", 2 << 30).expect("create");
        let socket = running.attach("vm").expect("attach");
        Host { agent, socket, promises: Promises::default(), _place: place, _folder: folder }
    }

    fn boot(&self, name: &str, job: String) -> Guest {
        let files = vec![("/promises".to_owned(), self.promises.checklist().into_bytes())];
        let options = GuestOptions {
            disks: vec![self.socket.clone()],
            job,
            files,
            ..GuestOptions::default()
        };
        Guest::boot(&self.agent.dir().join(name), &options).expect("boot")
    }

    /// Waits for the guest's check of all promises so far.
    fn expect_verified(&self, guest: &mut Guest) {
        let verified = guest.wait_for("verified").expect("checksums");
        assert_eq!(verified, self.promises.len().to_string(), "files checked");
        assert_eq!(guest.wait_for("fsck").expect("fsck"), "clean");
    }
}

fn fsynced_files_survive(san: San) {
    let mut host = Host::new(san);
    kill_the_agent_under_a_guest(&mut host);
    crash_the_host(&mut host);

    host.agent.shut_down().expect("clean end");
    host.agent.start().expect("second start");
    let mut third = host.boot("guest-3", verifier(""));
    host.expect_verified(&mut third);
    third.finish().expect("third guest");
    host.agent.shut_down().expect("clean end");
    host.agent.check_store().expect("a sound store");
}

/// A guest makes a file system and writes; the agent is killed and started meanwhile.
fn kill_the_agent_under_a_guest(host: &mut Host) {
    let writer = Writer { format: true, prefix: "first".into(), files: 14, file_kib: 1024 };
    let mut guest = host.boot("guest-1", writer.job());
    assert_eq!(
        guest.wait_for("write-cache").expect("write cache"),
        "write back",
        "no flushes would be tested"
    );
    for _ in 0..5 {
        guest.wait_for("synced").expect("fsync");
    }
    host.agent.kill().expect("kill -9");
    guest.skip_reported();
    host.agent.start().expect("start after kill -9");

    // With inflight tracking the guest sees a pause and nothing else: no reboot, no error.
    await_service(&mut guest, CARRY_ON_LIMIT).expect("service after kill -9");
    let results = guest.finish().expect("first guest").results;
    host.promises.record(&results).expect("results");
}

/// A guest checks what is there and writes more; agent and guest are killed together.
fn crash_the_host(host: &mut Host) {
    let writer = Writer { format: false, prefix: "second".into(), files: 1000, file_kib: 512 };
    let mut guest = host.boot("guest-2", verifier(&writer.job()));
    host.expect_verified(&mut guest);
    for _ in 0..10 {
        guest.wait_for("synced").expect("fsync");
    }
    host.agent.kill().expect("kill -9");
    host.promises.record(&guest.pull_the_plug().expect("plug")).expect("results");
    host.agent.start().expect("start after the crash");
}
