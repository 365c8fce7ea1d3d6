"""The same utterances as an ordinary webdataset pipeline: for pipes, URLs and tars of others.

Slower than `SegmentLoader`, which reads by index: here every byte of every shard is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tarfile
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from webdataset.cache import FileCache, StreamingOpen

from shardprep.errors import CRC_FAULT, REPAIR, CorruptShardError, FormatError
from shardprep.format import codecs
from shardprep.format.foreign_tar import key_and_extension, reader_of, walk_foreign
from shardprep.format.index import NO_LABEL
from shardprep.format.limits import SMALL_MATRIX_BYTES
from shardprep.format.manifest import MANIFEST_NAME, CodecInfo, Manifest, SplitInfo
from shardprep.format.quantised import Scale, dequantise, scale_of
from shardprep.format.tar import walk
from shardprep.read.files import Files, files_at
from shardprep.read.sidecars import load_index
from shardprep.storage.local import exists, lasting, open_regular
from shardprep.storage.remote import Location, Remote, locate
from shardprep.storage.shared_value import SharedValue
from shardprep.storage.trouble import machine_errors

# Found in the URL of a shard or in a pattern of shards, and not in the URL of a folder.
_NO_FOLDER = re.compile(r"\.tar(\.|$)|[{}]|::")
_CODECS = {"mel.npy": CodecInfo("none"), "mel.npy.zst": CodecInfo("zstd")}


def stream(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    split: str = "train",
    *,
    shuffle: int = 0,
    seed: int = 0,
    **options: Any,
) -> wds.WebDataset:
    """A webdataset pipeline over shards.

    Args:
        source: A shard folder or its URL, whose shards come by way of the cache; or whatever
            `webdataset.WebDataset` takes: the URL of a tar, a brace pattern such as
            "shards/train-{000000..000009}.tar", "pipe:...", or a list of those.
        split: Which split of a shard folder.
        shuffle: Utterances in the shuffle buffer; 0 keeps the order of the shards. With a
            buffer, the shards come in random order too.
        seed: Seed of the shuffles. Each iteration of the pipeline has its own order, also in a
            DataLoader with workers.
        **options: Passed on to `webdataset.WebDataset`. By default every node reads its own part
            of the shards, and every DataLoader worker its own part of these.

    Returns:
        A pipeline, which its methods (`.map`, `.batched`, ...) extend. Its utterances are dicts:
        __key__ str, mel (T, F) array of the stored dtype (float32 for uint8), label int (-1 if
        unknown), speaker str or None, frames int.

    Raises:
        FormatError: The folder has no such split, or one of several sources is a folder.
        CorruptShardError: While iterating: a shard of the folder is not a plain tar, lacks an
            utterance of the index, or has an utterance with another crc32; or an utterance cannot
            be decoded.
    """
    defaults = {
        "nodesplitter": wds.split_by_node,
        # A worker without a shard is no error: there may be more workers than shards.
        "empty_check": False,
        "shardshuffle": 100 if shuffle else False,
        # webdataset's other shuffle has the same order in all epochs.
        "detshuffle": True,
        "seed": seed,
    }
    place = _folder(source)
    if place is None:
        if isinstance(source, str | os.PathLike):
            pipeline = wds.WebDataset(os.fspath(source), **{**defaults, **options})
        else:
            urls = [_tar(each) for each in source]
            pipeline = wds.WebDataset(urls, **{**defaults, **options})
    else:
        files = files_at(place)
        manifest = files.load_manifest()
        info = _info(manifest, files, split)
        urls = [str(place / shard.file) for shard in info.shards]
        if manifest.member is not None:
            defaults["select_files"] = _Matrices(files, info, manifest.member)
        pipeline = wds.WebDataset(urls, **{**defaults, **options})
    stages = pipeline.pipeline
    opener = [isinstance(stage, StreamingOpen | FileCache) for stage in stages].index(True)
    stages.insert(opener + 1, _close_shards)
    stages[:] = [
        _Shuffle(stage.bufsize, stage.seed) if isinstance(stage, wds.detshuffle) else stage
        for stage in stages
    ]
    if place is not None:
        check = _check_members if manifest.member is None else _check_foreign
        stages.insert(opener, partial(_check_shards, files, info, check))
        pipeline = pipeline.compose(partial(_check_samples, files, info, manifest))
    if shuffle:
        pipeline = pipeline.compose(_Shuffle(shuffle, seed))
    return pipeline.map(decode_sample).compose(_release_on_error)


def decode_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode one webdataset sample, a dict of members as bytes by extension; see `stream`.

    Only the members that the format names are decoded, and nothing is ever unpickled. The bytes of
    element type uint8 are widened to float32.
    """
    key, url = sample["__key__"], str(sample.get("__url__", ""))
    found = [name for name in _CODECS if name in sample]
    if not found:
        raise CorruptShardError(f"has no member {' or '.join(_CODECS)}", file=url, key=key)
    try:
        mel = codecs.decode(sample[found[0]], _CODECS[found[0]])
        about = json.loads(sample.get("json", b"{}"))
        if mel.dtype == np.uint8:
            mel = dequantise(mel, *scale_of(about))
        label = int(sample.get("cls", NO_LABEL))
        # The type of a field is the same in every split: "" stands for no speaker.
        speaker = about.get("speaker") or None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptShardError(f"cannot be decoded ({error})"[:300], file=url, key=key) from None
    return {
        "__key__": key,
        "mel": mel,
        "label": label,
        "speaker": speaker,
        "frames": len(mel),
    }


