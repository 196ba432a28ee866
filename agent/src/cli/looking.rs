//! How far a walk over a store is, on standard error while that is a terminal.

use super::output::Output;
use gc::Progress;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often it is told.
const TELL: Duration = Duration::from_millis(200);

/// A walk under way.
pub struct Looking {
    progress: Arc<Progress>,
    teller: Option<JoinHandle<()>>,
}

impl Looking {
    /// Begins to tell.
    pub fn begin(out: Output) -> Self {
        let progress = Arc::new(Progress::default());
        let tells = std::io::stderr().is_terminal() && !out.json;
        let teller = tells.then(|| tokio::spawn(tell(Arc::clone(&progress))));
        Self { progress, teller }
    }

    /// Where the walk notes how far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Stops telling.
    pub fn end(&self) {
        if let Some(teller) = &self.teller {
            teller.abort();
            eprint!("\r\x1b[K");
        }
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        self.end();
    }
}

async fn tell(progress: Arc<Progress>) {
    loop {
        tokio::time::sleep(TELL).await;
        eprint!("\r\x1b[K{} nodes read", progress.nodes());
    }
}
