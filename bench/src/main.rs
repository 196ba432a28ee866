//! `bench`: Ballast and qemu-storage-daemon side by side, the agent's memory and recovery time, snapshots, and garbage
//! collection.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench::compare::Line;
use bench::memory::Memory;
use bench::outage::Outage;
use bench::plot::Plot;
use bench::recovery::Recovery;
use bench::suite::{self, Settings};
use bench::synthetic::{self, Shape};
use bench::{
    agent, beside, clones, collecting, collecting_report, depths, machine, memory, outage, process,
    recovery, report, snapping, snapshots_report,
};
use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about = "Measures Ballast against qemu-storage-daemon, side by side in one run")]
struct Cli {
    #[command(subcommand)]
    command: Task,
    #[command(flatten)]
    options: CliOptions,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Task {
    /// All of these in turn.
    All,
    /// fio on the file system: what no server on it can pass.
    Limits,
    /// Every promised ratio, servers taking turns.
    Compare,
    /// Memory of the agent per GiB of random 4 KiB blocks in its cache.
    Memory,
    /// Time from the agent's start to its first read after a crash with a full ring.
    Recovery,
    /// Latency of writes around an outage of the shared device, and what the ring takes before it slows writers.
    Outage,
    /// Garbage collection over synthetic stores: sizes, numbers of snapshots and of disks.
    Gc,
    /// A guest beside garbage collection at its default limit.
    GcBeside,
    /// Latency of snapshots under load, and what they cost the guest.
    Snapshots,
    /// Random reads by the number of snapshots, beside chains of qcow2 overlays.
    SnapshotsDepth,
    /// Clones, many snapshots of one disk, and the store used by an empty one.
    SnapshotsMany,
}

#[derive(Debug, Args)]
struct CliOptions {
    /// Where files are made (they are removed again): the file system to measure.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// Where the image behind the iSCSI target is made, for outages; as --dir when not given. In memory (/dev/shm) it does not compete
    /// with the cache for one device.
    #[arg(long, global = true)]
    san_dir: Option<PathBuf>,
    /// The agent's binary; built from this workspace when not given.
    #[arg(long, global = true)]
    ballast: Option<PathBuf>,
    /// Leave Ballast out.
    #[arg(long, global = true)]
    peer_only: bool,
    /// Size of the disk.
    #[arg(long, global = true, default_value = "4GiB", value_parser = parse_size)]
    disk_size: u64,
    /// Size of the cache for burst and read rows.
    #[arg(long, global = true, default_value = "8GiB", value_parser = parse_size)]
    cache_size: u64,
    /// Size of the cache for sustained write rows.
    #[arg(long, global = true, default_value = "1GiB", value_parser = parse_size)]
    ring_size: u64,
    /// Size of the ring in the recovery measurement.
    #[arg(long, global = true, default_value = "4GiB", value_parser = parse_size)]
    recovery_ring: u64,
    /// Further kills in the recovery measurement, each with its pause.
    #[arg(long, global = true, default_value_t = 20)]
    recovery_kills: usize,
    /// Size of the cache in the memory measurement.
    #[arg(long, global = true, default_value = "2GiB", value_parser = parse_size)]
    memory_cache: u64,
    /// Bytes in use of the stores that are collected, separated by commas.
    #[arg(long, global = true, default_value = "1GiB,10GiB,100GiB", value_delimiter = ',', value_parser = parse_size)]
    gc_sizes: Vec<u64>,
    /// Bytes in use of the store whose number of snapshots and disks is varied.
    #[arg(long, global = true, default_value = "10GiB", value_parser = parse_size)]
    gc_varied: u64,
    /// Snapshots of one disk in it, one store per number.
    #[arg(long, global = true, default_value = "100,1000", value_delimiter = ',')]
    gc_snapshots: Vec<u32>,
    /// Disks in it, one store per number.
    #[arg(long, global = true, default_value = "10,100", value_delimiter = ',')]
    gc_disks: Vec<u32>,
    /// Bytes in use of the store that is collected beside a guest.
    #[arg(long, global = true, default_value = "300GiB", value_parser = parse_size)]
    gc_beside: u64,
    /// Clones of one snapshot.
    #[arg(long, global = true, default_value_t = 1000)]
    clones: u32,
    /// Bytes of the disk that is cloned.
    #[arg(long, global = true, default_value = "500000000000", value_parser = parse_size)]
    clone_size: u64,
    /// Bytes of it that were written.
    #[arg(long, global = true, default_value = "10GiB", value_parser = parse_size)]
    clone_used: u64,
    /// Snapshots of one disk, one store per number.
    #[arg(long, global = true, default_value = "0,10000,100000", value_delimiter = ',')]
    snapshots: Vec<u32>,
    /// Times each server is measured per row.
    #[arg(long, global = true, default_value_t = 3)]
    rounds: usize,
    /// Seconds of one burst measurement.
    #[arg(long, global = true, default_value_t = 5)]
    seconds: u64,
    /// Seconds of one sustained measurement.
    #[arg(long, global = true, default_value_t = 10)]
    sustained_seconds: u64,
    /// Only rows whose name (title, ring and depth) holds this.
    #[arg(long, global = true)]
    only: Option<String>,
    /// The client polls instead of sleeping until it is called.
    #[arg(long, global = true)]
    poll: bool,
    /// One more argument for `ballast agent`; may be repeated.
    #[arg(long, global = true, allow_hyphen_values = true)]
    agent_arg: Vec<String>,
    /// Document whose sections are rewritten with the results.
    #[arg(long, global = true)]
    markdown: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let settings = settings(&cli.options, !matches!(cli.command, Task::Limits))?;
    process::pin_self(suite::CLIENT_CORE)?;
    let out = Output { markdown: cli.options.markdown.clone(), command: command_line() };
    match cli.command {
        Task::All => {
            out.section("machine", &machine_text(&settings))?;
            limits(&settings, &out)?;
            compare(&settings, &out)?;
            if settings.ballast.is_some() {
                memory(&settings, cli.options.memory_cache, &out)?;
                recovery(&settings, &cli.options, &out)?;
                outage(&settings, &out)?;
                snapshots(&settings, &out)?;
                snapshots_depth(&settings, &out)?;
                snapshots_many(&settings, &cli.options, &out)?;
                gc_beside(&settings, &cli.options, &out)?;
                gc(&settings, &cli.options, &out)?;
            }
            Ok(())
        }
        Task::Limits => limits(&settings, &out),
        Task::Compare => compare(&settings, &out),
        Task::Memory => memory(&settings, cli.options.memory_cache, &out),
        Task::Recovery => recovery(&settings, &cli.options, &out),
        Task::Outage => outage(&settings, &out),
        Task::Gc => gc(&settings, &cli.options, &out),
        Task::GcBeside => gc_beside(&settings, &cli.options, &out),
        Task::Snapshots => snapshots(&settings, &out),
        Task::SnapshotsDepth => snapshots_depth(&settings, &out),
        Task::SnapshotsMany => snapshots_many(&settings, &cli.options, &out),
    }
}

/// Where results go: the terminal, and the document if one was named.
struct Output {
    markdown: Option<PathBuf>,
    command: String,
}

impl Output {
    fn section(&self, name: &str, text: &str) -> Result<()> {
        println!("\n{text}");
        match &self.markdown {
            Some(path) => report::write_section(path, name, text),
            None => Ok(()),
        }
    }

