//! The store's own tables. Their records are changed in place: what is wrong counts when several looks find it.

use super::damage::{Damage, Part};
use super::looking::Looking;
use blockstore::{Cure, Result, StoreErrorKind, TableProblem};
use std::time::Duration;

/// Between two looks: longer than it takes to change a record and what repeats it.
const PAUSE: Duration = Duration::from_secs(2);
const LOOKS: u32 = 3;
const DEVICE_ADVICE: &str = "the device reports an error where they are: look into its own log, and copy the store's disks out in time";
const REPAIR_ADVICE: &str = "'ballast store repair' writes it anew, from what the store says elsewhere; stop the agents first";

pub(super) async fn verify(looking: &mut Looking<'_>) -> Result<()> {
    let mut problems = match looking.tables().await {
        Err(error) if error.kind == StoreErrorKind::Device => {
            looking.found(damage(None, format!("the store's tables: {error}"), DEVICE_ADVICE));
            return Ok(());
        }
        Err(error) if error.kind == StoreErrorKind::Unreachable => {
            looking.unverified(format!("the store's tables: {error}"));
            return Ok(());
        }
        problems => problems?,
    };
    for _ in 1..LOOKS {
        if problems.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
        let now = match looking.tables().await {
            Err(error) if error.kind == StoreErrorKind::Device => continue,
            // What was found may have been a change under way.
            Err(error) if error.kind == StoreErrorKind::Unreachable => {
                looking.unverified(format!("the store's tables: {error}"));
                return Ok(());
            }
            now => now?,
        };
        problems.retain(|problem| now.iter().any(|other| other.what == problem.what));
    }
    for TableProblem { what, cure, .. } in problems {
        let (block, advice) = match cure {
            Cure::Write(fix) => (Some(fix.address.0), REPAIR_ADVICE),
            Cure::Advice(advice) => (None, advice),
        };
        looking.found(damage(block, what.trim_end_matches('.').to_owned(), advice));
    }
    Ok(())
}

fn damage(block: Option<u64>, what: String, advice: &str) -> Damage {
    Damage {
        part: Part::Table,
        vdi: None,
        name: None,
        snapshot: None,
        offset: None,
        bytes: None,
        block,
        what,
        advice: advice.into(),
    }
}
