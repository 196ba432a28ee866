//! `bench`: Ballast and qemu-storage-daemon side by side, and the agent's memory and recovery time.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench::compare::Line;
use bench::memory::Memory;
use bench::outage::Outage;
use bench::recovery::Recovery;
use bench::suite::{self, Settings};
use bench::{agent, machine, memory, outage, process, recovery, report};
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
    /// Limits, comparison, memory, recovery and outage in turn.
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
}

#[derive(Debug, Args)]
struct CliOptions {
    /// Where files are made (they are removed again): the file system to measure.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
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
    /// Size of the cache in the memory measurement.
    #[arg(long, global = true, default_value = "2GiB", value_parser = parse_size)]
    memory_cache: u64,
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
                recovery(&settings, cli.options.recovery_ring, &out)?;
                outage(&settings, &out)?;
            }
            Ok(())
        }
        Task::Limits => limits(&settings, &out),
        Task::Compare => compare(&settings, &out),
        Task::Memory => memory(&settings, cli.options.memory_cache, &out),
        Task::Recovery => recovery(&settings, cli.options.recovery_ring, &out),
        Task::Outage => outage(&settings, &out),
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

fn recovery(settings: &Settings, ring_bytes: u64, out: &Output) -> Result<()> {
    eprintln!("recovery of the agent …");
    let disk_bytes = settings.disk_bytes.max(ring_bytes);
    let settings = Settings { cache_bytes: ring_bytes, disk_bytes, ..settings.clone() };
    out.section("recovery", &recovery_text(&recovery::run(&settings)?))
}

fn recovery_text(found: &Recovery) -> String {
    format!(
        "Ring of {} MiB filled with {} random 4 KiB writes while the shared device was frozen ({} MiB \
         dirty), agent killed and started with the device still frozen: its socket accepted after {:.2} s, the first read was served after \
         {:.2} s (target: 5 s for 16 GiB), peak resident memory {} MiB.",
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
        row("back, until 90 % is drained (target: ≤ 3)", &found.draining),
    ];
    format!(
        "`{command}`\n\nDisk {} MiB, ring {} MiB; 4k random writes, one at a time; target and client share a core.\n\n{}\n\
         Writers were slowed when {} % of the ring was dirty (target: ≥ 75 %), and stopped at {} %. The store answered {:.1} s after its \
         return; 90 % was drained after {:.1} s.",
        settings.disk_bytes >> 20,
        found.ring_bytes >> 20,
        report::table(
            &["shared device", "writes", "p50 µs", "p99 µs", "max µs", "p99 against there"],
            &rows
        ),
        100 * found.absorbed_bytes / found.ring_bytes,
        100 * found.full_bytes / found.ring_bytes,
        found.answered.as_secs_f64(),
        found.drained.as_secs_f64(),
    )
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
        other => return Err(format!("{other}: KiB, MiB or GiB")),
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
