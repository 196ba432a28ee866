//! QEMU's command line for a test guest, and which QEMU and accelerator there is.
//!
//! Works with QEMU 7.2 (Debian 12) to 10: their chardevs differ in how a reconnect delay is given.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::image::GuestImage;

/// The program.
pub const QEMU: &str = "qemu-system-x86_64";
/// PCI slot of the guest's first disk; disk N is on slot `FIRST_DISK_SLOT + N`
/// (`scripts/guest-init` counts on it).
const FIRST_DISK_SLOT: usize = 8;
/// PCI slot of the tools disk.
const TOOLS_SLOT: usize = 0x1e;
/// Disks one guest can have.
pub const DISKS_MAX: usize = TOOLS_SLOT - FIRST_DISK_SLOT;

/// Version of a QEMU program, ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl QemuVersion {
    /// Asks the program in PATH, once per process.
    pub fn detect() -> Result<QemuVersion> {
        static VERSION: OnceLock<Result<QemuVersion, String>> = OnceLock::new();
        let ask = || {
            let output = Command::new(QEMU)
                .arg("--version")
                .output()
                .with_context(|| format!("cannot run {QEMU}: run 'scripts/setup test' once"))?;
            String::from_utf8_lossy(&output.stdout).parse::<QemuVersion>()
        };
        VERSION
            .get_or_init(|| ask().map_err(|error| format!("{error:#}")))
            .clone()
            .map_err(|error| anyhow!(error))
    }

    /// The chardev option that reconnects to a lost back end after `delay`: milliseconds since 9.2,
    /// before that whole seconds and at least one.
    pub fn reconnect_option(self, delay: Duration) -> String {
        if self >= (QemuVersion { major: 9, minor: 2 }) {
            format!("reconnect-ms={}", delay.as_millis().max(1))
        } else {
            format!("reconnect={}", delay.as_millis().div_ceil(1000).max(1))
        }
    }
}

impl FromStr for QemuVersion {
    type Err = anyhow::Error;

