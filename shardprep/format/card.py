"""The dataset card of a set, README.md: what the set holds, for people and for `datasets`.

Its front matter lists the shards of each split, so that `load_dataset` of a folder, or of a
repository on the Hub, finds them and nothing else. No name from the data is in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from shardprep.format.manifest import Manifest

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 20
"""A README.md that has more bytes is no card that a build has written."""

_MARK = "# written by shardprep build; remove this line to keep your own text"
_END = "---"
_REPOSITORY = "https://github.com/shardprep/shardprep"
# The names that `datasets` gives the splits of a folder.
_SPLITS = {"val": "validation"}


def card(manifest: Manifest) -> str:
    """The text of README.md for a set."""
    front = [_END, _MARK, *_configs(manifest), "task_categories:", "- audio-classification", _END]
    return "\n".join([*front, "", *_text(manifest), ""])


def is_card_of_ours(data: bytes) -> bool:
    """Whether a README.md is a card that a build has written, and may write again."""
    lines = data.decode("utf-8", "replace").splitlines()
    if lines[:1] != [_END] or _END not in lines[1:]:
        return False
    return _MARK in lines[1 : lines.index(_END, 1)]


def _configs(manifest: Manifest) -> Iterable[str]:
    yield "configs:"
    yield "- config_name: default"
    yield "  data_files:"
    for name in manifest.splits:
        yield f"  - split: {_split(name)}"
        yield f'    path: "{name}-*.tar"'


def _text(manifest: Manifest) -> Iterable[str]:
    yield "# Mel-spectrograms in tar shards"
    yield ""
    yield (
        f"{len(manifest.speakers):,} speakers, {manifest.n_mels} mel bins, {manifest.dtype}, codec "
        f"{manifest.codec.name}. `manifest.json` lists the speakers, the first with number 0, and "
        "the sha256 of each shard."
    )
    yield ""
    member = "mel.npy" if manifest.codec.name == "none" else "mel.npy.zst"
    # `adopt` makes a set of tars whose members only their own program knows.
    adopted = manifest.build is None
    if adopted:
        yield "Another program wrote the tars, and chose their members."
    else:
        yield (
            f"Each utterance has three members: `KEY.{member}`, the matrix (frames, "
            f"{manifest.n_mels}); `KEY.cls`, the number of its speaker, -1 where unknown; and "
            "`KEY.json`, with the speaker's name."
        )
    if manifest.is_quantised:
        yield ""
        yield (
            "The matrix holds whole numbers q. The mels are minimum + step * q. With `about`, the "
            "content of `KEY.json`: "
            '`q.astype("float32") * float(about["step"]) + float(about["minimum"])`.'
        )
    yield ""
    yield "| split | utterances | frames | shards |"
    yield "|---|---|---|---|"
    for name, split in manifest.splits.items():
        yield f"| {_split(name)} | {split.samples:,} | {split.frames:,} | {len(split.shards):,} |"
    yield ""
    first = next(iter(manifest.splits))
    if not adopted:
        yield from _in_other_readers(manifest, first, member)
    yield "```python"
    yield "import shardprep"
    yield ""
    yield f'split = shardprep.open_shards("shards/")["{first}"]'
    yield "split.read(0), split.labels[0]"
    yield "```"
    yield ""
    yield (
        f"[FORMAT.md]({_REPOSITORY}/blob/main/FORMAT.md) specifies the files. "
        f"[docs/readers.md]({_REPOSITORY}/blob/main/docs/readers.md) has the code for other "
        "programs: plain tar, wids, Ray Data, Energon, litdata, lhotse, DuckDB and polars."
    )


def _in_other_readers(manifest: Manifest, first: str, member: str) -> Iterable[str]:
    yield "```python"
    yield "import datasets"
    yield ""
    yield f'split = datasets.load_dataset("shards/")["{_split(first)}"].with_format("numpy")'
    yield f'split[0]["{member}"], split[0]["cls"]'
    yield "```"
    yield ""
    yield "```python"
    yield "import shardprep"
    yield "import webdataset"
    yield ""
    shard = f"shards/{manifest.splits[first].shards[0].file}"
    yield f'pipeline = webdataset.WebDataset("{shard}", shardshuffle=False)'
    yield "for sample in pipeline.decode(shardprep.decode_npy):"
    yield f'    sample["{member}"], sample["cls"]'
    yield "```"
    yield ""


def _split(name: str) -> str:
    return _SPLITS.get(name, name)
