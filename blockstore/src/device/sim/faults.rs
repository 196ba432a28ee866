//! Which operation of a simulated device fails, and how: one-shot faults and seeded rates.

use super::OpKind;
use rand::Rng;
use rand::rngs::StdRng;

/// What happens to one operation instead of success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Fails with kind `Io`. A write may have been carried out in part, a compare-and-write not at
    /// all. After a failed flush some unflushed writes are silently no longer covered by later ones,
    /// and the epoch has risen.
    Io,
    /// Fails with kind `NoSpace`. A write may have been carried out in part.
    NoSpace,
    /// Fails with kind `Unreachable` before anything was done; the epoch rises.
    Unreachable,
    /// Fails with kind `Unreachable`; whether (and for a write, how much of) it was carried out is
    /// up to the seed. The epoch rises.
    Unknown,
    /// As [`Unknown`](Self::Unknown), but carried out in full.
    UnknownApplied,
    /// A write reports success and lands this many bytes further on (wrapping inside the device).
    /// Other operations ignore it.
    Misdirected(u64),
    /// A write reports success and is never carried out. Other operations ignore it.
    Lost,
    /// A read returns one flipped bit; the device's content stays intact. Others ignore it.
    Garbled,
}

/// Probabilities, per operation, of faults that come by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FaultRates {
    /// [`Fault::Io`] on reads.
    pub read_io: f64,
    /// [`Fault::Garbled`] on reads.
    pub read_garbled: f64,
    /// [`Fault::Io`] on writes.
    pub write_io: f64,
    /// [`Fault::NoSpace`] on writes.
    pub write_no_space: f64,
    /// [`Fault::Io`] on flushes.
    pub flush_io: f64,
    /// [`Fault::Unreachable`] on anything.
    pub unreachable: f64,
    /// [`Fault::Unknown`] on anything.
    pub unknown: f64,
}

/// The faults still to come in one session.
#[derive(Debug, Default)]
pub(super) struct FaultPlan {
    pub(super) rates: FaultRates,
    /// (kind, how many more of that kind pass before, fault)
    pub(super) once: Vec<(OpKind, u64, Fault)>,
}

impl FaultPlan {
    /// The fate of the next operation, which is of this kind.
    pub(super) fn next(&mut self, kind: OpKind, rng: &mut StdRng) -> Option<Fault> {
        let mut due = None;
        self.once.retain_mut(|(planned, skip, fault)| {
            if *planned != kind {
                return true;
            }
            if *skip == 0 && due.is_none() {
                due = Some(*fault);
                return false;
            }
            *skip = skip.saturating_sub(1);
            true
        });
        due.or_else(|| self.by_rate(kind, rng))
    }

    fn by_rate(&self, kind: OpKind, rng: &mut StdRng) -> Option<Fault> {
        let rates = &self.rates;
        let table: &[(f64, Fault)] = match kind {
            OpKind::Read => &[(rates.read_io, Fault::Io), (rates.read_garbled, Fault::Garbled)],
            OpKind::Write => &[(rates.write_io, Fault::Io), (rates.write_no_space, Fault::NoSpace)],
            OpKind::Flush => &[(rates.flush_io, Fault::Io)],
            OpKind::CompareAndWrite | OpKind::Discard => &[],
        };
        let common = [(rates.unreachable, Fault::Unreachable), (rates.unknown, Fault::Unknown)];
        let all = table.iter().chain(&common);
        all.filter(|(rate, _)| *rate > 0.0)
            .find(|(rate, _)| rng.random_bool(rate.min(1.0)))
            .map(|(_, fault)| *fault)
    }
}
