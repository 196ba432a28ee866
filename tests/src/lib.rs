//! Rigs for whole-system tests.
pub mod agent_rig;
pub mod client;
pub mod demo;
pub mod guest;
pub mod netns;
pub mod single;
pub mod targets;
pub mod tracked;
