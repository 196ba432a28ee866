//! What people see of the objects in `api`.

use super::output::{Table, counted, fields, findings};
use crate::api::snapshots::AttachedSnapshot;
use crate::api::{
    CacheStatus, Drained, DrillReport, Outlook, Readiness, Replacement, Status, StoreStatus, Vdi,
    VdiInfo, VdiState,
};
use crate::units::{format_ms, format_size};
use cache::ReplacementState;
use std::path::Path;

fn dash<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".into(), show)
}

fn show_path(path: &Path) -> String {
    path.display().to_string()
}

fn remark(vdi: &Vdi) -> &'static str {
    match (vdi.read_only, &vdi.provisional_clone_of) {
        (true, _) => ", read-only",
        (_, Some(_)) => ", not in the store yet",
        _ => "",
    }
}

/// `vdi list`.
pub fn vdi_list(vdis: &[Vdi]) -> String {
    let mut table = Table::new(&["NAME", ">SIZE", "STATE", ">COMMITTED", "OWNER", "SOCKET"]);
    for vdi in vdis {
        table.row([
            vdi.name.clone(),
            format_size(vdi.size),
            format!("{}{}", vdi.state.as_str(), remark(vdi)),
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
        (
            "write-through",
            if info.write_through { "yes: the cache has failed" } else { "no" }.to_owned(),
        ),
        ("committed LSN", vdi.committed_lsn.to_string()),
        ("not in the store yet", dirty(info)),
        ("snapshots only in the log", info.snapshots_in_log.to_string()),
        ("writes", rate(info.outlook.write_rate)),
        ("runway without the store", runway(&info.outlook)),
        ("drain takes", drain_time(&info.outlook)),
        ("held locally", held(&info.readiness)),
        ("recent reads", local_reads(&info.readiness)),
        ("last boot", boot(&info.readiness)),
        ("missing", info.readiness.missing.clone().unwrap_or_else(|| "nothing".into())),
        (
            "waiting",
            format!(
                "{} writes for space, {} reads for the store",
                info.waiting.writes, info.waiting.reads
            ),
        ),
    ];
    pairs.push(("store away", offline(info)));
    pairs.push(("snapshot schedule", schedule(info)));
    if info.pinned {
        pairs.push(("pinned", "yes".into()));
    }
    if let Some(progress) = &info.hydrate {
        pairs.push(("hydrated", super::hydrate::line(&vdi.name, progress)));
    }
    if let Some(until) = info.drill_until {
        pairs.push(("outage drill", drill(until)));
    }
    if !vdi.attached {
        pairs.retain(|(key, _)| {
            ["name", "uuid", "size", "state", "owner", "store away", "snapshot schedule"]
                .contains(key)
        });
        pairs.push(("committed LSN", vdi.committed_lsn.to_string()));
    }
    fields(&pairs)
}

/// What becomes of requests that cannot go on without the store.
fn offline(info: &VdiInfo) -> String {
    match info.totals.failed_by_policy {
        0 => info.when_offline.clone(),
        failed => format!("{}, {failed} requests failed by it", info.when_offline),
    }
}

fn schedule(info: &VdiInfo) -> String {
    let rules = info.vdi.schedule.as_deref().unwrap_or("none");
    match &info.schedule_trouble {
        Some(trouble) => format!("{rules}; {trouble}"),
        None => rules.to_owned(),
    }
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

fn rate(bytes: u64) -> String {
    if bytes == 0 { "-".into() } else { format!("{}/s", format_size(bytes)) }
}

fn runway(outlook: &Outlook) -> String {
    dash(outlook.runway_ms, format_ms)
}

fn drain_time(outlook: &Outlook) -> String {
    match outlook.drain_eta_ms {
        Some(0) => "-".into(),
        Some(eta) => format_ms(eta),
        None => "?".into(),
    }
}

fn held(readiness: &Readiness) -> String {
    let share = readiness.held_share * 100.0;
    format!("{}, {share:.1} % of the disk", format_size(readiness.held_bytes))
}

fn boot(readiness: &Readiness) -> String {
    let show = |share| format!("{:.1} % of what it read is in the cache", share * 100.0);
    dash(readiness.boot_trace_share, show)
}

fn local_reads(readiness: &Readiness) -> String {
    let show = |share| format!("{:.1} % from the cache", share * 100.0);
    dash(readiness.recent_reads_local_share, show)
}

fn drill(until: u64) -> String {
    format!("cut off from the store, ends in {}", format_ms(until.saturating_sub(now_ms())))
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_millis() as u64)
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
        ("logs", format_size(cache.dirty_bytes)),
        ("read cache", format_size(cache.clean_bytes)),
        ("free", format_size(cache.free_bytes)),
        ("fill", format!("{:.1} %", cache.fill * 100.0)),
        ("mirror", mirror_line(&cache.legs)),
        ("new leg", dash(cache.replacement.as_ref(), replacement_line)),
        ("quarantine", quarantine_line(&cache.quarantined)),
    ])
}

