"""Checkpoints: whole or absent, read safely, the newest never lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.errors import CheckpointError, DamagedCheckpointError


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(os.listdir(folder.folder))


def test_a_checkpoint_reads_back_to_the_bit(tmp_path: Path) -> None:
    state = {"weights": {"w": torch.randn(3, 4)}, "step": 7, "names": ["a"], "none": None}
    path = CheckpointFolder(tmp_path).save(state, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007.pt"
    found = load(path)
    assert torch.equal(found["weights"]["w"], state["weights"]["w"])  # type: ignore[index]
    assert (found["step"], found["names"], found["none"]) == (7, ["a"], None)


def test_the_newest_k_are_kept_and_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (2, 10, 99_999_999, 100_000_000):
        folder.save({}, step)
    assert names(folder) == ["step-100000000.pt", "step-99999999.pt"]
    latest = folder.latest()
    assert latest is not None
    assert latest.name == "step-100000000.pt"


def test_a_save_deletes_neither_itself_nor_a_later_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save({}, 30)
    folder.save({}, 20)
    assert names(folder) == ["step-00000020.pt", "step-00000030.pt"]
    folder.save({}, 40)
    assert names(folder) == ["step-00000040.pt"]


def test_best_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save_best({"step": 1})
    for step in (1, 2, 3):
        folder.save({}, step)
    assert names(folder) == ["best.pt", "step-00000003.pt"]
    assert load(folder.best)["step"] == 1


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").latest() is None


def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save_best({"step": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"best\.pt: cannot be written .*No space left"):
        folder.save_best({"step": 2})
    assert names(folder) == ["best.pt"]
    assert load(folder.best)["step"] == 1


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save({}, 1)
    (folder.folder / "step-00000002.pt.abc.tmp").write_bytes(b"half")
    folder.sweep()
    assert names(folder) == ["step-00000001.pt"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.999])
def test_a_torn_file_is_named_with_the_remedy(tmp_path: Path, kept: float) -> None:
    path = CheckpointFolder(tmp_path).save({"w": torch.randn(1000)}, 5)
    size = int(kept if kept > 1 else kept * path.stat().st_size)
    os.truncate(path, size)
    with pytest.raises(DamagedCheckpointError, match=r"5\.pt: not a whole.*--resume goes on"):
        load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save({"w": torch.zeros(10_000)}, 5)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000005\.pt: not a whole .*checksum"):
        load(path)


def test_a_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (100, 200, 213):
        folder.save({"step": step}, step)
    damaged = tmp_path / "checkpoints" / "step-00000213.pt"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    found = folder.load_newest()
    assert found.state["step"] == 200
    newest = folder.save({"step": 300}, 300)
    newest.write_bytes(b"")
    # Two whole ones were kept, so that one more may be lost.
    assert folder.load_newest().state["step"] == 200


def test_a_checkpoint_that_lacks_an_entry_is_refused_by_name(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save({"step": 5, "model": {}}, 5)
    assert load(path, needs=("model", "step"))["step"] == 5
    with pytest.raises(CheckpointError, match=r"step-00000005\.pt: holds no optimizer, loader;"):
        load(path, needs=("step", "optimizer", "loader"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt: there is no such checkpoint"):
        load(tmp_path / "x.pt")


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "x": Harm()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused, .*it names posix\.mkdir"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{"format": 2}, {}, [1]])
def test_another_format_is_refused_with_found_and_expected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="found, 1 expected"):
        load(tmp_path / "x.pt")
