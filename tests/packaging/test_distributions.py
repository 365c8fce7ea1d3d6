"""What the wheel and the sdist hold, and what they say of themselves."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest

import shardprep

Distribution = Callable[[str], Path]

INFO = f"shardprep-{shardprep.__version__}.dist-info"


@pytest.fixture
def wheel(distribution: Distribution) -> zipfile.ZipFile:
    return zipfile.ZipFile(distribution("wheel"))


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_string(wheel.read(f"{INFO}/METADATA").decode())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile, checkout: Path) -> None:
    ours = files(checkout / "shardprep") | {"py.typed"}
    trainers = files(checkout / "trainer" / "shardprep_trainer") | {"py.typed"}
    packed = {name for name in wheel.namelist() if not name.startswith(f"{INFO}/")}
    assert packed == {
        *(f"shardprep/{name}" for name in ours),
        *(f"shardprep_trainer/{name}" for name in trainers),
    }
    assert "shardprep_trainer/recipes/best.yaml" in packed
    about = {name.partition("/")[2] for name in wheel.namelist()} & {"licenses/LICENSE", "RECORD"}
    assert about == {"licenses/LICENSE", "RECORD"}


def test_wheel_announces_its_commands(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"{INFO}/entry_points.txt").decode()
    assert "shardprep = shardprep.cli:main" in text
    group = text.partition("[shardprep.commands]\n")[2].partition("\n\n")[0]
    names = [line.split(" = ")[0] for line in group.strip().splitlines()]
    expected = ["compare", "embed", "export", "identify", "predict", "score", "train"]
    assert sorted(names) == expected


def test_without_extras_the_wheel_asks_for_a_few_small_packages(metadata: Message) -> None:
    wanted = metadata.get_all("Requires-Dist", [])
    core = {re.match(r"[\w-]+", line)[0] for line in wanted if "extra ==" not in line}  # type: ignore[index]
    assert core == {
        *("braceexpand", "click", "fsspec", "lazy-loader", "msgspec", "numpy", "tenacity"),
        *("tqdm", "webdataset", "zstandard"),
    }
    assert {"torch", "train"} <= set(metadata.get_all("Provides-Extra", []))


def test_metadata_leads_to_the_project(metadata: Message, checkout: Path) -> None:
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= set(links)
    assert all(link.startswith("https://") for link in links.values())
    assert metadata["Author"]
    assert metadata.get_payload() == (checkout / "README.md").read_text()
    assert metadata["License-Expression"] == "MIT"


def test_sdist_holds_the_whole_repository(distribution: Distribution, checkout: Path) -> None:
    with tarfile.open(distribution("sdist")) as archive:
        packed = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    made = {name for name in packed if name.startswith("shardprep.egg-info/")}
    assert packed - made - {"PKG-INFO", "setup.cfg"} == files(checkout)
