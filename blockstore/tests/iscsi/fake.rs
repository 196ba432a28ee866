//! A small iSCSI target in memory that answers as it is told: the ways in which real targets misbehave
//! cannot be had on demand. One LUN, no authentication, no digests, RFC 7143 as far as needed.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub const BLOCKS: usize = 1024;
pub const BLOCK: usize = 4096;
/// Longest data segment in either direction.
const SEGMENT: usize = 262_144;

pub const READ: u8 = 0x88;
pub const WRITE: u8 = 0x8a;
pub const FLUSH: u8 = 0x91;
pub const COMPARE_AND_WRITE: u8 = 0x89;
pub const UNMAP: u8 = 0x42;

/// What to do with a command instead of carrying it out.
#[derive(Clone, Debug)]
pub enum Answer {
    /// CHECK CONDITION with this sense key and additional code.
    Sense(u8, u16),
    /// CHECK CONDITION without sense data.
    NoSense,
    /// Another SCSI status.
    Status(u8),
    /// Carry it out but close the connection instead of answering.
    HangUp,
    /// Send these bytes instead of an answer.
    Bytes(Vec<u8>),
    /// Wait until the initiator cannot send any more, then answer this command and the 63 that may come
    /// after it with a medium error, though they have not been received.
    Ahead,
    /// Claim success and do nothing.
    Lie,
}

/// How the target behaves.
#[derive(Debug)]
pub struct Behaviour {
    /// Answers by opcode, used up in order.
    pub answers: HashMap<u8, VecDeque<Answer>>,
    /// Answers by opcode that stay.
    pub always: HashMap<u8, Answer>,
    /// Commands that an initiator may have open.
    pub window: u32,
    pub block_len: u32,
    /// Serial number in VPD page 83.
    pub serial: u8,
    /// Login status other than success, and a target address to tell.
    pub login: Option<(u16, String)>,
    /// Bytes sent instead of the login response.
    pub login_bytes: Option<Vec<u8>>,
    /// `MaxRecvDataSegmentLength`; small values make the initiator send many Data-Out PDUs.
    pub segment: usize,
}

#[derive(Debug)]
struct Shared {
    behaviour: Mutex<Behaviour>,
    blocks: Mutex<Vec<u8>>,
    /// Opcodes received, in order.
    commands: Mutex<Vec<u8>>,
    sessions: Mutex<Vec<([u8; 6], TcpStream)>>,
    ended: AtomicBool,
}

/// A listening fake; ends with its owner.
#[derive(Debug)]
pub struct FakeTarget {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl FakeTarget {
    pub fn start() -> Self {
        Self::listen(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"))
    }

    fn listen(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            behaviour: Mutex::new(Behaviour {
                answers: HashMap::new(),
                always: HashMap::new(),
                window: 32,
                block_len: BLOCK as u32,
                serial: 1,
                login: None,
                login_bytes: None,
                segment: SEGMENT,
            }),
            blocks: Mutex::new(vec![0; BLOCKS * BLOCK]),
            commands: Mutex::default(),
            sessions: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let for_acceptor = shared.clone();
        let acceptor = std::thread::spawn(move || {
            let mut threads = Vec::new();
            for socket in listener.incoming() {
                if for_acceptor.ended.load(Ordering::SeqCst) {
                    break;
                }
                let (Ok(socket), shared) = (socket, for_acceptor.clone()) else { break };
                threads.push(std::thread::spawn(move || drop(Connection::serve(socket, &shared))));
            }
            for thread in threads {
                let _ = thread.join();
            }
        });
        Self { address, shared, acceptor: Some(acceptor) }
    }

    /// The name carries the port: names are unique in the world.
    pub fn url(&self) -> String {
        let port = self.address.port();
        format!("iscsi://{}/iqn.2026-01.org.ballast.fake:{port}/0", self.address)
    }

    pub fn behaviour(&self) -> MutexGuard<'_, Behaviour> {
        lock(&self.shared.behaviour)
    }

