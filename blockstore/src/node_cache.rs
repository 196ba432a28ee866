//! Bounded cache of tree nodes, keyed by the whole pointer: a block is immutable under one pointer,
//! so an entry is never stale. CLOCK eviction per shard; concurrent misses of a node are coalesced.

use crate::format::node::Node;
use crate::format::pointer::Pointer;
use hashbrown::HashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::Semaphore;

const SHARDS: usize = 16;
/// Bytes that a cached node costs: the block, its keys and its bookkeeping.
const NODE_COST: usize = 4096 + 128;
/// Nodes per shard that are kept however small the budget is.
const SHARD_NODES_MIN: usize = 4;

/// Nodes in memory.
#[derive(Debug)]
pub struct NodeCache {
    shards: Vec<Mutex<Shard>>,
    shard_nodes_max: usize,
}

#[derive(Debug, Default)]
struct Shard {
    places: HashMap<u128, usize>,
    ring: Vec<Place>,
    hand: usize,
    /// Nodes being loaded; the semaphore is closed when that has ended, well or not.
    loading: HashMap<u128, Arc<Semaphore>>,
}

#[derive(Debug)]
struct Place {
    key: u128,
    node: Arc<Node>,
    referenced: bool,
}

/// How a lookup came out.
#[derive(Debug)]
pub enum Lookup {
    /// In memory.
    Hit(Arc<Node>),
    /// The caller must load it; others wait until the guard is dropped.
    Load(LoadGuard),
    /// Someone else loads it; look again when the semaphore is closed.
    Wait(Arc<Semaphore>),
}

/// The duty to load a node.
#[derive(Debug)]
pub struct LoadGuard {
    cache: Arc<NodeCache>,
    key: u128,
    done: Arc<Semaphore>,
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.cache.shard(self.key).lock().loading.remove(&self.key);
        self.done.close();
    }
}

impl NodeCache {
    /// A cache of about `budget` bytes.
    #[must_use]
    pub fn new(budget: usize) -> Arc<Self> {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let shard_nodes_max = (budget / NODE_COST / SHARDS).max(SHARD_NODES_MIN);
        Arc::new(Self { shards, shard_nodes_max })
    }

    /// Looks a node up.
    #[must_use]
    pub fn lookup(self: &Arc<Self>, pointer: Pointer) -> Lookup {
        let key = pointer.bits();
        let mut shard = self.shard(key).lock();
        if let Some(node) = shard.get(key) {
            return Lookup::Hit(node);
        }
        if let Some(done) = shard.loading.get(&key) {
            return Lookup::Wait(Arc::clone(done));
        }
        let done = Arc::new(Semaphore::new(0));
        shard.loading.insert(key, Arc::clone(&done));
        Lookup::Load(LoadGuard { cache: Arc::clone(self), key, done })
    }

    /// Takes a node in.
    pub fn insert(&self, pointer: Pointer, node: Arc<Node>) {
        let key = pointer.bits();
        self.shard(key).lock().insert(key, node, self.shard_nodes_max);
    }

    /// Nodes held now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().ring.len()).sum()
    }

    /// True if no node is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u128) -> &Mutex<Shard> {
        // The CRC in the upper bits spreads well; the address separates siblings.
        let mixed = (key >> 96) as u64 ^ (key as u64);
        &self.shards[mixed as usize % SHARDS]
    }
}

impl Shard {
    fn get(&mut self, key: u128) -> Option<Arc<Node>> {
        let place = &mut self.ring[*self.places.get(&key)?];
        place.referenced = true;
        Some(Arc::clone(&place.node))
    }

    fn insert(&mut self, key: u128, node: Arc<Node>, max: usize) {
        if self.places.contains_key(&key) {
            return;
        }
        let place = Place { key, node, referenced: false };
        if self.ring.len() < max {
            self.places.insert(key, self.ring.len());
            self.ring.push(place);
            return;
        }
        while std::mem::take(&mut self.ring[self.hand].referenced) {
            self.hand = (self.hand + 1) % self.ring.len();
        }
        self.places.remove(&self.ring[self.hand].key);
        self.places.insert(key, self.hand);
        self.ring[self.hand] = place;
        self.hand = (self.hand + 1) % self.ring.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Birth, Gba};

    fn pointer(n: u64) -> Pointer {
        Pointer { gba: Gba(n + 1), read_only: false, birth: Birth(1), crc: n as u32 * 7 }
    }

    #[test]
    fn stays_within_its_budget_and_keeps_what_is_used() {
        let cache = NodeCache::new(64 * NODE_COST);
        let hot = pointer(0);
        cache.insert(hot, Arc::new(Node::empty()));
        for n in 1..10_000 {
            cache.insert(pointer(n), Arc::new(Node::empty()));
            assert!(matches!(cache.lookup(hot), Lookup::Hit(_)));
        }
        assert!(cache.len() <= 64);
    }

    #[tokio::test]
    async fn a_second_miss_waits_for_the_first_even_if_that_fails() {
        let cache = NodeCache::new(1 << 20);
        let Lookup::Load(guard) = cache.lookup(pointer(1)) else { panic!("first miss loads") };
        let Lookup::Wait(done) = cache.lookup(pointer(1)) else { panic!("second miss waits") };
        drop(guard);
        assert!(done.acquire().await.is_err());
        assert!(matches!(cache.lookup(pointer(1)), Lookup::Load(_)));
    }
}
