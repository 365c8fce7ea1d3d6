"""The model folder: a complete model at any moment, read safely, or refused with its name."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import change_best, make_checkpoint

from shardprep_trainer.checkpoint import model_folder
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.model_folder import write_model
from shardprep_trainer.checkpoint.state import Best, Checkpoint
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError

ConfigFactory = Callable[..., Config]
FILES = ["README.md", "config.json", "config.yaml", "model.safetensors"]


@pytest.fixture
def checkpoint(make_config: ConfigFactory) -> Checkpoint:
    return make_checkpoint(make_config(), 5, best=Best(0.75, 5))


def test_a_model_reads_back_to_the_bit_and_says_what_it_is(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", checkpoint)
    assert sorted(os.listdir(tmp_path / "model")) == FILES
    found = load(tmp_path / "model" / "model.safetensors")
    for name in (
        "step",
        "best",
        "config",
        "speakers",
        "n_mels",
        "fingerprint",
        "training",
        "results",
    ):
        assert getattr(found, name) == getattr(checkpoint, name)
    assert found.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(found.weights[name], checkpoint.weights[name]) for name in found.weights)
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (told["format"], told["step"], told["best"]["accuracy"]) == (2, 5, 0.75)
    assert told["speakers"] == list(checkpoint.speakers)
    assert told["config"]["model"]["encoder"] == "conformer"
    # Anybody can read the weights.
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == found.weights.keys()


def test_a_model_is_found_by_its_run_its_folder_and_its_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", checkpoint)
    file = tmp_path / "model" / "model.safetensors"
    for place in (tmp_path, tmp_path / "model", file):
        assert find_checkpoint(place) == file
        assert find_checkpoint(Path("elsewhere"), str(place)) == file


def test_where_only_the_best_model_is_the_last_is_not_asked_for_in_vain(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", checkpoint)
    only = r"there is no last checkpoint; only the best model is there: leave out --checkpoint$"
    for place in (tmp_path, tmp_path / "model"):
        with pytest.raises(CheckpointError, match=only):
            find_checkpoint(place, "last")
    CheckpointFolder(tmp_path).save(checkpoint)
    with pytest.raises(CheckpointError, match=f"or name the run folder {tmp_path}$"):
        find_checkpoint(tmp_path / "model", "last")
    assert find_checkpoint(tmp_path, "last") == CheckpointFolder(tmp_path).latest()


def test_a_run_may_have_the_name_of_a_file(tmp_path: Path, checkpoint: Checkpoint) -> None:
    run = tmp_path / "v1.pt"
    write_model(run / "model", checkpoint)
    assert find_checkpoint(run) == run / "model" / "model.safetensors"


def test_a_run_of_version_0_1_0_is_refused_by_name(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.pt"
    best.parent.mkdir()
    torch.save({"format": 1, "model": {}, "step": 5}, best)
    with pytest.raises(CheckpointError, match=r"best\.pt is of version 0\.1\.0.*train again"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"best\.pt: .* format 1 found, 2 .* train again"):
        load(find_checkpoint(best))


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_point_leaves_one_whole_model(
    checkpoint: Checkpoint,
    tmp_path: Path,
    call: str,
    failing: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    write_model(folder, checkpoint)
    real, calls = getattr(os, call), iter(range(9))

    def refuse(*args: object) -> object:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return real(*args)

    newer = msgspec.structs.replace(checkpoint, step=6, speakers=("x", "y", "z"))
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(KeyboardInterrupt):
        write_model(folder, newer)
    found = load(folder / "model.safetensors")
    assert (found.step, found.speakers) in (
        (5, checkpoint.speakers),
        (6, newer.speakers),
    )
    assert sorted(os.listdir(folder)) == FILES


_WRITE_FOR_EVER = """
import sys
from pathlib import Path
import msgspec, torch
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.model_folder import write_model

first = load(Path("model/model.safetensors"))
weights = {name: torch.zeros_like(weight) for name, weight in first.weights.items()}
print("ready", flush=True)
for step in range(10**9):
    filled = {name: weight + step for name, weight in weights.items()}
    write_model(Path("model"), msgspec.structs.replace(first, step=step, weights=filled))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_weights_with_their_own_description(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    weights = {"a": torch.zeros(1000), "b": torch.zeros(7, 3)}
    write_model(tmp_path / "model", msgspec.structs.replace(checkpoint, step=0, weights=weights))
    for number in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITE_FOR_EVER], cwd=tmp_path, stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.013 * number)
        # A reader beside the writer sees one model or the next, too.
        for _ in range(20):
            found = load(tmp_path / "model" / "model.safetensors")
            assert {float(x) for w in found.weights.values() for x in w.flatten()} == {found.step}
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        found = load(tmp_path / "model" / "model.safetensors")
        assert {float(x) for w in found.weights.values() for x in w.flatten()} == {found.step}


