"""Several sets that are opened as one read like their utterances, one set after another."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shardprep import (
    CorruptShardError,
    FormatError,
    OpenShards,
    ShardCache,
    Split,
    UtteranceLoader,
    open_shards,
)
from shardprep.storage import connections


@pytest.fixture(params=["none", "zstd"])
def places(
    edge_sets: dict[tuple[str, str], Path],
    second_sets: dict[str, Path],
    request: pytest.FixtureRequest,
) -> list[Path]:
    """Two sets of one codec that share a speaker and some keys."""
    return [edge_sets["float16", request.param], second_sets[request.param]]


def matrices(split: Split) -> list[bytes]:
    return [split.read(index).tobytes() for index in range(len(split))]


def names(shards: OpenShards, split: Split) -> list[str | None]:
    return [shards.speakers[label] if label >= 0 else None for label in split.labels.tolist()]


def one_after_another(places: list[Path], split: str) -> list[tuple[object, ...]]:
    """Key, speaker, length and matrix of each utterance, by reading each set alone."""
    found = []
    for place in places:
        alone = open_shards(place)
        part = alone[split]
        found += list(
            zip(
                part.keys.tolist(),
                names(alone, part),
                part.frames.tolist(),
                matrices(part),
                strict=True,
            )
        )
    return found


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_is_that_of_one_set_and_then_of_the_other(places: list[Path], split: str) -> None:
    both = open_shards(places)
    part = both[split]
    assert one_after_another(places, split) == list(
        zip(
            part.keys.tolist(), names(both, part), part.frames.tolist(), matrices(part), strict=True
        )
    )
    assert part.set_sizes == tuple(len(open_shards(place)[split]) for place in places)
    assert both.samples[split] == len(part) == sum(part.set_sizes)
    assert part.intact(np.arange(len(part))).all()
    np.testing.assert_array_equal(part.labels, part.locations["label"])
    np.testing.assert_array_equal(
        np.bincount(part.locations["shard"], minlength=len(part.shard_samples)), part.shard_samples
    )
    assert part.nbytes == sum(open_shards(place)[split].nbytes for place in places)


def test_speakers_keep_the_labels_of_the_first_set_and_new_ones_follow(
    edge_set: Path, second_sets: dict[str, Path]
) -> None:
    first, second = open_shards(edge_set).speakers, open_shards(second_sets["none"]).speakers
    assert open_shards([edge_set, second_sets["none"]]).speakers == (
        *first,
        *(name for name in second if name not in first),
    )
    assert open_shards([second_sets["none"], edge_set]).speakers[: len(second)] == second


def test_segments_are_cut_from_both_sets_at_once(places: list[Path]) -> None:
    part = open_shards(places)["train"]
    rng = np.random.default_rng(0)
    indices = rng.permutation(len(part))
    starts = rng.integers(0, part.frames[indices])
    found = part.segments(indices, starts, 50, -3.0)
    for row, index, start in zip(found, indices.tolist(), starts.tolist(), strict=True):
        expected = part.read(index)[start : start + 50]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == -3.0).all()


def test_a_split_that_one_set_lacks_has_the_utterances_of_the_other(
    edge_set: Path, source_of: Callable[..., Path], build: Callable[..., object], tmp_path: Path
) -> None:
    build(source_of({"eva": [50, 60], "bob": [70]}), tmp_path / "only", val_fraction=0.0)
    places = [tmp_path / "only", edge_set]
    both = open_shards(places)
    assert both["test"].set_sizes == (0, len(open_shards(edge_set)["test"]))
    assert both["test"].keys.tolist() == open_shards(edge_set)["test"].keys.tolist()
    assert names(both, both["val"]) == names(open_shards(edge_set), open_shards(edge_set)["val"])
    assert both.test_entries == open_shards(edge_set).test_entries


def test_test_entries_and_rejects_of_one_set_follow_those_of_the_other(
    edge_set: Path, second_sets: dict[str, Path]
) -> None:
    second = second_sets["none"]
    for places in ([edge_set, second], [second, edge_set]):
        both, alone = open_shards(places), [open_shards(place) for place in places]
        expected = [entry.file for one in alone for entry in one.test_entries]
        assert [entry.file for entry in both.test_entries] == expected
        for entry in both.test_entries:
            if entry.index is not None:
                assert f"{both['test'].keys[entry.index]}.pt" == entry.file
        indices = [entry.index for entry in both.test_entries if entry.index is not None]
        assert indices == list(range(len(both["test"])))
        (lost,) = [entry for entry in both.test_entries if entry.index is None]
        (reject,) = both.rejects
        assert reject.entry is not None
        assert both.test_entries[reject.entry] == lost
        assert both.reject_lists == (second / "rejects.jsonl",)


def _labels(split: Split) -> list[int]:
    return [int(split.labels[i]) for i in range(len(split)) if split.read(i).size]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_it_can_be_pickled_and_read_in_other_processes(places: list[Path], start: str) -> None:
    both = open_shards(places)
    part = both["train"]
    assert matrices(pickle.loads(pickle.dumps(part))) == matrices(part)
    assert pickle.loads(pickle.dumps(both)).speakers == both.speakers
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(_labels, (part,)) == part.labels.tolist()


def test_damage_is_reported_with_the_file_of_its_set(places: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(places[1], tmp_path / "copy"))
    part = open_shards([places[0], copy])["train"]
    index = part.set_sizes[0] + 2
    row = part.locations[index]
    shard = (
        copy
        / f"train-{int(row['shard']) - len(open_shards(places[0])['train'].shard_samples):06d}.tar"
    )
    data = bytearray(shard.read_bytes())
    data[int(row["offset"]) + int(row["nbytes"]) - 1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptShardError, match="crc32") as caught:
        part.read(index)
    assert (caught.value.file, caught.value.key) == (str(shard), part.keys[index])
    assert part.intact(np.arange(len(part))).tolist() == [i != index for i in range(len(part))]


def test_each_set_is_watched(edge_set: Path, second_sets: dict[str, Path], tmp_path: Path) -> None:
    for number in range(2):
        copies = [
            Path(shutil.copytree(place, tmp_path / f"{number}-{n}"))
            for n, place in enumerate((edge_set, second_sets["none"]))
        ]
        both = open_shards(copies)
        both.check_unchanged()
        (copies[number] / "manifest.json").write_text("{}")
        with pytest.raises(CorruptShardError, match="was changed") as caught:
            both.check_unchanged()
        assert caught.value.file == str(copies[number])


def test_fingerprint_depends_on_the_sets_and_their_order(
    edge_set: Path, second_sets: dict[str, Path]
) -> None:
    second = second_sets["none"]
    found = [
        open_shards(places).fingerprint
        for places in ([edge_set, second], [second, edge_set], [edge_set], [second])
    ]
    assert len(set(found)) == 4
    assert (
        found[2] == open_shards(edge_set).fingerprint == open_shards(edge_set).manifest.fingerprint
    )
    assert open_shards([edge_set, second])["val"].fingerprint == found[0]


def test_a_list_of_one_set_reads_like_the_set(edge_set: Path) -> None:
    one, alone = open_shards((edge_set,)), open_shards(edge_set)
    assert one.speakers == alone.speakers
    assert one.test_entries == alone.test_entries
    np.testing.assert_array_equal(one["train"].locations, alone["train"].locations)


def test_sets_that_cannot_be_one_are_refused_by_name(
    edge_sets: dict[tuple[str, str], Path],
    second_sets: dict[str, Path],
    source_of: Callable[..., Path],
    build: Callable[..., object],
    tmp_path: Path,
) -> None:
    first = edge_sets["float16", "none"]
    with pytest.raises(FormatError, match="no shard set is given"):
        open_shards([])
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    for again in (first, copy):
        with pytest.raises(FormatError, match=f"{again}: is the same set as {first}"):
            open_shards([first, second_sets["none"], again])
    cases = [
        (
            edge_sets["float32", "none"],
            f"dtype float32, and {first}, .* has dtype float16.*--dtype",
        ),
        (second_sets["zstd"], f"codec zstd with chunks of 64 frames, and {first}.*--codec"),
    ]
    for other, what in cases:
        with pytest.raises(FormatError, match=what) as caught:
            open_shards([first, other])
        assert caught.value.file == str(other)


@pytest.fixture
def urls(edge_set: Path, second_sets: dict[str, Path]) -> Iterator[list[str]]:
    """The two sets, in a store in memory."""
    store = fsspec.filesystem("memory")
    for number, folder in enumerate((edge_set, second_sets["none"])):
        for path in folder.iterdir():
            store.pipe(f"/set{number}/{path.name}", path.read_bytes())
    yield ["memory://set0", "memory://set1"]
    store.store.clear()
    connections.forget_connections()


def test_sets_behind_urls_read_like_those_in_folders(
    urls: list[str], edge_set: Path, second_sets: dict[str, Path], tmp_path: Path
) -> None:
    near = open_shards([edge_set, second_sets["none"]])
    size = sum(int(near[name].shard_bytes.sum()) for name in near)
    # Too little room for all shards at a time.
    cache = ShardCache(tmp_path / "cache", size, readers=1, patience=2)
    far = open_shards(urls, cache)
    for name in ("train", "val", "test"):
        assert matrices(far[name]) == matrices(near[name])
    assert far.fingerprint == near.fingerprint
    assert far.test_entries == near.test_entries
    assert [path.read_bytes() for path in far.fetch("val")] == [
        path.read_bytes() for path in near.fetch("val")
    ]
    seen = [index for batch in UtteranceLoader(far["train"]) for index in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(near["train"])))
    with pytest.raises(FormatError, match="behind a URL, and .* has files on this"):
        open_shards([edge_set, urls[1]], cache)
