//! Rigs for whole-system tests.
pub mod guest;
