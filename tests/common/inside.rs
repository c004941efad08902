//! Images made and opened through the library, and the test doubles for it: files in memory and in a folder, no other
//! files, identifiers, memory with a limit and counters.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use vimg::block::secrets::AskPassphrase;
use vimg::block::{
    CheckReport, Child, CreateFiles, CreateOptions, CreateRequest, Error, Fix, Format, Ids, KeyUse, Node, OpenRequest,
    OptionKind, OptionSpec, OptionTree, OptionValue, Purpose, Related, Result, SecretBytes, Secrets,
};
use vimg::storage::file::FileHow;
use vimg::storage::memory::Memory;
use vimg::storage::{Event, Facts, HostExtent, HostFile, Preallocation, Storage, Zeroing};

/// The passphrase of every encrypted image that is made here.
pub const PASSPHRASE: &str = "open sesame";

/// Gives it to whoever asks.
#[derive(Debug)]
struct OnePassphrase;

impl AskPassphrase for OnePassphrase {
    fn ask(&self, _image: &str, _key_use: KeyUse) -> Result<Option<SecretBytes>> {
        Ok(Some(PASSPHRASE.as_bytes().to_vec().into()))
    }

    fn can_ask(&self) -> bool {
        true
    }
}

static SECRETS: LazyLock<Secrets> = LazyLock::new(|| Secrets::default().or_ask(Arc::new(OnePassphrase)));

/// The files of one image (and of its backing files), by name.
#[derive(Debug, Default, Clone)]
pub struct Files(Arc<Mutex<BTreeMap<String, Arc<dyn Storage>>>>);

impl Files {
    /// The file with that name.
    pub fn get(&self, name: &str) -> Option<Arc<dyn Storage>> {
        self.0.lock().expect("files").get(name).cloned()
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.0.lock().expect("files").keys().cloned().collect()
    }

    /// Puts a file there.
    pub fn put(&self, name: &str, storage: Arc<dyn Storage>) {
        self.0.lock().expect("files").insert(name.to_owned(), storage);
    }

    /// Writes all of them to a folder, for the judge.
    pub fn save(&self, folder: &Path) {
        for (name, storage) in self.0.lock().expect("files").iter() {
            std::fs::write(folder.join(name), bytes_of(&**storage)).expect("save");
        }
    }

    /// A copy, in memory.
    pub fn copy(&self) -> Self {
        self.copy_capped(u64::MAX, &Arc::default())
    }

    /// The same; no file can grow beyond `cap`, and what is read is counted.
    pub fn copy_capped(&self, cap: u64, reads: &Arc<Reads>) -> Self {
        let copied = Self::default();
        for (name, storage) in self.0.lock().expect("files").iter() {
            copied.put(name, Arc::new(Capped::counted(bytes_of(&**storage), cap, reads.clone())));
        }
        copied
    }
}

/// All bytes of a storage.
pub fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().expect("len")).expect("small")];
    storage.read_at(0, &mut bytes).expect("read");
    bytes
}

impl Related for Files {
    fn open(&self, role: &str, name: &OsStr) -> Result<Child> {
        let name = &*name.to_string_lossy();
        let storage =
            self.get(name).ok_or_else(|| Error::new(vimg::block::ErrorKind::NotFound, format!("no '{name}'")))?;
        Ok(Child { role: role.to_owned(), name: name.to_owned(), driver: "file", storage })
    }
}

struct Making<'a> {
    name: &'a str,
    files: &'a Files,
    wrap: &'a dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage>,
}

impl CreateFiles for Making<'_> {
    fn name(&self) -> &OsStr {
        self.name.as_ref()
    }

    fn main(&self) -> Result<Arc<dyn Storage>> {
        self.beside(self.name.as_ref())
    }

    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        let storage = (self.wrap)(Arc::new(Memory::default()));
        self.files.put(&name.to_string_lossy(), storage.clone());
        Ok(storage)
    }

    fn named(&self, name: &OsStr) -> Result<(Arc<dyn Storage>, OsString)> {
        Ok((self.beside(name)?, name.to_owned()))
    }
}

/// New files in a folder of the host.
pub struct Folder {
    path: PathBuf,
    name: String,
}

