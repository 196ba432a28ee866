//! Disks whose log is lost: finding them, and rolling them back to what is committed.
//!
//! A disk of this host (or of one that this start took over) whose log is not in the cache is shown as failed, and stays
//! closed: the log may be in another cache. On the operator's word it is rolled back. The order of that: receipt written
//! (not done yet) → the log, if any of it is here, in quarantine → the store's head lets go of it → receipt completed.
//! A crash between any two leaves the disk attached or detached, and the command can be given again (rule L6).

use super::Host;
use super::notes::now_ms;
use super::receipt;
use super::served::Served;
use crate::api::loss::{ByteRange, CacheName, LossReceipt, LostRanges, LostWindow};
use crate::error::{Failure, Kind, Result};
use blockstore::{LostLog, OwnerInfo, VdiInfo};
use cache::{LogFinding, QuarantinedLog, Survey, VdiIdentity, Witness};
use std::sync::Arc;
use std::sync::Weak;
use uuid::Uuid;

/// Ranges in a receipt.
const RANGES_MAX: usize = 1000;
/// Ranges in a message.
const RANGES_SHOWN: usize = 4;

/// Once the store is there: shows the disks that are attached to this host and whose log is not in its cache.
pub(super) async fn find(host: Weak<Host>) {
    let Some(store) = host.upgrade().map(|host| Arc::clone(&host.parts.store)) else { return };
    let store = store.wait().await;
    let Some(host) = host.upgrade() else { return };
    let listed = match store.list_vdis().await {
        Ok(listed) => listed,
        Err(error) => return tracing::warn!("looking for disks whose log is lost: {error}"),
    };
    for info in listed {
        if host.is_lost(&info).await {
            host.show_lost(&info);
        }
    }
}

impl Host {
    /// The cache in use.
    pub(super) fn cache_name(&self) -> CacheName {
        CacheName { uuid: self.identity.cache, paths: self.parts.config.caches() }
    }

    /// That host's disks are this one's: it is this one, or was taken over at the start.
    fn is_ours(&self, owner: &OwnerInfo) -> bool {
        owner.host == self.identity.host || self.parts.config.take_over_host == Some(owner.host)
    }

    /// The disk is attached to this host, and its log is not in the cache.
    pub(super) async fn is_lost(&self, info: &VdiInfo) -> bool {
        let log = self.parts.cache.log_of(info.uuid).await.map(|(log, _)| Uuid::from_u128(log));
        info.owner.as_ref().is_some_and(|owner| self.is_ours(owner)) && log.is_none()
    }

    /// Lists a disk whose log is lost among those of this host.
    pub(super) fn show_lost(&self, info: &VdiInfo) -> Arc<Served> {
        let why = self.why_lost(info);
        let lost = Served::lost(&self.parts.run_dir, info.uuid, &info.name, info.size_bytes, &why);
        let mut served = self.served.lock();
        Arc::clone(served.entry(info.uuid).or_insert_with(|| {
            tracing::error!(vdi = %info.name, "not served: {why}");
            Arc::new(lost)
        }))
    }

    fn why_lost(&self, info: &VdiInfo) -> String {
        let log = info.log_id.map_or("its log".to_owned(), |log| format!("its log {log}"));
        let cache = self.cache_name();
        let quarantined = self.parts.cache.quarantined();
        let advice = format!(
            "or, if that is lost for good, 'ballast vdi rollback {} --accept-loss' gives up what was written after LSN {}",
            info.name, info.committed_lsn
        );
        if quarantined.iter().any(|kept| Some(kept.log_id) == info.log_id) {
            return format!(
                "{log} is in quarantine since a rollback that was cut off: 'ballast vdi rollback {} --accept-loss' \
                 completes it",
                info.name
            );
        }
        let owner = info.owner.as_ref().filter(|owner| owner.host != self.identity.host);
        let of = owner.map_or(String::new(), |owner| {
            let name = owner.host_name.clone().unwrap_or_else(|| "unknown".into());
            format!(" (it is attached to host '{name}', {}, which was taken over)", owner.host)
        });
        format!(
            "{log}{of} is not in this host's cache {} ({}): start the agent with the cache that has it; {advice}",
            cache.paths.first().map(|path| path.display().to_string()).unwrap_or_default(),
            cache.uuid
        )
    }

    /// Gives up the lost log of a disk: afterwards the disk is detached, and exactly as of its committed LSN.
    ///
    /// # Errors
    /// Without `accept_loss`: what would be lost. [`Kind::Conflict`]: nothing is lost, or the disk is not ours. Nothing was
    /// changed then.
    pub async fn roll_back(&self, name: &str, accept_loss: bool) -> Result<LossReceipt> {
        let known = self.find_served(name).map(|disk| disk.uuid.to_string());
        let info = self.parts.store.get()?.lookup_vdi(known.as_deref().unwrap_or(name)).await?;
        self.refuse_not_ours(&info).await?;
        let disk = match self.find_served(&info.uuid.to_string()) {
            Some(disk) => disk,
            None => self.show_lost(&info),
        };
        let receipt = disk
            .give_up_log(&self.parts, Box::pin(self.roll_back_closed(info, accept_loss)))
            .await?;
        self.notes.forget(disk.uuid);
        self.socket_names.forget(disk.uuid);
        if let Some(log) = receipt.log_id {
            self.left_behind.forget(log.as_u128());
        }
        self.remove(&disk);
        Ok(receipt)
    }

