"""A trained model as one object: embeds recordings and mels, compares and names speakers.

Axis legend: N recordings, T frames, F mel bins, D embedding width, S speakers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray

from shardprep import FeatureRecipe, FormatError, audio_features, machine_errors, rounded
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.find import find_checkpoint
from shardprep_trainer.checkpoint.model_folder import write_model
from shardprep_trainer.checkpoint.state import Checkpoint
from shardprep_trainer.checkpoint.weights import load_model
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.pieces import cut
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.model.cpu_kernels import largest_batch, return_memory
from shardprep_trainer.pretrained.batches import Mel, batches
from shardprep_trainer.pretrained.hub import fetch_model, is_hub_name
from shardprep_trainer.pretrained.recordings import Recording, ahead, name_of
from shardprep_trainer.pretrained.results import Comparison, Embeddings, Match, Used

Audio: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any] | Recording
"""A file, the bytes of one, or samples (N,) or (C, N) for C channels."""
Given = TypeVar("Given", bound=Audio)

MAX_FRAMES = 32_768
# Frames of log-mels that wait to be batched by length: 42 MB of 40 bins in 16 bits.
_WAITING = 16 * MAX_FRAMES


class SpeakerModel(
    ModelHubMixin,
    library_name="shardprep",
    pipeline_tag="audio-classification",
    tags=["speaker-recognition", "speaker-verification"],
):
    """A trained model, with the recipe of its features.

        model = SpeakerModel.from_pretrained("runs/boss")
        model.embed_audio("a.wav")             # (D,)
        model.compare("a.wav", "b.wav").same
        model.identify("a.wav", top=5)

    Recordings are made into log-mels as those were that the model was trained on, rounding
    included. Of recordings longer than `longest_frames`, see `evaluation.pieces`.

    Args:
        checkpoint: What `shardprep_trainer.checkpoint` reads.
        device: Where to compute, such as "cuda:1"; None for a GPU if there is one.
        recipe: From recordings to log-mels, for a model that does not know its own.
        encoder: Name of the encoder of your own that the model was trained with, as
            "package.module:Class", or several such. Its code is imported only if it is named.

    Attributes:
        checkpoint: The same.
        device: Where it computes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        recipe: FeatureRecipe | None = None,
        encoder: str | Sequence[str] = (),
    ) -> None:
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.checkpoint = checkpoint
        self.device = torch.device(chosen)
        encoders = [encoder] if isinstance(encoder, str) else encoder
        network = load_model(checkpoint, encoders).to(self.device)
        self._recipe = recipe
        self._views = Views(network, longest=checkpoint.longest_frames).eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        recipe: FeatureRecipe | None = None,
        encoder: str | Sequence[str] = (),
        checkpoint: str = "best",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> SpeakerModel:
        """Open a model. Nothing in its files is run, and nothing that they name is imported.

        Args:
            pretrained_model_name_or_path: A model folder, a run folder, a checkpoint, or OWNER/NAME
                on the Hugging Face Hub. What is there on this machine goes before the Hub.
            device: See the class.
            recipe: See the class.
            encoder: See the class.
            checkpoint: Of a run folder, "best" or "last".
            revision: On the Hub: a branch, a tag or a commit.
            token: On the Hub: of the user; None for the one that `hf auth login` has left.
            cache_dir: Of the Hub: where files are kept.
            force_download: Of the Hub: whether to fetch files again.
            local_files_only: Of the Hub: whether to take only what was fetched before.

        Raises:
            CheckpointError: There is no such model, or it cannot be used.
            StorageError: The machine or the Hub gave no answer.
        """
        place = os.fspath(pretrained_model_name_or_path)
        if is_hub_name(place):
            place = fetch_model(
                place,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        return cls(load(find_checkpoint(Path(place), checkpoint)), device, recipe, encoder)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(save_directory, self.checkpoint)

    @cached_property
    def recipe(self) -> FeatureRecipe:
        """From a recording to the log-mels that the model takes.

        Raises:
            FormatError: The model does not know it, as the shards that it was trained on did not,
                or it takes other log-mels than those of the recipe that was given.
        """
        of = self.checkpoint
        if self._recipe is None:
            return FeatureRecipe.from_features(of.features, where=str(of.file))
        own = None if of.features is None else FeatureRecipe.from_features(of.features)
        n_mels = self._recipe.n_mels
        if n_mels != of.n_mels or own not in (None, self._recipe):
            raise FormatError(
                f"was not trained on features of the recipe that was given ({n_mels} mel bins)",
                file=of.file,
                remedy="Leave the recipe out if the model knows its own, or give another.",
            )
        return self._recipe

    @property
    def dtype(self) -> Literal["float16", "float32", "uint8"]:
        """What log-mels are rounded to before they are embedded."""
        return self.checkpoint.dtype

    @property
    def speakers(self) -> tuple[str, ...]:
        """Names of the speakers whom the head knows, by their numbers (S,)."""
        return self.checkpoint.speakers

    @property
    def longest_frames(self) -> int:
        """Longer recordings are embedded in pieces [frames]."""
        return self.checkpoint.longest_frames

    @property
    def is_cosine(self) -> bool:
        """Whether the scores of the head are cosines."""
        return self.checkpoint.config.model.classifier == "cosine"

    def features(self, audio: Audio, rate: int | None = None) -> Mel:
        """The log-mels (T, F) of a recording, by the recipe and rounded as shards have them.

        Args:
            audio: The recording.
            rate: Of samples, their rate [Hz]; None for the recipe's.

        Raises:
            ValueError: The recording cannot be used; says why.
            FormatError: See `recipe`.
            StorageError: The machine refused.
        """
        piece = audio if isinstance(audio, Recording) else None
        source = audio.path if isinstance(audio, Recording) else audio
        start, end = (piece.start, piece.end) if piece else (None, None)
        path = None if isinstance(source, (bytes, np.ndarray)) else os.fspath(source)
        try:
            with machine_errors(path):
                return audio_features(
                    source, self.recipe, rate=rate, start=start, end=end, dtype=self.dtype
                )
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None

    def embed(self, mel: Mel | torch.Tensor | list[Any]) -> Embeddings:
        """Embed log-mels.

        Args:
            mel: (T, F), or a list of such of any length; they are batched by length.

        Returns:
            (D,), or (N, D) of a list; not of length 1.

        Raises:
            ValueError: A matrix has another shape, or values that are not finite.
            PredictionError: An embedding is not finite.
        """
        if not isinstance(mel, list):
            return self._use([self._checked(mel)])[0].embedding
        return _stacked(self._use([self._checked(each) for each in mel]))

    def embed_audio(self, audio: Audio | list[Any], rate: int | None = None) -> Embeddings:
        """Embed recordings.

        Args:
            audio: A file, the bytes of one, samples (N,) or (C, N), or a list of such.
            rate: Of samples, their rate [Hz]; None for the recipe's.

        Returns:
            (D,), or (N, D) of a list; not of length 1.

        Raises:
            PredictionError: A recording cannot be used; names it and says why.
            FormatError: See `recipe`.
            StorageError: The machine refused.
        """
        if not isinstance(audio, list):
            return self._one(audio, rate).embedding
        return _stacked([usable(*found) for found in self.use(audio, rate)])

    def compare(
        self, a: Audio, b: Audio, rate: int | None = None, *, prior: float = 0.5
    ) -> Comparison:
        """Whether two recordings have one speaker.

        Args:
            a: A recording.
            b: Another.
            rate: Of samples, their rate [Hz]; None for the recipe's.
            prior: Probability that the speaker is the same before the recordings are known,
                between 0 and 1.

        Raises:
            PredictionError: As `embed_audio`.
        """
        return self.compare_embeddings(*self.embed_audio([a, b], rate), prior=prior)

    def compare_embeddings(self, a: Embeddings, b: Embeddings, *, prior: float = 0.5) -> Comparison:
        """The same of two embeddings (D,).

        Raises:
            ValueError: The prior is not between 0 and 1.
        """
        if not 0 < prior < 1:
            raise ValueError(f"the prior is {prior}, expected a number between 0 and 1")
        first, second = (np.asarray(each, np.float64) for each in (a, b))
        lengths = np.linalg.norm(first) * np.linalg.norm(second)
        # 0 has no direction.
        cosine = float(first @ second / lengths) if lengths else 0.0
        calibration, thresholds = self.checkpoint.calibration, self.checkpoint.thresholds
        return Comparison(
            cosine,
            None if calibration is None else calibration.probability(cosine, prior),
            None if thresholds is None else cosine >= thresholds.eer,
        )

    @overload
    def identify(
        self, audio: list[Any], rate: int | None = None, *, top: int = 5
    ) -> list[list[Match]]: ...
    @overload
    def identify(self, audio: Audio, rate: int | None = None, *, top: int = 5) -> list[Match]: ...
    def identify(
        self, audio: Audio | list[Any], rate: int | None = None, *, top: int = 5
    ) -> list[Match] | list[list[Match]]:
        """The speakers whom recordings fit best, of those whom the head knows.

        Args:
            audio: A recording or a list, as `embed_audio` takes them.
            rate: Of samples, their rate [Hz]; None for the recipe's.
            top: How many speakers, at least 1.

        Returns:
            Of a recording the speakers, the best first; of a list, one such list each.

        Raises:
            ValueError: `top` is less than 1.
            PredictionError: As `embed_audio`.
        """
        if top < 1:
            raise ValueError(f"top is {top}, expected 1 or more")
        if not isinstance(audio, list):
            return self.best(self._one(audio, rate).scores, top)
        return [self.best(usable(*found).scores, top) for found in self.use(audio, rate)]

    def best(self, scores: Embeddings, top: int) -> list[Match]:
        """The speakers with the highest of the scores (S,), the best first."""
        order = np.argsort(-scores, kind="stable")[:top]
        return [Match(self.speakers[number], float(scores[number])) for number in order]

    def use(
        self, recordings: Sequence[Given], rate: int | None = None
    ) -> Iterator[tuple[Given, Used | ValueError]]:
        """Embed and score recordings, in their order; they are decoded ahead, in threads.

        Yields:
            A recording, and what the model makes of it; a ValueError says why it cannot be used.

        Raises:
            PredictionError: An embedding is not finite.
            FormatError: See `recipe`.
            StorageError: The machine refused.
        """
        _ = self.recipe
        mels = ahead(partial(self.features, rate=rate), recordings)
        waiting: list[tuple[Given, Mel | ValueError]] = []
        frames = 0
        for recording, mel in zip(recordings, mels, strict=True):
            waiting.append((recording, mel))
            frames += 0 if isinstance(mel, ValueError) else len(mel)
            if frames >= _WAITING:
                yield from self._emptied(waiting)
                frames = 0
        yield from self._emptied(waiting)

    def _emptied(
        self, waiting: list[tuple[Given, Mel | ValueError]]
    ) -> Iterator[tuple[Given, Used | ValueError]]:
        used = iter(self._use([mel for _, mel in waiting if not isinstance(mel, ValueError)]))
        found = [
            (recording, mel if isinstance(mel, ValueError) else next(used))
            for recording, mel in waiting
        ]
        waiting.clear()
        yield from found

    def _one(self, audio: Audio, rate: int | None) -> Used:
        (found,) = self.use([audio], rate)
        return usable(*found)

    def _checked(self, mel: Mel | torch.Tensor) -> Mel:
        """A mel as shards store it. ValueError if it is none."""
        if isinstance(mel, torch.Tensor):
            mel = mel.detach().cpu()
            # NumPy has no bfloat16.
            mel = (mel.float() if mel.dtype == torch.bfloat16 else mel).numpy()
        found = np.asarray(mel)
        n_mels = self.checkpoint.n_mels
        if found.ndim != 2 or not len(found) or found.shape[1] != n_mels:
            raise ValueError(f"has the shape {found.shape}, expected (frames, {n_mels})")
        with np.errstate(over="ignore"):
            found = found.astype("float32" if self.dtype == "uint8" else self.dtype)
        if np.isfinite(found).all():
            # Of uint8, their range may be too large.
            with contextlib.suppress(ValueError):
                return rounded(found, self.dtype)
        raise ValueError(f"has values that are no finite numbers of {self.dtype}")

    @torch.inference_mode()
    def _use(self, mels: Sequence[Mel]) -> list[Used]:
        """Embed and score mels (T, F), in their order."""
        pad_value = self.checkpoint.config.data.pad_value
        found: dict[int, Used] = {}
        most = largest_batch(MAX_FRAMES, self.device)
        for own, mel, lengths in batches(mels, most, pad_value):
            valid = lengths if bool((lengths < mel.shape[1]).any()) else None
            embeddings, scores = self._views.embed_and_score(mel.to(self.device), valid)
            return_memory(self.device)
            rows = zip(
                own, embeddings.float().cpu().numpy(), scores.float().cpu().numpy(), strict=True
            )
            for number, embedding, score in rows:
                if not np.isfinite(embedding).all():
                    raise PredictionError(
                        f"{self.checkpoint.file}: an embedding is not finite: the run has "
                        "diverged; take another checkpoint"
                    )
                frames = len(mels[number])
                pieces = len(cut(frames, self.longest_frames))
                found[number] = Used(embedding, score, frames, pieces)
        return [found[number] for number in range(len(mels))]


def usable(recording: Audio, found: Used | ValueError) -> Used:
    """What `SpeakerModel.use` gave, or PredictionError if the recording cannot be used."""
    if isinstance(found, ValueError):
        raise PredictionError(f"{name_of(recording)}: {found}") from found
    return found


def _stacked(found: Sequence[Used]) -> Embeddings:
    if not found:
        raise ValueError("found no recording to embed, expected one or more")
    return np.stack([each.embedding for each in found])
