//! `vdi rollback --to`: a detached disk becomes one of its snapshots again.
//!
//! Nothing of it is on this host then: a log that is here, open or not, is a reason to refuse. What is decided is decided in
//! the store, by one change of the disk's head (`blockstore/src/store/rewind.rs`).

use super::Host;
use super::snapshots::label_of;
use crate::api::snapshots::{RewindRequest, Rewound};
use crate::error::{Failure, Kind, Result};
use blockstore::SnapshotLabel;

impl Host {
    /// Makes a detached disk what it was at a snapshot; what it is now is kept as one, unless the request gives it up.
    ///
    /// # Errors
    /// [`Kind::Conflict`]: it is attached; [`Kind::NotFound`]; [`Kind::Usage`]: a bad label. Nothing was changed.
    pub async fn rewind(&self, name: &str, request: RewindRequest) -> Result<Rewound> {
        let RewindRequest { to, discard_present, label } = request;
        let label = label.map(label_of).transpose()?;
        if let Some(disk) = self.find_served(name) {
            let name = &disk.name;
            let words = match disk.view().error.filter(|_| disk.is_lost()) {
                Some(why) => format!(
                    "disk '{name}' cannot be rolled back to a snapshot before its log was dealt with: {why}"
                ),
                None => format!(
                    "disk '{name}' is attached to this host: 'ballast vdi detach {name}' first, then roll it back"
                ),
            };
            return Err(Failure::new(Kind::Conflict, words));
        }
        let store = self.parts.store.get()?;
        let info = store.lookup_vdi(name).await?;
        let vdi = info.uuid.to_string();
        let target = store.find_only_snapshot(&vdi, &to).await?;
        let keep = match (discard_present, label) {
            (true, _) => None,
            (false, Some(label)) => Some(label),
            (false, None) => Some(label_of(format!("before rollback to {}", target.lsn))?),
        };
        let kept_label = keep.as_ref().map(SnapshotLabel::as_str).map(str::to_owned);
        let rewound = store.rewind_vdi(&vdi, target.lsn, keep).await?;
        tracing::warn!(
            vdi = %info.name, from = info.committed_lsn.0, to = target.lsn.0,
            kept = rewound.kept.map(|lsn| lsn.0), "rolled back to a snapshot"
        );
        Ok(Rewound {
            name: info.name,
            uuid: info.uuid,
            to: target.lsn.0,
            to_label: target.label.into(),
            size: rewound.size_bytes,
            kept: rewound.kept.map(|lsn| lsn.0),
            kept_label,
            committed_lsn: rewound.committed.0,
        })
    }
}
