//! What an errno of the kernel means to the store.

use crate::device::DeviceErrorKind;
use std::io;

/// Sorts an error of read, write, fsync, fallocate or ioctl.
///
/// On a block device `EIO` is an outage: that is what the kernel returns when all paths of a multipath
/// device are down or an iSCSI session timed out. Damage of the medium comes as `ENODATA`,
/// `EREMOTEIO` or `EILSEQ` there. On a file, `EIO` is what the file system says of damage.
pub(super) fn kind_of(error: &io::Error, block_device: bool) -> DeviceErrorKind {
    use DeviceErrorKind as Kind;
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return Kind::Io;
    }
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => Kind::NoSpace,
        Some(libc::EIO) if block_device => Kind::Unreachable,
        Some(
            libc::ENXIO
            | libc::ENODEV
            | libc::ETIMEDOUT
            | libc::ENOLINK
            | libc::ENOTCONN
            | libc::ECONNRESET
            | libc::ECONNREFUSED
            | libc::ECONNABORTED
            | libc::ESHUTDOWN
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ESTALE
            | libc::ENOMEM
            | libc::EAGAIN
            | libc::EBUSY
            | libc::ECANCELED,
        ) => Kind::Unreachable,
        // The block layer's word for a SCSI reservation conflict.
        Some(libc::EBADE) => Kind::Reserved,
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EROFS | libc::EPERM | libc::EBADF) => {
            Kind::Unsupported
        }
        Some(libc::EINVAL | libc::EFBIG) => Kind::OutOfRange,
        _ => Kind::Io,
    }
}

/// What the operator can do about it, as a suffix of the message.
pub(super) fn advice(kind: DeviceErrorKind, block_device: bool) -> &'static str {
    match (kind, block_device) {
        (DeviceErrorKind::NoSpace, true) => "; the array is full: extend it or free space on it",
        (DeviceErrorKind::NoSpace, false) => "; free space on the file system that holds the file",
        (DeviceErrorKind::Unreachable, _) => "; it is retried until the device answers",
        (DeviceErrorKind::Io, true) => "; look at the kernel log and the array's health",
        (DeviceErrorKind::Io, false) => "; look at the kernel log and the disk's health",
        (DeviceErrorKind::Reserved, _) => "; another host holds a SCSI reservation",
        (DeviceErrorKind::OutOfRange | DeviceErrorKind::Unsupported, _) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_are_sorted() {
        use DeviceErrorKind as Kind;
        for (errno, file, block) in [
            (libc::ENOSPC, Kind::NoSpace, Kind::NoSpace),
            (libc::EDQUOT, Kind::NoSpace, Kind::NoSpace),
            (libc::EIO, Kind::Io, Kind::Unreachable),
            (libc::ENODATA, Kind::Io, Kind::Io),
            (libc::EREMOTEIO, Kind::Io, Kind::Io),
            (libc::ENXIO, Kind::Unreachable, Kind::Unreachable),
            (libc::ENODEV, Kind::Unreachable, Kind::Unreachable),
            (libc::ETIMEDOUT, Kind::Unreachable, Kind::Unreachable),
            (libc::EBADE, Kind::Reserved, Kind::Reserved),
            (libc::EOPNOTSUPP, Kind::Unsupported, Kind::Unsupported),
            (libc::EINVAL, Kind::OutOfRange, Kind::OutOfRange),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(kind_of(&error, false), file, "{error}");
            assert_eq!(kind_of(&error, true), block, "{error}");
        }
    }
}
