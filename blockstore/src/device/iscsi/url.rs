//! `iscsi://[user@]host[:port]/iqn/lun[?initiator=IQN&chap-secret-file=PATH]`: parsing only.
//!
//! A password in a URL would end up in process lists and logs, so one is refused, with words.

use std::fmt;
use std::path::PathBuf;

/// The well-known port of iSCSI.
const DEFAULT_PORT: u16 = 3260;
/// Longest iSCSI name (RFC 7143 4.2.7.1); libiscsi holds 255 bytes.
const NAME_LEN_MAX: usize = 223;
/// Highest LUN of the flat addressing method (SAM-5 4.7.3).
const LUN_MAX: u16 = 0x3fff;

/// A parsed URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IscsiUrl {
    /// CHAP user name.
    pub user: Option<String>,
    /// Host name or address, without brackets.
    pub host: String,
    pub port: u16,
    /// iSCSI name of the target.
    pub target: String,
    pub lun: u16,
    /// iSCSI name to log in with.
    pub initiator: Option<String>,
    /// File that holds the CHAP secret.
    pub secret_file: Option<PathBuf>,
}

impl IscsiUrl {
    /// Parses `url`. The error says what is wrong and never repeats a secret.
    pub fn parse(url: &str) -> Result<Self, String> {
        let form = "the form is iscsi://[user@]host[:port]/target-iqn/lun";
        let rest = url.strip_prefix("iscsi://").ok_or_else(|| format!("not iscsi://…; {form}"))?;
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(path, query)| (path, query));
        let mut parts = rest.splitn(3, '/');
        let (portal, target, lun) = match (parts.next(), parts.next(), parts.next()) {
            (Some(portal), Some(target), Some(lun)) if !lun.contains('/') => (portal, target, lun),
            _ => return Err(format!("the target name or the LUN is missing; {form}")),
        };
        let (user, portal) = match portal.rsplit_once('@') {
            Some((user, portal)) => (Some(parse_user(user)?), portal),
            None => (None, portal),
        };
        let (host, port) = parse_portal(portal)?;
        let target = decode(target)?;
        check_name(&target, "target")?;
        let lun = match lun.parse() {
            Ok(lun) if lun <= LUN_MAX => lun,
            _ => return Err(format!("the LUN {lun:?} is not a number from 0 to {LUN_MAX}")),
        };
        let mut parsed = Self { user, host, port, target, lun, initiator: None, secret_file: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            parsed.apply(pair)?;
        }
        Ok(parsed)
    }

    fn apply(&mut self, pair: &str) -> Result<(), String> {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value)?;
        match key {
            "initiator" => {
                check_name(&value, "initiator")?;
                self.initiator = Some(value);
            }
            "chap-secret-file" => self.secret_file = Some(PathBuf::from(value)),
            // Only the key: the value might be a secret that does not belong here.
            _ => {
                return Err(format!(
                    "unknown parameter {key:?}; known are initiator and chap-secret-file"
                ));
            }
        }
        Ok(())
    }

    /// Host and port, with brackets around an IPv6 address.
    pub fn portal(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The SCSI LUN field's first level: peripheral addressing below 256, else flat (SAM-5 4.7).
    pub fn lun_field(&self) -> u16 {
        if self.lun < 256 { self.lun } else { 0x4000 | self.lun }
    }
}

/// The URL without its query: names the device in messages.
impl fmt::Display for IscsiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("iscsi://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        write!(f, "{}/{}/{}", self.portal(), self.target, self.lun)
    }
}

fn parse_user(user: &str) -> Result<String, String> {
    // libiscsi's own URLs write user%password; a percent sign cannot be an escape here.
    if user.contains([':', '%']) {
        return Err(
            "a password must not be part of the URL, where others can see it: put it into \
                    a file named by ?chap-secret-file=PATH, or into BALLAST_CHAP_SECRET"
                .to_owned(),
        );
    }
    if user.is_empty() || user.len() > 255 {
        return Err("the user before '@' must have 1 to 255 characters".to_owned());
    }
    Ok(user.to_owned())
}

