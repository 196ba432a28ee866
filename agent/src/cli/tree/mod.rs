//! `vdi tree`: the forest of disks, snapshots and clones, as text, DOT or SVG.
//!
//! `lines` puts it in an order, root by root, each with its depth; `text`, `dot` and `svg` draw that. Snapshots on which clones
//! hang have a line each, the others of a disk share one. What the store says is not believed to be a forest: a disk whose
//! origin is missing, or that is its own ancestor, is shown as a root. All of it is pure, and nothing recurses.

mod dot;
mod svg;
mod text;

#[cfg(test)]
mod tests;

use super::output::Output;
use crate::api::tree::{Forest, TreeDisk};
use crate::control::client::Client;
use crate::error::Result;
use crate::units::format_size;
use std::collections::{BTreeMap, HashMap, HashSet};
use uuid::Uuid;

/// How to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawing {
    Text,
    Dot,
    Svg,
}

pub async fn run(client: &Client, drawing: Drawing, out: Output) -> Result<()> {
    let forest: Forest = client.get("/v1/tree").await?;
    out.print(&forest, |forest| {
        let lines = lines(forest);
        match drawing {
            Drawing::Text => text::draw(&lines),
            Drawing::Dot => dot::draw(&lines),
            Drawing::Svg => svg::draw(&lines),
        }
    })
}

/// One thing that is drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line<'a> {
    what: What<'a>,
    /// 0: a root.
    depth: usize,
    /// The line that it hangs on.
    parent: Option<usize>,
    /// Nothing more hangs there.
    is_last: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What<'a> {
    Disk(&'a TreeDisk),
    /// With clones.
    Snapshot {
        lsn: u64,
        label: &'a str,
    },
    /// So many without.
    Others(u64),
}

impl What<'_> {
    fn words(&self) -> String {
        match self {
            Self::Disk(disk) => {
                let size = format_size(disk.size);
                let state = disk.state.as_str();
                let owner = disk.owner.as_ref().map_or(String::new(), |host| format!(" on {host}"));
                format!("{}  {size}, {state}{owner}", disk.name)
            }
            Self::Snapshot { lsn, label: "" } => format!("@{lsn}"),
            Self::Snapshot { lsn, label } => format!("@{lsn} '{label}'"),
            Self::Others(1) => "1 snapshot without clones".into(),
            Self::Others(others) => format!("{others} snapshots without clones"),
        }
    }
}

/// The forest from its first root on, each thing before what hangs on it.
fn lines(forest: &Forest) -> Vec<Line<'_>> {
    let known: HashMap<Uuid, &TreeDisk> =
        forest.disks.iter().map(|disk| (disk.uuid, disk)).collect();
    // Clones by disk and snapshot.
    let mut clones: HashMap<Uuid, BTreeMap<u64, Vec<&TreeDisk>>> = HashMap::new();
    for disk in &forest.disks {
        if let Some(origin) = &disk.origin {
            clones.entry(origin.uuid).or_default().entry(origin.lsn).or_default().push(disk);
        }
    }
    let is_root = |disk: &TreeDisk| {
        disk.origin.as_ref().is_none_or(|origin| !known.contains_key(&origin.uuid))
    };
    let (roots, others): (Vec<_>, Vec<_>) = forest.disks.iter().partition(|disk| is_root(disk));
    let (mut lines, mut drawn) = (Vec::new(), HashSet::new());
    // Those of a ring are reached from no root: the first of it is taken for one.
    for root in roots.into_iter().chain(others) {
        let mut stack =
            vec![Line { what: What::Disk(root), depth: 0, parent: None, is_last: true }];
        while let Some(line) = stack.pop() {
            let (at, depth) = (lines.len(), line.depth + 1);
            let mut below: Vec<What<'_>> = Vec::new();
            match &line.what {
                What::Disk(disk) => {
                    if !drawn.insert(disk.uuid) {
                        continue;
                    }
                    let cloned = clones.get(&disk.uuid);
                    let count = cloned.map_or(0, BTreeMap::len) as u64;
                    below.extend(cloned.into_iter().flatten().map(|(lsn, clones)| {
                        What::Snapshot { lsn: *lsn, label: label_of(clones) }
                    }));
                    let others = disk.snapshots.saturating_sub(count);
                    below.extend((others > 0).then_some(What::Others(others)));
                }
                What::Snapshot { lsn, .. } => {
                    let disk = line.parent.and_then(|parent: usize| match &lines[parent] {
                        Line { what: What::Disk(disk), .. } => Some(disk.uuid),
                        _ => None,
                    });
                    let here = disk.and_then(|disk| clones.get(&disk)?.get(lsn));
                    below.extend(here.into_iter().flatten().map(|disk| What::Disk(disk)));
                }
                What::Others(_) => {}
            }
            let last = below.len().saturating_sub(1);
            let below = below.into_iter().enumerate().rev();
            stack.extend(below.map(|(n, what)| Line {
                what,
                depth,
                parent: Some(at),
                is_last: n == last,
            }));
            lines.push(line);
        }
    }
    lines
}

fn label_of<'a>(clones: &[&'a TreeDisk]) -> &'a str {
    let origin = clones.first().and_then(|clone| clone.origin.as_ref());
    origin.and_then(|origin| origin.label.as_deref()).unwrap_or_default()
}
