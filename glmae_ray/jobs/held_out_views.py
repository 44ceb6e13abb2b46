"""What pre-training is measured on: the reconstruction of fixed views of held-out people."""

from __future__ import annotations

import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import held_out_reconstruction
from glmae_ray.pipeline import FixedBatch, fixed_batches
from glmae_ray.ranks import Ranks
from glmae_ray.samples import sample_maker
from glmae_ray.tracking import Record, RunLog


class HeldOutViews:
    """Fixed samples of the `val` split under fixed masks; none where nothing is reconstructed."""

    def __init__(self, cfg: PretrainConfig, engine: Engine, *, ranks: Ranks) -> None:
        """Make the samples of this rank.

        Args:
            cfg: The run.
            engine: Holds the module.
            ranks: This worker among the others.
        """
        self._cfg, self._engine = cfg, engine
        self._batches = self._make(ranks)

    def _make(self, ranks: Ranks) -> list[FixedBatch]:
        cfg = self._cfg
        if not cfg.loss.reconstructed:
            return []
        maker = sample_maker(cfg, split="val", kinds=cfg.loss.reconstructed)
        if not len(maker.index):
            return []
        return fixed_batches(
            maker,
            samples=cfg.validation.samples,
            rank=ranks.rank,
            workers=ranks.size,
            device=self._engine.device,
        )

    def measure(self, step: int, log: RunLog | None) -> tuple[Record, float] | None:
        """See `HeldOut`; `val_reconstruction` as `held_out_reconstruction` gives it, its loss."""
        if not self._batches:
            return None
        figures = held_out_reconstruction(self._engine, self._batches)
        if self._cfg.log.pictures:
            self._paint(step, log)
        return {"val_reconstruction": figures}, figures["loss"]

    @torch.no_grad()
    def _paint(self, step: int, log: RunLog | None) -> None:
        self._engine.train(False)
        pictures = self._engine(self._batches[0].batch, task="picture")
        self._engine.train(True)
        for kind, picture in pictures.items():
            panels = {
                "original": picture.original,
                "masked": picture.masked,
                "reconstruction": picture.reconstructed,
            }
            # First sample, first view, first channel.
            arrays = {title: volume[0, 0, 0].cpu().numpy() for title, volume in panels.items()}
            if log is not None:
                log.picture(kind, arrays, step=step)
