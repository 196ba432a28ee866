//! Work that keeps a thread busy, out of the way of the threads that serve everyone.
//!
//! On a runtime of one thread, as a simulation uses, it runs in place: the order of everything then depends on nothing but
//! the program.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::JoinError;

/// Runs `work` and returns its result.
///
/// # Errors
/// The work panicked, or the runtime is shutting down.
pub(crate) async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Ok(work()),
        _ => tokio::task::spawn_blocking(work).await,
    }
}
