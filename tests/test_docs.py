"""What the documents say is so: examples of the format, links, paths, fields and words."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import shardprep
from shardprep.format.index import index_dtype
from shardprep.format.manifest import Reject, decode_manifest
from shardprep.format.quantised import scale_of
from shardprep_trainer.config.fields import Config, flatten

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}
FORMAT, HOMEWORK = PAGES["FORMAT.md"], PAGES["docs/homework.md"]
HOME = "https://github.com/shardprep/shardprep/blob/main/"
RAW = "https://raw.githubusercontent.com/shardprep/shardprep/main/"
FIELDS = set(flatten(Config().to_dict()))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_format_shows_a_manifest_that_readers_accept() -> None:
    manifest, _, reject = code_blocks(FORMAT, "json")
    assert decode_manifest(manifest.encode(), Path("FORMAT.md")).splits["test"].samples == 2
    assert msgspec.json.decode(reject, type=Reject, strict=True).reason


def test_format_shows_the_features_of_recordings_as_they_are() -> None:
    _, features, _ = code_blocks(FORMAT, "json")
    assert json.loads(features) == shardprep.FeatureRecipe().to_features()


def test_format_shows_the_index_row_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([<|]?\w+)` \| (\S+) \|", FORMAT, re.MULTILINE)
    plain, scaled = index_dtype(37), index_dtype(37, quantised=True)
    names = [*plain.names, *(name for name in scaled.names if name not in plain.names)]
    expected = [(name, scaled[name].str.lstrip("|")) for name in names]
    assert [(name, kind) for name, kind, _ in rows] == expected
    assert scaled.names == (*plain.names[:-1], *names[-2:], "key")
    shown = {name: value for name, _, value in rows}
    assert int(shown["nbytes"]) == 128 + int(shown["frames"]) * 40 * 2
    assert f"{128 + int(shown['frames']) * 40} `nbytes`" in FORMAT
    (about,) = re.findall(r'^    (\{"frames".*\})$', FORMAT, re.MULTILINE)
    scale = scale_of(json.loads(about))
    assert [str(np.float32(value)) for value in scale] == [shown["minimum"], shown["step"]]
    assert scale._asdict().items() <= json.loads(about).items()


def test_a_data_set_with_the_json_files_of_the_homework_page_builds(tmp_path: Path) -> None:
    names = ("metadata.json", "mapping.json", "testdata.json")
    texts = dict(zip(names, code_blocks(HOMEWORK, "json"), strict=True))
    source = tmp_path / "Dataset"
    source.mkdir()
    for name, text in texts.items():
        (source / name).write_text(text)
    metadata, _, testdata = map(json.loads, texts.values())
    labelled = [row for rows in metadata["speakers"].values() for row in rows]
    for row in (*labelled, *testdata["utterances"]):
        torch.save(torch.zeros(row["mel_len"], 40), source / row["feature_path"])
    report = shardprep.build_shards(source, tmp_path / "shards")
    assert not report.rejects
    shard_set = shardprep.open_shards(tmp_path / "shards")
    assert list(shard_set.manifest.speakers) == list(metadata["speakers"])
    keys = shard_set["test"].keys
    assert [f"{key}.pt" for key in keys] == [r["feature_path"] for r in testdata["utterances"]]


def test_the_program_of_the_homework_page_corrects_names_and_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program,) = (text for text in code_blocks(HOMEWORK, "python") if "Dataset-corrected" in text)
    monkeypatch.chdir(tmp_path)
    source = Path("Dataset")
    names = ["a.b.pt", "s/__c.pt", "s/é.PT", f"{'d' * 90}.pt"]
    speakers: dict[str, list[dict[str, object]]] = {"ann": [], "bob": []}
    for number, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.randn(5 + number, 4), source / name)
        speakers["ann" if number % 2 else "bob"].append({"feature_path": name, "mel_len": 3})
    (source / "metadata.json").write_text(json.dumps({"n_mels": 4, "speakers": speakers}))
    options = shardprep.BuildOptions(workers=1, val_fraction=0)
    with pytest.raises(shardprep.SourceError):
        shardprep.build_shards(source, "shards", options)
    exec(compile(program, "homework.md", "exec"), {})
    report = shardprep.build_shards("Dataset-corrected", "shards", options)
    assert (report.splits["train"].samples, report.splits["train"].frames) == (4, 5 + 6 + 7 + 8)
    assert len(list(source.rglob("*.[pP][tT]"))) == 4


def anchors(text: str) -> set[str]:
    """The names by which headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_there_are(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        path, _, anchor = target.partition("#")
        if path.startswith((HOME, RAW)):
            path = path.removeprefix(HOME).removeprefix(RAW)
            found = ROOT / path
        elif path.startswith("https://"):
            continue
        else:
            found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor and "://" not in anchor:
            text = PAGES[found.resolve().relative_to(ROOT).as_posix()]
            assert anchor in anchors(text), f"{page}: {target}"


def test_readme_has_no_link_that_fails_on_pypi() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES["README.md"])
    assert targets
    assert all(target.startswith("https://") for target in targets)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", PAGES["README.md"])
    assert all(picture.startswith(RAW) for picture in pictures)


