"""The public names, for type checkers and for `__init__.py`, which loads them when asked for."""

from .pretrained.model import SpeakerModel as SpeakerModel
