//! What snapshots cost a guest: how long one takes until it is acknowledged, and how much slower the guest is beside them.
//!
//! Snapshots are asked for through the agent's control socket, over a connection that stays open: what is measured is what a
//! program that asks for them sees, by requests and by a stream. A snapshot behind every write is the agent's own doing, by a schedule that says so; beside it stands
//! what it costs to ask for each. With and without snapshots the same load runs in turn, and medians are compared.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde_json::json;

use crate::ballast::{Ballast, DISK_NAME};
use crate::collecting::{collect, delete_snapshots_of};
use crate::control::{Control, Stream};
use crate::front_end::{Disk, Options, Request, Status};
use crate::load::{Limit, Pattern, Random, Workload};
use crate::outage::{Latency, histogram};
use crate::server::{Server, measure};
use crate::suite::{Settings, fill};

/// Between two snapshots beside the load.
pub const INTERVAL: Duration = Duration::from_millis(10);
/// Writes in flight under the load.
pub const DEPTH: usize = 32;
/// Snapshots that the schedule of one behind every write keeps.
const KEEP: u64 = 1000;
/// Connections that ask for a snapshot after each write.
const CONNECTIONS: usize = 32;
/// Turns on the processor of who asks for snapshots beside the load.
const TURN: Duration = Duration::from_micros(100);
/// Longest round of those.
const EACH_TIME: Duration = Duration::from_secs(2);
/// How long the client waits for an answer before it looks whether it may go on by itself.
const NAP: Duration = Duration::from_millis(1);

/// What was found.
#[derive(Debug, Clone)]
pub struct Snapping {
    /// A flush by the guest, under the load.
    pub flush: Latency,
    /// A snapshot, under the load, asked for over a stream.
    pub snapshot: Latency,
    /// The same by a request.
    pub requested: Latency,
    /// Over a stream, with one write in flight.
    pub beside_one: Latency,
    /// A snapshot of a disk that nobody writes, over a stream.
    pub idle: Latency,
    /// The same by a request.
    pub idle_requested: Latency,
    /// Writes in a second, per round: alone, and with a snapshot every [`INTERVAL`].
    pub beside: Pair,
    /// The same with a snapshot behind each write by the disk's schedule.
    pub each: Pair,
    /// The same with one asked for after each write.
    pub asked: Pair,
    /// Snapshots in a second, of those that were asked for.
    pub asked_rate: f64,
}

/// Figures of rounds in turn.
#[derive(Debug, Clone, Default)]
pub struct Pair {
    /// Without what is measured.
    pub without: Vec<f64>,
    /// With it.
    pub with: Vec<f64>,
}

impl Pair {
    /// Loss by what is measured, in percent; negative: there was a gain.
    #[must_use]
    pub fn loss_percent(&self) -> f64 {
        100.0 * (1.0 - crate::compare::median(&self.with) / crate::compare::median(&self.without))
    }
}

