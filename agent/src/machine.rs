//! Which machine this is: so that a cache that was moved here is not taken for this host's own.
//!
//! Told by the system's machine id, of which only a digest leaves this file, as `machine-id(5)` asks. A machine without one,
//! or with one that is not settled yet, is told from no other.

use crate::error::{Failure, Kind, Result};
use cache::local::Machine;
use std::io::ErrorKind;
use std::path::Path;
use uuid::Uuid;

/// Where systems keep their id.
pub const MACHINE_ID_FILE: &str = "/etc/machine-id";

/// The digest's name space: ids of other programs do not match.
const BALLAST: Uuid = Uuid::from_u128(0x8a40_3a1c_6f0e_4d0b_9c55_27e1_b0d2_74f6);

/// This machine, by the id in `file`; none if there is no such file, or it holds no id yet.
///
/// # Errors
/// The file cannot be read: then nothing tells whether a cache is this machine's.
pub fn this_machine(file: &Path) -> Result<Option<Machine>> {
    let id = match std::fs::read_to_string(file) {
        Ok(id) => id,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let words = format!(
                "cannot read this machine's id in {}: {error}; make it readable, or name another file with --machine-id-file",
                file.display()
            );
            return Err(Failure::new(Kind::Failed, words));
        }
    };
    let id = id.trim();
    let settled = !id.is_empty() && id != "uninitialized";
    Ok(settled.then(|| Machine { id: Uuid::new_v5(&BALLAST, id.as_bytes()), name: host_name() }))
}

/// The host's name, for people.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname()
        .map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_told_by_its_id_and_by_nothing_if_it_has_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let with = |id: &str| {
            std::fs::write(file.path(), id).unwrap();
            this_machine(file.path()).unwrap().map(|machine| machine.id)
        };
        let (a, b) = (with("0123456789abcdef0123456789abcdef\n"), with("fedc\n"));
        assert!(a.is_some() && b.is_some() && a != b);
        assert_eq!(with("0123456789abcdef0123456789abcdef"), a, "the line's end is no part of it");
        assert_eq!((with(""), with("uninitialized\n")), (None, None));
        assert_eq!(
            this_machine(&file.path().join("absent")).map_err(|e| e.kind),
            Err(Kind::Failed)
        );
        assert_eq!(this_machine(Path::new("/nowhere/machine-id")).unwrap(), None);
    }
}
