"""Fuzz all readers of foreign files, guided by coverage.

    python -m scripts.torture.fuzz --seconds 600 --out fuzz.json     # all targets
    python -m scripts.torture.fuzz --seconds 60 --target pt                          # one of them

Any exception but a refusal (`ShardprepError`, or `ValueError` from inner functions) is a finding.
This needs atheris (extra `[fuzz]`; `make fuzz` makes an environment for it). Inputs that cause a
finding go to the folder `--found`. When the bug is fixed, move them to tests/fuzz/found/, where
`make test` tries them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np

N_MELS, FRAMES = 3, (70, 5, 33)


class Target:
    """A reader of foreign bytes.

    Attributes:
        folder: A folder of its own, for the files that it reads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_dataset(folder / "Dataset")

    def seeds(self) -> Iterator[bytes]:
        """Valid inputs to start from."""
        raise NotImplementedError

    def __call__(self, data: bytes) -> None:
        """Read `data`. An exception is a finding."""
        raise NotImplementedError


class Shards(Target):
    """A target that puts its bytes into a valid shard set."""

    def __init__(self, folder: Path, dtype: str = "float16") -> None:
        from shardprep import BuildOptions, build_shards
        from shardprep.read.manifest_file import load_manifest

        super().__init__(folder)
        self.shards = folder / "shards"
        options = BuildOptions(dtype=dtype, workers=1)  # type: ignore[arg-type]
        build_shards(folder / "Dataset", self.shards, options)
        self.manifest = load_manifest(self.shards)
        (self.split,) = self.manifest.splits
        self.info = self.manifest.splits[self.split]

    def sign(self, **files: bytes) -> None:
        """Write the index or the shard, and a manifest with its size and sha256."""
        import msgspec

        from shardprep.format.manifest import encode_manifest

        info = self.info
        entries = {"index": info.index, "shard": info.shards[0]}
        for name, data in files.items():
            (self.shards / entries[name].file).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            entries[name] = msgspec.structs.replace(entries[name], bytes=len(data), sha256=digest)
        changed = msgspec.structs.replace(info, index=entries["index"], shards=(entries["shard"],))
        manifest = msgspec.structs.replace(self.manifest, splits={self.split: changed})
        (self.shards / "manifest.json").write_bytes(encode_manifest(manifest))

    def read_all(self) -> None:
        """Open the set, and read every utterance and a segment of each."""
        from shardprep import ShardprepError, open_shards

        with contextlib.suppress(ShardprepError):
            for split in open_shards(self.shards).values():
                for index in range(len(split)):
                    with contextlib.suppress(ShardprepError):
                        split.read(index)
                    with contextlib.suppress(ShardprepError):
                        split.segments([index], [split.frames[index] - 1], 9)
                assert len(split.keys) == len(split)


