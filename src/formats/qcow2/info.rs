//! What `info` shows of a qcow2 layer.

use serde_json::{Map, Value, json};

use crate::block::info::ImageInfo;
use crate::block::{Result, Snapshots};
use crate::formats::luks_header::luks_facts;

use super::Qcow2Driver;
use super::layout;

impl Qcow2Driver {
    pub(super) fn image_info(&self) -> Result<ImageInfo> {
        let header = self.header().clone();
        let fields = &header.fields;
        let mut data = Map::new();
        let mut put = |key: &str, value: Value| data.insert(key.to_owned(), value);
        put("compat", json!(if fields.version < 3 { "0.10" } else { "1.1" }));
        put("compression-type", json!(if fields.compression_type == layout::ZSTD { "zstd" } else { "zlib" }));
        if fields.version >= 3 {
            put("lazy-refcounts", json!(fields.compatible & layout::LAZY_REFCOUNTS != 0));
            put("corrupt", json!(fields.incompatible & layout::CORRUPT != 0));
            put("extended-l2", json!(self.geometry.extended));
        }
        if header.bitmaps.is_some() && fields.autoclear & layout::BITMAPS != 0 {
            put("bitmaps", self.bitmaps_info());
        }
        put("refcount-bits", json!(self.geometry.refcount_bits()));
        if let Some(name) = &header.data_file {
            put("data-file", json!(name.to_string_lossy()));
        }
        if self.external {
            put("data-file-raw", json!(fields.autoclear & layout::DATA_FILE_RAW != 0));
        }
        if let Some(encryption) = self.encryption_info() {
            put("encrypt", encryption);
        }
        Ok(ImageInfo {
            cluster_size: Some(self.geometry.cluster_size()),
            encrypted: self.encrypted,
            dirty: Some(fields.incompatible & layout::DIRTY != 0),
            snapshots: Snapshots::list(self)?,
            references: header
                .data_file
                .iter()
                .map(|name| ("data-file", name.to_string_lossy().into_owned()))
                .collect(),
            specific: Some(("qcow2", data)),
        })
    }

    fn bitmaps_info(&self) -> Value {
        let list = self.bitmap_list();
        let bitmaps = list.iter().map(|bitmap| {
            let mut flags = Vec::new();
            if bitmap.fields.flags & layout::BITMAP_IN_USE != 0 {
                flags.push("in-use");
            }
            if bitmap.fields.flags & layout::BITMAP_AUTO != 0 {
                flags.push("auto");
            }
            let granularity = 1u64.checked_shl(u32::from(bitmap.fields.granularity_bits)).unwrap_or(0);
            json!({ "flags": flags, "name": bitmap.name, "granularity": granularity })
        });
        Value::Array(bitmaps.collect())
    }

    fn encryption_info(&self) -> Option<Value> {
        if !self.encrypted {
            return None;
        }
        let Some(header) = &self.luks else { return Some(json!({ "format": "aes" })) };
        let mut data = luks_facts(header, false);
        data.insert("format".to_owned(), json!("luks"));
        Some(Value::Object(data))
    }
}
