//! The demo's sequence.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::agent::{Agent, AgentConfig, VdiInfo, find_binary};

use crate::guest::process::{POLL, check_interrupted};
use crate::guest::workload::{Promises, await_service, endless_writer, verifier};
use crate::guest::{Accelerator, Guest, GuestImage, GuestOptions, QemuVersion, San, StorePlace};

use super::report::{Report, line, size, time};

const DISK: &str = "demo";
const CLONE: &str = "clone";
/// Taken while the store is away.
const SNAPSHOT: &str = "outage";
const DISK_BYTES: u64 = 4 << 30;
const CACHE_BYTES: u64 = 1 << 30;
const STORE_BYTES: u64 = 8 << 30;
/// Files that are fsynced before the agent is killed.
const SYNCS_BEFORE_KILL: u64 = 8;
const FILE_KIB: u32 = 2048;
/// How long the store is away.
const OUTAGE: Duration = Duration::from_secs(12);
/// How long a store that is back may take until it is in use again.
const RETURN_LIMIT: Duration = Duration::from_secs(60);
/// How long the guest may take to carry on after the agent is back.
const CARRY_ON_LIMIT: Duration = Duration::from_secs(20);
/// How long to look for a moment at which the log holds what the store does not.
const DIRTY_LIMIT: Duration = Duration::from_secs(5);
/// How long the recovery of a log this small may take.
const RECOVERY_LIMIT: Duration = Duration::from_secs(30);
const TERMINATE_LIMIT: Duration = Duration::from_secs(60);

/// Runs the demo in `folder`.
pub fn tell(folder: &Path, san: San) -> Result<()> {
    let place = StorePlace::make(san, folder, STORE_BYTES)?;
    let accelerator = crate::guest::accelerator::best(&GuestImage::find()?)?;
    let report = Report::new(format_args!(
        "Ballast: a guest's disk survives kill -9 of the agent and an outage of the store ({}, QEMU {}, {})",
        place.what,
        QemuVersion::detect()?,
        if accelerator == Accelerator::Kvm { "KVM" } else { "emulated CPU" },
    ));
    let mut stage = Stage::set_up(folder, &place, accelerator, report)?;
    let mut guest = stage.boot_writer()?;
    stage.kill_and_restart(&mut guest)?;
    stage.ride_out(&place, &mut guest)?;
    let promises = stage.see_off(guest)?;
    stage.drain()?;
    stage.check(&promises)?;
    stage.clone_and_collect()?;
    stage.agent.process_mut().terminate(TERMINATE_LIMIT)?;
    stage.config.command(&["store", "check", &place.url])?;
    stage.report.event("the agent ended on SIGTERM; 'ballast store check' finds the store sound");
    line(format_args!("\nAll of it held, in {}.\n", time(stage.report.elapsed())));
    print_by_hand(&stage.config)
}

/// What the story plays with.
struct Stage {
    folder: PathBuf,
    config: AgentConfig,
    agent: Agent,
    socket: PathBuf,
    accelerator: Accelerator,
    report: Report,
    committed_at_restart: u64,
}

impl Stage {
    /// A store, an agent and an attached disk.
    fn set_up(
        folder: &Path,
        place: &StorePlace,
        accelerator: Accelerator,
        report: Report,
    ) -> Result<Stage> {
        let config = AgentConfig {
            binary: find_binary()?,
            store: place.url.clone(),
            cache: folder.join("cache.img"),
            cache_bytes: CACHE_BYTES,
            dir: folder.to_owned(),
            arguments: Vec::new(),
            environment: place.environment.clone(),
            core: None,
        };
        config.format_store(place.bytes)?;
        report.event(format_args!("formatted a store of {}: {}", size(place.bytes), place.url));
        let agent = Agent::start(&config)?;
        let (cache, disk) = (size(CACHE_BYTES), size(DISK_BYTES));
        report.event(format_args!("the agent runs, with a cache of {cache} in a file"));
        agent.create(DISK, DISK_BYTES)?;
        let socket = agent.attach(DISK)?;
        report.event(format_args!(
            "disk '{DISK}' of {disk}: guests reach it at {}",
            socket.display()
        ));
        Ok(Stage {
            folder: folder.to_owned(),
            config,
            agent,
            socket,
            accelerator,
            report,
            committed_at_restart: 0,
        })
    }

    fn boot(&self, name: &str, job: String, files: Vec<(String, Vec<u8>)>) -> Result<Guest> {
        let disks = vec![self.socket.clone()];
        let accelerator = Some(self.accelerator);
        let options = GuestOptions { disks, job, files, accelerator, ..GuestOptions::default() };
        Guest::boot(&self.folder.join(name), &options)
    }

