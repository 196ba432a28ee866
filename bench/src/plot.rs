//! Line plots as SVG: points and lines on axes that may be logarithmic, enough to see whether something is flat or linear.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

/// Size of a plot in pixels.
const SIZE: (f64, f64) = (640.0, 360.0);
/// Room for labels: left and right, top and bottom.
const MARGIN: ((f64, f64), (f64, f64)) = ((70.0, 20.0), (40.0, 50.0));
/// Colours of the lines, in their order; told apart also by those who see fewer colours.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#666666"];

/// An axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From zero on.
    Linear,
    /// By powers of ten; a value below 1 counts as 1.
    Logarithmic,
}

/// A line with its name.
#[derive(Debug, Clone)]
pub struct Line {
    /// For the legend.
    pub name: String,
    /// In the order of x.
    pub points: Vec<(f64, f64)>,
}

/// A plot.
#[derive(Debug, Clone)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Name and scale of the horizontal axis.
    pub x: (String, Scale),
    /// Name and scale of the vertical axis.
    pub y: (String, Scale),
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// An axis with its range, in the values of its scale.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    fn over(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.collect();
        let most = values.iter().copied().fold(0.0, f64::max);
        let least = values.iter().copied().fold(most, f64::min);
        let (low, high) = match scale {
            Scale::Linear => (0.0, nice_above(most)),
            Scale::Logarithmic => (least.max(1.0).log10().floor(), most.max(1.0).log10().ceil()),
        };
        Self { scale, low, high: if high > low { high } else { low + 1.0 } }
    }

    /// Where a value is: 0 at the start of the axis, 1 at its end.
    fn place(&self, value: f64) -> f64 {
        let value = match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic => value.max(1.0).log10(),
        };
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => (0..=5).map(|n| self.high * f64::from(n) / 5.0).collect(),
            Scale::Logarithmic => {
                (self.low as i32..=self.high as i32).map(|power| 10f64.powi(power)).collect()
            }
        }
    }
}

/// The next of 1, 2, 5, 10, 20 … that is no less.
fn nice_above(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|step| step * power)
        .into_iter()
        .find(|&n| n >= value)
        .unwrap_or(value)
}

impl Plot {
    /// The plot as text of an SVG file.
    #[must_use]
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| line.points.iter());
        let x = Axis::over(self.x.1, points().map(|point| point.0));
        let y = Axis::over(self.y.1, points().map(|point| point.1));
        let ((left, right), (top, bottom)) = MARGIN;
        let (width, height) = (SIZE.0 - left - right, SIZE.1 - top - bottom);
        let at_x = |value: f64| left + width * x.place(value);
        let at_y = |value: f64| top + height * (1.0 - y.place(value));
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            SIZE.0, SIZE.1
        );
        let text = |at: (f64, f64), anchor: &str, words: &str| {
            let words = words.replace('&', "&amp;").replace('<', "&lt;");
            format!(
                "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"{anchor}\">{words}</text>\n",
                at.0, at.1
            )
        };
        out += &text((SIZE.0 / 2.0, 18.0), "middle", &self.title);
        out += &text((left + width / 2.0, SIZE.1 - 10.0), "middle", &self.x.0);
        out += &text((8.0, top - 8.0), "start", &self.y.0);
        for tick in x.ticks() {
            let at = at_x(tick);
            let _ =
                writeln!(out, "<path d=\"M{at:.1} {top} V{:.1}\" stroke=\"#ddd\"/>", top + height);
            out += &text((at, top + height + 18.0), "middle", &short(tick));
        }
        for tick in y.ticks() {
            let at = at_y(tick);
            let _ =
                writeln!(out, "<path d=\"M{left} {at:.1} H{:.1}\" stroke=\"#ddd\"/>", left + width);
            out += &text((left - 6.0, at + 4.0), "end", &short(tick));
        }
        for (number, line) in self.lines.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let places: Vec<String> = line
                .points
                .iter()
                .map(|&(a, b)| format!("{:.1},{:.1}", at_x(a), at_y(b)))
                .collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                places.join(" ")
            );
            for place in &places {
                if let Some((a, b)) = place.split_once(',') {
                    let _ =
                        writeln!(out, "<circle cx=\"{a}\" cy=\"{b}\" r=\"3\" fill=\"{colour}\"/>");
                }
            }
            let level = top + 16.0 + 16.0 * number as f64;
            let _ = writeln!(
                out,
                "<rect x=\"{}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>",
                left + 8.0,
                level - 9.0
            );
            out += &text((left + 24.0, level), "start", &line.name);
        }
        out + "</svg>\n"
    }

    /// Writes the plot to a file, with its directory.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let context = || format!("write the plot {}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(context)?;
        }
        std::fs::write(path, self.svg()).with_context(context)
    }
}

/// A number for an axis.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        _ if value >= 1e6 => (value / 1e6, "M"),
        _ if value >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let digits = format!("{value:.2}");
    format!("{}{unit}", digits.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(scale: Scale, points: &[(f64, f64)]) -> Plot {
        let line = Line { name: "a < b".into(), points: points.to_vec() };
        Plot {
            title: "t".into(),
            x: ("x".into(), scale),
            y: ("y".into(), scale),
            lines: vec![line],
        }
    }

    #[test]
    fn a_plot_is_drawn_within_its_frame_whatever_is_in_it() {
        for scale in [Scale::Linear, Scale::Logarithmic] {
            for points in [&[][..], &[(0.0, 0.0)], &[(1.0, 5.0), (1e6, 5.0)], &[(3.0, 0.1)]] {
                let svg = plot(scale, points).svg();
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                assert_eq!(svg.matches("<circle").count(), points.len());
                assert!(svg.contains("a &lt; b"));
            }
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(nice_above(0.0), 1.0);
        assert_eq!(nice_above(3.0), 5.0);
        assert_eq!(nice_above(70.0), 100.0);
        assert_eq!(["1k", "2.5M", "0.2", "0"], [1e3, 2.5e6, 0.2, 0.0].map(short));
    }
}