impl Folder {
    /// For the image `name` in that folder.
    pub fn new(path: &Path, name: &str) -> Self {
        Self { path: path.to_owned(), name: name.to_owned() }
    }
}

impl CreateFiles for Folder {
    fn name(&self) -> &OsStr {
        self.name.as_ref()
    }

    fn main(&self) -> Result<Arc<dyn Storage>> {
        self.beside(self.name.as_ref())
    }

    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        let path = self.path.join(name);
        let missing = |_| Error::invalid(format!("Could not create '{}': No such file or directory", name.display()));
        std::fs::File::create(&path).map_err(missing)?;
        Ok(host_file(&path))
    }

    fn named(&self, name: &OsStr) -> Result<(Arc<dyn Storage>, OsString)> {
        Ok((self.beside(name)?, name.to_owned()))
    }
}

/// A file of the host, for writing.
pub fn host_file(path: &Path) -> Arc<dyn Storage> {
    Arc::new(HostFile::open(path, &FileHow { write: true, ..FileHow::default() }).expect("open"))
}

/// There are no other files.
#[derive(Debug)]
pub struct Alone;

impl Related for Alone {
    fn open(&self, _role: &str, name: &OsStr) -> Result<Child> {
        Err(Error::invalid(name.to_string_lossy()))
    }
}

/// Identifiers that are always the same.
#[derive(Debug)]
pub struct SameIds;

impl Ids for SameIds {
    fn are_fixed(&self) -> bool {
        true
    }

    fn seconds(&self) -> u64 {
        1_700_000_000
    }

    fn uuid(&self, _purpose: &str) -> [u8; 16] {
        [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x47, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0x01]
    }

    fn word(&self, _purpose: &str) -> u32 {
        0x1234_5678
    }
}

/// What the protocol adds to a format's options.
const FILE_OPTIONS: &[OptionSpec] =
    &[OptionSpec::new("size", OptionKind::Size, ""), OptionSpec::new("preallocation", OptionKind::Text, "")];

/// `key=value,key=value` as creation options of a format.
pub fn options(format: &dyn Format, text: &str) -> CreateOptions {
    let create = format.creating().expect("a format that can be created");
    given(CreateOptions::new(&[create.options(), FILE_OPTIONS]), text)
}

/// The same with a list of options.
pub fn given(mut options: CreateOptions, text: &str) -> CreateOptions {
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or_else(|| panic!("no value: {pair}"));
        let kind = options.spec(key).unwrap_or_else(|| panic!("no option {key}")).kind;
        let value = match kind {
            OptionKind::Text => OptionValue::Text(value.to_owned()),
            OptionKind::Name => OptionValue::Name(value.into()),
            OptionKind::Size => OptionValue::Size(size(value)),
            OptionKind::Number => OptionValue::Number(value.parse().expect("a number")),
            OptionKind::Switch => OptionValue::Switch(value == "on"),
        };
        options.set(key, value).expect("option");
    }
    options
}

/// A size in bytes, or with a suffix.
pub fn size(text: &str) -> u64 {
    let shift = match text.as_bytes().last() {
        Some(b'k') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        Some(b'P') => 50,
        Some(b'E') => 60,
        _ => 0,
    };
    text.trim_end_matches(char::is_alphabetic).parse::<u64>().expect("a size") << shift
}

/// Makes an image in `files`; every new file goes through `wrap`.
pub fn create_wrapped(
    files: &Files,
    format: &dyn Format,
    name: &str,
    size: u64,
    text: &str,
    wrap: &dyn Fn(Arc<dyn Storage>) -> Arc<dyn Storage>,
) -> Result<()> {
    let mut options = options(format, text);
    options.set("size", OptionValue::Size(size))?;
    let making = Making { name, files, wrap };
    let request =
        CreateRequest { size, options: &options, files: &making, ids: &SameIds, secrets: &SECRETS, related: files };
    format.creating().expect("a format that can be created").create(&request)
}

