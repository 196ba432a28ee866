//! `store dump`: any block of a store in words.

use super::looking::Looking;
use super::output::Output;
use super::{StoreArgs, output::fields};
use crate::error::{Failure, Kind, Result};
use crate::host::store::{Access, open_device};
use blockstore::describe::Verdict;
use blockstore::types::{BLOCK_SHIFT, Gba};
use gc::{Dump, Dumped, What};

/// What of a store to show.
#[derive(Clone, Debug, clap::Args)]
pub struct DumpArgs {
    /// superblock (the default), gc, hosts, extents, heads (or registry), vdi NAME, snapshots NAME, or a block's number
    #[arg(value_name = "WHAT", num_args = 0..=2)]
    what: Vec<String>,
    /// The block that this byte of the device lies in
    #[arg(long, value_name = "BYTES", conflicts_with = "what")]
    offset: Option<u64>,
    /// Search all trees for everything that points at the block, however long that takes
    #[arg(long)]
    who: bool,
}

/// Shows it. Read-only, and beside an agent, too.
///
/// # Errors
/// [`Kind::ProblemsFound`] with an empty message if something that was shown is damaged; [`Kind::Usage`]; those of opening.
pub async fn run(store: &StoreArgs, args: &DumpArgs, out: Output) -> Result<()> {
    let what = match args.offset {
        Some(offset) => What::Block(Gba(offset >> BLOCK_SHIFT)),
        None => parse(&args.what)?,
    };
    let device = open_device(&store.url, &store.device, Access::ReadOnly, None).await?;
    let looking = Looking::begin(out);
    let dump = gc::dump(device, &what, args.who, looking.progress()).await?;
    looking.end();
    out.print(&dump, text)?;
    match dump.damaged() {
        0 => Ok(()),
        // What was shown says it.
        _ => Err(Failure::new(Kind::ProblemsFound, "")),
    }
}

fn parse(words: &[String]) -> Result<What> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Ok(match words[..] {
        [] | ["superblock"] => What::Superblock,
        ["gc"] => What::Gc,
        ["hosts"] => What::Hosts,
        ["extents"] => What::Extents,
        ["heads" | "registry"] => What::Heads,
        ["vdi", name] => What::Vdi(name.into()),
        ["snapshots", name] => What::Snapshots(name.into()),
        [number] if parse_number(number).is_some() => {
            What::Block(Gba(parse_number(number).unwrap_or_default()))
        }
        _ => {
            let words = words.join(" ");
            return Err(Failure::new(
                Kind::Usage,
                format!(
                    "'{words}' is nothing that can be shown: give a block's number, superblock, gc, hosts, extents, heads, \
                     vdi NAME, snapshots NAME, or --offset BYTES"
                ),
            ));
        }
    })
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn text(dump: &Dump) -> String {
    let store = dump.store.map_or_else(|| "not readable".into(), |store| store.to_string());
    let mut text = fields(&[("device", dump.url.clone()), ("store", store)]);
    for note in &dump.notes {
        text.push_str(&format!("NOTE: {note}\n"));
    }
    for block in &dump.blocks {
        text.push('\n');
        text.push_str(&block_text(block));
    }
    text
}

fn block_text(dumped: &Dumped) -> String {
    let block = &dumped.described;
    let verdict = match &block.verdict {
        Verdict::Good => "good".into(),
        Verdict::Unused => "never written".into(),
        Verdict::Damaged { why } => format!("DAMAGED: {why}"),
        Verdict::Unknown => "its checksum stands with who points at it".into(),
    };
    let mut text = format!("block {} (byte {}): {}\n", block.block, block.offset, block.lies_in);
    let mut pairs = vec![("holds", block.holds.clone()), ("verdict", verdict)];
    pairs.extend(block.fields.iter().cloned());
    pairs.extend(dumped.pointed_at_by.iter().map(|by| ("pointed at by", by.clone())));
    for line in fields(&pairs).lines() {
        text.push_str(&format!("  {line}\n"));
    }
    for entry in &block.entries {
        text.push_str(&format!("  [{}] {}\n", entry.place, entry.is));
    }
    for line in &block.hex {
        text.push_str(&format!("  {line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_told_apart() {
        let parse = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            super::parse(&words).ok()
        };
        assert_eq!(parse(""), Some(What::Superblock));
        assert_eq!(parse("registry"), Some(What::Heads));
        assert_eq!(parse("vdi 17"), Some(What::Vdi("17".into())));
        assert_eq!(parse("17"), Some(What::Block(Gba(17))));
        assert_eq!(parse("0x11"), Some(What::Block(Gba(17))));
        assert_eq!(parse("vdi"), None);
        assert_eq!(parse("nonsense"), None);
        assert_eq!(parse("-1"), None);
    }
}
