"""The state of a process's random generators, as a file of a checkpoint."""

from __future__ import annotations

import io
import random
from pathlib import Path

import torch

from glmae_ray.ranks import Ranks


def name_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"rng-{rank}.pt"


def random_state() -> bytes:
    """Of the generators that this process has, though what is trained draws from none."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_random_state(folder: Path, *, ranks: Ranks, saved_ranks: int) -> None:
    """Set it as it was, where the workers are as many as they were.

    Args:
        folder: Of the checkpoint.
        ranks: This worker among the others.
        saved_ranks: How many wrote it.
    """
    if ranks.size != saved_ranks:
        return
    state = torch.load(folder / name_of(ranks.rank), weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
