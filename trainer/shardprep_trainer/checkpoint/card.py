"""The model card, README.md: what a model is, what it was trained on, and how good it is.

It is made from the run alone. A name of the data, such as that of a speaker, is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardprep import frames_per_second
from shardprep_trainer.checkpoint.state import Description, Results
from shardprep_trainer.config.encoders import BLOCKS, is_foreign
from shardprep_trainer.config.fields import ModelConfig

_REPOSITORY = "https://github.com/shardprep/shardprep"


def card(of: Description, weights: int) -> str:
    """The text of README.md.

    Args:
        of: What the model is.
        weights: How many numbers it has.
    """
    front = ["---", "library_name: shardprep", "pipeline_tag: audio-classification", "tags:"]
    tags = ["speaker-recognition", "speaker-verification", "speaker-embedding"]
    front += [*(f"- {tag}" for tag in tags), "---"]
    parts = [_model(of, weights), _use(of), _data(of), _results(of), _limits(of)]
    return "\n".join([*front, "", *(line for part in parts for line in (*part, ""))])


def _model(of: Description, weights: int) -> Iterator[str]:
    model, optim, train = of.config.model, of.config.optim, of.config.train
    yield "# A speaker model"
    yield ""
    yield (
        f"{_encoder(model)}, {model.pooling.replace('_', ' ')} pooling, {weights:,} weights; "
        f"trained by shardprep in the run {_plain(of.config.name)}, to step {of.step:,} of "
        f"{train.total_steps:,} ({of.config.loss.name.replace('_', '-')}, {optim.name}). It turns "
        "a recording into an embedding; two recordings of one speaker have embeddings with a high "
        "cosine. `config.json` has every setting."
    )


def _encoder(model: ModelConfig) -> str:
    if model.encoder in BLOCKS:
        blocks = f"{model.layers} block{'s' * (model.layers != 1)}"
        return f"{model.encoder.capitalize()} with {blocks} of width {model.dim}"
    options = ", ".join(f"{name} {value}" for name, value in model.encoder_options.items())
    return f"Encoder `{model.encoder}`" + (f" ({_plain(options)})" if options else "")


def _use(of: Description) -> Iterator[str]:
    encoder = of.config.model.encoder
    yield "## Use"
    yield ""
    yield "Install `pip install 'shardprep[train,audio]'`. MODEL is this folder."
    yield ""
    if is_foreign(encoder):
        yield (
            f"The encoder is code that does not come with shardprep: you need `{encoder}`. It is "
            "imported only where you name it, as below."
        )
        yield ""
    option = f" --encoder {encoder}" if is_foreign(encoder) else ""
    argument = f', encoder="{encoder}"' if is_foreign(encoder) else ""
    if of.features is None:
        yield (
            "How the features were made is not known, so the model takes log-mels and no "
            f"recordings: matrices (frames, {of.n_mels}) like those that it was trained on."
        )
        yield ""
        yield "```python"
        yield "from shardprep_trainer import SpeakerModel"
        yield ""
        yield f'embedding = SpeakerModel.from_pretrained("MODEL"{argument}).embed(mel)'
        yield "```"
        return
    yield "```sh"
    yield f"shardprep compare MODEL a.wav b.wav{option}"
    yield f"shardprep identify MODEL a.wav{option}"
    yield f"shardprep embed MODEL Recordings/ --out embeddings.npz{option}"
    yield "```"
    yield ""
    yield "```python"
    yield "from shardprep_trainer import SpeakerModel"
    yield ""
    yield f'model = SpeakerModel.from_pretrained("MODEL"{argument})'
    yield 'model.compare("a.wav", "b.wav")'
    yield "```"
    yield ""
    yield "To go on from its weights, on other speakers:"
    yield ""
    yield "```sh"
    yield "shardprep build Recordings/ shards/ --features-from MODEL"
    yield (
        "shardprep train --config MODEL --train.start_from MODEL --data.shards shards/ --name own"
        + (f" --model.encoder {encoder}" if is_foreign(encoder) else "")
    )
    yield "```"
    yield ""
    yield "The features, which these commands compute from a recording of any kind and rate:"
    yield ""
    yield "| setting | value |"
    yield "|---|---|"
    for name, value in of.features.items():
        yield f"| {_plain(name)} | {_plain(str(value))} |"
    yield f"| rounded to | {of.dtype} |"


def _data(of: Description) -> Iterator[str]:
    yield "## Training data"
    yield ""
    found = of.trained_on
    about = f"{len(of.speakers):,} speakers"
    if found is not None:
        hours = found.frames / frames_per_second(of.features) / 3600
        about += f", {found.utterances:,} utterances, {hours:,.2f} hours"
    yield f"{about}. The shard set has the fingerprint `{_plain(of.fingerprint)}`."
    yield ""
    yield (
        "Whose voices these are, in which languages and situations, and under which licence, the "
        "run does not know: add it here."
    )


def _results(of: Description) -> Iterator[str]:
    yield "## Results"
    yield ""
    found = of.results
    if found is None:
        yield "The model was not validated."
        return
    yield "On the split val of the same set, at this step:"
    yield ""
    yield "| measure | value |"
    yield "|---|---|"
    yield from _measures(found)
    if of.thresholds is not None:
        yield f"| cosine at the equal error rate | {of.thresholds.eer:.4f} |"
        yield f"| cosine at the least detection cost | {of.thresholds.min_dcf:.4f} |"
    yield ""
    yield (
        "These measures chose the model among its checkpoints, so they flatter it: measure it on "
        "other data with `shardprep score`."
    )


def _measures(found: Results) -> Iterator[str]:
    if found.accuracy is not None:
        yield f"| accuracy over {found.utterances:,} utterances | {found.accuracy:.4f} |"
    if found.eer is not None and found.min_dcf is not None:
        who = "speakers whom training did not know" if found.new_speakers else "training speakers"
        yield f"| equal error rate, {found.trials:,} trials of {who} | {100 * found.eer:.2f} % |"
        yield f"| minDCF (P_target 0.01) | {found.min_dcf:.4f} |"


def _limits(of: Description) -> Iterator[str]:
    yield "## Intended use and limits"
    yield ""
    yield (
        "For research, and for sorting recordings by speaker. A score is evidence and no proof of "
        "identity: do not decide about people by it alone. Error rates differ between groups of "
        "speakers, languages, microphones, rooms and lengths of recordings; nothing of this was "
        "measured here. Short recordings, of less than 2 seconds, are the least reliable. "
        f"A recording of more than {of.longest_frames:,} frames is embedded in pieces."
    )
    yield ""
    yield f"Made by [shardprep]({_REPOSITORY})."


def _plain(text: str) -> str:
    """A text that is no markup."""
    return "".join(c if c.isalnum() or c in " .,:+-_/" else " " for c in text)[:100]
