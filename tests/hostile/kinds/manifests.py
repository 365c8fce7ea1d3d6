"""Manifests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import (
    holes,
    pipe,
    sign,
)

from kinds.registry import GB, Canary, kind, register


@kind("plain")
def manifest_of_10_gb(folder: Path) -> None:
    """manifest.json is 10 GB long"""
    holes(folder / "manifest.json", 10 * GB)


@kind("plain")
def manifest_of_many_values(folder: Path) -> None:
    """manifest.json is a list of five million values"""
    (folder / "manifest.json").write_bytes(b'{"speakers":[' + b'"",' * 5_000_000 + b'""]}')


@kind("plain")
def manifest_nested(folder: Path) -> None:
    """manifest.json nests lists 200,000 deep"""
    text = (folder / "manifest.json").read_text()
    nested = "[" * 200_000 + "]" * 200_000
    (folder / "manifest.json").write_text(text.replace('"speakers": [', f'"speakers": [{nested},'))


@kind("plain")
def manifest_number_of_5000_digits(folder: Path) -> None:
    """manifest.json has a number of 5,000 digits"""
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"seed": 0', '"seed": ' + "9" * 5000))


@kind("plain")
def manifest_pickle(folder: Path) -> None:
    """manifest.json is a pickle that runs a command"""
    (folder / "manifest.json").write_bytes(pickle.dumps(Canary()))


@kind("plain")
def manifest_pipe(folder: Path) -> None:
    """manifest.json is a named pipe that nobody writes to"""
    pipe(folder / "manifest.json")


@kind("plain")
def manifest_device(folder: Path) -> None:
    """manifest.json leads to a device that never ends"""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")


def forged(name: str, sentence: str, edit: Callable[[Any], None], entry: str = "plain") -> None:
    """Register a manifest that `edit` has changed, with the right fingerprint."""
    register(name, sentence, lambda folder: sign(folder, edit), entry)


def shard(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["splits"]["test"]["shards"][0].update(values)


def train(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["splits"]["train"].update(values)


forged(
    "manifest_samples_of_2_63", "the manifest claims 2^63 - 1 utterances", train(samples=2**63 - 1)
)
forged("manifest_bytes_of_2_62", "the manifest claims a shard of 2^62 bytes", shard(bytes=2**62))
forged("manifest_negative_size", "the manifest claims a shard of -1 bytes", shard(bytes=-1))
forged(
    "manifest_shard_outside",
    "the manifest names ../outside/secret as a shard",
    shard(file="../outside/secret"),
)
forged(
    "manifest_absolute_shard",
    "the manifest names /etc/passwd as a shard",
    shard(file="/etc/passwd"),
)
forged(
    "manifest_shard_with_nul",
    "the manifest names a shard with a zero byte",
    shard(file="test-000000.tar\0"),
)
forged(
    "manifest_shard_is_a_command",
    "the manifest names `pipe:touch canary` as a shard",
    shard(file="pipe:touch canary"),
)
forged(
    "manifest_wide",
    "the manifest claims a billion mel bins",
    lambda content: content.update(n_mels=10**9),
)
forged(
    "manifest_shard_twice",
    "the manifest lists one shard twice",
    lambda content: content["splits"]["test"]["shards"].append(
        content["splits"]["test"]["shards"][0]
    ),
)
forged(
    "manifest_split_of_odd_name",
    "the manifest has a split whose name moves the cursor of a terminal",
    lambda content: content["splits"].update({"\x1b[2J": content["splits"].pop("test")}),
)
forged(
    "manifest_chunks_of_no_size",
    "the manifest has codec zstd without chunk_frames",
    lambda content: content["codec"].pop("chunk_frames"),
    "zstd",
)
forged(
    "manifest_huge_chunks",
    "the manifest has chunks of two billion frames",
    lambda content: content["codec"].update(chunk_frames=2**31),
    "zstd",
)
