"""Push an export to the Hugging Face Hub; the token comes from the environment and nowhere else."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

from glmae_ray.errors import UserError
from glmae_ray.paths import Place

TOKEN = "HF_TOKEN"


def check() -> None:
    """See, before anything is written, that a push can be tried.

    Raises:
        UserError: No package, or no token.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("push: needs huggingface_hub: pip install 'glmae-ray[hub]'")
    if not os.environ.get(TOKEN):
        raise UserError(f"push: {TOKEN} is not set; make a token with write access and export it")


def push(repository: str, folder: Place, *, files: Iterable[str]) -> str:
    """Push files of a local folder in one commit; a repository that is not there is made, private.

    Args:
        repository: USER/REPO.
        folder: A local one.
        files: Paths below it; nothing else of the folder is pushed.

    Returns:
        URL of the commit.

    Raises:
        UserError: The hub refuses, or is not reached.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(folder / name)) for name in files]
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ[TOKEN])
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        commit = hub.create_commit(repository, operations, commit_message="Export of glmae-ray")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        is_of_a_file = isinstance(error, RuntimeError) and error.__cause__
        reason = error.__cause__ if is_of_a_file else error
        lines = str(reason).strip().splitlines() or [repr(reason)]
        raise UserError(f"push: {repository}: {lines[0]}") from None
    return str(commit.commit_url)
