//! A detached disk becomes one of its snapshots again: that one exactly, or, if nobody heard of it, that or what it was. Its snapshots
//! stay, and what it was is one more, if it is kept. The agent's `rewind`.

use crate::host::{Agent, Refused, transient};
use crate::model::{Rollback, kept_label};
use crate::serving::Manner;
use blockstore::StoreErrorKind;
use blockstore::types::Lsn;
use rand::Rng;
use rand::rngs::SmallRng;

impl Agent {
    /// Rolls a detached disk back, if it has a snapshot.
    pub async fn roll_back(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<(), Refused> {
        let (model, uuid, lenient) = (self.models.get(n), self.uuid_of(n), self.may_have_lost);
        let vdi = uuid.to_string();
        let mut there = {
            let model = model.lock();
            let mut there = model.cuts(0, model.last_lsn());
            there.retain(|lsn| !model.deleted.contains(lsn) && !model.maybe_deleted.contains(lsn));
            there
        };
        let keeps = rng.random_bool(0.7);
        while !there.is_empty() {
            let to = there[rng.random_range(0..there.len())];
            match self.store().find_only_snapshot(&vdi, &to.to_string()).await {
                Ok(found) => assert_eq!(found.lsn.0, to, "P5: another snapshot was found"),
                // It was deleted just now.
                Err(error) if error.kind == StoreErrorKind::NotFound && self.is_deleted(n, to) => {
                    there.retain(|lsn| *lsn != to);
                    continue;
                }
                Err(error) => {
                    transient("looking for a snapshot", &error, lenient).await?;
                    continue;
                }
            }
            model.lock().may_roll_back(Rollback { to, keeps });
            self.may_die(rng, manner);
            let label = keeps.then(kept_label);
            match self.store().rewind_vdi(&vdi, Lsn(to), label).await {
                Ok(rewound) => {
                    let mut model = model.lock();
                    let kept = keeps.then(|| model.last_lsn() + 1);
                    assert_eq!(rewound.kept.map(|lsn| lsn.0), kept, "P5: what was kept");
                    model.rolled_back(rewound.committed.0, rewound.size_bytes);
                    self.parting.count(|tally| tally.rolled_back += 1);
                }
                Err(error) if error.kind == StoreErrorKind::NotFound && self.is_deleted(n, to) => {
                    model.lock().no_rollback();
                }
                // No room: nothing was changed.
                Err(error) if error.kind == StoreErrorKind::NoSpace => {
                    model.lock().no_rollback();
                }
                // Whether it was done is seen when the disk is attached.
                Err(error) => transient("rolling back", &error, lenient).await?,
            }
            return Ok(());
        }
        Ok(())
    }

    /// Somebody deleted that snapshot, or began to.
    fn is_deleted(&self, n: usize, lsn: u64) -> bool {
        let model = self.models.get(n);
        let model = model.lock();
        model.deleted.contains(&lsn) || model.maybe_deleted.contains(&lsn)
    }
}
