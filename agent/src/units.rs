//! Sizes and durations as people write them: `4GiB`, `512MiB`, `1T`, `65536`; `30s`, `500ms`, `2m`.
//!
//! Every unit of size is binary (`4G`, `4GB` and `4GiB` are the same 2^32 bytes), as with lvm and QEMU: a disk that came out
//! smaller than asked for would be the worse surprise.

use std::time::Duration;

/// Parses a size in bytes. Whole and decimal numbers are taken (`1.5GiB`) as long as the result is a whole
/// number of bytes. Zero is refused: nothing here can have that size.
///
/// # Errors
/// Words that name the text and what is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err(not_a_size(text)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) {
        return Err(not_a_size(text));
    }
    let too_large = || format!("size '{text}' is too large: the limit is 2^64 - 1 bytes");
    let bytes = (whole.parse::<u64>().map_err(|_| too_large())?)
        .checked_mul(1 << shift)
        .ok_or_else(too_large)?
        .checked_add(fraction_bytes(text, fraction, shift)?)
        .ok_or_else(too_large)?;
    if bytes == 0 {
        return Err("a size of 0 makes no sense here: give at least 4KiB".into());
    }
    Ok(bytes)
}

fn not_a_size(text: &str) -> String {
    format!(
        "'{text}' is not a size: write a number and a unit, like 512MiB, 4GiB or 1T, or plain bytes"
    )
}

/// The bytes of `0.fraction` of a unit; an inexact result is refused.
fn fraction_bytes(text: &str, fraction: &str, shift: u32) -> Result<u64, String> {
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Ok(0);
    }
    let inexact = || format!("size '{text}' is not a whole number of bytes");
    // 2^50 / 10^n is no whole number for n > 50; 10^18 is what fits comfortably.
    if fraction.len() > 18 {
        return Err(inexact());
    }
    let numerator = fraction.parse::<u128>().map_err(|_| not_a_size(text))? << shift;
    let denominator = 10u128.pow(fraction.len() as u32);
    if !numerator.is_multiple_of(denominator) {
        return Err(inexact());
    }
    Ok((numerator / denominator) as u64)
}

/// Formats bytes for people: `4.0 GiB`, `512 B`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Parses a duration: `30s`, `500ms`, `2m`, `1h`, or plain seconds.
///
/// # Errors
/// Words that name the text and what is allowed.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let refused =
        || format!("'{text}' is not a duration: write a whole number and ms, s, m or h, like 30s");
    let per_unit_ms = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refused()),
    };
    let number = number.parse::<u64>().map_err(|_| refused())?;
    number.checked_mul(per_unit_ms).map(Duration::from_millis).ok_or_else(refused)
}

/// Parses how often something is done: `never`, which is zero, as a zero is; days, `30d`; or a duration.
///
/// # Errors
/// Words that name the text and what is allowed.
pub fn parse_every(text: &str) -> Result<Duration, String> {
    let refused = || {
        format!(
            "'{text}' is neither a duration nor 'never': write a whole number and d, h, m or s, like 30d"
        )
    };
    match text.trim().strip_suffix('d') {
        _ if text.trim() == "never" => Ok(Duration::ZERO),
        Some(days) => {
            let days = days.trim().parse::<u64>().map_err(|_| refused())?;
            days.checked_mul(24 * 3600).map(Duration::from_secs).ok_or_else(refused)
        }
        None => parse_duration(text).map_err(|_| refused()),
    }
}

/// Parses bytes in a second: a size, or 0 for no limit.
///
/// # Errors
/// As [`parse_size`].
pub fn parse_rate(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { parse_size(text) }
}

/// Formats milliseconds for people: `850 ms`, `3.2 s`, `4 m 10 s`, `2 h 5 m`.
#[must_use]
pub fn format_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} m {} s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{} h {} m", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_binary_whatever_the_spelling() {
        for text in ["4GiB", "4G", "4gb", "4 GiB", "4096M", "4294967296", "4294967296B", "4.0G"] {
            assert_eq!(parse_size(text), Ok(4 << 30), "{text}");
        }
        assert_eq!(parse_size("1.5KiB"), Ok(1536));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        assert_eq!(parse_size("2PiB"), Ok(2 << 50));
    }

    #[test]
    fn zero_is_refused_with_words() {
        for text in ["0", "0G", "0.0MiB"] {
            assert!(parse_size(text).unwrap_err().contains("size of 0"), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        let all =
            ["", "G", "four", "-1G", "4 4", "4XiB", ".", "1.", ".5G", "1.2.3G", "1e9", "4GiBx"];
        for text in all {
            assert!(parse_size(text).unwrap_err().contains(&format!("'{text}'")), "{text}");
        }
        assert!(parse_size("0.3KiB").unwrap_err().contains("whole number of bytes"));
        assert!(parse_size("16384P").unwrap_err().contains("too large"));
        assert!(parse_size("99999999999999999999").unwrap_err().contains("too large"));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        for text in ["", "s", "1.5s", "1d", "-1s", "99999999999999999999s"] {
            assert!(parse_duration(text).unwrap_err().contains("duration"), "{text}");
        }
    }

    #[test]
    fn formats_for_people() {
        assert_eq!(format_size(0), "0 B");
        assert_eq!(format_size(1023), "1023 B");
        assert_eq!(format_size(1 << 30), "1.0 GiB");
        assert_eq!(format_size((1 << 30) - 1), "1.0 GiB");
        assert_eq!(format_size(u64::MAX), "16.0 EiB");
        assert_eq!(format_ms(850), "850 ms");
        assert_eq!(format_ms(250_000), "4 m 10 s");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,40}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }

        #[test]
        fn plain_bytes_are_exact(bytes in 1u64..) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        }

        #[test]
        fn every_size_can_be_shown(bytes: u64) {
            prop_assert!(format_size(bytes).len() <= 10);
        }
    }
}
