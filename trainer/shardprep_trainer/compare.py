"""Whether two recordings have one speaker: `shardprep compare MODEL a.wav b.wav`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from shardprep_trainer.commands import EXIT_CODES, encoder_option, note, reported_errors
from shardprep_trainer.pretrained.model import usable
from shardprep_trainer.pretrained.options import model_argument, open_model, tell_pieces
from shardprep_trainer.pretrained.recordings import Recording, check_there
from shardprep_trainer.pretrained.results import Comparison


def _lines(found: Comparison, prior: float, threshold: float | None) -> list[str]:
    lines = [f"cosine: {found.cosine:.4f}"]
    if found.probability is not None:
        lines.append(f"probability that the speaker is the same: {found.probability:.4f}")
        lines[-1] += f" (prior {prior:g})"
    if found.same is not None:
        lines.append(f"same speaker: {'yes' if found.same else 'no'} (threshold {threshold:.4f})")
    return lines


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Tell whether two recordings have one speaker.

    MODEL is a model folder, a run folder, a checkpoint, or OWNER/NAME on the Hugging Face Hub. A
    and B are recordings of any kind and rate. Printed are the cosine of their embeddings, the
    probability that the speaker is the same, calibrated on trials of the run's validation, and
    the decision at the threshold where misses and false alarms were equally frequent there.
    {EXIT_CODES}""",
)
@model_argument
@encoder_option
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--prior",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    help="Probability that the speaker is the same before the recordings are known.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: str,
    checkpoint: str,
    features_from: str | None,
    encoders: tuple[str, ...],
    a: Path,
    b: Path,
    prior: float,
    as_json: bool,
) -> None:
    """The command; its help is above."""
    recordings = [Recording(path, str(path)) for path in (a, b)]
    with reported_errors():
        check_there(recordings)
        opened = open_model(model, checkpoint, features_from, encoders)
        used = [usable(*found) for found in opened.use(recordings)]
        for recording, own in zip(recordings, used, strict=True):
            tell_pieces(opened, recording, own)
        found = opened.compare_embeddings(used[0].embedding, used[1].embedding, prior=prior)
    thresholds = opened.checkpoint.thresholds
    threshold = None if thresholds is None else thresholds.eer
    if as_json:
        row = {"a": str(a), "b": str(b), **found._asdict(), "prior": prior, "threshold": threshold}
        click.echo(json.dumps(row))
    else:
        click.echo("\n".join(_lines(found, prior, threshold)))
    if found.same is None:
        note(
            "the model has no threshold and no calibration: its run had no trials "
            "(train.valid_trials, and shards with a split val)"
        )


if __name__ == "__main__":
    main()
