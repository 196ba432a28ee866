//! Goal: a leg of a mirrored cache that does not answer costs guests a pause, its late answers reach nobody's memory, and
//! nobody waits for them at the end. Method: in the place of the leg's file is a pipe, of which nothing can be read until
//! something is written to it.

use super::data::pattern;
use super::guest::{DATA, Guest, OK};
use super::rig::{BLOCK, Rig};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Bytes in the pipe.
fn waiting(pipe: &std::fs::File) -> usize {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes one int.
    let done = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut bytes) };
    assert_eq!(done, 0);
    usize::try_from(bytes).unwrap()
}

#[test]
fn reads_from_a_leg_that_hangs_come_from_the_other_and_late_answers_reach_nobody() {
    for answers_late in [true, false] {
        let mut rig = Rig::mirrored(MIB, 64 * MIB);
        let mut guest = Guest::simple(&rig.socket());
        let data = pattern(7, 16 * BLOCK);
        assert_eq!(guest.write(0, &data), OK);
        assert_eq!(guest.flush(), OK);
        drop(guest);
        rig.drain();
        let mut disk = rig.stop();
        let silent = rig.silent_file();
        disk.legs[0] = Arc::new(rig.silent_file());
        disk.leg_timeout = Duration::from_secs(1);
        rig.serve(disk);
        let mut guest = Guest::simple(&rig.socket());
        // Whole blocks, and parts of some.
        let whole = guest.queues[0].submit(0, 0, &[(DATA, 8 * BLOCK as u32, true)]);
        let (used, _, status) = guest.queues[0].next_used();
        assert_eq!((used, status), (whole, OK));
        assert_eq!(guest.peek(DATA, 8 * BLOCK), data[..8 * BLOCK]);
        assert_eq!(
            guest.read(8 * 8 + 3, 5 * BLOCK),
            Ok(data[8 * BLOCK + 1536..][..5 * BLOCK].into())
        );
        rig.wait_until("the leg is out", |rig| rig.members() == 1);
        // Nobody waits for it from now on.
        assert_eq!(guest.write(0, &pattern(9, BLOCK)), OK);
        assert_eq!(guest.flush(), OK);
        assert_eq!(guest.read(0, BLOCK), Ok(pattern(9, BLOCK)));
        assert_eq!(rig.server().stats().failed, 0);
        if answers_late {
            let before = guest.peek(DATA, 16 * BLOCK);
            (&silent).write_all(&vec![0xee; 8 * BLOCK]).unwrap();
            rig.wait_until("the kernel read it", |_| waiting(&silent) == 0);
            assert_eq!(
                guest.read(8 * BLOCK as u64 / 512, BLOCK),
                Ok(data[8 * BLOCK..9 * BLOCK].into())
            );
            let after = guest.peek(DATA, 16 * BLOCK);
            assert_eq!(before[BLOCK..], after[BLOCK..], "guest memory is the guest's");
        }
        drop(guest);
        assert!(rig.stop().disk.is_quiet());
    }
}