fn quarantine_line(kept: &[cache::QuarantinedLog]) -> String {
    let logs = kept.iter();
    let logs: Vec<_> = logs
        .map(|log| format!("log {} of {}, {}", log.log_id, log.name, format_size(log.bytes)))
        .collect();
    if logs.is_empty() { "none".to_owned() } else { logs.join("; ") }
}

fn replacement_line(replacement: &Replacement) -> String {
    let path = show_path(&replacement.path);
    let why = replacement.why.as_deref().unwrap_or_default();
    match replacement.state {
        ReplacementState::Copying => {
            let (done, all) = (replacement.bytes_done, replacement.bytes_all);
            let percent = done * 100 / all.max(1);
            let line =
                format!("{path}: {percent} % ({} of {})", format_size(done), format_size(all));
            if why.is_empty() { line } else { format!("{line}, {why}") }
        }
        ReplacementState::Done => format!("{path}: in step"),
        ReplacementState::Failed => format!("{path}: given up, {why}"),
    }
}

fn mirror_line(legs: &[cache::LegState]) -> String {
    let lost = legs.iter().filter(|leg| !leg.member);
    let lost: Vec<_> = lost
        .map(|leg| {
            let why = leg.why.as_deref().unwrap_or("not in step");
            format!("WITHOUT {}: {why}", show_path(&leg.path))
        })
        .collect();
    match (legs.len(), lost.is_empty()) {
        (0 | 1, true) => "none".to_owned(),
        (count, true) => format!("{count} legs, all in step"),
        (_, false) => lost.join("; "),
    }
}

fn store_line(store: &StoreStatus) -> String {
    let mut line = if store.reachable {
        format!("{}  up", store.url)
    } else {
        let since = dash(store.down_since, |since| {
            format!("for {}", format_ms(now_ms().saturating_sub(since)))
        });
        format!("{}  DOWN {since}: serving from the cache", store.url)
    };
    if let Some(error) = store.last_error.as_ref().filter(|_| !store.reachable) {
        let error = error
            .strip_prefix(&store.url)
            .map_or(&**error, |rest| rest.trim_start_matches([':', ' ']));
        line = format!("{line} ({error})");
    }
    if let Some(space) = &store.space {
        let percent = space.used as f64 * 100.0 / space.capacity.max(1) as f64;
        line.push_str(&format!("  {percent:.0} % of {} used", format_size(space.capacity)));
    }
    if store.waiting_for_space > 0 {
        line.push_str("  FULL: commits wait for free space");
    }
    if store.waiting_for_device_space > 0 {
        line.push_str("  DEVICE FULL: commits wait for space on it");
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
                format_size(status.vdis.iter().map(|info| info.dirty_bytes).sum()),
                format_size(cache.clean_bytes)
            ),
        ),
        (
            "outlook",
            format!(
                "writes {}, runway {}, drain {}",
                rate(status.outlook.write_rate),
                runway(&status.outlook),
                drain_time(&status.outlook)
            ),
        ),
    ]);
    for what in &status.degraded {
        text.push_str(&format!("ATTENTION: {what}\n"));
    }
    if status.vdis.is_empty() {
        text.push_str("\nNo disk is attached to this host.\n");
    } else {
        text.push_str(&disks(status));
    }
    if !status.snapshots.is_empty() {
        text.push_str(&format!("\n{}", snapshots(&status.snapshots)));
    }
    text
}

