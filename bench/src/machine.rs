//! What a reader must know of the machine to judge figures: no names, no paths.

use std::path::Path;
use std::process::Command;

/// Facts as `(what, value)`.
#[must_use]
pub fn facts(dir: &Path) -> Vec<(&'static str, String)> {
    vec![
        ("processor", field("/proc/cpuinfo", "model name")),
        ("cores", cores().to_string()),
        ("memory", memory()),
        ("kernel", kernel()),
        ("file system", output("stat", &["-f", "-c", "%T", &dir.display().to_string()])),
        ("qemu-storage-daemon", version("qemu-storage-daemon", &["--version"])),
        ("fio", version("fio", &["--version"])),
    ]
}

/// Cores of the machine, not only those this process is pinned to.
fn cores() -> i64 {
    // SAFETY: a query without side effects.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }
}

fn field(file: &str, name: &str) -> String {
    std::fs::read_to_string(file)
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split_once(':').map(|(_, value)| value))
        .map_or_else(|| "unknown".to_owned(), |value| value.trim().to_owned())
}

fn memory() -> String {
    let total = field("/proc/meminfo", "MemTotal");
    let kib: u64 = total.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    format!("{} GiB", (kib + (1 << 19)) >> 20)
}

/// Major and minor number only: a build's suffix may carry a host's name.
fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.split(['-', '+']).next().unwrap_or_default().trim().to_owned()
}

fn version(program: &str, arguments: &[&str]) -> String {
    let text = output(program, arguments);
    let found = text.split_ascii_whitespace().find_map(|word| {
        let word = word.trim_start_matches("fio-");
        word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
    });
    found.unwrap_or_else(|| "unknown".to_owned())
}

fn output(program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .output()
        .ok()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}
