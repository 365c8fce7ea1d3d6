"""Every kind of hostile input that is tried, made when it is needed.

A kind is a function that spoils a valid set within its folder, which also holds `outside/`, where
nothing may change. Its docstring is its line in SECURITY.md. What it tries to run makes a file
`canary`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from forge import (
    N_MELS,
    edit_index,
    edit_payload,
    edit_record,
    encoded,
    holes,
    replace_payload,
    set_entry,
    sign,
    write_tar,
)

from shardprep.format import CodecInfo, index_dtype

GB = 1 << 30
ZSTD = CodecInfo("zstd", 3, 64)


class Kind(NamedTuple):
    """A kind of hostile input.

    Attributes:
        entry: What is to read it: "plain" and "zstd" are shard sets, "dataset" a data set,
            "target" a folder that is to be built into.
        make: Spoils the valid set in a folder.
    """

    entry: str
    make: Callable[[Path], None]

    @property
    def sentence(self) -> str:
        return " ".join((self.make.__doc__ or "").split())


KINDS: dict[str, Kind] = {}


def kind(entry: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        KINDS[make.__name__.replace("_", "-")] = Kind(entry, make)
        return make

    return register


class Canary:
    """Unpickling it makes a file `canary`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


# The manifest.


@kind("plain")
def manifest_of_10_gb(folder: Path) -> None:
    """manifest.json is 10 GB long"""
    holes(folder / "manifest.json", 10 * GB)


@kind("plain")
def manifest_of_many_values(folder: Path) -> None:
    """manifest.json is a list of five million values"""
    (folder / "manifest.json").write_bytes(b'{"speakers":[' + b'"",' * 5_000_000 + b'""]}')


@kind("plain")
def manifest_nested(folder: Path) -> None:
    """manifest.json nests lists 200,000 deep"""
    text = (folder / "manifest.json").read_text()
    nested = "[" * 200_000 + "]" * 200_000
    (folder / "manifest.json").write_text(text.replace('"speakers": [', f'"speakers": [{nested},'))


@kind("plain")
def manifest_number_of_5000_digits(folder: Path) -> None:
    """manifest.json has a number of 5,000 digits"""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"seed": 0', '"seed": ' + "9" * 5000))


@kind("plain")
def manifest_pickle(folder: Path) -> None:
    """manifest.json is a pickle that runs a command"""
    (folder / "manifest.json").write_bytes(pickle.dumps(Canary()))


@kind("plain")
def manifest_pipe(folder: Path) -> None:
    """manifest.json is a named pipe that nobody writes into"""
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


@kind("plain")
def manifest_device(folder: Path) -> None:
    """manifest.json leads to a device that never ends"""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")


def forged(name: str, sentence: str, edit: Callable[[Any], None], entry: str = "plain") -> None:
    """Register a manifest whose fingerprint is true, and whose contents `edit` has changed."""

    def make(folder: Path) -> None:
        sign(folder, edit)

    make.__name__, make.__doc__ = name, sentence
    kind(entry)(make)


