"""Indexes, and the records of rejected utterances."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
from forge import (
    edit_index,
    holes,
    pipe,
    replace_payload,
    sign,
    zstd_frames,
)

from kinds.registry import Canary, kind
from shardprep.format.index import index_dtype


@kind("plain")
def index_pickle(folder: Path) -> None:
    """an index is a pickled array that runs a command"""
    np.save(folder / "split=train.index.npy", np.array([Canary()], object), allow_pickle=True)
    sign(folder)


@kind("plain")
def index_bare_pickle(folder: Path) -> None:
    """an index is a bare pickle, which np.load would also open"""
    (folder / "split=train.index.npy").write_bytes(pickle.dumps(Canary()))
    sign(folder)


@kind("plain")
def index_zip(folder: Path) -> None:
    """an index is a zip bomb, which np.load would open"""
    with zipfile.ZipFile(folder / "split=train.index.npy", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(100 << 20))
    sign(folder)


def header(folder: Path, text: str) -> None:
    head = text.encode().ljust(118)[:60_000] + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    (folder / "split=train.index.npy").write_bytes(data + bytes(500))
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
    holes(folder / "split=train.index.npy", 600 << 20)
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
    """an index has labels of speakers that do not exist, and a shard is cut short"""
    edit_index(folder, lambda rows: rows["label"].__setitem__(slice(None), 10**9))
    os.truncate(folder / "train-000000.tar", 2048)


@kind("uint8")
def index_scale_without_bounds(folder: Path) -> None:
    """an index of uint8 has a minimum of NaN, a negative step and an infinite one"""

    def edit(rows: np.ndarray) -> None:
        rows["minimum"][0], rows["step"][1], rows["step"][2] = np.nan, -1, np.inf

    edit_index(folder, edit)


@kind("uint8")
def index_without_scales(folder: Path) -> None:
    """an index of uint8 has neither minimum nor step"""

    def edit(rows: np.ndarray) -> np.ndarray:
        names = [name for name in rows.dtype.names if name not in ("minimum", "step")]
        own = np.empty(len(rows), [(name, rows.dtype[name]) for name in names])
        for name in names:
            own[name] = rows[name]
        return own

    edit_index(folder, edit)


@kind("plain")
def index_of_bytes(folder: Path) -> None:
    """a manifest says that matrices of float16 are uint8"""
    sign(folder, lambda content: content.__setitem__("dtype", "uint8"))


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
    pipe(folder / "split=train.index.npy")


@kind("zstd")
def index_frames_without_bytes(folder: Path) -> None:
    """an index claims 400 million frames of a few stored bytes"""
    replace_payload(folder, zstd_frames(33), frames=400_000_000)


@kind("plain")
def rejects_of_500_mb(folder: Path) -> None:
    """rejects.jsonl is 500 MB long, as the manifest says"""
    holes(folder / "rejects.jsonl", 500 << 20)
    entry = {"file": "rejects.jsonl", "bytes": 500 << 20, "sha256": "0" * 64}
    sign(folder, lambda content: content.update(rejects=entry))


@kind("plain")
def rejects_nested(folder: Path) -> None:
    """rejects.jsonl nests lists 100,000 deep"""
    data = b'{"file": ' + b"[" * 100_000
    (folder / "rejects.jsonl").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    entry = {"file": "rejects.jsonl", "bytes": len(data), "sha256": digest}
    sign(folder, lambda content: content.update(rejects=entry))
