//! The demo's sequence.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::agent::{argument, number};
use crate::guest::workload::{Promises, Writer, carries_on, verifier};
use crate::guest::{
    Accelerator, Agent, AgentOptions, Ballast, Guest, GuestImage, GuestOptions, QemuVersion, San,
    StorePlace,
};

use super::report::{Report, size, time};

const DISK: &str = "demo";
const DISK_SIZE: &str = "4GiB";
const CACHE_SIZE: &str = "1GiB";
/// Files that are fsynced before the agent is killed.
const SYNCS_BEFORE_KILL: u64 = 8;
/// Files the guest writes in all.
const FILES: u32 = 24;
const FILE_KIB: u32 = 4096;
/// How long the guest may take to carry on after the agent is back; then it is booted again.
const CARRY_ON_LIMIT: Duration = Duration::from_secs(20);
/// How long to look for a moment at which the log holds what the store does not.
const DIRTY_LIMIT: Duration = Duration::from_secs(5);
const TERMINATE_LIMIT: Duration = Duration::from_secs(60);

/// Runs the demo in `folder`.
pub fn tell(folder: &Path, san: San) -> Result<()> {
    let ballast = Ballast::find()?;
    let accelerator = crate::guest::accelerator::best(&GuestImage::find()?)?;
    let place = StorePlace::make(san, folder)?;
    let report = Report::new(format_args!(
        "Ballast: a guest's disk survives kill -9 of the agent (store on {}, QEMU {}, {})",
        place.what,
        QemuVersion::detect()?,
        if accelerator == Accelerator::Kvm { "KVM" } else { "emulated CPU" },
    ));

    ballast.format_store(&place.url, place.size)?;
    let options = AgentOptions {
        store: place.url.clone(),
        cache: folder.join("cache.img"),
        cache_size: CACHE_SIZE.into(),
        run_dir: folder.to_owned(),
        log: folder.join("agent.log"),
    };
    let agent = Agent::start(&ballast, &options)?;
    report.event(format_args!(
        "the agent runs: store {}, cache of {CACHE_SIZE} in a file",
        place.url
    ));
    let socket = agent.create_disk(DISK, DISK_SIZE)?;
    report.event(format_args!(
        "created disk '{DISK}' of {DISK_SIZE}; guests reach it at {}",
        socket.display()
    ));

    let guest_options = |job: String, files: Vec<(String, Vec<u8>)>| GuestOptions {
        disks: vec![socket.clone()],
        job,
        files,
        accelerator: Some(accelerator),
        ..GuestOptions::default()
    };
    let writer = Writer { format: true, prefix: "file".into(), files: FILES, file_kib: FILE_KIB };
    let mut guest = Guest::boot(&folder.join("guest-1"), &guest_options(writer.job(), Vec::new()))?;
    let cache_mode = guest.wait_for("write-cache")?;
    ensure!(
        cache_mode == "write back",
        "the guest's write cache is '{cache_mode}': its flushes would not be tested"
    );
    guest.wait_for("mounted")?;
    report.event("a Linux guest made an ext4 file system on it and mounted it");
    for _ in 0..SYNCS_BEFORE_KILL {
        guest.wait_for("synced")?;
    }
    report
        .event(format_args!("the guest has fsynced {SYNCS_BEFORE_KILL} files and goes on writing"));

    let before = wait_until_dirty(&agent)?;
    let (killed, pid) = (Instant::now(), agent.pid());
    agent.kill()?;
    guest.skip_reported();
    report.event(format_args!("kill -9 {pid}: the agent is gone in the middle of it"));
    report.detail(format_args!(
        "the log had acknowledged {} writes; {} of them, {}, were not in the store yet",
        number(&before, "last_lsn")?,
        number(&before, "last_lsn")?.saturating_sub(number(&before, "committed_lsn")?),
        size(number(&before, "dirty_bytes")?),
    ));
    let agent = Agent::start(&ballast, &options)?;
    let recovered = agent.call(&["vdi", "info", DISK])?;
    report.event(format_args!("the agent is back and answers after {}", time(killed.elapsed())));
    report.detail(format_args!(
        "it found the log up to write {}; the store is at write {}, so {} are to be replayed",
        number(&recovered, "last_lsn")?,
        number(&recovered, "committed_lsn")?,
        size(number(&recovered, "dirty_bytes")?),
    ));

    let mut promises = Promises::default();
    if carries_on(&mut guest, CARRY_ON_LIMIT)? {
        report.event("the guest, still running, was served again and carried on");
        promises.record(&guest.finish().context("the first guest")?.results)?;
    } else {
        report.event("the guest was not served again: its plug is pulled");
        promises.record(&guest.pull_the_plug()?)?;
    }
    report.event(format_args!(
        "the first guest is off: {} fsyncs returned, for {}",
        promises.syncs,
        size(promises.bytes_synced)
    ));

    drain(&agent, &report)?;
    let files = vec![("/promises".to_owned(), promises.checklist().into_bytes())];
    let guest = Guest::boot(&folder.join("guest-2"), &guest_options(verifier(""), files))?;
    let checked =
        guest.finish().context("the second guest, which checks what the first one wrote")?;
    let checked = checked.last();
    ensure!(
        checked.get("verified") == Some(&promises.len().to_string().as_str()),
        "not every file was checked"
    );
    report.event(format_args!(
        "a second guest found all {} files ({}) with the right checksums; fsck: {}",
        promises.len(),
        size(promises.bytes()),
        checked.get("fsck").unwrap_or(&"?"),
    ));
    agent.terminate(TERMINATE_LIMIT)?;
    ballast.run(&["store", "check", &place.url])?;
    report.event("the agent ended on SIGTERM; 'ballast store check' finds the store sound");
    println!("\nAll of it held, in {}.\n", time(report.elapsed()));
    print_by_hand(&ballast)
}

