//! `snap diff`: page after page until all is told.

use super::output::Output;
use crate::api::diff::{Changed, Diff, DiffRequest, ImageName};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::format_size;

/// `VDI@SNAP`, or `VDI` for the disk as it is.
pub fn parse_image(text: &str) -> std::result::Result<ImageName, String> {
    let (vdi, snapshot) = match text.split_once('@') {
        Some((vdi, snapshot)) => (vdi, Some(snapshot)),
        None => (text, None),
    };
    if vdi.is_empty() || snapshot == Some("") {
        return Err(
            "give a disk, or a disk, '@' and a snapshot's LSN or label, such as db@1834".into()
        );
    }
    Ok(ImageName { vdi: vdi.into(), snapshot: snapshot.map(Into::into) })
}

/// As text, ranges are printed as they come; as JSON, one object has all of them.
pub async fn run(client: &Client, from: ImageName, to: ImageName, out: Output) -> Result<()> {
    let mut request = DiffRequest { from, to, offset: 0, limit: 0 };
    let mut all: Option<Diff> = None;
    // Of the range that may go on in the next page.
    let mut last: Option<Changed> = None;
    let (mut ranges, mut bytes) = (0u64, 0u64);
    loop {
        let mut page: Diff = client.post("/v1/diff", &request).await?;
        if let Some(all) = &all
            && (&all.from, &all.to) != (&page.from, &page.to)
        {
            let words = "a disk was written while it was compared: take a snapshot of it, and compare with that";
            return Err(Failure::new(Kind::Conflict, words));
        }
        let next = page.next;
        let mut whole = Vec::new();
        for range in page.ranges.drain(..) {
            match &mut last {
                Some(last)
                    if last.offset + last.length == range.offset && last.zeros == range.zeros =>
                {
                    last.length += range.length;
                }
                _ => whole.extend(last.replace(range)),
            }
        }
        if next.is_none() {
            whole.extend(last.take());
        }
        ranges += whole.len() as u64;
        bytes += whole.iter().map(|range| range.length).sum::<u64>();
        if !out.json {
            out.print(&(), |()| whole.iter().map(line).collect())?;
            whole.clear();
        }
        let all = all.get_or_insert(page);
        all.ranges.append(&mut whole);
        let Some(next) = next else { break };
        request.offset = next;
    }
    let Some(all) = all else { return Ok(()) };
    let all = Diff { next: None, ..all };
    out.print(&all, |_| format!("{ranges} ranges, {}", format_size(bytes)))
}

fn line(Changed { offset, length, zeros }: &Changed) -> String {
    format!("{offset:>16} {length:>14}{}\n", if *zeros { "  zeros" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_a_disk_or_one_of_its_snapshots() {
        let image = |vdi: &str, snapshot: Option<&str>| ImageName {
            vdi: vdi.into(),
            snapshot: snapshot.map(Into::into),
        };
        assert_eq!(parse_image("db"), Ok(image("db", None)));
        assert_eq!(parse_image("db@17"), Ok(image("db", Some("17"))));
        assert_eq!(parse_image("db@a@b"), Ok(image("db", Some("a@b"))));
        for text in ["", "@", "@17", "db@"] {
            parse_image(text).unwrap_err();
        }
    }
}
