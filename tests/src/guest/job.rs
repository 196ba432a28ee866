//! The job's way into the guest: a cpio archive (format "newc") appended to the initramfs.
//!
//! Linux unpacks archives that follow each other, each padded to 4 bytes, into the same root: later
//! files come on top.

/// An archive of regular files, owned by root and executable, with these absolute paths in the
/// guest. Parent folders must exist in the initramfs (`/` and `/tmp` do).
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (path, content)) in files.iter().enumerate() {
        entry(&mut bytes, number as u32 + 1, 0o100_755, path.trim_start_matches('/'), content);
    }
    entry(&mut bytes, 0, 0, "TRAILER!!!", &[]);
    bytes
}

/// `base` followed by `archive`, aligned as the kernel wants it.
pub fn append(mut base: Vec<u8>, archive: &[u8]) -> Vec<u8> {
    pad(&mut base);
    base.extend_from_slice(archive);
    base
}

fn entry(bytes: &mut Vec<u8>, inode: u32, mode: u32, name: &str, content: &[u8]) {
    let links = 1;
    let fields = [
        inode,
        mode,
        0, // uid
        0, // gid
        links,
        0, // mtime
        content.len() as u32,
        0, // device, major
        0, // device, minor
        0, // special file, major
        0, // special file, minor
        name.len() as u32 + 1,
        0, // checksum: unused in this format
    ];
    bytes.extend_from_slice(b"070701");
    for field in fields {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(content);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// cpio itself is the judge: it must list and unpack what we archived.
    #[test]
    fn cpio_unpacks_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let archive = archive(&[("/job", b"echo hello\n"), ("/promises", b""), ("/odd", b"12345")]);
        let mut cpio = Command::new("cpio")
            .args(["-i", "--quiet"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio");
        cpio.stdin.take().expect("stdin").write_all(&archive).expect("write");
        assert!(cpio.wait().expect("cpio").success());
        let read = |name: &str| std::fs::read(folder.path().join(name)).expect(name);
        assert_eq!(read("job"), b"echo hello\n");
        assert_eq!(read("promises"), b"");
        assert_eq!(read("odd"), b"12345");
    }

    #[test]
    fn an_appended_archive_is_aligned() {
        let all = append(vec![1; 5], &archive(&[]));
        assert_eq!(&all[5..8], &[0, 0, 0]);
        assert_eq!(&all[8..14], b"070701");
    }
}