/// `vdi info` at a moment when the log holds what the store does not, as long as there is one.
fn wait_until_dirty(agent: &Agent) -> Result<Value> {
    let deadline = Instant::now() + DIRTY_LIMIT;
    loop {
        let info = agent.call(&["vdi", "info", DISK])?;
        if number(&info, "dirty_bytes")? > 0 || Instant::now() >= deadline {
            return Ok(info);
        }
    }
}

fn drain(agent: &Agent, report: &Report) -> Result<()> {
    let before = agent.call(&["vdi", "info", DISK])?;
    let started = Instant::now();
    agent.call(&["cache", "drain", DISK])?;
    let after = agent.call(&["vdi", "info", DISK])?;
    report.event(format_args!(
        "drained: the store has every write of the log (up to {})",
        number(&after, "committed_lsn")?
    ));
    report.detail(format_args!(
        "the last {} writes, {}, were replayed in {}",
        number(&after, "committed_lsn")?.saturating_sub(number(&before, "committed_lsn")?),
        size(number(&before, "dirty_bytes")?),
        time(started.elapsed()),
    ));
    Ok(())
}

fn print_by_hand(ballast: &Ballast) -> Result<()> {
    let program = argument(&ballast.program)?;
    println!("To use a disk by hand:");
    println!("  {program} store format file:/tmp/b/store.img --size 64GiB");
    println!(
        "  {program} agent --store file:/tmp/b/store.img --cache /tmp/b/cache.img --cache-size 2GiB --run-dir /tmp/b &"
    );
    println!("  {program} --run-dir /tmp/b vdi create vm1 --size 20GiB");
    println!("  SOCKET=$({program} --run-dir /tmp/b vdi attach vm1)");
    println!("  qemu-system-x86_64 -m 2G -object memory-backend-memfd,id=mem,size=2G,share=on \\");
    println!(
        "    -machine q35,memory-backend=mem -chardev socket,id=disk,path=$SOCKET,{} \\",
        QemuVersion::detect()?.reconnect_option(Duration::from_secs(1))
    );
    println!(
        "    -device vhost-user-blk-pci,chardev=disk,num-queues=1 …your kernel, cdrom or other disks…"
    );
    println!("or");
    println!(
        "  cloud-hypervisor --memory size=2G,shared=on --disk vhost_user=true,socket=$SOCKET,num_queues=1 …your kernel…"
    );
    Ok(())
}
