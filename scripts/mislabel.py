"""How many wrong labels `shardprep score --suspects` finds: swap some, then compare.

    python -m scripts.mislabel swap Dataset/ swapped/
    shardprep build swapped/Dataset/ swapped/shards/
    shardprep train --config best --name swapped --data.shards swapped/shards/ ...
    shardprep score runs/swapped --suspects suspects.csv
    python -m scripts.mislabel compare suspects.csv swapped/swapped.csv swapped/shards/

`swap` makes a data set in the homework's layout, in which pairs of utterances of two speakers have
exchanged their labels (--share, by default 3 % of all), and writes which: swapped.csv with the
columns key, given and truth. Every speaker keeps the number of utterances. Files are linked, or
copied where links are not possible; test_labels.csv comes along if it lies beside the data set.
`compare` prints JSON. A list is measured by the labels that were swapped; the data set may have had
wrong ones before.

Exit codes: 0 done, 2 usage.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from scripts.ladder.hold_out import link_file
from shardprep import open_shards

Entries = dict[str, list[dict[str, Any]]]
HEADER = ("key", "given", "truth")


def swap_labels(speakers: Entries, share: float, seed: int) -> dict[str, tuple[str, str]]:
    """Exchange the labels of pairs of utterances, in place.

    Args:
        speakers: The utterances of each speaker, as metadata.json lists them.
        share: Share of all utterances that get a wrong label, 0 to 1.
        seed: Decides which.

    Returns:
        For each of them its key, the label given now, and the true one.
    """
    drawn = [(name, place) for name, own in speakers.items() for place in range(len(own))]
    wanted = round(len(drawn) * share / 2)
    random.Random(seed).shuffle(drawn)
    changed: dict[str, tuple[str, str]] = {}
    while drawn and len(changed) < 2 * wanted:
        one, place = drawn.pop()
        partner = next((at for at, (name, _) in enumerate(drawn) if name != one), None)
        if partner is None:
            break
        other, there = drawn.pop(partner)
        mine, theirs = speakers[one][place], speakers[other][there]
        speakers[one][place], speakers[other][there] = theirs, mine
        changed[_key(mine)] = (other, one)
        changed[_key(theirs)] = (one, other)
    return changed


def compare(
    suspects: Sequence[dict[str, str]], swapped: dict[str, str], keys: Sequence[str]
) -> dict[str, Any]:
    """How well a list of suspects has the labels that were swapped.

    Args:
        suspects: The rows of the list, in its order.
        swapped: True speaker of each utterance with a swapped label, by key.
        keys: Keys of the utterances that were judged.

    Returns:
        Their number, that of the swapped ones among them, and precision and recall of the whole
        list, of its first rows (as many as labels were swapped), and of the verdict "wrong
        speaker"; `named` is the share of the swapped ones in the list whose nearest speaker is the
        true one.
    """
    wanted = swapped.keys() & set(keys)
    found = [row for row in suspects if row["key"] in wanted]
    named = sum(row["nearest"] == swapped[row["key"]] for row in found)

    def rates(rows: Sequence[dict[str, str]]) -> dict[str, float]:
        hits = sum(row["key"] in wanted for row in rows)
        return {
            "listed": len(rows),
            "precision": hits / max(1, len(rows)),
            "recall": hits / max(1, len(wanted)),
        }

    return {
        "utterances": len(keys),
        "swapped": len(wanted),
        "all": rates(suspects),
        "first": rates(suspects[: len(wanted)]),
        "wrong speaker": rates([row for row in suspects if row["verdict"] == "wrong speaker"]),
        "named": named / max(1, len(found)),
    }


def _key(entry: dict[str, Any]) -> str:
    return str(Path(entry["feature_path"]).with_suffix(""))


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Measure `shardprep score --suspects` on labels that were swapped."""


@main.command("swap", context_settings={"show_default": True})
@click.argument("dataset", type=_FOLDER)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--share", type=click.FloatRange(0, 1), default=0.03, help="Of labels to swap.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Decides which.")
def swap_command(dataset: Path, target: Path, share: float, seed: int) -> None:
    """Make a data set with swapped labels of DATASET, in TARGET."""
    if not (dataset / "metadata.json").exists():
        raise click.UsageError(f"{dataset}: there is no metadata.json; name the Dataset/ folder")
    new = target / "Dataset"
    if new.exists():
        raise click.UsageError(f"{new} is there already; name another folder, or remove it")
    new.mkdir(parents=True)
    metadata = json.loads((dataset / "metadata.json").read_text())
    test = json.loads((dataset / "testdata.json").read_text())
    for entries in (*metadata["speakers"].values(), test["utterances"]):
        for entry in entries:
            link_file(dataset / entry["feature_path"], new / entry["feature_path"])
    changed = swap_labels(metadata["speakers"], share, seed)
    (new / "metadata.json").write_text(json.dumps(metadata))
    for name in ("mapping.json", "testdata.json"):
        shutil.copyfile(dataset / name, new / name)
    if (labels := dataset.absolute().parent / "test_labels.csv").exists():
        shutil.copyfile(labels, target / labels.name)
    with (target / "swapped.csv").open("w", newline="") as file:
        rows = ((key, *names) for key, names in sorted(changed.items()))
        csv.writer(file).writerows([HEADER, *rows])
    click.echo(
        f"{new}: {len(changed):,} labels swapped; {target / 'swapped.csv'} has the true ones"
    )


@main.command("compare")
@click.argument("suspects", type=_FILE)
@click.argument("swapped", type=_FILE)
@click.argument("shards")
@click.option("--split", default="train", show_default=True, help="That was judged.")
def compare_command(suspects: Path, swapped: Path, shards: str, split: str) -> None:
    """Print precision and recall of the list SUSPECTS, for the split of SHARDS that was judged."""
    truth = {row["key"]: row["truth"] for row in _rows(swapped)}
    keys = open_shards(shards)[split].keys.tolist()
    click.echo(json.dumps(compare(_rows(suspects), truth, keys), indent=2))


if __name__ == "__main__":
    main()
