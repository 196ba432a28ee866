//! Goal: a running guest moves from one QEMU to another while it reads and writes its disk; nothing is lost and no page
//! of its memory is stale.
//!
//! Method: two QEMU processes on this host, one agent, one disk. While the memory is copied, the guest drops its page
//! cache and reads a file into it again and again: pages that the back end writes and only the dirty log tells of. On
//! the other side it compares what is in the page cache with the checksum, without reading the disk, then the disk.

use std::time::Duration;

use tests::agent_rig::{AgentRig, StoreSpec};
use tests::guest::{Guest, GuestOptions};

const JOB: &str = r#"
    disk=$(disk 0)
    mkfs.ext4 -q "$disk"
    mount -t ext4 "$disk" /mnt
    dd if=/dev/urandom of=/mnt/data bs=64k count=512 conv=fsync 2>/dev/null
    sum=$(sha256sum </mnt/data)
    result ready-to-go "$sum"
    ( n=0; while [ ! -e /tmp/arrived ]; do
        echo 3 >/proc/sys/vm/drop_caches; cat /mnt/data >/dev/null
        n=$((n + 1)); echo $n >/mnt/count; sync /mnt/count
    done; echo $n >/tmp/rounds ) &
    await arrived
    touch /tmp/arrived
    wait
    cat /mnt/data >/dev/null
    [ "$(sha256sum </mnt/data)" = "$sum" ] || { result cache stale; exit 11; }
    result rounds "$(cat /tmp/rounds)"
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(sha256sum </mnt/data)" = "$sum" ] || { result disk stale; exit 12; }
    umount /mnt
    e2fsck -fn "$disk" >/tmp/fsck 2>&1 || { cat /tmp/fsck; exit 13; }
    if dmesg | grep -E 'I/O error|EXT4-fs error'; then exit 14; fi
"#;

#[test]
fn a_guest_moves_to_another_qemu_while_it_works() {
    let mut rig = AgentRig::new(&StoreSpec::file(2 << 30), 256 << 20).expect("format");
    rig.start().expect("agent");
    let agent = rig.agent().expect("agent");
    agent.create("vm", 128 << 20).expect("create");
    let socket = agent.attach("vm").expect("attach");
    let options = GuestOptions {
        disks: vec![socket],
        job: JOB.into(),
        memory_mib: 256,
        ..GuestOptions::default()
    };
    let mut source = Guest::boot(&rig.dir().join("source"), &options).expect("boot");
    source.wait_for("ready-to-go").expect("a file");
    let incoming = rig.dir().join("migration.sock");
    let options = GuestOptions { incoming: Some(incoming.clone()), ..options };
    let mut target = Guest::boot(&rig.dir().join("target"), &options).expect("a QEMU that waits");
    target.monitor().expect("it is up");
    let mut monitor = source.monitor().expect("monitor");
    monitor.migrate(&incoming, Duration::from_secs(120)).expect("migration");
    drop(monitor);
    source.pull_the_plug().expect("the source is not needed any more");
    target.say("arrived").expect("say");
    target.wait_for("rounds").expect("the page cache is whole");
    target.finish().expect("the guest");
}
