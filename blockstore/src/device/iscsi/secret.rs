//! CHAP user and secret: from a file or the environment, never from a URL or an argument.

use std::ffi::CString;
use std::fmt;
use std::path::Path;

/// `USER:SECRET`.
const BOTH_VARIABLE: &str = "BALLAST_CHAP";
/// The secret alone; the user is in the URL.
const SECRET_VARIABLE: &str = "BALLAST_CHAP_SECRET";

/// User and secret; neither is ever printed together.
#[derive(Clone, PartialEq, Eq)]
pub struct Chap {
    pub user: CString,
    pub secret: CString,
}

impl fmt::Debug for Chap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chap({:?})", self.user)
    }
}

/// Finds the credentials: the file if one is named, else the environment. `None`: log in without.
pub fn find(url_user: Option<&str>, file: Option<&Path>) -> Result<Option<Chap>, String> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|error| {
            format!("the CHAP secret file {} cannot be read: {error}", path.display())
        })?;
        return parse(url_user, first_line(&text))
            .map_err(|error| format!("the CHAP secret file {}: {error}", path.display()))
            .map(Some);
    }
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    match (url_user, variable(SECRET_VARIABLE), variable(BOTH_VARIABLE)) {
        (Some(user), Some(secret), _) => chap(user, &secret).map(Some),
        (user, _, Some(both)) => parse(user, first_line(&both))
            .map_err(|error| format!("the variable {BOTH_VARIABLE}: {error}"))
            .map(Some),
        (Some(user), None, None) => Err(format!(
            "the URL names the CHAP user {user:?}, but there is no secret: name a file with \
             USER:SECRET by ?chap-secret-file=PATH, or set {SECRET_VARIABLE}"
        )),
        (None, _, None) => Ok(None),
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("").trim_end()
}

/// `USER:SECRET`, or the secret alone where the user is known.
fn parse(url_user: Option<&str>, line: &str) -> Result<Chap, String> {
    match (url_user, line.split_once(':')) {
        (Some(user), Some((same, secret))) if user == same => chap(user, secret),
        (Some(user), _) => chap(user, line),
        (None, Some((user, secret))) => chap(user, secret),
        (None, None) => Err("the first line must be USER:SECRET".to_owned()),
    }
}

fn chap(user: &str, secret: &str) -> Result<Chap, String> {
    // libiscsi holds 255 bytes; most targets want 12 to 16.
    let text = |what: &str, text: &str| match CString::new(text) {
        Ok(text) if (1..=255).contains(&text.as_bytes().len()) => Ok(text),
        _ => Err(format!("the CHAP {what} must have 1 to 255 characters and no NUL")),
    };
    Ok(Chap { user: text("user", user)?, secret: text("secret", secret)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(chap: &Chap) -> (&str, &str) {
        (chap.user.to_str().expect("text"), chap.secret.to_str().expect("text"))
    }

    #[test]
    fn a_file_gives_user_and_secret_or_the_secret_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("chap");
        for (user, content, expected) in [
            (None, "bob:se:cret\nmore\n", ("bob", "se:cret")),
            (Some("bob"), "bob:secret\n", ("bob", "secret")),
            (Some("bob"), "secret\n", ("bob", "secret")),
            (Some("bob"), "se:cret", ("bob", "se:cret")),
        ] {
            std::fs::write(&path, content).expect("write");
            let chap = find(user, Some(&path)).expect("credentials").expect("credentials");
            assert_eq!(pair(&chap), expected);
            assert!(!format!("{chap:?}").contains("cret"));
        }
        for content in ["", "secret", ":", "bob:", "bob:a\0b"] {
            std::fs::write(&path, content).expect("write");
            let error = find(None, Some(&path)).expect_err("no credentials");
            assert!(error.contains("chap") && !error.contains("secret:"), "{error}");
        }
        let error = find(None, Some(&dir.path().join("none"))).expect_err("no file");
        assert!(error.contains("cannot be read"), "{error}");
    }
}
