"""What a file is that is not what its name says, by its first and last bytes.

A clone without Git LFS, a sign-in page that was saved as the file, a full disk, a wrong export: in
each case a parser would describe a symptom. `sniff` names the cause.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from typing import NamedTuple

from shardprep.errors import REPAIR, CorruptShardError, StorageError
from shardprep.storage.local import open_regular

# As much is looked at, at the beginning and at the end.
_WINDOW = 4096
# A file system writes whole blocks: so many zero bytes are no content.
_BLOCK = 512
_MOST_SHOWN = 60
# Larger texts are not parsed to see what they say.
_MOST_JSON = 1 << 20

_AGAIN = "copy or download it again"
_FETCH = "download the file itself"

_HEADS: list[tuple[bytes, str, str]] = [
    (b"\x93NUMPY", "npy", "is a NumPy file (.npy)"),
    (b"\x1f\x8b", "packed", "is compressed with gzip; decompress it (gunzip)"),
    (b"BZh", "packed", "is compressed with bzip2; decompress it (bunzip2)"),
    (b"\xfd7zXZ\0", "packed", "is compressed with xz; decompress it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "packed", "is compressed with zstd; decompress it (unzstd)"),
    (b"\x04\x22\x4d\x18", "packed", "is compressed with lz4; decompress it (unlz4)"),
    (b"7z\xbc\xaf\x27\x1c", "packed", "is a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "packed", "is a RAR archive; unpack it"),
    (b"PK\3\4", "zip", "is a zip archive"),
    (b"PK\5\6", "zip", "is an empty zip archive"),
    (b"\x89HDF\r\n\x1a\n", "other", "is an HDF5 file"),
    (b"MATLAB 5.0", "other", "is a MATLAB file"),
    (b"PAR1", "other", "is a Parquet file"),
    (b"ARROW1", "other", "is an Arrow file"),
    (b"SQLite format 3\0", "other", "is an SQLite database"),
    (b"GGUF", "other", "is a GGUF file"),
    (b"%PDF", "other", "is a PDF file"),
    (b"\x89PNG\r\n", "other", "is an image (PNG)"),
    (b"\xff\xd8\xff", "other", "is an image (JPEG)"),
    (b"GIF8", "other", "is an image (GIF)"),
    (b"\x7fELF", "other", "is a program (ELF)"),
    (b"MZ\x90\0", "other", "is a program of Windows"),
    (b"\0\5\x16\7", "other", "is an AppleDouble file, which macOS writes beside a file"),
    (b"fLaC", "audio", "is audio (FLAC)"),
    (b"OggS", "audio", "is audio (Ogg)"),
    (b"ID3", "audio", "is audio (MP3)"),
    (b"\xff\xfb", "audio", "is audio (MP3)"),
    (b"\xff\xf3", "audio", "is audio (MP3)"),
    (b"#!AMR", "audio", "is audio (AMR)"),
    (b"NIST_1A", "audio", "is audio (SPHERE)"),
]
# Marks that do not stand at the very beginning: offset, bytes, kind, words.
_INNER: list[tuple[int, bytes, str, str]] = [
    (8, b"WAVE", "audio", "is audio (WAV)"),
    (8, b"AIFF", "audio", "is audio (AIFF)"),
    (8, b"WEBP", "other", "is an image (WebP)"),
    (4, b"ftyp", "audio", "is audio or video (MP4)"),
    (257, b"ustar", "tar", "is a tar archive"),
]
_LFS = re.compile(rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/")
_ANNEX = re.compile(rb"[^\n]{0,400}(?:\.git/|^/)annex/objects/")
_DVC = re.compile(rb"(?:md5: \w+\s+|frozen: \w+\s+)?(?:outs|deps):\s+- (?:md5|etag|path|hash)\b")
_KALDI = re.compile(rb"(?:[^\s\0]+ )?\0B[FDC]M")
_HTML = re.compile(r"<(?:!doctype html|(?:html|head|body|script|meta|title|br|b|p|div|h1)\b)", re.I)
_LINK = re.compile(rb"(?:\.\.?/[\w./-]+|[\w./-]*/blobs/[\w-]+)\s*")
_TITLE = re.compile(rb"<title[^>]*>\s*([^<]{1,200})", re.IGNORECASE)
_STORE_ERROR = re.compile(rb"<Error>.{0,200}?<Code>(\w{1,60})</Code>", re.DOTALL)
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_ERROR_KEYS = ("error_description", "error", "errors", "message", "detail", "msg", "title")


class Content(NamedTuple):
    """What a file is.

    Attributes:
        kind: "empty", "zeros", "pointer" (stands for a file elsewhere), "page", "npy", "packed",
            "zip", "tar", "audio", "safetensors", "pickle", "json", "text", "cut" or "other".
        what: The same as a clause that follows the file's name, with the remedy where it does not
            depend on what was expected.
    """

    kind: str
    what: str


def sniff(data: bytes) -> Content | None:
    """What the bytes of a whole file are; None if that is unknown.

    Args:
        data: The bytes of the file. The beginning suffices, but then a file that ends in zero
            bytes is not noticed.
    """
    if not data:
        return Content("empty", f"is empty (0 bytes); {_AGAIN}, and check for a full disk")
    head = data[:_WINDOW]
    if not data.strip(b"\0"):
        return Content(
            "zeros",
            f"holds nothing but zero bytes ({len(data)}), as after a crash; {_AGAIN}",
        )
    begin = len(head) - len(head.lstrip(b"\0"))
    found = _by_mark(head) if begin < _BLOCK else None
    found = found or (None if b"\0" in head[:_BLOCK] and not _bom(head) else _text(data, head))
    if found is not None and found.kind not in ("zip", "text"):
        return found
    if begin >= _BLOCK:
        return Content("cut", f"begins with {begin} zero bytes or more, as after a crash; {_AGAIN}")
    zeros = len(data) - len(data.rstrip(b"\0"))
    if zeros >= _BLOCK and len(data) > len(head):
        return Content(
            "cut",
            f"ends in {zeros} zero bytes, as after a crash or an aborted download; {_AGAIN}",
        )
    return found


def refuse_stand_in(data: bytes, path: str | os.PathLike[str]) -> None:
    """Refuse a pointer of Git LFS, git-annex or DVC, or a page of a server, in a file's place.

    Raises:
        StorageError: The file of a shard set was not fetched; it is not damaged.
    """
    found = sniff(data[:_WINDOW])
    if found is not None and found.kind in ("pointer", "page"):
        raise StorageError(found.what, file=path, remedy="Then run the same command again.")


def wrong_size(
    path: str | os.PathLike[str], found: int, expected: int, remedy: str = REPAIR
) -> CorruptShardError:
    """The error for a file of a shard set that has another size than the manifest says.

    Raises:
        StorageError: See `refuse_stand_in`.
    """
    with contextlib.suppress(OSError), open_regular(path) as file:
        refuse_stand_in(file.read(_WINDOW), path)
    return CorruptShardError(f"has {found} bytes, expected {expected}", file=path, remedy=remedy)


def _by_mark(head: bytes) -> Content | None:
    if head.startswith(b"PK\3\4") and b"[Content_Types].xml" in head:
        return Content("other", "is a file of Office, such as .xlsx or .docx")
    for mark, kind, what in _HEADS:
        if head.startswith(mark):
            return Content(kind, what)
    for offset, mark, kind, what in _INNER:
        if head.startswith(mark, offset):
            return Content(kind, what)
    if _KALDI.match(head):
        return Content("other", "is a Kaldi archive (.ark)")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return Content("safetensors", "is a safetensors file")
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return Content("pickle", "is a pickle of Python")
    return None


def _text(data: bytes, head: bytes) -> Content | None:
    if _LFS.match(head):
        return Content("pointer", "is a Git LFS pointer, not the file: run `git lfs pull`")
    if len(data) <= _WINDOW and _ANNEX.match(head):
        remedy = "run `git annex get` (DataLad: `datalad get`)"
        return Content("pointer", f"is a git-annex pointer, not the file: {remedy}")
    if _DVC.match(head):
        return Content("pointer", "is a DVC file that stands for the data: run `dvc pull`")
    if len(data) <= _WINDOW and _LINK.fullmatch(data):
        shown = _shown(data)
        return Content("pointer", f"is the text of a link, {shown}, not the file; {_FETCH}")
    codec = _bom(head) or "utf-8"
    try:
        # The window may cut a character.
        decoder = codecs.getincrementaldecoder(codec)()
        text = decoder.decode(head, final=len(data) <= len(head))
    except UnicodeDecodeError:
        return None
    text = text.lstrip("\ufeff \t\r\n")
    if re.match(r"<[a-zA-Z!?]", text):
        return _markup(head, text)
    if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        return None
    if text[:1] in ("{", "[") and (found := _json(data)):
        return found
    shown = ascii(" ".join(text.split())[:_MOST_SHOWN])
    return Content("text", f"is text that begins {shown}" if text else "is blank text")


def _markup(head: bytes, text: str) -> Content:
    if refused := _STORE_ERROR.search(head):
        said = refused[1].decode("ascii", "replace")
        return Content("page", f"is an error message of a store ({said}), not the file; {_FETCH}")
    if not _HTML.search(text):
        return Content("page", f"is XML, not the file; {_FETCH}")
    title = _TITLE.search(head)
    named = f" (its title: {_shown(title[1])})" if title else ""
    return Content(
        "page",
        f"is a web page{named}, not the file: the server wants a sign-in or has refused; {_FETCH}",
    )


def _json(data: bytes) -> Content | None:
    try:
        content = json.loads(data) if len(data) <= _MOST_JSON else None
    except (ValueError, RecursionError):
        return None
    if said := server_error(content):
        return Content("page", f"is an error message of a server ({said}), not the file; {_FETCH}")
    return Content("json", "is JSON text")


def server_error(content: object) -> str | None:
    """What a JSON answer says if it is an error of a web server; None if it is anything else."""
    if not isinstance(content, dict) or len(content) > 10:
        return None
    for key in _ERROR_KEYS:
        said = content.get(key)
        if isinstance(said, dict):
            said = said.get("message") or said.get("code")
        if isinstance(said, list) and said:
            said = said[0]
        if isinstance(said, str | int) and said:
            return _shown(str(said).encode())
    return None


def _bom(head: bytes) -> str | None:
    return next((codec for mark, codec in _BOMS.items() if head.startswith(mark)), None)


def _shown(text: bytes) -> str:
    return ascii(" ".join(text.decode("utf-8", "replace").split())[:_MOST_SHOWN])
