"""Mutated files are refused clearly or read as they are, also all inputs that fuzzing has found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.torture import fuzz

ROOT = Path(__file__).parents[2]
FOUND = sorted(path for path in (Path(__file__).parent / "found").glob("*/*"))

TARGETS = ("manifest", "index", "tar", "zstd", "metadata", "pt")
# Those of an index and of a tar go into two sets.
EXAMPLES = {"index": 200, "tar": 50}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {name: make(folder / name) for name, make in fuzz.TARGETS.items()}


def mutated(seed: bytes, random_seed: int, changes: int) -> bytes:
    """A seed with some pieces changed, removed, repeated or moved, as files get damaged."""
    draw, data = random.Random(random_seed), bytearray(seed)
    for _ in range(changes):
        at = draw.randrange(len(data) + 1)
        piece = data[at : at + draw.choice((1, 2, 4, 8, 40))]
        other = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data[at : at + 1] = bytes([draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))])
            case 1:
                data[at : at + len(piece)] = b""
            case 2:
                data[at:at] = piece * draw.choice((1, 2, 50))
            case 3:
                data[other:other] = piece
            case 4:
                data[at : at + len(piece)] = draw.randbytes(len(piece))
            case 5:
                del data[max(at, 1) :]
    return bytes(data)


def test_every_target_is_tried_here(targets: dict[str, Any]) -> None:
    assert tuple(targets) == TARGETS


# numpy warns of a header that only looks like one of Python 2, and reads it.
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header")
@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_and_mutations_of_them_never_crash(targets: dict[str, Any], name: str) -> None:
    target = targets[name]
    seeds = list(target.seeds())
    for seed in seeds:
        target(seed)

    @given(st.sampled_from(seeds), st.integers(0, 2**32), st.integers(1, 6))
    @settings(max_examples=EXAMPLES.get(name, 400))
    def attempt(seed: bytes, random_seed: int, changes: int) -> None:
        target(mutated(seed, random_seed, changes))

    attempt()


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_refused(targets: dict[str, Any], path: Path) -> None:
    targets[path.parent.name](path.read_bytes())


def test_a_crash_is_noticed_and_kept_once(tmp_path: Path) -> None:
    seen: set[str] = set()
    for data in (b"first", b"second"):
        try:
            raise TypeError(data)
        except TypeError as error:
            fuzz._keep(data, error, tmp_path, seen)
    (kept,) = (path for path in tmp_path.iterdir() if path.suffix != ".txt")
    assert kept.read_bytes() == b"first"


def test_results_are_those_of_all_targets() -> None:
    results = json.loads((ROOT / "scripts" / "results" / "fuzz.json").read_text())
    assert tuple(results["targets"]) == TARGETS
    assert all(target["runs"] > 1000 for target in results["targets"].values())
    assert all(target["crashes"] == [] for target in results["targets"].values())
