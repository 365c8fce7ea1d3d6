"""ShardWriter: the bytes of `build`, nothing before close, and no call lost after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardprep import (
    BuildError,
    BuildOptions,
    BuildReport,
    ShardWriter,
    SourceError,
    build_shards,
    open_shards,
    verify_shards,
)
from shardprep.format.manifest import WORK_FOLDER

N_MELS = 5


def utterances(seed: int = 0) -> list[tuple[str, str | None, np.ndarray]]:
    """Key, speaker and matrix of 20 utterances of two speakers, and of four without a speaker."""
    rng = np.random.default_rng(seed)
    speakers = [*(["zoe", "ann"] * 10), *[None] * 4]
    return [
        (f"part/{n:02d}" if n % 3 else f"u{n}", speaker, rng.normal(size=(3 + n, N_MELS)))
        for n, speaker in enumerate(speakers)
    ]


def write(path: Path, some: Any = None, **options: Any) -> BuildReport:
    options = {"samples_per_shard": 4, "val_fraction": 0.2, "workers": 1, **options}
    with ShardWriter(path, **{"n_mels": N_MELS, **options}) as writer:
        for key, speaker, matrix in utterances() if some is None else some:
            writer.add(key, matrix, speaker)
    return writer.close()


def save_dataset(root: Path, kind: type[np.floating]) -> Path:
    """The same utterances as a folder in the homework's layout."""
    speakers: dict[str, list[Any]] = {}
    tests = []
    for key, speaker, matrix in utterances():
        path = root / f"{key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(matrix.astype(kind)), path)
        entry = {"feature_path": f"{key}.pt", "mel_len": len(matrix)}
        tests.append(entry) if speaker is None else speakers.setdefault(speaker, []).append(entry)
    (root / "metadata.json").write_text(json.dumps({"n_mels": N_MELS, "speakers": speakers}))
    (root / "testdata.json").write_text(json.dumps({"n_mels": N_MELS, "utterances": tests}))
    return root


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_shards_and_indexes_are_those_of_build(
    tmp_path: Path,
    build: Callable[..., BuildReport],
    contents: Callable[[Path], dict[str, str]],
    dtype: str,
    codec: str,
) -> None:
    source = save_dataset(tmp_path / "Dataset", np.float64)
    chosen = {"dtype": dtype, "codec": codec, "samples_per_shard": 4, "val_fraction": 0.2}
    build(source, tmp_path / "built", **chosen)
    report = write(tmp_path / "written", **chosen)
    built, written = contents(tmp_path / "built"), contents(tmp_path / "written")
    assert {n: h for n, h in written.items() if n.endswith((".tar", ".npy"))} == {
        n: h for n, h in built.items() if n.endswith((".tar", ".npy"))
    }
    assert {name: split.samples for name, split in report.splits.items()} == {
        "train": 16,
        "val": 4,
        "test": 4,
    }
    manifest = open_shards(tmp_path / "written").manifest
    assert manifest.source_fingerprint is None
    assert manifest.build == open_shards(tmp_path / "built").manifest.build
    assert verify_shards(tmp_path / "written", deep=True).intact
    assert not (tmp_path / "written" / WORK_FOLDER).exists()


def test_equal_calls_give_equal_bytes_with_any_number_of_workers(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    features = {"sample_rate": 16000, "window": "hann", "log": True}
    write(tmp_path / "a", features=features)
    write(tmp_path / "b", features=features, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert open_shards(tmp_path / "a").manifest.features == features


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, np.float64, torch.float16, torch.float32, torch.bfloat16]
)
def test_arrays_and_tensors_of_every_float_are_taken(tmp_path: Path, kind: Any) -> None:
    values = [[0.5, -2.0], [1.0, 3.0], [0.25, 8.0]]
    if isinstance(kind, torch.dtype):
        matrix: Any = torch.tensor(values, dtype=kind, requires_grad=True)
    else:
        matrix = np.asfortranarray(values, kind)
    with ShardWriter(tmp_path / "s", 2, dtype="float32", workers=1) as writer:
        writer.add("a", matrix)
    np.testing.assert_array_equal(open_shards(tmp_path / "s")["test"].read(0), np.array(values))


