"""The public names, for type checkers and for `__init__.py`, which loads them when asked for."""

from .model.encoder.check import check_encoder as check_encoder
from .pretrained.model import SpeakerModel as SpeakerModel
