//! Snapshots of a virtual machine's disks while its guest is frozen.

use super::super::Host;
use super::super::parts::Parts;
use super::super::served::Served;
use super::super::snapshots::{label_of, take};
use super::Ended;
use crate::api::VdiState;
use crate::api::snapshots::{Quiesced, SnapSet, SnapSetRequest, Snapped};
use crate::error::{Failure, Kind, Result};
use crate::guest_agent::Times;
use blockstore::SnapshotLabel;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Most disks in one request.
const DISKS_MAX: usize = 64;
/// How long a guest stays frozen for its snapshots if nothing was said, and at most.
const HOLD: Duration = Duration::from_secs(10);
const HOLD_MAX: Duration = Duration::from_secs(60);
/// How long a guest may take to freeze, at most.
const FREEZE_MAX: Duration = Duration::from_secs(300);

impl Host {
    /// Freezes a guest, takes a snapshot of each of these disks, thaws the guest.
    pub async fn snap_quiesced(&self, request: SnapSetRequest) -> Result<SnapSet> {
        let label = label_of(request.label)?;
        let disks = self.disks_of_set(&request.vdis).await?;
        let quiesce = request.quiesce;
        if !quiesce.guest_agent.is_absolute() {
            let path = quiesce.guest_agent.display();
            return Err(Failure::new(
                Kind::Usage,
                format!("guest agent '{path}': give an absolute path"),
            ));
        }
        let mut times = Times::default();
        times.freeze = bounded("--freeze-timeout", quiesce.timeout_ms, times.freeze, FREEZE_MAX)?;
        let hold = bounded("--wait", request.wait_ms, HOLD, HOLD_MAX)?;
        let all = || take_all(&self.parts, &disks, &label, hold);
        let ended = self.quiescing.frozen(&quiesce.guest_agent, times, all()).await;
        let guest = quiesce.guest_agent.display().to_string();
        match judge(ended, &guest) {
            Ok(set) => Ok(set),
            Err(Broken { failure, crash_consistent: Some(taken) })
                if quiesce.or_crash_consistent =>
            {
                let not_quiesced_because = Some(failure.message);
                let snapshots = match taken {
                    Some(snapshots) => snapshots,
                    None => all().await?,
                };
                Ok(SnapSet {
                    snapshots,
                    guest: Quiesced { not_quiesced_because, ..Quiesced::default() },
                })
            }
            Err(Broken { failure, .. }) => Err(failure),
        }
    }

    async fn disks_of_set(&self, vdis: &[String]) -> Result<Vec<Arc<Served>>> {
        if vdis.is_empty() || vdis.len() > DISKS_MAX {
            let words = format!("{} disks were named: give 1 to {DISKS_MAX}", vdis.len());
            return Err(Failure::new(Kind::Usage, words));
        }
        let mut disks: Vec<Arc<Served>> = Vec::new();
        for name in vdis {
            let disk = self.served_or_reason(name).await?;
            if disk.view().state != VdiState::Running {
                let words = format!("disk '{}' is not served now: see 'ballast status'", disk.name);
                return Err(Failure::new(Kind::Conflict, words));
            }
            if disks.iter().any(|other| other.uuid == disk.uuid) {
                let words = format!("disk '{}' was named twice", disk.name);
                return Err(Failure::new(Kind::Usage, words));
            }
            disks.push(disk);
        }
        Ok(disks)
    }
}

fn bounded(what: &str, ms: Option<u64>, default: Duration, max: Duration) -> Result<Duration> {
    match ms.map_or(default, Duration::from_millis) {
        time if time.is_zero() || time > max => {
            let words = format!(
                "{what} {time:?} is not possible with a guest that is frozen: give up to {max:?}"
            );
            Err(Failure::new(Kind::Usage, words))
        }
        time => Ok(time),
    }
}

/// Side by side, so that the guest is frozen for as long as one takes.
async fn take_all(
    parts: &Arc<Parts>,
    disks: &[Arc<Served>],
    label: &SnapshotLabel,
    wait: Duration,
) -> Result<Vec<Snapped>> {
    let mut takes = JoinSet::new();
    for (at, disk) in disks.iter().enumerate() {
        let (parts, disk, label) = (Arc::clone(parts), Arc::clone(disk), label.clone());
        takes.spawn(async move { (at, take(&parts, &disk, label, wait).await) });
    }
    let mut results = takes.join_all().await;
    results.sort_unstable_by_key(|(at, _)| *at);
    let (mut taken, mut failures) = (Vec::new(), Vec::new());
    for (_, result) in results {
        match result {
            Ok(snapped) => taken.push(snapped),
            Err(failure) => failures.push(failure),
        }
    }
    match failures.into_iter().next() {
        None => Ok(taken),
        Some(failure) if taken.is_empty() => Err(failure),
        Some(mut failure) => {
            failure.message = format!("{}; taken were: {}", failure.message, names(&taken));
            Err(failure)
        }
    }
}

