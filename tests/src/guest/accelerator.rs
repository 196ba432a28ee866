//! Whether KVM works here: found out by booting a guest with it, once per boot of this machine.
//!
//! That /dev/kvm opens says little: on some machines (nested virtualisation above all) a guest's
//! kernel then hangs. `BALLAST_ACCEL=kvm|tcg` overrides the probe.

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result};

use super::image::GuestImage;
use super::qemu::{Accelerator, QemuVersion};
use super::run::{Guest, GuestOptions};

/// A guest under a working KVM is up and down again in a fraction of this.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// The best accelerator that works on this machine.
pub fn best(image: &GuestImage) -> Result<Accelerator> {
    if let Ok(forced) = std::env::var("BALLAST_ACCEL") {
        return forced.parse().context("environment variable BALLAST_ACCEL");
    }
    let kvm = Path::new("/dev/kvm");
    if std::fs::File::options().read(true).write(true).open(kvm).is_err() {
        return Ok(Accelerator::Tcg);
    }
    // One probe at a time; the others then read its answer.
    static PROBE: Mutex<()> = Mutex::new(());
    let _guard = PROBE.lock().unwrap_or_else(PoisonError::into_inner);
    let answer = image.folder.join("accelerator");
    let machine = format!("{} QEMU {}", boot_id(), QemuVersion::detect()?);
    if let Some(known) = read_answer(&answer, &machine) {
        return Ok(known);
    }
    let accelerator = if kvm_works(image) { Accelerator::Kvm } else { Accelerator::Tcg };
    // A cache: not being able to write it only costs the next process a probe.
    let _ = std::fs::write(&answer, format!("{machine}\n{accelerator}\n"));
    Ok(accelerator)
}

fn kvm_works(image: &GuestImage) -> bool {
    let Ok(folder) = tempfile::tempdir() else { return false };
    let options =
        GuestOptions { job: "true".into(), time_limit: PROBE_LIMIT, ..GuestOptions::default() };
    Guest::boot_image(folder.path(), &options, image, Accelerator::Kvm)
        .and_then(Guest::finish)
        .is_ok()
}

fn read_answer(file: &Path, machine: &str) -> Option<Accelerator> {
    let text = std::fs::read_to_string(file).ok()?;
    let (for_machine, accelerator) = text.trim_end().split_once('\n')?;
    if for_machine != machine {
        return None;
    }
    accelerator.parse().ok()
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_only_for_the_machine_it_was_found_on() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = folder.path().join("accelerator");
        assert_eq!(read_answer(&file, "here"), None);
        std::fs::write(&file, "here\nkvm\n").expect("write");
        assert_eq!(read_answer(&file, "here"), Some(Accelerator::Kvm));
        assert_eq!(read_answer(&file, "there"), None);
        std::fs::write(&file, "here\nmaybe\n").expect("write");
        assert_eq!(read_answer(&file, "here"), None);
    }
}
