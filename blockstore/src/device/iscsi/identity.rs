//! Who this host is to a target: initiator name, ISID and reservation key; and the guard that keeps
//! two processes of one host from logging in under one identity, which would throw each other out.
//!
//! The identity survives restarts of the process on purpose: the login of a restarted agent then
//! reinstates the session of the killed one and drops what that one left in flight.

use std::hash::Hasher;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{SystemTime, UNIX_EPOCH};

/// Naming authority of default initiator names.
const AUTHORITY: &str = "iqn.2026-01.org.ballast";

/// Name, ISID and key of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// iSCSI name of the initiator.
    pub initiator: String,
    /// 24 and 16 bits of the ISID.
    pub isid: (u32, u16),
    /// Persistent reservation key; never 0.
    pub key: u64,
}

impl Identity {
    /// The lasting identity of `initiator` at one LUN of one target.
    pub fn lasting(initiator: &str, target: &str, lun: u16) -> Self {
        let isid = hash(&[b"isid", initiator.as_bytes(), target.as_bytes(), &lun.to_be_bytes()]);
        Self::with_isid(initiator, isid)
    }

    /// An identity of its own for one session that never writes, so that it disturbs no other.
    pub fn passing(initiator: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mut random = [0; 8];
        if getrandom::fill(&mut random).is_err() {
            random.copy_from_slice(&(now as u64).to_be_bytes());
        }
        Self::with_isid(initiator, hash(&[b"passing", initiator.as_bytes(), &random]))
    }

    fn with_isid(initiator: &str, isid: u64) -> Self {
        let key = hash(&[b"reservation", initiator.as_bytes()]).max(1);
        let isid = ((isid & 0x00ff_ffff) as u32, (isid >> 32) as u16);
        Self { initiator: initiator.to_owned(), isid, key }
    }

    /// Claims the identity for this process until the guard is dropped. `None`: another has it.
    pub fn claim(&self, target: &str) -> std::io::Result<Option<Claim>> {
        let isid = [self.isid.0.to_be_bytes().as_slice(), &self.isid.1.to_be_bytes()].concat();
        let name = hash(&[b"claim", self.initiator.as_bytes(), target.as_bytes(), &isid]);
        let address = SocketAddr::from_abstract_name(format!("ballast-iscsi-{name:016x}"))?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Some(Claim(listener))),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Holds an identity; the kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held, never used")] UnixListener);

/// The initiator name of this host: from its machine id and host name, so that it lasts, and differs
/// between machines copied from one image but named apart.
pub fn default_initiator() -> String {
    let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
    let name = std::fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
    let hash = hash(&[b"host", machine.trim_ascii(), name.trim_ascii()]);
    format!("{AUTHORITY}:host-{hash:016x}")
}

/// FNV-1a over the parts, each with its length. Stable for ever: reservations and sessions that
/// outlive this process are found by it.
fn hash(parts: &[&[u8]]) -> u64 {
    struct Fnv(u64);
    impl Hasher for Fnv {
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        fn finish(&self) -> u64 {
            // Final mixing, for FNV's high bits hardly depend on the last bytes.
            let mixed = (self.0 ^ (self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
            mixed ^ (mixed >> 32)
        }
    }
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    for part in parts {
        hasher.write(&(part.len() as u64).to_be_bytes());
        hasher.write(part);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_last_and_differ_by_host_and_lun() {
        let one = Identity::lasting("iqn.a:1", "iqn.t:1", 0);
        assert_eq!(one, Identity::lasting("iqn.a:1", "iqn.t:1", 0));
        assert_ne!(one.isid, Identity::lasting("iqn.a:1", "iqn.t:1", 1).isid);
        assert_ne!(one.isid, Identity::lasting("iqn.a:1", "iqn.t:2", 0).isid);
        assert_ne!(one.key, Identity::lasting("iqn.a:2", "iqn.t:1", 0).key);
        assert_ne!(Identity::passing("iqn.a:1").isid, Identity::passing("iqn.a:1").isid);
        // Golden: an upgrade must find its own sessions and reservations again.
        assert_eq!((one.isid, one.key), GOLDEN);
    }

    const GOLDEN: ((u32, u16), u64) = ((14_407_540, 54_140), 14_814_605_073_506_260_614);

    #[test]
    fn an_identity_is_claimed_once_at_a_time() {
        let name = format!("iqn.a:claim-{}", std::process::id());
        let identity = Identity::lasting(&name, "iqn.t", 0);
        let claim = identity.claim("iqn.t").expect("a socket").expect("the first claim");
        assert!(identity.claim("iqn.t").expect("a socket").is_none());
        drop(claim);
        assert!(identity.claim("iqn.t").expect("a socket").is_some());
    }

    #[test]
    fn the_default_initiator_is_a_lasting_iscsi_name() {
        assert!(default_initiator().starts_with("iqn."));
        assert_eq!(default_initiator(), default_initiator());
    }
}