fn snapshots(attached: &[AttachedSnapshot]) -> String {
    let head = ["SNAPSHOT, READ-ONLY", ">SIZE", "VM", ">READS", "WAITING", "STATE"];
    let mut table = Table::new(&head);
    for found in attached {
        let state = found.state.as_str();
        table.row([
            found.name.clone(),
            format_size(found.size),
            if found.front_end_connected { "yes" } else { "-" }.into(),
            found.reads.to_string(),
            match found.waiting_reads {
                0 => "-".into(),
                reads => format!("{reads} reads for the store"),
            },
            match &found.last_error {
                Some(why) => format!("{state}: {why}"),
                None => state.to_owned(),
            },
        ]);
    }
    table.render()
}

fn disks(status: &Status) -> String {
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
    let mut text = format!("\n{}", table.render());
    let head =
        ["DISK", ">WRITES", ">RUNWAY", ">DRAIN", ">HELD LOCALLY", ">RECENT READS", "WAITING"];
    let mut table = Table::new(&head);
    for info in &status.vdis {
        let readiness = &info.readiness;
        table.row([
            info.vdi.name.clone(),
            rate(info.outlook.write_rate),
            runway(&info.outlook),
            drain_time(&info.outlook),
            format!("{:.1} %", readiness.held_share * 100.0),
            dash(readiness.recent_reads_local_share, |s| format!("{:.1} % local", s * 100.0)),
            waiting(info),
        ]);
    }
    text.push('\n');
    text.push_str(&table.render());
    text
}

fn waiting(info: &VdiInfo) -> String {
    match (info.waiting.writes, info.waiting.reads) {
        (0, 0) => "-".into(),
        (writes, 0) => format!("{writes} writes for space"),
        (0, reads) => format!("{reads} reads for the store"),
        (writes, reads) => format!("{writes} writes for space, {reads} reads for the store"),
    }
}

/// While a drill is under way.
pub fn drill_progress(info: &VdiInfo) -> String {
    format!(
        "drill of {}: {} not in the store, runway {}, waiting: {}\n",
        info.vdi.name,
        format_size(info.dirty_bytes),
        runway(&info.outlook),
        waiting(info)
    )
}

