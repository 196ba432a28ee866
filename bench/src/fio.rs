//! fio on a file of the same file system: the limit that no server on it can pass.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// One fio measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limit {
    /// Name of the workload.
    pub title: String,
    /// Operations per second.
    pub iops: f64,
    /// Megabytes (10^6 bytes) per second.
    pub megabytes_per_second: f64,
}

/// Title, fio's `rw`, block size, depth, and whether each write is followed by fdatasync.
const JOBS: [(&str, &str, &str, u32, bool); 7] = [
    ("4k random write, depth 32", "randwrite", "4k", 32, false),
    ("4k random write, depth 1", "randwrite", "4k", 1, false),
    ("4k random write + fdatasync, depth 1", "randwrite", "4k", 1, true),
    ("4k random read, depth 1", "randread", "4k", 1, false),
    ("4k random read, depth 32", "randread", "4k", 32, false),
    ("128k sequential write, depth 8", "write", "128k", 8, false),
    ("128k sequential read, depth 8", "read", "128k", 8, false),
];

/// fio's arguments for one job.
#[must_use]
pub fn arguments(file: &str, job: usize, bytes: u64, core: usize, time: Duration) -> Vec<String> {
    let (_, rw, bs, depth, sync) = JOBS[job];
    let mut out: Vec<String> = vec![
        "--name=limit".into(),
        format!("--filename={file}"),
        format!("--rw={rw}"),
        format!("--bs={bs}"),
        format!("--iodepth={depth}"),
        format!("--size={bytes}"),
        "--ioengine=io_uring".into(),
        "--direct=1".into(),
        "--time_based".into(),
        format!("--runtime={}", time.as_secs().max(1)),
        format!("--cpus_allowed={core}"),
        "--output-format=json".into(),
    ];
    if sync {
        out.push("--fdatasync=1".into());
    }
    out
}

/// Measures every job on `file`, which is `bytes` long and fully written.
///
/// # Errors
/// When fio is missing, fails, or prints something unknown.
pub fn measure(file: &Path, bytes: u64, core: usize, time: Duration) -> Result<Vec<Limit>> {
    let mut limits = Vec::new();
    for (index, (title, ..)) in JOBS.iter().enumerate() {
        let arguments = arguments(&file.display().to_string(), index, bytes, core, time);
        let output = Command::new("fio").args(&arguments).output().context("start fio")?;
        if !output.status.success() {
            bail!("fio failed on {title}: {}", String::from_utf8_lossy(&output.stderr));
        }
        limits.push(parse(title, &output.stdout)?);
    }
    Ok(limits)
}

fn parse(title: &str, json: &[u8]) -> Result<Limit> {
    let value: serde_json::Value =
        serde_json::from_slice(json).context("understand fio's output")?;
    let job = &value["jobs"][0];
    let sum = |field: &str| {
        ["read", "write"].iter().filter_map(|side| job[side][field].as_f64()).sum::<f64>()
    };
    let limit = Limit {
        title: title.to_owned(),
        iops: sum("iops"),
        megabytes_per_second: sum("bw_bytes") / 1e6,
    };
    if limit.iops == 0.0 {
        bail!("fio's output for {title} holds no operations");
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_read_and_an_empty_one_refused() {
        let json = br#"{"jobs":[{"read":{"iops":0,"bw_bytes":0},
            "write":{"iops":1000.5,"bw_bytes":4098048}}]}"#;
        let limit = parse("t", json).unwrap();
        assert_eq!(limit.iops, 1000.5);
        assert!((limit.megabytes_per_second - 4.098).abs() < 0.001);
        assert!(parse("t", b"{}").is_err());
        assert!(parse("t", b"fio: no such job").is_err());
    }
}
