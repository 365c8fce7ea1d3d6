"""Each checkout is measured with its own code, wherever the script is called from."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench import checkouts


def test_the_loader_of_the_other_checkout_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "other" / "shardprep"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def open_shards(path): return {'train': path}\n"
        "def SegmentLoader(split, **options): return [{'label': [split] * 1_000_000}]\n"
    )
    (tmp_path / "shards").mkdir()
    # As `python -m scripts.bench.checkouts` is called: from the folder of this checkout.
    monkeypatch.chdir(checkouts.HERE)
    assert checkouts.loader_rate(tmp_path / "other", tmp_path / "shards", 0.01) > 1e7
