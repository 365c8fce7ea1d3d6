"""The lowest versions that are tried."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from scripts.lowest.__main__ import CHECKOUT, EXTRAS, lowest_versions


def project(dependencies: list[str], **extras: list[str]) -> dict[str, Any]:
    others = {name: extras.get(name, []) for name in EXTRAS}
    return {"name": "own", "dependencies": dependencies, "optional-dependencies": others}


def test_lowest_is_the_lower_bound_and_torch_is_that_of_the_constraints() -> None:
    table = project(
        ["numpy>=1.26,<3"], torch=["torch>=2.9"], http=["own[torch]", "fsspec[http]>=2024.6"]
    )
    pins = lowest_versions(table, "# Why\nnumpy==2.4.6\ntorch==2.13.0\ntorchvision==0.28.0\n")
    assert pins == ["torch==2.13.0", "numpy==1.26", "fsspec==2024.6"]


def test_dependency_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        lowest_versions(project(["numpy<3"]), "")


def test_every_dependency_of_this_project_has_a_lower_bound() -> None:
    table = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    pins = lowest_versions(table, (CHECKOUT / "constraints.txt").read_text())
    assert len(pins) > 15