class _Shuffle(wds.detshuffle):  # type: ignore[misc]
    """A shuffle with an order of its own in every iteration.

    webdataset's counts the iterations in itself: a DataLoader copies it into new workers for every
    epoch, and there it would count from the beginning.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed=seed)
        # Iterations that began: of each worker by its number, and of the process itself.
        self._begun = SharedValue[dict[str, int]]({})

    def run(self, src: Iterable[Any]) -> Iterator[Any]:
        data = sys.modules.get("torch.utils.data")
        worker = data.get_worker_info() if data is not None else None
        reader = "itself" if worker is None else str(worker.id)

        def count(begun: dict[str, int]) -> dict[str, int]:
            return {**begun, reader: begun.get(reader, 0) + 1}

        begun = self._begun.change_parents(count) if worker is not None else None
        if begun is None:
            begun = self._begun.change(count)
        # The shuffle adds 1 before it begins.
        self.epoch = begun[reader] - 2
        shuffled: Iterator[Any] = super().run(src)
        return shuffled


def _folder(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Location | None:
    """The shard folder that a source names, or its URL; None if the source is something else."""
    if not isinstance(source, str | os.PathLike):
        return None
    place = locate(source)
    if isinstance(place, Remote):
        return None if _NO_FOLDER.search(place.url) else place
    with machine_errors(place):
        return lasting(place) if exists(place) and place.is_dir() else None


def _tar(source: str | os.PathLike[str]) -> str:
    """One of several sources, which must be tars."""
    if (folder := _folder(source)) is not None:
        raise FormatError(
            "is a folder, and stream takes one folder, or tars",
            file=folder,
            remedy="Name the tars, or read several sets as one with open_shards([...]).",
        )
    return os.fspath(source)


def _info(manifest: Manifest, files: Files, split: str) -> SplitInfo:
    if split not in manifest.splits:
        raise FormatError(
            f"there is no split {split!r}; the set has {', '.join(manifest.splits)}",
            file=files.place / MANIFEST_NAME,
        )
    return manifest.splits[split]


def _check_shards(
    files: Files,
    info: SplitInfo,
    check: Callable[[io.BufferedReader], None],
    shards: Iterable[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Check the headers of each shard, on this machine, before webdataset opens it.

    webdataset inflates files that are not a tar, follows extended headers and sparse files, and
    reads every member into memory, however large.
    """
    infos = {str(files.place / shard.file): shard for shard in info.shards}
    for shard in shards:
        with files.lend(infos[shard["url"]]) as path:
            try:
                with machine_errors(path), open_regular(path) as file:
                    check(file)
            except OSError as error:
                raise CorruptShardError(
                    f"cannot be read: {error.strerror}", file=shard["url"], remedy=REPAIR
                ) from None
            except tarfile.TarError as error:
                raise CorruptShardError(
                    f"is not a plain, complete tar: {error}", file=shard["url"], remedy=REPAIR
                ) from None
            yield {**shard, "url": str(path)}