@pytest.mark.parametrize(
    ("key", "matrix", "speaker", "split", "said"),
    [
        ("a", np.ones((3, 4)), "ann", None, r"a: has shape \(3, 4\), expected \(frames, 5\)"),
        ("a", np.ones((5, 3)), "ann", None, "it is transposed; add matrix.T"),
        ("a", np.ones(5), "ann", None, "waveform"),
        ("a", np.ones((0, 5)), "ann", None, "expected numbers"),
        ("a", np.ones((3, 5), int), "ann", None, "int64 numbers.*numpy.asarray"),
        ("a", torch.ones(3, 5).to_sparse(), "ann", None, "is no matrix"),
        ("a", [[object()] * 5], "ann", None, "holds object numbers"),
        ("a", np.full((3, 5), np.nan), "ann", None, "a: has values that are not finite"),
        ("a", np.full((3, 5), 7e4), "ann", None, 'range of float16; use dtype="float32"'),
        ("a.b", np.ones((3, 5)), "ann", None, "a.b: the key has a dot.*such as a-b"),
        ("a/b.c", np.ones((3, 5)), "ann", None, "such as a/b-c$"),
        ("../a", np.ones((3, 5)), "ann", None, "no plain path"),
        ("/a", np.ones((3, 5)), "ann", None, "no plain path"),
        ("a/", np.ones((3, 5)), "ann", None, "ends in no name"),
        ("", np.ones((3, 5)), "ann", None, "ends in no name"),
        ("k" * 89, np.ones((3, 5)), "ann", None, "has 89 bytes"),
        (7, np.ones((3, 5)), "ann", None, "expected a text"),
        ("a", np.ones((3, 5)), "", None, "empty text"),
        ("a", np.ones((3, 5)), 7, None, r"such as str\(speaker\)"),
        ("a", np.ones((3, 5)), None, "train", "has no speaker, which the split train needs"),
        ("a", np.ones((3, 5)), "ann", "dev", "expected one of train, val, test"),
        ("first", np.ones((3, 5)), "ann", None, "first: is added a second time"),
    ],
)
def test_a_faulty_utterance_is_named_and_the_writer_goes_on(
    tmp_path: Path, key: Any, matrix: Any, speaker: Any, split: Any, said: str
) -> None:
    with ShardWriter(tmp_path / "s", N_MELS, workers=1) as writer:
        writer.add("first", np.ones((2, N_MELS)), "ann")
        with pytest.raises(SourceError, match=said):
            writer.add(key, matrix, speaker, split)
    assert open_shards(tmp_path / "s")["train"].keys.tolist() == ["first"]


