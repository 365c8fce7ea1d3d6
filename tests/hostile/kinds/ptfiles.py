"""The .pt files of a data set."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forge import (
    N_MELS,
    holes,
    set_entry,
)

from kinds.registry import GB, Canary, register


def pt(name: str, sentence: str, data: Callable[[Path], Any], /, **values: Any) -> None:
    """Register a file uttr-0.pt; `data` returns its bytes, or saves it."""

    def make(folder: Path) -> None:
        made = data(folder / "uttr-0.pt")
        if isinstance(made, bytes):
            (folder / "uttr-0.pt").write_bytes(made)
        if values:
            set_entry(folder, **values)

    register(name, sentence, make, "dataset")


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def repacked(
    value: Any, edit: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    """A file of torch.save with records that `edit` has changed; the checksums are right."""
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
    """A subclass of Tensor."""


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
    "pt_eval_in_protocol_4",
    "a .pt file calls for builtins.eval by names on its stack",
    lambda path: program(
        b"\x80\x04\x95\x2a\0\0\0\0\0\0\0\x8c\x08builtins\x94\x8c\x04eval\x94\x93\x94"
        b"\x8c\x0fopen('canary','w')\x94\x85\x94R."
    ),
)
pt(
    "pt_name_in_two_halves",
    "a .pt file spells os.system in the memo of its pickle",
    lambda path: program(
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\0\x93\x94\x8c\x0ctouch canary\x85R."
    ),
)
pt(
    "pt_command_in_protocol_5",
    "the pickle of a .pt file is of protocol 5 and runs a command",
    lambda path: program(pickle.dumps(Canary(), 5)),
)
pt(
    "pt_frame_of_8_eb",
    "the pickle of a .pt file claims a frame of 8 exabytes",
    lambda path: program(b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"N."),
)
pt(
    "pt_bytes_of_4_gb",
    "the pickle of a .pt file claims 4 GB of bytes",
    lambda path: program(b"\x80\x04B\xff\xff\xff\xffa."),
)
pt(
    "pt_memo_bomb",
    "the pickle of a .pt file doubles a tuple 4,000 times by its memo",
    lambda path: program(
        b"\x80\x04)\x94"
        + b"".join(
            b"j" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"\x86\x94"
            for n in range(4_000)
        )
        + b"."
    ),
)
pt(
    "pt_next_buffer",
    "the pickle of a .pt file asks for a buffer from outside",
    lambda path: program(b"\x80\x05\x97\x98."),
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
    "a view of one frame claims a billion frames, and so do the metadata",
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
    "a .pt file holds a tensor of another class",
    lambda path: program(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n)R."),
)
