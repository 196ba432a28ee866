//! The command line: its grammar, and who carries out which command.
//!
//! `store` commands and `cache check` work on devices directly; `agent` is the daemon; everything else asks the daemon
//! through its control socket.

mod agent_commands;
mod cache_adopt;
mod cache_check;
mod cache_replace;
mod diff;
mod drill;
mod gc;
mod hydrate;
mod looking;
mod loss;
mod output;
mod schedule;
mod scrub;
mod sizes;
mod snap;
mod snap_stream;
mod store_commands;
mod store_dump;
mod store_repair;
mod tables;
mod tree;

use crate::api::Origin;
use crate::api::snapshots::AsOf;
use crate::config::{AgentArgs, DeviceArgs, RUN_DIR_DEFAULT};
use crate::error::{EXIT_CODES, ErrorBody, Failure, Kind, Result};
use crate::machine::MACHINE_ID_FILE;
use crate::units::{parse_duration, parse_rate, parse_size};
use blockstore::{Schedule, WhenOffline};
use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Virtual disks for the VMs of this host: acknowledged by a local log, kept in a store on a shared device.
#[derive(Debug, Parser)]
#[command(name = "ballast", version, after_help = EXIT_CODES)]
#[command(propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Folder of the agent's sockets [default: /run/ballast]
    #[arg(long, global = true, value_name = "DIR", env = "BALLAST_RUN_DIR")]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    #[command(after_help = EXIT_CODES)]
    Agent(Box<AgentArgs>),
    /// Format, examine and repair a shared store, without the daemon
    #[command(subcommand, arg_required_else_help = true)]
    Store(StoreCommand),
    /// Manage virtual disks
    #[command(subcommand, arg_required_else_help = true)]
    Vdi(VdiCommand),
    /// Take and manage snapshots
    #[command(subcommand, arg_required_else_help = true)]
    Snap(snap::SnapCommand),
    /// Give back what no disk and no snapshot holds any more
    #[command(subcommand, arg_required_else_help = true)]
    Gc(gc::GcCommand),
    /// Verify everything in the store, slowly, beside all that goes on
    #[command(subcommand, arg_required_else_help = true)]
    Scrub(scrub::ScrubCommand),
    /// Examine and drain the local cache
    #[command(subcommand, arg_required_else_help = true)]
    Cache(CacheCommand),
    /// Show how the agent, its store, its cache and its disks are
    Status,
    /// Print the status as text for Prometheus
    Metrics,
    /// Rehearse an outage of the store
    #[command(subcommand, arg_required_else_help = true)]
    Outage(OutageCommand),
}

const REPAIR_CODES: &str = "\
Exit codes:
  0  the store is sound: there was nothing to repair, or all of it is repaired
  1  the device failed, or holds a store that cannot be opened; the same again ends what was begun
  2  wrong flags, or nobody can be asked: standard input is no terminal, and neither --yes nor --dry-run is given
  3  no Ballast store
  5  problems are left: they have no one right answer, or --dry-run, or the answer was no
  6  somebody uses the store: it says who
  7  the store cannot be reached";

