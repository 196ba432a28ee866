//! A TCP relay in user space that delays, caps, holds, drops or cuts what passes.
//!
//! Each connection has a reader and a writer thread per direction with a queue between them, so that bytes
//! which an initiator sent can reach the target long after that initiator gave the connection up.
//! Held and black-holed connections stay so; connections made later are not concerned.

use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often blocked threads look whether the relay is at its end.
const POLL: Duration = Duration::from_millis(20);
/// Bytes queued in one direction of one connection at most; then its sender is no longer read.
const QUEUE_MAX: usize = 64 << 20;
const CHUNK: usize = 64 << 10;

/// A listening relay; ends with its owner.
#[derive(Debug)]
pub struct TcpRelay {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    ended: AtomicBool,
    /// New connections are closed at once.
    refusing: AtomicBool,
    /// Added to each chunk, in microseconds.
    delay: AtomicU64,
    /// Bytes per second in each direction; 0 is no limit.
    rate: AtomicU64,
    connections: Mutex<Vec<Arc<Connection>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Forward,
    /// Queue what comes, deliver nothing.
    Hold,
    /// Throw away what comes.
    Drop,
}

#[derive(Debug)]
struct Connection {
    mode: Mutex<Mode>,
    changed: Condvar,
    ended: AtomicBool,
    /// Initiator to target, and back.
    bytes: [AtomicU64; 2],
}

impl TcpRelay {
    /// Listens on a free loopback port and relays to `target`.
    pub fn start(target: SocketAddr) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("the relay finds no free port")?;
        listener.set_nonblocking(true).context("the relay's socket")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            ended: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            connections: Mutex::default(),
            threads: Mutex::default(),
        });
        let for_acceptor = shared.clone();
        let acceptor = std::thread::spawn(move || accept(&listener, &for_acceptor));
        Ok(Self { address, shared, acceptor: Some(acceptor) })
    }

    /// Where initiators connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Delays each chunk that passes, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay.store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// Caps the rate in each direction, in bytes per second; 0 lifts the cap.
    pub fn cap(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
    }

    /// Holds what present connections carry from now on, both ways; later ones pass.
    pub fn hold(&self) {
        self.set_mode(Mode::Hold);
    }

    /// Delivers what was held, and lets present connections pass again.
    pub fn release(&self) {
        self.set_mode(Mode::Forward);
    }

    /// Silently throws away what present connections carry from now on; later ones pass.
    pub fn black_hole(&self) {
        self.set_mode(Mode::Drop);
    }

    /// Closes new connections at once, or no longer.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, Ordering::Relaxed);
    }

    /// Cuts all present connections with a reset.
    pub fn cut(&self) {
        for connection in lock(&self.shared.connections).drain(..) {
            connection.end();
        }
    }

    /// Connections relayed so far and not cut.
    pub fn connections(&self) -> usize {
        let all = lock(&self.shared.connections);
        all.iter().filter(|connection| !connection.has_ended()).count()
    }

    /// Bytes that initiators sent on present connections, delivered or not.
    pub fn bytes_from_initiators(&self) -> u64 {
        let all = lock(&self.shared.connections);
        all.iter().map(|connection| connection.bytes[0].load(Ordering::Relaxed)).sum()
    }

    fn set_mode(&self, mode: Mode) {
        for connection in lock(&self.shared.connections).iter() {
            *lock(&connection.mode) = mode;
            connection.changed.notify_all();
        }
    }
}

