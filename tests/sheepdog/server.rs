//! A small cluster of one node that speaks the Sheepdog protocol (include/sheepdog_proto.h and the wiki of the Sheepdog
//! project), and what no server should say.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

/// What it does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// Ends in the middle of a reply.
    ShortReply,
    /// Replies to a request that was not sent.
    Id,
    /// A result that nobody knows.
    Result,
    /// Data that is gigabytes long.
    LongData,
    /// A byte more than was asked for.
    MoreData,
    /// A byte less.
    LessData,
    /// Ends in the middle of the data.
    CutData,
    /// Says that data follows what asks for none.
    Unasked,
    /// An id that is none.
    NoDisk,
    /// An id with more bits than one can have.
    HighDisk,
    /// The description of another disk.
    OtherDisk,
    /// A disk of another name.
    OtherName,
    /// A snapshot in place of the disk.
    OtherState,
    /// A disk that is longer than its table.
    Size,
    /// Objects of one byte.
    SmallObjects,
    /// Objects longer than any number.
    LargeObjects,
    /// Objects in a tree.
    Tree,
    /// A table with ids that none can have.
    Table,
    /// Objects that are in the table and nowhere else.
    NoObject,
}

/// All of it.
pub const WRONG: &[Wrong] = &[
    Wrong::ShortReply,
    Wrong::Id,
    Wrong::Result,
    Wrong::LongData,
    Wrong::MoreData,
    Wrong::LessData,
    Wrong::CutData,
    Wrong::Unasked,
    Wrong::NoDisk,
    Wrong::HighDisk,
    Wrong::OtherDisk,
    Wrong::OtherName,
    Wrong::OtherState,
    Wrong::Size,
    Wrong::SmallObjects,
    Wrong::LargeObjects,
    Wrong::Tree,
    Wrong::Table,
    Wrong::NoObject,
];

const TABLE_AT: usize = 4664;
const INODE: usize = TABLE_AT + (4 << 20);

/// What is in the cluster.
#[derive(Default)]
pub struct Cluster {
    /// Those of data and those that describe disks, by their ids.
    pub objects: BTreeMap<u64, Vec<u8>>,
    /// By name and tag: what is there, deleted ones left out.
    pub locks: HashSet<u32>,
    /// How often each operation was asked for.
    pub asked: HashMap<u8, usize>,
    /// What it does wrong.
    pub wrong: Option<Wrong>,
    /// The connection on which the request of that number comes is closed in place of the reply.
    pub dies_at: Option<usize>,
    /// When what was asked for has been done.
    pub dies_late: bool,
    /// Of the objects of new disks, as a power of two.
    pub object_bits: u8,
    seen: usize,
    stop: bool,
}

fn inode_id(disk: u32) -> u64 {
    1 << 63 | u64::from(disk) << 32
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(wide)
}