fn parse_portal(portal: &str) -> Result<(String, u16), String> {
    let (host, port) = if let Some(rest) = portal.strip_prefix('[') {
        let (host, port) =
            rest.split_once(']').ok_or_else(|| format!("']' is missing in {portal:?}"))?;
        (host, port.strip_prefix(':').or(port.is_empty().then_some("")))
    } else {
        match portal.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (portal, Some("")),
        }
    };
    let port = match port {
        Some("") => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| format!("{port:?} is not a port number"))?,
        None => return Err(format!("text after ']' in {portal:?} is not a port")),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || host.len() > 253 || !host.chars().all(plain) {
        return Err(format!("{host:?} is not a host name or address"));
    }
    Ok((host.to_owned(), port))
}

fn check_name(name: &str, whose: &str) -> Result<(), String> {
    let known = ["iqn.", "eui.", "naa."].iter().any(|prefix| name.starts_with(prefix));
    let printable = |c: char| !c.is_control() && !c.is_whitespace();
    if !known || name.len() > NAME_LEN_MAX || !name.chars().all(printable) {
        return Err(format!(
            "the {whose} name {name:?} is not an iSCSI name: it must start with iqn., eui. or \
             naa. and have at most {NAME_LEN_MAX} characters without blanks"
        ));
    }
    Ok(())
}

/// Decodes %XX escapes.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digit = |at: usize| tail.get(at).and_then(|&byte| char::from(byte).to_digit(16));
        match (digit(0), digit(1)) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("'%' is not followed by two hexadecimal digits".to_owned()),
        }
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| "an escaped part is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_url_comes_apart_and_its_name_has_no_query() {
        let url = IscsiUrl::parse(
            "iscsi://bob@san1:3261/iqn.2001-04.com.example%3Adisk/300\
             ?initiator=iqn.2026-01.org.ballast:h1&chap-secret-file=/etc/secret",
        )
        .expect("a valid URL");
        assert_eq!(url.user.as_deref(), Some("bob"));
        assert_eq!((url.host.as_str(), url.port, url.lun), ("san1", 3261, 300));
        assert_eq!(url.target, "iqn.2001-04.com.example:disk");
        assert_eq!(url.initiator.as_deref(), Some("iqn.2026-01.org.ballast:h1"));
        assert_eq!(url.secret_file, Some(PathBuf::from("/etc/secret")));
        assert_eq!(url.lun_field(), 0x4000 | 300);
        assert_eq!(url.to_string(), "iscsi://bob@san1:3261/iqn.2001-04.com.example:disk/300");
    }

    #[test]
    fn defaults_and_ipv6() {
        let url = IscsiUrl::parse("iscsi://[fe80::1]/iqn.x/0").expect("a valid URL");
        assert_eq!((url.host.as_str(), url.port), ("fe80::1", 3260));
        assert_eq!(url.portal(), "[fe80::1]:3260");
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        for url in ["iscsi://bob:hunter2@h/iqn.x/0", "iscsi://bob%hunter2@h/iqn.x/0"] {
            let error = IscsiUrl::parse(url).expect_err("a password in a URL");
            assert!(error.contains("chap-secret-file") && !error.contains("hunter2"), "{error}");
        }
        let error = IscsiUrl::parse("iscsi://h/iqn.x/0?password=hunter2").expect_err("a password");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn malformed_urls_are_refused() {
        for url in [
            "http://h/iqn.x/0",
            "iscsi://h/iqn.x",
            "iscsi://h/iqn.x/",
            "iscsi://h/iqn.x/0/1",
            "iscsi://h/iqn.x/16384",
            "iscsi://h:port/iqn.x/0",
            "iscsi:///iqn.x/0",
            "iscsi://h/disk/0",
            "iscsi://h/iqn.x%0/0",
            "iscsi://h/iqn.x%00/0",
            "iscsi://@h/iqn.x/0",
            "iscsi://[::1/iqn.x/0",
            "iscsi://[::1]x/iqn.x/0",
        ] {
            assert!(IscsiUrl::parse(url).is_err(), "{url}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "iscsi://.{0,60}") {
            let _ = IscsiUrl::parse(&text);
        }
    }
}
