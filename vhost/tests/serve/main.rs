//! The server as a front end sees it: real sockets, real shared memory, a real cache on a file.

mod data;
mod guest;
mod legs;
mod load;
mod migration;
mod offline;
mod read_only;
mod replay;
mod rig;
mod sessions;
mod snapshots;
