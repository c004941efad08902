//! The disk as a macOS disk image (UDIF) with zlib, which qemu-img does not make: pieces of 256 KiB, those of zeros left
//! out, as hdiutil makes it.

/// What python3 is to run, with the disk's name; the image is `disk.dmg`.
pub const MAKER: &str = r#"
import base64, struct, sys, zlib
PIECE = 512
runs, packed, at = [], 0, 0
with open(sys.argv[1], "rb") as disk, open("disk.dmg", "wb") as image:
    while piece := disk.read(PIECE * 512):
        sectors, zeros = len(piece) // 512, piece.count(0) == len(piece)
        data = b"" if zeros else zlib.compress(piece)
        image.write(data)
        runs.append((2 if zeros else 0x80000005, 0, at, sectors, packed, len(data)))
        packed, at = packed + len(data), at + sectors
    runs.append((0xffffffff, 0, at, 0, packed, 0))
    table = struct.pack(">4sIQQQII24xII128xI", b"mish", 1, 0, at, 0, PIECE + 8, 0, 0, 0, len(runs))
    table += b"".join(struct.pack(">IIQQQQ", *run) for run in runs)
    plist = f"""<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict><key>resource-fork</key><dict><key>blkx</key><array><dict>
<key>Attributes</key><string>0x0050</string><key>Data</key><data>{base64.b64encode(table).decode()}</data>
<key>ID</key><string>0</string><key>Name</key><string>disk</string></dict></array></dict></dict></plist>""".encode()
    image.write(plist)
    end = struct.pack(">4sIIIQQQQQII16xII128x", b"koly", 4, 512, 1, 0, 0, packed, 0, 0, 1, 1, 0, 0)
    end = (end + struct.pack(">QQ", packed, len(plist))).ljust(352, b"\0")
    end += struct.pack(">II128xIQ", 0, 0, 1, at)
    image.write(end.ljust(512, b"\0"))
"#;
