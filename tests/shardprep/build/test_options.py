"""Bad combinations of options are refused at once; the record holds what decides the bytes."""

from __future__ import annotations

from typing import Any

import pytest

from shardprep import BuildError, BuildOptions
from shardprep.format.manifest import BuildRecord, CodecInfo


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float64"),
        ("codec", "gzip"),
        ("on_error", "ignore"),
        ("level", 0),
        ("level", 23),
        ("samples_per_shard", 0),
        ("val_fraction", -0.01),
        ("val_fraction", 1.0),
        ("val_fraction", float("nan")),
        ("workers", -1),
        ("workers", "2"),
        ("samples_per_shard", 2.5),
        ("seed", 1.5),
        ("val_fraction", "a tenth"),
        ("engine", "spark"),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(BuildError, match=field) as caught:
        BuildOptions(**{field: value})
    assert caught.value.key == field
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"level": 3}, "level: is for the codec zstd only"),
        ({"level": 23, "codec": "zstd"}, "level: is 23, expected 1 to 22"),
        ({"val_fraction": 1.0}, "val_fraction: is 1.0, expected 0 or more, and less than 1"),
        ({"address": "auto"}, "address: is for the engine ray only"),
    ],
)
def test_a_refusal_says_what_is_expected(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BuildError, match=said):
        BuildOptions(**values)


def test_the_manifest_does_not_say_where_a_build_ran() -> None:
    one = BuildOptions(workers=1)
    two = BuildOptions(workers=2, overwrite=True, engine="ray", address="auto")
    assert (one.record, one.codec_info) == (two.record, two.codec_info)


def test_an_address_without_its_engine_is_refused() -> None:
    with pytest.raises(BuildError, match="engine ray only") as caught:
        BuildOptions(address="auto")
    assert caught.value.key == "address"


def test_record_and_codec_are_those_chosen() -> None:
    options = BuildOptions(
        codec="zstd", level=7, seed=5, val_fraction=0.25, samples_per_shard=9, on_error="skip"
    )
    assert options.record == BuildRecord(5, 0.25, 9, "skip")
    assert options.codec_info == CodecInfo("zstd", 7, 64)
    assert BuildOptions(codec="zstd").codec_info == CodecInfo("zstd", 3, 64)
    assert BuildOptions().codec_info == CodecInfo("none")


def test_a_level_without_its_codec_is_refused() -> None:
    with pytest.raises(BuildError, match="level"):
        BuildOptions(level=7)
