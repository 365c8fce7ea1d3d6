"""Pack folders of mel-spectrogram files into tar shards, and read them at the speed of memory.

import shardprep

shardprep.build_shards("Dataset/", "shards/")
train = shardprep.open_shards("shards/")["train"]
for batch in shardprep.SegmentLoader(train, batch_size=32):
    ...
"""

import lazy_loader

__version__ = "0.1.0"

# The public names are those that __init__.pyi imports. Each is loaded when first asked for, so that
# `import shardprep` takes no time and needs no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