/// A store's device.
#[derive(Clone, Debug, clap::Args)]
struct StoreArgs {
    /// The device: file:PATH (a file or block device) or iscsi://HOST[:PORT]/IQN/LUN
    url: String,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Make a device a Ballast store; all that it held is lost
    Format {
        #[command(flatten)]
        store: StoreArgs,
        /// Use this much of the device; creates a file that does not exist [default: all of it]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
        /// Unit in which hosts claim space [default: fits the size]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        extent_size: Option<u64>,
        /// Even if the device holds a store or other data
        #[arg(long)]
        force: bool,
    },
    /// Show what a store is and how full
    Info {
        #[command(flatten)]
        store: StoreArgs,
        /// And what its space is used for, what each disk holds, and what deleting it frees: reads the maps of all disks
        /// and snapshots
        #[arg(long)]
        sizes: bool,
    },
    /// Verify every structure and every checksum of the metadata; changes nothing
    Check {
        #[command(flatten)]
        store: StoreArgs,
        /// Read and verify the disks' data, too
        #[arg(long)]
        data: bool,
    },
    /// Show any block, or a table, in words, with what is wrong with it; changes nothing
    ///
    /// WHAT is one of superblock, gc, hosts, extents, heads, vdi NAME, snapshots NAME, or a block's number (or --offset). Of a
    /// block it tells where it lies, what it holds, whether its checksum is right, and who points at it.
    #[command(after_help = EXIT_CODES)]
    Dump {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        args: store_dump::DumpArgs,
    },
    /// Check a store that no agent uses, and write what has one right answer, after asking
    ///
    /// That is: bits of bitmaps, from what disks and snapshots reach; a superblock, from its copy; headers of extents; records of
    /// garbage collection. All else is named, with what can be done, and left as it is. Killed at any moment, the same again ends
    /// what was begun.
    #[command(after_help = REPAIR_CODES)]
    Repair {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        args: store_repair::RepairArgs,
    },
    /// Write the committed image of a disk, or a snapshot, to a sparse file
    Export {
        #[command(flatten)]
        store: StoreArgs,
        /// The disk: name or UUID; or one of its snapshots: VDI@LSN or VDI@LABEL
        vdi: String,
        /// The file to write; must not exist
        outfile: PathBuf,
        /// Overwrite OUTFILE if it exists
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
enum VdiCommand {
    /// Create a disk: empty and thin, or as a clone of a snapshot
    Create {
        /// Its name: unique in the store
        name: String,
        /// What the guest sees: 4GiB, 512MiB, 1T or plain bytes
        #[arg(long, value_name = "SIZE", value_parser = parse_size, required_unless_present = "from")]
        size: Option<u64>,
        /// Begin as this snapshot of another disk: LSN or label, see 'snap list'
        #[arg(long, value_name = "VDI@SNAP", conflicts_with = "size")]
        from: Option<String>,
        /// With --from VDI: begin as that attached disk was, at an LSN, a time or so long ago, see 'snap create --as-of'
        #[arg(long, value_name = "POINT", value_parser = snap::parse_point, requires = "from")]
        as_of: Option<AsOf>,
        /// Requests that cannot go on while the store is away: stall, or fail-after=TIME [default: stall]
        #[arg(long, value_name = "POLICY")]
        when_offline: Option<WhenOffline>,
    },
    /// Change how a disk is served, at once, also while it is attached
    Set {
        /// The disk: name or UUID
        name: String,
        /// Requests that cannot go on while the store is away: stall, or fail-after=TIME
        #[arg(long, value_name = "POLICY", required = true)]
        when_offline: Option<WhenOffline>,
    },
    /// Show, set or end a disk's schedule of snapshots; also while the store is away
    ///
    /// A rule takes a snapshot in each interval of the wall clock (UTC) in which something was written, and keeps the last
    /// ones; older ones are deleted. One rule may have a snapshot taken behind every write instead. Snapshots that people took
    /// or labelled, and those that have clones, are never deleted.
    Schedule {
        /// The disk: name or UUID
        name: String,
        /// 'every 10s keep 6, every 1h keep 24': up to 8 rules, TIME in ms, s, m, h, d or w, or 'write' or 'batch' (a snapshot
        /// behind every write of the guest, or every batch of writes); none: end it, and keep what it took [default: show it]
        #[arg(value_name = "RULES")]
        rules: Option<Schedule>,
        /// As 'none'
        #[arg(long, conflicts_with = "rules")]
        clear: bool,
    },
    /// List the store's disks
    List,
    /// Show which disk was cloned from which snapshot: disks, snapshots with clones, and how many others there are
    Tree {
        /// As a graph in Graphviz' language
        #[arg(long)]
        dot: bool,
        /// As a picture
        #[arg(long, conflicts_with = "dot")]
        svg: bool,
        /// And what each holds, what of that it shares, and what deleting it frees: reads the maps of all disks and
        /// snapshots, at most [gc] rate a second, and ends with this command
        #[arg(long)]
        sizes: bool,
    },
    /// Show one disk
    Info {
        /// The disk: name or UUID
        name: String,
    },
    /// Serve a disk on this host, or a snapshot of one read-only; prints its vhost-user socket
    ///
    /// A snapshot is served as a disk of its own, wherever its disk is attached, and cannot be deleted meanwhile. Reads of it go
    /// to the store, and wait while that is away.
    Attach {
        /// The disk: name or UUID; with --read-only, a snapshot: VDI@LSN or VDI@LABEL
        #[arg(value_name = "VDI[@SNAP]")]
        name: String,
        /// Serve a snapshot, and refuse all that writes
        #[arg(long)]
        read_only: bool,
    },
    /// Fetch a disk from the store into the cache, so that it can be read without the store
    Hydrate {
        /// The disk: name or UUID
        name: String,
        /// Only what its virtual machine read when it last booted
        #[arg(long)]
        boot_trace: bool,
        /// Return when everything is fetched
        #[arg(long)]
        wait: bool,
    },
    /// Keep what the cache holds of a disk: it is not evicted while anything else could be
    Pin {
        /// The disk: name or UUID
        name: String,
    },
    /// No longer keep what the cache holds of a disk
    Unpin {
        /// The disk: name or UUID
        name: String,
    },
    /// Stop serving a disk: drains its log to the store, then releases it; or stop serving a snapshot
    Detach {
        /// The disk: name or UUID; or a snapshot that is attached: VDI@LSN or VDI@LABEL
        #[arg(value_name = "VDI[@SNAP]")]
        name: String,
        /// Even while a virtual machine is connected to it
        #[arg(long)]
        force: bool,
    },
    /// Delete a disk that is not attached
    Delete {
        /// The disk: name or UUID
        name: String,
        /// With all of its snapshots; else a disk that has any is not deleted
        #[arg(long)]
        with_snapshots: bool,
    },
    /// Take a detached disk back to a snapshot (--to), or one whose log is lost to what is committed (--accept-loss)
    ///
    /// With --to the disk becomes the snapshot's content and size; what it is now is kept as a snapshot. Without, it is about
    /// a disk whose log is lost for good: it goes back to what is committed in the store, and is detached.
    Rollback {
        /// The disk: name or UUID
        name: String,
        /// The snapshot: LSN or label, see 'snap list'
        #[arg(long, value_name = "SNAP")]
        to: Option<String>,
        /// Label of the snapshot of what the disk is now [default: 'before rollback to LSN']
        #[arg(long, value_name = "LABEL", requires = "to")]
        label: Option<String>,
        /// Do not keep what the disk is now: it is lost
        #[arg(long, requires = "to", conflicts_with = "label")]
        discard_present: bool,
        /// Give up what the lost log held; without --to and this, only say what would be lost
        #[arg(long, conflicts_with = "to")]
        accept_loss: bool,
    },
    /// Grow a disk
    Resize {
        /// The disk: name or UUID
        name: String,
        /// What the guest shall see
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: u64,
    },
}

#[derive(Debug, Subcommand)]
enum CacheCommand {
    /// Show the ring's fill
    Status,
    /// Return when all that was acknowledged before is committed to the store
    Drain {
        /// One disk, by name or UUID [default: all that are attached]
        vdi: Option<String>,
    },
    /// Verify every structure and checksum of a cache that no agent uses; changes nothing
    Check {
        /// Its file or device [default: what the last agent in --run-dir used]
        path: Option<PathBuf>,
    },
    /// Make a cache that was moved here from another machine this machine's own
    ///
    /// The agent that is started with it is the host that it was there: it serves that host's disks and replays their logs.
    /// The other machine must not use the cache any more, nor a copy of it.
    #[command(after_help = EXIT_CODES)]
    Adopt {
        /// Its file or device; both legs of a mirrored one
        #[arg(value_name = "PATH", num_args = 1..=2, required = true)]
        paths: Vec<PathBuf>,
        /// Without a leg that is not there, although it may hold writes that the other lacks
        #[arg(long)]
        degraded: bool,
        /// Where this machine's id is
        #[arg(long, value_name = "FILE", default_value = MACHINE_ID_FILE)]
        machine_id_file: PathBuf,
    },
    /// Free the space of a damaged log that was given up by 'vdi rollback'; 'cache status' names them
    DiscardQuarantine {
        /// The log's id
        log: uuid::Uuid,
    },
    /// Give the cache a new leg: after one was lost, or as the second of a cache that had one
    ///
    /// With NEW alone the agent in --run-dir does it while it serves its disks, and this command shows the progress.
    /// Interrupting it (Ctrl-C) changes nothing: the agent goes on, 'cache status' shows how far it is, the same command
    /// looks on again, and --cancel gives the new leg up. With GOOD and NEW, no agent may use the cache.
    #[command(arg_required_else_help = true, after_help = EXIT_CODES)]
    Replace {
        /// [GOOD] NEW. GOOD: the leg that has everything, when no agent runs. NEW: a path at which nothing is yet, a
        /// blank block device, or a leg of this cache that was left behind
        #[arg(value_name = "LEG", num_args = 1..=2, required_unless_present = "cancel")]
        legs: Vec<PathBuf>,
        /// Copy at most so much a second while disks are served; 0: as fast as it goes
        #[arg(long, value_name = "SIZE", value_parser = parse_rate, default_value = "128MiB")]
        rate: u64,
        /// Give up the new leg that is being filled
        #[arg(long, conflicts_with = "legs")]
        cancel: bool,
    },
}

#[derive(Debug, Subcommand)]
enum OutageCommand {
    /// Cut a disk off from the store on purpose, look on, restore it, drain it, report
    Drill {
        /// The disk: name or UUID
        vdi: String,
        /// How long; the agent ends the drill then, whatever becomes of this command
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s")]
        time: Duration,
        /// Begin the drill and return at once
        #[arg(long)]
        no_wait: bool,
    },
    /// End a drill before its time
    End {
        /// The disk: name or UUID
        vdi: String,
    },
}

/// `VDI@SNAP`.
pub(super) fn parse_origin(text: &str) -> Result<Origin, String> {
    let parts =
        text.split_once('@').filter(|(vdi, snapshot)| !vdi.is_empty() && !snapshot.is_empty());
    let (vdi, snapshot) = parts.ok_or(
        "give a disk, '@' and a snapshot's LSN or label, such as db@1834: see 'ballast snap list'",
    )?;
    Ok(Origin { vdi: vdi.into(), snapshot: snapshot.into() })
}

/// Runs the command of this process's arguments.
#[must_use]
pub fn run() -> ExitCode {
    let wants_json = std::env::args_os().skip(1).any(|argument| argument == "--json");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_usage(&error, wants_json),
    };
    let json = cli.json;
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(&failure, json);
            failure.exit_code()
        }
    }
}