def shard(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["splits"]["test"]["shards"][0].update(values)


def train(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["splits"]["train"].update(values)


forged(
    "manifest_samples_of_2_63", "the manifest claims 2^63 - 1 utterances", train(samples=2**63 - 1)
)
forged("manifest_bytes_of_2_62", "the manifest claims a shard of 2^62 bytes", shard(bytes=2**62))
forged("manifest_negative_size", "the manifest claims a shard of -1 bytes", shard(bytes=-1))
forged(
    "manifest_shard_outside",
    "the manifest names ../outside/secret as a shard",
    shard(file="../outside/secret"),
)
forged(
    "manifest_absolute_shard",
    "the manifest names /etc/passwd as a shard",
    shard(file="/etc/passwd"),
)
forged(
    "manifest_shard_with_nul",
    "the manifest names a shard with a zero byte",
    shard(file="test-000000.tar\0"),
)
forged(
    "manifest_shard_is_a_command",
    "the manifest names `pipe:touch canary` as a shard",
    shard(file="pipe:touch canary"),
)
forged(
    "manifest_wide",
    "the manifest claims a billion mel bins",
    lambda content: content.update(n_mels=10**9),
)
forged(
    "manifest_shard_twice",
    "the manifest lists one shard twice",
    lambda content: content["splits"]["test"]["shards"].append(
        content["splits"]["test"]["shards"][0]
    ),
)
forged(
    "manifest_split_of_odd_name",
    "the manifest has a split whose name moves the cursor of a terminal",
    lambda content: content["splits"].update({"\x1b[2J": content["splits"].pop("test")}),
)
forged(
    "manifest_chunks_of_no_size",
    "the manifest has codec zstd without chunk_frames",
    lambda content: content["codec"].pop("chunk_frames"),
    "zstd",
)
forged(
    "manifest_huge_chunks",
    "the manifest has chunks of two billion frames",
    lambda content: content["codec"].update(chunk_frames=2**31),
    "zstd",
)


# The index.


@kind("plain")
def index_pickle(folder: Path) -> None:
    """an index is a pickled array that runs a command"""
    np.save(folder / "train.index.npy", np.array([Canary()], object), allow_pickle=True)
    sign(folder)


@kind("plain")
def index_bare_pickle(folder: Path) -> None:
    """an index is a bare pickle, which np.load would take too"""
    (folder / "train.index.npy").write_bytes(pickle.dumps(Canary()))
    sign(folder)


@kind("plain")
def index_zip(folder: Path) -> None:
    """an index is a zip bomb, which np.load would open"""
    with zipfile.ZipFile(folder / "train.index.npy", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(100 << 20))
    sign(folder)


def header(folder: Path, text: str) -> None:
    head = text.encode().ljust(118)[:60_000] + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    (folder / "train.index.npy").write_bytes(data + bytes(500))
    sign(folder)


@kind("plain")
def index_of_2_60_rows(folder: Path) -> None:
    """an index claims 2^60 rows"""
    fields = index_dtype(6).descr
    header(folder, repr({"descr": fields, "fortran_order": False, "shape": (2**60,)}))


@kind("plain")
def index_header_nested(folder: Path) -> None:
    """the header of an index nests brackets 9,000 deep"""
    header(folder, "(" * 9000)


@kind("plain")
def index_header_code(folder: Path) -> None:
    """the header of an index is Python code"""
    header(folder, "__import__('os').system('touch canary')")


@kind("plain")
def index_of_wide_keys(folder: Path) -> None:
    """an index has keys of 500 MB"""
    fields = index_dtype(500 << 20).descr
    header(folder, repr({"descr": fields, "fortran_order": False, "shape": (1,)}))
    holes(folder / "train.index.npy", 600 << 20)
    sign(folder)


@kind("plain")
def index_points_outside(folder: Path) -> None:
    """an index points beyond the end of the shard"""
    edit_index(folder, lambda rows: rows["offset"].__setitem__(0, 2**63 - 512))


@kind("plain")
def index_shard_of_no_file(folder: Path) -> None:
    """an index names a shard that the manifest does not"""
    edit_index(folder, lambda rows: rows["shard"].__setitem__(0, 2**32 - 1))


@kind("plain")
def index_label_of_nobody(folder: Path) -> None:
    """an index has labels of speakers that there are not, and a shard is cut short"""
    edit_index(folder, lambda rows: rows["label"].__setitem__(slice(None), 10**9))
    os.truncate(folder / "train-000000.tar", 2048)


@kind("plain")
def index_key_escapes(folder: Path) -> None:
    """a key holds escape sequences of a terminal"""
    edit_index(folder, lambda rows: rows["key"].__setitem__(0, b"\x1b[2Ja"))


@kind("plain")
def index_key_leads_outside(folder: Path) -> None:
    """a key is ../up"""
    edit_index(folder, lambda rows: rows["key"].__setitem__(0, b"../up"))


@kind("plain")
def index_key_not_unicode(folder: Path) -> None:
    """a key is not Unicode"""
    edit_index(folder, lambda rows: rows["key"].__setitem__(0, b"\xff\xfe"))


@kind("plain")
def index_pipe(folder: Path) -> None:
    """an index is a named pipe"""
    (folder / "train.index.npy").unlink()
    os.mkfifo(folder / "train.index.npy")


@kind("zstd")
def index_frames_without_bytes(folder: Path) -> None:
    """an index claims 400 million frames of a few stored bytes"""
    replace_payload(folder, encoded(33, ZSTD), frames=400_000_000)


@kind("plain")
def rejects_of_500_mb(folder: Path) -> None:
    """rejects.jsonl is 500 MB long, as the manifest says"""
    holes(folder / "rejects.jsonl", 500 << 20)
    entry = {"file": "rejects.jsonl", "bytes": 500 << 20, "sha256": "0" * 64}
    sign(folder, lambda content: content.update(rejects=entry))


@kind("plain")
def rejects_nested(folder: Path) -> None:
    """rejects.jsonl nests lists 100,000 deep"""
    import hashlib

    data = b'{"file": ' + b"[" * 100_000
    (folder / "rejects.jsonl").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    entry = {"file": "rejects.jsonl", "bytes": len(data), "sha256": digest}
    sign(folder, lambda content: content.update(rejects=entry))


# Members of shards: zstd and npy.


def frame(size: int, known: bool = True) -> bytes:
    """A small zstd frame of `size` zeros."""
    data = zstandard.ZstdCompressor(level=3, write_content_size=known)
    writer = data.compressobj(size if known else -1)
    parts = [writer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join(parts) + writer.flush()


@kind("zstd")
def zstd_bomb(folder: Path) -> None:
    """a zstd frame of 16 KB inflates to 500 MB"""
    edit_payload(folder, lambda data: frame(500 << 20) + data)


@kind("zstd")
def zstd_bomb_of_unknown_size(folder: Path) -> None:
    """a zstd frame that does not say its size inflates to 500 MB"""
    edit_payload(folder, lambda data: frame(500 << 20, known=False) + data)


@kind("zstd")
def zstd_chunk_bomb(folder: Path) -> None:
    """the chunk of a crop inflates to 500 MB"""

    def bomb(data: bytes) -> bytes:
        head, body = encoded(33, ZSTD), frame(500 << 20)
        first = struct.unpack_from("<I", head, len(head) - 9 - 16)[0]
        table = struct.pack("<IIII", first, 128, len(body), 330)
        return head[:first] + body + table + struct.pack("<IBI", 2, 0, 0x8F92EAB1)

    edit_payload(folder, bomb)


@kind("zstd")
def zstd_window_of_2_gb(folder: Path) -> None:
    """a zstd frame asks for a window of 2 GB"""
    window = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x03\x00\x00z"
    edit_payload(folder, lambda data: window + data)


@kind("zstd")
def zstd_skippable_frame_lies(folder: Path) -> None:
    """a skippable zstd frame claims 4 GB"""
    edit_payload(folder, lambda data: struct.pack("<II", 0x184D2A50, 2**32 - 1) + data)


@kind("zstd")
def zstd_seek_table_lies(folder: Path) -> None:
    """the seek table of a member leads beyond its end"""
    edit_payload(folder, lambda data: data[:-17] + b"\xff\xff\xff\x7f" + data[-13:])


@kind("plain")
def npy_pickle(folder: Path) -> None:
    """a mel member is a pickled array that runs a command"""

    def pickled(data: bytes) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Canary()], object), allow_pickle=True)
        return buffer.getvalue().ljust(len(data), b"\0")[: len(data)]

    edit_payload(folder, pickled)


