//! Rigs for whole-system tests.
pub mod demo;
pub mod guest;
