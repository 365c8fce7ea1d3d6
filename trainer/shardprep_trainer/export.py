"""Write a model as ONNX or TorchScript: `shardprep export RUN --out model.onnx`.

The file carries what its inputs and outputs mean (see `describe`). It is written only after it gave
the same results as the model itself (see `convert`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from shardprep import publish
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.state import Checkpoint
from shardprep_trainer.checkpoint.weights import load_model
from shardprep_trainer.commands import encoder_option, reported_errors
from shardprep_trainer.convert import FORMATS, export_model, require
from shardprep_trainer.errors import ConfigError

FORMAT_VERSION = 1
SUFFIXES = {".onnx": "onnx", ".pt": "torchscript"}


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What an exported file says about itself, as text.

    Returns:
        format_version; speakers, a JSON list in the order of the logits; n_mels; pad_value, which
        filled short segments in training [log-mel]; step, after which the weights were saved;
        features, a JSON object with the recipe of the log-mels, or null; dtype, to which they are
        rounded before the model gets them; longest_frames, beyond which utterances are embedded in
        pieces; thresholds and calibration, JSON objects of cosines, or null.
    """
    decision = {"thresholds": checkpoint.thresholds, "calibration": checkpoint.calibration}
    return {
        "format_version": str(FORMAT_VERSION),
        "speakers": json.dumps(checkpoint.speakers, ensure_ascii=False),
        "n_mels": str(checkpoint.n_mels),
        "pad_value": str(checkpoint.config.data.pad_value),
        "step": str(checkpoint.step),
        "features": json.dumps(checkpoint.features),
        "dtype": checkpoint.dtype,
        "longest_frames": str(checkpoint.longest_frames),
        **{name: msgspec.json.encode(value).decode() for name, value in decision.items()},
    }


def choose_format(out: Path, given: str | None) -> str:
    """The format that a file's name and the option --format agree on.

    Raises:
        ConfigError: They contradict each other, or there is no option and the name says nothing.
    """
    implied = SUFFIXES.get(out.suffix.lower())
    if given is None and implied is None:
        raise ConfigError(
            f"{out}: no format has the ending {out.suffix!r}; name it {' or '.join(SUFFIXES)}, or "
            f"add --format {' or '.join(FORMATS)}"
        )
    if given is not None and implied not in (None, given):
        raise ConfigError(f"{out}: the ending is that of {implied}, but --format says {given}")
    chosen = given or implied
    assert chosen is not None
    return chosen


def _export(run: Path, out: Path, form: str, choice: str, encoders: Sequence[str]) -> None:
    if form == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
    file = find_checkpoint(run, choice)
    if out.resolve() in (file.resolve(), *(run / "checkpoints").resolve().glob("*.pt")):
        raise ConfigError(f"{out}: is a checkpoint; give --out another name")
    checkpoint = load(file)
    model = load_model(checkpoint, encoders).eval()
    click.echo(f"{file}, after {checkpoint.step:,} steps", err=True)
    data, deviation = export_model(model, form, describe(checkpoint))
    with publish(out) as target:
        target.write(data)
    click.echo(f"{form}, {len(data):,} bytes, deviation {deviation:.1e} -> {out}", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help=f"File to write; the ending tells the format: {', '.join(SUFFIXES)}.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default=None,
    help="Format, where the ending does not tell.",
)
@click.option("--checkpoint", default="best", help="best, last, or a path as RUN is.")
@encoder_option
def main(
    run: Path, out: Path, form: str | None, checkpoint: str, encoders: tuple[str, ...]
) -> None:
    """Write the model of RUN as ONNX or TorchScript.

    RUN is a run folder, a model folder or a checkpoint. The file is compared with the model first,
    by onnxruntime or by PyTorch, and not written if they differ. ONNX needs `pip install
    'shardprep[export]'`. Exit codes: 0 done, 1 failed, 2 usage, else those of shardprep.
    """
    with reported_errors():
        _export(run, out, choose_format(out, form), checkpoint, encoders)


if __name__ == "__main__":
    main()
