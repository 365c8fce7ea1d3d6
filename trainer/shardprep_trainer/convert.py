"""Convert a model to an ONNX or TorchScript file, and check the file against the model.

The file maps `mel` (B, T, F) float32 and `lengths` (B,) int64 to `embedding` (B, E) and `logits`
(B, S), for any B and T. Axis legend: B batch, T frames, F mel bins, E embedding width, S speakers.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardprep_trainer.errors import ExportError, TrainerError
from shardprep_trainer.model.model import SpeakerNetwork
from shardprep_trainer.model.traceable import Traceable

# The newest version that PyTorch writes without a conversion; older runtimes read it too.
OPSET = 18
# An ONNX file is a protobuf message, at most 2 GiB; leave some space for the graph.
ONNX_LIMIT = 2**31 - 2**24
TOLERANCE = 1e-4
INPUTS, OUTPUTS = ("mel", "lengths"), ("embedding", "logits")

# (T, lengths): a single frame, a segment, padding in every utterance or in some, and utterances
# longer than the table of relative positions (-512..512).
PARITY_CASES = (
    (1, (1,)),
    (128, (128, 128)),
    (128, (128, 100, 2, 1)),
    (60, (50, 7)),
    (1100, (1100,)),
    (1300, (1300, 400)),
)
# Unlike all of these, so that the check notices if tracing made a size a constant.
TRACED_CASE = (48, (48, 20, 5))

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def to_onnx(model: SpeakerNetwork, metadata: dict[str, str]) -> bytes:
    """The model as an ONNX file of opset 18, weights inside.

    Args:
        model: On the CPU, float32.
        metadata: For its `metadata_props`, see `shardprep_trainer.export.describe`.

    Raises:
        ExportError: A package is missing, or the weights exceed what one ONNX file can hold.
    """
    onnx = require("onnx", "onnxscript")[0]
    size = sum(weight.nbytes for weight in model.state_dict().values())
    if size > ONNX_LIMIT:
        raise ExportError(
            f"the weights take {size:,} bytes, but one ONNX file holds {ONNX_LIMIT:,}; take "
            "--format torchscript"
        )
    batch, frames = torch.export.Dim("B", min=1), torch.export.Dim("T", min=1)
    with _quiet():
        program = torch.onnx.export(
            Traceable(model),
            example(int(metadata["n_mels"]), *TRACED_CASE),
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamo=True,
            dynamic_shapes=({0: batch, 1: frames}, {0: batch}),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto  # once: each access makes a new one
    graph = proto.graph
    # PyTorch adds stack traces, with paths of this machine, to all parts.
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, metadata)
    data: bytes = proto.SerializeToString()
    return data


def to_torchscript(model: SpeakerNetwork, metadata: dict[str, str]) -> bytes:
    """The model as a TorchScript file for the CPU; `metadata` are its extra files."""
    file = io.BytesIO()
    with _quiet(), torch.no_grad():
        # Its own check uses the traced sizes only; `check_parity` uses others.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            Traceable(model), example(int(metadata["n_mels"]), *TRACED_CASE), check_trace=False
        )
        torch.jit.save(traced, file, _extra_files=metadata)
    return file.getvalue()


def open_onnx(data: bytes) -> Run:
    """A function that runs an ONNX file with onnxruntime on the CPU.

    Raises:
        ExportError: onnxruntime is missing.
    """
    (runtime,) = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        feed = dict(zip(INPUTS, (mel.numpy(), lengths.numpy()), strict=True))
        embedding, logits = session.run(list(OUTPUTS), feed)
        return torch.from_numpy(embedding), torch.from_numpy(logits)

    return run


def open_torchscript(data: bytes) -> Run:
    """A function that runs a TorchScript file on the CPU."""
    with _quiet():
        module = torch.jit.load(io.BytesIO(data), "cpu")  # type: ignore[no-untyped-call]

    def run(mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            embedding, logits = module(mel, lengths)
        return embedding, logits

    return run


FORMATS = {"onnx": (to_onnx, open_onnx), "torchscript": (to_torchscript, open_torchscript)}


def example(n_mels: int, frames: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Seeded log-mels (B, T, F) with NaN for padding, and their lengths (B,)."""
    generator = torch.Generator().manual_seed(frames)
    shape = (len(lengths), frames, n_mels)
    mel, valid = torch.randn(shape, generator=generator) * 3 - 8, torch.tensor(lengths)
    mel[torch.arange(frames) >= valid.unsqueeze(1)] = torch.nan
    return mel, valid


def check_parity(model: SpeakerNetwork, run: Run, n_mels: int) -> float:
    """Compare an exported file with its model in eval mode, at PARITY_CASES.

    Returns:
        The largest deviation of an embedding or a logit, relative to the largest value of the
        output if that exceeds 1.

    Raises:
        ExportError: The deviation exceeds TOLERANCE; the message says in which output and case.
    """
    worst, what = 0.0, ""
    for frames, lengths in PARITY_CASES:
        mel, valid = example(n_mels, frames, lengths)
        with torch.inference_mode():
            expected = model.embed(mel, valid), model(mel, valid)
        for name, ours, theirs in zip(OUTPUTS, expected, run(mel, valid), strict=True):
            deviation = _deviation(ours, theirs)
            if deviation > worst:
                worst, what = deviation, f"{name} of {len(lengths)} x {frames} frames"
    if worst > TOLERANCE:
        raise ExportError(
            f"the exported file deviates from the model by up to {worst:.3g}, in {what}; allowed "
            f"are {TOLERANCE:g}, so nothing was written. Take another --format or --checkpoint"
        )
    return worst


def _deviation(expected: Tensor, found: Tensor) -> float:
    """See `check_parity`; infinity if a value is not finite or the shapes differ."""
    if expected.shape != found.shape:
        return math.inf
    apart = (expected - found).detach().abs().max()
    deviation = float(apart / expected.detach().abs().max().clamp(min=1))
    return math.inf if math.isnan(deviation) else deviation


def export_model(model: SpeakerNetwork, form: str, metadata: dict[str, str]) -> tuple[bytes, float]:
    """Export a model and check the result against it.

    Args:
        model: In eval mode, on the CPU, float32; it is not changed.
        form: One of FORMATS.
        metadata: See `shardprep_trainer.export.describe`.

    Returns:
        The bytes of the file, and its deviation from the model; see `check_parity`.

    Raises:
        ExportError: The model cannot be exported, or the file gives other results.
    """
    convert, reopen = FORMATS[form]
    try:
        data = convert(model, metadata)
        return data, check_parity(model, reopen(data), int(metadata["n_mels"]))
    except TrainerError:
        raise
    # PyTorch's exporters and both runtimes raise exceptions of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(
            f"the model cannot be exported as {form} ({reason}), so nothing was written; take "
            "another --format"
        ) from error


def require(*names: str) -> list[Any]:
    """Import packages that only an export needs."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ExportError(
            f"ONNX files need a package that is missing ({error}); pip install 'shardprep[export]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide PyTorch's warnings about its own code during an export."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            yield
    finally:
        log.setLevel(level)
