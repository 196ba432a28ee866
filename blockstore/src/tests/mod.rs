//! Tests of the store as a whole, on the simulated device.

mod basics;
mod crash;
mod diff;
mod faults;
mod full_device;
mod held;
mod hosts;
mod model;
mod registering;
mod registry;
mod rewind;
mod rollback;
mod rules;
mod space;
