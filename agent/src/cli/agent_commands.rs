//! Commands that ask the daemon.
//!
//! The daemon carries a request to its end even if the command is interrupted, so that Ctrl-C never leaves half a
//! change behind; `status` and `vdi info` then show what became of it.

use super::output::Output;
use super::tables;
use super::tree;
use super::{VdiCommand, parse_origin};
use crate::api::snapshots::{AsOf, RewindRequest, SnapRequest, Snapped};
use crate::api::{
    AttachRequest, Attached, CacheStatus, CreateRequest, Created, DeleteRequest, DetachRequest,
    Done, DrainRequest, Drained, Origin, Pinned, ResizeRequest, Set, SetRequest, Status, Vdi,
    VdiInfo,
};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::names::{check_vdi_name, percent_escape};
use crate::units::format_size;
use blockstore::Schedule;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

/// Path of a disk's resource.
pub(super) fn at(name: &str, action: &str) -> Result<String> {
    if name.is_empty() {
        return Err(Failure::new(Kind::Usage, "the name of a disk must not be empty"));
    }
    Ok(format!("/v1/vdis/{}{action}", percent_escape(name)))
}

/// What became of `vdi create`.
fn created_line(created: &Created) -> String {
    let done = format!("created {} ({})", created.name, format_size(created.size));
    if !created.provisional {
        return done;
    }
    let socket =
        created.socket.as_ref().map_or_else(String::new, |path| format!(": {}", path.display()));
    format!(
        "{done} in this host's cache only: the store is away, and gets it when it is back; it is attached already{socket}"
    )
}

/// A snapshot of a disk as it was, for a clone to begin as.
async fn origin_as_of(client: &Client, vdi: String, point: AsOf) -> Result<Origin> {
    let request = SnapRequest { as_of: Some(point), ..SnapRequest::default() };
    let taken: Snapped = client.post(&at(&vdi, "/snapshots")?, &request).await?;
    Ok(Origin { vdi, snapshot: taken.snapshot.lsn.to_string() })
}

pub async fn vdi(command: VdiCommand, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    match command {
        VdiCommand::Create { name, size, from, as_of, when_offline } => {
            check_vdi_name(&name).map_err(|words| Failure::new(Kind::Usage, words))?;
            let from = match (from, as_of) {
                (Some(vdi), Some(point)) => Some(origin_as_of(&client, vdi, point).await?),
                (from, _) => {
                    let from = from.as_deref().map(parse_origin).transpose();
                    from.map_err(|words| Failure::new(Kind::Usage, words))?
                }
            };
            let when_offline = when_offline.map(|policy| policy.to_string());
            let request = CreateRequest { name, size, from, when_offline };
            let created: Created = client.post("/v1/vdis", &request).await?;
            out.print(&created, created_line)
        }
        VdiCommand::Set { name, when_offline } => {
            let when_offline = when_offline.map(|policy| policy.to_string());
            let set: Set = client.post(&at(&name, "/set")?, &SetRequest { when_offline }).await?;
            out.print(&set, |set| {
                format!("{}: while the store is away, {}", set.name, set.when_offline)
            })
        }
        VdiCommand::Schedule { name, rules, clear } => {
            let rules = rules.or_else(|| clear.then(Schedule::default));
            super::schedule::run(&client, &name, rules, out).await
        }
        VdiCommand::List => {
            let vdis: Vec<Vdi> = client.get("/v1/vdis").await?;
            out.print(&vdis, |vdis| tables::vdi_list(vdis))
        }
        VdiCommand::Tree { dot, svg, sizes } => {
            let drawing = match (dot, svg) {
                (true, _) => tree::Drawing::Dot,
                (_, true) => tree::Drawing::Svg,
                _ => tree::Drawing::Text,
            };
            tree::run(&client, drawing, sizes, out).await
        }
        VdiCommand::Info { name } => {
            let info: VdiInfo = client.get(&at(&name, "")?).await?;
            out.print(&info, tables::vdi_info)
        }
        VdiCommand::Attach { name, read_only } => {
            let request = AttachRequest { read_only };
            let attached: Attached = client.post(&at(&name, "/attach")?, &request).await?;
            out.print(&attached, |attached| attached.socket.display().to_string())
        }
        VdiCommand::Pin { name } => {
            let pinned: Pinned = client.post(&at(&name, "/pin")?, &()).await?;
            out.print(&pinned, |pinned| match &pinned.missing {
                None => format!("{} is pinned", pinned.name),
                Some(missing) => {
                    format!("{} is pinned; not in the cache is: {missing}", pinned.name)
                }
            })
        }
        VdiCommand::Unpin { name } => {
            let pinned: Pinned = client.delete(&at(&name, "/pin")?).await?;
            out.print(&pinned, |pinned| format!("{} is not pinned any more", pinned.name))
        }
        VdiCommand::Hydrate { name, boot_trace, wait } => {
            super::hydrate::run(&name, boot_trace, wait, run_dir, out).await
        }
        VdiCommand::Detach { name, force } => {
            let done: Done = client.post(&at(&name, "/detach")?, &DetachRequest { force }).await?;
            out.print(&done, |done| format!("detached {}", done.name))
        }
        VdiCommand::Delete { name, with_snapshots } => {
            let request = DeleteRequest { with_snapshots };
            let done: Done = client.post(&at(&name, "/delete")?, &request).await?;
            out.print(&done, |done| format!("deleted {}", done.name))
        }
        VdiCommand::Rollback { name, to: Some(to), discard_present, label, accept_loss: _ } => {
            let request = RewindRequest { to, discard_present, label };
            super::snap::rewind(&client, &name, &request, out).await
        }
        VdiCommand::Rollback { name, accept_loss, .. } => {
            super::loss::roll_back(&client, &name, accept_loss, out).await
        }
        VdiCommand::Resize { name, size } => {
            let resized: Created =
                client.post(&at(&name, "/resize")?, &ResizeRequest { size }).await?;
            out.print(&resized, |r| format!("{} has {} now", r.name, format_size(r.size)))
        }
    }
}

pub async fn status(run_dir: &Path, out: Output) -> Result<()> {
    let status: Status = Client::new(run_dir).get("/v1/status").await?;
    out.print(&status, tables::status)
}

pub async fn metrics(run_dir: &Path, out: Output) -> Result<()> {
    let text = Client::new(run_dir).get_text("/v1/metrics").await?;
    out.print(&serde_json::json!({ "metrics": text }), |_| text.clone())
}

pub async fn cache_status(run_dir: &Path, out: Output) -> Result<()> {
    let cache: CacheStatus = Client::new(run_dir).get("/v1/cache").await?;
    out.print(&cache, tables::cache_status)
}

pub async fn cache_drain(vdi: Option<String>, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    let request = DrainRequest { vdi };
    let drain = client.post::<_, Drained>("/v1/cache/drain", &request);
    let drained = if !out.json && std::io::stderr().is_terminal() {
        tokio::select! {
            drained = drain => drained,
            () = show_progress(&client) => unreachable!("progress is shown for ever"),
        }
    } else {
        drain.await
    }?;
    out.print(&drained, tables::drained)
}

/// Says each second how much is left.
async fn show_progress(client: &Client) {
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let Ok(status) = client.get::<Status>("/v1/status").await else { continue };
        let down = if status.store.reachable { "" } else { " (the store is down: waiting for it)" };
        let left = format_size(status.cache.dirty_bytes);
        eprintln!("draining: {left} not in the store yet{down}");
    }
}
