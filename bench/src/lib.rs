//! A vhost-user-blk front end in user space, and what the load generator needs around it.
//!
//! * [`front_end`] is the guest's side of the wire: shared memory, a split virtqueue with event
//!   index, and the handshake. The whole-system tests drive it too, and [`agent`], which runs the
//!   `ballast` binary.
//! * [`process`] starts, pins and measures programs; [`server`] is what a comparison needs of one,
//!   [`ballast`] and [`peer`] are the two there are.
//! * [`load`] runs a workload against one server; [`compare`] alternates between two and knows the
//!   promised ratios; [`suite`] makes the files and runs the phases; [`fio`] measures the file system
//!   beneath as the limit.
//! * [`memory`], [`recovery`] and [`outage`] measure what else the agent promises; [`report`] prints.
//! * [`synthetic`] makes large stores with metadata alone, [`stage`] starts an agent on one. [`collecting`] and [`beside`] measure
//!   garbage collection there, [`depths`] and [`clones`] snapshots and clones by their number; [`snapping`] measures snapshots
//!   under load. [`collecting_report`], [`snapshots_report`] and [`plot`] print and draw; [`control`] is the agent's socket.
//!
//! The binary (`cargo run --release -p bench -- --help`) only parses arguments.

pub mod agent;
pub mod ballast;
pub mod beside;
pub mod clones;
pub mod collecting;
pub mod collecting_report;
pub mod compare;
pub mod control;
pub mod depths;
pub mod filling;
pub mod fio;
pub mod front_end;
pub mod load;
pub mod machine;
pub mod memory;
pub mod outage;
pub mod peer;
pub mod plot;
pub mod process;
pub mod recovery;
pub mod report;
pub mod san;
pub mod server;
pub mod snapping;
pub mod snapshots_report;
pub mod stage;
pub mod suite;
pub mod synthetic;
