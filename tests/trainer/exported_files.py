"""Run an exported file as a stranger would, without a line of ours, and utterances to run it on."""

from __future__ import annotations

import io

import onnxruntime
import torch
from torch import Tensor


def run_file(form: str, data: bytes, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What a stranger would write to run the file, without a line of ours."""
    if form == "torchscript":
        module = torch.jit.load(io.BytesIO(data))
        with torch.no_grad():
            embedding, logits = module(mel, lengths)
        return embedding, logits
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    outputs = session.run(["embedding", "logits"], {"mel": mel.numpy(), "lengths": lengths.numpy()})
    return torch.from_numpy(outputs[0]), torch.from_numpy(outputs[1])


def utterances(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, 40, generator=generator) * 3 - 8 for length in lengths]


def padded(parts: list[Tensor], extra: int = 0, value: float = -20.0) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(part) for part in parts])
    mel = torch.full((len(parts), int(lengths.max()) + extra, 40), value)
    for row, part in zip(mel, parts, strict=True):
        row[: len(part)] = part
    return mel, lengths
