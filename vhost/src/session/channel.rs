//! The front end's channel for requests of ours.
//!
//! The protocol crate keeps the channel's socket to itself and knows no message for a changed configuration. So before
//! it is handed a message we peek at it: the kernel gives a file descriptor that is peeked at to us, and once more to
//! the one who receives it. The stream is not changed.

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// Descriptors that one message may carry; more are cut off by the kernel.
const DESCRIPTORS_MAX: usize = 8;

/// Waits for the next message; if it brings a channel, returns that. The message is still to be received.
pub(super) fn peek(peer: &UnixStream) -> Option<UnixStream> {
    // Descriptors are looked at only where they are of interest: each look makes new ones.
    let (request, _) = look(peer, None)?;
    if request != SET_BACKEND_REQ_FD {
        return None;
    }
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let (_, descriptors) = look(peer, Some(&mut space))?;
    // Whether it is a socket at all shows when it is written to.
    descriptors.into_iter().next().map(UnixStream::from)
}

/// Looks at the next message's first word and at the descriptors that come with it, if there is `space` for them.
fn look(peer: &UnixStream, space: Option<&mut [u8]>) -> Option<(u32, Vec<OwnedFd>)> {
    let mut word = [0; 4];
    let mut parts = [IoSliceMut::new(&mut word)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
    let wanted = space.is_some();
    // A signal or an error is left to the receiver to meet again.
    let received = recvmsg::<()>(peer.as_raw_fd(), &mut parts, space, flags).ok()?;
    let bytes = received.bytes;
    let mut descriptors = Vec::new();
    if wanted {
        for message in received.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel made these descriptors for us in the call above; nobody else knows them.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    (bytes == word.len()).then(|| (u32::from_ne_bytes(word), descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::{IoSlice, Read, Write};

    fn send(stream: &UnixStream, request: u32, descriptors: &[RawFd]) {
        let mut message = [0; 12];
        message[..4].copy_from_slice(&request.to_ne_bytes());
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&message)];
        sendmsg::<()>(stream.as_raw_fd(), &parts, control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn a_channel_is_found_and_the_message_stays() {
        let (mut front_end, mut back_end) = UnixStream::pair().unwrap();
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        send(&front_end, 1, &[]);
        assert!(peek(&back_end).is_none());
        back_end.read_exact(&mut [0; 12]).unwrap();
        send(&front_end, SET_BACKEND_REQ_FD, &[ours.as_raw_fd()]);
        drop(ours);
        let mut channel = peek(&back_end).unwrap();
        channel.write_all(b"hello").unwrap();
        drop(channel);
        let mut hello = [0; 5];
        theirs.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
        let mut message = [0; 12];
        back_end.read_exact(&mut message).unwrap();
        assert_eq!(message[..4], SET_BACKEND_REQ_FD.to_ne_bytes());
        send(&front_end, SET_BACKEND_REQ_FD, &[]);
        assert!(peek(&back_end).is_none(), "a message without the descriptor that it is about");
        back_end.read_exact(&mut message).unwrap();
        front_end.write_all(&[21]).unwrap();
        drop(front_end);
        assert!(peek(&back_end).is_none(), "half a message");
    }
}