/// Help and version are no errors; everything else is a usage error, as JSON where that was asked for.
fn refuse_usage(error: &clap::Error, json: bool) -> ExitCode {
    if !error.use_stderr() || !json {
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Kind::Usage.exit_code()));
    }
    let text = error.to_string();
    // What is missing, or possible, stands in the lines that follow.
    let first: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let first = first.join(" ");
    let failure = Failure::new(Kind::Usage, first.strip_prefix("error: ").unwrap_or(&first));
    report(&failure, json);
    failure.exit_code()
}

fn report(failure: &Failure, json: bool) {
    if failure.message.is_empty() {
        return; // A check has printed its findings already.
    }
    if json {
        let body = ErrorBody { error: failure.clone() };
        say(&serde_json::to_string(&body).unwrap_or_default());
    } else {
        say(&format!("ballast: {failure}"));
    }
}

/// On standard error, if somebody reads it.
fn say(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}

fn execute(cli: Cli) -> Result<()> {
    let run_dir = || cli.run_dir.clone().unwrap_or_else(|| RUN_DIR_DEFAULT.into());
    let out = output::Output { json: cli.json };
    match cli.command {
        Command::Agent(args) => {
            let config = crate::config::AgentConfig::load(*args, cli.run_dir)?;
            crate::daemon::run(config)
        }
        Command::Store(command) => block_on(store_commands::run(command, out)),
        Command::Cache(CacheCommand::Check { path }) => {
            block_on(cache_check::run(path, &run_dir(), out))
        }
        Command::Cache(CacheCommand::Adopt { paths, degraded, machine_id_file }) => {
            block_on(cache_adopt::run(&paths, degraded, &machine_id_file, out))
        }
        Command::Cache(CacheCommand::Replace { legs, rate, cancel: _ }) => match &legs[..] {
            [good, new] => block_on(cache_replace::offline(good, new, out)),
            [new] => block_on(cache_replace::online(new, rate, &run_dir(), out)),
            _ => block_on(cache_replace::cancel(&run_dir(), out)),
        },
        Command::Snap(command) => block_on(snap::run(command, &run_dir(), out)),
        Command::Gc(command) => block_on(gc::run(command, &run_dir(), out)),
        Command::Scrub(command) => block_on(scrub::run(command, &run_dir(), out)),
        Command::Vdi(command) => block_on(agent_commands::vdi(command, &run_dir(), out)),
        Command::Cache(CacheCommand::Status) => {
            block_on(agent_commands::cache_status(&run_dir(), out))
        }
        Command::Cache(CacheCommand::DiscardQuarantine { log }) => {
            block_on(loss::discard(log, &run_dir(), out))
        }
        Command::Cache(CacheCommand::Drain { vdi }) => {
            block_on(agent_commands::cache_drain(vdi, &run_dir(), out))
        }
        Command::Status => block_on(agent_commands::status(&run_dir(), out)),
        Command::Metrics => block_on(agent_commands::metrics(&run_dir(), out)),
        Command::Outage(OutageCommand::Drill { vdi, time, no_wait }) => {
            block_on(drill::begin(&vdi, time, !no_wait, &run_dir(), out))
        }
        Command::Outage(OutageCommand::End { vdi }) => block_on(drill::end(&vdi, &run_dir(), out)),
    }
}

