//! What fuzz targets reach of the daemon; built with `--cfg fuzzing` only.

use crate::config::{AgentArgs, AgentConfig};
use crate::control::server::{Gate, Phase, serve};
use crate::host::Host;
use crate::host::store::{Access, open_device};
use crate::names::CONTROL_SOCKET;
use crate::run_dir::RunDir;
use blockstore::{FormatOptions, Store};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

/// Bytes of the store and of the cache: room for some disks, and soon full.
const STORE: u64 = 256 << 20;
const CACHE: u64 = 64 << 20;

/// A daemon as it is, on a store and a cache in files of `folder`, on threads of this process until that ends. Returns
/// the path of its control socket.
#[must_use]
pub fn daemon(folder: &Path) -> PathBuf {
    let (ready, serving) = mpsc::channel();
    let folder = folder.to_owned();
    let socket = folder.join("run").join(CONTROL_SOCKET);
    std::thread::spawn(move || {
        let run_dir = RunDir::claim(&folder.join("run")).expect("a folder of our own");
        let control = run_dir.listen_control().expect("a socket of our own");
        let runtime = tokio::runtime::Runtime::new().expect("threads");
        runtime.block_on(async {
            let gate = Gate::new();
            let host = start(&folder, &run_dir).await;
            gate.set(Phase::Running(host));
            control.set_nonblocking(true).expect("a socket");
            let control = tokio::net::UnixListener::from_std(control).expect("a socket");
            ready.send(()).expect("somebody waits");
            let others = tokio::runtime::Handle::current();
            serve(control, gate, others, std::future::pending()).await;
        });
    });
    serving.recv().expect("the daemon starts");
    socket
}

async fn start(folder: &Path, run_dir: &RunDir) -> std::sync::Arc<Host> {
    let store = format!("file:{}", folder.join("store").display());
    let args = AgentArgs {
        store: Some(store.clone()),
        cache: vec![folder.join("cache")],
        cache_size: Some(CACHE),
        ..AgentArgs::default()
    };
    let device = open_device(&store, &args.device, Access::Exclusive, Some(STORE)).await;
    let options = FormatOptions { size: Some(STORE), ..FormatOptions::default() };
    Store::format(device.expect("a file"), options).await.expect("large enough");
    let config = AgentConfig::load(args, Some(folder.join("run"))).expect("all that is needed");
    Host::start(config, run_dir.path(), &|_| {}).await.expect("nothing is in the way")
}
