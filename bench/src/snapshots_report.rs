//! What the measurements of snapshots amount to: tables and a plot.

use std::time::Duration;

use crate::beside::Beside;
use crate::clones::{Clones, Empty, Many};
use crate::depths::Depth;
use crate::outage::Latency;
use crate::plot::{Line, Plot, Scale};
use crate::report::{number, table};
use crate::snapping::Snapping;

/// What is promised.
mod target {
    use std::time::Duration;

    pub const SNAPSHOT_P50_BEYOND_FLUSH: Duration = Duration::from_micros(100);
    pub const SNAPSHOT_P99: Duration = Duration::from_millis(1);
    pub const SNAPSHOT_MAX: Duration = Duration::from_millis(30);
    pub const BESIDE_LOSS_PERCENT: f64 = 2.0;
    pub const EACH_LOSS_PERCENT: f64 = 10.0;
    pub const EMPTY_BYTES: f64 = 5840.0;
    pub const DEPTH_LOSS: f64 = 0.05;
    pub const CLONE: Duration = Duration::from_millis(5);
    pub const CLONES: Duration = Duration::from_secs(5);
    pub const GUEST_THROUGHPUT_MIN: f64 = 0.95;
    pub const GUEST_P99_MAX: f64 = 1.1;
}

const MIB: f64 = (1u64 << 20) as f64;

fn said(met: bool) -> String {
    if met { "yes" } else { "**no**" }.to_owned()
}

fn micros(time: Duration) -> String {
    number(time.as_secs_f64() * 1e6)
}

fn millis(time: Duration) -> String {
    number(time.as_secs_f64() * 1e3)
}

/// Latency of snapshots, and what they cost the guest.
#[must_use]
pub fn snapping(found: &Snapping) -> String {
    let row = |what: &str, times: &Latency| {
        vec![
            what.to_owned(),
            times.writes.to_string(),
            micros(times.p50),
            micros(times.p99),
            micros(times.max),
        ]
    };
    let times = [
        row("the guest's flush, under the load", &found.flush),
        row("snapshot over a stream, under the load", &found.snapshot),
        row("snapshot by a request, under the load", &found.requested),
        row("snapshot over a stream, one write in flight", &found.beside_one),
        row("snapshot over a stream, idle disk", &found.idle),
        row("snapshot by a request, idle disk", &found.idle_requested),
    ];
    let p50 = found.flush.p50 + target::SNAPSHOT_P50_BEYOND_FLUSH;
    let latency = |what: &str, found: Duration, target: Duration| {
        vec![
            what.to_owned(),
            format!("{} µs", micros(found)),
            format!("≤ {} µs", micros(target)),
            said(found <= target),
        ]
    };
    let loss = |what: &str, found: f64, target: f64| {
        vec![
            what.to_owned(),
            format!("{found:.1} %"),
            format!("≤ {target:.0} %"),
            said(found <= target),
        ]
    };
    let targets = [
        latency(
            "snapshot over a stream under load, p50 (100 µs and one flush)",
            found.snapshot.p50,
            p50,
        ),
        latency("the same, p99", found.snapshot.p99, target::SNAPSHOT_P99),
        latency("the same, max", found.snapshot.max, target::SNAPSHOT_MAX),
        loss(
            "loss of IOPS by a snapshot every 10 ms",
            found.beside.loss_percent(),
            target::BESIDE_LOSS_PERCENT,
        ),
        loss(
            "loss of IOPS by a snapshot behind every write",
            found.each.loss_percent(),
            target::EACH_LOSS_PERCENT,
        ),
        vec![
            "the same, each asked for over the control socket".into(),
            format!("{:.1} %", found.asked.loss_percent()),
            "-".into(),
            "-".into(),
        ],
    ];
    let list = |rounds: &[f64]| rounds.iter().map(|&n| number(n)).collect::<Vec<_>>().join(", ");
    format!(
        "{}\n{}\nIOPS of the rounds: {} without and {} with a snapshot every 10 ms; {} without and {} with a snapshot behind \
         every write by the disk's schedule, which keeps the last 1,000; {} without and {} with one asked for after every write, {} \
         snapshots in a second.",
        table(&["what", "figure", "target", "met"], &targets),
        table(&["latency", "samples", "p50 µs", "p99 µs", "max µs"], &times),
        list(&found.beside.without),
        list(&found.beside.with),
        list(&found.each.without),
        list(&found.each.with),
        list(&found.asked.without),
        list(&found.asked.with),
        number(found.asked_rate),
    )
}

/// Reads by depth.
#[must_use]
pub fn depths(found: &[Depth]) -> String {
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|depth| {
            let ratio = against_none(found, depth);
            let ours = depth.server == "Ballast";
            let of = match (ours, depth.deleted) {
                (true, true) => "snapshots, deleted since",
                (true, false) => "snapshots",
                (false, _) => "overlays",
            };
            vec![
                depth.server.to_owned(),
                format!("{} {of}", depth.depth),
                depth.rounds.iter().map(|&n| number(n)).collect::<Vec<_>>().join(", "),
                number(depth.median()),
                format!("{ratio:.2}"),
                if ours { said((ratio - 1.0).abs() <= target::DEPTH_LOSS) } else { "-".into() },
            ]
        })
        .collect();
    table(&["server", "depth", "rounds, IOPS", "median", "against none", "within 5 %"], &rows)
}

