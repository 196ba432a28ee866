//! What `status` shows, for Prometheus: the text format over the control socket and, if configured, over a TCP port of the
//! loopback device.
//!
//! A scrape takes one [`Status`] and writes it down; nothing is counted here. Names are only ever added. Sizes are bytes,
//! times are seconds, shares go from 0 to 1. What is not known (no runway without writes) is left out.

use crate::api::gc::UnmapStatus;
use crate::api::scrub::ScrubSummary;
use crate::api::snapshots::AttachedSnapshot;
use crate::api::{Status, VdiInfo, VdiState};
use crate::error::{Failure, Kind, Result};
use cache::ReplacementState;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;

/// Of the text that [`render`] makes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Value = Gauge<f64, AtomicU64>;

/// The status in the text format of Prometheus (OpenMetrics 1.0).
///
/// # Errors
/// None in practice: memory is written to.
pub fn render(status: &Status) -> Result<String> {
    let mut registry = Registry::with_prefix("ballast");
    of_host(&mut registry, status);
    of_unmapping(&mut registry, &status.unmap);
    of_scrub(&mut registry, &status.scrub);
    of_disks(&mut registry, &status.vdis);
    of_snapshots(&mut registry, &status.snapshots);
    let mut text = String::new();
    encode(&mut text, &registry)
        .map_err(|error| Failure::caused(Kind::Failed, "cannot write the metrics", &error))?;
    Ok(text)
}

fn of_host(registry: &mut Registry, status: &Status) {
    let (agent, store, cache) = (&status.agent, &status.store, &status.cache);
    let labels = vec![("version", agent.version.clone()), ("host", agent.host_name.clone())];
    let info = Family::<Labels, Value>::default();
    info.get_or_create(&labels).set(1.0);
    add(registry, "agent", "The agent's version and host", info);
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            let gauge = Value::default();
            gauge.set(value);
            add(registry, name, help, gauge);
        }
    };
    gauge("uptime_seconds", "Since the agent's start", Some(seconds(agent.uptime_ms)));
    gauge("store_up", "The store answered last time", Some(flag(store.reachable)));
    gauge(
        "store_since_seconds",
        "UNIX time since which store_up has had its value",
        Some(seconds(store.since)),
    );
    gauge(
        "store_waiting_for_space",
        "Operations that wait because the store is full",
        Some(f64::from(store.waiting_for_space)),
    );
    gauge(
        "store_waiting_for_device_space",
        "Operations that wait because the store's device, a thin one, is full",
        Some(f64::from(store.waiting_for_device_space)),
    );
    let space = store.space;
    gauge(
        "store_capacity_bytes",
        "Bytes that disks, snapshots and their maps can have",
        space.map(|space| space.capacity as f64),
    );
    gauge(
        "store_used_bytes",
        "Bytes of them that are used, or claimed ahead of need",
        space.map(|space| space.used as f64),
    );
    gauge("store_free_bytes", "Bytes of them that are free", space.map(|space| space.free as f64));
    gauge(
        "store_watermark_percent",
        "The highest mark that used space is over; 0: none",
        space.map(|space| f64::from(space.over_mark.unwrap_or(0))),
    );
    gauge("cache_capacity_bytes", "Bytes of the ring", Some(cache.capacity as f64));
    gauge("cache_free_bytes", "Bytes in free segments", Some(cache.free_bytes as f64));
    gauge("cache_clean_bytes", "Bytes in segments of read cache", Some(cache.clean_bytes as f64));
    gauge("cache_pinned_bytes", "Bytes of it of pinned disks", Some(cache.pinned_bytes as f64));
    let in_step = cache.legs.iter().filter(|leg| leg.member).count();
    gauge("cache_legs", "Devices that the cache is mirrored on", Some(cache.legs.len() as f64));
    gauge("cache_legs_in_step", "Those of them that hold everything", Some(in_step as f64));
    let kept: u64 = cache.quarantined.iter().map(|log| log.bytes).sum();
    gauge("cache_quarantined_bytes", "Bytes in damaged logs that are kept", Some(kept as f64));
    let replacing = cache.replacement.as_ref().filter(|r| r.state == ReplacementState::Copying);
    gauge(
        "cache_replacement_bytes",
        "Bytes to be on a new leg that is being filled",
        replacing.map(|replacement| replacement.bytes_all as f64),
    );
    gauge(
        "cache_replacement_done_bytes",
        "Bytes of them that are there",
        replacing.map(|replacement| replacement.bytes_done as f64),
    );
    gauge("cache_fill", "Share of the ring that holds logs", Some(cache.fill));
    gauge(
        "runway_seconds",
        "Until the ring is full at the present rate of writes with the store away",
        status.outlook.runway_ms.map(seconds),
    );
    gauge(
        "drain_seconds",
        "To commit all that is not in the store",
        status.outlook.drain_eta_ms.map(seconds),
    );
    gauge(
        "guests_frozen",
        "Guests that were frozen for a snapshot and could not be thawed so far",
        Some(status.frozen_guests.len() as f64),
    );
    gauge(
        "unmap_supported",
        "1 if the store's device can be told of free blocks",
        status.unmap.supported.map(flag),
    );
    gauge(
        "unmap_extents_left_out",
        "Extents that the last pass left out, because the device did not read or write what describes them",
        Some(status.unmap.extents_left_out as f64),
    );
    gauge("degraded", "Things that are not as they should be", Some(status.degraded.len() as f64));
}