def test_weights_without_a_description_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(checkpoint.weights, file)
    with pytest.raises(CheckpointError, match=r"safetensors: does not say what model it is"):
        load(file)


def hand_made(file: Path, checkpoint: Checkpoint, text: str) -> Path:
    """A model with another description, and its checksum true."""
    checksum = model_folder._sha256(text, checkpoint.weights)
    save_file(checkpoint.weights, file, {"description": text, "sha256": checksum})
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "its description is not JSON"),
        ("[" * 5000, "its description is not JSON"),
        ("5", "checkpoint format None found, 2 expected"),
        ('{"format": 1}', "checkpoint format 1 found, 2 expected"),
        ('{"format": 2}', "the settings in it"),
    ],
)
def test_a_wrong_description_is_refused_by_name(
    checkpoint: Checkpoint, tmp_path: Path, text: str, message: str
) -> None:
    file = hand_made(tmp_path / "x.safetensors", checkpoint, text)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: {message}"):
        load(file)


def test_a_description_of_other_weights_is_damage(run: Path) -> None:
    one = load(run / "model" / "model.safetensors")
    text = json.dumps({**json.loads((run / "model" / "config.json").read_text()), "step": 1})
    file = hand_made(run / "x.safetensors", one, text)
    assert load(file).step == 1
    swapped = file.read_bytes().replace(b'\\"step\\": 1', b'\\"step\\": 2')
    file.write_bytes(swapped)
    with pytest.raises(DamagedCheckpointError, match="checksum does not match"):
        load(file)
    # What is beside the file has no say.
    (run / "model" / "config.json").write_text("{}")
    assert load(change_best(run, step=3)).step == 3


@pytest.mark.parametrize("kept", [0, 7, 10, 0.5, 0.999])
def test_a_torn_model_is_damaged(run: Path, kept: float) -> None:
    file = run / "model" / "model.safetensors"
    size = int(kept if kept > 1 else kept * file.stat().st_size)
    os.truncate(file, size)
    with pytest.raises(DamagedCheckpointError, match=r"safetensors: damaged .*--checkpoint last"):
        load(file)


def test_every_flipped_bit_of_a_model_is_noticed_or_does_no_harm(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    saved = msgspec.structs.replace(checkpoint, weights={"w": torch.arange(6.0)})
    write_model(tmp_path, saved)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    noticed = 0
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            found = load(file)
        except CheckpointError:
            noticed += 1
        else:
            assert torch.equal(found.weights["w"], saved.weights["w"])
            assert (found.config, found.speakers) == (saved.config, saved.speakers)
    assert noticed > len(data) / 3 * 0.9


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def test_hostile_models_are_refused_in_one_message_and_little_memory(
    run: Path, tmp_path: Path
) -> None:
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    files = {
        "claims a huge header": struct.pack("<Q", 2**62) + b"{}",
        "has a huge header": struct.pack("<Q", 60 * 2**20) + b" " * 60 * 2**20,
        "is deep": struct.pack("<Q", 10**5) + b"[" * 10**5,
        "has many tensors": header(**{str(number): empty for number in range(200_000)}),
        "claims a huge tensor": header(a={**empty, "shape": [2**40], "data_offsets": [0, 2**42]}),
        "is a pickle": b"\x80\x02cos\nsystem\n.",
    }
    for name, data in files.items():
        (kinds / f"{name}.safetensors").write_bytes(data)
    os.mkfifo(kinds / "is a pipe.safetensors")
    code = """
import json
from pathlib import Path
from shardprep_trainer.errors import CheckpointError
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
def peak_kib():
    # Not ru_maxrss, which begins with the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
load(Path("run/model/model.safetensors"))
before, told = peak_kib(), {}
for path in sorted(Path("kinds").iterdir()):
    try:
        load(path)
        told[path.stem] = "accepted"
    except CheckpointError as error:
        told[path.stem] = str(error)
grown = (peak_kib() - before) / 1024
print(json.dumps({"told": told, "grown_mib": grown}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["told"].keys() == {*files, "is a pipe"}
    for name, message in found["told"].items():
        assert message.startswith(f"kinds/{name}.safetensors: "), message
        assert len(message) < 500
    assert found["grown_mib"] < 200


def test_a_folder_of_another_kind_is_named(tmp_path: Path) -> None:
    for name, said in {
        "manifest.json": f"it is a shard set: name the run first, .* --shards {tmp_path}",
        "metadata.json": "it is a data set: name the folder of a run",
    }.items():
        (tmp_path / name).write_text("{}")
        with pytest.raises(
            CheckpointError, match=f"{tmp_path}: there is no best checkpoint; {said}"
        ):
            find_checkpoint(tmp_path)
        (tmp_path / name).unlink()