fn text(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take_while(|byte| *byte != 0).collect()
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

impl Cluster {
    fn disks(&self) -> Vec<(u32, &Vec<u8>)> {
        let id = |object: u64| (object >> 32) as u32 & 0xff_ffff;
        self.objects
            .iter()
            .filter(|(object, _)| *object >> 63 == 1)
            .map(|(object, inode)| (id(*object), inode))
            .collect()
    }

    /// The disk with that name, or a snapshot of it. Err: the result.
    fn find(&self, name: &[u8], number_wanted: u64, tag: &[u8]) -> Result<u32, u32> {
        let named: Vec<_> = self.disks().into_iter().filter(|(_, inode)| text(&inode[..256]) == name).collect();
        let is_it = |inode: &[u8]| match number::<8>(inode, 520) != 0 {
            true if !tag.is_empty() => text(&inode[256..512]) == tag,
            true => number_wanted != 0 && number::<4>(inode, 556) == number_wanted,
            false => number_wanted == 0 && tag.is_empty(),
        };
        let found = named.iter().find(|(_, inode)| is_it(inode)).map(|(disk, _)| *disk);
        found.ok_or(if named.is_empty() || (number_wanted == 0 && tag.is_empty()) { 0x08 } else { 0x0e })
    }

    /// A new disk, or what becomes of one of which there is a snapshot from now on, which is `base`.
    fn make(&mut self, name: &[u8], size: u64, base: Option<u32>) -> u32 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        name.iter().for_each(|byte| hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        let mut disk = (hash & 0xff_ffff) as u32;
        while disk == 0 || self.objects.contains_key(&inode_id(disk)) {
            disk = (disk + 1) & 0xff_ffff;
        }
        let mut inode = match base {
            Some(base) => self.objects[&inode_id(base)].clone(),
            None => vec![0; INODE],
        };
        inode[..572].fill(0);
        put(&mut inode, 0, name);
        put(&mut inode, 512, &1_u64.to_le_bytes());
        put(&mut inode, 536, &size.to_le_bytes());
        inode[554] = 3;
        inode[555] = self.object_bits;
        put(&mut inode, 556, &1_u32.to_le_bytes());
        put(&mut inode, 560, &disk.to_le_bytes());
        put(&mut inode, 564, &base.unwrap_or(0).to_le_bytes());
        self.objects.insert(inode_id(disk), inode);
        disk
    }

    /// Keeps a disk as it is, as a snapshot, and goes on with a new one.
    pub fn snapshot(&mut self, name: &str, tag: &str) {
        let old = self.find(name.as_bytes(), 0, b"").unwrap();
        let size = self.size(name);
        let new = self.make(name.as_bytes(), size, Some(old));
        let before = self.objects.get_mut(&inode_id(old)).unwrap();
        let count = number::<4>(before, 556);
        put(before, 256, tag.as_bytes());
        put(before, 520, &2_u64.to_le_bytes());
        put(self.objects.get_mut(&inode_id(new)).unwrap(), 556, &(count as u32 + 1).to_le_bytes());
    }

    /// Bytes of a disk.
    pub fn size(&self, name: &str) -> u64 {
        let disk = self.find(name.as_bytes(), 0, b"").unwrap();
        number::<8>(&self.objects[&inode_id(disk)], 536)
    }

    /// Whether there is a disk of that name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name.as_bytes(), 0, b"").is_ok()
    }

    /// What is on a disk.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let inode = &self.objects[&inode_id(self.find(name.as_bytes(), 0, b"").unwrap())];
        let unit = 1 << inode[555];
        let mut bytes = Vec::new();
        for index in 0..number::<8>(inode, 536).div_ceil(unit) {
            match number::<4>(inode, TABLE_AT + 4 * index as usize) {
                0 => bytes.resize(bytes.len() + unit as usize, 0),
                owner => bytes.extend(&self.objects[&(owner << 32 | index)]),
            }
        }
        bytes.truncate(number::<8>(inode, 536) as usize);
        bytes
    }

    /// How many objects with data there are.
    pub fn count(&self) -> usize {
        self.objects.keys().filter(|object| *object >> 63 == 0).count()
    }

    /// Does what a request asks for: the reply's fields from the result on, and its data. Err: the result.
    fn act(&mut self, head: &[u8; 48], data: &[u8]) -> Result<(u32, Vec<u8>), u32> {
        let (opcode, flags, len) = (head[1], number::<2>(head, 2), number::<4>(head, 12) as usize);
        if head[0] > 2 {
            return Err(0x14);
        }
        let (object, offset) = (number::<8>(head, 16), number::<8>(head, 40) as usize);
        let owner = (object >> 32) as u32 & 0xff_ffff;
        let named = |size: usize| if data.len() == size { Ok(text(&data[..256])) } else { Err(0x05_u32) };
        match opcode {
            0x01 | 0x03 => {
                if object >> 63 == 0 {
                    let inode = self.objects.get(&inode_id(owner)).ok_or(0x08_u32)?;
                    if number::<8>(inode, 520) != 0 {
                        return Err(0x1a);
                    }
                    // Copies: those that the disk has.
                    if opcode == 1 && head[32] != inode[554] {
                        return Err(0x05);
                    }
                    let size = 1_usize << inode[555];
                    let made = match (opcode, self.objects.contains_key(&object), flags & 2 != 0) {
                        (0x01, true, _) => return Err(0x03),
                        (0x01, false, true) => self.objects.get(&number::<8>(head, 24)).ok_or(0x02_u32)?.clone(),
                        (0x01, false, false) => vec![0; size],
                        _ => Vec::new(),
                    };
                    if opcode == 1 {
                        self.objects.insert(object, made);
                    }
                }
                let bytes = self.objects.get_mut(&object).ok_or(0x02_u32)?;
                bytes.get_mut(offset..offset + data.len()).ok_or(0x05_u32)?.copy_from_slice(data);
                Ok((0, Vec::new()))
            }
            0x02 => {
                let bytes = self.objects.get(&object).ok_or(0x02_u32)?;
                Ok((0, bytes.get(offset..offset + len).ok_or(0x05_u32)?.to_vec()))
            }
            0x11 => {
                let name = named(256)?;
                match self.find(&name, 0, b"") {
                    Ok(_) => Err(0x04),
                    Err(_) => Ok((self.make(&name, number::<8>(head, 16), None), Vec::new())),
                }
            }
            0x12 | 0x14 => {
                let disk = self.find(&named(512)?, number::<4>(head, 32), &text(&data[256..]))?;
                if opcode == 0x12 && !self.locks.insert(disk) {
                    return Err(0x07);
                }
                Ok((disk, Vec::new()))
            }
            0x13 => match self.locks.remove(&(number::<4>(head, 24) as u32)) {
                true => Ok((0, Vec::new())),
                false => Err(0x10),
            },
            0x17 => {
                let disk = self.find(&named(512)?, number::<4>(head, 32), &text(&data[256..]))?;
                self.objects.retain(|object, _| (object >> 32) as u32 & 0xff_ffff != disk);
                Ok((0, Vec::new()))
            }
            _ => Err(0x05),
        }
    }

    /// What goes back, and whether the connection goes on.
    fn reply(&mut self, head: &[u8; 48], data: &[u8]) -> (Vec<u8>, bool) {
        *self.asked.entry(head[1]).or_default() += 1;
        let number_of_this = self.seen;
        self.seen += 1;
        let dies = self.dies_at == Some(number_of_this);
        if dies && !self.dies_late {
            return (Vec::new(), false);
        }
        let (mut result, mut disk, mut bytes) = match self.act(head, data) {
            Ok((disk, bytes)) => (0, disk, bytes),
            Err(result) => (result, 0, Vec::new()),
        };
        if dies {
            return (Vec::new(), false);
        }
        let mut id = number::<4>(head, 8) as u32;
        let (is_inode, is_read) = (number::<8>(head, 16) >> 63 == 1, head[1] == 2);
        let is_head = is_inode && is_read && number::<8>(head, 40) == 0;
        match self.wrong {
            Some(Wrong::Id) => id = id.wrapping_add(7),
            Some(Wrong::Result) => result = 0x7777_7777,
            Some(Wrong::NoDisk) => disk = 0,
            Some(Wrong::HighDisk) => disk |= 0xff00_0000,
            Some(Wrong::OtherDisk) if is_head => put(&mut bytes, 560, &77_u32.to_le_bytes()),
            Some(Wrong::OtherName) if is_head => bytes[0] ^= 1,
            Some(Wrong::OtherState) if is_head => bytes[520] = 1,
            Some(Wrong::Size) if is_head => put(&mut bytes, 536, &u64::MAX.to_le_bytes()),
            Some(Wrong::SmallObjects) if is_head => bytes[555] = 0,
            Some(Wrong::LargeObjects) if is_head => bytes[555] = 200,
            Some(Wrong::Tree) if is_head => bytes[553] = 1,
            Some(Wrong::Table) if is_inode && is_read && !is_head => bytes.fill(0xff),
            Some(Wrong::NoObject) if is_read && !is_inode => (result, bytes) = (0x02, Vec::new()),
            _ => {}
        }
        let mut len = bytes.len() as u32;
        match self.wrong {
            Some(Wrong::LongData) if is_read => len = u32::MAX,
            Some(Wrong::MoreData) if is_read => {
                bytes.push(0);
                len += 1;
            }
            Some(Wrong::LessData) if is_read => {
                bytes.pop();
                len -= 1;
            }
            Some(Wrong::Unasked) if !is_read => len = 512,
            _ => {}
        }
        let mut out = vec![0; 48];
        out[0] = 2;
        out[1] = head[1];
        put(&mut out, 8, &id.to_le_bytes());
        put(&mut out, 12, &len.to_le_bytes());
        put(&mut out, 16, &result.to_le_bytes());
        put(&mut out, 24, &disk.to_le_bytes());
        out.extend(bytes);
        match self.wrong {
            Some(Wrong::ShortReply) => out.truncate(20),
            Some(Wrong::CutData) if is_read => out.truncate(48 + (out.len() - 48) / 2),
            _ => return (out, true),
        }
        (out, false)
    }
}