/// Measures all of it on one disk.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn run(settings: &Settings) -> Result<Snapping> {
    let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let mut config = settings.agent_config(binary, dir.path(), settings.cache_bytes)?;
    let own = ["--gc-rate", "0", "--gc-every", "0s", "--gc-free-below", "0"].map(String::from);
    config.arguments.extend(own);
    let mut ballast = Ballast::create(&config, settings.disk_bytes)?;
    fill(&mut ballast, settings.disk_bytes, settings.cache_bytes)?;
    let mut bench = Bench { settings, ballast, seed: 0x5eed_5eed, depth: DEPTH };

    let idle = bench.snapshots_alone(Way::Stream)?;
    let idle_requested = bench.snapshots_alone(Way::Request)?;
    let flush = bench.flushes()?;
    let (mut snapshots, mut requested) = (histogram()?, histogram()?);
    let mut beside = Pair::default();
    for round in 0..settings.rounds {
        // Who comes first after the tidying finds another disk than who comes second: they change places.
        for snapping in [round % 2 == 1, round % 2 == 0] {
            if !snapping {
                beside.without.push(bench.load()?);
                continue;
            }
            let (iops, times) = bench.snapped(Way::Stream)?;
            beside.with.push(iops);
            snapshots.add(times).context("add up latencies")?;
        }
        bench.tidy()?;
        requested.add(bench.snapped(Way::Request)?.1).context("add up latencies")?;
        bench.tidy()?;
    }
    let mut beside_one = histogram()?;
    bench.depth = 1;
    for _ in 0..settings.rounds {
        beside_one.add(bench.snapped(Way::Stream)?.1).context("add up latencies")?;
        bench.tidy()?;
    }
    bench.depth = DEPTH;
    let mut each = Pair::default();
    for round in 0..settings.rounds {
        for snapping in [round % 2 == 1, round % 2 == 0] {
            if !snapping {
                each.without.push(bench.load()?);
                continue;
            }
            bench.schedule(&format!("every write keep {KEEP}"))?;
            each.with.push(bench.load()?);
            let kept = bench.schedule("none")?;
            ensure!(kept >= KEEP, "{kept} snapshots are kept, not {KEEP}");
        }
        bench.tidy()?;
    }
    let (mut asked, mut taken, mut time) = (Pair::default(), 0, Duration::ZERO);
    for _ in 0..settings.rounds {
        asked.without.push(bench.each(0)?.0);
        bench.ballast.settle()?;
        let (rate, snapshots, took) = bench.each(CONNECTIONS)?;
        asked.with.push(rate);
        (taken, time) = (taken + snapshots, time + took);
        bench.tidy()?;
    }
    Ok(Snapping {
        flush: Latency::of(&flush),
        snapshot: Latency::of(&snapshots),
        requested: Latency::of(&requested),
        beside_one: Latency::of(&beside_one),
        idle: Latency::of(&idle),
        idle_requested: Latency::of(&idle_requested),
        beside,
        each,
        asked,
        asked_rate: taken as f64 / time.as_secs_f64(),
    })
}

struct Bench<'a> {
    settings: &'a Settings,
    ballast: Ballast,
    seed: u64,
    /// Writes in flight.
    depth: usize,
}

