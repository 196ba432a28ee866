//! The state machine of one attached virtual disk. (Contract for the driver in `vhost`.)

pub mod plan;