def _check_samples(
    files: Files, info: SplitInfo, manifest: Manifest, samples: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compare the utterances that come from the shards with the index, before the shuffle.

    Those of adopted tars come out with the members that our own tars have.
    """
    rows = load_index(files, info, quantised=manifest.is_quantised)
    # In a folder a shard has its own name, in a cache its sha256.
    numbers = {shard.file: number for number, shard in enumerate(info.shards)}
    numbers |= {shard.sha256: number for number, shard in enumerate(info.shards)}
    names = _CODECS if manifest.member is None else (manifest.member,)
    url, due, labels = "", dict[bytes, int](), dict[bytes, int]()
    scales: dict[bytes, Scale] = {}
    path: Location = Path()
    for sample in samples:
        key = sample["__key__"].encode()
        is_new = sample["__url__"] != url
        if not is_new and manifest.member is not None and key not in labels:
            continue
        if is_new or not due:
            _check_complete(path, due, manifest)
            url = sample["__url__"]
            number = numbers[Path(url).name]
            path = files.place / info.shards[number].file
            own = rows[rows["shard"] == number]
            due = dict(zip(own["key"].tolist(), own["crc32"].tolist(), strict=True))
            labels = dict(zip(own["key"].tolist(), own["label"].tolist(), strict=True))
            scales = _scales(own, manifest)
            if manifest.member is not None and key not in labels:
                continue
        stored = next((sample[name] for name in names if name in sample), b"")
        if due.pop(key, None) != zlib.crc32(stored):
            raise CorruptShardError(CRC_FAULT, file=path, key=key.decode(), remedy=manifest.remedy)
        if key in scales and _stated_scale(sample) != scales[key]:
            what = "its JSON does not have the minimum and step of the index"
            raise CorruptShardError(what, file=path, key=key.decode(), remedy=manifest.remedy)
        yield sample if manifest.member is None else _as_ours(sample, stored, labels[key], manifest)
    _check_complete(path, due, manifest)


def _scales(rows: NDArray[Any], manifest: Manifest) -> dict[bytes, Scale]:
    """The scales of utterances by key, of element type uint8; otherwise none."""
    if not manifest.is_quantised:
        return {}
    columns = (rows[name].tolist() for name in ("key", *Scale._fields))
    return {key: Scale(*scale) for key, *scale in zip(*columns, strict=True)}


def _stated_scale(sample: dict[str, Any]) -> Scale | None:
    """The scale that the JSON of an utterance states, which no crc32 protects."""
    with contextlib.suppress(ValueError, RecursionError):
        return scale_of(json.loads(sample.get("json", b"")))
    return None


def _close_shards(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Close each shard after use: webdataset leaves that to the garbage collector.

    webdataset's pipes close themselves, and wait for their processes.
    """
    for shard in shards:
        file = shard["stream"]
        with file if isinstance(file, io.IOBase) else contextlib.nullcontext():
            yield shard


def _release_on_error(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Clear the frames of an error, so that whoever keeps the error does not keep a shard open."""
    try:
        yield from samples
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _as_ours(
    sample: dict[str, Any], stored: bytes, label: int, manifest: Manifest
) -> dict[str, Any]:
    """An utterance of an adopted tar, with the members that our own tars have."""
    speaker = "" if label == NO_LABEL else manifest.speakers[label]
    return {
        "__key__": sample["__key__"],
        "__url__": sample["__url__"],
        "mel.npy": stored,
        "cls": str(label).encode(),
        "json": json.dumps({"speaker": speaker}).encode(),
    }


def _check_complete(path: Location, due: dict[bytes, int], manifest: Manifest) -> None:
    if due:
        raise CorruptShardError(
            f"lacks {len(due)} of the utterances in its index", file=path, remedy=manifest.remedy
        )


class _Matrices:
    """Selects the members of adopted tars that have the matrices of a split.

    What the index does not have, webdataset passes over without reading it.
    """

    def __init__(self, files: Files, info: SplitInfo, member: str) -> None:
        self._keys = set(load_index(files, info)["key"].tolist())
        self._member = member

    def __call__(self, name: str) -> bool:
        key, extension = key_and_extension(name) or ("", "")
        return extension == self._member and key.encode("utf-8", "surrogateescape") in self._keys


def _check_foreign(file: io.BufferedReader) -> None:
    """Check an adopted tar as `_check_members` checks ours; only some of its members are read."""
    status = os.fstat(file.fileno())
    most = max(SMALL_MATRIX_BYTES, 512 * status.st_blocks)
    for member in walk_foreign(reader_of(file), status.st_size):
        if member.size > most:
            raise tarfile.ReadError(f"{member.name[:100]!a} has holes")


def _check_members(file: io.BufferedReader) -> None:
    # Holes of a sparse file take no room on the disk, but they would in memory.
    most = max(SMALL_MATRIX_BYTES, 512 * os.fstat(file.fileno()).st_blocks)
    names = set()
    for member in walk(file):
        if member.size > most or member.name in names:
            raise tarfile.ReadError(f"{member.name[:100]!a} is there twice, or has holes")
        names.add(member.name)
