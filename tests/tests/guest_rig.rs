//! The guest rig on a back end that is known to work: qemu-storage-daemon on a raw file.
//!
//! When these fail, look at the rig, not at Ballast.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tests::guest::{Guest, GuestOptions, OwnedProcess};

/// Serves a new raw file of 256 MiB and returns when its socket listens.
fn storage_daemon(folder: &Path) -> OwnedProcess {
    let (image, socket) = (folder.join("disk.raw"), folder.join("disk.sock"));
    File::create(&image).and_then(|file| file.set_len(256 << 20)).expect("image file");
    let mut command = Command::new("qemu-storage-daemon");
    let image = image.display();
    command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={image}"));
    command.args(["--blockdev", "driver=raw,node-name=disk,file=file", "--export"]);
    let socket_name = socket.display();
    command.arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket_name}"
    ));
    let process = OwnedProcess::spawn("qemu-storage-daemon", &mut command).expect("storage daemon");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "no socket from qemu-storage-daemon");
        std::thread::sleep(Duration::from_millis(10));
    }
    process
}

fn options(folder: &Path, job: &str) -> GuestOptions {
    GuestOptions {
        disks: vec![folder.join("disk.sock")],
        job: job.into(),
        ..GuestOptions::default()
    }
}

/// Goal: a disk's content survives from one guest to the next, results and words travel, and the
/// tools work.
#[test]
fn a_guest_uses_its_disk_and_a_second_one_finds_what_it_wrote() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let _daemon = storage_daemon(folder.path());

    let job = r#"
        disk=$(disk 0)
        result cache "$(cat /sys/block/${disk##*/}/queue/write_cache)"
        mkfs.ext4 -q "$disk"
        mount "$disk" /mnt
        dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
        dd if=/tmp/data of=/mnt/data bs=64k conv=fsync 2>/dev/null
        result sum "$(sha256sum < /tmp/data)"
        await go
        result heard go
        umount /mnt
        result fio "$(fio --version)"
    "#;
    let mut guest =
        Guest::boot(&folder.path().join("first"), &options(folder.path(), job)).expect("boot");
    let sum = guest.wait_for("sum").expect("sum");
    guest.say("go").expect("say");
    let report = guest.finish().expect("first guest");
    let results = report.last();
    assert!(results["cache"].starts_with("write "), "{results:?}");
    assert_eq!(results["heard"], "go");
    assert!(results["fio"].starts_with("fio-"), "{results:?}");

    let job = r#"
        e2fsck -fn "$(disk 0)" >/tmp/fsck || { cat /tmp/fsck; exit 1; }
        mount -t ext4 "$(disk 0)" /mnt
        echo "$(cat /sum)" | sed 's|-|/mnt/data|' | sha256sum -c
        cp /mnt/data /tmp/
    "#;
    let mut second = options(folder.path(), job);
    second.files.push(("/sum".into(), sum.into_bytes()));
    Guest::boot(&folder.path().join("second"), &second)
        .expect("boot")
        .finish()
        .expect("second guest");
}

/// Goal: a job that fails fails the guest, with the job's last words in the error; a job that hangs
/// is ended.
#[test]
fn failures_and_hangs_are_told() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut options =
        GuestOptions { job: "echo last words\nfalse\ntrue".into(), ..GuestOptions::default() };
    let failed = Guest::boot(folder.path(), &options)
        .expect("boot")
        .finish()
        .expect_err("job fails")
        .to_string();
    assert!(failed.contains("exit status 1") && failed.contains("last words"), "{failed}");

    options.job = "result up 1; while true; do sleep 1; done".into();
    options.time_limit = Duration::from_secs(12);
    let hung = Guest::boot(folder.path(), &options)
        .expect("boot")
        .finish()
        .expect_err("job hangs")
        .to_string();
    assert!(hung.contains("watchdog"), "{hung}");
}