impl Bench<'_> {
    fn workload(&mut self) -> Workload {
        self.seed += 2;
        Workload {
            pattern: Pattern::RandomWrite,
            block_bytes: 4096,
            depth: self.depth,
            span_bytes: self.settings.disk_bytes,
            paced_writes_per_second: 0,
            seed: self.seed,
        }
    }

    /// So much is written in a round that the ring has room for it.
    fn limit(&self) -> Limit {
        Limit { time: self.settings.burst, bytes: self.settings.cache_bytes / 4 }
    }

    /// A round of writes, until all of them are in the store; how many in a second.
    fn load(&mut self) -> Result<f64> {
        let iops = self.writes()?;
        self.ballast.settle()?;
        Ok(iops)
    }

    /// A round of writes, with a snapshot every [`INTERVAL`]: how many writes in a second, and how long snapshots took.
    fn snapped(&mut self, way: Way) -> Result<(f64, Histogram<u64>)> {
        let snapper = Snapper::start(&self.ballast, INTERVAL, way)?;
        let iops = self.writes()?;
        // Before the disk settles: that is no load.
        let times = snapper.stop()?;
        self.ballast.settle()?;
        Ok((iops, times))
    }

    /// A round of writes; how many in a second.
    fn writes(&mut self) -> Result<f64> {
        let workload = self.workload();
        let sample = measure(&self.ballast, &workload, self.limit(), self.settings.poll)?;
        Ok(sample.measured.iops())
    }

    /// Sets the disk's schedule; how many snapshots the store has by then.
    fn schedule(&mut self, rules: &str) -> Result<u64> {
        let mut control = Control::connect(&self.ballast.agent().config().run_dir())?;
        let list = format!("/v1/vdis/{DISK_NAME}/snapshots/list");
        let list = control.post(&list, &json!({ "oldest_first": false, "limit": 4000 }))?;
        let path = format!("/v1/vdis/{DISK_NAME}/schedule");
        control.post(&path, &json!({ "schedule": rules }))?;
        let rows = list["snapshots"].as_array().context("a list of snapshots")?;
        Ok(rows.len() as u64)
    }

    /// Gives back what the snapshots held.
    fn tidy(&mut self) -> Result<()> {
        self.ballast.settle()?;
        let mut control = Control::connect(&self.ballast.agent().config().run_dir())?;
        delete_snapshots_of(&mut control, DISK_NAME)?;
        collect(self.ballast.agent(), &mut control)?;
        self.ballast.settle()
    }

    /// Snapshots of an idle disk, one after the other.
    fn snapshots_alone(&mut self, way: Way) -> Result<Histogram<u64>> {
        let snapper = Snapper::start(&self.ballast, INTERVAL, way)?;
        std::thread::sleep(self.settings.burst);
        let times = snapper.stop()?;
        self.tidy()?;
        Ok(times)
    }

    /// The guest's own flushes, one every [`INTERVAL`], under the load.
    fn flushes(&mut self) -> Result<Histogram<u64>> {
        let limit = self.limit();
        let mut writer = Writer::connect(&self.ballast, self.settings.disk_bytes, 1)?;
        let (mut times, mut sent) = (histogram()?, None);
        let (begun, mut next) = (Instant::now(), Instant::now());
        writer.start_all()?;
        while begun.elapsed() < limit.time && writer.writes * 4096 < limit.bytes {
            writer.wait()?;
            let now = Instant::now();
            while let Some(slot) = writer.take()? {
                if slot == DEPTH {
                    let took: Duration = now - sent.take().context("a flush that was not sent")?;
                    times.saturating_record(took.as_nanos() as u64);
                } else {
                    writer.write(slot)?;
                }
            }
            if now >= next && sent.is_none() {
                writer.disk.submit(DEPTH, &Request::Flush)?;
                (sent, next) = (Some(now), now + INTERVAL);
            }
            writer.disk.kick()?;
        }
        writer.finish()?;
        self.ballast.settle()?;
        Ok(times)
    }

    /// A round of writes with a snapshot for each, through so many connections; with none the same without snapshots. A write
    /// waits while as many snapshots as there may be writes in flight are outstanding. Writes in a second, snapshots, time.
    fn each(&mut self, connections: usize) -> Result<(f64, u64, Duration)> {
        let limit = Limit { time: self.settings.burst.min(EACH_TIME), ..self.limit() };
        let owed = Arc::new(AtomicU64::new(0));
        let (wanted, queue) = mpsc::channel::<()>();
        let queue = Arc::new(std::sync::Mutex::new(queue));
        let mut askers = Vec::new();
        for _ in 0..connections {
            let mut control = Control::connect(&self.ballast.agent().config().run_dir())?;
            let (queue, owed) = (Arc::clone(&queue), Arc::clone(&owed));
            askers.push(std::thread::spawn(move || -> Result<u64> {
                let mut taken = 0;
                loop {
                    let next = queue.lock().unwrap_or_else(|e| e.into_inner()).recv();
                    if next.is_err() {
                        return Ok(taken);
                    }
                    snap(&mut control)?;
                    taken += 1;
                    owed.fetch_sub(1, Ordering::Release);
                }
            }));
        }
        self.seed += 1;
        let mut writer = Writer::connect(&self.ballast, self.settings.disk_bytes, 0)?;
        let (begun, mut idle) = (Instant::now(), Vec::new());
        writer.start_all()?;
        while begun.elapsed() < limit.time && writer.writes * 4096 < limit.bytes {
            if writer.disk.in_flight() > 0 {
                writer.wait()?;
            } else {
                std::thread::sleep(Duration::from_micros(20));
            }
            while let Some(slot) = writer.take()? {
                if connections > 0 {
                    owed.fetch_add(1, Ordering::Release);
                    wanted.send(()).context("no thread is left that asks for snapshots")?;
                }
                idle.push(slot);
            }
            while owed.load(Ordering::Acquire) < DEPTH as u64
                && let Some(slot) = idle.pop()
            {
                writer.write(slot)?;
            }
            writer.disk.kick()?;
        }
        let writes = writer.writes;
        writer.finish()?;
        drop(wanted);
        let mut taken = 0;
        for asker in askers {
            taken += asker.join().map_err(|_| anyhow::anyhow!("a client's thread failed"))??;
        }
        let took = begun.elapsed();
        Ok((writes as f64 / took.as_secs_f64(), taken, took))
    }
}

