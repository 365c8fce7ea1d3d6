"""Lists of rejects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from forge import sign

from kinds.registry import register


def rejects(name: str, sentence: str, **values: Any) -> None:
    """Register a set with a line of rejects.jsonl that has these values; all checksums fit."""
    register(name, sentence, lambda folder: write_rejects(folder, values))


def write_rejects(folder: Path, values: dict[str, Any]) -> None:
    line = {"file": "a.pt", "key": "a", "speaker": None, "split": "test", "reason": "it is gone"}
    data = json.dumps({**line, "entry": 0, "repeats": None, **values}).encode() + b"\n"
    (folder / "rejects.jsonl").write_bytes(data)
    info = {"file": "rejects.jsonl", "bytes": len(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    sign(folder, lambda content: content.update(rejects={**info, "sha256": sha256}))


rejects("rejects_entry_of_2_70", "a line of rejects.jsonl claims the entry 2^70", entry=2**70)
rejects("rejects_entry_negative", "a line of rejects.jsonl claims the entry -1", entry=-1)
rejects("rejects_repeats_of_2_70", "a line of rejects.jsonl repeats the entry 2^70", repeats=2**70)
