//! Encrypted images: the key, what clusters are encrypted with, and the LUKS header in its clusters.
//!
//! Source: specification, sections "Full disk encryption header pointer" and "Data encryption in images with LUKS
//! encryption". Compressed clusters are not encrypted. With LUKS a sector is encrypted by its number in the file that it
//! lies in, with the encryption of old by that on the guest's disk.

use crate::block::io::zeroed;
use crate::block::{Child, Error, FileEnd, OptionTree, Purpose, Result, SecretBytes, Secrets};
use crate::crypto::luks::{HEADER, LuksHeader, NewVolume};
use crate::formats::encryption::{self, KEY_SECRET};
use crate::formats::luks_header;
use crate::formats::sector_cipher::ImageCipher;

use super::geometry::Geometry;
use super::header::Qcow2Header;
use super::layout;
use super::plan::Planner;

/// How an image is encrypted, and with what.
pub struct Unlocked {
    /// The LUKS header.
    pub luks: Option<LuksHeader>,
    /// The master key that is kept in it.
    pub key: Option<SecretBytes>,
    /// Nothing where the image is not encrypted, or where its header alone is looked at.
    pub cipher: Option<ImageCipher>,
}

/// Takes the options about encryption, and makes the cipher of an image that has one, unless its header alone is
/// looked at.
pub fn unlock(
    options: &mut OptionTree,
    header: &Qcow2Header,
    file: &Child,
    purpose: Purpose,
    secrets: &Secrets,
) -> Result<Unlocked> {
    let format = match header.fields.crypt_method {
        layout::CRYPT_AES => Some("aes"),
        layout::CRYPT_LUKS => Some("luks"),
        _ => None,
    };
    let id = encryption::take_key(options, format)?;
    let key = match format.is_some() && !purpose.only_looks() {
        true => Some(secrets.key(KEY_SECRET, id.as_deref(), &file.name, purpose.into())?),
        false => None,
    };
    let Some(place) = header.crypto else {
        let cipher = key.map(|key| ImageCipher::legacy_aes(&key)).transpose()?;
        return Ok(Unlocked { luks: None, key: None, cipher });
    };
    let volume = LuksClusters { file, at: place.0, len: place.1, end: FileEnd::default() };
    let luks = volume.header()?;
    let key = key.map(|passphrase| volume.unlock(secrets, &luks, &passphrase)).transpose()?;
    let cipher = key.as_ref().map(|key| luks.cipher(key.get())).transpose()?.map(ImageCipher::by_host);
    Ok(Unlocked { luks: Some(luks), key, cipher })
}

/// The clusters of a LUKS header: so many bytes from there on.
struct LuksClusters<'a> {
    file: &'a Child,
    at: u64,
    len: u64,
    end: FileEnd,
}

impl LuksClusters<'_> {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::corrupt("Request for data outside of extension header"));
        }
        let place = self.at.saturating_add(at);
        self.end.require(&*self.file.storage, "the LUKS header", place, len)?;
        self.file.read_metadata("the LUKS header", place, buf)
    }

    fn header(&self) -> Result<LuksHeader> {
        let mut bytes = [0; HEADER];
        self.read(0, &mut bytes)?;
        Ok(LuksHeader::parse(&bytes, false)?)
    }

    fn unlock(&self, secrets: &Secrets, header: &LuksHeader, passphrase: &SecretBytes) -> Result<SecretBytes> {
        luks_header::unlock(secrets, header, passphrase, |at, buf| self.read(at, buf))
    }
}

/// Gives the LUKS header of a new image its clusters, and writes them. Where it is, and its length in bytes.
pub fn place(planner: &mut Planner, geometry: Geometry, volume: &NewVolume) -> Result<(u64, u64)> {
    let length = volume.header.payload();
    let clusters = length.div_ceil(geometry.cluster_size());
    let at = geometry.offset_of(planner.allocate(clusters)?);
    let too_large = |_| Error::invalid("The LUKS header is too large");
    let mut bytes = zeroed(clusters << geometry.cluster_bits)?;
    let material = usize::try_from(volume.material_at).map_err(too_large)?;
    let parts = [(0, volume.header.bytes()), (material, &volume.material[..])];
    for (start, part) in parts {
        let room = bytes.get_mut(start..).and_then(|rest| rest.get_mut(..part.len()));
        room.ok_or_else(|| Error::invalid("The LUKS header has no room for its key"))?.copy_from_slice(part);
    }
    planner.plan.out().put(at, &bytes)?;
    Ok((at, length))
}
