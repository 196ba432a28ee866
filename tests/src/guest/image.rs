//! The guest's image: kernel, initramfs and tools disk, made by `scripts/guest-image` in
//! `.deps/guest`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// Paths of a complete image.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The folder, for files that belong to this machine (such as which accelerator works).
    pub folder: PathBuf,
    /// Linux kernel.
    pub kernel: PathBuf,
    /// Uncompressed initramfs, without a job.
    pub initrd: PathBuf,
    /// Read-only ext4 disk with tools.
    pub tools: PathBuf,
}

impl GuestImage {
    /// The image of this checkout. Errors: it was not made yet; the message says how to.
    pub fn find() -> Result<GuestImage> {
        GuestImage::in_folder(&repository().join(".deps/guest"))
    }

    fn in_folder(folder: &Path) -> Result<GuestImage> {
        // The stamp is written last: without it the other files may be half made.
        if !folder.join("stamp").exists() {
            bail!("there is no guest image in {}: run 'scripts/setup test' once", folder.display());
        }
        Ok(GuestImage {
            folder: folder.to_owned(),
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.cpio"),
            tools: folder.join("tools.ext4"),
        })
    }
}

/// The root of the checkout that this crate was built from.
pub fn repository() -> PathBuf {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_folder.parent().unwrap_or(crate_folder).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_image_says_how_to_make_it() {
        let empty = tempfile::tempdir().expect("temporary folder");
        let error = GuestImage::in_folder(empty.path()).expect_err("empty").to_string();
        assert!(error.contains("scripts/setup test"), "{error}");
    }
}
