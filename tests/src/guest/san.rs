//! What a store lies on: a file, or an iSCSI LUN served on loopback, behind a relay that can cut it off.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::targets::{IstgtTarget, TcpRelay};

/// The choice; the demo takes it from the environment variable `SAN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum San {
    /// A file.
    File,
    /// An iSCSI LUN.
    Iscsi,
}

impl FromStr for San {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<San> {
        match text {
            "" | "file" => Ok(San::File),
            "iscsi" => Ok(San::Iscsi),
            other => bail!("SAN={other}: known are SAN=file and SAN=iscsi"),
        }
    }
}

/// A place for a store. Dropping it ends the iSCSI target and its relay, if there are.
#[derive(Debug)]
pub struct StorePlace {
    /// What `--store` takes.
    pub url: String,
    /// Size to format it with.
    pub bytes: u64,
    /// Environment that its secrets are passed in.
    pub environment: Vec<(String, String)>,
    /// For people.
    pub what: String,
    relay: Option<TcpRelay>,
    _target: Option<IstgtTarget>,
}

impl StorePlace {
    /// Makes one of `bytes` in `folder`.
    pub fn make(san: San, folder: &Path, bytes: u64) -> Result<StorePlace> {
        match san {
            San::File => Ok(StorePlace {
                url: format!("file:{}", folder.join("store.img").display()),
                bytes,
                environment: Vec::new(),
                what: "a file".into(),
                relay: None,
                _target: None,
            }),
            San::Iscsi => {
                let target = IstgtTarget::start(folder, bytes)?;
                let relay = TcpRelay::start(target.address())?;
                Ok(StorePlace {
                    url: target.url_through(relay.address()),
                    bytes,
                    environment: Vec::new(),
                    what: "an iSCSI LUN".into(),
                    relay: Some(relay),
                    _target: Some(target),
                })
            }
        }
    }
}

impl StorePlace {
    /// Cuts the store off: nothing is answered any more, and nobody says so. False: a file cannot be cut off.
    pub fn cut(&self) -> bool {
        let Some(relay) = &self.relay else { return false };
        relay.refuse(true);
        relay.black_hole();
        true
    }

    /// The store can be reached again, over new connections.
    pub fn restore(&self) {
        if let Some(relay) = &self.relay {
            relay.refuse(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_san_is_refused_by_name() {
        assert_eq!("".parse::<San>().expect("default"), San::File);
        assert_eq!("iscsi".parse::<San>().expect("iscsi"), San::Iscsi);
        assert!("fc".parse::<San>().expect_err("unknown").to_string().contains("fc"));
    }
}