/// Free blocks of which the device is told.
fn of_unmapping(registry: &mut Registry, unmap: &UnmapStatus) {
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        add(registry, name, help, counter);
    };
    counter(
        "unmapped_bytes",
        "Bytes of free blocks that the store's device was told of",
        unmap.bytes,
    );
    counter("unmap_failures", "Times that it refused or broke off", unmap.failures);
}

/// What is known of damage in the store.
fn of_scrub(registry: &mut Registry, scrub: &ScrubSummary) {
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            let gauge = Value::default();
            gauge.set(value);
            add(registry, name, help, gauge);
        }
    };
    gauge("scrub_running", "A scrub is under way", Some(flag(scrub.running)));
    gauge("scrub_waiting", "It waits for the store", Some(flag(scrub.waiting)));
    gauge(
        "scrub_verified_bytes",
        "Bytes that it has verified; without one, what the last one had",
        Some(scrub.verified_bytes as f64),
    );
    gauge("scrub_damaged", "Damaged places that are known of", Some(scrub.damaged as f64));
    gauge(
        "scrub_unverified",
        "Blocks of which it could not be found out",
        Some(scrub.unverified as f64),
    );
    gauge(
        "scrub_completed_seconds",
        "UNIX time at which the last one came to its end",
        scrub.last_completed.map(seconds),
    );
}

