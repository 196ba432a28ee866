//! What guests do to prove durability: write files, fsync them, tell the host their checksums;
//! later, check them.
//!
//! A file becomes a [`Promises`] entry when its `fsync` has returned in the guest and the host has
//! read so: from then on no crash may lose it. A file that is about to be overwritten is withdrawn
//! first, since its content is open until the next `fsync`. What was never promised may be there or
//! not, but the file system has to be sound either way.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use super::run::Guest;

/// The checksums that a guest's files must have, as far as they were fsynced.
#[derive(Clone, Debug, Default)]
pub struct Promises {
    files: BTreeMap<String, (String, u64)>,
    /// Bytes whose `fsync` returned, overwritten ones included.
    pub bytes_synced: u64,
    /// How often an `fsync` returned.
    pub syncs: u64,
}

impl Promises {
    /// Takes over the results that a writer's guest reported, in order.
    pub fn record(&mut self, results: &[(String, String)]) -> Result<()> {
        for (key, value) in results {
            match key.as_str() {
                "withdraw" => {
                    self.files.remove(value);
                }
                "synced" => {
                    let parse = || {
                        let mut words = value.split(' ');
                        let (name, sum) = (words.next()?, words.next()?);
                        Some((name, sum, words.next()?.parse::<u64>().ok()?))
                    };
                    let (name, sum, bytes) = parse()
                        .ok_or_else(|| anyhow!("odd result from a guest: synced={value}"))?;
                    self.files.insert(name.to_owned(), (sum.to_owned(), bytes));
                    self.bytes_synced += bytes;
                    self.syncs += 1;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// How many files must be there.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// True when nothing was promised.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Bytes of the files that must be there.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|(_, bytes)| bytes).sum()
    }

    /// The list that `sha256sum -c` checks.
    pub fn checklist(&self) -> String {
        self.files.iter().map(|(name, (sum, _))| format!("{sum}  /mnt/{name}\n")).collect()
    }
}

/// A job that writes files on disk 0 until it has written them all.
#[derive(Clone, Debug)]
pub struct Writer {
    /// Make a new file system first.
    pub format: bool,
    /// Prefix of file names; each writer of one disk needs its own.
    pub prefix: String,
    /// Files to write. Every third write goes over the file before it, in place.
    pub files: u32,
    /// Size of a file in KiB.
    pub file_kib: u32,
}

impl Writer {
    /// The job. Reports `write-cache`, `mounted`, then per file `withdraw` and `synced`, at the end
    /// `written`.
    pub fn job(&self) -> String {
        let Writer { format, prefix, files, file_kib } = self;
        format!(
            r#"
            disk=$(disk 0)
            result write-cache "$(cat /sys/block/${{disk##*/}}/queue/write_cache)"
            [ {format} = false ] || mkfs.ext4 -q "$disk"
            mount -t ext4 "$disk" /mnt
            result mounted "$disk"
            n=0
            while [ $n -lt {files} ]; do
                name={prefix}$n
                [ $((n % 3)) -ne 2 ] || name={prefix}$((n - 1))
                dd if=/dev/urandom of=/tmp/data bs=64k count=$(({file_kib} / 64)) 2>/dev/null
                sum=$(sha256sum </tmp/data)
                result withdraw $name
                dd if=/tmp/data of=/mnt/$name bs=64k conv=notrunc,fsync 2>/dev/null
                result synced "$name ${{sum%% *}} $(stat -c %s /tmp/data)"
                n=$((n + 1))
            done
            umount /mnt
            result written $n
            "#
        )
    }
}

/// A job that makes a file system on disk 0 and writes, fsyncs and reads back 40 files of `file_kib` KiB over and over
/// until the rig says `stop`, with a pause after each; then it looks for errors and checks the file system. Reports as
/// [`Writer`] does.
pub fn endless_writer(file_kib: u32, pause: Duration) -> String {
    let (count, pause) = (file_kib / 64, pause.as_secs_f32());
    format!(
        r#"
        disk=$(disk 0)
        result write-cache "$(cat /sys/block/${{disk##*/}}/queue/write_cache)"
        mkfs.ext4 -q "$disk"
        mount -t ext4 "$disk" /mnt
        result mounted "$disk"
        exec 3<&0
        (await stop <&3; touch /tmp/stop) &
        n=0
        while [ ! -e /tmp/stop ]; do
            name=file$((n % 40))
            dd if=/dev/urandom of=/tmp/data bs=64k count={count} 2>/dev/null
            sum=$(sha256sum </tmp/data)
            result withdraw $name
            dd if=/tmp/data of=/mnt/$name bs=64k conv=notrunc,fsync 2>/dev/null
            result synced "$name ${{sum%% *}} $(stat -c %s /tmp/data)"
            [ "$sum" = "$(sha256sum </mnt/$name)" ] || exit 14
            n=$((n + 1))
            sleep {pause:.3}
        done
        umount /mnt
        e2fsck -fn "$disk" >/tmp/fsck 2>&1 || {{ cat /tmp/fsck; exit 12; }}
        if dmesg | grep -E 'EXT4-fs error|I/O error|blocked for more'; then exit 13; fi
        result written $n
        "#
    )
}

/// Waits until the guest of a [`Writer`] is served again after its agent was killed and started.
/// Call [`Guest::skip_reported`] while the agent is dead. One more `fsync` may have returned before
/// the kill and be reported late: only the second one counts.
/// Errors: none comes within `patience`.
pub fn await_service(guest: &mut Guest, patience: Duration) -> Result<()> {
    for _ in 0..2 {
        if guest.wait_for_at_most("synced", patience)?.is_none() {
            let seconds = patience.as_secs();
            bail!("the guest was not served again within {seconds} s after the agent was back");
        }
    }
    Ok(())
}

/// A job that mounts disk 0 (which lets ext4 replay its journal), checks every promise in the
/// guest's file `/promises`, and then the whole file system. Runs before `then`, which finds the
/// disk not mounted.
pub fn verifier(then: &str) -> String {
    format!(
        r#"
        mount -t ext4 "$(disk 0)" /mnt
        if ! sha256sum -c /promises >/tmp/sums 2>&1; then grep -v ': OK$' /tmp/sums; ls -l /mnt; exit 11; fi
        result verified "$(grep -c ': OK$' /tmp/sums)"
        umount /mnt
        e2fsck -fn "$(disk 0)" >/tmp/fsck 2>&1 || {{ cat /tmp/fsck; exit 12; }}
        if dmesg | grep -E 'EXT4-fs error|I/O error'; then exit 13; fi
        result fsck clean
        {then}
        "#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        lines.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_promise_stands_from_sync_until_it_is_withdrawn() {
        let mut promises = Promises::default();
        promises
            .record(&results(&[
                ("withdraw", "a"),
                ("synced", "a 11 5"),
                ("synced", "b 22 7"),
                ("withdraw", "a"),
                ("exit", "0"),
            ]))
            .expect("record");
        assert_eq!(promises.checklist(), "22  /mnt/b\n");
        promises.record(&results(&[("synced", "a 33 5")])).expect("record");
        assert_eq!(promises.checklist(), "33  /mnt/a\n22  /mnt/b\n");
        assert_eq!((promises.bytes_synced, promises.bytes(), promises.syncs), (17, 12, 3));
    }

    #[test]
    fn an_odd_result_is_an_error() {
        assert!(Promises::default().record(&results(&[("synced", "a 11")])).is_err());
        assert!(Promises::default().record(&results(&[("synced", "a 11 many")])).is_err());
    }
}
