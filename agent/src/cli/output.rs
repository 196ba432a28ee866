//! Writing results: one JSON document, or lines for people.

use crate::error::{Failure, Kind, Result};
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// How this command prints.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `text` makes of it.
    ///
    /// # Errors
    /// Standard output cannot be written. A reader that has gone away (`| head`) is no error.
    pub fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let text =
            if self.json { json_of(serde_json::to_string_pretty(value))? } else { text(value) };
        Self::write(text).map(drop)
    }

    /// Likewise, as one of many lines. False if the reader has gone away.
    ///
    /// # Errors
    /// As [`print`](Self::print).
    pub fn line<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<bool> {
        let text = if self.json { json_of(serde_json::to_string(value))? } else { text(value) };
        Self::write(text)
    }

    fn write(mut text: String) -> Result<bool> {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Failure::new(Kind::Failed, format!("cannot write to standard output: {error}")))
            }
            written => Ok(written.is_ok()),
        }
    }
}

fn json_of(written: serde_json::Result<String>) -> Result<String> {
    written.map_err(|error| Failure::new(Kind::Failed, format!("cannot print the result: {error}")))
}

/// A table with a head line and columns as wide as their widest cell.
#[derive(Debug)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns; a name that starts with `>` aligns its column to the right.
    #[must_use]
    pub fn new(head: &[&str]) -> Self {
        let right = head.iter().map(|name| name.starts_with('>')).collect();
        let names = head.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![names] }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.right.len());
        self.rows.push(cells.into());
    }

    /// The lines.
    #[must_use]
    pub fn render(&self) -> String {
        let columns = self.right.len();
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                let (before, after) =
                    if self.right[column] { (pad, String::new()) } else { (String::new(), pad) };
                line.push_str(&format!("{before}{cell}{after}  "));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `key: value` lines with the values in one column.
#[must_use]
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or_default() + 1;
    pairs.iter().map(|(key, value)| format!("{:width$}  {value}\n", format!("{key}:"))).collect()
}

/// So many of something that has a plural on "s".
#[must_use]
pub fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// What a check found, last, where the eye goes first.
#[must_use]
pub fn findings(problems: &[String]) -> String {
    if problems.is_empty() {
        return "no problems\n".into();
    }
    let lines: String = problems.iter().map(|problem| format!("PROBLEM: {problem}\n")).collect();
    format!("{lines}{}\n", counted(problems.len() as u64, "problem"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_by_characters_not_bytes() {
        let mut table = Table::new(&["NAME", ">SIZE"]);
        table.row(["über".into(), "4.0 GiB".into()]);
        table.row(["a-long-name".into(), "1 B".into()]);
        let expected = "NAME            SIZE\nüber         4.0 GiB\na-long-name      1 B\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn one_problem_is_not_one_problems() {
        assert_eq!(findings(&[]), "no problems\n");
        assert_eq!(findings(&["A.".into()]), "PROBLEM: A.\n1 problem\n");
        assert_eq!(findings(&["A.".into(), "B.".into()]), "PROBLEM: A.\nPROBLEM: B.\n2 problems\n");
    }

    #[test]
    fn fields_align() {
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a:     1\nlong:  2\n");
    }
}