fn of_disks(registry: &mut Registry, vdis: &[VdiInfo]) {
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&VdiInfo) -> Option<f64>| {
        let family = Family::<Labels, Value>::default();
        for info in vdis {
            if let Some(value) = value(info) {
                family.get_or_create(&labels(info)).set(value);
            }
        }
        add(registry, name, help, family);
    };
    gauge("vdi_up", "The disk is served", &|v| Some(flag(v.vdi.state == VdiState::Running)));
    gauge("vdi_connected", "A virtual machine uses it", &|v| Some(flag(v.front_end_connected)));
    gauge("vdi_size_bytes", "What the guest sees", &|v| Some(v.vdi.size as f64));
    gauge(
        "vdi_write_through",
        "1 while the cache has failed and writes go to the store first",
        &|v| Some(f64::from(u8::from(v.write_through))),
    );
    gauge("vdi_dirty_bytes", "Bytes of log not in the store", &|v| Some(v.dirty_bytes as f64));
    gauge("vdi_oldest_dirty_seconds", "Age of the oldest of them", &|v| {
        Some(v.oldest_dirty_ms.map_or(0.0, seconds))
    });
    gauge("vdi_write_rate_bytes", "Bytes of log per second", &|v| {
        Some(v.outlook.write_rate as f64)
    });
    gauge("vdi_drain_rate_bytes", "Bytes of log that the store takes per second", &|v| {
        v.outlook.drain_rate.map(|rate| rate as f64)
    });
    gauge("vdi_runway_seconds", "As runway_seconds, if only this disk is written", &|v| {
        v.outlook.runway_ms.map(seconds)
    });
    gauge("vdi_drain_seconds", "To commit what is not in the store", &|v| {
        v.outlook.drain_eta_ms.map(seconds)
    });
    gauge("vdi_held_bytes", "Bytes of the disk that can be read without the store", &|v| {
        Some(v.readiness.held_bytes as f64)
    });
    gauge("vdi_recent_reads_local", "Share of recent reads without the store", &|v| {
        v.readiness.recent_reads_local_share
    });
    gauge("vdi_boot_trace_local", "Share of the last boot's reads held", &|v| {
        v.readiness.boot_trace_share
    });
    gauge("vdi_pinned", "It is pinned", &|v| Some(flag(v.pinned)));
    gauge("vdi_snapshots_in_log", "Snapshots that the store does not have yet", &|v| {
        Some(v.snapshots_in_log as f64)
    });
    gauge("vdi_schedule_trouble", "1 while its schedule of snapshots does not go on", &|v| {
        Some(flag(v.schedule_trouble.is_some()))
    });
    gauge("vdi_hydrating", "It is being hydrated", &|v| {
        Some(flag(v.hydrate.as_ref().is_some_and(|hydrate| hydrate.running)))
    });
    gauge("vdi_waiting_writes", "Writes that wait for space in the ring", &|v| {
        Some(v.waiting.writes as f64)
    });
    gauge("vdi_waiting_reads", "Reads that wait for the store", &|v| Some(v.waiting.reads as f64));
    gauge("vdi_drill", "An outage drill is under way", &|v| Some(flag(v.drill_until.is_some())));
    let mut counter = |name: &str, help: &str, value: &dyn Fn(&VdiInfo) -> u64| {
        let family = Family::<Labels, Counter>::default();
        for info in vdis {
            family.get_or_create(&labels(info)).inc_by(value(info));
        }
        add(registry, name, help, family);
    };
    counter("vdi_reads", "Read requests", &|v| v.totals.reads);
    counter("vdi_read_bytes", "Bytes that they asked for", &|v| v.totals.read_bytes);
    counter("vdi_fetched_bytes", "Bytes asked of the store", &|v| v.totals.fetched_bytes);
    counter("vdi_writes", "Write requests", &|v| v.totals.writes);
    counter("vdi_written_bytes", "Bytes in them", &|v| v.totals.written_bytes);
    counter("vdi_flushes", "Flushes", &|v| v.totals.flushes);
    counter("vdi_failed", "Valid requests that ended with an error", &|v| v.totals.failed);
    counter("vdi_failed_by_policy", "Requests that the policy for outages failed", &|v| {
        v.totals.failed_by_policy
    });
    counter("vdi_commits", "Commits to the store", &|v| v.totals.commits);
    counter("vdi_replayed_bytes", "Bytes of log in them", &|v| v.totals.replayed_bytes);
    counter("vdi_snapshots_scheduled", "Snapshots that its schedule took", &|v| {
        v.totals.snapshots_scheduled
    });
    counter("vdi_snapshots_thinned", "Snapshots that no rule of it kept", &|v| {
        v.totals.snapshots_thinned
    });
}

/// Those that are attached, read-only.
fn of_snapshots(registry: &mut Registry, snapshots: &[AttachedSnapshot]) {
    let labels = |found: &AttachedSnapshot| -> Labels {
        let (vdi, uuid) = (found.vdi.clone(), found.uuid.to_string());
        vec![("vdi", vdi), ("snapshot", found.snapshot.to_string()), ("uuid", uuid)]
    };
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&AttachedSnapshot) -> f64| {
        let family = Family::<Labels, Value>::default();
        for found in snapshots {
            family.get_or_create(&labels(found)).set(value(found));
        }
        add(registry, name, help, family);
    };
    gauge("read_only_up", "The snapshot is served", &|s| flag(s.state == VdiState::Running));
    gauge("read_only_connected", "A virtual machine uses it", &|s| flag(s.front_end_connected));
    gauge("read_only_size_bytes", "What the guest sees", &|s| s.size as f64);
    gauge("read_only_waiting_reads", "Reads that wait for the store", &|s| s.waiting_reads as f64);
    let mut counter = |name: &str, help: &str, value: &dyn Fn(&AttachedSnapshot) -> u64| {
        let family = Family::<Labels, Counter>::default();
        for found in snapshots {
            family.get_or_create(&labels(found)).inc_by(value(found));
        }
        add(registry, name, help, family);
    };
    counter("read_only_reads", "Read requests", &|s| s.reads);
    counter("read_only_read_bytes", "Bytes that they asked for", &|s| s.read_bytes);
    counter("read_only_refused", "Writes and senseless requests", &|s| s.refused);
    counter("read_only_failed", "Valid requests that ended with an error", &|s| s.failed);
}