/// Makes an image in a folder of the host, by itself.
pub fn create_in(folder: &Path, format: &dyn Format, name: &str, size: u64, text: &str) -> Result<()> {
    let options = options(format, text);
    let files = Folder::new(folder, name);
    let request =
        CreateRequest { size, options: &options, files: &files, ids: &SameIds, secrets: &SECRETS, related: &Alone };
    format.creating().expect("a format that can be created").create(&request)
}

/// Makes an image in memory.
pub fn create(format: &dyn Format, name: &str, size: u64, text: &str) -> Files {
    let files = Files::default();
    create_wrapped(&files, format, name, size, text, &|storage| storage)
        .unwrap_or_else(|e| panic!("create {} {text}: {}", format.name(), e.message()));
    files
}

/// Opens one layer of `files`, with that backing layer.
pub fn open(files: &Files, format: &dyn Format, name: &str, write: bool, backing: Option<Arc<Node>>) -> Result<Node> {
    open_child(files.open("file", name.as_ref())?, format, purpose(write), files, backing)
}

/// Opens one layer that lies in `storage` and has no other files.
pub fn open_alone(storage: Arc<dyn Storage>, format: &dyn Format, write: bool) -> Result<Node> {
    open_for(storage, format, purpose(write))
}

fn purpose(write: bool) -> Purpose {
    if write { Purpose::Write } else { Purpose::Read }
}

/// The same for any purpose.
pub fn open_for(storage: Arc<dyn Storage>, format: &dyn Format, purpose: Purpose) -> Result<Node> {
    let file = Child { role: "file".to_owned(), name: "image".to_owned(), driver: "file", storage };
    open_child(file, format, purpose, &Alone, None)
}

/// Checks an image of `files`, and mends it.
pub fn check(files: &Files, format: &dyn Format, name: &str, fix: Fix) -> Result<CheckReport> {
    let purpose = if fix == Fix::Nothing { Purpose::Check } else { Purpose::Repair };
    let node = open_child(files.open("file", name.as_ref())?, format, purpose, files, None)?;
    let checking = node.driver().checking().ok_or_else(|| Error::unsupported("no check"))?;
    checking.check(fix, &|_: &str| {})
}

fn open_child(
    file: Child,
    format: &dyn Format,
    purpose: Purpose,
    related: &dyn Related,
    backing: Option<Arc<Node>>,
) -> Result<Node> {
    let name = file.name.clone();
    let mut options = OptionTree::new();
    let request =
        OpenRequest { file, side_files: Vec::new(), options: &mut options, purpose, secrets: &SECRETS, related };
    Ok(Node::new(format.open(request)?, backing, name))
}

/// What was read of some storages.
#[derive(Debug, Default)]
pub struct Reads {
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Reads {
    /// Calls of `read_at` and of `extent`.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Memory that is no larger than it may be (a far offset is an error, not an allocation), and whose reads are counted.
#[derive(Debug)]
pub struct Capped {
    inner: Memory,
    cap: u64,
    reads: Arc<Reads>,
}

impl Capped {
    /// That content, and no more than `cap` bytes ever.
    pub fn new(bytes: Vec<u8>, cap: u64) -> Self {
        Self::counted(bytes, cap, Arc::default())
    }

    /// The same, counted there.
    pub fn counted(bytes: Vec<u8>, cap: u64, reads: Arc<Reads>) -> Self {
        Self { inner: Memory::new(bytes), cap, reads }
    }

    fn fits(&self, at: u64, len: u64) -> vimg::storage::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.cap => Ok(()),
            _ => Err(nix::errno::Errno::EFBIG.into()),
        }
    }
}

impl Storage for Capped {
    fn len(&self) -> vimg::storage::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> vimg::storage::Result<()> {
        self.reads.add(buf.len());
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> vimg::storage::Result<()> {
        self.fits(at, buf.len() as u64)?;
        self.inner.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> vimg::storage::Result<HostExtent> {
        self.reads.add(0);
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> vimg::storage::Result<()> {
        self.fits(at, len)?;
        self.inner.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> vimg::storage::Result<()> {
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> vimg::storage::Result<()> {
        self.fits(0, len)?;
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> vimg::storage::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> vimg::storage::Result<Option<u64>> {
        Ok(None)
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.inner.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        self.inner.announce(event);
    }
}
