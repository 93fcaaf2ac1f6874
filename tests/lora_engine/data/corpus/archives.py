"""Archives: webdataset shards and zip files, and what hostile ones try."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile

from tests.lora_engine.data.corpus.build import Case, Unused, Used, png, special, tar, zipped

_SHARD = {
    "0.png": png(1),
    "0.txt": b"red",
    "1.png": png(2),
    "1.json": b'{"caption": "blue", "url": "x"}',
    "1.cls": b"3",
}
_PLAIN = {"0.png": Used("red"), "1.png": Used("blue", ".json")}
_BOMB = bytes(40 << 20)


def evil(name: str, reason: str, shown: str | None = None, *, kind: str = "tar") -> Case:
    """A member beside a good image, which is used."""
    members = {"0.png": png(1), name: png(2)}
    content = tar(members) if kind == "tar" else zipped(members)
    return _beside(f"x.{kind}", content, {shown or name: reason})


def _beside(name: str, content: bytes, refused: dict[str, str]) -> Case:
    ending = name.rpartition(".")[2]
    return Case(
        {name: content},
        {f"{name}/0.png": Used(), **{f"{name}/{member}": Unused(reason) for member, reason in refused.items()}},
        layout=f"archives: 1 {ending} (1 image)",
    )


def device(kind: bytes, reason: str, target: str = "", size: int = 0) -> Case:
    return _beside("x.tar", tar({"0.png": png(1), "1.png": special(kind, target, size)}), {"1.png": reason})


def unix(mode: int) -> Case:
    content = zipped({"0.png": png(1)})
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        member = zipfile.ZipInfo("1.png")
        member.create_system, member.external_attr = 3, mode << 16
        archive.writestr(member, "/etc/passwd")
    return _beside("x.zip", buffer.getvalue(), {"1.png": "is a link, a device or a pipe"})


def encrypted() -> bytes:
    content = bytearray(zipped({"0.png": png(1), "1.png": png(2)}))
    local, central = content.rfind(b"PK\x03\x04"), content.rfind(b"PK\x01\x02")
    content[local + 6] |= 1
    content[central + 8] |= 1
    return bytes(content)


def wrong_checksum() -> bytes:
    content = bytearray(zipped({"0.png": png(1), "1.png": png(2)}, method=zipfile.ZIP_STORED))
    content[content.rfind(png(2)) + 100] ^= 255
    return bytes(content)


def _joined() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for seed in (1, 2):
            member = tarfile.TarInfo("0.png")
            member.size = len(png(seed))
            archive.addfile(member, io.BytesIO(png(seed)))
    return buffer.getvalue()


def whole(name: str, content: bytes) -> Case:
    ending = name.rpartition(".")[2].lower()
    return Case({name: content}, _PLAIN, layout=f"archives: 1 {ending} (2 images)", is_file=True)


ARCHIVES: dict[str, Case] = {
    "a tar": whole("x.tar", tar(_SHARD)),
    "a tar.gz": whole("x.tar.gz", tar(_SHARD, "w:gz")),
    "a tgz": whole("x.tgz", tar(_SHARD, "w:gz")),
    "a tar.bz2": whole("x.tar.bz2", tar(_SHARD, "w:bz2")),
    "a tar.xz": whole("x.tar.xz", tar(_SHARD, "w:xz")),
    "a zip": whole("x.zip", zipped(_SHARD)),
    "a stored zip": whole("X.ZIP", zipped(_SHARD, method=zipfile.ZIP_STORED)),
    "webdataset shards": Case(
        {
            "set-000000.tar": tar(
                {"a.jpg": png(1), "a.txt": b"red", "b.webp": png(2), "b.json": b'{"caption": "blue"}'}
            ),
            "set-000001.tar": tar({"a.jpg": png(3), "a.cls": b"1"}),
        },
        {
            "set-000000.tar/a.jpg": Used("red"),
            "set-000000.tar/b.webp": Used("blue", ".json"),
            "set-000001.tar/a.jpg": Used(),
        },
        layout="archives: 2 tar (3 images)",
    ),
    "a shard beside images": Case(
        {"a.png": png(8), "a.txt": "own", "x.tar": tar({"a.png": png(9)})},
        {"a.png": Used("own"), "x.tar/a.png": Used()},
        layout="archives: 1 tar (1 image)",
    ),
    "a shard in a subfolder": Case(
        {"sub/x.tar": tar({"a.png": png(9)})}, {"sub/x.tar/a.png": Used()}, layout="archives: 1 tar (1 image)"
    ),
    "shards of splits": Case(
        {"train-0.tar": tar({"a.png": png(1)}), "test-0.tar": tar({"a.png": png(2)})},
        {"train-0.tar/a.png": Used(), "test-0.tar/a.png": Used(split="heldout")},
        layout="Hugging Face splits: 1 test, 1 train; archives: 2 tar (2 images)",
    ),
    "the same image in two shards": Case(
        {"x.tar": tar({"a.png": png(1)}), "y.tar": tar({"b.png": png(1), "c.png": png(2)})},
        {"x.tar/a.png": Used(), "y.tar/b.png": Unused("duplicate of x.tar/a.png"), "y.tar/c.png": Used()},
        layout="archives: 2 tar (2 images)",
    ),
    "kohya folders in a zip": Case(
        {"x.zip": zipped({"set/3_sks dog/a.png": png(1)})},
        {"set/3_sks dog/a.png": Used("sks dog", "folder name", repeats=3)},
        layout="kohya folders: 3 x 'sks dog' (1 image); archives: 1 zip (1 image)",
        is_file=True,
    ),
    "metadata in a zip": Case(
        {"x.zip": zipped({"a.png": png(1), "metadata.csv": b"file_name,text\na.png,red\n"})},
        {"a.png": Used("red", "metadata.csv")},
        layout="archives: 1 zip (1 image)",
        is_file=True,
    ),
    "concepts in a zip": Case(
        {"x.zip": zipped({"d/a.png": png(1), "concepts.json": b'[{"path": "d", "balancing": 2}]'})},
        {"d/a.png": Used(repeats=2)},
        layout="OneTrainer concepts: 2 x 'd' (1 image); archives: 1 zip (1 image)",
        is_file=True,
    ),
    "masks in a tar": Case(
        {"x.tar": tar({"a.png": png(1), "masks/a.png": png(2)})},
        {"a.png": Used(has_mask=True)},
        layout="archives: 1 tar (1 image)",
        is_file=True,
    ),
    "leftovers of systems": Case(
        {"x.zip": zipped({"a.png": png(1), "__MACOSX/._a.png": b"x", ".DS_Store": b"x", "./b.png": png(2)})},
        {"a.png": Used(), "b.png": Used()},
        layout="archives: 1 zip (2 images)",
        is_file=True,
    ),
    "names of Windows": Case(
        {"x.zip": zipped({"sub\\a.png": png(1), "sub\\a.txt": b"red"})},
        {"sub/a.png": Used("red")},
        layout="archives: 1 zip (1 image)",
        is_file=True,
    ),
    "a broken image in a tar": _beside(
        "x.tar", tar({"0.png": png(1), "1.png": b"no"}), {"1.png": "is not a readable image"}
    ),
    # Names that lead out
    "a parent in a tar": evil("../evil.png", "leads out of the archive"),
    "a parent in a zip": evil("../evil.png", "leads out of the archive", kind="zip"),
    "parents further in": evil("a/../../evil.png", "leads out of the archive"),
    "parents of Windows": evil("..\\..\\evil.png", "leads out of the archive", kind="zip"),
    "an absolute name in a tar": evil("/tmp/evil.png", "has an absolute path", "/tmp/evil.png"),
    "an absolute name in a zip": evil("/tmp/evil.png", "has an absolute path", kind="zip"),
    "a drive": evil("C:evil.png", "has an absolute path", kind="zip"),
    "a network share": evil("\\\\host\\evil.png", "has an absolute path", kind="zip"),
    "a long name": evil("x" * 300 + ".png", "has a name of 304 bytes"),
    "a long path": evil("/".join(["x" * 100] * 11) + "/a.png", "has a name of 1,116 bytes"),
    "a name with a new line": Case(
        {"x.tar": tar({"a\nb.png": png(1)})}, {"x.tar/a\\nb.png": Used()}, layout="archives: 1 tar (1 image)"
    ),
    "a name in a reversed direction": Case(
        {"x.zip": zipped({"a\u202egnp.png": png(1)})},
        {"x.zip/a\\u202egnp.png": Used()},
        layout="archives: 1 zip (1 image)",
    ),
    "a traversal with an escape sequence": evil("../\x1b[31m.png", "leads out", "../\\x1b[31m.png"),
    # Members that are no files
    "a symbolic link": device(tarfile.SYMTYPE, "is a link", "/etc/passwd"),
    "a link into the archive": device(tarfile.SYMTYPE, "is a link", "0.png"),
    "a hard link": device(tarfile.LNKTYPE, "is a link", "0.png"),
    "a device": device(tarfile.CHRTYPE, "is a device"),
    "a block device": device(tarfile.BLKTYPE, "is a device"),
    "a pipe": device(tarfile.FIFOTYPE, "is a device, a pipe"),
    "a link in a zip": unix(stat.S_IFLNK | 0o777),
    "a device in a zip": unix(stat.S_IFCHR | 0o666),
    "a pipe in a zip": unix(stat.S_IFIFO | 0o666),
    "a link, and a file below it": _beside(
        "x.tar",
        tar({"0.png": png(1), "d": special(tarfile.SYMTYPE, "/tmp"), "e/../d/1.png": png(2)}),
        {"d": "is a link", "e/../d/1.png": "leads out"},
    ),
    "a file, and one below it": Case(
        {"x.tar": tar({"0.png": png(1), "0.png/1.png": png(2)})},
        {"x.tar/0.png": Used(), "x.tar/0.png/1.png": Unused("is below a file|has the name of another file")},
        layout="archives: 1 tar (1 image)",
    ),
    "a name twice in a tar": Case(
        {"x.tar": _joined(), "b.png": png(3)},
        {"x.tar/0.png": Used(), "b.png": Used()},
        {"x.tar/0.png": "has the name of another file"},
        layout="archives: 1 tar (1 image)",
    ),
    # Bombs and archives inside of archives
    "a bomb in a zip": _beside(
        "x.zip", zipped({"0.png": png(1), "1.bmp": _BOMB}), {"1.bmp": "unpacks to more than 200 times"}
    ),
    "a bomb in a tar.gz": Case(
        {"b.png": None, "x.tgz": tar({"1.bmp": _BOMB}, "w:gz")},
        {"b.png": Used(), "x.tgz": Unused("unpacks to more than")},
    ),
    "a zip in a zip": _beside(
        "x.zip", zipped({"0.png": png(1), "y.zip": zipped({"1.png": png(2)})}), {"y.zip": "is an archive inside"}
    ),
    "a table in a tar": _beside(
        "x.tar", tar({"0.png": png(1), "y.parquet": b"PAR1"}), {"y.parquet": "is an archive inside"}
    ),
    # Damage
    "half a tar": Case(
        {"x.tar": tar({"0.png": png(1), "1.png": png(2)})[:2_400]},
        {"x.tar/0.png": Used()},
        {"x.tar": "is broken after 1 members"},
        layout="archives: 1 tar (1 image)",
    ),
    "a tar that ends within a member": Case(
        {"x.tar": tar({"0.png": png(1), "1.png": png(2)})[:3_000]},
        {"x.tar/0.png": Used()},
        {"x.tar": "is broken after 1 members"},
        layout="archives: 1 tar (1 image)",
    ),
    "a tar without its end": Case(
        {"x.tar": tar({"0.png": png(1)})[:2_048]},
        {"x.tar/0.png": Used()},
        {"x.tar": "is broken after 1 members"},
        layout="archives: 1 tar (1 image)",
    ),
    "a tar with a damaged header": Case(
        {"x.tar": tar({"0.png": png(1)})[:2_048] + b"x" * 512 + tar({"1.png": png(2)})},
        {"x.tar/0.png": Used()},
        {"x.tar": "is broken after 1 members"},
        layout="archives: 1 tar (1 image)",
    ),
    "half a tar.gz": Case(
        {"b.png": None, "x.tgz": tar({"0.png": png(1)}, "w:gz")[:200]},
        {"b.png": Used(), "x.tgz": Unused("is broken after 0 members")},
    ),
    "half a zip": Case(
        {"b.png": None, "x.zip": zipped(_SHARD)[:-10]}, {"b.png": Used(), "x.zip": Unused("is broken after 0 members")}
    ),
    "an image that is named tar": Case(
        {"b.png": None, "x.tar": png(7)}, {"b.png": Used(), "x.tar": Unused("is broken after 0")}
    ),
    "an empty zip file": Case({"b.png": None, "x.zip": b""}, {"b.png": Used(), "x.zip": Unused("is broken after 0")}),
    "gzip without a tar": Case(
        {"b.png": None, "x.tgz": gzip.compress(b"no tar")}, {"b.png": Used(), "x.tgz": Unused("is broken")}
    ),
    "an encrypted member": _beside("x.zip", encrypted(), {"1.png": "cannot be unpacked .*encrypted"}),
    "a wrong checksum": _beside("x.zip", wrong_checksum(), {"1.png": "cannot be unpacked .*CRC"}),
    "a link to an archive elsewhere": Case(
        {"b.png": None, "x.tar": lambda path: path.symlink_to("/etc/hostname")},
        {"b.png": Used(), "x.tar": Unused("leads out of the folder")},
    ),
}