class ManifestTarget(Shards):
    """manifest.json, with a correct fingerprint if the bytes are JSON."""

    def seeds(self) -> Iterator[bytes]:
        """The manifest of the valid set."""
        yield (self.shards / "manifest.json").read_bytes()
        yield json.dumps(json.loads((self.shards / "manifest.json").read_text())).encode()

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            content = {**json.loads(data), "fingerprint": ""}
            text = json.dumps(content, sort_keys=True, separators=(",", ":"))
            content["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
            data = json.dumps(content).encode()
        (self.shards / "manifest.json").write_bytes(data)
        self.read_all()


class BothTypes(Target):
    """A target that puts its bytes into two sets: of float16, and of uint8."""

    def __init__(self, folder: Path) -> None:
        self.sets = [Shards(folder / dtype, dtype) for dtype in ("float16", "uint8")]


class IndexTarget(BothTypes):
    """An index whose size and sha256 are those in the manifest."""

    def seeds(self) -> Iterator[bytes]:
        """The indexes of the valid sets."""
        for own in self.sets:
            yield (own.shards / own.info.index.file).read_bytes()

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        for own in self.sets:
            own.sign(index=data)
            own.read_all()


class TarTarget(BothTypes):
    """A shard whose size and sha256 are those in the manifest, for `verify --deep` and `repair`."""

    def seeds(self) -> Iterator[bytes]:
        """The shards of the valid sets, without the padding at their ends."""
        for own in self.sets:
            yield (own.shards / own.info.shards[0].file).read_bytes().rstrip(b"\0") + bytes(1536)

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        from shardprep import ShardprepError, verify_shards
        from shardprep.check.salvage_index import index_of_tar

        for own in self.sets:
            own.sign(shard=data)
            verify_shards(own.shards, deep=True)
            with contextlib.suppress(ShardprepError):
                index_of_tar(own.shards / own.info.shards[0].file, own.manifest)


class ZstdTarget(Target):
    """A compressed member: decoded in one piece, and by the chunks of a segment."""

    def seeds(self) -> Iterator[bytes]:
        """Members of one chunk and of several, and a single frame without a seek table."""
        import zstandard

        from shardprep.format import codecs
        from shardprep.format.manifest import CodecInfo

        for frames in FRAMES:
            mel = np.arange(frames * N_MELS, dtype="<f2").reshape(frames, N_MELS)
            yield codecs.encode(mel, CodecInfo("zstd", 3, 16))
        yield zstandard.ZstdCompressor(write_content_size=False).compress(
            codecs.encode(mel, CodecInfo("none"))
        )

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        from shardprep.format import codecs
        from shardprep.format.manifest import CodecInfo
        from shardprep.read.gather.zstd import ZstdGather

        with contextlib.suppress(ValueError):
            codecs.decode(data, CodecInfo("zstd", 3, 16))
        with contextlib.suppress(ValueError):
            codecs.decode(data, CodecInfo("none"))
        for length in FRAMES:
            frames = np.array([length])
            # `Split` checks this when it opens an index.
            if len(data) > codecs.table_bytes_from_end(frames, 16)[0]:
                member = np.array([0]), np.array([len(data)]), frames, np.array([0])
                out = np.empty((1, length, N_MELS), "<f2")
                with contextlib.suppress(ValueError):
                    ZstdGather(_Bytes(data), 16)(*member, frames, 0.0, out)  # type: ignore[arg-type]


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.bytes = np.frombuffer(data, np.uint8)


class MetadataTarget(Target):
    """The three JSON files of a data set; the first byte chooses one."""

    NAMES = ("metadata.json", "mapping.json", "testdata.json")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.valid = [(folder / "Dataset" / name).read_bytes() for name in self.NAMES]

    def seeds(self) -> Iterator[bytes]:
        """The files of the valid data set."""
        for number, data in enumerate(self.valid):
            yield bytes([number]) + data

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        from shardprep import ShardprepError
        from shardprep.source.dataset import scan_dataset, source_error

        for number, name in enumerate(self.NAMES):
            chosen = bool(data) and data[0] % len(self.NAMES) == number
            content = data[1:] if chosen else self.valid[number]
            (self.folder / "Dataset" / name).write_bytes(content)
        with contextlib.suppress(ShardprepError):
            source = scan_dataset(self.folder / "Dataset")
            assert source.fingerprint
            for reject in source.rejects:
                str(source_error(reject, source.root))


class PtTarget(Target):
    """A `.pt` file, in both formats, with the shape that metadata.json states."""

    def seeds(self) -> Iterator[bytes]:
        """Tensors of all kinds; without checksums, which would stop most mutations."""
        import torch

        mel = torch.arange(5.0 * N_MELS).view(5, N_MELS)
        torch.serialization.set_crc32_options(False)
        values = [mel, mel.bfloat16(), mel.double(), torch.nn.Parameter(mel), mel.T.contiguous().T]
        values += [mel.repeat(3, 1)[2:7], mel[:1].expand(5, N_MELS), {"mel": mel}]
        for value in values:
            for newer in (True, False):
                buffer = io.BytesIO()
                torch.save(value, buffer, _use_new_zipfile_serialization=newer)
                yield buffer.getvalue()
        torch.serialization.set_crc32_options(True)

    def __call__(self, data: bytes) -> None:
        """See `Target`."""
        from shardprep.source.features import Expected, load_features

        (self.folder / "a.pt").write_bytes(data)
        with contextlib.suppress(ValueError):
            found = load_features(self.folder / "a.pt", Expected(N_MELS, 5))
            assert found.shape == (5, N_MELS)
            assert np.isfinite(found).all()


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": ManifestTarget,
    "index": IndexTarget,
    "tar": TarTarget,
    "zstd": ZstdTarget,
    "metadata": MetadataTarget,
    "pt": PtTarget,
}


