"""What a `.pt` file is that holds no tensor of `torch.save`, in words for `Reject.reason`."""

from __future__ import annotations

from shardprep.source.pt.zip import ZIP_MAGIC, record_names
from shardprep.storage.sniff import sniff

# The last record of a zip file.
_END_MARK, _END_BYTES = b"PK\5\6", 22
# So often chance does not make a mark of text in a binary file.
_ENOUGH = 5
AGAIN = "copy or download it again"
_SAVE = {
    "npy": "torch.save(torch.from_numpy(numpy.load(FILE)), FILE)",
    "audio": "save its log-mels (mel_len, n_mels) as a tensor",
    "safetensors": "torch.save(safetensors.torch.load_file(FILE)[NAME], FILE)",
}
_SAVE_TENSOR = "save a tensor (mel_len, n_mels) with torch.save"


def what_else(data: bytes) -> str | None:
    """What a file is that cannot be read as a tensor; None for a pickle or an unknown content.

    Args:
        data: The bytes of the whole file.
    """
    if data and ZIP_MAGIC.startswith(data):
        return ends_early(data)
    found = sniff(data)
    if found is None:
        return None
    if found.kind == "zip":
        return _what_zip(data)
    if found.kind == "pickle":
        return None
    if found.kind in ("empty", "zeros", "pointer", "page", "cut", "packed"):
        return found.what
    return f"{found.what}, not a tensor; {_SAVE.get(found.kind, _SAVE_TENSOR)}"


def _was_text(data: bytes) -> bool:
    """Whether line ends or characters were converted, as FTP, Git and editors do."""
    ends = data.count(b"\n")
    if ends >= _ENOUGH and ends == data.count(b"\r\n"):
        return True
    return data.count("\ufffd".encode()) >= _ENOUGH or (not data.isascii() and _is_utf8(data))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def ends_early(data: bytes) -> str:
    """What is wrong with a file whose end is missing."""
    return f"ends early, after {len(data)} bytes, as after an aborted download; {AGAIN}"


def _what_zip(data: bytes) -> str | None:
    if _was_text(data):
        return (
            "was transferred as text, which changes its bytes; transfer it as binary (Git: "
            "`*.pt binary` in .gitattributes)"
        )
    try:
        names = record_names(data)
    except ValueError:
        end = data.rfind(_END_MARK)
        more = len(data) - _END_BYTES - end
        if end < 0 or more < 0:
            return ends_early(data)
        return f"goes on for {more} bytes after its end; {AGAIN}" if more else None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "is a TorchScript program, not a tensor; " + _SAVE_TENSOR
    if "data.pkl" in inner:
        return None
    if arrays := [name for name in names if name.endswith(".npy")]:
        name = ascii(arrays[0].removesuffix(".npy")[:40])
        remedy = f"torch.save(torch.from_numpy(numpy.load(FILE)[{name}]), FILE)"
        return f"is a NumPy archive (.npz), not a tensor; {remedy}"
    shown = f" of {len(names)} files, such as {ascii(names[0][:60])}" if names else ""
    return f"is a zip archive{shown}, not a tensor; unpack it"