fn add(registry: &mut Registry, name: &str, help: &str, metric: impl Metric) {
    registry.register(name, help, metric);
}

fn labels(info: &VdiInfo) -> Labels {
    vec![("vdi", info.vdi.name.clone()), ("uuid", info.vdi.uuid.to_string())]
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

fn flag(on: bool) -> f64 {
    f64::from(u8::from(on))
}

/// Parses the address of the TCP port: loopback only, because whoever reaches it learns the disks' names.
///
/// # Errors
/// Words that name the text and what is allowed.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| {
        format!("'{text}' is not an address: write ADDRESS:PORT, like 127.0.0.1:9477")
    })?;
    if !address.ip().is_loopback() {
        return Err(format!(
            "'{text}' can be reached from other hosts: metrics are served on the loopback device only, \
             like 127.0.0.1:{}",
            address.port()
        ));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{
        AgentStatus, CacheStatus, FrozenGuest, Outlook, StoreSpace, StoreStatus, Totals, Vdi,
    };
    use uuid::Uuid;

    fn status() -> Status {
        let vdi = Vdi {
            name: "web \"1\"\\".into(),
            uuid: Uuid::nil(),
            size: 1 << 30,
            attached: true,
            socket: None,
            committed_lsn: 5,
            state: VdiState::Running,
            owner: None,
            schedule: None,
            snapshot: None,
            read_only: false,
            provisional_clone_of: None,
        };
        let info = VdiInfo {
            vdi,
            last_lsn: 7,
            flushed_lsn: 7,
            write_through: true,
            dirty_bytes: 4096,
            oldest_dirty_ms: Some(2500),
            snapshots_in_log: 0,
            last_error: None,
            front_end_connected: true,
            waiting: Default::default(),
            outlook: Outlook { runway_ms: None, drain_eta_ms: Some(1500), ..Default::default() },
            readiness: Default::default(),
            totals: Totals { reads: 3, ..Default::default() },
            drill_until: None,
            when_offline: "stall".into(),
            hydrate: None,
            pinned: false,
            schedule_trouble: Some("the log has no room".into()),
        };
        Status {
            agent: AgentStatus {
                pid: 1,
                version: "1.2.3".into(),
                uptime_ms: 1000,
                host_uuid: Uuid::nil(),
                host_name: "host-a".into(),
            },
            store: StoreStatus {
                url: "file:/x".into(),
                uuid: Uuid::nil(),
                reachable: false,
                down_since: Some(5000),
                since: 5000,
                last_error: None,
                waiting_for_space: 0,
                waiting_for_device_space: 2,
                single_host: false,
                capacity: 1 << 40,
                space: Some(StoreSpace {
                    capacity: 1000,
                    used: 920,
                    free: 80,
                    over_mark: Some(90),
                }),
            },
            cache: CacheStatus {
                paths: Vec::new(),
                uuid: Uuid::nil(),
                capacity: 100,
                segment_size: 10,
                segments: 10,
                dirty_bytes: 10,
                clean_bytes: 20,
                pinned_bytes: 0,
                free_bytes: 70,
                fill: 0.1,
                legs: [true, false].map(leg).to_vec(),
                quarantined: Vec::new(),
                replacement: Some(cache::Replacement {
                    id: 1,
                    path: "/new".into(),
                    state: ReplacementState::Copying,
                    bytes_done: 25,
                    bytes_all: 100,
                    why: None,
                }),
            },
            vdis: vec![info],
            snapshots: vec![AttachedSnapshot {
                name: "db@7".into(),
                vdi: "db".into(),
                uuid: Uuid::nil(),
                snapshot: 7,
                label: String::new(),
                time: 0,
                size: 4096,
                read_only: true,
                socket: None,
                state: VdiState::Running,
                last_error: None,
                front_end_connected: true,
                waiting_reads: 2,
                reads: 3,
                read_bytes: 512,
                flushes: 0,
                refused: 1,
                failed: 0,
            }],
            outlook: Outlook { runway_ms: Some(60_000), ..Default::default() },
            degraded: vec!["the store does not answer".into()],
            frozen_guests: vec![FrozenGuest {
                guest_agent: "/g".into(),
                since: 5000,
                why: "silent".into(),
            }],
            unmap: UnmapStatus {
                wanted: true,
                supported: Some(true),
                bytes: 1 << 30,
                failures: 2,
                ..UnmapStatus::default()
            },
            scrub: ScrubSummary {
                verified_bytes: 4096,
                damaged: 3,
                last_completed: Some(5000),
                ..ScrubSummary::default()
            },
        }
    }

    fn leg(member: bool) -> cache::LegState {
        cache::LegState { path: "/leg".into(), member, why: None }
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample() {
        let text = render(&status()).unwrap();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(name.starts_with("ballast_"), "{line}");
            assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
        }
        for expected in [
            "ballast_store_up 0.0",
            "ballast_store_capacity_bytes 1000.0",
            "ballast_store_used_bytes 920.0",
            "ballast_store_free_bytes 80.0",
            "ballast_store_watermark_percent 90.0",
            "ballast_store_waiting_for_device_space 2.0",
            "ballast_runway_seconds 60.0",
            "ballast_degraded 1.0",
            "ballast_unmap_supported 1.0",
            "ballast_unmapped_bytes_total 1073741824",
            "ballast_unmap_failures_total 2",
            "ballast_unmap_extents_left_out 0.0",
            "ballast_guests_frozen 1.0",
            "ballast_scrub_running 0.0",
            "ballast_scrub_verified_bytes 4096.0",
            "ballast_scrub_damaged 3.0",
            "ballast_scrub_completed_seconds 5.0",
            "ballast_cache_legs 2.0",
            "ballast_cache_legs_in_step 1.0",
            "ballast_cache_quarantined_bytes 0.0",
            "ballast_cache_replacement_bytes 100.0",
            "ballast_cache_replacement_done_bytes 25.0",
            "ballast_vdi_reads_total{vdi=\"web \\\"1\\\"\\\\\",uuid=\"00000000-0000-0000-0000-000000000000\"} 3",
            "ballast_vdi_schedule_trouble{vdi=\"web \\\"1\\\"\\\\\",uuid=\"00000000-0000-0000-0000-000000000000\"} 1.0",
            "ballast_vdi_drain_seconds{vdi=\"web \\\"1\\\"\\\\\",uuid=\"00000000-0000-0000-0000-000000000000\"} 1.5",
            "ballast_read_only_waiting_reads{vdi=\"db\",snapshot=\"7\",uuid=\"00000000-0000-0000-0000-000000000000\"} 2.0",
            "ballast_read_only_refused_total{vdi=\"db\",snapshot=\"7\",uuid=\"00000000-0000-0000-0000-000000000000\"} 1",
        ] {
            assert!(text.lines().any(|line| line == expected), "no '{expected}' in\n{text}");
        }
        assert!(!text.contains("ballast_vdi_runway_seconds{"), "what is unknown is left out");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn only_loopback_is_served() {
        assert!(parse_address("127.0.0.1:9477").is_ok());
        assert!(parse_address("[::1]:9477").is_ok());
        for text in ["0.0.0.0:9477", "[::]:1", "10.0.0.1:9477"] {
            assert!(parse_address(text).unwrap_err().contains("loopback"), "{text}");
        }
        assert!(parse_address("localhost").unwrap_err().contains("ADDRESS:PORT"));
    }
}
