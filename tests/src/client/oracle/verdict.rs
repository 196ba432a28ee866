//! Puts a name to a value that is not legal.

use std::fmt;

use super::Oracle;
use crate::client::stamp::{Found, Sequence};

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An older value: the write that replaced it, which had to be there, is missing.
    Lost,
    /// A value of before the disk's known history: stale.
    Stale,
    /// A value that a crash had taken away came back.
    Resurrected,
    /// Parts of two values in one sector.
    Torn,
    /// Data of another place.
    Misdirected,
    /// Data of another disk or run.
    Foreign,
    /// Bytes nobody wrote.
    Garbage,
    /// A write that was never sent, or not to this place.
    Impossible,
    /// Every sector is legal alone, but no single point in time explains them together.
    NoPrefix,
    /// A completion came before an earlier request's.
    OutOfOrder,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Where (0 for findings about requests).
    pub sector: u64,
    /// What.
    pub kind: Kind,
    /// In words.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at sector {}: {}", self.kind, self.sector, self.detail)
    }
}

impl std::error::Error for Violation {}

impl Violation {
    /// A completion out of order.
    pub(super) fn order(early: &str, late: &str) -> Self {
        Self {
            sector: 0,
            kind: Kind::OutOfOrder,
            detail: format!("{early} completed before {late}"),
        }
    }
}

impl Oracle {
    /// Names what is wrong with `found` at `sector`, where request `floor` or a later one had to show.
    pub(super) fn judge(&self, sector: u64, found: Found, floor: Sequence) -> Violation {
        let expected: Vec<String> = self.sectors[sector as usize]
            .values_from(floor)
            .map(|value| {
                let zero = if value.zero { "zeros of " } else { "" };
                match value.sequence {
                    0 => "the disk's first zeros".to_owned(),
                    sequence => format!("{zero}{}", self.describe(sequence)),
                }
            })
            .collect();
        let kind = self.kind_of(sector, found, floor);
        let what = match found {
            Found::Stamp(sequence) => self.describe(sequence),
            other => format!("{other:?}"),
        };
        let detail = format!("found {what}; legal: {}", expected.join(", or "));
        Violation { sector, kind, detail }
    }

    fn kind_of(&self, sector: u64, found: Found, floor: Sequence) -> Kind {
        match found {
            Found::Torn { .. } => Kind::Torn,
            Found::Misdirected { .. } => Kind::Misdirected,
            Found::Foreign { .. } => Kind::Foreign,
            Found::Garbage => Kind::Garbage,
            Found::Zero => Kind::Lost,
            Found::Stamp(sequence) => {
                let known = sequence.checked_sub(1).and_then(|at| self.requests.get(at as usize));
                let history = &self.sectors[sector as usize];
                match known {
                    None => Kind::Impossible,
                    Some(request) if !request.sectors.contains(&sector) => Kind::Impossible,
                    Some(request) if request.dead => Kind::Resurrected,
                    Some(_) if history.values().any(|value| value.matches(found)) => Kind::Lost,
                    Some(_) if sequence < floor => Kind::Stale,
                    Some(_) => Kind::Impossible,
                }
            }
        }
    }
}
