//! Names of virtual disks.

use crate::error::{Result, StoreError, StoreErrorKind};

/// Longest name, in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 255;

/// Checks a name for a virtual disk: 1 to 255 bytes of UTF-8 without `/`, `@` (which separates a disk
/// from its snapshot), NUL and control characters, and neither `.` nor `..`.
///
/// # Errors
/// `Invalid`, saying which rule the name breaks.
pub fn check_name(name: &str) -> Result<()> {
    let problem = if name.is_empty() {
        "a name needs at least one character".to_owned()
    } else if name.len() > NAME_BYTES_MAX {
        format!("the name has {} bytes, at most {NAME_BYTES_MAX} are allowed", name.len())
    } else if name == "." || name == ".." {
        "'.' and '..' are not allowed as names".to_owned()
    } else if let Some(bad) = name.chars().find(|&c| c == '/' || c == '@' || c.is_control()) {
        format!("the character {bad:?} is not allowed; choose a name without it")
    } else {
        return Ok(());
    };
    Err(StoreError::new(StoreErrorKind::Invalid, format!("VDI name {}", shorten(name)), problem))
}

fn shorten(name: &str) -> String {
    let head: String = name.chars().take(40).collect();
    if head.len() < name.len() { format!("{head:?}…") } else { format!("{head:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_pass() {
        let longest = "x".repeat(255);
        for name in ["a", "web-01", "Дисқ 1", "a.b", "...", longest.as_str(), "-", " "] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        let long = "x".repeat(300);
        for (name, word) in [
            ("", "at least one"),
            (".", "'..'"),
            ("..", "'..'"),
            ("a/b", "'/'"),
            ("a@b", "'@'"),
            ("a\0b", "'\\0'"),
            ("a\nb", "'\\n'"),
            ("\u{7f}", "\\u{7f}"),
            (long.as_str(), "300 bytes"),
        ] {
            let error = check_name(name).expect_err(name);
            assert_eq!(error.kind, StoreErrorKind::Invalid);
            assert!(error.to_string().contains(word), "{error}");
            assert!(error.to_string().len() < 200);
        }
    }
}
