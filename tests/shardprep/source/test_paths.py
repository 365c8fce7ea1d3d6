"""A path that means one file for certain is taken; any other is refused with its own reason."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep
from shardprep.source.dataset import scan_dataset
from shardprep.source.paths import Roots, key_of, relative_path
from shardprep.storage.remote import Remote

Sources = Callable[..., Path]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.pt", "a.pt"),
        ("./a.pt", "a.pt"),
        ("s//a.pt", "s/a.pt"),
        ("s/../a.pt", "a.pt"),
        ("s\\a.pt", "s/a.pt"),
        (".\\s\\a.pt", "s/a.pt"),
        ("/data/Dataset/s/a.pt", "s/a.pt"),
        ("/data/Dataset//a.pt", "a.pt"),
        ("/data/Dataset\\a.pt", "a.pt"),
    ],
)
def test_spellings_of_a_path_inside_are_one_path(path: str, expected: str) -> None:
    assert relative_path(path, Roots(Path("/data/Dataset"))) == expected


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/data/Dataset2/a.pt", "is absolute and leads outside"),
        ("/data/Dataset/../a.pt", "leads outside"),
        ("/a.pt", "is absolute"),
        ("//server/share/a.pt", "is absolute"),
        ("\\\\server\\share\\a.pt", "is absolute"),
        ("D:/a.pt", "is absolute"),
        ("s3://bucket/a.pt", "is absolute"),
        ("..", "leads outside"),
        ("../a.pt", "leads outside"),
        ("s\\..\\..\\a.pt", "leads outside"),
        ("a\tb.pt", "control character '\\t'; remove it, or write / if a backslash was meant"),
        ("a" * 301, "has 301 characters, expected at most 300"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused_with_their_reason(path: str, said: str) -> None:
    with pytest.raises(ValueError, match="^the path ") as error:
        relative_path(path, Roots(Path("/data/Dataset")))
    assert said in str(error.value)


def test_the_url_of_a_file_within_a_store_is_taken() -> None:
    roots = Roots(Remote("s3://bucket/Dataset"))
    assert relative_path("s3://bucket/Dataset/s/a.pt", roots) == "s/a.pt"
    with pytest.raises(ValueError, match="is absolute and leads outside"):
        relative_path("s3://bucket/other/a.pt", roots)


def test_a_folder_that_is_a_link_is_known_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to("real")
    roots = Roots(tmp_path / "name")
    for name in ("real", "name"):
        assert relative_path(str(tmp_path / name / "a.pt"), roots) == "a.pt"


def readable(shards: Path) -> dict[str, set[str]]:
    """The keys of a set's split train, by each of the readers that do not need this package."""
    import datasets
    import webdataset

    tars = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    found = webdataset.WebDataset(tars, shardshuffle=False)
    rows = datasets.load_dataset(
        "webdataset", data_files=tars, streaming=True, cache_dir=str(shards.parent / "cache")
    )
    return {
        "webdataset": {sample["__key__"] for sample in found},
        "datasets": {row["__key__"] for row in rows["train"]},
    }


# webdataset leaves it to the garbage collector to close its files.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("folder", ["id1/__Ab12xyz_0", "__Ab12", "v1.0/a.b", "a/__key__", "_"])
def test_readers_take_every_key_that_is_taken(
    source_of: Sources, tmp_path: Path, folder: str
) -> None:
    root = source_of({"ann": [3, 4, 5], "bob": [6, 7]})
    (root / folder).mkdir(parents=True)
    for path in root.glob("*.pt"):
        path.rename(root / folder / path.name)
    text = (root / "metadata.json").read_text()
    for speaker in ("ann", "bob"):
        text = text.replace(f'"{speaker}-', f'"{folder}/{speaker}-')
    (root / "metadata.json").write_text(text)
    options = shardprep.BuildOptions(workers=1, val_fraction=0)
    shardprep.build_shards(root, tmp_path / "shards", options)
    keys = set(map(str, shardprep.open_shards(tmp_path / "shards")["train"].keys))
    assert len(keys) == 5
    assert {key.rpartition("/")[0] for key in keys} == {folder}
    assert readable(tmp_path / "shards") == {"webdataset": keys, "datasets": keys}
    # A damaged index is made again from the tar, which checks the keys too.
    (tmp_path / "shards" / "split=train.index.npy").write_bytes(b"")
    assert shardprep.repair_shards(tmp_path / "shards").intact


