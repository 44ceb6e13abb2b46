"""Secrets that are put where credentials belong, and a search for them where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

_WORD = "pl4ntedsecret"
_NAMES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"),
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
SECRETS = {name: f"{_WORD}-{name}" for name in _NAMES}  # variables -> values
TOKEN = f"{_WORD}-of-32-letters-or-more-for-ray"


def leaks(*, folders: Iterable[Path] = (), texts: Iterable[str] = ()) -> Iterator[str]:
    """Files, at any depth, and texts that show one."""
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and _WORD.encode() in path.read_bytes():
                yield str(path)
    yield from (text for text in texts if _WORD in text)
