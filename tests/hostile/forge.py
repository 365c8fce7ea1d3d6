"""Small valid sets, and tools that forge them and then correct every checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardprep import BuildOptions
from shardprep.build.plan import shard_tasks
from shardprep.build.work_folder import FolderWork
from shardprep.format import codecs
from shardprep.format.manifest import CodecInfo
from shardprep.source.dataset import scan_dataset

N_MELS = 5
Edit = Callable[[Any], Any]


def write_dataset(folder: Path) -> None:
    """A data set of N_MELS mels: two speakers of three utterances, and one test utterance."""
    folder.mkdir(parents=True)
    speakers: dict[str, list[dict[str, Any]]] = {}
    for number in range(6):
        entry = {"feature_path": f"uttr-{number}.pt", "mel_len": 70 + number}
        torch.save(torch.randn(70 + number, N_MELS), folder / f"uttr-{number}.pt")
        speakers.setdefault(f"id{number % 2}", []).append(entry)
    torch.save(torch.randn(33, N_MELS), folder / "uttr-9.pt")
    test = {"n_mels": N_MELS, "utterances": [{"feature_path": "uttr-9.pt", "mel_len": 33}]}
    (folder / "metadata.json").write_text(json.dumps({"n_mels": N_MELS, "speakers": speakers}))
    (folder / "testdata.json").write_text(json.dumps(test))


def write_recordings(folder: Path) -> None:
    """A folder of recordings: two speakers of one wav."""
    for speaker in range(2):
        (folder / f"id{speaker}").mkdir(parents=True)
        samples = np.random.default_rng(speaker).normal(0, 3000, 8000).astype("<i2")
        with wave.open(str(folder / f"id{speaker}" / "a.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(samples.tobytes())


def options(**values: Any) -> BuildOptions:
    """Build options: in this process, three utterances per shard."""
    return BuildOptions(**{"workers": 1, "samples_per_shard": 3, **values})


def edit_record(target: Path, edit: Edit) -> None:
    """Leave one finished shard of an unfinished build in `target`, with an edited record."""
    work = target / ".shardprep-build"
    work.mkdir()
    task = shard_tasks(scan_dataset(target.parent / "Dataset"), options())[0]
    FolderWork(work)(task, lambda nbytes: None)
    path = work / f"{task.plan.file}.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def sign(shards: Path, edit: Edit = lambda content: None) -> None:
    """Correct sizes and checksums in the manifest, `edit` its content, then sign it."""
    path = shards / "manifest.json"
    content = json.loads(path.read_text())
    for split in content["splits"].values():
        for entry in (split["index"], *split["shards"]):
            file = shards / entry["file"]
            if file.is_file():
                entry["bytes"] = file.stat().st_size
                with open(file, "rb") as opened:
                    entry["sha256"] = hashlib.file_digest(opened, "sha256").hexdigest()
    edit(content)
    content["fingerprint"] = ""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))


def edit_index(shards: Path, edit: Edit, split: str = "train") -> None:
    """Let `edit` change the rows of an index, in place or by returning new rows."""
    path = shards / f"split={split}.index.npy"
    rows = np.load(path)
    changed = edit(rows)
    np.save(path, rows if changed is None else changed)
    sign(shards)


def replace_payload(shards: Path, payload: bytes, frames: int | None = None) -> None:
    """Store other bytes for the only test utterance; index and checksums fit them."""
    path = shards / "test-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    members[0] = members[0][0], payload
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    def row(rows: Any) -> None:
        rows["nbytes"], rows["crc32"] = len(payload), zlib.crc32(payload)
        rows["frames"] = rows["frames"] if frames is None else frames

    edit_index(shards, row, "test")
    if frames is not None:

        def totals(content: Any) -> None:
            content["splits"]["test"]["frames"] = frames
            content["splits"]["test"]["shards"][0]["frames"] = frames

        sign(shards, totals)


def edit_payload(shards: Path, edit: Callable[[bytes], bytes]) -> None:
    """Change the stored bytes of the only test utterance."""
    row = np.load(shards / "split=test.index.npy")[0]
    data = (shards / "test-000000.tar").read_bytes()[row["offset"] :][: row["nbytes"]]
    replace_payload(shards, edit(data))


def write_tar(shards: Path, change: Callable[[tarfile.TarInfo, int], bytes | None]) -> None:
    """Write the test shard again; `change` may alter each header, and add bytes before it.

    The payload stays where the index says, if the change permits it.
    """
    path = shards / "test-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    data = b""
    for number, (member, content) in enumerate(members):
        before = change(member, number) or b""
        padding = bytes(-len(content) % 512)
        data += before + member.tobuf(tarfile.GNU_FORMAT) + content + padding
    path.write_bytes(data + bytes(1024))
    sign(shards)


def holes(path: Path, size: int) -> None:
    """Extend a file to `size` bytes, with holes."""
    with open(path, "ab") as file:
        file.truncate(size)


def pipe(path: Path) -> None:
    """Replace a file by a named pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def set_entry(dataset: Path, **values: Any) -> None:
    """Change the entry of uttr-0.pt in the metadata."""
    path = dataset / "metadata.json"
    content = json.loads(path.read_text())
    content["speakers"]["id0"][0].update(values)
    path.write_text(json.dumps(content))


def zstd_frames(frames: int) -> bytes:
    """Frames of zeros, as a shard with codec zstd stores them."""
    return codecs.encode(np.zeros((frames, N_MELS), "<f2"), CodecInfo("zstd", 3, 64))