@pytest.mark.parametrize(
    ("relative", "said"),
    [
        ("__a.pt", 'the file name begins with "__", and Hugging Face datasets skips'),
        ("s/__a.pt", 'the file name begins with "__"'),
        ("__a__/b.pt", "the folder __a__ begins and ends"),
        ("a.b.pt", "a dot before .pt, where readers of tar files cut it; rename it, .* a-b.pt$"),
        ("a.pth", "does not end in .pt but in .pth; rename"),
        ("a.Pt", "does not end in .pt but in .Pt; rename"),
        ("a.npz", "torch.from_numpy"),
        ("a.wav", "which is audio"),
        ("a", "the file name does not end in .pt$"),
    ],
)
def test_names_that_readers_do_not_take_are_refused_with_their_reason(
    relative: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        key_of(relative)


def respelled(root: Path, change: Callable[[str], str]) -> None:
    """Change the paths in the metadata, not the files."""
    content = json.loads((root / "metadata.json").read_text())
    for entries in content["speakers"].values():
        for entry in entries:
            entry["feature_path"] = change(entry["feature_path"])
    (root / "metadata.json").write_text(json.dumps(content))


def moved_into(root: Path, folder: str) -> None:
    (root / folder).mkdir()
    for path in root.glob("*.pt"):
        path.rename(root / folder / path.name)
    respelled(root, lambda path: f"{folder}/{path}")


SPELLINGS: dict[str, Callable[[Path], Callable[[str], str]]] = {
    "backslashes": lambda root: lambda path: path.replace("/", "\\"),
    "absolute": lambda root: lambda path: f"{root}/{path}",
    "absolute, with detours": lambda root: lambda path: f"{root}/./s/../{path}",
    "relative, with detours": lambda root: lambda path: f"./x/../{path}",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_set_does_not_show_how_its_paths_were_spelled(
    source_of: Sources,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, str]],
    name: str,
) -> None:
    root = source_of({"ann": [3, 4], "bob": [5, 6]})
    moved_into(root, "s")
    options = shardprep.BuildOptions(workers=1)
    shardprep.build_shards(root, tmp_path / "plain", options)
    respelled(root, SPELLINGS[name](root))
    shardprep.build_shards(root, tmp_path / "other", options)
    tars = {
        folder: {name: sha for name, sha in contents(tmp_path / folder).items() if "tar" in name}
        for folder in ("plain", "other")
    }
    assert tars["plain"] == tars["other"]
    assert tars["plain"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_the_other_form_of_unicode_is_found(
    source_of: Sources, tmp_path: Path, form: str
) -> None:
    root = source_of({"ann": [3, 4, 5], "bob": [6, 7]})
    on_disk = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "é")
    listed = unicodedata.normalize(form, "é")
    for path in root.glob("*.pt"):
        path.rename(root / path.name.replace("-", on_disk))
    respelled(root, lambda path: path.replace("-", listed))
    shards = tmp_path / "shards"
    shardprep.build_shards(root, shards, shardprep.BuildOptions(workers=1))
    keys = {str(key) for split in shardprep.open_shards(shards).values() for key in split.keys}
    assert len(keys) == 5
    assert all(listed in key for key in keys)
    assert shardprep.verify_shards(shards, deep=True, against=root).intact
    tar = shards / "train-000000.tar"
    before = tar.read_bytes()
    tar.write_bytes(before[:-20_000] + bytes(20_000))
    assert shardprep.repair_shards(shards, source=root).intact
    assert tar.read_bytes() == before


def test_a_name_that_has_backslashes_itself_is_found(source_of: Sources, tmp_path: Path) -> None:
    root = source_of({"ann": [3, 4]})
    for path in root.glob("*.pt"):
        path.rename(root / f"s\\{path.name}")
    respelled(root, lambda path: f"s\\{path}")
    found = scan_dataset(root)
    assert [u.key for u in found.labelled] == ["s/ann-000", "s/ann-001"]
    assert all(os.path.exists(root / u.path) for u in found.labelled)
    shardprep.build_shards(root, tmp_path / "shards", shardprep.BuildOptions(workers=1))
    assert shardprep.verify_shards(tmp_path / "shards", deep=True, against=root).intact


@pytest.mark.parametrize("path", ["a\\b/../../x.pt", "/etc\\x.pt", "..\\x.pt"])
def test_backslashes_open_no_way_out(source_of: Sources, path: str) -> None:
    root = source_of({"ann": [3, 4]})
    (root.parent / "x.pt").write_bytes(b"secret")
    respelled(root, lambda old: path)
    found = scan_dataset(root)
    assert not found.labelled
    assert all("outside" in r.reason or "not exist" in r.reason for r in found.rejects)


def test_two_spellings_of_one_file_are_one_file(source_of: Sources) -> None:
    root = source_of({"ann": [3], "bob": [4]})
    moved_into(root, "s")
    content = json.loads((root / "metadata.json").read_text())
    path = content["speakers"]["ann"][0]["feature_path"]
    content["speakers"]["bob"][0] = {"feature_path": path.replace("/", "\\"), "mel_len": 3}
    (root / "metadata.json").write_text(json.dumps(content))
    reasons = {reject.reason for reject in scan_dataset(root).rejects}
    assert reasons == {"the same file is listed 2 times: ann, bob"}
