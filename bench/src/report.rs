//! Results as text for a terminal and as Markdown sections of a document.
//!
//! A section lies between two marker comments; writing replaces what lies between and leaves the rest
//! of the document, which people wrote, alone.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::compare::{Line, Metric, Mode};
use crate::fio::Limit;

/// A table as Markdown; it reads well in a terminal too, since columns are padded.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([header[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let mut line = |cells: &[String]| {
        out.push('|');
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(out, " {cell:<width$} |");
        }
        out.push('\n');
    };
    line(&header.iter().map(|&cell| cell.to_owned()).collect::<Vec<_>>());
    line(&widths.iter().map(|&width| "-".repeat(width)).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
    out
}

/// The comparison: one line per promise.
#[must_use]
pub fn comparison(lines: &[Line]) -> String {
    let rows: Vec<Vec<String>> = lines.iter().map(comparison_row).collect();
    let mut out = table(
        &["workload", "ring", "figure", "Ballast", "qemu-storage-daemon", "ratio", "target", "met"],
        &rows,
    );
    let known: Vec<bool> = lines.iter().filter_map(Line::met).collect();
    if !known.is_empty() {
        let met = known.iter().filter(|met| **met).count();
        let _ = write!(out, "\n{met} of {} targets met.\n", known.len());
    }
    out
}

fn comparison_row(line: &Line) -> Vec<String> {
    let of = |name: &str| {
        line.figures
            .iter()
            .find(|figures| figures.server == name)
            .map_or_else(|| "-".to_owned(), |figures| number(figures.median()))
    };
    let mode = match line.mode {
        Mode::Burst => "burst",
        Mode::Sustained => "sustained",
    };
    let sign = if line.metric == Metric::CpuPerMillion { "≤" } else { "≥" };
    vec![
        line.title.clone(),
        mode.to_owned(),
        line.metric.unit().to_owned(),
        of("Ballast"),
        of("qemu-storage-daemon"),
        line.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        format!("{sign} {:.2}", line.target),
        line.met().map_or("-", |met| if met { "yes" } else { "**no**" }).to_owned(),
    ]
}

/// Every round and the latencies behind the comparison.
#[must_use]
pub fn rounds(lines: &[Line]) -> String {
    let mut rows = Vec::new();
    for line in lines {
        for figures in &line.figures {
            let each: Vec<String> = figures.rounds.iter().map(|&value| number(value)).collect();
            rows.push(vec![
                format!("{} ({:?})", line.title, line.mode).to_lowercase(),
                figures.server.clone(),
                format!("{} {}", each.join(", "), line.metric.unit()),
                format!("{:.0}", figures.latency_median_us),
                format!("{:.0}", figures.latency_99_us),
                format!("{:.0}", figures.other_percent),
            ]);
        }
    }
    table(&["workload", "server", "rounds", "p50 µs", "p99 µs", "other CPU %"], &rows)
}

/// fio's limits.
#[must_use]
pub fn limits(limits: &[Limit]) -> String {
    let rows: Vec<Vec<String>> = limits
        .iter()
        .map(|limit| {
            vec![limit.title.clone(), number(limit.iops), number(limit.megabytes_per_second)]
        })
        .collect();
    table(&["fio on the file system", "IOPS", "MB/s"], &rows)
}

/// Three significant digits or so, thousands grouped.
#[must_use]
pub fn number(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Replaces section `name` of the document at `path` by `text`; appends the section, or makes the
/// document, when missing.
///
/// # Errors
/// When the file cannot be read or written, or a marker lacks its pair.
pub fn write_section(path: &Path, name: &str, text: &str) -> Result<()> {
    let old = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "# Benchmarks\n".to_owned(),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let new = replace_section(&old, name, text)
        .with_context(|| format!("section {name} of {}", path.display()))?;
    std::fs::write(path, new).with_context(|| format!("write {}", path.display()))
}

fn replace_section(document: &str, name: &str, text: &str) -> Result<String> {
    let begin = format!("<!-- bench:{name}:begin -->");
    let end = format!("<!-- bench:{name}:end -->");
    let section = format!("{begin}\n\n{}\n\n{end}", text.trim());
    match (document.find(&begin), document.find(&end)) {
        (Some(from), Some(to)) if from < to => {
            Ok(format!("{}{section}{}", &document[..from], &document[to + end.len()..]))
        }
        (None, None) => Ok(format!("{}\n\n{section}\n", document.trim_end())),
        _ => bail!("{begin} and {end} do not form a pair; repair the document by hand"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_made_then_replaced_and_the_rest_is_kept() {
        let made = replace_section("# B\n\nBy hand.\n", "x", "one").unwrap();
        assert!(made.contains("By hand.") && made.contains("one"));
        let with_tail = format!("{made}\nMore by hand.\n");
        let replaced = replace_section(&with_tail, "x", "two").unwrap();
        assert!(replaced.contains("two") && !replaced.contains("one"));
        assert!(replaced.contains("By hand.") && replaced.ends_with("More by hand.\n"));
        assert_eq!(replace_section(&replaced, "x", "two").unwrap(), replaced);
        assert!(replace_section("<!-- bench:x:begin -->", "x", "y").is_err());
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(123.4), "123");
        assert_eq!(number(0.987), "0.99");
    }

    #[test]
    fn tables_are_aligned() {
        let text = table(&["a", "long"], &[vec!["wide µ".into(), "1".into()]]);
        let widths: Vec<usize> = text.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
    }
}
