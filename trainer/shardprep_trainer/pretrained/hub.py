"""Models on the Hugging Face Hub, fetched once and kept by huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardprep import StorageError
from shardprep_trainer.checkpoint.model_folder import WEIGHTS
from shardprep_trainer.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def is_hub_name(place: str) -> bool:
    """Whether a place is OWNER/NAME on the Hub: it looks like that, and is not on this machine."""
    named = _HUB_NAME.fullmatch(place) and not place.endswith((".pt", ".safetensors"))
    # Of a folder that is there, the name of a run may be mistyped.
    return bool(named) and not os.path.lexists(place) and not os.path.isdir(place.split("/")[0])


def fetch_model(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> str:
    """The model file of OWNER/NAME on the Hub, on this machine.

    Only the safetensors file is fetched: it has its own description.

    Args:
        name: OWNER/NAME.
        revision: A branch, a tag or a commit.
        token: Of the user; None for the one that `hf auth login` has left.
        cache_dir: Where files are kept.
        force_download: Whether to fetch it again.
        local_files_only: Whether to take only what was fetched before.

    Returns:
        The file.

    Raises:
        CheckpointError: There is no such model.
        StorageError: The Hub gives no answer, and the model was not fetched before.
    """
    try:
        return hf_hub_download(
            name,
            WEIGHTS,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except LocalEntryNotFoundError as error:
        raise StorageError(
            "was not fetched to this machine before, and the Hub cannot be asked now",
            file=name,
            remedy="Check the network and HF_HUB_OFFLINE, or name a folder of this machine.",
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: its owner lets only some in; ask on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: there is no such folder, and no such model on the Hugging Face Hub, or a "
            "private one (`hf auth login`); name a run, a model folder, or OWNER/NAME"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: has no revision {revision}; leave it out") from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: has no {WEIGHTS}, so shardprep did not write it; name another model"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name}: is no name of a model ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"the Hub gives no answer ({' '.join(str(error).split())[:200]})",
            file=name,
            remedy="Try again later, or name a folder of this machine.",
        ) from error
