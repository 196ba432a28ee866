//! `snap`: snapshots of a disk.

use super::agent_commands::at;
use super::diff::parse_image;
use super::output::{Output, Table};
use crate::api::diff::ImageName;
use crate::api::sizes::{SizesReport, SizesRequest};
use crate::api::snapshots::{
    AsOf, QuiesceRequest, Quiesced, RewindRequest, Rewound, SnapDeleteRequest, SnapDeleted,
    SnapLabelRequest, SnapListRequest, SnapRequest, SnapSet, SnapSetRequest, Snapped,
    SnapshotPlace, Snapshots,
};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::{format_size, parse_duration};
use clap::{Subcommand, ValueEnum};
use gc::sizes::SnapshotSizes;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// From here on years have five digits.
const YEAR_10000_MS: u64 = 253_402_300_800_000;

/// What if the guest cannot be frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Quiesce {
    /// No snapshot is taken
    Must,
    /// It is taken all the same
    Try,
}

#[derive(Debug, Subcommand)]
pub enum SnapCommand {
    /// Take a snapshot of an attached disk, exact at one point of its writes; also while the store is away
    ///
    /// With --quiesce the guest's file systems are frozen meanwhile, by the QEMU guest agent in it, so that they are whole in the
    /// snapshot. The agent freezes, takes and thaws, whatever becomes of this command. The guest stands still from the freeze to
    /// the thaw: at most for --freeze-timeout, --wait and some seconds.
    #[command(after_help = crate::error::EXIT_CODES)]
    Create {
        /// The disk: name or UUID; with --quiesce also several, all disks of one virtual machine
        #[arg(required = true)]
        vdis: Vec<String>,
        /// For people, at most 64 bytes
        #[arg(long, value_name = "LABEL", default_value = "")]
        label: String,
        /// Wait at most so long until it is durable; it may be taken all the same [default: 30s; 10s while a guest is frozen]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        wait: Option<Duration>,
        /// Freeze the guest meanwhile; with =try, take the snapshot all the same if it cannot be frozen
        #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true)]
        #[arg(default_missing_value = "must", requires = "guest_agent")]
        quiesce: Option<Quiesce>,
        /// The socket on which QEMU has the guest agent's channel, org.qemu.guest_agent.0
        #[arg(long, value_name = "PATH", requires = "quiesce")]
        guest_agent: Option<PathBuf>,
        /// The guest may take at most so long to freeze [default: 10s]
        #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "quiesce")]
        freeze_timeout: Option<Duration>,
        /// Of the disk as it was: at an LSN, at a time (2026-11-22T08:15:00Z), or so long ago (90s); only as far back as the
        /// log goes beyond the store: through an outage, or some seconds
        #[arg(long, value_name = "POINT", value_parser = parse_point, conflicts_with = "quiesce")]
        as_of: Option<AsOf>,
    },
    /// Take a snapshot of an attached disk for each line of standard input, over one connection: a line is a label, or empty
    ///
    /// Each holds what the guest was answered before its line was read, and its name is written when it is durable. At most 64 are under way;
    /// a line is not read before. Ends with standard input, when nobody reads the names any more, or when the agent goes away. With --json,
    /// each is one line of JSON. What is refused is said on standard error, and makes the exit code at the end.
    #[command(after_help = crate::error::EXIT_CODES)]
    Stream {
        /// The disk: name or UUID
        vdi: String,
    },
    /// List a disk's snapshots, newest first
    List {
        /// The disk: name or UUID
        vdi: String,
        /// At most so many [default: 1000]
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// Only those beyond this LSN, in the order of the list: the last of a page begins the next one
        #[arg(long, value_name = "LSN")]
        beyond: Option<u64>,
        /// From the oldest on
        #[arg(long)]
        oldest_first: bool,
        /// And what each holds, what of that it shares, and what it has alone, which is what deleting it frees: reads the
        /// maps of all disks and snapshots
        #[arg(long)]
        sizes: bool,
    },
    /// List what differs between two images of disks: offset and length in bytes, and whether it is zeros in the second
    ///
    /// An image is a snapshot, or a disk as it is now; of one disk, or of two, such as a clone and what it was made from. Takes as
    /// long as there is to tell, whatever the size. What was written anew with the same bytes is listed, too.
    Diff {
        /// VDI@SNAP, by LSN or label; or VDI
        #[arg(value_name = "FROM", value_parser = parse_image)]
        from: ImageName,
        /// VDI@SNAP, by LSN or label; or VDI
        #[arg(value_name = "TO", value_parser = parse_image)]
        to: ImageName,
    },
    /// Give a snapshot another label
    Label {
        /// The disk: name or UUID
        vdi: String,
        /// The snapshot: LSN or label
        snapshot: String,
        /// The new label; empty for none
        label: String,
    },
    /// Delete snapshots, all that are named or none
    Delete {
        /// The disk: name or UUID
        vdi: String,
        /// The snapshots: LSNs or labels
        #[arg(required = true)]
        snapshots: Vec<String>,
    },
}