def write_dataset(folder: Path) -> None:
    """A data set of one speaker."""
    import torch

    folder.mkdir(parents=True)
    entries = []
    for number, frames in enumerate(FRAMES):
        name = f"u{number}.pt"
        torch.save(torch.arange(1.0 * frames * N_MELS).view(frames, N_MELS), folder / name)
        entries.append({"feature_path": name, "mel_len": frames})
    files = {
        "metadata": {"n_mels": N_MELS, "speakers": {"ann": entries}},
        "mapping": {"speaker2id": {"ann": 0}, "id2speaker": {"0": "ann"}},
        "testdata": {"n_mels": N_MELS, "utterances": []},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def fuzz_one(name: str, seconds: float, found: Path) -> None:
    """Fuzz one target in this process; atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["shardprep", "pickletools", "tarfile"]):
        import shardprep.check.salvage_index
        import shardprep.check.verify  # noqa: F401
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        target = TARGETS[name](Path(folder) / "target")
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds()):
            target(seed)
            (corpus / f"seed-{number}").write_bytes(seed)
        seen: set[str] = set()

        def once(data: bytes) -> None:
            try:
                target(data)
            except Exception as error:
                _keep(data, error, found, seen)

        limits = [f"-max_total_time={seconds:.0f}", "-timeout=30", "-rss_limit_mb=1500"]
        limits += ["-print_final_stats=1", "-max_len=16384", f"-artifact_prefix={found}/"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], once)
        atheris.Fuzz()


def _keep(data: bytes, error: Exception, found: Path, seen: set[str]) -> None:
    """Keep the first input that leads to an exception at a place in the code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    if place not in seen:
        seen.add(place)
        name = f"{zlib.crc32(place.encode()):08x}"
        (found / name).write_bytes(data)
        (found / f"{name}.txt").write_text(f"{place}\n{traceback.format_exc()}")


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz_all(names: Sequence[str], seconds: float, found: Path) -> dict[str, Any]:
    """Fuzz targets one after the other, each in its own process; their runs and findings."""
    results: dict[str, Any] = {}
    for name in names:
        place = (found / name).absolute()
        place.mkdir(parents=True, exist_ok=True)
        runs, left, ended = 0, seconds, time.monotonic() + seconds
        # A finding may end the process (a signal, out of memory); then start it again.
        while left > 1:
            command = [sys.executable, "-m", "scripts.torture.fuzz", "--one", name]
            command += ["--seconds", str(left), "--found", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
            if said is None:
                raise SystemExit(f"{name} did not start:\n{done.stderr[-3000:]}")
            runs, left = runs + int(said[1]), ended - time.monotonic()
        crashes = sorted(path.name for path in place.iterdir() if path.suffix != ".txt")
        results[name] = {"runs": runs, "crashes": crashes}
        click.echo(f"{name}: {runs} runs, {len(crashes)} findings", err=True)
    return results


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=600.0, help="Time for each target.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="[all]")
@click.option(
    "--found", type=click.Path(path_type=Path), default="fuzz-found", help="Folder for findings."
)
@click.option("--out", type=click.Path(path_type=Path), help="Result file to write (JSON).")
@click.option("--one", type=click.Choice(list(TARGETS)), hidden=True)
def main(
    seconds: float, targets: tuple[str, ...], found: Path, out: Path | None, one: str | None
) -> None:
    """Fuzz the readers of foreign files, one after the other."""
    if one:
        fuzz_one(one, seconds, found)
        return
    results = fuzz_all(targets or tuple(TARGETS), seconds, found)
    summary = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds": seconds,
        "targets": results,
    }
    text = json.dumps(summary, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")
    sys.exit(any(result["crashes"] for result in results.values()))


if __name__ == "__main__":
    main()
