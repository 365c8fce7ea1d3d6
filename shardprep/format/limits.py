"""What a reader accepts of a shard set or a data set, whatever the files claim.

Sizes are checked before memory is taken for them, and against what is stored: a few bytes cannot
ask for gigabytes. FORMAT.md lists the limits, SECURITY.md says what they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

MAX_N_MELS = 4096
# Chunks that are neither so small that seek tables outgrow the mels, nor large to inflate.
MIN_CHUNK_FRAMES = 16
MAX_CHUNK_BYTES = 1 << 20
# A member's size is a uint32 of the index.
MAX_MEMBER_BYTES = 2**32 - 1
# Enough for a hundred thousand shards.
MAX_MANIFEST_BYTES = 16 << 20
MAX_MANIFEST_VALUES = 600_000
MAX_REJECTS_BYTES = 64 << 20
# Of metadata.json and the others of a data set, enough for four hundred thousand utterances; and
# what they may have more for every file that is there.
SMALL_JSON_BYTES, JSON_BYTES_A_FILE = 32 << 20, 512
SMALL_JSON_VALUES, JSON_VALUES_A_FILE = 1_200_000, 4
# A matrix may be so large whatever is stored of it, and otherwise so many times what is stored.
SMALL_MATRIX_BYTES = 64 << 20
MAX_INFLATION = 64


def most_matrix_bytes(stored: int) -> int:
    """The most bytes of a matrix of which `stored` bytes are stored."""
    return max(SMALL_MATRIX_BYTES, MAX_INFLATION * stored)


def most_json_bytes(files: int) -> int:
    """The most bytes of a JSON file of a data set that has so many files."""
    return SMALL_JSON_BYTES + JSON_BYTES_A_FILE * files


def json_fits(data: bytes, files: int) -> bool:
    """Whether the JSON of a data set of so many files is no more than they account for."""
    # Python keeps text that is not ASCII in two bytes a character or four.
    size = len(data) if data.isascii() else 2 * len(data)
    values = SMALL_JSON_VALUES + JSON_VALUES_A_FILE * files
    return size <= most_json_bytes(files) and json_values(data) <= values


def json_values(data: bytes) -> int:
    """At least as many values as a JSON text holds; each takes up to a hundred bytes of memory."""
    return 1 + data.count(b",") + data.count(b"[") + data.count(b"{")
