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
use super::sizes::{below_forest, held};
use crate::api::sizes::{SizesReport, SizesRequest};
use crate::api::tree::{Forest, TreeDisk};
use crate::control::client::Client;
use crate::error::Result;
use crate::units::format_size;
use gc::sizes::{DiskSizes, RootSizes};
use std::collections::{BTreeMap, HashMap, HashSet};
use uuid::Uuid;

/// How to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawing {
    Text,
    Dot,
    Svg,
}

pub async fn run(client: &Client, drawing: Drawing, sizes: bool, out: Output) -> Result<()> {
    let sizes = match sizes {
        true => Some(client.post("/v1/sizes", &SizesRequest::default()).await?),
        false => None,
    };
    let mut forest: Forest = client.get("/v1/tree").await?;
    if let Some(sizes) = sizes {
        add_sizes(&mut forest, sizes);
    }
    out.print(&forest, |forest| {
        let lines = lines(forest);
        match drawing {
            Drawing::Text => {
                let below = forest.store.as_ref().map(below_forest);
                text::draw(&lines) + &below.map_or(String::new(), |below| format!("\n{below}"))
            }
            Drawing::Dot => dot::draw(&lines),
            Drawing::Svg => svg::draw(&lines),
        }
    })
}

/// Of disks that are in both.
fn add_sizes(forest: &mut Forest, sizes: SizesReport) {
    let mut found: HashMap<Uuid, DiskSizes> =
        sizes.disks.into_iter().map(|disk| (disk.uuid, disk)).collect();
    for disk in &mut forest.disks {
        disk.sizes = found.remove(&disk.uuid);
    }
    forest.store = Some(sizes.store);
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
        sizes: Option<RootSizes>,
    },
    /// So many without, and what deleting them frees.
    Others(u64, Option<u64>),
}

impl What<'_> {
    fn words(&self) -> String {
        match self {
            Self::Disk(disk) => {
                let size = format_size(disk.size);
                let state = disk.state.as_str();
                let owner = disk.owner.as_ref().map_or(String::new(), |host| format!(" on {host}"));
                let sizes = disk.sizes.as_ref().map_or(String::new(), |sizes| {
                    let frees = format_size(sizes.deletion_frees.total());
                    format!("; {}; deletion frees {frees}", held(&sizes.sizes))
                });
                format!("{}  {size}, {state}{owner}{sizes}", disk.name)
            }
            Self::Snapshot { lsn, label, sizes } => {
                let label = if label.is_empty() { String::new() } else { format!(" '{label}'") };
                let sizes = sizes.as_ref().map_or(String::new(), |s| format!("; {}", held(s)));
                format!("@{lsn}{label}{sizes}")
            }
            Self::Others(others, frees) => {
                let plural = if *others == 1 { "" } else { "s" };
                let frees = frees.map_or(String::new(), |frees| {
                    format!("; deletion frees {}", format_size(frees))
                });
                format!("{others} snapshot{plural} without clones{frees}")
            }
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
                        let sizes = disk.sizes.as_ref().and_then(|sizes| {
                            let at = sizes.snapshots.binary_search_by_key(lsn, |s| s.lsn.0);
                            at.ok().map(|at| sizes.snapshots[at].sizes)
                        });
                        What::Snapshot { lsn: *lsn, label: label_of(clones), sizes }
                    }));
                    let others = disk.snapshots.saturating_sub(count);
                    let frees = disk.sizes.as_ref().map(|sizes| sizes.snapshots_free.total());
                    below.extend((others > 0).then_some(What::Others(others, frees)));
                }
                What::Snapshot { lsn, .. } => {
                    let disk = line.parent.and_then(|parent: usize| match &lines[parent] {
                        Line { what: What::Disk(disk), .. } => Some(disk.uuid),
                        _ => None,
                    });
                    let here = disk.and_then(|disk| clones.get(&disk)?.get(lsn));
                    below.extend(here.into_iter().flatten().map(|disk| What::Disk(disk)));
                }
                What::Others(..) => {}
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
