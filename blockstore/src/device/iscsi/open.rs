//! Opening a LUN: URL and secrets, identity, the first login, the proofs.

use super::context::Login;
use super::identity::{Claim, Identity, default_initiator};
use super::link::{self, Link};
use super::outcome::{Class, Failure};
use super::prepare::Facts;
use super::session::Timing;
use super::url::IscsiUrl;
use super::worker::{Config, Worker};
use super::{IO_MAX, IscsiDevice, UNMAP_MAX, probe, scsi, secret};
use crate::device::{Device, DeviceError, DeviceErrorKind, DeviceInfo, OpenOptions};
use crate::types::BLOCK_SIZE;
use std::ffi::CString;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// For everything that opening takes.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// Between two commands on the first session meanwhile.
const PROOF_PAUSE: Duration = Duration::from_millis(25);
/// How long a command waits for a lost session to come back.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a command may be under way.
const COMMAND_MAX: Duration = Duration::from_secs(30);
const TCP_USER_TIMEOUT_MS: i32 = 3000;
/// Pause between two attempts to claim the identity, which a device just dropped may still hold.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

/// Opens the LUN that `url` names: `iscsi://[user@]host[:port]/target-iqn/lun`, with the parameters
/// `initiator` and `chap-secret-file`.
///
/// # Errors
/// `Unreachable` when the target does not answer or refuses the login, `Reserved` when another host holds
/// the LUN or another process of this host has it open for writing, `Unsupported` when the URL or the
/// target will not do; each says what to do. Takes at most some ten seconds.
pub async fn open(url: &str, options: &OpenOptions) -> Result<Device, DeviceError> {
    let parsed = IscsiUrl::parse(url);
    let name = match &parsed {
        Ok(url) => url.to_string(),
        Err(_) => without_secrets(url),
    };
    let opened = match parsed {
        Ok(url) => match tokio::time::timeout(OPEN_MAX, connect(url, options)).await {
            Ok(opened) => opened,
            Err(_) => Err(Failure::new(
                DeviceErrorKind::Unreachable,
                format!("the target did not answer within {} s", OPEN_MAX.as_secs()),
            )),
        },
        Err(message) => Err(Failure::new(DeviceErrorKind::Unsupported, message)),
    };
    opened.map_err(|Failure { kind, message }| DeviceError {
        kind,
        device: name,
        operation: "open",
        offset: 0,
        len: 0,
        message,
    })
}

async fn connect(url: IscsiUrl, options: &OpenOptions) -> Result<Device, Failure> {
    let initiator = url.initiator.clone().or_else(|| options.initiator_name.clone());
    let initiator = initiator.unwrap_or_else(default_initiator);
    let identity = match options.read_only {
        true => Identity::passing(&initiator),
        false => Identity::lasting(&initiator, &url.target, url.lun),
    };
    let login = login(&url, options, &identity).await?;
    let reserve = (options.exclusive && !options.read_only).then_some(identity.key);
    let claim = match options.read_only {
        true => None,
        false => Some(claim(&identity, &url.target).await?),
    };
    let (link, facts) = start(login, reserve, claim).await?;
    if !options.read_only {
        prove_reinstatement(&link).await?;
    }
    let device = inspect(&url, options, link, &facts).await?;
    Ok(Arc::new(device))
}

async fn login(
    url: &IscsiUrl,
    options: &OpenOptions,
    identity: &Identity,
) -> Result<Login, Failure> {
    let unusable = |message: String| Failure::new(DeviceErrorKind::Unsupported, message);
    let file = url.secret_file.as_deref().or(options.chap_file.as_deref());
    let chap = secret::find(url.user.as_deref(), file).map_err(unusable)?;
    let text = |text: &str| {
        CString::new(text).map_err(|_| unusable(format!("{text:?} must not contain a NUL")))
    };
    Ok(Login {
        portal: text(&resolve(url).await?.to_string())?,
        target: text(&url.target)?,
        lun: url.lun_field(),
        initiator: text(&identity.initiator)?,
        isid: identity.isid,
        chap: chap.map(|chap| (chap.user, chap.secret)),
        tcp_user_timeout_ms: TCP_USER_TIMEOUT_MS,
    })
}

/// The portal's address, looked up once: another address could belong to another portal group, where
/// the same ISID does not reinstate the session.
async fn resolve(url: &IscsiUrl) -> Result<SocketAddr, Failure> {
    let (host, port) = (url.host.clone(), url.port);
    let found = tokio::task::spawn_blocking(move || (host.as_str(), port).to_socket_addrs()).await;
    let unknown = |reason: String| {
        let message = format!("the host {} cannot be resolved: {reason}; check the name", url.host);
        Failure::new(DeviceErrorKind::Unreachable, message)
    };
    match found {
        Ok(Ok(mut addresses)) => addresses.next().ok_or_else(|| unknown("no address".to_owned())),
        Ok(Err(error)) => Err(unknown(error.to_string())),
        Err(error) => Err(unknown(error.to_string())),
    }
}

