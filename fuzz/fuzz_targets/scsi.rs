//! What an iSCSI target answers, as bytes: sense data, capacity, vital product data, reservations.

#![no_main]

use blockstore::device::iscsi::fuzzing::parse_answers;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| parse_answers(input));
