"""What a reader accepts of a shard set or a data set, whatever the files claim.

A size is checked before memory is taken for it, and compared with what is stored: a few bytes
cannot claim gigabytes. FORMAT.md lists the limits, SECURITY.md says what they are for.
"""

from __future__ import annotations

MAX_N_MELS = 4096
# With smaller chunks, seek tables would outgrow the mels; larger chunks take long to inflate.
MIN_CHUNK_FRAMES = 16
MAX_CHUNK_BYTES = 1 << 20
# A member's size is a uint32 of the index.
MAX_MEMBER_BYTES = 2**32 - 1
# Enough for a hundred thousand shards.
MAX_MANIFEST_BYTES = 16 << 20
MAX_MANIFEST_VALUES = 600_000
MAX_REJECTS_BYTES = 64 << 20
# Of metadata.json and the other JSON files of a data set: enough for 400,000 utterances, and so
# much more for every file that the data set has.
SMALL_JSON_BYTES, JSON_BYTES_A_FILE = 32 << 20, 512
SMALL_JSON_VALUES, JSON_VALUES_A_FILE = 1_200_000, 4
# In adopted tars: an extended header, and a .cls or .json member.
MAX_TAR_HEADER_BYTES = 1 << 20
MAX_FOREIGN_TEXT_BYTES = 1 << 20
# A matrix may have so many bytes in any case, or so many times the bytes that are stored of it.
SMALL_MATRIX_BYTES = 64 << 20
MAX_INFLATION = 64


def most_matrix_bytes(stored: int) -> int:
    """The most bytes of a matrix of which `stored` bytes are stored."""
    return max(SMALL_MATRIX_BYTES, MAX_INFLATION * stored)


def most_json_bytes(files: int) -> int:
    """The most bytes of a JSON file in a data set of so many files."""
    return SMALL_JSON_BYTES + JSON_BYTES_A_FILE * files


def json_fits(data: bytes, files: int) -> bool:
    """Whether a JSON file is no larger than a data set of so many files needs."""
    # Python keeps text that is not ASCII in two or four bytes a character.
    size = len(data) if data.isascii() else 2 * len(data)
    values = SMALL_JSON_VALUES + JSON_VALUES_A_FILE * files
    return size <= most_json_bytes(files) and json_values(data) <= values


def json_values(data: bytes) -> int:
    """An upper bound of the number of values in a JSON text; each takes up to 100 bytes."""
    return 1 + data.count(b",") + data.count(b"[") + data.count(b"{")
