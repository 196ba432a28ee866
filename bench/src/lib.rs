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
//!
//! The binary (`cargo run --release -p bench -- --help`) only parses arguments.

pub mod agent;
pub mod ballast;
pub mod compare;
pub mod filling;
pub mod fio;
pub mod front_end;
pub mod load;
pub mod machine;
pub mod memory;
pub mod outage;
pub mod peer;
pub mod process;
pub mod recovery;
pub mod report;
pub mod san;
pub mod server;
pub mod suite;
