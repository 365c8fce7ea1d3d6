"""The recipe from a recording to log-mels: what is done to the samples, in which order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shardprep.errors import FormatError, SourceError
from shardprep.format.limits import MAX_N_MELS
from shardprep.format.manifest import Features

KIND = "log-mel"
"""`kind` in the features of a manifest that this recipe describes."""
VERSION = 1

LEAST_RATE, MOST_RATE = 1_000, 768_000
"""Sample rates that recordings and recipes may have [Hz]."""
_MOST_FFT = 65_536


@dataclass(frozen=True)
class FeatureRecipe:
    """From a recording to log-mels (T, F). The defaults are the homework's recipe.

    The names are those of torchaudio's `MelSpectrogram`. A recording is mixed down to one channel,
    resampled, levelled, freed of silence, and transformed; docs/recordings.md has each step.

    Attributes:
        sample_rate: Rate that every recording is brought to [Hz].
        peak_db: Level of the highest sample [dB of full scale]; None leaves the level as it is.
        silence_level: Samples below are quiet [share of full scale, after levelling]; None removes
            no silence.
        silence_seconds: Stretches of quiet samples that are longer are removed [s].
        n_fft: Length of the Fourier transform [samples].
        win_length: Length of the periodic Hann window, in the middle of the transform [samples].
        hop_length: From one frame to the next [samples].
        power: Exponent of the magnitudes: 1.0 or 2.0.
        n_mels: Mel bins F.
        f_min: Lower edge of the lowest bin [Hz].
        f_max: Upper edge of the highest bin [Hz].
        mel_scale: "htk" or "slaney".
        norm: "slaney" divides each triangle by its width in Hz; None leaves its height at 1.
        log_floor: The natural logarithm is taken of max(x, log_floor).

    Raises:
        SourceError: A value that cannot be.
    """

    sample_rate: int = 16_000
    peak_db: float | None = -3.0
    silence_level: float | None = 0.01
    silence_seconds: float = 0.1
    n_fft: int = 400
    win_length: int = 400
    hop_length: int = 160
    power: float = 2.0
    n_mels: int = 40
    f_min: float = 50.0
    f_max: float = 8_000.0
    mel_scale: Literal["htk", "slaney"] = "htk"
    norm: Literal["slaney"] | None = None
    log_floor: float = 1e-9

    def __post_init__(self) -> None:
        """Check the values, each by itself and together."""
        for field in dataclasses.fields(self):
            value = self._typed(field.name, str(field.type))
            object.__setattr__(self, field.name, value)
        for name, valid, expected in self._ranges():
            if not valid:
                raise SourceError(f"is {getattr(self, name)}, expected {expected}", key=name)

    def _typed(self, name: str, kind: str) -> Any:
        """The value of a field as int, float or text: 50 and 50.0 are one recipe."""
        value = getattr(self, name)
        if value is None and "None" in kind:
            return None
        if kind.startswith("Literal"):
            return value
        number = int if kind == "int" else float
        try:
            if isinstance(value, (str, bool)) or not math.isfinite(value) or number(value) != value:
                raise ValueError
            return number(value)
        except (TypeError, ValueError, OverflowError):
            what = "a whole number" if number is int else "a number"
            raise SourceError(f"is {value!r:.60}, expected {what}", key=name) from None

    def _ranges(self) -> list[tuple[str, bool, str]]:
        half = self.sample_rate / 2
        rates = f"{LEAST_RATE} to {MOST_RATE} Hz"
        return [
            ("sample_rate", LEAST_RATE <= self.sample_rate <= MOST_RATE, rates),
            ("peak_db", self.peak_db is None or -60 <= self.peak_db <= 0, "-60 to 0 dB"),
            (
                "silence_level",
                self.silence_level is None or 0 < self.silence_level < 1,
                "more than 0 and less than 1",
            ),
            ("silence_seconds", 0 < self.silence_seconds <= 60, "more than 0 s, at most 60 s"),
            ("n_fft", 16 <= self.n_fft <= _MOST_FFT, f"16 to {_MOST_FFT}"),
            ("win_length", 2 <= self.win_length <= self.n_fft, f"2 to n_fft, {self.n_fft}"),
            ("hop_length", 1 <= self.hop_length <= _MOST_FFT, f"1 to {_MOST_FFT}"),
            ("power", self.power in (1.0, 2.0), "1.0 (magnitudes) or 2.0 (power)"),
            ("n_mels", 1 <= self.n_mels <= MAX_N_MELS, f"1 to {MAX_N_MELS}"),
            ("f_min", 0 <= self.f_min < self.f_max, f"0 Hz to less than f_max, {self.f_max}"),
            ("f_max", self.f_max <= half, f"at most half of sample_rate, {half} Hz"),
            ("mel_scale", self.mel_scale in ("htk", "slaney"), "htk or slaney"),
            ("norm", self.norm in (None, "slaney"), "slaney or nothing"),
            ("log_floor", 0 < self.log_floor < 1, "more than 0 and less than 1"),
        ]

    def to_features(self) -> Features:
        """The recipe as the field `features` of a manifest has it."""
        return {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_features(cls, features: Mapping[str, Any] | None, *, where: str = "") -> FeatureRecipe:
        """The recipe that the features of a manifest describe.

        Args:
            features: `Manifest.features`.
            where: Whose they are, for the error to name.

        Raises:
            FormatError: They are unknown, or of another kind: no recording can be made into such.
        """
        remedy = "Take a set or a model that was made from recordings, or name the recipe."
        if features is None:
            raise FormatError(
                "nothing is known of how the features were computed", file=where, remedy=remedy
            )
        values = dict(features)
        kind, version = values.pop("kind", None), values.pop("version", None)
        names = {field.name for field in dataclasses.fields(cls)}
        if (kind, version) != (KIND, VERSION) or values.keys() != names:
            raise FormatError(
                f"the features are of another kind than those that shardprep computes from "
                f"recordings ({KIND}, version {VERSION})",
                file=where,
                key="features",
                remedy=remedy,
            )
        try:
            return cls(**values)
        except SourceError as error:
            raise FormatError(error.what, file=where, key=f"features.{error.key}") from None


def known_recipe(features: Features | None) -> FeatureRecipe | None:
    """The recipe that the features of a manifest describe; None where they are of another kind."""
    try:
        return FeatureRecipe.from_features(features)
    except FormatError:
        return None