pub async fn run(command: SnapCommand, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    match command {
        SnapCommand::Create { vdis, label, wait, quiesce, guest_agent, freeze_timeout, as_of } => {
            let wait_ms = wait.map(|wait| wait.as_millis() as u64);
            if let (Some(how), Some(path)) = (quiesce, guest_agent) {
                let quiesce = QuiesceRequest {
                    guest_agent: absolute(path)?,
                    timeout_ms: freeze_timeout.map(|time| time.as_millis() as u64),
                    or_crash_consistent: how == Quiesce::Try,
                };
                let request = SnapSetRequest { vdis, label, wait_ms, quiesce };
                return quiesced(&client, &request, out).await;
            }
            let [vdi] = &vdis[..] else {
                let words = "several disks at once need --quiesce: without it each snapshot would be of another moment";
                return Err(Failure::new(Kind::Usage, words));
            };
            let path = at(vdi, "/snapshots")?;
            let taken: Snapped = client.post(&path, &SnapRequest { label, wait_ms, as_of }).await?;
            let guest = Quiesced::default();
            out.print(&One { snapshot: &taken, guest: &guest }, |one| name_of(one.snapshot))
        }
        SnapCommand::Stream { vdi } => super::snap_stream::run(&client, &vdi, out).await,
        SnapCommand::List { vdi, limit, beyond, oldest_first, sizes } => {
            let limit = limit.unwrap_or_default();
            let request = SnapListRequest { oldest_first, beyond, limit };
            let list: Snapshots = client.post(&at(&vdi, "/snapshots/list")?, &request).await?;
            if sizes {
                let sizes = sizes_of(&client, &list).await?;
                return out.print(&Sized { list: &list, sizes }, sized_table);
            }
            out.print(&list, table)
        }
        SnapCommand::Diff { from, to } => super::diff::run(&client, from, to, out).await,
        SnapCommand::Label { vdi, snapshot, label } => {
            let request = SnapLabelRequest { snapshot, label };
            let done: Snapped = client.post(&at(&vdi, "/snapshots/label")?, &request).await?;
            out.print(&done, |done| {
                format!("{}@{} is labelled '{}'", done.name, done.snapshot.lsn, done.snapshot.label)
            })
        }
        SnapCommand::Delete { vdi, snapshots } => {
            let request = SnapDeleteRequest { snapshots };
            let done: SnapDeleted = client.post(&at(&vdi, "/snapshots/delete")?, &request).await?;
            out.print(&done, |done| {
                let lsns: Vec<_> =
                    done.deleted.iter().map(|lsn| format!("{}@{lsn}", done.name)).collect();
                format!("deleted {}", lsns.join(", "))
            })
        }
    }
}

/// `--as-of`: an LSN, a time, or a time before now.
pub(super) fn parse_point(text: &str) -> Result<AsOf, String> {
    let text = text.trim();
    if let Ok(lsn) = text.parse() {
        return Ok(AsOf::Lsn(lsn));
    }
    let ms = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    };
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(AsOf::Time(ms(time)));
    }
    let ago = parse_duration(text.strip_suffix("ago").unwrap_or(text).trim()).ok();
    let then = ago.and_then(|ago| SystemTime::now().checked_sub(ago));
    then.map(|then| AsOf::Time(ms(then))).ok_or_else(|| {
        format!("'{text}' is no point of a log: give an LSN like 1834, a time in UTC like 2026-11-22T08:15:00Z, or how long ago, like 90s")
    })
}

/// `snap create` of one disk, as JSON.
#[derive(Serialize)]
struct One<'a> {
    #[serde(flatten)]
    snapshot: &'a Snapped,
    #[serde(flatten)]
    guest: &'a Quiesced,
}

/// `snap list --sizes`.
#[derive(Serialize)]
struct Sized<'a> {
    #[serde(flatten)]
    list: &'a Snapshots,
    /// Those of it that are in the store.
    sizes: Vec<SnapshotSizes>,
}

