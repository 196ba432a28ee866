//! The forest as text, for a terminal.

use super::Line;

/// Levels that are drawn; what lies deeper stands as deep.
const DEPTH_MAX: usize = 40;

pub(super) fn draw(lines: &[Line<'_>]) -> String {
    let mut text = String::new();
    // What stands before the children of the last line of each depth.
    let mut before: Vec<String> = Vec::new();
    for line in lines {
        let depth = line.depth.min(DEPTH_MAX);
        before.truncate(depth);
        let above = before.last().map_or("", String::as_str);
        let (branch, below) = match (depth, line.is_last) {
            (0, _) => ("", ""),
            (_, true) => ("└─ ", "   "),
            (_, false) => ("├─ ", "│  "),
        };
        text.push_str(&format!("{above}{branch}{}\n", line.what.words()));
        let below = format!("{above}{below}");
        before.push(below);
    }
    text
}
