//! What the measurements of garbage collection amount to: tables and plots.

use crate::collecting::{Cycle, Found};
use crate::plot::{Line, Plot, Scale};
use crate::report::{number, table};

/// GiB of store in a second that are promised.
const GIB_PER_SECOND_MIN: f64 = 100.0;
/// Share of the device's sequential rate that is promised.
const SHARE_MIN: f64 = 0.7;

const GIB: f64 = (1u64 << 30) as f64;
const MIB: f64 = (1u64 << 20) as f64;

/// One row per store.
#[must_use]
pub fn cycles(found: &[Found]) -> String {
    let rows: Vec<Vec<String>> = found.iter().map(row).collect();
    let mut out = table(
        &[
            "in use GiB",
            "disks",
            "snapshots",
            "nodes",
            "cycle s",
            "of it sweep s",
            "GiB/s",
            "nodes MB/s",
            "device MB/s",
            "ratio",
            "memory MiB",
            "bits MiB",
        ],
        &rows,
    );
    if let Some(largest) = found.iter().max_by_key(|found| found.shape.used_bytes) {
        let said = |met| if met { "met" } else { "**missed**" };
        out += &format!(
            "\nLargest store: {:.0} GiB/s (target: ≥ {GIB_PER_SECOND_MIN}: {}), {:.2} of the device's sequential rate \
             (target: ≥ {SHARE_MIN}: {}).\n",
            largest.gib_per_second(),
            said(largest.gib_per_second() >= GIB_PER_SECOND_MIN),
            largest.share(),
            said(largest.share() >= SHARE_MIN),
        );
    }
    let deleted: Vec<Vec<String>> = found.iter().filter_map(deleted_row).collect();
    if !deleted.is_empty() {
        out += "\nAfter all snapshots were deleted:\n\n";
        out += &table(
            &[
                "in use GiB",
                "disks",
                "snapshots deleted",
                "given back MiB",
                "nodes",
                "cycle s",
                "nodes MB/s",
            ],
            &deleted,
        );
    }
    out
}

fn row(found: &Found) -> Vec<String> {
    let (shape, full) = (&found.shape, &found.full);
    vec![
        format!("{:.0}", shape.used_bytes as f64 / GIB),
        number_of(shape.disks),
        number_of(shape.snapshots),
        whole(full.nodes as f64),
        seconds(full),
        format!("{:.2}", full.sweeping.as_secs_f64()),
        number(found.gib_per_second()),
        number(full.metadata_rate() / 1e6),
        number(found.device_rate / 1e6),
        format!("{:.2}", found.share()),
        format!("{:.0} (idle {:.0})", full.peak_bytes as f64 / MIB, full.idle_bytes as f64 / MIB),
        format!("{:.1}", shape.store_bytes() as f64 / 4096.0 / 8.0 / MIB),
    ]
}

fn deleted_row(found: &Found) -> Option<Vec<String>> {
    let cycle = found.deleted.as_ref()?;
    Some(vec![
        format!("{:.0}", found.shape.used_bytes as f64 / GIB),
        number_of(found.shape.disks),
        number_of(found.shape.snapshots),
        number(cycle.reclaimed_bytes as f64 / MIB),
        whole(cycle.nodes as f64),
        seconds(cycle),
        number(cycle.metadata_rate() / 1e6),
    ])
}

fn number_of(count: u32) -> String {
    whole(f64::from(count))
}

/// A count, without a fraction.
fn whole(count: f64) -> String {
    if count < 100.0 { format!("{count:.0}") } else { number(count) }
}

fn seconds(cycle: &Cycle) -> String {
    format!("{:.2}", cycle.took.as_secs_f64())
}

/// Time of a cycle against the metadata that it reads: linear if the points lie on a line of slope 1, whatever the store's
/// disks and snapshots.
#[must_use]
pub fn time_plot(found: &[Found]) -> Plot {
    let line = |name: &str, wanted: &dyn Fn(&Found) -> bool| {
        let chosen = found.iter().filter(|found| wanted(found));
        let mut points: Vec<_> = chosen
            .map(|found| {
                let mib = (found.full.nodes * 4096) as f64 / MIB;
                (mib, found.full.took.as_secs_f64() * 1e3)
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: name.to_owned(), points }
    };
    let plain = |found: &Found| found.shape.disks == 1 && found.shape.snapshots == 0;
    let device = line("the device alone, read in order", &|_| true);
    let device = Line {
        points: device
            .points
            .iter()
            .zip(sorted_rates(found))
            .map(|(&(mib, _), rate)| (mib, mib * MIB / rate * 1e3))
            .collect(),
        ..device
    };
    Plot {
        title: "One cycle of garbage collection".into(),
        x: ("metadata read, MiB".into(), Scale::Logarithmic),
        y: ("milliseconds".into(), Scale::Logarithmic),
        lines: vec![
            line("one disk, no snapshots", &plain),
            line("many snapshots", &|found| found.shape.snapshots > 0),
            line("many disks", &|found| found.shape.disks > 1 && found.shape.snapshots == 0),
            device,
        ],
    }
}

/// The device's rates, in the order of the metadata's size.
fn sorted_rates(found: &[Found]) -> Vec<f64> {
    let mut sorted: Vec<&Found> = found.iter().collect();
    sorted.sort_by_key(|found| found.full.nodes);
    sorted.iter().map(|found| found.device_rate).collect()
}

/// Time per node against the number of snapshots, and of disks: flat if that number does not matter.
#[must_use]
pub fn number_plot(found: &[Found]) -> Plot {
    let line = |name: &str, points: Vec<(f64, f64)>| Line { name: name.to_owned(), points };
    let per_node =
        |found: &Found| found.full.took.as_secs_f64() * 1e6 / found.full.nodes.max(1) as f64;
    let by = |of: &dyn Fn(&Found) -> u32, other: &dyn Fn(&Found) -> u32, none: u32| {
        let chosen = found.iter().filter(|found| other(found) == none && of(found) > none);
        let mut points: Vec<_> =
            chosen.map(|found| (f64::from(of(found)), per_node(found))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let (disks, snapshots) =
        (|found: &Found| found.shape.disks, |found: &Found| found.shape.snapshots);
    Plot {
        title: "Time of a cycle per node of metadata".into(),
        x: ("snapshots, or disks, in the store".into(), Scale::Logarithmic),
        y: ("microseconds per node".into(), Scale::Linear),
        lines: vec![
            line("snapshots of one disk", by(&snapshots, &disks, 1)),
            line("disks", by(&disks, &snapshots, 0)),
        ],
    }
}
