//! Opens a device by its URL.

use super::{Device, DeviceError, DeviceErrorKind};
use std::path::{Path, PathBuf};

/// The forms of a device URL, for messages and help texts.
pub const URL_FORMS: &str = "file:PATH (a file or a block device), \
                             iscsi://HOST[:PORT]/TARGET-IQN/LUN";

/// How a device is to be opened. The default is: for reading and writing, shared, existing.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Keep every other writer out for as long as the device is open; fails with `Reserved` if there
    /// is one.
    pub exclusive: bool,
    /// Writes fail with `Unsupported`. Opening to read is possible while another owner holds
    /// the device exclusively.
    pub read_only: bool,
    /// Create the file with this size in bytes if it does not exist. An existing file must have
    /// exactly this size. Block devices and iSCSI targets ignore it: they have the size they have.
    pub create_size: Option<u64>,
    /// iSCSI: the initiator's name. None: one derived from this host's name.
    pub initiator_name: Option<String>,
    /// iSCSI: a file with `USER:SECRET` in its first line, for CHAP. None: the environment variable
    /// `BALLAST_CHAP` if it is set, otherwise no authentication.
    pub chap_file: Option<PathBuf>,
}

/// Opens the device that `url` names (see [`URL_FORMS`]; a bare absolute path is a file).
///
/// # Errors
/// `Unsupported` for a URL of no known form, `Reserved` if another owner is in the way, otherwise
/// what the backend reports. Operation `open`.
pub async fn open(url: &str, options: &OpenOptions) -> Result<Device, DeviceError> {
    match parse(url)? {
        Location::File(path) => open_file(path, options).await,
        Location::Iscsi => open_iscsi(url, options).await,
    }
}

/// What a device URL points at.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    File(PathBuf),
    /// The iSCSI backend parses the rest itself.
    Iscsi,
}

fn parse(url: &str) -> Result<Location, DeviceError> {
    let refuse = |message: String| Err(open_error(url, DeviceErrorKind::Unsupported, message));
    let file = |path: &str| Ok(Location::File(Path::new(path).to_owned()));
    if url.contains('\0') {
        return refuse("a device URL cannot contain a NUL byte".to_owned());
    }
    if url.starts_with('/') {
        return file(url);
    }
    let (scheme, rest) = url.split_once(':').unwrap_or(("", url));
    match scheme {
        "file" => match rest.strip_prefix("//") {
            Some(path) if path.starts_with('/') => file(path),
            Some(_) => refuse("a file URL has no host: write file:PATH or file:///PATH".to_owned()),
            None if rest.is_empty() => refuse("the path is missing: write file:PATH".to_owned()),
            None => file(rest),
        },
        "iscsi" => Ok(Location::Iscsi),
        _ => refuse(format!("no known form of a device URL; accepted are: {URL_FORMS}")),
    }
}

async fn open_file(path: PathBuf, options: &OpenOptions) -> Result<Device, DeviceError> {
    let url = format!("file:{}", path.display());
    let options = options.clone();
    // open(2) and the probes may hang for as long as the SAN does.
    tokio::task::spawn_blocking(move || super::file::FileDevice::open(&path, &options))
        .await
        .unwrap_or_else(|e| {
            Err(open_error(&url, DeviceErrorKind::Io, format!("opening was cut off: {e}")))
        })
}

#[cfg(feature = "iscsi")]
async fn open_iscsi(url: &str, options: &OpenOptions) -> Result<Device, DeviceError> {
    super::iscsi::open(url, options).await
}

#[cfg(not(feature = "iscsi"))]
async fn open_iscsi(url: &str, _options: &OpenOptions) -> Result<Device, DeviceError> {
    let message = "this program was built without iSCSI: attach the target by the kernel and give \
                   file:/dev/disk/by-id/…, or build with the feature `iscsi`";
    Err(open_error(url, DeviceErrorKind::Unsupported, message.to_owned()))
}

fn open_error(url: &str, kind: DeviceErrorKind, message: String) -> DeviceError {
    DeviceError {
        kind,
        device: without_secrets(url),
        operation: "open",
        offset: 0,
        len: 0,
        message,
    }
}

/// The URL with whatever stands between `://` and `@` left out.
fn without_secrets(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    match rest.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://…@{place}"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_forms_are_recognised() {
        for (url, path) in [
            ("file:/dev/sdb", "/dev/sdb"),
            ("file:///dev/sdb", "/dev/sdb"),
            ("/var/lib/store.img", "/var/lib/store.img"),
            ("file:store.img", "store.img"),
            ("file:./a:b", "./a:b"),
        ] {
            assert_eq!(parse(url).unwrap(), Location::File(PathBuf::from(path)), "{url}");
        }
        assert_eq!(parse("iscsi://san:3260/iqn.2024-01.example:s/0").unwrap(), Location::Iscsi);
    }

    #[test]
    fn other_forms_are_refused_with_the_accepted_ones_and_without_secrets() {
        for url in ["", "store.img", "nbd://host/x", "http://u:hunter2@host/", "FILE:/x"] {
            let error = parse(url).unwrap_err();
            assert_eq!(error.kind, DeviceErrorKind::Unsupported, "{url}");
            let text = error.to_string();
            assert!(text.contains("file:PATH") && text.contains("iscsi://"), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
        for url in ["file:", "file://host/path", "file:/a\0b"] {
            assert_eq!(parse(url).unwrap_err().kind, DeviceErrorKind::Unsupported, "{url:?}");
        }
    }
}