    /// A guest that is in the middle of writing.
    fn boot_writer(&self) -> Result<Guest> {
        let mut guest =
            self.boot("guest-1", endless_writer(FILE_KIB, Duration::ZERO), Vec::new())?;
        let mode = guest.wait_for("write-cache")?;
        ensure!(
            mode == "write back",
            "the guest's write cache is '{mode}': its flushes would not be tested"
        );
        guest.wait_for("mounted")?;
        self.report.event("a Linux guest made an ext4 file system on it and mounted it");
        for _ in 0..SYNCS_BEFORE_KILL {
            guest.wait_for("synced")?;
        }
        self.report
            .event(format_args!("it has fsynced {SYNCS_BEFORE_KILL} files and goes on writing"));
        Ok(guest)
    }

    /// kill -9 at a moment when the log holds what the store does not, and a new start.
    fn kill_and_restart(&mut self, guest: &mut Guest) -> Result<()> {
        let before = self.wait_until_dirty()?;
        let (killed, pid) = (Instant::now(), self.agent.process().pid());
        self.agent.process_mut().kill()?;
        guest.skip_reported();
        self.report.event(format_args!("kill -9 {pid}: the agent is gone in the middle of it"));
        self.report.detail(format_args!(
            "the log had acknowledged {} writes; {} of them, {}, were not in the store yet",
            before.last_lsn,
            before.last_lsn.saturating_sub(before.committed_lsn),
            size(before.dirty_bytes),
        ));
        self.agent = Agent::start(&self.config)?;
        let recovered = self.wait_until_recovered(before.flushed_lsn)?;
        self.committed_at_restart = recovered.committed_lsn;
        self.report.event(format_args!(
            "the agent is back, with the log recovered, after {}",
            time(killed.elapsed())
        ));
        self.report.detail(format_args!(
            "it found the log up to write {}; the store is at write {}, so {} are to be replayed",
            recovered.last_lsn,
            recovered.committed_lsn,
            size(recovered.dirty_bytes),
        ));
        await_service(guest, CARRY_ON_LIMIT)?;
        self.report.event("the guest ran all the while, saw a pause, and carries on");
        Ok(())
    }

    /// The store goes away under the guest, and comes back.
    fn ride_out(&self, place: &StorePlace, guest: &mut Guest) -> Result<()> {
        let cut = Instant::now();
        if place.cut() {
            self.report.event("the store is cut off: nothing is answered, nobody says so");
        } else {
            let time = format!("{}s", OUTAGE.as_secs());
            self.agent.control(&["outage", "drill", DISK, "--no-wait", "--time", &time])?;
            self.report.event(
                "the store is a file, so its outage is a drill: the disk is cut off from it",
            );
        }
        guest.skip_reported();
        let taken = Instant::now();
        self.agent.control(&["snap", "create", DISK, "--label", SNAPSHOT])?;
        self.report.event(format_args!(
            "a snapshot of the disk was taken without the store, in {}: {DISK}@{SNAPSHOT}",
            time(taken.elapsed())
        ));
        let mut syncs = 0;
        while cut.elapsed() < OUTAGE {
            let synced = guest.wait_for_at_most("synced", RETURN_LIMIT)?;
            ensure!(synced.is_some(), "the guest's fsync does not return while the store is away");
            syncs += 1;
        }
        self.report.event(format_args!(
            "the guest fsynced {syncs} files meanwhile; 'ballast status' says:"
        ));
        self.show(&["status"])?;
        let dirty = self.agent.info(DISK)?.dirty_bytes;
        place.restore();
        let back = Instant::now();
        self.report.event("the store is back");
        self.wait_until_draining(dirty)?;
        self.report.event(format_args!(
            "the drain has begun by itself, {} later, while the guest writes on",
            time(back.elapsed())
        ));
        Ok(())
    }

