"""`shardprep inspect DST`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from shardprep.cli.output import hours, print_json, size
from shardprep.cli.parquet import write_parquet
from shardprep.cli.places import Place
from shardprep.format.index import NO_LABEL, scale_in
from shardprep.format.manifest import frames_per_second
from shardprep.read.shard_set import ShardSet, open_shards
from shardprep.read.split import Split
from shardprep.storage.remote import Location

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_BARS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_HISTOGRAM_BINS = 40
_PICTURE_COLUMNS, _PICTURE_ROWS = 72, 10


@click.command(short_help="Show what the shard set DST holds.")
@click.argument("shards", type=Place(), metavar="DST")
@click.option("--sample", "key", metavar="KEY", help="Show one utterance.")
@click.option(
    "--parquet",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the index as a table, one row an utterance: key, split, label, speaker, "
    "frames, and where its matrix is.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(shards: Location, key: str | None, parquet: Path | None, as_json: bool) -> None:
    """Show what the shard set DST holds: splits, speakers, lengths, dtype, codec, sizes."""
    if parquet is not None and (key is not None or as_json):
        raise click.UsageError("--parquet writes the table of all utterances; give no other option")
    shard_set = open_shards(shards)
    if parquet is not None:
        rows = write_parquet(shard_set, parquet)
        # A file may be /dev/stdout.
        click.echo(f"{parquet}: {rows:,} rows", err=True)
    elif key is not None:
        split, index = _find(shard_set, key)
        about = describe_sample(shard_set, split, index)
        if as_json:
            print_json(about)
        else:
            _print_sample(about, split.read(index))
    elif as_json:
        print_json(describe(shard_set))
    else:
        _print_set(shard_set, describe(shard_set))


def describe(shard_set: ShardSet) -> dict[str, Any]:
    """What `inspect --json` prints of a set."""
    manifest = shard_set.manifest
    return {
        "path": str(shard_set.path),
        "format_version": manifest.version,
        "fingerprint": manifest.fingerprint,
        "n_mels": manifest.n_mels,
        "dtype": manifest.dtype,
        "codec": manifest.codec,
        "member": manifest.member,
        "features": manifest.features,
        "speakers": len(manifest.speakers),
        "build": manifest.build,
        "splits": {name: _describe_split(shard_set, name) for name in shard_set.splits},
    }


def describe_sample(shard_set: ShardSet, split: Split, index: int) -> dict[str, Any]:
    """What `inspect --sample KEY --json` prints of an utterance."""
    row, label = split.locations[index], int(split.labels[index])
    mel = split.read(index).astype(np.float32)
    return {
        "key": str(split.keys[index]),
        "split": split.name,
        "index": index,
        "speaker": None if label == NO_LABEL else shard_set.speakers[label],
        "label": label,
        "frames": int(row["frames"]),
        "seconds": int(row["frames"]) / frames_per_second(shard_set.manifest.features),
        "shard": shard_set.manifest.splits[split.name].shards[int(row["shard"])].file,
        "offset": int(row["offset"]),
        "nbytes": int(row["nbytes"]),
        "crc32": f"{int(row['crc32']):08x}",
        **({} if (scale := scale_in(row)) is None else scale._asdict()),
        "min": float(mel.min()),
        "mean": float(mel.mean()),
        "max": float(mel.max()),
    }


def _describe_split(shard_set: ShardSet, name: str) -> dict[str, Any]:
    split, info = shard_set[name], shard_set.manifest.splits[name]
    known = split.labels[split.labels != NO_LABEL]
    frames = split.frames if len(split) else np.zeros(1, np.int64)
    return {
        "samples": info.samples,
        "frames": info.frames,
        "hours": info.frames / frames_per_second(shard_set.manifest.features) / 3600,
        "shards": len(info.shards),
        "bytes": sum(shard.bytes for shard in info.shards),
        "speakers": len(np.unique(known)),
        "length_percentiles": {
            str(p): int(np.percentile(frames, p, method="nearest")) for p in _PERCENTILES
        },
    }


def _find(shard_set: ShardSet, key: str) -> tuple[Split, int]:
    for name in shard_set.splits:
        split = shard_set[name]
        found = np.flatnonzero(split.locations["key"] == key.removesuffix(".pt").encode())
        if found.size:
            return split, int(found[0])
    raise click.BadParameter(f"no utterance has the key {key!r}", param_hint="--sample")


def _print_set(shard_set: ShardSet, about: dict[str, Any]) -> None:
    codec = about["codec"]
    packed = codec.name
    if codec.name == "zstd":
        packed += f" level {codec.level}, chunks of {codec.chunk_frames} frames"
    if about["member"] is not None:
        packed += f", adopted tars, member .{about['member']}"
    click.echo(
        f"{about['path']}: {about['speakers']} speakers, {about['n_mels']} mels, "
        f"{about['dtype']}, codec {packed}"
    )
    if about["features"]:
        told = ", ".join(f"{name} {value}" for name, value in about["features"].items())
        click.echo(textwrap.fill(f"features: {told}", 80, subsequent_indent="  "))
    heads = ("split", "utterances", "speakers", "speech", "shards", "size")
    click.echo("{:<7}{:>12}{:>10}{:>12}{:>8}{:>12}".format(*heads))
    for name, split in about["splits"].items():
        speech = hours(split["frames"], about["features"])
        click.echo(
            f"{name:<7}{split['samples']:>12,}{split['speakers']:>10,}"
            f"{speech:>12}{split['shards']:>8}{size(split['bytes']):>12}"
        )
    click.echo("\nlength in frames" + "".join(f"{_percentile_name(p):>8}" for p in _PERCENTILES))
    for name, split in about["splits"].items():
        values = "".join(f"{split['length_percentiles'][str(p)]:>8,}" for p in _PERCENTILES)
        click.echo(f"{name:<16}{values}")
    lengths = np.concatenate([shard_set[name].frames for name in shard_set.splits])
    click.echo("\n" + _histogram(lengths))


def _percentile_name(percentile: int) -> str:
    return {0: "min", 50: "median", 100: "max"}.get(percentile, f"{percentile} %")


def _histogram(lengths: NDArray[np.int64]) -> str:
    """All utterances by length, the longest 1 % in the last column."""
    end = max(int(np.percentile(lengths, 99)), 1) if len(lengths) else 1
    counts, edges = np.histogram(np.minimum(lengths, end), _HISTOGRAM_BINS, (0, end))
    tallest = max(int(counts.max()), 1)
    bars = "".join(_BARS[-(-int(count) * (len(_BARS) - 1) // tallest)] for count in counts)
    scale = f"0{f'{int(edges[-1]):,}+ frames':>{_HISTOGRAM_BINS + 6}}"
    return f"{bars}  most: {tallest:,} utterances\n{scale}"


def _print_sample(about: dict[str, Any], mel: NDArray[Any]) -> None:
    for name, value in about.items():
        click.echo(f"{name:<9}{value:.3f}" if isinstance(value, float) else f"{name:<9}{value}")
    click.echo("\n" + _picture(mel.astype(np.float32)))


def _picture(mel: NDArray[np.float32]) -> str:
    """A coarse picture of a mel matrix (T, F): time to the right, low mels at the bottom."""
    columns = np.array_split(mel, min(_PICTURE_COLUMNS, len(mel)), axis=0)
    rows = min(_PICTURE_ROWS, mel.shape[1])
    cells = np.array(
        [[part.mean() for part in np.array_split(c.mean(0), rows)] for c in columns]
    ).T[::-1]
    low, high = np.percentile(cells, 5), np.percentile(cells, 99)
    scaled = np.clip((cells - low) / max(high - low, 1e-6), 0, 1) * (len(_SHADES) - 1)
    return "\n".join("".join(_SHADES[round(float(v))] for v in row) for row in scaled)