/// A server that runs until it is dropped.
pub struct Server {
    cluster: Arc<Mutex<Cluster>>,
    place: Place,
    thread: Option<JoinHandle<()>>,
}

enum Place {
    Port(u16),
    Socket(PathBuf),
}

fn serve(mut stream: impl Read + Write, cluster: &Mutex<Cluster>) -> io::Result<()> {
    loop {
        let mut head = [0; 48];
        stream.read_exact(&mut head)?;
        let sent = if number::<2>(&head, 2) & 1 != 0 { number::<4>(&head, 12) } else { 0 };
        let mut data = vec![0; sent as usize];
        stream.read_exact(&mut data)?;
        let (out, more) = cluster.lock().unwrap().reply(&head, &data);
        stream.write_all(&out)?;
        if !more {
            return Ok(());
        }
    }
}

fn listen<S: Read + Write + Send + 'static>(
    cluster: &Arc<Mutex<Cluster>>,
    mut accept: impl FnMut() -> S + Send + 'static,
) -> JoinHandle<()> {
    let cluster = cluster.clone();
    thread::spawn(move || {
        loop {
            let stream = accept();
            if cluster.lock().unwrap().stop {
                return;
            }
            let cluster = cluster.clone();
            // The client sees an error, or that there is no more.
            thread::spawn(move || drop(serve(stream, &cluster)));
        }
    })
}

