//! A head whose last write has an unknown outcome: finding out, without the next commit and without room for it.
//!
//! The write ended with an error, so the store may hold the head from before it, or the one that was written, now or a moment
//! later. Until that is known, the stay of that step keeps collection from ending: what only one of the two heads reaches must
//! not be freed. A disk that is idle, or that waits for room, would keep it so for ever, and a store that is full of
//! garbage with it. So it is found out by itself: the head as it is known here is written once more, one sequence number on.
//! * It is done: the other head is not there, and a command that is still on its way finds another head than it
//!   expects, for ever.
//! * Another head is there, of this attachment, and durable: the one that was written. It is adopted, as a commit would
//!   (rule C2).
//!
//! Who is about to ask for room with the disk's control in hand does this first; for others, and for disks that are idle, a
//! cycle of collection does, before it begins and while it waits. In the first case a cycle under way may have read the head that is
//! not there: it is given up, see [`VdiInner::swap_head`].

use crate::error::Result;
use crate::store::Store;
use crate::vdi::{Control, VdiInner};
use std::sync::{Arc, Weak};

impl VdiInner {
    /// Finds out what became of the last write of the head, if that is not known.
    pub(crate) async fn settle(&self, control: &mut Control) -> Result<()> {
        if control.unsure.is_none() {
            return Ok(());
        }
        let known = self.head_of(control)?;
        self.swap_head(control, known).await?;
        tracing::info!(vdi = %self.uuid, "found out what became of the last write of its head");
        Ok(())
    }

    /// It is to be found out, and nobody works on the disk now, who would do so first.
    fn is_unsure(&self) -> bool {
        let control = self.control.try_lock();
        control.is_ok_and(|control| control.unsure.is_some() && control.check(self).is_ok())
    }
}

impl Store {
    /// Finds out what became of the heads of attached disks whose last write has an unknown outcome. Waits as long as a
    /// control operation may; what takes longer goes on.
    pub(super) async fn settle_heads(&self) {
        let attached: Vec<_> = self.attached.lock().values().filter_map(Weak::upgrade).collect();
        for disk in attached.into_iter().filter(|disk| disk.is_unsure()) {
            let this = Arc::clone(&disk);
            // As a task that nobody stops: a head's write that was given up half way might land after a later one.
            let task = tokio::spawn(async move {
                let Ok(mut control) = this.control.try_lock() else { return Ok(()) };
                this.settle(&mut control).await
            });
            if let Err(error) = self.control_io.await_task(task).await {
                tracing::warn!(
                    vdi = %disk.uuid, %error,
                    "it is not known what became of the last write of its head: nothing is collected before"
                );
            }
        }
    }
}