async fn sizes_of(client: &Client, list: &Snapshots) -> Result<Vec<SnapshotSizes>> {
    let lsns = list.snapshots.iter().map(|snapshot| snapshot.lsn);
    let request = SizesRequest {
        snapshots_of: Some(list.uuid),
        first_lsn: lsns.clone().min(),
        last_lsn: lsns.clone().max(),
    };
    let report: SizesReport = client.post("/v1/sizes", &request).await?;
    let listed: HashSet<u64> = lsns.collect();
    let disk = report.disks.into_iter().find(|disk| disk.uuid == list.uuid);
    let mut sizes = disk.map_or(Vec::new(), |disk| disk.snapshots);
    sizes.retain(|snapshot| listed.contains(&snapshot.lsn.0));
    Ok(sizes)
}

fn sized_table(sized: &Sized<'_>) -> String {
    let found: HashMap<u64, &SnapshotSizes> =
        sized.sizes.iter().map(|sizes| (sizes.lsn.0, sizes)).collect();
    let mut table = Table::new(&["SNAPSHOT", ">HOLDS", ">SHARED", ">DELETION FREES", "LABEL"]);
    for snapshot in &sized.list.snapshots {
        let sizes = found.get(&snapshot.lsn);
        // One that is in the log only has none.
        let show = |bytes: Option<u64>| bytes.map_or("-".into(), format_size);
        table.row([
            format!("{}@{}", sized.list.name, snapshot.lsn),
            show(sizes.map(|s| s.sizes.referenced.total())),
            show(sizes.map(|s| s.sizes.shared().total())),
            show(sizes.map(|s| s.sizes.exclusive.total())),
            snapshot.label.clone(),
        ]);
    }
    table.render() + &after_table(sized.list)
}

async fn quiesced(client: &Client, request: &SnapSetRequest, out: Output) -> Result<()> {
    let set: SnapSet = client.post("/v1/snapshots", request).await?;
    if let Some(why) = set.guest.not_quiesced_because.as_ref().filter(|_| !out.json) {
        eprintln!(
            "ballast: the guest was not frozen, its file systems are as after a crash: {why}"
        );
    }
    match &set.snapshots[..] {
        [snapshot] => out.print(&One { snapshot, guest: &set.guest }, |one| name_of(one.snapshot)),
        _ => {
            out.print(&set, |set| set.snapshots.iter().map(name_of).collect::<Vec<_>>().join("\n"))
        }
    }
}

pub(super) fn name_of(snapped: &Snapped) -> String {
    format!("{}@{}", snapped.name, snapped.snapshot.lsn)
}

/// The agent's working directory is another one.
fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(|error| {
        Failure::new(Kind::Usage, format!("guest agent '{}': {error}", path.display()))
    })
}

/// `vdi rollback --to`.
pub async fn rewind(
    client: &Client,
    name: &str,
    request: &RewindRequest,
    out: Output,
) -> Result<()> {
    let done: Rewound = client.post(&at(name, "/snapshots/rollback")?, request).await?;
    out.print(&done, |done| {
        let Rewound { name, to, .. } = done;
        let label = if done.to_label.is_empty() { "" } else { &format!(" '{}'", done.to_label) };
        let kept = match (&done.kept, &done.kept_label) {
            (Some(lsn), Some(label)) => format!("what it was before is {name}@{lsn} '{label}'"),
            _ => "what it was before is given up".to_owned(),
        };
        format!("{name} is {name}@{to}{label} again, {}; {kept}", format_size(done.size))
    })
}

/// A time of day, or the bare number if no calendar has it.
pub(super) fn time_of(ms: u64) -> String {
    if ms >= YEAR_10000_MS {
        return format!("{ms} ms");
    }
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

fn table(list: &Snapshots) -> String {
    let mut table = Table::new(&["SNAPSHOT", "TIME", "PLACE", "LABEL"]);
    for snapshot in &list.snapshots {
        table.row([
            format!("{}@{}", list.name, snapshot.lsn),
            time_of(snapshot.time),
            match snapshot.place {
                SnapshotPlace::Log => "log".into(),
                SnapshotPlace::Store => "store".into(),
            },
            snapshot.label.clone(),
        ]);
    }
    table.render() + &after_table(list)
}

fn after_table(list: &Snapshots) -> String {
    let mut text = String::new();
    if list.store_away {
        text.push_str("the store is away: only what is in this host's log is listed\n");
    }
    if let Some(last) = list.snapshots.last().filter(|_| list.more) {
        text.push_str(&format!("there are more: --beyond {}\n", last.lsn));
    }
    text
}