    /// A disk that this host does not hold has nothing to be given up here, unless the cache has an outdated log of it.
    async fn refuse_not_ours(&self, info: &VdiInfo) -> Result<()> {
        let conflict = |words| Err(Failure::new(Kind::Conflict, words));
        let (name, this) = (&info.name, format!("'{}' ({})", self.name, self.identity.host));
        match &info.owner {
            None if matches!(self.parts.cache.log_of(info.uuid).await, Some((_, true))) => Ok(()),
            None => conflict(format!(
                "disk '{name}' is attached to no host: there is no log to be given up, it is as of LSN {}; \
                 'ballast vdi attach {name}' serves it",
                info.committed_lsn
            )),
            Some(owner) if !self.is_ours(owner) => {
                let host = owner.host_name.clone().unwrap_or_else(|| "unknown".into());
                conflict(format!(
                    "disk '{name}' is attached to host '{host}' ({}), this is host {this}: its log is there, so detach it \
                     or roll it back there; if that host is dead for certain, or was this one with a cache that is lost, \
                     start this agent with --take-over-host {0} and try again",
                    owner.host
                ))
            }
            Some(_) => Ok(()),
        }
    }

    /// Lets go of a log in quarantine, named by its id.
    ///
    /// # Errors
    /// [`Kind::Usage`], [`Kind::NotFound`], the local device's.
    pub async fn discard_quarantine(&self, log: &str) -> Result<QuarantinedLog> {
        let log_id = Uuid::try_parse(log).map_err(|_| {
            let words = format!(
                "'{log}' is not a log's id: 'ballast cache status' shows those in quarantine"
            );
            Failure::new(Kind::Usage, words)
        })?;
        let discarded = self.parts.cache.discard_quarantine(log_id).await?;
        tracing::warn!(log = %log_id, vdi = %discarded.name, "a log in quarantine was discarded by the operator");
        Ok(discarded)
    }