    /// Takes the output of `--version`.
    fn from_str(text: &str) -> Result<QemuVersion> {
        let parse = || {
            let (_, rest) = text.split_once("version ")?;
            let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
            Some(QemuVersion {
                major: numbers.next()?.parse().ok()?,
                minor: numbers.next()?.parse().ok()?,
            })
        };
        parse().ok_or_else(|| anyhow!("{QEMU} --version said nothing known: {:?}", text.trim()))
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// How the guest's processors are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel's virtualisation.
    Kvm,
    /// Emulation, one thread per processor.
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accelerator::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

impl FromStr for Accelerator {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Accelerator> {
        match text {
            "kvm" => Ok(Accelerator::Kvm),
            "tcg" => Ok(Accelerator::Tcg),
            _ => bail!("unknown accelerator '{text}': kvm or tcg"),
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

/// What a command line is made of.
#[derive(Debug)]
pub struct Machine<'a> {
    /// QEMU's version.
    pub version: QemuVersion,
    /// How processors are run.
    pub accelerator: Accelerator,
    /// The guest's kernel and tools.
    pub image: &'a GuestImage,
    /// Initramfs with the job appended.
    pub initrd: &'a Path,
    /// File for the kernel's console.
    pub console_log: &'a Path,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Queues of each disk.
    pub queues: u16,
    /// Delay before a lost back end is connected to again; `None` leaves the disk dead.
    pub reconnect: Option<Duration>,
    /// vhost-user sockets of the disks.
    pub disks: &'a [PathBuf],
    /// Where QEMU's monitor listens.
    pub monitor: &'a Path,
    /// Where a guest is taken over from another QEMU, instead of a boot.
    pub incoming: Option<&'a Path>,
    /// Where QEMU listens for those who speak to the guest agent; `None`: the guest has no port for it.
    pub guest_agent: Option<&'a Path>,
}

impl Machine<'_> {
    /// QEMU's arguments. The job's serial line is QEMU's stdin and stdout.
    /// Errors: too many disks, or a path that QEMU's option syntax cannot carry.
    pub fn arguments(&self) -> Result<Vec<String>> {
        if self.disks.len() > DISKS_MAX {
            bail!("a guest can have {DISKS_MAX} disks, not {}", self.disks.len());
        }
        let mut arguments = Vec::new();
        let mut push = |words: &[&str]| arguments.extend(words.iter().map(|w| (*w).to_owned()));
        push(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        push(&self.accelerator.arguments());
        push(&["-machine", "pc,memory-backend=mem", "-smp", &self.cpus.to_string()]);
        push(&["-m", &format!("{}M", self.memory_mib)]);
        push(&[
            "-object",
            &format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib),
        ]);
        push(&["-kernel", plain(&self.image.kernel)?, "-initrd", plain(self.initrd)?]);
        push(&["-append", "console=ttyS0 panic=-1 loglevel=5"]);
        push(&["-serial", &format!("file:{}", plain(self.console_log)?), "-serial", "stdio"]);
        push(&["-qmp", &format!("unix:{},server=on,wait=off", plain(self.monitor)?)]);
        if let Some(socket) = self.incoming {
            push(&["-incoming", &format!("unix:{}", plain(socket)?)]);
        }
        if let Some(socket) = self.guest_agent {
            let socket = plain(socket)?;
            push(&["-chardev", &format!("socket,id=agent,path={socket},server=on,wait=off")]);
            push(&["-device", "virtio-serial-pci", "-device"]);
            push(&["virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        }
        let tools = plain(&self.image.tools)?;
        push(&["-drive", &format!("if=none,id=tools,format=raw,readonly=on,file={tools}")]);
        push(&["-device", &format!("virtio-blk-pci,drive=tools,addr={TOOLS_SLOT:#x}")]);
        for (number, socket) in self.disks.iter().enumerate() {
            let reconnect = self.reconnect.map(|delay| self.version.reconnect_option(delay));
            let reconnect = reconnect.map(|option| format!(",{option}")).unwrap_or_default();
            push(&[
                "-chardev",
                &format!("socket,id=disk{number},path={}{reconnect}", plain(socket)?),
            ]);
            let (queues, slot) = (self.queues, FIRST_DISK_SLOT + number);
            let device = format!(
                "vhost-user-blk-pci,chardev=disk{number},num-queues={queues},addr={slot:#x}"
            );
            push(&["-device", &device]);
        }
        Ok(arguments)
    }
}

/// The path as text, if it survives QEMU's comma-separated options.
fn plain(path: &Path) -> Result<&str> {
    match path.to_str() {
        Some(text) if !text.contains(',') => Ok(text),
        _ => bail!("QEMU's options cannot carry the path {}: no commas, and UTF-8", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_off_the_banner() {
        let banner = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright (c) 2003-2025";
        assert_eq!(
            banner.parse::<QemuVersion>().expect("parse"),
            QemuVersion { major: 10, minor: 0 }
        );
        let banner = "QEMU emulator version 7.2.18 (Debian 1:7.2+dfsg-7)";
        assert_eq!(
            banner.parse::<QemuVersion>().expect("parse"),
            QemuVersion { major: 7, minor: 2 }
        );
        assert!("no such thing".parse::<QemuVersion>().is_err());
        assert!("version x.y".parse::<QemuVersion>().is_err());
    }

    #[test]
    fn old_versions_reconnect_in_whole_seconds() {
        let (old, new) = (QemuVersion { major: 7, minor: 2 }, QemuVersion { major: 9, minor: 2 });
        assert_eq!(old.reconnect_option(Duration::from_millis(200)), "reconnect=1");
        assert_eq!(old.reconnect_option(Duration::from_millis(1001)), "reconnect=2");
        assert_eq!(new.reconnect_option(Duration::from_millis(200)), "reconnect-ms=200");
        assert_eq!(new.reconnect_option(Duration::ZERO), "reconnect-ms=1");
    }

    fn arguments(disks: &[PathBuf]) -> Result<String> {
        let image = GuestImage {
            folder: "/image".into(),
            kernel: "/image/vmlinuz".into(),
            initrd: "/image/initrd".into(),
            tools: "/image/tools".into(),
        };
        let machine = Machine {
            version: QemuVersion { major: 10, minor: 0 },
            accelerator: Accelerator::Tcg,
            image: &image,
            initrd: Path::new("/run/initrd"),
            console_log: Path::new("/run/console.log"),
            memory_mib: 256,
            cpus: 1,
            queues: 2,
            reconnect: Some(Duration::from_millis(100)),
            disks,
            monitor: Path::new("/run/qmp.sock"),
            incoming: None,
            guest_agent: Some(Path::new("/run/agent.sock")),
        };
        Ok(machine.arguments()?.join(" "))
    }

    #[test]
    fn each_disk_has_its_slot_and_shared_memory() {
        let line = arguments(&["/run/a.sock".into(), "/run/b.sock".into()]).expect("arguments");
        for part in [
            "memory-backend-memfd,id=mem,size=256M,share=on",
            "socket,id=disk0,path=/run/a.sock,reconnect-ms=100",
            "vhost-user-blk-pci,chardev=disk1,num-queues=2,addr=0x9",
            "socket,id=agent,path=/run/agent.sock,server=on,wait=off",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn paths_that_would_become_options_are_refused() {
        assert!(arguments(&["/run/a,server=on".into()]).is_err());
        assert!(arguments(&vec!["/run/a".into(); DISKS_MAX + 1]).is_err());
    }
}