@kind("plain")
def npy_of_2_60_frames(folder: Path) -> None:
    """the npy header of a mel member claims 2^60 frames"""

    def huge(data: bytes) -> bytes:
        text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({2**60}, {N_MELS}), }}"
        return data[:10] + text.encode().ljust(117) + b"\n" + data[128:]

    edit_payload(folder, huge)


@kind("plain")
def npy_header_nested(folder: Path) -> None:
    """the npy header of a mel member is code, nested 100 deep"""
    code = b"__import__('os').system('touch canary')" + b"(" * 78
    edit_payload(folder, lambda data: data[:10] + code + b"\n" + data[128:])


# Shards as tars.


def member(**values: Any) -> Callable[[tarfile.TarInfo, int], None]:
    def change(info: tarfile.TarInfo, number: int) -> None:
        if number == 1:
            for name, value in values.items():
                setattr(info, name, value)

    return change


def tar(name: str, sentence: str, /, **values: Any) -> None:
    def make(folder: Path) -> None:
        write_tar(folder, member(**values))

    make.__name__, make.__doc__ = name, sentence
    kind("plain")(make)


tar(
    "tar_symbolic_link",
    "a member of a shard is a symbolic link to ../outside/secret",
    type=b"2",
    linkname="../outside/secret",
    size=0,
)
tar(
    "tar_hard_link",
    "a member of a shard is a hard link to /etc/passwd",
    type=b"1",
    linkname="/etc/passwd",
    size=0,
)
tar(
    "tar_device",
    "a member of a shard is the device /dev/zero",
    type=b"3",
    devmajor=1,
    devminor=5,
    size=0,
)
tar("tar_parent_folder", "a member of a shard is named ../outside/secret", name="../outside/secret")
tar("tar_absolute_name", "a member of a shard is named /tmp/canary", name="/tmp/canary.json")
tar("tar_size_beyond_64_bits", "a member of a shard claims 2^70 bytes, in base 256", size=2**70)
tar("tar_negative_size", "a member of a shard claims -1 bytes", size=-(2**40))