fn block_on(task: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| {
        Failure::new(Kind::Failed, format!("cannot start the program's threads: {error}"))
    })?;
    let result = runtime.block_on(Box::pin(task));
    // A device that hangs must not keep a finished command from ending.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_fixed_forms_parse() {
        for line in [
            "store format file:/x --size 8GiB --extent-size 2GiB",
            "store info file:/x",
            "store check file:/x --json",
            "store check file:/x --data",
            "store dump file:/x",
            "store dump file:/x 17 --who --json",
            "store dump file:/x --offset 69632",
            "store dump file:/x vdi db",
            "store repair file:/x --dry-run",
            "store repair file:/x --yes --no-host-runs --json",
            "store export file:/x disk /tmp/out",
            "agent --store file:/x --cache /c --cache /d --cache-size 2GiB --run-dir /r",
            "agent --config /f",
            "--run-dir /r vdi create db --size 4GiB",
            "--run-dir /r vdi attach db --json",
            "vdi attach db@1834 --read-only",
            "vdi detach db@1834 --force",
            "--json --run-dir /r vdi list",
            "vdi create db --size 1T --when-offline fail-after=30s",
            "vdi set db --when-offline stall",
            "vdi hydrate db",
            "vdi pin db",
            "vdi schedule db",
            "vdi schedule db none",
            "vdi schedule db --clear --json",
            "vdi unpin db",
            "vdi hydrate db --boot-trace --wait --json",
            "vdi info db",
            "vdi detach db --force",
            "vdi resize db --size 1T",
            "vdi delete db",
            "vdi rollback db",
            "--run-dir /r vdi rollback db --accept-loss --json",
            "vdi rollback db --to 1834",
            "snap create db --label x --wait 5s",
            "snap create db --quiesce --guest-agent /run/vm.qga --json",
            "snap create db log --quiesce=try --guest-agent vm.qga --freeze-timeout 30s",
            "snap diff db@1834 db",
            "vdi tree",
            "vdi tree --dot",
            "vdi tree --json",
            "snap diff db@base db@1834 --json",
            "vdi rollback db --to base --label wrong --json",
            "vdi rollback db --to base --discard-present",
            "cache discard-quarantine 6b2f2d9e-0000-4000-8000-000000000001",
            "cache status",
            "cache drain",
            "cache drain db",
            "cache check",
            "cache check /c",
            "cache replace /good /new",
            "--run-dir /r cache replace /new --rate 64MiB",
            "cache replace /new --rate 0 --json",
            "cache replace --cancel",
            "status",
            "metrics",
            "outage drill db",
            "--run-dir /r outage drill db --time 10m --no-wait",
            "outage end db",
            "agent --metrics-listen 127.0.0.1:9477",
        ] {
            let words = std::iter::once("ballast").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_forms_are_refused() {
        for line in [
            "vdi create db",
            "vdi create db --size 0",
            "vdi create db --size lots",
            "vdi create db --size 1T --when-offline fail",
            "vdi set db",
            "vdi schedule",
            "vdi schedule db hourly",
            "vdi schedule db none --clear",
            "vdi attach",
            "vdi rollback db --to 7 --accept-loss",
            "vdi rollback db --to 7 --discard-present --label x",
            "vdi rollback db --label x",
            "snap create",
            "snap create db --quiesce",
            "snap create db --guest-agent /run/vm.qga",
            "snap create db --quiesce=perhaps --guest-agent /run/vm.qga",
            "snap create db --freeze-timeout 5s",
            "snap diff db",
            "vdi tree --dot --svg",
            "snap diff db@ db",
            "vdi rollback db --discard-present",
            "store",
            "store format",
            "store dump",
            "store dump file:/x vdi a b",
            "store dump file:/x 17 --offset 17",
            "store repair",
            "store repair file:/x --yes --dry-run",
            "agent --queues 0",
            "agent --queue-size 100",
            "status --frob",
            "agent --metrics-listen 0.0.0.0:9477",
            "outage",
            "cache replace",
            "cache replace /a /b /c",
            "cache replace /a --cancel",
        ] {
            let words = std::iter::once("ballast").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