    /// A plot beside the document, in `plots`; the line that shows it there.
    fn plot(&self, name: &str, plot: &Plot) -> Result<String> {
        let Some(document) = &self.markdown else { return Ok(String::new()) };
        let place = format!("plots/{name}.svg");
        plot.write(&document.with_file_name(&place))?;
        Ok(format!("![{}]({place})\n", plot.title))
    }
}

fn limits(settings: &Settings, out: &Output) -> Result<()> {
    eprintln!("fio on a file of {} MiB …", settings.disk_bytes >> 20);
    out.section("limits", &report::limits(&suite::limits(settings)?))
}

fn compare(settings: &Settings, out: &Output) -> Result<()> {
    let lines = suite::compare(settings, &mut |line| eprint!("{}", progress(line)))?;
    let conditions = format!(
        "`{}`\n\nDisk {} MiB; cache {} MiB for burst and read rows, {} MiB for sustained writes, \
         filled once before each; {} rounds in turn; medians. Each server is on core {}, the client \
         on core {}, {}.",
        out.command,
        settings.disk_bytes >> 20,
        settings.cache_bytes >> 20,
        settings.ring_bytes >> 20,
        settings.rounds,
        suite::SERVER_CORE,
        suite::CLIENT_CORE,
        if settings.poll { "polling" } else { "sleeping until called" },
    );
    let text = format!(
        "{conditions}\n\n{}\nRounds and latencies; \"other CPU\" is the share of one core that neither the server nor \
         the client used (interrupts, other work on the machine): figures with much of it are \
         spoilt.\n\n{}",
        report::comparison(&lines),
        report::rounds(&lines)
    );
    out.section("compare", &text)
}

fn progress(line: &Line) -> String {
    let mut text = format!("{} ({:?}), {}:", line.title, line.mode, line.metric.unit());
    for figures in &line.figures {
        text += &format!("  {} {}", figures.server, report::number(figures.median()));
    }
    if let (Some(ratio), Some(met)) = (line.ratio(), line.met()) {
        text += &format!("  ratio {ratio:.2} {}", if met { "ok" } else { "MISSED" });
    }
    text + "\n"
}

fn memory(settings: &Settings, cache_bytes: u64, out: &Output) -> Result<()> {
    eprintln!("memory of the agent …");
    let settings = Settings { cache_bytes, ..settings.clone() };
    let found = memory::run(&settings)?;
    out.section("memory", &memory_text(&settings, &found))
}

fn memory_text(settings: &Settings, found: &Memory) -> String {
    let row = |name: String, reading: &memory::Reading| {
        let mib = |bytes: u64| format!("{}", bytes >> 20);
        vec![
            name,
            mib(reading.dirty_bytes),
            mib(reading.clean_bytes),
            mib(reading.anonymous_bytes),
            mib(reading.allowed_bytes()),
            mib(reading.peak_bytes),
        ]
    };
    let mut rows = vec![row("idle".into(), &found.idle)];
    for (index, reading) in found.filled.iter().enumerate() {
        rows.push(row(format!("{} % of the cache written", 25 * (index + 1)), reading));
    }
    format!(
        "Random 4 KiB writes on a disk of {} MiB, cache {} MiB.\n\n{}\nAllowed: 64 MiB, 96 MiB of \
         configured caches, 3 MiB per GiB of dirty and clean data: {}.",
        settings.disk_bytes >> 20,
        settings.cache_bytes >> 20,
        report::table(
            &["state", "dirty MiB", "clean MiB", "private MiB", "allowed MiB", "peak resident MiB"],
            &rows
        ),
        if found.is_within_limits() { "met" } else { "**missed**" },
    )
}

fn recovery(settings: &Settings, options: &CliOptions, out: &Output) -> Result<()> {
    let ring_bytes = options.recovery_ring;
    eprintln!("recovery of the agent …");
    let disk_bytes = settings.disk_bytes.max(ring_bytes);
    let settings = Settings { cache_bytes: ring_bytes, disk_bytes, ..settings.clone() };
    out.section("recovery", &recovery_text(&recovery::run(&settings, options.recovery_kills)?))
}

fn recovery_text(found: &Recovery) -> String {
    let seconds =
        |pause: Option<&Duration>| format!("{:.2}", pause.map_or(0.0, Duration::as_secs_f64));
    let pauses = match &found.pauses[..] {
        [] => String::new(),
        pauses => format!(
            " Killed {} times more, each time started at once: from the kill until a read was answered half of the pauses took at \
             most {} s, 99 % at most {} s (target: 1 s for 1 GiB), the longest {} s.",
            pauses.len(),
            seconds(pauses.get((pauses.len() - 1) / 2)),
            seconds(pauses.get((pauses.len() * 99).div_ceil(100) - 1)),
            seconds(pauses.last()),
        ),
    };
    format!(
        "Ring of {} MiB filled with {} random 4 KiB writes while the shared device was frozen ({} MiB \
         dirty), agent killed and started with the device still frozen: its socket accepted after {:.2} s, the first read was served after \
         {:.2} s (target: 5 s for 16 GiB), peak resident memory {} MiB.{pauses}",
        found.ring_bytes >> 20,
        report::number(found.writes as f64),
        found.dirty_bytes >> 20,
        found.connected.as_secs_f64(),
        found.first_read.as_secs_f64(),
        found.peak_bytes >> 20,
    )
}

fn outage(settings: &Settings, out: &Output) -> Result<()> {
    eprintln!("an outage of the shared device …");
    let found = outage::run(settings)?;
    out.section("outage", &outage_text(&out.command, settings, &found))
}

fn outage_text(command: &str, settings: &Settings, found: &Outage) -> String {
    let row = |what: &str, times: &outage::Latency| {
        let micros = |time: Duration| time.as_micros().to_string();
        let ratio = times.p99.as_secs_f64() / found.present.p99.as_secs_f64();
        let writes = times.writes.to_string();
        let (p50, p99, max) = (micros(times.p50), micros(times.p99), micros(times.max));
        vec![what.to_owned(), writes, p50, p99, max, format!("{ratio:.2}")]
    };
    let rows = [
        row("there", &found.present),
        row("frozen (target: ≤ 1.1)", &found.away),
        row("back, with a full ring, until 90 % is drained", &found.from_full.writes),
        row("back, with half of the ring dirty, the same (target: ≤ 3)", &found.from_half.writes),
    ];
    format!(
        "`{command}`\n\nDisk {} MiB, ring {} MiB; 4k random writes, one at a time; target and client share a core.\n\n{}\n\
         Writers were slowed when {} % of the ring was dirty (target: ≥ 75 %), and stopped at {} %. The store answered {:.1} s and {:.1} s after its \
         returns; 90 % was drained after {:.1} s and {:.1} s.",
        settings.disk_bytes >> 20,
        found.ring_bytes >> 20,
        report::table(
            &["shared device", "writes", "p50 µs", "p99 µs", "max µs", "p99 against there"],
            &rows
        ),
        100 * found.absorbed_bytes / found.ring_bytes,
        100 * found.full_bytes / found.ring_bytes,
        found.from_full.answered.as_secs_f64(),
        found.from_half.answered.as_secs_f64(),
        found.from_full.drained.as_secs_f64(),
        found.from_half.drained.as_secs_f64(),
    )
}

fn gc(settings: &Settings, options: &CliOptions, out: &Output) -> Result<()> {
    // The agent uses all cores, as it does in earnest; nothing else is under load.
    process::unpin_self()?;
    let varied = Shape { used_bytes: options.gc_varied, ..Shape::default() };
    let sizes = options.gc_sizes.iter().map(|&used_bytes| Shape { used_bytes, ..varied });
    let snapshots = options.gc_snapshots.iter().map(|&snapshots| Shape { snapshots, ..varied });
    let disks = options.gc_disks.iter().map(|&disks| Shape { disks, ..varied });
    let mut found = Vec::new();
    for shape in sizes.chain(snapshots).chain(disks) {
        eprintln!(
            "a store with {} MiB in use, {} disks, {} snapshots …",
            shape.used_bytes >> 20,
            shape.disks,
            shape.snapshots
        );
        found.push(collecting::run(settings, shape)?);
        if let Some(last) = found.last() {
            eprint!("{}", collecting_report::cycles(std::slice::from_ref(last)));
        }
    }
    let text = format!(
        "`{}`\n\nSynthetic stores (real metadata, no data) in a sparse file; the agent without a limit (`--gc-rate 0`), on all \
         cores; before each snapshot {} random blocks were overwritten. \"Device\" is the same metadata read in order with \
         direct I/O right after the cycle; \"bits\" one bit per block of the store.\n\n{}\n{}{}",
        out.command,
        synthetic::WRITES_PER_SNAPSHOT,
        collecting_report::cycles(&found),
        out.plot("gc-time", &collecting_report::time_plot(&found))?,
        out.plot("gc-number", &collecting_report::number_plot(&found))?,
    );
    out.section("gc", &text)
}

fn gc_beside(settings: &Settings, options: &CliOptions, out: &Output) -> Result<()> {
    eprintln!("a guest beside garbage collection …");
    let text = format!(
        "`{}`\n\nDisk {} MiB, cache {} MiB, in a synthetic store with {} GiB of another disk; {} rounds in turn; collection at \
         its default limit. The agent is on core {}, the client on core {}.\n\n{}",
        out.command,
        settings.disk_bytes >> 20,
        settings.cache_bytes >> 20,
        options.gc_beside >> 30,
        settings.rounds,
        suite::SERVER_CORE,
        suite::CLIENT_CORE,
        snapshots_report::beside(&beside::run(settings, options.gc_beside)?),
    );
    out.section("gc-beside", &text)
}

fn snapshots(settings: &Settings, out: &Output) -> Result<()> {
    eprintln!("snapshots under load …");
    let text = format!(
        "`{}`\n\nDisk {} MiB, cache {} MiB; 4k random writes, depth {}; {} rounds in turn; snapshots through the control socket. \
         The agent is on core {}, all clients on core {}.\n\n{}",
        out.command,
        settings.disk_bytes >> 20,
        settings.cache_bytes >> 20,
        snapping::DEPTH,
        settings.rounds,
        suite::SERVER_CORE,
        suite::CLIENT_CORE,
        snapshots_report::snapping(&snapping::run(settings)?),
    );
    out.section("snapshots", &text)
}

fn snapshots_depth(settings: &Settings, out: &Output) -> Result<()> {
    eprintln!("reads by the number of snapshots …");
    let found = depths::run(settings)?;
    let text = format!(
        "`{}`\n\n4k random reads, depth 32, of a disk of {} MiB that was written once, and {} random blocks of it before each \
         snapshot or into each overlay; the agent's cache is too small for it, so reads go to the store. {} rounds, depths in \
         turn, there and back; \"against none\" is the median of the rounds' own ratios. Servers are on core {}, the client on core {}.\n\n{}\n{}",
        out.command,
        settings.disk_bytes.min(depths::DISK_BYTES_MAX) >> 20,
        synthetic::WRITES_PER_SNAPSHOT,
        settings.rounds,
        suite::SERVER_CORE,
        suite::CLIENT_CORE,
        snapshots_report::depths(&found),
        out.plot("snapshots-depth", &snapshots_report::depth_plot(&found))?,
    );
    out.section("snapshots-depth", &text)
}

fn snapshots_many(settings: &Settings, options: &CliOptions, out: &Output) -> Result<()> {
    // The agent uses all cores, as it does in earnest.
    process::unpin_self()?;
    eprintln!("{} clones …", options.clones);
    let clones = clones::clones(settings, options.clone_size, options.clone_used, options.clones)?;
    eprintln!("empty snapshots …");
    let empty = clones::empty(settings)?;
    let mut many = Vec::new();
    for &snapshots in &options.snapshots {
        eprintln!("a disk with {snapshots} snapshots …");
        many.push(clones::many(settings, snapshots)?);
    }
    process::pin_self(suite::CLIENT_CORE)?;
    let text =
        format!("`{}`\n\n{}", out.command, snapshots_report::numbers(&clones, &many, &empty));
    out.section("snapshots-many", &text)
}

fn machine_text(settings: &Settings) -> String {
    let facts: Vec<Vec<String>> = machine::facts(&settings.dir)
        .into_iter()
        .map(|(what, value)| vec![what.to_owned(), value])
        .collect();
    report::table(&["machine", ""], &facts)
}

/// Fills the settings in; with `agent_needed`, unless Ballast is left out, builds its binary.
fn settings(options: &CliOptions, agent_needed: bool) -> Result<Settings> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?;
    let dir = options.dir.clone().unwrap_or_else(|| root.join("target").join("bench"));
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let ballast = match (&options.ballast, options.peer_only || !agent_needed) {
        (_, true) => None,
        (Some(path), false) => Some(path.clone()),
        (None, false) => Some(build_ballast(root)?),
    };
    ensure!(options.rounds > 0, "--rounds must be at least 1");
    Ok(Settings {
        san_dir: options.san_dir.clone().unwrap_or_else(|| dir.clone()),
        dir,
        ballast,
        disk_bytes: options.disk_size,
        cache_bytes: options.cache_size,
        ring_bytes: options.ring_size,
        rounds: options.rounds,
        burst: Duration::from_secs(options.seconds),
        sustained: Duration::from_secs(options.sustained_seconds),
        filter: options.only.clone(),
        poll: options.poll,
        agent_arguments: options.agent_arg.clone(),
    })
}

/// Builds the agent with optimisation, so that what is measured is what lies in the tree.
fn build_ballast(root: &Path) -> Result<PathBuf> {
    let status = Command::new("cargo")
        .args(["build", "--release", "--quiet", "-p", "agent"])
        .current_dir(root)
        .status()
        .context("run cargo")?;
    if !status.success() {
        bail!("the agent does not build; use --peer-only to measure without it");
    }
    agent::find_binary()
}

fn command_line() -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    format!("cargo run --release -p bench -- {}", arguments.join(" "))
}

/// `512MiB`, `4GiB`, or bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text}: a number is missing"))?;
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        other => return Err(format!("{other}: KiB, MiB, GiB or TiB")),
    };
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text}: out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        for bad in ["", "GiB", "0", "4GB", "-1", "99999999999GiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
