"""The card lists the shards of each split for `datasets`, and nothing that data could say."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml

from shardprep import Manifest, open_shards
from shardprep.format.card import card, is_card_of_ours

MARK = "# written by shardprep build; remove this line to keep your own text"


@pytest.fixture
def manifest(edge_set: Path) -> Manifest:
    return open_shards(edge_set).manifest


def front_matter(text: str) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    parsed: dict[str, object] = yaml.safe_load(found[1])
    return parsed


def test_configs_name_exactly_the_shards_of_each_split(edge_set: Path, manifest: Manifest) -> None:
    (config,) = front_matter(card(manifest))["configs"]  # type: ignore[misc]
    names = {"train": "train", "validation": "val", "test": "test"}
    assert [entry["split"] for entry in config["data_files"]] == list(names)
    for entry in config["data_files"]:
        found = {path.name for path in edge_set.glob(entry["path"])}
        split = manifest.splits[names[entry["split"]]]
        assert found == {shard.file for shard in split.shards}


def test_counts_are_those_of_the_manifest(manifest: Manifest) -> None:
    text = card(manifest)
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    expected = [(s.samples, s.frames, len(s.shards)) for s in manifest.splits.values()]
    assert [tuple(int(n.replace(",", "")) for n in row[1:]) for row in rows] == expected


def test_no_name_from_the_data_is_in_the_card(manifest: Manifest) -> None:
    hostile = ("---\nconfigs: []\n", "](javascript:alert(1))", "ann")
    assert card(msgspec.structs.replace(manifest, speakers=hostile)) == card(manifest)


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_the_code_of_the_card_runs(
    edge_set: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    code = re.findall(r"```python\n(.*?)```", card(manifest), re.DOTALL)
    assert len(code) == 3
    (tmp_path / "shards").symlink_to(edge_set)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "datasets" in code[pieces]:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
    exec(compile(code[pieces], "card", "exec"), {})
    gc.collect()


def test_the_card_of_bytes_says_how_to_widen_them(
    edge_sets: dict[tuple[str, str], Path], manifest: Manifest
) -> None:
    shard_set = open_shards(edge_sets["uint8", "none"])
    (code,) = re.findall(r"`(q\..*?)`", card(shard_set.manifest))
    split = shard_set["train"]
    about = {"step": split.step[3], "minimum": np.float64(split.minimum[3])}
    mel = eval(code, {"q": split.read_stored(3), "about": about})
    assert mel.tobytes() == split.read(3).tobytes()
    assert "whole numbers" not in card(manifest)


def test_the_card_of_adopted_tars_claims_nothing_of_their_members(manifest: Manifest) -> None:
    text = card(msgspec.structs.replace(manifest, build=None))
    assert "Another program wrote the tars" in text
    assert "mel.npy" not in text
    assert len(re.findall(r"```python\n", text)) == 1
    assert front_matter(text) == front_matter(card(manifest))


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        (f"---\n{MARK}\nlicense: mit\n---\n", True),
        (f"---\nlicense: mit\n{MARK}\n---\nmy words\n", True),
        (f"---\r\n{MARK}\r\n---\r\n", True),
        ("---\nlicense: mit\n---\n", False),
        (f"---\nlicense: mit\n---\n{MARK}\n", False),
        (f"---\n{MARK}\n", False),
        (MARK, False),
        ("", False),
    ],
)
def test_the_mark_in_the_front_matter_decides_whose_card_it_is(text: str, ours: bool) -> None:
    assert is_card_of_ours(text.encode()) is ours


def test_a_card_is_known_as_ours_and_other_bytes_are_not(manifest: Manifest) -> None:
    assert is_card_of_ours(card(manifest).encode())
    assert not is_card_of_ours(bytes(range(256)))