async fn claim(identity: &Identity, target: &str) -> Result<Claim, Failure> {
    // A device that was dropped logs out in its own time.
    let tries = Duration::from_secs(5).as_millis() / CLAIM_PAUSE.as_millis();
    for _ in 0..tries {
        let claimed = identity.claim(target).map_err(|error| {
            let message = format!("a local socket that guards the session failed: {error}");
            Failure::new(DeviceErrorKind::Io, message)
        })?;
        if let Some(claim) = claimed {
            return Ok(claim);
        }
        tokio::time::sleep(CLAIM_PAUSE).await;
    }
    Err(Failure::new(
        DeviceErrorKind::Reserved,
        format!(
            "another process on this host has this LUN open for writing as {}: stop it, or give \
             this one another name with ?initiator=IQN",
            identity.initiator
        ),
    ))
}

async fn start(
    login: Login,
    reserve: Option<u64>,
    claim: Option<Claim>,
) -> Result<(Link, Facts), Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(DeviceErrorKind::Io, format!("the session thread cannot start: {error}"))
    };
    let (link, requests) = link::pair().map_err(failed)?;
    let (opened, facts) = oneshot::channel();
    let config = Config {
        login,
        reserve,
        timing: Timing::default(),
        wait_max: WAIT_MAX,
        command_max: COMMAND_MAX,
    };
    let shared = link.shared.clone();
    std::thread::Builder::new()
        .name("iscsi-session".to_owned())
        .spawn(move || {
            Worker::new(config, requests, shared, opened).run();
            drop(claim);
        })
        .map_err(failed)?;
    let facts = facts.await.unwrap_or_else(|_| {
        Err(Failure::new(DeviceErrorKind::Io, "the session thread ended early; see the log"))
    })?;
    Ok((link, facts))
}

/// Has a second login made under the same name and ISID: the target must end the first session.
async fn prove_reinstatement(link: &Link) -> Result<(), Failure> {
    let mut proof = link.prove().await?;
    // Some targets look whether a connection was ended only when something comes in on it.
    let proof = loop {
        let _ = link.send(Class::Query, scsi::test_unit_ready(), vec![], 0).await;
        tokio::select! {
            proof = &mut proof => break proof,
            () = tokio::time::sleep(PROOF_PAUSE) => {}
        }
    };
    match proof {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(Failure::new(
            DeviceErrorKind::Unsupported,
            "the target does not reinstate sessions: a second login under the same name left the \
             first one alive, so a write cut off by an outage could land after a newer one. Set \
             up CHAP for this target (tgtd reinstates only then), or use another target",
        )),
        Ok(Err(message)) => Err(Failure::new(
            DeviceErrorKind::Unreachable,
            format!("the second login that proves session reinstatement failed: {message}"),
        )),
        Err(_) => {
            Err(Failure::new(DeviceErrorKind::Unreachable, "the session ended during its proof"))
        }
    }
}

async fn inspect(
    url: &IscsiUrl,
    options: &OpenOptions,
    link: Link,
    facts: &Facts,
) -> Result<IscsiDevice, Failure> {
    let block_len = facts.capacity.block_len;
    if block_len != 512 && block_len != 4096 {
        let message = format!("logical blocks of {block_len} bytes are not supported: 512 or 4096");
        return Err(Failure::new(DeviceErrorKind::Unsupported, message));
    }
    let unit = BLOCK_SIZE as u64;
    let bytes = |blocks: u64| blocks.saturating_mul(u64::from(block_len)) / unit * unit;
    let limits = probe::block_limits(&link).await?;
    let limit = |told: u32, ours: u64| match bytes(u64::from(told)) {
        0 => ours,
        told => told.min(ours),
    };
    let (discard_granularity, discard_alignment) = limits.unmap_pieces(block_len, unit);
    let (compare_and_write, discard) = match options.read_only {
        true => (false, false),
        false => (probe::compare_and_write(&link, facts).await?, probe::unmap(&link).await?),
    };
    Ok(IscsiDevice {
        info: DeviceInfo {
            url: url.to_string(),
            capacity: bytes(facts.capacity.blocks),
            logical_block: block_len,
            compare_and_write,
            discard,
            discard_granularity,
            discard_alignment,
        },
        link,
        read_only: options.read_only,
        io_max: limit(limits.transfer_max, IO_MAX),
        unmap_max: limit(limits.unmap_max, UNMAP_MAX),
    })
}

/// A URL that could not be parsed, without what may be a secret.
fn without_secrets(url: &str) -> String {
    let url = url.split_once('?').map_or(url, |(url, _)| url);
    match url.rsplit_once('@') {
        Some((_, rest)) => format!("iscsi://…@{rest}"),
        None => url.to_owned(),
    }
}
