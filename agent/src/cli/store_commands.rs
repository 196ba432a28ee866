//! Commands that work on a store's device directly.
//!
//! All but `format` and `repair` only read, and may run beside an agent that uses the store.

use super::looking::Looking;
use super::output::Output;
use super::sizes::StoreReport;
use super::{StoreArgs, StoreCommand, store_dump, store_repair, tables};
use crate::error::{Failure, Kind, Result};
use crate::host::store::{Access, open_device, open_read_only};
use blockstore::{FormatOptions, Store, StoreError, StoreErrorKind};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How often an export starts again when the disk's owner commits meanwhile.
const EXPORT_ATTEMPTS: u32 = 5;

pub async fn run(command: StoreCommand, out: Output) -> Result<()> {
    match command {
        StoreCommand::Format { store, size, extent_size, force } => {
            let options = FormatOptions { extent_size, force, size, ..FormatOptions::default() };
            format(&store, options).await?;
            let opened = open_read_only(&store.url, &store.device).await?;
            out.print(&opened.info().await?, tables::formatted)
        }
        StoreCommand::Info { store, sizes } => {
            let opened = open_read_only(&store.url, &store.device).await?;
            let looking = Looking::begin(out);
            let sizes = match sizes {
                true => {
                    let options = gc::SizeOptions::default();
                    Some(gc::sizes(&opened, options, looking.progress()).await?)
                }
                false => None,
            };
            looking.end();
            out.print(&StoreReport::new(opened.info().await?, sizes), tables::store_info_with)
        }
        StoreCommand::Check { store, data } => {
            let opened = open_read_only(&store.url, &store.device).await?;
            let looking = Looking::begin(out);
            let options = gc::CheckOptions { data };
            let report = gc::check_with(&opened, options, looking.progress()).await?;
            looking.end();
            out.print(&report, tables::store_report)?;
            if report.is_sound() {
                return Ok(());
            }
            // The report has said it all.
            Err(Failure::new(Kind::ProblemsFound, ""))
        }
        StoreCommand::Dump { store, args } => store_dump::run(&store, &args, out).await,
        StoreCommand::Repair { store, args } => store_repair::run(&store, &args, out).await,
        StoreCommand::Export { store, vdi, outfile, force } => {
            let opened = open_read_only(&store.url, &store.device).await?;
            let exported = export(&opened, &vdi, outfile, force).await?;
            out.print(&exported, |e| {
                format!(
                    "wrote {}: disk '{}' as of LSN {}, {} blocks of data",
                    e.outfile.display(),
                    e.vdi,
                    e.lsn,
                    e.blocks
                )
            })
        }
    }
}

/// The path of a `file:` URL.
fn file_of(url: &str) -> Option<&Path> {
    let path = url.strip_prefix("file://").or_else(|| url.strip_prefix("file:"));
    path.or_else(|| url.starts_with('/').then_some(url)).map(Path::new)
}

/// How to open a device that nobody else may use. A reservation on an iSCSI LUN would outlive the command.
pub fn alone(url: &str) -> Access {
    if file_of(url).is_some() { Access::Exclusive } else { Access::Shared }
}

async fn format(store: &StoreArgs, options: FormatOptions) -> Result<()> {
    let new_file = file_of(&store.url).filter(|path| !path.exists() && !path.starts_with("/dev"));
    if let (Some(path), None) = (new_file, options.size) {
        return Err(Failure::new(
            Kind::NotFound,
            format!(
                "{} does not exist: give --size to create it, or correct the path",
                path.display()
            ),
        ));
    }
    let access = alone(&store.url);
    let create_size = new_file.and(options.size);
    let device = open_device(&store.url, &store.device, access, create_size).await?;
    let formatted = Store::format(device, options).await;
    if let (Err(_), Some(path)) = (&formatted, new_file) {
        // Made a moment ago, and good for nothing.
        let _ = std::fs::remove_file(path);
    }
    formatted?;
    Ok(())
}

/// What `store export` did.
#[derive(Debug, Serialize)]
struct Exported {
    vdi: String,
    outfile: PathBuf,
    size: u64,
    lsn: u64,
    blocks: u64,
}

/// Copies into a file beside OUTFILE, which takes its name when it is complete: a run that fails leaves nothing.
async fn export(store: &Store, vdi: &str, outfile: PathBuf, force: bool) -> Result<Exported> {
    let refuse =
        |words: &str| Failure::new(Kind::Conflict, format!("{}: {words}", outfile.display()));
    match std::fs::symlink_metadata(&outfile) {
        Ok(found) if !found.is_file() => {
            return Err(refuse("is not a regular file: give another name"));
        }
        Ok(_) if !force => {
            return Err(refuse("exists: give another name, or --force to overwrite it"));
        }
        _ => {}
    }
    let mut partial = outfile.clone().into_os_string();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let exported = copy_out(store, vdi, &partial).await;
    let result = exported.and_then(|report| {
        std::fs::rename(&partial, &outfile).map_err(|error| write_failed(&outfile, &error))?;
        Ok(Exported {
            vdi: vdi.to_owned(),
            outfile,
            size: report.size_bytes,
            lsn: report.lsn.0,
            blocks: report.blocks,
        })
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    result
}

async fn copy_out(store: &Store, vdi: &str, partial: &Path) -> Result<blockstore::ExportReport> {
    let mut attempt = 1;
    loop {
        // Anew each time: what an earlier attempt wrote may be a hole now.
        let file = File::create(partial).map_err(|error| write_failed(partial, &error))?;
        let mut sink = |offset: u64, block: &[u8]| file.write_all_at(block, offset);
        let exported = match vdi.split_once('@') {
            Some((vdi, snapshot)) => store.export_snapshot(vdi, snapshot, &mut sink).await,
            None => store.export_vdi(vdi, &mut sink).await,
        };
        match exported {
            Ok(report) => {
                let done = file.set_len(report.size_bytes).and_then(|()| file.sync_all());
                return done.map(|()| report).map_err(|error| write_failed(partial, &error));
            }
            Err(StoreError { kind: StoreErrorKind::Changed, .. }) if attempt < EXPORT_ATTEMPTS => {
                attempt += 1
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_failed(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Kind::Failed, format!("cannot write {}: {error}", path.display()))
}