def test_a_split_that_is_named_is_kept(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", 2, val_fraction=0, workers=1) as writer:
        for split in ("train", "val", "test", None):
            writer.add(f"{split}", np.ones((2, 2)), "ann", split)
        writer.add("unknown", np.ones((2, 2)))
    shards = open_shards(tmp_path / "s")
    keys = {name: sorted(split.keys.tolist()) for name, split in shards.items()}
    assert keys == {"train": ["None", "train"], "val": ["val"], "test": ["test", "unknown"]}
    assert shards["test"].labels.tolist() == [0, -1]


def test_an_exception_publishes_nothing_and_keeps_the_spool(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", N_MELS, workers=1)

    def fail() -> None:
        with writer:
            writer.add("a", np.ones((3, N_MELS)), "ann")
            raise RuntimeError("mine")

    pytest.raises(RuntimeError, fail)
    assert [path.name for path in (tmp_path / "s").iterdir()] == [WORK_FOLDER]
    with pytest.raises(BuildError, match="is closed"):
        writer.add("b", np.ones((3, N_MELS)))
    with ShardWriter(tmp_path / "s", N_MELS, workers=1) as again:
        assert again.keep("a")
        assert not again.keep("b")
        with pytest.raises(SourceError, match="a: is added a second time"):
            again.keep("a")
    assert open_shards(tmp_path / "s").speakers == ("ann",)


def test_only_what_this_run_adds_or_keeps_is_packed(tmp_path: Path) -> None:
    for keys in ("abc", "bd"):
        writer = ShardWriter(tmp_path / "s", N_MELS, workers=1)
        for key in keys:
            writer.add(key, np.ones((3, N_MELS)))
        if keys == "abc":
            writer.__exit__(RuntimeError, None, None)
    writer.close()
    assert open_shards(tmp_path / "s")["test"].keys.tolist() == ["b", "d"]


def test_a_repeated_call_is_not_spooled_again_but_another_matrix_is(tmp_path: Path) -> None:
    spool = tmp_path / "s" / WORK_FOLDER / f"spool-{N_MELS}-float16"
    sizes = []
    for value in (1, 1, 2):
        writer = ShardWriter(tmp_path / "s", N_MELS, workers=1)
        writer.add("a", np.full((3, N_MELS), value, float))
        sizes.append(spool.stat().st_size)
        if value == 1:
            writer.__exit__(RuntimeError, None, None)
    writer.close()
    assert sizes[0] == sizes[1] < sizes[2]
    assert open_shards(tmp_path / "s")["test"].read(0).max() == 2


def test_two_writers_in_one_place_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", N_MELS, workers=1) as writer:
        with pytest.raises(BuildError, match="another build or repair is running"):
            ShardWriter(tmp_path / "s", N_MELS)
        writer.add("a", np.ones((3, N_MELS)))


def test_nothing_added_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no utterance was added"):
        ShardWriter(tmp_path / "s", N_MELS).close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_mels": 0}, "n_mels: is 0, expected 1 to 4096"),
        ({"n_mels": "80"}, "n_mels: is '80'"),
        ({"dtype": "int8"}, "dtype"),
        ({"features": {"a": [1]}}, "features: 'a' is"),
        ({"features": {"a": float("nan")}}, "features: 'a' is nan"),
        ({"path": "s3://bucket/s"}, "writes to a folder.*copy the finished set"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        ShardWriter(**{"path": tmp_path / "s", **options})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_same_calls_find_the_finished_set_up_to_date(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]], codec: str
) -> None:
    assert not write(tmp_path / "s", codec=codec).up_to_date
    before = contents(tmp_path / "s")
    assert write(tmp_path / "s", codec=codec).up_to_date
    with ShardWriter(
        tmp_path / "s", N_MELS, codec=codec, samples_per_shard=4, val_fraction=0.2
    ) as writer:
        assert all(writer.keep(key) for key, *_ in utterances())
    assert writer.close().up_to_date
    assert contents(tmp_path / "s") == before


def changed(change: str) -> list[tuple[str, str | None, np.ndarray]]:
    rows = utterances()
    key, speaker, matrix = rows[7]
    if change == "more":
        rows.append(("new", speaker, matrix))
    elif change == "matrix":
        rows[7] = key, speaker, matrix + 1
    elif change == "speaker":
        rows[7] = key, "bob", matrix
    elif change == "fewer":
        del rows[7]
    elif change == "order":
        rows.reverse()
    return rows


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("more", "without this utterance"),
        ("matrix", "has another matrix"),
        ("speaker", "is of speaker ann in the finished set, not bob"),
        ("fewer", "1 utterances more, such as part/07"),
        ("order", "in another order"),
    ],
)
def test_other_calls_are_refused_and_change_nothing_unless_overwrite_is_given(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]], change: str, said: str
) -> None:
    write(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(BuildError, match=said):
        write(tmp_path / "s", changed(change))
    assert contents(tmp_path / "s") == before
    write(tmp_path / "s", changed(change), overwrite=True)
    write(tmp_path / "fresh", changed(change))
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"seed": 1}, "build"), ({"dtype": "float32"}, "dtype"), ({"features": {"a": 1}}, "features")],
)
def test_other_options_are_refused_before_the_first_call(
    tmp_path: Path, options: Any, said: str
) -> None:
    write(tmp_path / "s")
    with pytest.raises(BuildError, match=f"a finished set with other {said}"):
        ShardWriter(
            tmp_path / "s", N_MELS, **{"samples_per_shard": 4, "val_fraction": 0.2, **options}
        )