fn names(taken: &[Snapped]) -> String {
    let name = |taken: &Snapped| format!("{}@{}", taken.name, taken.snapshot.lsn);
    taken.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// What has to be told.
#[derive(Debug)]
struct Broken {
    failure: Failure,
    /// That the file systems were not frozen is all that is wrong: with the snapshots, if they were taken.
    crash_consistent: Option<Option<Vec<Snapped>>>,
}

fn judge(ended: Ended<Vec<Snapped>>, agent: &str) -> Result<SnapSet, Broken> {
    let Ended { frozen, done, not_held, time, thawed } = ended;
    if let Err(why) = thawed {
        let became = match (frozen, done) {
            (Ok(_), Some(Ok(taken))) => format!("{} taken, but the guest", is_or_are(&taken)),
            (Ok(_), Some(Err(failure))) => format!("{failure}; and the guest"),
            (Err(failure), _) => format!("no snapshot was taken ({failure}), and the guest"),
            (Ok(_), None) => "no snapshot was taken, and the guest".to_owned(),
        };
        let words = format!(
            "{became} MAY STILL BE FROZEN: thawing it through {agent} did not succeed ({why}). The agent goes on trying, \
             'ballast status' shows it; 'echo j > /proc/sysrq-trigger' in a Linux guest, at its console, thaws it at once"
        );
        let failure = Failure::new(Kind::GuestFrozen, words);
        return Err(Broken { failure, crash_consistent: None });
    }
    let file_systems = frozen.map_err(|failure| Broken {
        failure: failure.within("no snapshot was taken"),
        crash_consistent: Some(None),
    })?;
    let taken = done.unwrap_or_else(|| Ok(Vec::new()));
    let snapshots = taken.map_err(|failure| Broken { failure, crash_consistent: None })?;
    if let Some(why) = not_held {
        let words = format!(
            "{} taken, but not known to be of a frozen guest, so no better than without --quiesce: {why}; \
             'ballast snap delete' deletes what is not wanted",
            is_or_are(&snapshots)
        );
        let failure = Failure::new(Kind::Failed, words);
        return Err(Broken { failure, crash_consistent: Some(Some(snapshots)) });
    }
    let guest = Quiesced {
        quiesced: true,
        file_systems: Some(file_systems),
        frozen_ms: Some(time.as_millis() as u64),
        not_quiesced_because: None,
    };
    Ok(SnapSet { snapshots, guest })
}

fn is_or_are(taken: &[Snapped]) -> String {
    format!("{} {}", names(taken), if taken.len() == 1 { "is" } else { "are" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::snapshots::{Snapshot, SnapshotPlace};
    use uuid::Uuid;

    fn taken() -> Vec<Snapped> {
        let (label, place) = (String::new(), SnapshotPlace::Log);
        let snapshot = Snapshot { lsn: 7, time: 0, label, place, size: None };
        vec![Snapped::new("db", Uuid::nil(), snapshot)]
    }

    fn ended() -> Ended<Vec<Snapped>> {
        let (frozen, done, thawed) = (Ok(3), Some(Ok(taken())), Ok(()));
        Ended { frozen, done, not_held: None, time: Duration::from_millis(5), thawed }
    }

    fn failure() -> Failure {
        Failure::new(Kind::NotFound, "no answer")
    }

    #[test]
    fn what_is_told_names_the_snapshot_and_the_guest() {
        let set = judge(ended(), "/agent").unwrap();
        assert!(set.guest.quiesced && set.snapshots[0].id.ends_with("0000@7"));

        let thawed = || Err(failure());
        let stuck = judge(Ended { thawed: thawed(), ..ended() }, "/agent").unwrap_err();
        assert_eq!(stuck.failure.kind, Kind::GuestFrozen);
        for word in ["db@7 is taken", "MAY STILL BE FROZEN", "/agent", "no answer", "sysrq"] {
            assert!(stuck.failure.message.contains(word), "{}", stuck.failure);
        }
        assert!(stuck.crash_consistent.is_none(), "also with =try it is told");
        let neither = Ended { frozen: Err(failure()), done: None, thawed: thawed(), ..ended() };
        let stuck = judge(neither, "/agent").unwrap_err().failure;
        assert_eq!(stuck.kind, Kind::GuestFrozen);
        assert!(stuck.message.contains("no snapshot was taken"), "{stuck}");

        let not_frozen = Ended { frozen: Err(failure()), done: None, ..ended() };
        let broken = judge(not_frozen, "/agent").unwrap_err();
        assert_eq!(broken.failure.kind, Kind::NotFound);
        assert!(matches!(broken.crash_consistent, Some(None)), "with =try it is still to be taken");

        let not_held = Some("somebody".to_owned());
        let broken = judge(Ended { not_held, ..ended() }, "/agent").unwrap_err();
        assert_eq!(broken.failure.kind, Kind::Failed);
        assert!(broken.failure.message.contains("db@7 is taken"), "{}", broken.failure);
        assert!(
            matches!(broken.crash_consistent, Some(Some(_))),
            "with =try it is not taken twice"
        );
    }
}