@kind("plain")
def tar_sparse(folder: Path) -> None:
    """a member of a shard is a GNU sparse file of 10 GB"""

    def change(info: tarfile.TarInfo, number: int) -> bytes:
        if number != 1:
            return b""
        # Its map of the old GNU kind: one piece of 1 byte, and a real size of 10 GB.
        head = bytearray(tarfile.TarInfo("sparse.json").tobuf(tarfile.GNU_FORMAT))
        head[156:157] = b"S"
        head[386:410] = b"%011o\0%011o\0" % (0, 0)
        head[483:495] = b"\x80" + (10 * GB).to_bytes(11, "big")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head)

    write_tar(folder, change)


@kind("plain")
def tar_extended_header(folder: Path) -> None:
    """a shard has an extended (pax) header of 400 MB"""

    def change(info: tarfile.TarInfo, number: int) -> bytes:
        if number != 1:
            return b""
        head = tarfile.TarInfo("pax")
        head.type, head.size = b"x", 400 << 20
        return head.tobuf(tarfile.GNU_FORMAT)

    write_tar(folder, change)
    holes(folder / "test-000000.tar", 600 << 20)
    sign(folder)


@kind("plain")
def tar_long_name(folder: Path) -> None:
    """a shard has a member name of 400 MB"""

    def change(info: tarfile.TarInfo, number: int) -> bytes:
        if number != 1:
            return b""
        head = tarfile.TarInfo("././@LongLink")
        head.type, head.size = b"L", 400 << 20
        return head.tobuf(tarfile.GNU_FORMAT)

    write_tar(folder, change)
    holes(folder / "test-000000.tar", 600 << 20)
    sign(folder)


@kind("plain")
def tar_gzip_bomb(folder: Path) -> None:
    """a shard is a gzip bomb"""
    import gzip

    (folder / "test-000000.tar").write_bytes(gzip.compress(bytes(300 << 20), 1))
    sign(folder)


@kind("plain")
def tar_json_of_500_mb(folder: Path) -> None:
    """a .json member has 500 MB, all holes"""
    write_tar(folder, member(size=500 << 20))
    holes(folder / "test-000000.tar", 600 << 20)
    sign(folder)


@kind("plain")
def shard_pipe(folder: Path) -> None:
    """a shard is a named pipe"""
    (folder / "test-000000.tar").unlink()
    os.mkfifo(folder / "test-000000.tar")


@kind("plain")
def shard_folder(folder: Path) -> None:
    """a shard is a folder"""
    (folder / "test-000000.tar").unlink()
    (folder / "test-000000.tar").mkdir()


# The JSON files of a data set, and the paths in them.


def metadata(
    name: str, sentence: str, change: Callable[[str], str], file: str = "metadata"
) -> None:
    def make(folder: Path) -> None:
        path = folder / f"{file}.json"
        path.write_text(change(path.read_text() if path.exists() else ""))

    make.__name__, make.__doc__ = name, sentence
    kind("dataset")(make)


