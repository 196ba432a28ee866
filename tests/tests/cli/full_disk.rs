//! Full disks: under a cache that is being created, under an export, and under a store that is in use.
//!
//! Needs a small file system of its own, hence root; without, each test says so and passes.

use super::{FAILED, Good, Scratch, UNAVAILABLE, ballast};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::Mix;
use tests::client::on_agent::{Client, DiskSpec, FrontEnd};

/// A tmpfs that is unmounted at the end.
struct Small {
    dir: TempDir,
}

impl Small {
    fn mount(mib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &size, "ballast-test"]).arg(dir.path());
        if command.output().is_ok_and(|output| output.status.success()) {
            return Some(Self { dir });
        }
        eprintln!("skipped: a small file system cannot be mounted here; run as root");
        None
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Leaves about `left` bytes free.
    fn fill(&self, left: u64) -> PathBuf {
        let stat = nix::sys::statvfs::statvfs(self.dir.path()).unwrap();
        let free = stat.blocks_available() * stat.fragment_size();
        let path = self.path("filler");
        std::fs::write(&path, vec![1; free.saturating_sub(left) as usize]).unwrap();
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.dir.path()).output();
    }
}

#[test]
fn a_cache_that_does_not_fit_leaves_no_half_made_file() {
    let Some(small) = Small::mount(24) else { return };
    let scratch = Scratch::new();
    let cache = small.path("cache");
    let run = scratch.path("run");
    let words = ["agent", "--store", &scratch.store(), "--cache", cache.to_str().unwrap()];
    let said = ballast(words.iter().chain(&["--cache-size", "64MiB", "--run-dir", &run]));
    said.refused(FAILED, &[cache.to_str().unwrap(), "space"]);
    assert!(!cache.exists(), "a half-made cache was left");
}

#[test]
fn an_export_that_does_not_fit_leaves_no_file() {
    let Some(small) = Small::mount(2) else { return };
    let mut good = Good::start();
    good.rig.agent().unwrap().drain().unwrap();
    let out = small.path("out");
    ballast(["store", "export", &good.store(), "disk-1", out.to_str().unwrap()])
        .refused(FAILED, &["space"]);
    assert_eq!(std::fs::read_dir(small.dir.path()).unwrap().count(), 0, "something was left");
    good.assert_unharmed();
}

/// Goal: a store whose thin device is full makes commits wait, never fail: the guest goes on from the log, status says what
/// is the matter, a stop leaves the rest in the log for the next start, and all is committed once there is space.
#[test]
fn a_full_store_makes_commits_wait_and_nothing_else() {
    let Some(small) = Small::mount(160) else { return };
    let url = format!("file:{}", small.path("store").display());
    let mut rig = AgentRig::new(&StoreSpec::url(url, 512 << 20), 96 << 20).unwrap();
    rig.config().arguments = vec!["--shutdown-timeout".into(), "1s".into()];
    rig.start().unwrap();
    let spec = DiskSpec {
        disk: 1,
        bytes: 32 << 20,
        seed: 7,
        mix: Mix::default(),
        front_end: FrontEnd::Own,
        switch_write_cache: false,
    };
    let mut client = Client::create(&mut rig, &spec).unwrap();
    client.runner.run(|counts| counts.mutations >= 200).unwrap();
    let filler = small.fill(256 << 10);
    client.runner.run(|counts| counts.mutations >= 900).unwrap();
    client.runner.flush().unwrap();
    client.runner.verify().unwrap();
    let mut drain = super::spawn(rig.config().run_dir().to_str().unwrap(), &["cache", "drain"]);
    let told = wait(|| {
        let status = rig.agent().unwrap().control(&["status"]).unwrap();
        status["store"]["last_error"].is_string()
    });
    assert!(told, "status does not tell that the store is full");
    assert!(drain.try_wait().unwrap().is_none(), "the drain ended although the store is full");
    client.runner.run(|counts| counts.mutations >= 1000).unwrap();
    client.runner.verify().unwrap();
    rig.shut_down().unwrap();
    super::finish(drain).refused(UNAVAILABLE, &["'disk-1'", "safe in the log"]);
    rig.start().unwrap();
    client.reconnect(&mut rig).unwrap();
    client.runner.verify().unwrap();
    std::fs::remove_file(filler).unwrap();
    rig.agent().unwrap().drain().unwrap();
    let acknowledged = client.runner.oracle().acknowledged();
    client.runner.oracle().set_committed(acknowledged);
    client.check_store_image(&rig).unwrap();
    client.runner.verify().unwrap();
    drop(client);
    rig.shut_down().unwrap();
    rig.check_store().unwrap();
}

fn wait(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    false
}
