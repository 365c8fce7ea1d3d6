"""`verify --against` finds every difference between a set and its data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardprep import BuildReport, SourceError, VerifyReport, open_shards, verify_shards


def faults(report: VerifyReport) -> dict[str, str]:
    return {fault.file: fault.what for fault in report.faults}


@pytest.mark.parametrize("kind", ["float16", "float32", "uint8"])
def test_against_finds_a_changed_value_and_an_utterance_that_is_missing(
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    build: Callable[..., BuildReport],
    kind: str,
) -> None:
    root, shards = make_dataset(), tmp_path / "shards"
    build(root, shards, dtype=kind)
    assert verify_shards(shards, against=root).intact
    keys = open_shards(shards)["train"].keys
    changed, invisible, broken, relabelled = (root / f"{key}.pt" for key in keys[:4])
    mel = torch.load(changed)
    mel[7, 3] += 1e5
    torch.save(mel, changed)
    mel = torch.load(invisible)
    mel[0, 0] *= 1 + 1e-6
    torch.save(mel, invisible)
    broken.write_bytes(b"garbage")
    metadata = json.loads((root / "metadata.json").read_text())
    torch.save(torch.zeros(50, 40), root / "added.pt")
    metadata["speakers"]["id00000"].append({"feature_path": "added.pt", "mel_len": 50})
    for name, own in metadata["speakers"].items():
        moved = [entry for entry in own if entry["feature_path"] == relabelled.name]
        if moved:
            own.remove(moved[0])
            metadata["speakers"]["id00001" if name == "id00000" else "id00000"].append(moved[0])
            break
    (root / "metadata.json").write_text(json.dumps(metadata))
    report = verify_shards(shards, against=root)
    named = {fault.key: fault.what for fault in report.faults}
    assert set(named) - {invisible.stem} == {changed.stem, broken.stem, relabelled.stem, "added"}
    # Other types round so small a change away.
    assert (invisible.stem in named) == (kind == "float32")
    assert "differs from the source" in named[changed.stem]
    assert "is text that begins 'garbage'" in named[broken.stem]
    assert "its label is" in named[relabelled.stem]
    assert "is not in the set" in named["added"]
    removed = metadata["speakers"]["id00002"].pop()["feature_path"].removesuffix(".pt")
    (root / "metadata.json").write_text(json.dumps(metadata))
    named = {fault.key: fault.what for fault in verify_shards(shards, against=root).faults}
    assert "is not an utterance of" in named[removed]


def test_against_accepts_the_rejects_and_works_without_their_list(
    make_dataset: Callable[..., Path], tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    root, shards = make_dataset(), tmp_path / "shards"
    next(root.glob("*.pt")).write_bytes(b"garbage")
    build(root, shards, on_error="skip")
    assert verify_shards(shards, against=root).intact
    rejects = (shards / "rejects.jsonl").read_text()
    for text in (rejects[:-9], "[]\n", "\xff", None):
        (shards / "rejects.jsonl").unlink()
        if text is not None:
            (shards / "rejects.jsonl").write_text(text, encoding="latin-1")
        assert set(faults(verify_shards(shards, against=root))) == {"rejects.jsonl"}
        (shards / "rejects.jsonl").write_text(rejects)


def test_against_a_folder_that_is_no_data_set_is_a_source_error(
    edge_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"metadata\.json: does not exist"):
        verify_shards(edge_set, against=tmp_path)
