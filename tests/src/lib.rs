//! Rigs for whole-system tests.
pub mod client;
pub mod demo;
pub mod guest;
