//! Names of virtual disks, and the socket files they are served on.
//!
//! A name is what an operator types; a socket's file name is derived from it and must be unique, stay inside the run
//! directory and fit into `sun_path`. The mapping is injective: characters outside `A-Za-z0-9._-` are percent-escaped,
//! and a path that would be too long uses the disk's UUID, which no name may look like.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Longest name, in bytes of UTF-8.
pub const NAME_LEN_MAX: usize = 255;

/// Longest path of a UNIX socket: `sun_path` less its terminating zero.
pub const SOCKET_PATH_LEN_MAX: usize = 107;

/// File name of the control socket in the run directory.
pub const CONTROL_SOCKET: &str = "control.sock";

/// Checks a new disk's name.
///
/// # Errors
/// Words that name the name, what is wrong with it and what is allowed.
pub fn check_vdi_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("the name of a disk must not be empty".into());
    }
    if name.len() > NAME_LEN_MAX {
        let start: String = name.chars().take(24).collect();
        return Err(format!(
            "the name '{}…' is {} bytes long: use at most {NAME_LEN_MAX}",
            start.escape_debug(),
            name.len()
        ));
    }
    let problem = if name.contains(['/', '@', '\\']) {
        "contains '/', '\\' or '@', which are reserved"
    } else if name.chars().any(char::is_control) {
        "contains a control character"
    } else if name.starts_with(['.', '-']) {
        "starts with '.' or '-'"
    } else if name.trim() != name {
        "starts or ends with a space"
    } else if Uuid::try_parse(name).is_ok() {
        "looks like a UUID, which would be ambiguous"
    } else {
        return Ok(());
    };
    Err(format!(
        "the name '{}' {problem}: choose another, such as letters, digits, '.', '_' and '-'",
        name.escape_debug()
    ))
}

/// Percent-escapes everything but `A-Za-z0-9._-`: safe as a file name and as a segment of a request's path.
#[must_use]
pub fn percent_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => out.push(byte as char),
            _ => write!(out, "%{byte:02X}").expect("writing to a String cannot fail"),
        }
    }
    out
}

/// Path of the socket that the disk is served on.
///
/// # Errors
/// The run directory's own path is too long for any socket.
pub fn socket_path(run_dir: &Path, name: &str, uuid: Uuid) -> Result<PathBuf, String> {
    let mut file = format!("{}.sock", percent_escape(name));
    if file == CONTROL_SOCKET {
        file.replace_range(..1, &format!("%{:02X}", file.as_bytes()[0]));
    }
    first_that_fits(run_dir, [file, format!("{uuid}.sock")])
}

/// Path of the socket that a snapshot of the disk is served on. No disk has it: in their sockets' names an '@' is escaped.
///
/// # Errors
/// As [`socket_path`].
pub fn snapshot_socket_path(
    run_dir: &Path,
    name: &str,
    uuid: Uuid,
    lsn: u64,
) -> Result<PathBuf, String> {
    let file = format!("{}@{lsn}.sock", percent_escape(name));
    first_that_fits(run_dir, [file, format!("{uuid}@{lsn}.sock")])
}

fn first_that_fits(run_dir: &Path, files: [String; 2]) -> Result<PathBuf, String> {
    let mut paths = files.into_iter().map(|file| run_dir.join(file));
    paths.find(|path| path.as_os_str().len() <= SOCKET_PATH_LEN_MAX).ok_or_else(|| {
        format!(
            "the run directory {} has too long a path: sockets' paths may have {SOCKET_PATH_LEN_MAX} bytes; \
             use a shorter --run-dir",
            run_dir.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const UUID: Uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);

    fn socket(name: &str) -> PathBuf {
        socket_path(Path::new("/run/ballast"), name, UUID).unwrap()
    }

    #[test]
    fn good_names_pass() {
        for name in ["db", "web-01.example", "Jörgs Platte", "a", "100%", &"x".repeat(255)] {
            assert_eq!(check_vdi_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn bad_names_are_refused_and_named() {
        let all = ["a/b", "../x", "..", ".hidden", "-rf", "a@b", "a\nb", "a\0b", " a", "a\\b"];
        for name in all {
            let shown = name.escape_debug().to_string();
            assert!(check_vdi_name(name).unwrap_err().contains(&shown), "{name:?}");
        }
        assert!(check_vdi_name("").unwrap_err().contains("empty"));
        assert!(check_vdi_name(&UUID.to_string()).unwrap_err().contains("UUID"));
        let long = check_vdi_name(&"x".repeat(300)).unwrap_err();
        assert!(long.contains("300 bytes") && long.len() < 120, "{long}");
    }

    #[test]
    fn plain_names_keep_their_file_name() {
        assert_eq!(socket("db_1.x"), Path::new("/run/ballast/db_1.x.sock"));
        assert_eq!(socket("a b/ü"), Path::new("/run/ballast/a%20b%2F%C3%BC.sock"));
    }

    #[test]
    fn a_disk_cannot_take_the_control_socket() {
        assert_eq!(socket("control"), Path::new("/run/ballast/%63ontrol.sock"));
        assert_ne!(socket("%63ontrol"), socket("control"));
    }

    #[test]
    fn snapshots_have_sockets_of_their_own() {
        let of =
            |name: &str| snapshot_socket_path(Path::new("/run/ballast"), name, UUID, 7).unwrap();
        assert_eq!(of("db"), Path::new("/run/ballast/db@7.sock"));
        assert_eq!(of(&"n".repeat(255)), PathBuf::from(format!("/run/ballast/{UUID}@7.sock")));
        assert_ne!(of("db"), socket("db@7"));
    }

    #[test]
    fn long_paths_fall_back_to_the_uuid_and_then_to_words() {
        let long = "n".repeat(NAME_LEN_MAX);
        assert_eq!(socket(&long), PathBuf::from(format!("/run/ballast/{UUID}.sock")));
        let deep = PathBuf::from(format!("/{}", "d".repeat(100)));
        let error = socket_path(&deep, "a-rather-long-name", UUID).unwrap_err();
        assert!(error.contains("--run-dir") && error.contains("ddd"), "{error}");
    }

    proptest! {
        #[test]
        fn sockets_are_inside_the_run_dir_and_distinct(
            names in proptest::collection::hash_set(".{1,60}", 1..20),
        ) {
            let names: HashSet<_> =
                names.into_iter().filter(|name| check_vdi_name(name).is_ok()).collect();
            let mut seen = HashSet::new();
            for (i, name) in names.iter().enumerate() {
                let path = socket_path(Path::new("/run/b"), name, Uuid::from_u128(i as u128)).unwrap();
                prop_assert_eq!(path.parent(), Some(Path::new("/run/b")));
                prop_assert!(path.as_os_str().len() <= SOCKET_PATH_LEN_MAX);
                prop_assert_ne!(path.file_name().unwrap(), CONTROL_SOCKET);
                prop_assert!(seen.insert(path));
            }
        }
    }
}
