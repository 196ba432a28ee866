//! The forest as a graph in Graphviz' language: `ballast vdi tree --dot | dot -Tpdf > tree.pdf`.

use super::{Line, What};

pub(super) fn draw(lines: &[Line<'_>]) -> String {
    let mut text =
        String::from("digraph vdis {\n  rankdir=LR;\n  node [fontname=\"sans-serif\"];\n");
    for (at, line) in lines.iter().enumerate() {
        let shape = match line.what {
            What::Disk(_) => "box",
            What::Snapshot { .. } => "ellipse",
            What::Others(..) => "plaintext",
        };
        let words = quoted(&line.what.words());
        text.push_str(&format!("  n{at} [shape={shape}, label=\"{words}\"];\n"));
        if let Some(parent) = line.parent {
            text.push_str(&format!("  n{parent} -> n{at};\n"));
        }
    }
    text.push_str("}\n");
    text
}

fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}
