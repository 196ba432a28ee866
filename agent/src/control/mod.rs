//! The control API: HTTP with JSON bodies over a UNIX socket of mode 0600.
//!
//! ```text
//! GET    /v1/status                 Status
//! GET    /v1/metrics                the status as text for Prometheus
//! GET    /v1/cache                  CacheStatus
//! POST   /v1/cache/drain            DrainRequest   → Drained
//! GET    /v1/cache/replace          Replacement: the last one
//! POST   /v1/cache/replace          ReplaceRequest → Replacement, as it begins
//! DELETE /v1/cache/replace          Replacement, given up
//! GET    /v1/vdis                   [Vdi]
//! POST   /v1/vdis                   CreateRequest  → Created
//! GET    /v1/vdis/NAME              VdiInfo
//! POST   /v1/vdis/NAME/delete       DeleteRequest  → Done
//! POST   /v1/vdis/NAME/snapshots           SnapRequest       → Snapped
//! GET    /v1/vdis/NAME/snapshots/stream    no HTTP from here on, see below
//! POST   /v1/vdis/NAME/snapshots/list      SnapListRequest   → Snapshots
//! POST   /v1/vdis/NAME/snapshots/label     SnapLabelRequest  → Snapped
//! POST   /v1/vdis/NAME/snapshots/delete    SnapDeleteRequest → SnapDeleted
//! POST   /v1/vdis/NAME/snapshots/rollback  RewindRequest     → Rewound
//! POST   /v1/snapshots              SnapSetRequest → SnapSet: of several disks, their guest frozen
//! GET    /v1/vdis/NAME/schedule     ScheduleStatus
//! POST   /v1/vdis/NAME/schedule     ScheduleRequest → ScheduleStatus
//! GET    /v1/gc                     GcStatus
//! POST   /v1/gc                     GcStatus, of the cycle that runs then
//! GET    /v1/scrub                  ScrubStatus
//! POST   /v1/scrub                  ScrubStatus, of the pass that runs then
//! DELETE /v1/scrub                  ScrubStatus, of the pass that was ended
//! POST   /v1/diff                   DiffRequest    → Diff, by the page
//! GET    /v1/tree                   Forest
//! POST   /v1/sizes                  SizesRequest   → SizesReport; given up when its caller goes away
//! POST   /v1/vdis/NAME/attach       AttachRequest  → Attached
//! POST   /v1/vdis/NAME/detach       DetachRequest  → Done
//! POST   /v1/vdis/NAME/resize       ResizeRequest  → Created
//! POST   /v1/vdis/NAME/drill        DrillRequest   → DrillBegun
//! DELETE /v1/vdis/NAME/drill        Done
//! ```
//!
//! NAME is a percent-escaped name or UUID; to attach or detach a snapshot, `VDI@LSN` or `VDI@LABEL`. A failure has a status of 400 and above and the body
//! `{"error": {"kind": …, "message": …}}`.
//!
//! A stream of snapshots is asked for with `Connection: Upgrade` and `Upgrade: ballast-snapshots`, and begins behind the answer's head (101):
//! each line to the agent is a SnapAsked, `{}` at the least, each line from it a SnapAnswered, in the order of LSNs. What is refused at once may
//! overtake others. Whoever does not read what is answered is cut off.

mod body;
pub mod client;
mod routes;
pub mod server;
mod stream;

/// What a connection becomes that asks for snapshots by the line.
pub const SNAPSHOT_STREAM: &str = "ballast-snapshots";

/// Longest request body.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
