"""Checkpoints from strangers: refused in one message, without running or allocating anything.

All are opened in one child process, whose largest memory and whose folder tell what they did.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import make_checkpoint

from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.state import Checkpoint, to_plain
from shardprep_trainer.checkpoint.vetting import vet
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import DamagedCheckpointError

ConfigFactory = Callable[..., Config]
MIB = 2**20

_OPEN_ALL = """
import json, sys
from pathlib import Path
from shardprep_trainer.errors import CheckpointError
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.weights import load_model

def peak_kib():
    # Not ru_maxrss, which begins with the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

load_model(load(Path("good.pt")))
before, told = peak_kib(), {}
for path in sorted(Path("kinds").iterdir()):
    try:
        load_model(load(path))
        told[path.stem] = "accepted"
    except CheckpointError as error:
        told[path.stem] = str(error)
    grown = peak_kib() - before
    print(path.stem, grown // 1024, "MiB", file=sys.stderr)
print(json.dumps({"told": told, "grown_mib": grown / 1024}))
"""


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[bytes], bytes] = bytes,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Copy a checkpoint record by record, its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith(".pkl") else data)


def pickled(*opcodes: bytes) -> Callable[[bytes], bytes]:
    """Replace a pickle by opcodes of protocol 2."""
    return lambda _: b"\x80\x02" + b"".join(opcodes) + b"."


def laughs(depth: int) -> list[Any]:
    """A list that is 2**depth long when it is written out."""
    value: list[Any] = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def claim(numel: int) -> Callable[[bytes], bytes]:
    """Make a storage and a tensor of 251 elements in a pickle claim to have more."""
    return lambda data: data.replace(b"K\xfb", b"J" + struct.pack("<i", numel))


def expanded(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(1).expand(shape)


@pytest.fixture
def good(make_config: ConfigFactory) -> dict[str, Any]:
    checkpoint = make_checkpoint(make_config(), 5, speakers=("a", "b", "c"))
    return {"format": 2, **to_plain(checkpoint)}


def make_kinds(good: dict[str, Any], folder: Path, harm: Path) -> None:
    """Write one file of each hostile kind into a folder."""
    base = folder.parent / "good.pt"
    touch = f"touch {harm}"

    def save(name: str, **changes: Any) -> None:
        torch.save({**good, **changes}, folder / f"{name}.pt")

    def model(**settings: Any) -> dict[str, Any]:
        return {**good["config"], "model": {**good["config"]["model"], **settings}}

    # Code.
    save("calls os.system", speakers=Call(os.system, touch))
    save("calls eval", speakers=Call(eval, f"__import__('os').system({touch!r})"))
    evil = {**good, "n_mels": Call(os.system, touch)}
    (folder / "is a bare pickle.pt").write_bytes(pickle.dumps(evil))
    torch.save(evil, folder / "is of the old kind.pt", _use_new_zipfile_serialization=False)
    system = b"cposix\nsystem\n" + pickle.dumps(touch, 2)[2:-1] + b"\x85R"
    rewrite(base, folder / "calls by hand.pt", pickled(system))
    rewrite(base, folder / "names by the stack.pt", pickled(b"\x8c\x02os\x8c\x06system\x93"))
    rewrite(base, folder / "makes an instance.pt", pickled(b"(ios\nsystem\n"))
    # Memory that PyTorch would take.
    save("is a huge bytearray", speakers=Call(bytearray, 2 * 10**9))
    rewrite(base, folder / "is huge bytes.pt", pickled(b"\x8e" + struct.pack("<Q", 2**40)))
    rewrite(base, folder / "remembers far away.pt", pickled(b"Nr\xff\xff\xff\x7f"))
    rewrite(base, folder / "has a million lists.pt", pickled(b"(" + b"]" * 3_000_000 + b"l"))
    rewrite(base, folder / "has a million sets.pt", pickled(b"\x8f" * 1_900_000))
    # A dict with 20,000 entries, then OrderedDicts that each get a copy of it as attributes.
    entries = b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(20_000))
    large = b"ccollections\nOrderedDict\nq\x00}q\x01(" + entries + b"u"
    instances = large + b"h\x00)\x81h\x01b" * 1000
    rewrite(base, folder / "copies a dict into instances.pt", pickled(instances))
    rewrite(base, folder / "copies a dict by building.pt", pickled(large + b"h\x00)Rh\x01b" * 60))
    pairs = b"".join(b"J" + struct.pack("<i", number) + b"N\x86" for number in range(20_000))
    listed = b"ccollections\nOrderedDict\nq\x00](" + pairs + b"e\x85q\x01"
    rewrite(base, folder / "copies a list by calls.pt", pickled(listed + b"h\x00h\x01R" * 60))
    torch.save({**good, "speakers": torch.zeros(251)}, folder.parent / "one.pt")
    rewrite(folder.parent / "one.pt", folder / "claims a huge storage.pt", claim(2**30))
    save("is expanded", weights={**good["weights"], "x": expanded((10**6, 10**6))})
    zeros = {**good["weights"], "x": torch.zeros(56 * MIB)}
    torch.save({**good, "weights": zeros}, folder.parent / "zeros.pt")
    rewrite(folder.parent / "zeros.pt", folder / "is compressed.pt", bytes, zipfile.ZIP_DEFLATED)
    (folder.parent / "zeros.pt").unlink()
    with zipfile.ZipFile(folder / "has many records.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for number in range(45_000):
            archive.writestr(f"archive/data/{number:040}", b"")
    data = base.read_bytes()
    (folder / "announces a huge directory.pt").write_bytes(
        data[:-58] + struct.pack("<Q", 2**40) + data[-50:]
    )
    (folder / "has something before it.pt").write_bytes(b"\x80\x02" + data)
    # Contents.
    save("is a small web of lists", speakers=laughs(40))
    save("is deep", speakers=[[[[[[[[[[[[[[[[[[[["a"]]]]]]]]]]]]]]]]]]]])
    itself: list[Any] = []
    itself.append(itself)
    save("contains itself", speakers=itself)
    save("is wide", config=model(dim=10**9, ff_dim=4 * 10**9))
    save("is high", config=model(layers=10**9))
    save("has many heads", config=model(heads=10**9, head_dim=10**9))
    save("has settings that are text", config=model(dim="512"))
    save("has settings that are lists", config=model(layers=[1] * 1000))
    save("has no settings", config=OrderedDict())
    save("has many mels", n_mels=10**12)
    save("has mels that are text", n_mels="40")
    save("has a step that is text", step="5")
    save("has a huge step", step=10**600)
    save("has speakers that are a number", speakers=10**9)
    save("has one speaker many times", speakers=["a" * MIB] * 100_000)
    save("has weights that are lists", weights={name: [1.0] for name in good["weights"]})
    save("has a long bias", weights={**good["weights"], "encoder.stem.bias": expanded((10**9,))})


def test_hostile_checkpoints_are_refused_without_running_or_allocating_anything(
    good: dict[str, Any], tmp_path: Path
) -> None:
    kinds, harm = tmp_path / "kinds", tmp_path / "harm"
    kinds.mkdir()
    torch.save(good, tmp_path / "good.pt")
    make_kinds(good, kinds, harm)
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not harm.exists()
    assert len(found["told"]) == len(list(kinds.iterdir())) >= 30
    for name, message in found["told"].items():
        assert message.startswith(f"kinds/{name}.pt: "), message
        assert len(message) < 500
        assert "\n" not in message
    assert found["grown_mib"] < 200, done.stderr


def test_the_calls_of_these_kinds_do_run_where_nothing_holds_them_back(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    torch.save(Call(os.system, f"touch {tmp_path / 'harm'}"), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "harm").exists()


def same(found: Checkpoint, saved: dict[str, Any]) -> bool:
    """Whether a checkpoint is what was saved, but for the file that it was read from."""
    entries = to_plain(found)
    weights, expected = entries.pop("weights"), saved["weights"]
    alike = all(torch.equal(weights[name], expected[name]) for name in expected)
    others = {key: saved[key] for key in saved if key not in ("weights", "format")}
    return alike and weights.keys() == expected.keys() and entries == others


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_does_no_harm(
    good: dict[str, Any], tmp_path: Path
) -> None:
    saved = {**good, "weights": {"w": torch.arange(6.0)}}
    path = tmp_path / "x.pt"
    torch.save(saved, path)
    data = path.read_bytes()
    places = range(0, len(data), 5)
    noticed = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = load(path)
        except DamagedCheckpointError:
            noticed += 1
        else:
            assert same(found, saved)
    assert noticed > len(places) / 2


def test_what_torch_save_writes_passes(good: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool]
    weights = {str(kind): torch.ones(2, dtype=kind) for kind in kinds}
    torch.save({**good, "weights": weights}, path)
    with path.open("rb") as file:
        vet(file)
        assert file.tell() == 0
    assert [value.dtype for value in load(path).weights.values()] == kinds