impl Server {
    /// An empty cluster on a port of this host, with objects of so many bits.
    pub fn on_a_port(object_bits: u8) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let cluster = Arc::new(Mutex::new(Cluster { object_bits, ..Cluster::default() }));
        let thread = listen(&cluster, move || listener.accept().unwrap().0);
        Self { cluster, place: Place::Port(port), thread: Some(thread) }
    }

    /// The same on a socket.
    pub fn on(socket: &Path, object_bits: u8) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let cluster = Arc::new(Mutex::new(Cluster { object_bits, ..Cluster::default() }));
        let thread = listen(&cluster, move || listener.accept().unwrap().0);
        Self { cluster, place: Place::Socket(socket.to_owned()), thread: Some(thread) }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        match self.place {
            Place::Port(port) => port,
            Place::Socket(_) => 0,
        }
    }

    /// What is in it.
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(mut cluster) = self.cluster.lock() {
            cluster.stop = true;
        }
        match &self.place {
            Place::Port(port) => drop(TcpStream::connect(("127.0.0.1", *port))),
            Place::Socket(socket) => drop(UnixStream::connect(socket)),
        }
        drop(self.thread.take().map(JoinHandle::join));
        if let Place::Socket(socket) = &self.place {
            drop(std::fs::remove_file(socket));
        }
    }
}
