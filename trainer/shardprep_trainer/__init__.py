"""Train and use a speaker model on the shards that `shardprep` makes.

from shardprep_trainer import SpeakerModel

model = SpeakerModel.from_pretrained("runs/boss")
print(model.compare("a.wav", "b.wav").same)
"""

import lazy_loader

# Loaded when first asked for: the commands need not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