    /// Less than `dirty` bytes wait for the store.
    fn wait_until_draining(&self, dirty: u64) -> Result<()> {
        let deadline = Instant::now() + RETURN_LIMIT;
        while self.agent.info(DISK)?.dirty_bytes >= dirty {
            ensure!(Instant::now() < deadline, "the drain does not begin");
            check_interrupted()?;
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// State of the disk once its log was read again. The agent answers before that; what had been
    /// flushed before must be there.
    fn wait_until_recovered(&self, flushed_lsn: u64) -> Result<VdiInfo> {
        let deadline = Instant::now() + RECOVERY_LIMIT;
        loop {
            let info = self.agent.info(DISK)?;
            if info.last_lsn >= flushed_lsn {
                return Ok(info);
            }
            let found = info.last_lsn;
            ensure!(
                Instant::now() < deadline,
                "the log ends at write {found}, though write {flushed_lsn} had been flushed"
            );
            check_interrupted()?;
            std::thread::sleep(POLL);
        }
    }

    /// State of the disk when the log holds what the store does not; as it is, if that does not
    /// come about.
    fn wait_until_dirty(&self) -> Result<VdiInfo> {
        let deadline = Instant::now() + DIRTY_LIMIT;
        loop {
            let info = self.agent.info(DISK)?;
            if info.dirty_bytes > 0 || Instant::now() >= deadline {
                return Ok(info);
            }
            check_interrupted()?;
            std::thread::sleep(POLL);
        }
    }

    /// The first guest's end. Returns what it was promised.
    fn see_off(&self, mut guest: Guest) -> Result<Promises> {
        guest.say("stop")?;
        let results = guest.finish().context("the first guest")?.results;
        let mut promises = Promises::default();
        promises.record(&results)?;
        let (syncs, bytes) = (promises.syncs, size(promises.bytes_synced));
        self.report.event(format_args!(
            "it is off: {bytes} were written and acknowledged, by {syncs} fsyncs, without an error"
        ));
        Ok(promises)
    }

    /// Everything that was acknowledged goes to the store.
    fn drain(&self) -> Result<()> {
        let started = Instant::now();
        self.agent.drain()?;
        let after = self.agent.info(DISK)?;
        self.report.event(format_args!(
            "drained in {}: the store is at write {}; {} were replayed since the agent is back",
            time(started.elapsed()),
            after.committed_lsn,
            after.committed_lsn.saturating_sub(self.committed_at_restart),
        ));
        Ok(())
    }

    /// A second guest checks what the first one wrote.
    fn check(&self, promises: &Promises) -> Result<()> {
        let files = vec![("/promises".to_owned(), promises.checklist().into_bytes())];
        let guest = self.boot("guest-2", verifier(""), files)?;
        let checked =
            guest.finish().context("the second guest, which checks what the first one wrote")?;
        let checked = checked.last();
        let count = promises.len().to_string();
        ensure!(checked.get("verified") == Some(&count.as_str()), "not every file was checked");
        self.report.event(format_args!(
            "a second guest found all {count} files ({}) with the right checksums; fsck: {}",
            size(promises.bytes()),
            checked.get("fsck").unwrap_or(&"?"),
        ));
        Ok(())
    }
}

impl Stage {
    /// What the snapshot of the outage was good for, and the space that it took.
    fn clone_and_collect(&self) -> Result<()> {
        let from = format!("{DISK}@{SNAPSHOT}");
        self.agent.control(&["vdi", "create", CLONE, "--from", &from])?;
        self.report.event(format_args!(
            "'{CLONE}' is a disk of its own that begins as {from}, made by one write; 'ballast vdi tree --sizes':"
        ));
        self.show(&["vdi", "tree", "--sizes"])?;
        for disk in [CLONE, DISK] {
            if disk == DISK {
                self.agent.control(&["vdi", "detach", DISK])?;
            }
            self.agent.control(&["vdi", "delete", disk, "--with-snapshots"])?;
        }
        let collected = self.agent.control(&["gc", "run", "--wait"])?;
        let bytes = |what: &str| collected[what].as_u64().unwrap_or_default();
        let last = &collected["last"];
        let back = last["reclaimed_data"].as_u64().unwrap_or_default()
            + last["reclaimed_metadata"].as_u64().unwrap_or_default();
        ensure!(last["failure"].is_null(), "garbage was not collected: {collected}");
        self.report.event(format_args!(
            "clone, disk and snapshot are deleted; 'ballast gc run' gave back what only the snapshot held, {}: {} of {} are free",
            size(back),
            size(bytes("free")),
            size(bytes("capacity")),
        ));
        Ok(())
    }

    /// Prints what a command says.
    fn show(&self, command: &[&str]) -> Result<()> {
        let run_dir = self.config.run_dir().display().to_string();
        let command = [&["--run-dir", &run_dir], command].concat();
        for told in self.config.command(&command)?.lines() {
            self.report.detail(format_args!("  {told}"));
        }
        Ok(())
    }
}

fn print_by_hand(config: &AgentConfig) -> Result<()> {
    let program = config.binary.display();
    let reconnect = QemuVersion::detect()?.reconnect_option(Duration::from_secs(1));
    line(format_args!(
        "To use a disk by hand:
  {program} store format file:/var/tmp/store.img --size 64GiB
  {program} agent --store file:/var/tmp/store.img --cache /var/tmp/cache.img \\
    --cache-size 2GiB --run-dir /tmp/ballast &
  {program} --run-dir /tmp/ballast vdi create vm1 --size 20GiB
  SOCKET=$({program} --run-dir /tmp/ballast vdi attach vm1)
then, with QEMU:
  qemu-system-x86_64 -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on \\
    -machine q35,memory-backend=mem -chardev socket,id=disk,path=$SOCKET,{reconnect} \\
    -device vhost-user-blk-pci,chardev=disk,num-queues=1 …
or with cloud-hypervisor:
  cloud-hypervisor --memory size=2G,shared=on \\
    --disk vhost_user=true,socket=$SOCKET,num_queues=1 --kernel …"
    ));
    Ok(())
}