/// `outage drill`.
pub fn drill_report(report: &DrillReport) -> String {
    let missed = match report.missed_bytes {
        0 => "none waited for the store".to_owned(),
        bytes => format!(
            "{} were not held locally and waited, up to {} at once",
            format_size(bytes),
            report.waiting_reads_max
        ),
    };
    let held_up = match report.waiting_writes_max {
        0 => "none waited for space".to_owned(),
        writes => format!("the ring was full: up to {writes} waited for space"),
    };
    let written = format_size(report.written_bytes);
    let mut text =
        format!("{} was cut off from the store for {:.1} s\n", report.name, report.seconds);
    text.push_str(&fields(&[
        ("writes", format!("{} of {written}; {held_up}", report.writes)),
        ("flushes", format!("{}, all from the local log", report.flushes)),
        ("reads", format!("{}; {missed}", report.reads)),
        ("not in the store", format!("at most {}", format_size(report.dirty_bytes_max))),
        ("runway at the end", dash(report.runway_ms, format_ms)),
        ("drained", format!("{:.1} s after its end", report.drain_seconds)),
    ]));
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

/// `store format`.
pub fn formatted(info: &blockstore::StoreInfo) -> String {
    format!("formatted {} as store {}\n\n{}", info.url, info.uuid, store_info(info))
}

/// `store info`.
pub fn store_info_with(report: &super::sizes::StoreReport) -> String {
    format!("{}\n{}", store_info(&report.info), report.words())
}

/// What a store says of itself.
pub fn store_info(info: &blockstore::StoreInfo) -> String {
    const BLOCK: u64 = 4096;
    let usage = format!(
        "{} data, {} metadata, {} free",
        format_size(info.data_blocks_allocated * BLOCK),
        format_size(info.metadata_blocks_allocated * BLOCK),
        format_size(info.blocks_free * BLOCK)
    );
    let guard = if info.single_host {
        "one host only: the device has no compare-and-write"
    } else {
        "compare-and-write"
    };
    let mut text = fields(&[
        ("store", info.url.clone()),
        ("uuid", info.uuid.to_string()),
        ("format", info.format_version.to_string()),
        ("guarded by", guard.into()),
        ("capacity", format_size(info.capacity_bytes)),
        (
            "extents",
            format!(
                "{} of {}: {} data, {} metadata, {} unused",
                info.extents,
                format_size(info.extent_size_bytes),
                info.extents_data,
                info.extents_metadata,
                info.extents_unused
            ),
        ),
        ("space", usage),
    ]);
    let mut hosts = Table::new(&["HOST", "UUID", "STATE", ">GENERATION"]);
    for host in &info.hosts {
        let state = format!("{:?}", host.state).to_lowercase();
        hosts.row([host.name.clone(), host.uuid.to_string(), state, host.generation.to_string()]);
    }
    let mut disks = Table::new(&["DISK", "UUID", ">SIZE", ">COMMITTED", "ATTACHED TO"]);
    for vdi in &info.vdis {
        let owner = vdi.owner.as_ref();
        disks.row([
            vdi.name.clone(),
            vdi.uuid.to_string(),
            format_size(vdi.size_bytes),
            vdi.committed_lsn.to_string(),
            dash(owner, |o| o.host_name.clone().unwrap_or_else(|| o.host.to_string())),
        ]);
    }
    if !info.hosts.is_empty() {
        text.push_str(&format!("\n{}", hosts.render()));
    }
    if !info.vdis.is_empty() {
        text.push_str(&format!("\n{}", disks.render()));
    }
    for problem in &info.problems {
        text.push_str(&format!("\nPROBLEM: {problem} ('ballast store check' tells more)\n"));
    }
    text
}

/// `cache check`.
pub fn cache_report(report: &cache::CheckReport) -> String {
    let mut text = fields(&[
        ("cache", report.cache.to_string()),
        ("host", report.host.to_string()),
        ("store", dash(report.store, |store| store.to_string())),
        ("segments", format!("{} of {} in use", report.segments_used, report.segments)),
    ]);
    let mut table =
        Table::new(&["DISK", "UUID", ">COMMITTED", ">LAST", ">SEGMENTS", ">BLOCKS CHECKED"]);
    for vdi in &report.vdis {
        table.row([
            vdi.name.clone(),
            vdi.uuid.to_string(),
            vdi.committed_lsn.to_string(),
            vdi.last_lsn.to_string(),
            vdi.segments.to_string(),
            vdi.blocks_checked.to_string(),
        ]);
    }
    if !report.vdis.is_empty() {
        text.push_str(&format!("\n{}", table.render()));
    }
    format!("{text}\n{}", findings(&report.problems))
}

/// `store check`.
pub fn store_report(report: &gc::Report) -> String {
    let mut text = fields(&[
        ("store", report.url.clone()),
        ("uuid", report.store.to_string()),
        ("disks", report.vdis.to_string()),
        ("snapshots", report.snapshots.to_string()),
        ("nodes checked", report.nodes.to_string()),
        ("data blocks checked", report.data_blocks_checked.to_string()),
        (
            "blocks",
            format!(
                "{} allocated, {} in use, {} claimed, left by a crash, or only of deleted snapshots",
                report.blocks_allocated, report.blocks_reachable, report.blocks_leaked
            ),
        ),
    ]);
    if report.bitmap_pages_damaged > 0 {
        text.push_str(&format!(
            "{} damaged, as after a power loss: all blocks there count as in use\n",
            counted(report.bitmap_pages_damaged, "bitmap page")
        ));
    }
    if report.reclaim_pages_damaged > 0 {
        text.push_str(&format!(
            "{} damaged: no harm; a cycle of garbage collection writes anew what it needs of that\n",
            counted(report.reclaim_pages_damaged, "reclaim page")
        ));
    }
    text.push('\n');
    text.push_str(&findings(&report.problems));
    let repairable = report.advice.iter().filter(|advice| advice.is_none()).count();
    if repairable > 0 {
        let which = match report.problems.len() {
            1 => "it".to_owned(),
            _ => format!("{repairable} of them"),
        };
        text.push_str(&format!("'ballast store repair' can mend {which}\n"));
    }
    let mut advice: Vec<_> = report.advice.iter().flatten().collect();
    advice.dedup();
    text.extend(advice.iter().take(8).map(|advice| format!("ADVICE: {advice}\n")));
    if report.problems_not_listed > 0 {
        text.push_str(&format!("and {} more that are not listed\n", report.problems_not_listed));
    }
    if report.changed_during_check {
        text.push_str(
            "The store was in use and changed meanwhile: check again with its agent stopped.\n",
        );
    }
    text
}
