"""Who speaks in recordings: `shardprep identify MODEL a.wav --top 5`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from shardprep_trainer.commands import EXIT_CODES, encoder_option, note, reported_errors
from shardprep_trainer.pretrained.options import (
    audio_argument,
    model_argument,
    on_error_option,
    open_model,
    use_all,
)
from shardprep_trainer.pretrained.recordings import Recording, find_recordings
from shardprep_trainer.pretrained.results import Match

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _lines(recording: Recording, matches: list[Match]) -> str:
    # Names come from files. They must not move the cursor of a terminal.
    names = [_CONTROL.sub(lambda found: ascii(found[0])[1:-1], each.speaker) for each in matches]
    width = max(map(len, names))
    rows = [f"  {name:<{width}}  {m.score:8.4f}" for name, m in zip(names, matches, strict=True)]
    return "\n".join([str(recording), *rows])


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Name the speakers whom recordings fit best, of those that the model was trained on.

    MODEL is a model folder, a run folder, a checkpoint, or OWNER/NAME on the Hugging Face Hub.
    Each AUDIO is a recording, a folder of recordings, or a list (.csv, .tsv, .jsonl) with the
    column path and perhaps key, start and end in seconds. Scores are those of the model's head:
    cosines, or logits of a head that is linear. {EXIT_CODES}""",
)
@model_argument
@encoder_option
@audio_argument(required=True)
@click.option("--top", type=click.IntRange(min=1), default=5, help="Speakers of each recording.")
@on_error_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a recording, a line.")
def main(
    model: str,
    checkpoint: str,
    features_from: str | None,
    encoders: tuple[str, ...],
    audio: tuple[Path, ...],
    top: int,
    on_error: str,
    as_json: bool,
) -> None:
    """The command; its help is above."""
    with reported_errors():
        recordings = find_recordings(audio)
        opened = open_model(model, checkpoint, features_from, encoders)
        for recording, (used,) in use_all([opened], recordings, on_error):
            matches = opened.best(used.scores, top)
            if as_json:
                speakers = [match._asdict() for match in matches]
                row = {"path": str(recording.path), "key": recording.key, "speakers": speakers}
                click.echo(json.dumps(row, ensure_ascii=False))
            else:
                click.echo(_lines(recording, matches))
    if opened.checkpoint.config.predict.backend != "head":
        note("the head of the model names speakers here, not the backend of its recipe")


if __name__ == "__main__":
    main()