impl Drop for TcpRelay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.cut();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.cut();
        for thread in lock(&self.shared.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Connection {
    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.ended.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) if !shared.refusing.load(Ordering::Relaxed) => {
                // A target that refuses closes the initiator's connection, too.
                if let Ok(server) = TcpStream::connect(shared.target) {
                    let _ = relay(shared, client, server);
                }
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

fn relay(shared: &Arc<Shared>, client: TcpStream, server: TcpStream) -> Result<()> {
    let connection = Arc::new(Connection {
        mode: Mutex::new(Mode::Forward),
        changed: Condvar::new(),
        ended: AtomicBool::new(false),
        bytes: Default::default(),
    });
    for socket in [&client, &server] {
        socket.set_nonblocking(false)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(POLL))?;
        socket.set_write_timeout(Some(POLL))?;
    }
    let (client, server) = (Arc::new(client), Arc::new(server));
    let mut threads = lock(&shared.threads);
    for (direction, from, to) in [(0, &client, &server), (1, &server, &client)] {
        let queue = Arc::new(Queue::default());
        let (from, to) = (from.clone(), to.clone());
        let (c, q) = (connection.clone(), queue.clone());
        threads.push(std::thread::spawn(move || read(&from, &q, &c, direction)));
        let (c, s) = (connection.clone(), shared.clone());
        threads.push(std::thread::spawn(move || write(&to, &queue, &c, &s)));
    }
    lock(&shared.connections).push(connection);
    Ok(())
}

/// Bytes on their way, in chunks; an empty chunk is the end of the stream.
#[derive(Default)]
struct Queue {
    chunks: Mutex<VecDeque<Vec<u8>>>,
    len: AtomicU64,
}

fn read(mut from: &TcpStream, queue: &Queue, connection: &Connection, direction: usize) {
    let mut buf = vec![0; CHUNK];
    while !connection.has_ended() {
        if queue.len.load(Ordering::Relaxed) > QUEUE_MAX as u64 {
            std::thread::sleep(POLL);
            continue;
        }
        let len = match from.read(&mut buf) {
            Ok(len) => len,
            Err(error) if is_timeout(&error) => continue,
            // Reset by its sender: what came before is still delivered.
            Err(_) => 0,
        };
        if *lock(&connection.mode) != Mode::Drop {
            queue.len.fetch_add(len as u64, Ordering::Relaxed);
            lock(&queue.chunks).push_back(buf[..len].to_vec());
            connection.changed.notify_all();
        }
        connection.bytes[direction].fetch_add(len as u64, Ordering::Relaxed);
        if len == 0 {
            return;
        }
    }
}

fn write(to: &TcpStream, queue: &Queue, connection: &Connection, shared: &Shared) {
    while !connection.has_ended() {
        {
            let mode = lock(&connection.mode);
            let idle = *mode != Mode::Forward || lock(&queue.chunks).is_empty();
            if idle {
                drop(connection.changed.wait_timeout(mode, POLL));
                continue;
            }
        }
        let Some(chunk) = lock(&queue.chunks).pop_front() else { continue };
        queue.len.fetch_sub(chunk.len() as u64, Ordering::Relaxed);
        let delay = shared.delay.load(Ordering::Relaxed);
        let rate = shared.rate.load(Ordering::Relaxed);
        let at_rate = (chunk.len() as u64 * 1_000_000).checked_div(rate).unwrap_or(0);
        std::thread::sleep(Duration::from_micros(delay + at_rate));
        if chunk.is_empty() {
            let _ = to.shutdown(std::net::Shutdown::Write);
            return;
        }
        if !write_all(to, &chunk, connection) {
            return;
        }
    }
    // Closed by the last of the four threads, with a reset instead of an orderly end.
    let _ = nix::sys::socket::setsockopt(
        &to,
        nix::sys::socket::sockopt::Linger,
        &libc::linger { l_onoff: 1, l_linger: 0 },
    );
}

fn write_all(mut to: &TcpStream, mut rest: &[u8], connection: &Connection) -> bool {
    while !rest.is_empty() && !connection.has_ended() {
        match to.write(rest) {
            Ok(len) => rest = &rest[len..],
            Err(error) if is_timeout(&error) => {}
            Err(_) => return false,
        }
    }
    true
}

fn is_timeout(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo_server() -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let thread = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a connection");
            let mut buf = [0; 100];
            while let Ok(len @ 1..) = socket.read(&mut buf) {
                if socket.write_all(&buf[..len]).is_err() {
                    return;
                }
            }
        });
        (address, thread)
    }

    #[test]
    fn bytes_pass_are_held_and_released_then_cut() {
        let (address, server) = echo_server();
        let relay = TcpRelay::start(address).expect("a relay");
        let mut client = TcpStream::connect(relay.address()).expect("connect");
        let mut buf = [0; 4];
        client.write_all(b"ping").expect("write");
        client.read_exact(&mut buf).expect("read");
        assert_eq!((&buf, relay.connections()), (b"ping", 1));

        relay.hold();
        client.write_all(b"late").expect("write");
        client.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        assert!(is_timeout(&client.read(&mut buf).expect_err("held")));
        relay.release();
        client.set_read_timeout(None).expect("timeout");
        client.read_exact(&mut buf).expect("read");
        assert_eq!(&buf, b"late");

        relay.cut();
        assert!(matches!(client.read(&mut buf), Ok(0) | Err(_)));
        drop(relay);
        server.join().expect("the server ended");
    }
}
