//! `cache adopt`: makes a cache that was moved here this machine's own.

use super::output::Output;
use crate::error::{Failure, Kind, Result};
use crate::machine::this_machine;
use cache::local::{Local, Mode, Terms};
use serde::Serialize;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What was adopted.
#[derive(Debug, Serialize)]
struct Adopted {
    /// The cache.
    cache: Uuid,
    /// The host that an agent with this cache is, as the store knows it.
    host: Uuid,
    /// The machine's name that was noted in it.
    from: Option<String>,
    /// This machine's name.
    to: String,
    /// Disks whose logs are in it.
    vdis: Vec<String>,
}

/// Notes this machine in the cache whose legs are at `paths`. Disks, logs and the host's identity stay as they are.
///
/// # Errors
/// Those of opening the cache, of which another user is one; this machine has no id.
pub async fn run(paths: &[PathBuf], degraded: bool, id_file: &Path, out: Output) -> Result<()> {
    let Some(machine) = this_machine(id_file)? else {
        let file = id_file.display();
        let words = format!(
            "this machine has no id in {file}: nothing to adopt, any agent here may use the cache"
        );
        return Err(Failure::new(Kind::Failed, words));
    };
    let serve = Mode::Serve { create_size: None };
    let local = Local::open_legs(paths, serve, &Terms { degraded, machine: None }).await?;
    let slots = local.read_slots().await?;
    let former = local.superblock().await;
    let noted = machine.clone();
    local.rewrite_superblock(|superblock| superblock.machine = Some(noted)).await?;
    let adopted = Adopted {
        cache: former.cache,
        host: former.host,
        from: former.machine.map(|machine| machine.name),
        to: machine.name,
        vdis: slots
            .iter()
            .filter_map(|slot| slot.vdi.as_ref())
            .map(|vdi| vdi.name.clone())
            .collect(),
    };
    out.print(&adopted, |adopted| {
        let from = adopted.from.as_deref().unwrap_or("(not noted)");
        let disks = if adopted.vdis.is_empty() { "none".into() } else { adopted.vdis.join(", ") };
        format!(
            "cache {}, of host {}: was of machine {from}, is of machine {} now\ndisks: {disks}\nstart the agent with it: it is that host from now on",
            adopted.cache, adopted.host, adopted.to
        )
    })
}
