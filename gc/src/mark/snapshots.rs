//! Marking a disk's snapshots: the tree that lists them, and the tree of each.

use super::{ENTRY_ADVICE, SNAPSHOTS_ADVICE, TreeWalk};
use blockstore::format::node::NODE_SHIFT;
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::{LEAF_SNAPSHOTS, Snapshot};
use blockstore::types::Lsn;
use blockstore::{Result, StoreErrorKind};

/// A node or leaf of the tree that lists the snapshots.
struct Visit {
    pointer: Pointer,
    level: u8,
    /// First leaf below it.
    first: u64,
}

impl TreeWalk<'_> {
    pub(super) async fn walk_snapshots(&mut self, data: bool) -> Result<()> {
        let index = self.head.snapshots;
        let mut stack = Vec::new();
        if self.reach_own(index.root, "the top of its list of snapshots") {
            stack.push(Visit { pointer: index.root, level: index.height, first: 0 });
        }
        let (mut live, mut before) = (0, None);
        while let Some(visit) = stack.pop() {
            if visit.level <= 1 {
                let Some(list) = self.read_list(&visit).await? else { continue };
                for (place, snapshot) in list {
                    live += 1;
                    self.check_snapshot(place, &snapshot, before);
                    before = Some(snapshot.lsn);
                    self.walk_snapshot(&snapshot, data).await?;
                }
                continue;
            }
            let node = match self.reader.read_nodes(&[visit.pointer]).await {
                Ok(mut nodes) => nodes.remove(0),
                Err(error) if error.kind == StoreErrorKind::Corrupt => {
                    let words = format!("its list of snapshots is damaged: {error}");
                    self.say(words, SNAPSHOTS_ADVICE);
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.marks.nodes += 1;
            let span = 1u64 << (NODE_SHIFT * (u32::from(visit.level) - 2));
            let at = stack.len();
            for (slot, pointer) in node.children() {
                let first = visit.first + u64::from(slot) * span;
                let what =
                    format!("its list of snapshots from place {} on", first * LEAF_SNAPSHOTS);
                if self.reach_own(pointer, &what) {
                    stack.push(Visit { pointer, level: visit.level - 1, first });
                }
            }
            stack[at..].reverse();
        }
        if live != index.live {
            let s = if index.live == 1 { "" } else { "s" };
            let words = format!("it says that it has {} snapshot{s}, and lists {live}", index.live);
            self.say(words, SNAPSHOTS_ADVICE);
        }
        Ok(())
    }

    async fn read_list(&mut self, visit: &Visit) -> Result<Option<Vec<(u64, Snapshot)>>> {
        match self.reader.snapshot_leaf(visit.first, visit.pointer).await {
            Ok(list) => Ok(Some(list)),
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                let words = format!("its list of snapshots is damaged: {error}");
                self.say(words, SNAPSHOTS_ADVICE);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn check_snapshot(&mut self, place: u64, snapshot: &Snapshot, before: Option<Lsn>) {
        let (lsn, head) = (snapshot.lsn, self.head);
        if place >= head.snapshots.made {
            let words = format!("snapshot {lsn} is listed beyond the last that was ever made");
            self.say(words, ENTRY_ADVICE);
        }
        if before.is_some_and(|before| before >= lsn) || lsn > head.committed {
            self.say(format!("snapshot {lsn} is listed out of order"), ENTRY_ADVICE);
        }
        if snapshot.birth > head.last_snapshot_birth {
            let (birth, last) = (snapshot.birth, head.last_snapshot_birth);
            let words = format!(
                "snapshot {lsn} (birth {birth}) is younger than the last one that its disk knows of (birth {last})"
            );
            self.say(words, ENTRY_ADVICE);
        }
    }

    async fn walk_snapshot(&mut self, snapshot: &Snapshot, data: bool) -> Result<()> {
        let head = snapshot.as_head(self.head);
        let mut tree = TreeWalk {
            marks: &mut *self.marks,
            reader: self.reader,
            name: self.name,
            head: &head,
            problems: &mut *self.problems,
            snapshot: Some(snapshot.lsn),
        };
        tree.walk_all(data).await?;
        self.marks.snapshots += 1;
        Ok(())
    }
}
