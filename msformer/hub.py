"""Models by name: a folder of this machine, or a repository of the Hugging Face Hub, ``ORG/NAME`` (extra ``[hub]``).

Of a repository only the named files are fetched, into the cache of ``huggingface_hub``; what is there already is used
without the network where ``HF_HUB_OFFLINE=1`` is set. None of the files is code, and none is a pickle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def find_folder(name: str | PathLike[str], files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model.

    Args:
        name: a folder, or ``ORG/NAME`` where no folder ORG is here.
        files: that are fetched of a repository.
        revision: of a repository: a branch, a tag or a commit; ``main`` by default.

    Raises:
        FileNotFoundError: no such folder and no such repository, or none that can be reached.
        ValueError: a revision of a folder.
    """
    folder = Path(name)
    here = folder.exists() or folder.parent.is_dir() or not _REPOSITORY.fullmatch(os.fspath(name))
    if revision is not None and here:
        raise ValueError(f"revision: {revision!r} is for models of the Hugging Face Hub, got the folder {folder}")
    return folder if here else _fetch(os.fspath(name), files, revision)


def _fetch(repository: str, files: Sequence[str], revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"{repository}: no such folder; to load it from the Hugging Face Hub, run: pip install 'msformer[hub]'"
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{repository}: no such folder, nor a model of the Hugging Face Hub: {reason}"
        ) from error
