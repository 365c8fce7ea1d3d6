"""Other programs read every key, label and matrix of a set, by the code of docs/readers.md."""

from __future__ import annotations

import re

import pytest

from tests.readers.conftest import KINDS, Read
from tests.readers.read_page import DATASETS, PAGE, UINT8, blocks, widening

SECTIONS = [
    section.splitlines()[0]
    for section in PAGE.read_text().split("\n## ")[1:]
    if "```python" in section
]
ROWS = dict(re.findall(r"^\| \[([^]]+)\]\(#[\w-]+\) \| (\d+) \|", PAGE.read_text(), re.MULTILINE))


@pytest.mark.readers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("section", SECTIONS)
def test_the_code_of_the_page_reads_all(section: str, kind: str, read: Read) -> None:
    read("all", kind, "read_page.py", section)


@pytest.mark.readers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("environment", "release"), [("all", "5"), ("datasets-4.8.5", "4"), ("datasets-3.6.0", "3")]
)
def test_datasets_loads_all_splits_by_every_call(
    environment: str, release: str, kind: str, read: Read
) -> None:
    read(environment, kind, "load_dataset.py", release)


def test_the_page_widens_uint8_in_every_section_that_reads_stored_bytes() -> None:
    named = {name for name, _, _ in UINT8}
    assert named == {name for name in SECTIONS if "decode_npy" in blocks(name, "python")[0]} | {
        DATASETS
    }
    for name in named:
        (code, *_) = blocks(name, "python")
        widened = widening(name, code)
        assert widened != code
        compile(widened, name, "exec")
    assert widening("lhotse", blocks("lhotse", "python")[0]) == blocks("lhotse", "python")[0]


def test_the_table_counts_the_lines_of_code_of_every_section() -> None:
    lines = {
        section: sum(bool(line.strip()) for line in "".join(code[:1]).splitlines())
        for section in SECTIONS
        for code in [blocks(section, "python")]
    }
    assert {section: int(count) for section, count in ROWS.items()} == lines
