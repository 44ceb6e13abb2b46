"""The section about probes: what the encoder is asked about labels while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from glmae_ray import expressions
from glmae_ray.config_base import Config, Problem, Spacing

Kind = Literal["knn", "linear", "segmentation"]


class ProbeConfig(Config):
    """The frozen encoder on few labelled cases, every so many steps, beside training.

    `knn` and `linear` tell the class of a scan, `segmentation` structures in crops of the size of a
    local view. docs/probes.md has what they do; every number here is a decision of ours but for
    `neighbours`, which is that of DINO's evaluation.
    """

    every_steps: PositiveInt | None = None  # None: no probes; else also at steps 0 and the last
    kinds: tuple[Kind, ...] | None = None  # None: knn, linear with `targets`, else segmentation
    store: str | None = None  # of the labelled cases; None: that of the run
    where: str = "split == 'train'"  # cases to fit on, an expression as in `sampling.where`
    val_where: str = "split == 'val'"  # cases to measure on
    cases: PositiveInt = 32  # of each at most, spread evenly
    structures: tuple[str, ...] | None = None  # of segmentation; None: all
    targets: str | None = None  # of knn and linear: a CSV with the columns case_id and class
    spacing: Spacing | None = None  # of segmentation's crops, mm along Z, Y, X; None: as acquired
    neighbours: PositiveInt = 20
    # That Ray sets aside while a probe runs; 0: it shares the cores of others. None: 1, or 0 where
    # workers and makers of views leave none.
    cpus: NonNegativeFloat | None = None

    @property
    def chosen(self) -> tuple[Kind, ...]:
        """The kinds that are asked for, or that `targets` implies."""
        if self.kinds is not None:
            return self.kinds
        return ("segmentation",) if self.targets is None else ("knn", "linear")

    @property
    def classifies(self) -> bool:
        """Whether any kind needs classes."""
        return "knn" in self.chosen or "linear" in self.chosen

    def problems(self) -> Iterator[Problem]:
        """What is wrong between its fields."""
        if self.every_steps is None and self != ProbeConfig():
            line = "probe.every_steps: is missing; without it the rest of probe has no effect"
            yield Problem(("probe.every_steps",), line)
        if self.kinds == ():
            line = "probe.kinds: is empty; known are knn, linear, segmentation"
            yield Problem(("probe.kinds",), line)
        if self.classifies and self.targets is None:
            line = "probe.targets: is missing; knn and linear take a CSV of case_id and class"
            yield Problem(("probe.targets", "probe.kinds"), line)
        for name, used in (
            ("targets", self.classifies),
            ("structures", "segmentation" in self.chosen),
            ("spacing", "segmentation" in self.chosen),
        ):
            if getattr(self, name) is not None and not used and self.kinds != ():
                line = f"probe.{name}: has no effect on {', '.join(self.chosen)}"
                yield Problem((f"probe.{name}", "probe.kinds"), line)
        for name in ("where", "val_where"):
            if reason := expressions.mistake(getattr(self, name)):
                line = f"probe.{name}: {getattr(self, name)!r} is wrong: {reason}"
                yield Problem((f"probe.{name}",), line)
