//! The end of an agent or its host, and the next start: recovery, judged by the model.

use super::*;

impl Rig {
    /// The host loses power, or only the agent dies; then recovery, also cut short now and then.
    pub async fn crash(&mut self) {
        self.replacing.stop();
        let mut power = self.rng.random_bool(0.5);
        if power {
            self.sims.iter().for_each(SimDevice::crash);
        } else {
            // What was submitted goes through or not, what was acknowledged has.
            for action in std::mem::take(&mut self.pending) {
                if let Action::Write { leg, offset, image, start, len, .. } = action
                    && self.rng.random_bool(0.5)
                {
                    let data = vec![image.slice(start, len)];
                    let result = self.sims[usize::from(leg)].write(offset, data).await;
                    let _ = self.result(leg, result);
                }
            }
            // Nobody owns the legs again before the rest has landed, or never will.
            self.sims.iter().for_each(SimDevice::kill_host);
        }
        let recovered = loop {
            self.open_again().await;
            self.rot().await;
            let mut headers = self.local.read_headers().await.unwrap();
            headers.retain(|h| h.log_id == LOG_ID && h.seq >= self.slot.evicted_below);
            headers.sort_by_key(|h| h.seq);
            let store = Lsn(self.store.image.lock().unwrap().1);
            let recovered =
                recovery::recover(&self.local, &self.slot, store, &headers).await.unwrap();
            if self.rng.random_bool(0.3) {
                let polls = self.rng.random_range(0..40);
                legs::cut_short(recovery::settle(&self.local, &recovered), polls).await;
                self.sims.iter().for_each(SimDevice::crash);
                power = true;
            } else {
                recovery::settle(&self.local, &recovered).await.unwrap();
                break recovered;
            }
        };
        self.recovered();
        let last = recovered.last_lsn.0;
        assert!(last >= self.flushed, "P1: LSN {last} recovered, {} was flushed", self.flushed);
        assert!(power || last >= self.acked, "L1: LSN {last} recovered, {} was acked", self.acked);
        self.log.truncate(last as usize);
        self.check_recovered_snapshots(&recovered);
        self.check_recovered_cuts(&recovered);
        self.slot.epoch += 1;
        self.slot.first_lsn = Lsn(last + 1);
        self.slot.durable = Lsn(last);
        self.restart(recovered);
        let image = self.read_all();
        let expected = self.image_at(last);
        assert_eq!(image, expected, "P2: the recovered disk is the disk at LSN {last}");
    }

    pub fn restart(&mut self, recovered: recovery::Recovered) {
        let store = Lsn(self.store.image.lock().unwrap().1);
        self.slot.committed = store;
        let live: BTreeSet<SegmentId> = recovered.live.iter().map(|l| l.header.segment).collect();
        let used = self.pool.counts().free as usize + self.sealed.len() + 8;
        self.sealed = recovered
            .live
            .iter()
            .map(|live| SealedSegment {
                id: live.header.segment,
                seq: live.header.seq,
                first_lsn: live.header.first_lsn,
                last_lsn: live.last_lsn,
                used_blocks: live.used_blocks,
                cuts: self.cuts_of(live.header.first_lsn, live.last_lsn),
                image: None,
            })
            .collect();
        let segments = (used as u32).min(self.local.geometry.segments);
        let free = (0..segments).map(SegmentId).filter(|id| !live.contains(id)).collect();
        self.pool = Arc::new(Pool::new(self.local.geometry, free, self.pool.next_seq()));
        self.pool.adopt(VDI, live.into_iter());
        let sealed = recovered.live.iter().map(|l| (l.header.segment, l.last_lsn)).collect();
        let (link, members) = joined(&self.local);
        self.link = link;
        let start = start(
            &self.local,
            &self.slot,
            &self.images,
            recovered.last_lsn,
            store,
            recovered.index,
            sealed,
            vec![],
        );
        self.disk = Disk::on_legs(start, members);
        self.pending.clear();
        self.done_ops.clear();
        self.open.clear();
        self.evicting.clear();
        self.acked = recovered.last_lsn.0;
        self.flushed = recovered.last_lsn.0;
        self.through = false;
        self.wants = true;
        self.feed();
    }
}

/// A link over which the cache tells of changes of its legs, and the members as they are.
pub fn joined(local: &Local) -> (Link, cache::format::LegSet) {
    let (link, sender, _) = link::pair().unwrap();
    let members = local.join(sender);
    (link, members)
}

#[allow(clippy::too_many_arguments, reason = "one call site per case, all named alike")]
pub fn start(
    local: &Local,
    slot: &SlotVdi,
    images: &Arc<ImagePool>,
    last_lsn: Lsn,
    committed: Lsn,
    index: cache::index::Index,
    sealed: Vec<(SegmentId, Lsn)>,
    grants: Vec<Grant>,
) -> Start {
    Start {
        identity: Identity {
            cache: local.cache_uuid(),
            vdi: VDI,
            log_id: LOG_ID,
            epoch: slot.epoch,
        },
        geometry: local.geometry,
        size_bytes: slot.size_bytes,
        index,
        last_lsn,
        committed,
        sealed,
        grants,
        images: Arc::clone(images),
        progress: Arc::new(Progress::default()),
    }
}