    /// The next command of this kind gets this answer.
    pub fn answer(&self, opcode: u8, answer: Answer) {
        self.behaviour().answers.entry(opcode).or_default().push_back(answer);
    }

    /// Commands of this kind received so far.
    pub fn count(&self, opcode: u8) -> usize {
        lock(&self.shared.commands).iter().filter(|seen| **seen == opcode).count()
    }

    /// Closes all connections.
    pub fn hang_up(&self) {
        for (_, socket) in lock(&self.shared.sessions).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for FakeTarget {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        drop(TcpStream::connect(self.address));
        self.hang_up();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

struct Connection<'a> {
    socket: TcpStream,
    shared: &'a Shared,
    stat_sn: u32,
    exp_cmd_sn: u32,
    /// Received ahead of its turn.
    backlog: VecDeque<Pdu>,
}

struct Pdu {
    header: [u8; 48],
    data: Vec<u8>,
}

impl Connection<'_> {
    fn serve(socket: TcpStream, shared: &Shared) -> std::io::Result<()> {
        socket.set_nodelay(true)?;
        // Registered from the start, so that the end of the target ends every thread.
        lock(&shared.sessions).push(([0; 6], socket.try_clone()?));
        if shared.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        let backlog = VecDeque::new();
        let mut connection = Connection { socket, shared, stat_sn: 1, exp_cmd_sn: 0, backlog };
        loop {
            let pdu = connection.receive()?;
            match pdu.header[0] & 0x3f {
                0x00 => connection.nop(&pdu)?,
                0x01 => connection.command(pdu)?,
                0x03 => connection.login(&pdu)?,
                0x05 => {}
                0x06 => return connection.logout(&pdu),
                _ => return Ok(()),
            }
        }
    }

    fn receive(&mut self) -> std::io::Result<Pdu> {
        if let Some(pdu) = self.backlog.pop_front() {
            return Ok(pdu);
        }
        let mut header = [0; 48];
        self.socket.read_exact(&mut header)?;
        let len = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        let mut data = vec![0; len.next_multiple_of(4)];
        self.socket.read_exact(&mut data)?;
        data.truncate(len);
        Ok(Pdu { header, data })
    }

    fn send(&mut self, request: &Pdu, mut header: [u8; 48], data: &[u8]) -> std::io::Result<()> {
        let window = lock(&self.shared.behaviour).window;
        header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        header[16..20].copy_from_slice(&request.header[16..20]);
        header[24..28].copy_from_slice(&self.stat_sn.to_be_bytes());
        header[28..32].copy_from_slice(&self.exp_cmd_sn.to_be_bytes());
        header[32..36].copy_from_slice(&(self.exp_cmd_sn + window - 1).to_be_bytes());
        self.stat_sn += 1;
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        self.socket.write_all(&bytes)
    }

    fn login(&mut self, request: &Pdu) -> std::io::Result<()> {
        self.exp_cmd_sn = be32(&request.header[24..28]);
        let (status, address, bytes, segment) = {
            let behaviour = lock(&self.shared.behaviour);
            let (status, address) = behaviour.login.clone().unwrap_or_default();
            (status, address, behaviour.login_bytes.clone(), behaviour.segment)
        };
        if let Some(bytes) = bytes {
            self.socket.write_all(&bytes)?;
            return self.socket.shutdown(Shutdown::Both);
        }
        let mut header = [0; 48];
        header[0] = 0x23;
        header[1] = request.header[1];
        header[8..14].copy_from_slice(&request.header[8..14]);
        header[15] = 1;
        header[36..38].copy_from_slice(&status.to_be_bytes());
        if status == 0 {
            self.reinstate(&request.header[8..14]);
        }
        let mut text = format!(
            "TargetPortalGroupTag=1\0HeaderDigest=None\0DataDigest=None\0InitialR2T=No\0\
             ImmediateData=Yes\0MaxRecvDataSegmentLength={segment}\0FirstBurstLength={SEGMENT}\0"
        );
        if !address.is_empty() {
            text.push_str(&format!("TargetAddress={address}\0"));
        }
        self.send(request, header, text.as_bytes())
    }

    fn reinstate(&self, isid: &[u8]) {
        let own = self.socket.peer_addr().ok();
        lock(&self.shared.sessions).retain_mut(|(known, socket)| {
            if socket.peer_addr().ok() == own {
                known.copy_from_slice(isid);
                true
            } else if known == isid {
                let _ = socket.shutdown(Shutdown::Both);
                false
            } else {
                true
            }
        });
    }

    fn nop(&mut self, request: &Pdu) -> std::io::Result<()> {
        self.exp_cmd_sn = be32(&request.header[24..28]) + 1;
        let mut header = [0; 48];
        header[..2].copy_from_slice(&[0x20, 0x80]);
        header[20..24].fill(0xff);
        self.send(request, header, &[])
    }

    fn logout(&mut self, request: &Pdu) -> std::io::Result<()> {
        let mut header = [0; 48];
        header[..2].copy_from_slice(&[0x26, 0x80]);
        self.send(request, header, &[])
    }

    fn command(&mut self, mut request: Pdu) -> std::io::Result<()> {
        self.exp_cmd_sn = be32(&request.header[24..28]) + 1;
        let opcode = request.header[32];
        lock(&self.shared.commands).push(opcode);
        let answer = {
            let mut behaviour = lock(&self.shared.behaviour);
            let next = behaviour.answers.get_mut(&opcode).and_then(VecDeque::pop_front);
            next.or_else(|| behaviour.always.get(&opcode).cloned())
        };
        if !matches!(answer, Some(Answer::Ahead)) {
            self.receive_rest(&mut request)?;
        }
        match answer {
            Some(Answer::Sense(key, code)) => self.respond(&request, 2, &sense(key, code)),
            Some(Answer::Ahead) => {
                // Nothing tells that a peer's buffers are full: give it time.
                std::thread::sleep(std::time::Duration::from_millis(500));
                let first = be32(&request.header[16..20]);
                for tag in first..first + 64 {
                    request.header[16..20].copy_from_slice(&tag.to_be_bytes());
                    self.respond(&request, 2, &sense(3, 0x0c00))?;
                }
                Ok(())
            }
            Some(Answer::NoSense) => self.respond(&request, 2, &[]),
            Some(Answer::Status(status)) => self.respond(&request, status, &[]),
            Some(Answer::Lie) => self.respond(&request, 0, &[]),
            Some(Answer::Bytes(bytes)) => self.socket.write_all(&bytes),
            Some(Answer::HangUp) => {
                self.execute(&request);
                self.socket.shutdown(Shutdown::Both)
            }
            None => match self.execute(&request) {
                Execution::Data(data) => self.send_data(&request, &data),
                Execution::Status => self.respond(&request, 0, &[]),
                Execution::Miscompare => self.respond(&request, 2, &sense(14, 0x1d00)),
                Execution::Unknown => self.respond(&request, 2, &sense(5, 0x2000)),
            },
        }
    }

    /// The data of a write: what comes unsolicited up to the first burst, then what is asked for.
    fn receive_rest(&mut self, request: &mut Pdu) -> std::io::Result<()> {
        if request.header[1] & 0x20 == 0 {
            return Ok(());
        }
        let len = be32(&request.header[20..24]) as usize;
        self.receive_data(request, len.min(SEGMENT))?;
        if len > SEGMENT {
            let mut header = [0; 48];
            header[..2].copy_from_slice(&[0x31, 0x80]);
            header[20..24].copy_from_slice(&request.header[16..20]);
            header[40..44].copy_from_slice(&(SEGMENT as u32).to_be_bytes());
            header[44..48].copy_from_slice(&((len - SEGMENT) as u32).to_be_bytes());
            self.send(request, header, &[])?;
            self.stat_sn -= 1;
        }
        self.receive_data(request, len)
    }

    /// Data-Out PDUs of this command; others are put back.
    fn receive_data(&mut self, request: &mut Pdu, len: usize) -> std::io::Result<()> {
        let mut others = VecDeque::new();
        while request.data.len() < len {
            let more = self.receive()?;
            if more.header[0] & 0x3f == 0x05 && more.header[16..20] == request.header[16..20] {
                request.data.extend_from_slice(&more.data);
            } else {
                others.push_back(more);
            }
        }
        others.append(&mut self.backlog);
        self.backlog = others;
        Ok(())
    }

    fn respond(&mut self, request: &Pdu, status: u8, sense: &[u8]) -> std::io::Result<()> {
        let mut header = [0; 48];
        header[..4].copy_from_slice(&[0x21, 0x80, 0, status]);
        self.send(request, header, sense)
    }

    fn send_data(&mut self, request: &Pdu, data: &[u8]) -> std::io::Result<()> {
        let asked = be32(&request.header[20..24]) as usize;
        let data = &data[..data.len().min(asked)];
        let (mut at, mut number) = (0, 0_u32);
        while at < data.len() {
            let part = &data[at..data.len().min(at + SEGMENT)];
            let last = at + part.len() == data.len();
            let mut header = [0; 48];
            header[0] = 0x25;
            header[1] = if last { 0x81 } else { 0 };
            if last && data.len() < asked {
                // Residual underflow.
                header[1] |= 0x02;
                header[44..48].copy_from_slice(&((asked - data.len()) as u32).to_be_bytes());
            }
            header[20..24].fill(0xff);
            header[36..40].copy_from_slice(&number.to_be_bytes());
            header[40..44].copy_from_slice(&(at as u32).to_be_bytes());
            if !last {
                // Only the last one carries a status number.
                self.stat_sn -= 1;
            }
            self.send(request, header, part)?;
            (at, number) = (at + part.len(), number + 1);
        }
        Ok(())
    }

    fn execute(&self, request: &Pdu) -> Execution {
        let cdb = &request.header[32..48];
        let (block_len, serial) = {
            let behaviour = lock(&self.shared.behaviour);
            (behaviour.block_len, behaviour.serial)
        };
        let at = (be32(&cdb[6..10]) as usize).min(BLOCKS) * BLOCK;
        let mut blocks = lock(&self.shared.blocks);
        match cdb[0] {
            0x00 | FLUSH => Execution::Status,
            0x12 if cdb[2] == 0x83 => Execution::Data(vec![0, 0x83, 0, 6, 1, 0, 0, 2, 7, serial]),
            0x9e => {
                let mut answer = vec![0; 32];
                answer[..8].copy_from_slice(&(BLOCKS as u64 - 1).to_be_bytes());
                answer[8..12].copy_from_slice(&block_len.to_be_bytes());
                Execution::Data(answer)
            }
            READ => {
                let len = be32(&cdb[10..14]) as usize * BLOCK;
                Execution::Data(blocks[at..(at + len).min(BLOCKS * BLOCK)].to_vec())
            }
            WRITE => {
                blocks[at..at + request.data.len()].copy_from_slice(&request.data);
                Execution::Status
            }
            COMPARE_AND_WRITE => {
                let (expected, new) = request.data.split_at(BLOCK);
                if blocks[at..at + BLOCK] != *expected {
                    return Execution::Miscompare;
                }
                blocks[at..at + BLOCK].copy_from_slice(new);
                Execution::Status
            }
            _ => Execution::Unknown,
        }
    }
}

enum Execution {
    Data(Vec<u8>),
    Status,
    Miscompare,
    Unknown,
}

/// Sense data in fixed format, with its length before it.
fn sense(key: u8, code: u16) -> [u8; 20] {
    let mut sense = [0; 20];
    sense[..5].copy_from_slice(&[0, 18, 0x70, 0, key]);
    sense[14..16].copy_from_slice(&code.to_be_bytes());
    sense
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