/// Random writes whose slots its user refills.
struct Writer {
    disk: Disk,
    random: Random,
    blocks: u64,
    writes: u64,
}

impl Writer {
    /// With so many slots more than the writes need.
    fn connect(ballast: &Ballast, disk_bytes: u64, more: usize) -> Result<Self> {
        let options = Options { slots: DEPTH + more, ..Options::default() };
        let mut disk = Disk::connect(ballast.socket(), &options)?;
        let mut random = Random(0x0abc_5eed);
        for slot in 0..DEPTH {
            random.fill(disk.buffer(slot));
        }
        Ok(Self { disk, random, blocks: disk_bytes / 4096, writes: 0 })
    }

    fn start_all(&mut self) -> Result<()> {
        (0..DEPTH).try_for_each(|slot| self.write(slot))?;
        self.disk.kick()
    }

    fn write(&mut self, slot: usize) -> Result<()> {
        let stamp = self.random.word();
        self.disk.buffer(slot)[..8].copy_from_slice(&stamp.to_le_bytes());
        let sector = self.random.below(self.blocks) * 8;
        self.disk.submit(slot, &Request::Write { sector, sectors: 8 })
    }

    fn wait(&mut self) -> Result<()> {
        self.disk.wait(NAP).map(drop)
    }

    /// The slot of a request that was answered.
    fn take(&mut self) -> Result<Option<usize>> {
        let Some(done) = self.disk.take()? else { return Ok(None) };
        ensure!(done.status == Status::Ok, "a request ended with {:?}", done.status);
        if done.slot < DEPTH {
            self.writes += 1;
        }
        Ok(Some(done.slot))
    }

    /// Waits for what is in flight.
    fn finish(mut self) -> Result<()> {
        let begun = Instant::now();
        while self.disk.in_flight() > 0 {
            ensure!(begun.elapsed() < Duration::from_secs(60), "requests have no answer");
            self.wait()?;
            while self.take()?.is_some() {}
        }
        self.disk.stop()
    }
}

/// How snapshots are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By the line.
    Stream,
    /// A request for each.
    Request,
}

/// Who asks.
enum Asker {
    Stream(Stream),
    Request(Control),
}

impl Asker {
    fn snap(&mut self) -> Result<()> {
        match self {
            Self::Stream(stream) => stream.snap(),
            Self::Request(control) => snap(control),
        }
    }
}

/// Asks for a snapshot over and over, in a thread of its own.
#[derive(Debug)]
pub struct Snapper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Histogram<u64>>>,
}

impl Snapper {
    /// Begins, with one snapshot per `interval`, or as fast as they are answered.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start(ballast: &Ballast, interval: Duration, way: Way) -> Result<Self> {
        let control = Control::connect(&ballast.agent().config().run_dir())?;
        let mut asker = match way {
            Way::Stream => Asker::Stream(control.stream(DISK_NAME)?),
            Way::Request => Asker::Request(control),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // The load's own client, which shares the core, is not to be waited for.
            blockstore::turns::take_turns_of(TURN).context("ask for short turns")?;
            let (mut times, mut next) = (histogram()?, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                let sent = Instant::now();
                asker.snap()?;
                times.saturating_record(sent.elapsed().as_nanos() as u64);
                // A late one is not made up for.
                next = (next + interval).max(Instant::now());
            }
            Ok(times)
        });
        Ok(Self { stop, thread })
    }

    /// Ends; how long each took.
    ///
    /// # Errors
    /// When one failed.
    pub fn stop(self) -> Result<Histogram<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client's thread failed"))?
    }
}

fn snap(control: &mut Control) -> Result<()> {
    control.post(&format!("/v1/vdis/{DISK_NAME}/snapshots"), &json!({})).map(drop)
}