def entry(name: str, sentence: str, /, **values: Any) -> None:
    def make(folder: Path) -> None:
        set_entry(folder, **values)

    make.__name__, make.__doc__ = name, sentence
    kind("dataset")(make)


FIRST = '{"feature_path": "uttr-0.pt", "mel_len": 70}'
metadata("metadata_nested", "metadata.json nests lists 200,000 deep", lambda text: "[" * 200_000)
metadata(
    "metadata_entry_nested",
    "an utterance in metadata.json is a list, nested 900 deep",
    lambda text: text.replace(FIRST, "[" * 900 + "]" * 900),
)
metadata(
    "metadata_number_of_5000_digits",
    "metadata.json has a number of 5,000 digits",
    lambda text: text.replace("70}", "7" * 5000 + "}"),
)
metadata("metadata_number_1e400", "mel_len is 1e400", lambda text: text.replace("70}", "1e400}"))
metadata(
    "metadata_duplicate_keys",
    "a speaker occurs twice in metadata.json",
    lambda text: text.replace('"id1"', '"id0"'),
)
metadata(
    "metadata_of_many_values",
    "metadata.json is a list of ten million lists",
    lambda text: '{"n_mels": 5, "speakers": {"a": [' + "[]," * 10_000_000 + "[]]}}",
)
metadata(
    "metadata_of_faulty_entries",
    "metadata.json lists a million utterances that are none",
    lambda text: '{"n_mels": 5, "speakers": {"a": [' + "1," * 1_000_000 + "1]}}",
)
metadata(
    "metadata_one_file_often",
    "metadata.json lists one file 390,000 times",
    lambda text: text.replace(FIRST, (FIRST + ",") * 390_000 + FIRST),
)
metadata(
    "metadata_long_name",
    "the name of a speaker has 20 million characters",
    lambda text: text.replace("id0", "a" * 20_000_000),
)
metadata(
    "metadata_wide_characters",
    "metadata.json is 30 MB of characters that take four bytes each",
    lambda text: text.replace("id0", "\U0001f600" * 7_500_000),
)
metadata(
    "mapping_of_numbers",
    "mapping.json numbers speakers from 2^70",
    lambda text: json.dumps({"speaker2id": {"id0": 2**70, "id1": -(2**70)}}),
    "mapping",
)
entry("path_parent_folder", "a path is ../outside/secret.pt", feature_path="../outside/secret.pt")
entry("path_absolute", "a path is /etc/passwd.pt", feature_path="/etc/passwd.pt")
entry("path_with_nul", "a path has a zero byte", feature_path="uttr-0\0.pt")
entry("path_of_20_mb", "a path has 20 million characters", feature_path="a" * 20_000_000 + ".pt")
entry("mel_len_of_2_40", "mel_len is 2^40", mel_len=2**40)


@kind("dataset")
def metadata_of_10_gb(folder: Path) -> None:
    """metadata.json is 10 GB long"""
    holes(folder / "metadata.json", 10 * GB)


@kind("dataset")
def metadata_pipe(folder: Path) -> None:
    """metadata.json is a named pipe"""
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "metadata.json")


@kind("dataset")
def mapping_device(folder: Path) -> None:
    """mapping.json leads to a device that never ends"""
    (folder / "mapping.json").symlink_to("/dev/zero")


@kind("dataset")
def link_outside(folder: Path) -> None:
    """a .pt file is a symbolic link out of the data set"""
    (folder / "uttr-0.pt").rename(folder.parent / "outside" / "real.pt")
    (folder / "uttr-0.pt").symlink_to(folder.parent / "outside" / "real.pt")


@kind("dataset")
def pt_pipe(folder: Path) -> None:
    """a .pt file is a named pipe"""
    (folder / "uttr-0.pt").unlink()
    os.mkfifo(folder / "uttr-0.pt")


@kind("dataset")
def pt_folder(folder: Path) -> None:
    """a .pt file is a folder"""
    (folder / "uttr-0.pt").unlink()
    (folder / "uttr-0.pt").mkdir()


