//! What people see of the objects in `api`.

use super::output::{Table, fields};
use crate::api::{CacheStatus, Drained, Status, StoreStatus, Vdi, VdiInfo, VdiState};
use crate::units::{format_ms, format_size};
use std::path::Path;

fn dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".into(), show)
}

fn show_path(path: &Path) -> String {
    path.display().to_string()
}

/// `vdi list`.
pub fn vdi_list(vdis: &[Vdi]) -> String {
    let mut table = Table::new(&["NAME", ">SIZE", "STATE", ">COMMITTED", "OWNER", "SOCKET"]);
    for vdi in vdis {
        table.row([
            vdi.name.clone(),
            format_size(vdi.size),
            vdi.state.as_str().into(),
            vdi.committed_lsn.to_string(),
            dash(vdi.owner.clone(), |owner| owner),
            dash(vdi.socket.as_deref(), show_path),
        ]);
    }
    table.render()
}

/// `vdi info`.
pub fn vdi_info(info: &VdiInfo) -> String {
    let vdi = &info.vdi;
    let mut pairs = vec![
        ("name", vdi.name.clone()),
        ("uuid", vdi.uuid.to_string()),
        ("size", format!("{} ({} bytes)", format_size(vdi.size), vdi.size)),
        ("state", state(info)),
        ("owner", dash(vdi.owner.clone(), |owner| owner)),
        ("socket", dash(vdi.socket.as_deref(), show_path)),
        (
            "virtual machine",
            if info.front_end_connected { "connected" } else { "not connected" }.into(),
        ),
        ("last LSN", info.last_lsn.to_string()),
        ("flushed LSN", info.flushed_lsn.to_string()),
        ("committed LSN", vdi.committed_lsn.to_string()),
        ("not in the store yet", dirty(info)),
    ];
    if !vdi.attached {
        pairs.retain(|(key, _)| !matches!(*key, "virtual machine" | "flushed LSN" | "last LSN"));
    }
    fields(&pairs)
}

fn state(info: &VdiInfo) -> String {
    match &info.last_error {
        Some(reason) => format!("{}: {reason}", info.vdi.state.as_str()),
        None => info.vdi.state.as_str().into(),
    }
}

fn dirty(info: &VdiInfo) -> String {
    match info.oldest_dirty_ms {
        Some(age) => format!("{}, oldest {} ago", format_size(info.dirty_bytes), format_ms(age)),
        None => format_size(info.dirty_bytes),
    }
}

/// `cache status`.
pub fn cache_status(cache: &CacheStatus) -> String {
    let paths: Vec<_> = cache.paths.iter().map(|path| show_path(path)).collect();
    fields(&[
        ("cache", paths.join(", ")),
        ("uuid", cache.uuid.to_string()),
        (
            "capacity",
            format!(
                "{} in {} segments of {}",
                format_size(cache.capacity),
                cache.segments,
                format_size(cache.segment_size)
            ),
        ),
        ("not in the store yet", format_size(cache.dirty_bytes)),
        ("read cache", format_size(cache.clean_bytes)),
        ("free", format_size(cache.free_bytes)),
        ("fill", format!("{:.1} %", cache.fill * 100.0)),
    ])
}

fn store_line(store: &StoreStatus) -> String {
    let mut line = if store.reachable {
        format!("{}  up", store.url)
    } else {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now_ms = now.map_or(0, |now| now.as_millis() as u64);
        let since = dash(store.down_since_ms, |since| {
            format!("for {}", format_ms(now_ms.saturating_sub(since)))
        });
        format!("{}  DOWN {since}: serving from the cache", store.url)
    };
    if let Some(error) = store.last_error.as_ref().filter(|_| !store.reachable) {
        line = format!("{line} ({error})");
    }
    if store.single_host {
        line.push_str("  (single host: no compare-and-write)");
    }
    line
}

/// `status`.
pub fn status(status: &Status) -> String {
    let agent = &status.agent;
    let cache = &status.cache;
    let mut text = fields(&[
        (
            "agent",
            format!(
                "{} pid {} on {}, up {}",
                agent.version,
                agent.pid,
                agent.host_name,
                format_ms(agent.uptime_ms)
            ),
        ),
        ("store", store_line(&status.store)),
        (
            "cache",
            format!(
                "{:.1} % of {} full, {} not in the store yet, {} read cache",
                cache.fill * 100.0,
                format_size(cache.capacity),
                format_size(cache.dirty_bytes),
                format_size(cache.clean_bytes)
            ),
        ),
    ]);
    if status.vdis.is_empty() {
        return format!("{text}\nNo disk is attached to this host.\n");
    }
    let head =
        ["DISK", ">SIZE", "VM", ">LAST", ">FLUSHED", ">COMMITTED", "NOT IN THE STORE", "STATE"];
    let mut table = Table::new(&head);
    for info in &status.vdis {
        table.row([
            info.vdi.name.clone(),
            format_size(info.vdi.size),
            if info.front_end_connected { "yes" } else { "-" }.into(),
            info.last_lsn.to_string(),
            info.flushed_lsn.to_string(),
            info.vdi.committed_lsn.to_string(),
            if info.vdi.state == VdiState::Failed { "?".into() } else { dirty(info) },
            state(info),
        ]);
    }
    text.push('\n');
    text.push_str(&table.render());
    text
}

/// `cache drain`.
pub fn drained(drained: &Drained) -> String {
    let mut text: String = drained
        .drained
        .iter()
        .map(|vdi| format!("{}: all up to LSN {} is in the store\n", vdi.name, vdi.lsn))
        .collect();
    if drained.drained.is_empty() {
        text.push_str("no disk is attached: nothing to drain\n");
    }
    format!("{text}done in {:.1} s\n", drained.seconds)
}