def test_readme_is_short_and_every_page_is_in_the_index() -> None:
    assert len(PAGES["README.md"].split()) <= 1_200
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/README.md"]))
    assert linked == pages - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_modules_that_a_page_names_exist(page: str) -> None:
    for code in re.findall(r"`([^`\s]+)`", prose(PAGES[page])):
        name = code.split("::")[0].rstrip("/")
        if re.fullmatch(r"(shardprep|trainer|scripts|tests|docs)(/[\w.-]+)+", name):
            assert (ROOT / name).exists(), f"{page}: {code}"
        elif re.fullmatch(r"(shardprep|shardprep_trainer|scripts)(\.\w+)+", name):
            assert _is_there(name), f"{page}: {code}"
        elif re.fullmatch(r"[\w/-]+\.(py|sh)", name):
            assert list(ROOT.glob(f"[!.]*/**/{name}")), f"{page}: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_names_in_files_are_in_these_files(page: str) -> None:
    for name, path in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", PAGES[page]):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{page}: {name} in {path}"


def _is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module has."""
    parts = name.split(".")
    if parts[0] == "shardprep" and parts[1] in shardprep.__all__:
        return True
    for length in range(len(parts), 0, -1):
        place = Path(*parts[:length])
        for root in (ROOT, ROOT / "trainer"):
            file = root / place.with_suffix(".py")
            folder = root / place / "__init__.py"
            if file.is_file() or (root / place).is_dir():
                if length == len(parts):
                    return True
                text = (file if file.is_file() else folder).read_text()
                return bool(re.search(rf"\b{parts[length]}\b", text))
    return False


@pytest.mark.parametrize("page", PAGES)
def test_fields_that_a_page_names_exist(page: str) -> None:
    parts = "|".join(sorted({field.split(".")[0] for field in FIELDS if "." in field}))
    text = re.sub(r"runs/\S+|trainer/train\.py|shardprep_trainer\.\w+", "", PAGES[page])
    named = set(re.findall(rf"(?<![\w./`-])(?:`|--)({parts})\.(\w+)", text))
    assert {".".join(name) for name in named} <= FIELDS | {"train.py", "model.safetensors"}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_one_thing_has_one_name_on_every_page(page: str) -> None:
    banned = r"\b(crops?|cropped|course's|hears?|heard|bears?|let go|rungs?)\b"
    text = re.sub(r"^\|.*$|^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(banned, re.sub(r"`[^`]*`", "", text), re.IGNORECASE)


def test_multinode_names_only_variables_that_there_are() -> None:
    sources = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "shardprep").rglob("*.py")]
    ours = "".join(path.read_text() for path in sources)
    text = PAGES["docs/multinode.md"]
    assert {"data.global_batch", "data.lanes", "train.hang_seconds"} <= set(
        re.findall(r"\b(?:data|train)\.\w+", text)
    )
    for name in re.findall(r"\bSHARDPREP_\w+|\bTORCH_DISABLE\w+", text):
        assert name in ours
    for code in re.findall(r"python -c \"(.*?)\"`", text):
        compile(code, "docs/multinode.md", "exec")


def test_no_table_is_missing() -> None:
    assert not [page for page, text in PAGES.items() if "@@" in text]


def test_the_tree_of_the_architecture_page_lists_every_module_and_no_other() -> None:
    (tree,) = re.findall(
        r"^## The tree\n+```\n(.*?)^```", PAGES["docs/architecture.md"], re.M | re.S
    )
    listed, above = set(), Path()
    for line in filter(None, tree.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above = Path(*above.parts[:depth], name)
        assert (ROOT / above).exists(), above
        if name.endswith(".py"):
            listed.add(above)
    packages = [ROOT / "shardprep", ROOT / "trainer"]
    modules = {path.relative_to(ROOT) for package in packages for path in package.rglob("*.py")}
    inits = {path for path in modules if path.name == "__init__.py"} - {
        Path("shardprep/__init__.py")
    }
    assert listed == modules - inits


def test_the_picture_of_the_layers_is_that_of_the_test_of_the_layers() -> None:
    picture = importlib.import_module("scripts.layers_picture")
    assert picture.PICTURE.read_text() == picture.draw(picture.layers())