    /// The disk is held closed meanwhile.
    async fn roll_back_closed(&self, info: VdiInfo, accept_loss: bool) -> Result<LossReceipt> {
        let (reason, survey, is_here) = self.judge(&info).await?;
        let mut receipt = self.receipt(&info, reason, &survey, is_here);
        if !accept_loss {
            let words = format!(
                "{}; give --accept-loss to roll the disk back to LSN {} (nothing was changed)",
                would_lose(&receipt),
                receipt.committed_lsn
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        receipt::write(&receipt)?;
        if is_here {
            self.parts.cache.quarantine(info.uuid).await?;
        }
        if let Some(owner) = &info.owner {
            let lost = LostLog { host: owner.host, log_id: info.log_id };
            receipt.committed_lsn = self.parts.store.get()?.roll_back(info.uuid, lost).await?.0;
        }
        receipt.done = true;
        if let Err(failure) = receipt::write(&receipt) {
            tracing::warn!(vdi = %info.name, "{failure}");
        }
        tracing::warn!(
            vdi = %info.name,
            receipt = serde_json::to_string(&receipt).unwrap_or_default(),
            "rolled back, with loss accepted by the operator: {}", lost_in_words(&receipt)
        );
        Ok(receipt)
    }

    /// Why the log cannot be used, what can be told of it, and whether any of it is to be kept.
    async fn judge(&self, info: &VdiInfo) -> Result<(String, Survey, bool)> {
        let cache = &self.parts.cache;
        let here = cache.log_of(info.uuid).await;
        let named = info.log_id.map(|log| log.as_u128());
        if cache.vdi_status(info.uuid).is_some() {
            return Err(self.nothing_lost(info, "open in this agent".to_owned()));
        }
        if info.owner.is_none() || here.is_some_and(|(log, served)| served && Some(log) != named) {
            let log = here.map_or(0, |(log, _)| log);
            let survey = cache.survey(log, info.committed_lsn).await;
            let why =
                format!("log {} in this cache is not the disk's any more", Uuid::from_u128(log));
            return Ok((why, survey, true));
        }
        let identity =
            VdiIdentity { uuid: info.uuid, name: info.name.clone(), size_bytes: info.size_bytes };
        let log = named.unwrap_or_default();
        let survey = cache.survey(log, info.committed_lsn).await;
        match cache.examine(&identity, log, info.committed_lsn).await? {
            LogFinding::Absent => Ok((self.why_lost(info), survey, false)),
            LogFinding::Quarantined => Ok((self.why_lost(info), survey, false)),
            LogFinding::Refused { why } => Ok((why, survey, true)),
            LogFinding::Open => Err(self.nothing_lost(info, "open in this agent".to_owned())),
            LogFinding::Whole { last_lsn } => {
                Err(self.nothing_lost(info, format!("whole up to LSN {last_lsn}")))
            }
        }
    }

    fn nothing_lost(&self, info: &VdiInfo, how: String) -> Failure {
        let words = format!(
            "disk '{0}': its log {1} is in this host's cache {2}, {how}, and the store {3} has the disk as of LSN {4}: \
             nothing is lost; 'ballast vdi attach {0}' serves it. If that is refused, 'ballast vdi info {0}' says why: restart the \
             agent with the store at hand, then try again",
            info.name,
            info.log_id.unwrap_or_default(),
            self.parts.config.cache.display(),
            self.parts.store.url(),
            info.committed_lsn
        );
        Failure::new(Kind::Conflict, words)
    }

    fn receipt(
        &self,
        info: &VdiInfo,
        reason: String,
        survey: &Survey,
        is_here: bool,
    ) -> LossReceipt {
        let at = now_ms();
        let known = |lsn: u64| (lsn > info.committed_lsn.0).then_some(lsn);
        let note = self.notes.of(info.uuid);
        let mut known_from = Vec::new();
        if survey.segments > 0 {
            known_from.push(format!("{} segments of the log that are still here", survey.segments));
        }
        if note.is_some() {
            known_from.push("the agent's last note of the disk".to_owned());
        }
        let noted = note.as_ref().map(|note| note.last_lsn);
        // In write-through a disk goes on from where the log was, and nothing is acknowledged that the store does not have.
        let behind =
            info.log_id.and_then(|log| self.left_behind.find(log.as_u128()).ok().flatten());
        let behind = behind.map(|behind| behind.staged.0);
        if behind.is_some() {
            known_from = vec!["the note that the cache failed under the disk".to_owned()];
        }
        let to_lsn = match (noted, survey.segments) {
            _ if let Some(staged) = behind => Some(staged.max(info.committed_lsn.0)),
            (None, 0) => None,
            _ => Some(survey.last_lsn.0.max(noted.unwrap_or(0)).max(info.committed_lsn.0)),
        };
        let listed = survey.ranges.iter().take(RANGES_MAX);
        LossReceipt {
            name: info.name.clone(),
            uuid: info.uuid,
            size: info.size_bytes,
            store: self.parts.store.url().to_owned(),
            store_uuid: self.parts.store.uuid(),
            host: info.owner.as_ref().map_or(self.identity.host, |owner| owner.host),
            log_id: info.log_id,
            reason,
            committed_lsn: info.committed_lsn.0,
            committed_at: (info.committed_ms > 0).then_some(info.committed_ms),
            lost: LostWindow {
                from_lsn: info.committed_lsn.0 + 1,
                to_lsn,
                flushed_lsn: note.as_ref().and_then(|note| known(note.flushed_lsn)),
                noted_at: note.as_ref().map(|note| note.at),
                known_from,
            },
            ranges: LostRanges {
                listed: listed
                    .map(|range| ByteRange { offset: range.start, length: range.end - range.start })
                    .collect(),
                more: survey.ranges.len().saturating_sub(RANGES_MAX) as u64,
                segments: survey.segments,
                unreadable: survey.unreadable,
            },
            cache: self.cache_name(),
            former_cache: note.map(|note| note.cache).filter(|c| c.uuid != self.identity.cache),
            quarantined: is_here || survey.segments > 0,
            snapshot: "none was taken: the surviving prefix is the disk itself as it is now"
                .to_owned(),
            at,
            done: false,
            file: receipt::path(&self.parts.run_dir, &info.name, at),
        }
    }
}

fn would_lose(receipt: &LossReceipt) -> String {
    format!("disk '{}': {}. {}", receipt.name, receipt.reason, lost_in_words(receipt))
}

/// What is given up, in one sentence.
fn lost_in_words(receipt: &LossReceipt) -> String {
    let lost = &receipt.lost;
    let window = match lost.to_lsn {
        Some(to) if to < lost.from_lsn => {
            "nothing after it is known to have been acknowledged".to_owned()
        }
        Some(to) => format!("LSNs {} to {to} at least are lost", lost.from_lsn),
        None => format!("how much was acknowledged from LSN {} on is unknown", lost.from_lsn),
    };
    let ranges = &receipt.ranges.listed;
    let shown = ranges.iter().take(RANGES_SHOWN);
    let shown: Vec<_> = shown.map(|r| format!("{} + {}", r.offset, r.length)).collect();
    let more = ranges.len().saturating_sub(RANGES_SHOWN) as u64 + receipt.ranges.more;
    let where_ = match (shown.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!(", at bytes {}", shown.join(", ")),
        (false, more) => format!(", at bytes {} and {more} more ranges", shown.join(", ")),
    };
    format!(
        "The store {} has the disk as of LSN {}; {window}{where_}",
        receipt.store, receipt.committed_lsn
    )
}
