//! Opening a store's device and the store on it.

use crate::config::DeviceArgs;
use crate::error::{Failure, Kind, Result};
use blockstore::device::{self, Device};
use blockstore::{OpenOptions, Store};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause between attempts to reach a store.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What the device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looking only; goes together with an agent that uses it.
    ReadOnly,
    /// Beside other hosts.
    Shared,
    /// With every other writer kept out.
    Exclusive,
}

/// The URL without what stands between `://` and `@`.
#[must_use]
pub fn without_secrets(url: &str) -> String {
    match url.split_once("://").map(|(scheme, rest)| (scheme, rest.rsplit_once('@'))) {
        Some((scheme, Some((_, place)))) => format!("{scheme}://…@{place}"),
        _ => url.to_owned(),
    }
}

/// Opens the device of a store. `create_size` creates a file that does not exist.
pub async fn open_device(
    url: &str,
    how: &DeviceArgs,
    access: Access,
    create_size: Option<u64>,
) -> Result<Device> {
    let options = device::OpenOptions {
        exclusive: access == Access::Exclusive,
        read_only: access == Access::ReadOnly,
        create_size,
        initiator_name: how.initiator_name.clone(),
        chap_file: how.chap_file.clone(),
    };
    device::open(url, &options).await.map_err(|error| Failure::from(error).within("store"))
}

/// Opens a store for looking.
pub async fn open_read_only(url: &str, how: &DeviceArgs) -> Result<Arc<Store>> {
    let device = open_device(url, how, Access::ReadOnly, None).await?;
    Ok(Store::open(device, OpenOptions::read_only()).await?)
}

/// Makes attempts to open a store that cannot be reached until `patience` is over.
pub async fn patiently<T, F: Future<Output = Result<T>>>(
    attempt: impl Fn() -> F,
    patience: Duration,
    progress: &(dyn Fn(&str) + Sync),
) -> Result<T> {
    let deadline = Instant::now() + patience;
    let mut told = false;
    loop {
        let failure = match attempt().await {
            Err(failure) if failure.kind == Kind::Unavailable => failure,
            result => return result,
        };
        if Instant::now() + RETRY_PAUSE >= deadline {
            let advice =
                "; check the device or the network, or give the agent more time with --store-wait";
            return Err(Failure::new(failure.kind, format!("{failure}{advice}")));
        }
        if !told {
            progress(&format!("waiting for the store: {failure}"));
            told = true;
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}
