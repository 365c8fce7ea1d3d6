"""The public names, for type checkers and for `__init__.py`, which loads them when asked for."""

from .build.existing.append import append_shards as append_shards
from .build.foreign.adopt import AdoptReport as AdoptReport
from .build.foreign.adopt import adopt_shards as adopt_shards
from .build.options import BuildOptions as BuildOptions
from .build.program.shard_writer import ShardWriter as ShardWriter
from .build.report import BuildReport as BuildReport
from .build.writer import build_shards as build_shards
from .cache.shard_cache import ShardCache as ShardCache
from .check.repair import repair_shards as repair_shards
from .check.report import Fault as Fault
from .check.report import RepairReport as RepairReport
from .check.report import VerifyReport as VerifyReport
from .check.verify import verify_shards as verify_shards
from .errors import BuildError as BuildError
from .errors import CorruptShardError as CorruptShardError
from .errors import FormatError as FormatError
from .errors import MissingExtraError as MissingExtraError
from .errors import PlatformError as PlatformError
from .errors import ShardprepError as ShardprepError
from .errors import SourceError as SourceError
from .errors import StorageError as StorageError
from .format.codecs import decode_npy as decode_npy
from .format.entries import Entry as Entry
from .format.manifest import Manifest as Manifest
from .load.dataset import SegmentDataset as SegmentDataset
from .load.segments import SegmentLoader as SegmentLoader
from .load.utterances import UtteranceLoader as UtteranceLoader
from .read.shard_set import OpenShards as OpenShards
from .read.shard_set import ShardSet as ShardSet
from .read.shard_set import open_shards as open_shards
from .read.split import Split as Split
from .read.webdataset import stream as stream
from .storage.local import publish as publish
from .storage.lock import HeldLock as HeldLock
from .storage.lock import LockHeldError as LockHeldError
from .storage.lock import hold_lock as hold_lock
from .storage.remote import Remote as Remote
from .storage.remote import locate as locate
from .storage.sniff import sniff as sniff
from .storage.trouble import machine_errors as machine_errors
from .storage.trouble import storage_error as storage_error
from .storage.trouble import storage_errors as storage_errors

__version__: str