fn against_none(found: &[Depth], depth: &Depth) -> f64 {
    let none = found.iter().find(|none| none.server == depth.server);
    none.map_or(1.0, |none| depth.against(none))
}

/// Reads against depth.
#[must_use]
pub fn depth_plot(found: &[Depth]) -> Plot {
    let line = |server: &str, name: &str| Line {
        name: name.to_owned(),
        points: found
            .iter()
            .filter(|depth| depth.server == server && !depth.deleted)
            .map(|depth| (f64::from(depth.depth), 100.0 * against_none(found, depth)))
            .collect(),
    };
    Plot {
        title: "4k random reads from the store, depth 32".into(),
        x: ("snapshots, or overlays (none is drawn at 1)".into(), Scale::Logarithmic),
        y: ("% of the IOPS with none".into(), Scale::Linear),
        lines: vec![
            line("Ballast", "Ballast, snapshots"),
            line("qemu-storage-daemon", "qcow2, overlays"),
        ],
    }
}

/// Clones, many snapshots, empty snapshots.
#[must_use]
pub fn numbers(clones: &Clones, many: &[Many], empty: &Empty) -> String {
    let count = clones.each.writes;
    let targets = [
        vec![
            format!("one clone of a disk of {} GB, p50", clones.disk_bytes / 1_000_000_000),
            format!("{} ms", millis(clones.each.p50)),
            format!("≤ {} ms", millis(target::CLONE)),
            said(clones.each.p50 <= target::CLONE),
        ],
        vec![
            format!("the first of {count} clones"),
            format!("{} ms", millis(clones.first)),
            format!("≤ {} ms", millis(target::CLONE)),
            said(clones.first <= target::CLONE),
        ],
        vec![
            format!("{count} clones, one after the other"),
            format!("{:.2} s", clones.all.as_secs_f64()),
            format!("≤ {:.0} s for 1,000", target::CLONES.as_secs_f64()),
            said(
                clones.all.as_secs_f64() * 1e3 / count.max(1) as f64
                    <= target::CLONES.as_secs_f64(),
            ),
        ],
        vec![
            "store used per empty snapshot".into(),
            format!("{} bytes", number(empty.reachable_bytes)),
            format!("≤ {} bytes", number(target::EMPTY_BYTES)),
            said(empty.reachable_bytes <= target::EMPTY_BYTES),
        ],
    ];
    let rows: Vec<Vec<String>> = many
        .iter()
        .map(|many| {
            vec![
                whole(many.snapshots),
                millis(many.attach),
                millis(many.newest),
                millis(many.middle),
                millis(many.more),
                millis(many.delete),
                millis(many.tree),
                format!("{:.2}", many.cycle.took.as_secs_f64()),
                format!("{:.0}", many.peak_bytes as f64 / MIB),
            ]
        })
        .collect();
    format!(
        "{}\nOf the disk {} MiB were written. The last tenth of the clones: p50 {} ms, max {} ms; of all, p99 {} ms, max {} ms. With \
         {count} clones: the list of all disks {} ms, attaching a disk {} ms (before: {} ms), a cycle of collection {:.2} s.\n\n\
         Empty snapshots: {} in {:.1} s, drained; then each took {} bytes of what the store's disks reach.\n\nOne disk with many snapshots, in milliseconds where nothing else is said:\n\n{}",
        table(&["what", "figure", "target", "met"], &targets),
        clones.used_bytes >> 20,
        millis(clones.last.p50),
        millis(clones.last.max),
        millis(clones.each.p99),
        millis(clones.each.max),
        millis(clones.list),
        millis(clones.attach.1),
        millis(clones.attach.0),
        clones.cycle.took.as_secs_f64(),
        number(empty.snapshots as f64),
        empty.took.as_secs_f64(),
        number(empty.reachable_bytes),
        table(
            &[
                "snapshots",
                "attach",
                "newest 1,000",
                "1,000 from the middle",
                "one more, drained",
                "delete one",
                "tree",
                "collection s",
                "memory MiB",
            ],
            &rows
        ),
    )
}

fn whole(count: u32) -> String {
    if count < 100 { count.to_string() } else { number(f64::from(count)) }
}

/// A guest beside collection.
#[must_use]
pub fn beside(found: &[Beside]) -> String {
    let list = |rounds: &[f64]| rounds.iter().map(|&n| number(n)).collect::<Vec<_>>().join(", ");
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|load| {
            vec![
                load.title.to_owned(),
                list(&load.iops.0),
                list(&load.iops.1),
                format!("{:.2}", load.throughput()),
                said(load.throughput() >= target::GUEST_THROUGHPUT_MIN),
                list(&load.p99_us.0),
                list(&load.p99_us.1),
                format!("{:.2}", load.p99()),
                said(load.p99() <= target::GUEST_P99_MAX),
                format!("{} of {}", load.covered, load.iops.1.len()),
            ]
        })
        .collect();
    table(
        &[
            "load",
            "IOPS without",
            "with",
            "ratio",
            "≥ 0.95",
            "p99 µs without",
            "with",
            "ratio",
            "≤ 1.1",
            "rounds that the cycle outlasted",
        ],
        &rows,
    )
}
