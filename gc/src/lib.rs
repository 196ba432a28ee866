//! Reachability over the blockstore: mark and check.
