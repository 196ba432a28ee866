//! The forest as a picture: a line of text for each thing, with lines down to what hangs on it.

use super::{Line, What};

const ROW: usize = 24;
const INDENT: usize = 28;
const MARGIN: usize = 16;
/// What a character takes at most, about.
const LETTER: usize = 8;

pub(super) fn draw(lines: &[Line<'_>]) -> String {
    let place = |at: usize| (MARGIN + lines[at].depth * INDENT, MARGIN + at * ROW + ROW / 2);
    let right =
        lines.iter().map(|line| line.depth * INDENT + line.what.words().chars().count() * LETTER);
    let (width, height) = (right.max().unwrap_or(0) + 3 * MARGIN, lines.len() * ROW + 2 * MARGIN);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (at, line) in lines.iter().enumerate() {
        let (x, y) = place(at);
        if let Some(parent) = line.parent {
            let (above_x, above_y) = place(parent);
            text.push_str(&format!(
                "<path d=\"M{above_x} {} V{y} H{}\" fill=\"none\" stroke=\"#888\"/>\n",
                above_y + 5,
                x - 5
            ));
        }
        text.push_str(&match line.what {
            What::Disk(_) => {
                format!(
                    "<rect x=\"{}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"#246\"/>\n",
                    x - 5,
                    y - 5
                )
            }
            What::Snapshot { .. } => {
                format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"5\" fill=\"#c60\"/>\n")
            }
            What::Others(..) => {
                format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"4\" fill=\"none\" stroke=\"#c60\"/>\n")
            }
        });
        let words = escaped(&line.what.words());
        text.push_str(&format!("<text x=\"{}\" y=\"{}\">{words}</text>\n", x + 10, y + 4));
    }
    text.push_str("</svg>\n");
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