# The .pt files.


def pt(name: str, sentence: str, data: Callable[[Path], Any], /, **values: Any) -> None:
    """Register a file uttr-0.pt: what `data` returns as bytes, or saves itself."""

    def make(folder: Path) -> None:
        made = data(folder / "uttr-0.pt")
        if isinstance(made, bytes):
            (folder / "uttr-0.pt").write_bytes(made)
        if values:
            set_entry(folder, **values)

    make.__name__, make.__doc__ = name, sentence
    kind("dataset")(make)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def repacked(
    value: Any, edit: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """What torch.save writes, with records that `edit` has changed; the checksums are true."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(value))) as old,
        zipfile.ZipFile(out, "w", method) as new,
    ):
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return out.getvalue()


def program(data: bytes) -> bytes:
    return repacked(
        torch.zeros(70, N_MELS), lambda name, was: data if name.endswith(".pkl") else was
    )


def flood(path: Path) -> bytes:
    """A zip file of 300,000 records."""
    names = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
        + b"a"
        for _ in range(300_000)
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(names), 64, 0)
    return b"PK\3\4" + bytes(60) + names + end


def claims(count: int, frames: int) -> bytes:
    """A file whose pickle claims more numbers and frames than it has."""
    was = saved(torch.zeros(70, N_MELS))
    assert b"M\x5e\x01" in was
    old, new = b"M\x5e\x01", b"J" + struct.pack("<i", count)
    return repacked(
        torch.zeros(70, N_MELS),
        lambda name, data: data.replace(old, new).replace(b"KF", b"J" + struct.pack("<i", frames)),
    )


def older_claims(path: Path) -> bytes:
    data = saved(torch.zeros(70, N_MELS), _use_new_zipfile_serialization=False)
    # LONG1: a number of 6 bytes.
    return data.replace(b"M\x5e\x01", b"\x8a\x06" + (10**12).to_bytes(6, "little"))


def with_holes(path: Path) -> None:
    torch.save(torch.zeros(70, N_MELS), path)
    holes(path, 8 * GB)


def older_tar(path: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Canary(), 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def script(path: Path) -> None:
    class Identity(torch.nn.Module):
        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            return mel

    torch.jit.trace(Identity(), torch.zeros(70, N_MELS)).save(str(path))


class Tagged(torch.Tensor):
    """A tensor with a __torch_function__ of its own."""


mel = torch.zeros(70, N_MELS)
BOMB = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85R."
pt("pt_command", "a .pt file runs a command when it is unpickled", lambda path: saved(Canary()))
pt(
    "pt_command_in_older_format",
    "the same in PyTorch's older format",
    lambda path: saved(Canary(), _use_new_zipfile_serialization=False),
)
pt(
    "pt_command_bare",
    "a .pt file is a bare pickle that runs a command",
    lambda path: pickle.dumps(Canary()),
)
pt(
    "pt_command_after_tensor",
    "a second pickle follows that of a tensor",
    lambda path: repacked(
        mel, lambda name, was: was + pickle.dumps(Canary()) if name.endswith(".pkl") else was
    ),
)
pt(
    "pt_bytearray_of_10_gb",
    "a .pt file asks for a bytearray of 10 GB, which weights_only allows",
    lambda path: program(BOMB),
)
pt(
    "pt_eval",
    "a .pt file calls for builtins.eval",
    lambda path: program(b"\x80\x02cbuiltins\neval\nX\x0c\0\0\0open('canary')\x85R."),
)
pt(
    "pt_long_pickle",
    "the pickle of a .pt file has ten million instructions",
    lambda path: program(b"\x80\x02" + b"N" * 10_000_000 + b"."),
)
pt(
    "pt_string_of_4_gb",
    "the pickle of a .pt file claims a string of 4 GB",
    lambda path: program(b"\x80\x02X\xff\xff\xff\xffa."),
)
pt(
    "pt_view_of_one_frame",
    "a view of one frame pretends to a billion, as the metadata do",
    lambda path: saved(torch.zeros(1, N_MELS).expand(10**9, N_MELS)),
    mel_len=10**9,
)
pt(
    "pt_more_numbers_than_stored",
    "a tensor claims more numbers than its record has",
    lambda path: claims(10**9, 2 * 10**8),
    mel_len=2 * 10**8,
)
pt("pt_older_storage_of_10_12", "a file of the older format claims 10^12 numbers", older_claims)
pt(
    "pt_compressed",
    "a .pt file holds compressed records: 400 MB of zeros",
    lambda path: repacked(
        mel, lambda name, was: bytes(400 << 20) if "/data/" in name else was, zipfile.ZIP_DEFLATED
    ),
)
pt("pt_of_many_records", "a .pt file has 300,000 records", flood)
pt(
    "pt_slice_of_large_tensor",
    "a .pt file of 40 MB holds a tensor of 1 KB",
    lambda path: saved(torch.zeros(2_000_000, N_MELS)[:70]),
)
pt(
    "pt_of_holes",
    "a .pt file of 8 GB is all holes, and mel_len fits",
    with_holes,
    mel_len=4 * 10**8,
)
pt("pt_older_tar", "a .pt file of PyTorch's oldest format, a tar of pickles", older_tar)
pt("pt_torchscript", "a .pt file is a TorchScript program", script)
pt(
    "pt_quantized",
    "a .pt file holds a quantized tensor",
    lambda path: program(b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R."),
)
pt(
    "pt_sparse",
    "a .pt file holds a sparse tensor that claims 10^9 frames",
    lambda path: saved(
        torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (10**9, N_MELS))
    ),
    mel_len=10**9,
)
pt(
    "pt_nested",
    "a .pt file holds a nested tensor",
    lambda path: program(b"\x80\x02ctorch._utils\n_rebuild_nested_tensor\n)R."),
)
pt(
    "pt_meta",
    "a .pt file holds a tensor without numbers",
    lambda path: saved(torch.zeros(70, N_MELS, device="meta")),
)
pt(
    "pt_subclass",
    "a .pt file holds a tensor of a class of its own",
    lambda path: program(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R."),
)


# A folder that is to be built into, and what an unfinished build left there.


def work(folder: Path) -> Path:
    made = folder / ".shardprep-build"
    made.mkdir()
    return made


@kind("target")
def record_leads_outside(folder: Path) -> None:
    """the record of an unfinished shard, true otherwise, names ../../outside/secret"""
    edit_record(folder, lambda record: record["info"].update(file="../../outside/secret"))


@kind("target")
def record_with_other_rows(folder: Path) -> None:
    """the record of an unfinished shard, true otherwise, has offsets of 2^70"""
    edit_record(folder, lambda record: record["rows"][0].__setitem__(0, 2**70))


@kind("target")
def record_of_10_gb(folder: Path) -> None:
    """the record of an unfinished shard is 10 GB long"""
    holes(work(folder) / "train-000000.tar.json", 10 * GB)


@kind("target")
def record_nested(folder: Path) -> None:
    """the record of an unfinished shard nests lists 100,000 deep"""
    (work(folder) / "train-000000.tar.json").write_text('{"rows": ' + "[" * 100_000)


@kind("target")
def record_pipe(folder: Path) -> None:
    """the record of an unfinished shard is a named pipe"""
    os.mkfifo(work(folder) / "train-000000.tar.json")


@kind("target")
def lock_link(folder: Path) -> None:
    """the lock of an unfinished build is a link to ../outside/secret"""
    (work(folder) / "lock").symlink_to(folder.parent / "outside" / "secret")


@kind("target")
def work_folder_link(folder: Path) -> None:
    """the folder of an unfinished build is a link to ../outside"""
    (folder / ".shardprep-build").symlink_to(folder.parent / "outside")


@kind("target")
def unfinished_shard_link(folder: Path) -> None:
    """an unfinished shard is a link to ../outside/secret"""
    (work(folder) / "train-000000.tar").symlink_to(folder.parent / "outside" / "secret")


@kind("target")
def target_manifest_pipe(folder: Path) -> None:
    """the manifest of the set to be replaced is a named pipe"""
    work(folder)
    os.mkfifo(folder / "manifest.json")
