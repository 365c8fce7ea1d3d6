"""A file that is not what its name says is recognised by its bytes; a good file is not."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shardprep.storage.sniff import server_error, sniff


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


KINDS: list[tuple[bytes, str, str]] = [
    (b"", "empty", "is empty (0 bytes); copy or download it again"),
    (b"\0", "zeros", "holds nothing but zero bytes (1)"),
    (bytes(100_000), "zeros", "(100000), as after a crash"),
    (b"version https://git-lfs.github.com/spec/v1\r\noid", "pointer", "run `git lfs pull`"),
    (b"/annex/objects/SHA256E-s9--00.pt\n", "pointer", "run `git annex get`"),
    (b"../../.git/annex/objects/Zk/SHA256E-s9--00.pt/SHA256E-s9--00.pt", "pointer", "git annex"),
    (b"outs:\n- md5: 00\n  size: 9\n  path: Dataset\n", "pointer", "run `dvc pull`"),
    (b"md5: 00\nouts:\n- md5: 00\n  path: a.pt\n", "pointer", "run `dvc pull`"),
    (b"<!DOCTYPE html><html>sign in</html>", "page", "is a web page, not the file"),
    (
        b"\xef\xbb\xbf\r\n <html><head><title>\n Quota\n exceeded</title>",
        "page",
        "'Quota exceeded'",
    ),
    ("<!doctype HTML>".encode("utf-16"), "page", "is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "page", "(AccessDenied)"),
    (b"<br />\n<b>Warning</b>: fopen()", "page", "is a web page"),
    (b"../../blobs/0123456789abcdef\n", "pointer", "is the text of a link, '../../blobs/0123"),
    (b"./a.pt", "pointer", "is the text of a link, './a.pt', not the file"),
    (b"<?xml version='1.0'?><rss></rss>", "page", "is XML, not the file"),
    (b'{"message": "Not Found", "documentation_url": "x"}', "page", "a server ('Not Found')"),
    (b'{"error": {"code": 403, "message": "Forbidden"}}', "page", "('Forbidden')"),
    (b'{"errors": [{"a": 1}]}', "json", "is JSON text"),
    (b"[1, 2]", "json", "is JSON text"),
    (b"{'n_mels': 40}", "text", "is text that begins \"{'n_mels': 40}\""),
    (b" \n\t", "text", "is blank text"),
    ("naïve".encode("utf-16"), "text", "is text that begins 'na\\xefve'"),
    (npy(), "npy", "is a NumPy file"),
    (gzip.compress(b"a", mtime=0), "packed", "gzip"),
    (bz2.compress(b"a"), "packed", "bzip2"),
    (lzma.compress(b"a"), "packed", "xz"),
    (zstandard.compress(b"a"), "packed", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "packed", "7z"),
    (tar(), "tar", "is a tar archive"),
    (b"PK\3\4rest", "zip", "is a zip archive"),
    (b"PK\3\4rest" + bytes(9000), "cut", "ends in 9000 zero bytes"),
    (bytes(512) + b"rest", "cut", "begins with 512 zero bytes"),
    (b"\x89HDF\r\n\x1a\nrest", "other", "HDF5"),
    (b"utt-1 \0BFM \4\3\0\0\0", "other", "Kaldi"),
    (b"\0BCM \0", "other", "Kaldi"),
    (b"fLaC\0\0\0\x22", "audio", "FLAC"),
    (b"OggS\0\2", "audio", "Ogg"),
    (b"ID3\3\0", "audio", "MP3"),
    (b"RIFF\4\0\0\0WAVEfmt ", "audio", "WAV"),
    (b"RIFF\4\0\0\0WEBPVP8 ", "other", "WebP"),
    (b"\0\0\0\x20ftypM4A ", "audio", "MP4"),
    (b"\x10\0\0\0\0\0\0\0" + b'{"a": {}}       ', "safetensors", "safetensors"),
    (b"\x80\4\x95", "pickle", "is a pickle of Python"),
    (b"\0\5\x16\7\0\2\0\0Mac OS X", "other", "AppleDouble"),
]


# Numbered: the bytes of an archive differ between the processes that run the tests.
@pytest.mark.parametrize(("data", "kind", "said"), KINDS, ids=range(len(KINDS)))
def test_each_kind_is_recognised(data: bytes, kind: str, said: str) -> None:
    found = sniff(data)
    assert found is not None
    assert found.kind == kind
    assert said in found.what
    assert found.what.isprintable()


def test_what_is_unknown_stays_unknown() -> None:
    assert sniff(bytes(range(1, 256)) * 40) is None
    assert sniff(b"\0\1\2\3" * 40) is None


@given(st.binary(max_size=300))
def test_any_bytes_give_an_answer_that_can_be_printed(data: bytes) -> None:
    for filler in (b"", bytes(600)):
        found = sniff(data + filler)
        assert found is None or (found.what.isprintable() and len(found.what) < 300)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"message": "Not Found"}, "'Not Found'"),
        ({"error": "invalid_grant", "error_description": "expired\nlink"}, "'expired link'"),
        ({"detail": ["Too many requests"]}, "'Too many requests'"),
        ({"n_mels": 40, "speakers": {}}, None),
        ({"message": {}}, None),
        ([{"message": "Not Found"}], None),
    ],
)
def test_answers_of_servers_are_told_from_other_objects(content: object, said: str | None) -> None:
    assert server_error(json.loads(json.dumps(content))) == said
