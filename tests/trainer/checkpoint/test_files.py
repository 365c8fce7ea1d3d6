"""Checkpoints: complete or absent, read safely, the newest never lost."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from saved_models import make_checkpoint, make_training

from shardprep import StorageError, storage_errors
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.state import Best, Checkpoint
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError


@pytest.fixture
def checkpoint(make_config: Callable[..., Config]) -> Checkpoint:
    return make_checkpoint(make_config(), 0, training=make_training())


def at(checkpoint: Checkpoint, step: int) -> Checkpoint:
    return msgspec.structs.replace(checkpoint, step=step)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(os.listdir(folder.folder))


def test_a_checkpoint_reads_back_to_the_bit(tmp_path: Path, checkpoint: Checkpoint) -> None:
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3)}}, "x": [None]}
    weights = {"w": torch.randn(3, 4), "n": torch.tensor(7)}
    training = make_training(
        optimizer=moments,
        raw={n: w.clone() for n, w in weights.items()},
        meter=[1, 0.5],
        launchers=["a"],
    )
    saved = msgspec.structs.replace(
        checkpoint, step=7, best=Best(0.25, 5), weights=weights, training=training
    )
    path = CheckpointFolder(tmp_path).save(saved)
    assert path == tmp_path / "checkpoints" / "step-00000007.pt"
    found = load(path)
    assert found.file == path
    assert found.training is not None
    for ours, theirs in ((found.weights, weights), (found.training.raw or {}, weights)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(
        found.training.optimizer["state"][0]["exp_avg"], moments["state"][0]["exp_avg"]
    )  # type: ignore[index]
    for name in ("step", "best", "config", "speakers", "n_mels", "fingerprint"):
        assert getattr(found, name) == getattr(saved, name)
    for name in (
        "scaler",
        "loader",
        "precision",
        "processes",
        "global_batch",
        "launchers",
        "meter",
    ):
        assert getattr(found.training, name) == getattr(training, name)


def test_the_newest_k_are_kept_and_numbers_are_compared_as_numbers(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (2, 10, 99_999_999, 100_000_000):
        folder.save(at(checkpoint, step))
    assert names(folder) == ["step-100000000.pt", "step-99999999.pt"]
    latest = folder.latest()
    assert latest is not None
    assert latest.name == "step-100000000.pt"


def test_a_save_deletes_neither_itself_nor_a_later_one(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(at(checkpoint, 30))
    folder.save(at(checkpoint, 20))
    assert names(folder) == ["step-00000020.pt", "step-00000030.pt"]
    folder.save(at(checkpoint, 40))
    assert names(folder) == ["step-00000040.pt"]


def test_best_is_neither_counted_nor_deleted(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save_best(at(checkpoint, 1))
    for step in (1, 2, 3):
        folder.save(at(checkpoint, step))
    assert names(folder) == ["step-00000003.pt"]
    assert load(folder.best).step == 1


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").latest() is None


def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save_best(at(checkpoint, 1))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"model\.safetensors: No space left"):
        folder.save_best(at(checkpoint, 2))
    files = ["README.md", "config.json", "config.yaml", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "model")) == files
    assert load(folder.best).step == 1


def test_what_a_killed_writer_left_is_swept(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(at(checkpoint, 1))
    (folder.folder / "step-00000002.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.abc.tmp").write_bytes(b"half")
    (tmp_path / "model" / "config.json.abc.tmp").write_bytes(b"half")
    (tmp_path / "model" / "README.md.abc.tmp").write_bytes(b"half")
    (tmp_path / "model" / "config.yaml.abc.tmp").write_bytes(b"half")
    # Of `shardprep export` at the same time.
    (tmp_path / "model" / "model.onnx.abc.tmp").write_bytes(b"half")
    folder.sweep()
    assert names(folder) == ["step-00000001.pt"]
    assert os.listdir(tmp_path / "model") == ["model.onnx.abc.tmp"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999])
def test_a_torn_file_is_named_with_the_remedy(
    tmp_path: Path, kept: float, checkpoint: Checkpoint
) -> None:
    path = CheckpointFolder(tmp_path).save(at(checkpoint, 5))
    size = int(kept if kept > 1 else kept * path.stat().st_size)
    os.truncate(path, size)
    with pytest.raises(DamagedCheckpointError, match=r"5\.pt: damaged .*--resume continues"):
        load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = CheckpointFolder(tmp_path).save(at(checkpoint, 5))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000005\.pt: damaged .*checksum"):
        load(path)


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (100, 200, 213):
        folder.save(at(checkpoint, step))
    damaged = tmp_path / "checkpoints" / "step-00000213.pt"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    found = folder.load_newest()
    assert found.checkpoint.step == 200
    newest = folder.save(at(checkpoint, 300))
    newest.write_bytes(b"")
    # Two undamaged ones were kept, so that one more may be lost.
    assert folder.load_newest().checkpoint.step == 200


@pytest.mark.parametrize("missing", ["weights", "n_mels", "fingerprint", "best"])
def test_a_checkpoint_that_lacks_an_entry_is_refused_by_name(
    tmp_path: Path, checkpoint: Checkpoint, missing: str
) -> None:
    path = CheckpointFolder(tmp_path).save(at(checkpoint, 5))
    saved = torch.load(path, weights_only=True)
    del saved[missing]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=rf"step-00000005\.pt: .* `{missing}`"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: there is no such checkpoint"):
        load(tmp_path / "x.pt")


def failing_reads(monkeypatch: pytest.MonkeyPatch, number: int, most: int = 10**9) -> list[str]:
    """Let the first reads of files fail with an errno, at most so many; the names of these."""
    real, failed = Path.read_bytes, list[str]()

    def read_bytes(path: Path) -> bytes:
        if len(failed) < most:
            failed.append(path.name)
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return failed


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_trouble_of_the_machine_is_no_fault_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, number: int
) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(at(checkpoint, 5))
    failing_reads(monkeypatch, number)
    for read in (lambda: load(path), folder.load_newest):
        with pytest.raises(StorageError, match=rf"5\.pt: .*{os.strerror(number)}") as caught:
            read()
        assert caught.value.remedy
        assert "damaged" not in str(caught.value)


def test_a_read_that_the_disk_refuses_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    path = CheckpointFolder(tmp_path).save(at(checkpoint, 5))
    failed = failing_reads(monkeypatch, errno.EIO, most=1)
    assert load(path).step == 5
    assert failed == [path.name]


def test_a_checkpoint_where_the_disk_fails_is_passed_over_and_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    first, second = (CheckpointFolder(tmp_path, 9).save(at(checkpoint, step)) for step in (1, 2))
    with monkeypatch.context() as patch:
        failed = failing_reads(patch, errno.EIO, most=2)
        found = folder.load_newest()
    assert failed == [second.name] * 2
    assert found.checkpoint.step == 1
    (error,) = found.unusable
    assert isinstance(error, StorageError)
    folder.save(at(checkpoint, 3))
    assert names(folder) == [second.name, "step-00000003.pt"]
    assert not first.exists()
    with monkeypatch.context() as patch:
        failing_reads(patch, errno.EIO)
        with pytest.raises(StorageError, match=r"step-00000003\.pt: .*Input/output error"):
            folder.load_newest()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, number: int
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(at(checkpoint, 5))

    def refuse(path: Path) -> list[str]:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        for look in (folder.latest, folder.load_newest):
            with pytest.raises(StorageError, match=rf"checkpoints: .*{os.strerror(number)}"):
                look()
        # What only tidies up is left for the next time.
        folder.sweep()
        folder.save(at(checkpoint, 6))
    assert names(folder) == ["step-00000005.pt", "step-00000006.pt"]


def test_the_reason_why_a_checkpoint_cannot_be_written_is_that_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    class Refusing:
        def write(self, data: bytes) -> int:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        def flush(self) -> None:
            pass

    @contextlib.contextmanager
    def publish(path: Path) -> Iterator[Refusing]:
        with storage_errors(path):
            yield Refusing()

    monkeypatch.setattr("shardprep_trainer.checkpoint.files.publish", publish)
    with pytest.raises(StorageError, match=r"5\.pt: Disk quota exceeded"):
        CheckpointFolder(tmp_path).save(at(checkpoint, 5))


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 2, "x": Harm()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused, .*it names posix\.mkdir"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{"format": 1}, {"format": 3}, {}, [1]])
def test_another_format_is_refused_with_found_and_expected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="found, 2 expected"):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["step-00000001.pt", "model.safetensors"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*`git lfs pull`$"),
        (b"<!DOCTYPE html><title>Sign in</title>", r"is a web page \(its title: 'Sign in'\)"),
        (b'{"n_mels": 40}', "is JSON text, and no checkpoint; name the folder of a run or of a mo"),
        (b"name: boss\n", "is text that begins 'name: boss', and no checkpoint"),
        (b"\x93NUMPY\1\0", r"is a NumPy file \(.npy\), and no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_not_called_damaged(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}: {said}") as caught:
        load(tmp_path / name)
    assert not isinstance(caught.value, DamagedCheckpointError)