def test_a_torn_or_zeroed_spool_costs_no_utterance(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    """What a kill, and what a power cut may leave."""
    write(tmp_path / "whole")
    writer = ShardWriter(tmp_path / "s", N_MELS, samples_per_shard=4, val_fraction=0.2, workers=1)
    for key, speaker, matrix in utterances():
        writer.add(key, matrix, speaker)
    writer.__exit__(RuntimeError, None, None)
    spool = tmp_path / "s" / WORK_FOLDER / f"spool-{N_MELS}-float16"
    data = bytearray(spool.read_bytes())
    data[400:420] = bytes(20)
    rng = np.random.default_rng(0)
    for size in rng.integers(0, len(data), 10).tolist():
        spool.parent.mkdir(parents=True, exist_ok=True)
        for path in spool.parent.iterdir():
            path.unlink()
        spool.write_bytes(data[:size])
        write(tmp_path / "s")
        assert contents(tmp_path / "s") == contents(tmp_path / "whole")
        for path in (tmp_path / "s").iterdir():
            path.unlink()


@pytest.mark.slow
def test_killed_at_every_step_the_calls_are_repeated_to_the_same_bytes(
    killed_at_every_step: Callable[[str, Path], list[Path]],
    tmp_path: Path,
    contents: Callable[[Path], dict[str, str]],
) -> None:
    write(tmp_path / "whole")
    program = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shard_writer import write

DEADLY.append((os, "open"))

def act(subject, folder):
    write(folder)
"""
    folders = killed_at_every_step(program, tmp_path)
    assert len(folders) > 10
    for folder in folders:
        write(folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_forked_process_cannot_add(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", N_MELS, workers=1) as writer:
        writer.add("a", np.ones((3, N_MELS)))
        child = os.fork()
        if child == 0:
            try:
                writer.add("b", np.ones((3, N_MELS)))
            except BuildError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert open_shards(tmp_path / "s")["test"].keys.tolist() == ["a"]


def test_it_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys, numpy, shardprep\n"
        "with shardprep.ShardWriter(sys.argv[1], 3, workers=1) as writer:\n"
        "    writer.add('a', numpy.ones((2, 3)), 'ann')\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "s"], check=True)


def test_texts_and_numbers_of_numpy_are_taken(
    tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    write(tmp_path / "plain")
    some = [(np.str_(key), s and np.str_(s), matrix) for key, s, matrix in utterances()]
    write(tmp_path / "numpy", some, n_mels=np.int64(N_MELS))
    assert contents(tmp_path / "numpy") == contents(tmp_path / "plain")


def test_the_folder_stays_when_the_program_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ShardWriter("shards", N_MELS, val_fraction=0, workers=1) as writer:
        writer.add("a", np.ones((3, N_MELS)), "ann")
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.add("b", np.ones((3, N_MELS)), "ann")
    assert set(open_shards(tmp_path / "shards")["train"].keys.tolist()) == {"a", "b"}
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("features", [{"\ud800": "x"}, {"x": "\ud800"}])
def test_a_recipe_that_no_manifest_can_hold_is_refused_at_once(
    tmp_path: Path, features: dict[str, str]
) -> None:
    with pytest.raises(BuildError, match="features: "):
        ShardWriter(tmp_path / "s", N_MELS, features=features)


def test_a_build_does_not_remove_what_an_interrupted_program_has_added(tmp_path: Path) -> None:
    source = save_dataset(tmp_path / "source", np.float32)

    def interrupted() -> None:
        with ShardWriter(tmp_path / "set", N_MELS) as writer:
            writer.add("first", np.ones((3, N_MELS)), "ann")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(BuildError, match="interrupted program has added") as caught:
        build_shards(source, tmp_path / "set")
    assert Path(str(caught.value.file)).name.startswith("spool-")
    with ShardWriter(tmp_path / "set", N_MELS) as writer:
        assert writer.keep("first")
        writer.add("second", np.ones((3, N_MELS)), "ann")
    build_shards(source, tmp_path / "set", BuildOptions(overwrite=True))
    assert "part/01" in open_shards(tmp_path / "set")["train"].keys
