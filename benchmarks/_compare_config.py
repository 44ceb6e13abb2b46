"""A comparison as one typed tree, and the configs of all its runs that follow from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import NonNegativeInt

from glmae_ray import expressions
from glmae_ray.config import PretrainConfig
from glmae_ray.config_base import Problem, Share
from glmae_ray.config_finetune import EvaluateConfig, FinetuneConfig
from glmae_ray.config_loading import build, merge
from glmae_ray.config_model import ModelConfig
from glmae_ray.config_train import JobConfig
from glmae_ray.errors import UserError
from glmae_ray.paths import is_url

Job = TypeVar("Job", bound=JobConfig)

# Fields that the comparison itself decides, so that arms differ in nothing else.
_DECIDED = {
    "pretrain": ("store", "run", "model"),
    "finetune": ("store", "run", "model", "init", "seed", "label_fraction", "label_cases"),
    "evaluate": ("store", "run"),
}
_DECIDED_OF_ARMS = (*_DECIDED["pretrain"], "seed")


class Cell(NamedTuple):
    """One finetuning and its evaluation."""

    arm: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """As in the names of files and folders."""
        return f"{self.arm}-{self.fraction:g}-{self.seed}"


class CompareConfig(JobConfig):
    """Arms by label fractions by seeds; `pretrain`, `finetune`, `evaluate` hold a verb's fields.

    An arm is a name with what it changes in `pretrain`, null for one that starts from random
    weights. Everything else is the same for all.
    """

    store: str
    out: str  # a folder
    arms: dict[str, dict[str, Any] | None]
    baselines: tuple[str, ...] = ("scratch",)  # arms that the others are held against
    fractions: tuple[Share, ...] = (1.0,)  # of the training people, nested by seed
    seeds: tuple[NonNegativeInt, ...] = (0,)  # of finetuning: labels, first weights, crops
    pretrain_each_seed: bool = False  # an encoder for each seed, not one for all
    # Labelled cases that count, an expression: whom finetuning and evaluation take of their splits.
    cases: str = "True"
    model: ModelConfig
    pretrain: dict[str, Any] = {}
    finetune: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.out)

    @property
    def cells(self) -> list[Cell]:
        """Arms beside each other, so that what is there after a while can be compared."""
        return [
            Cell(arm, fraction, seed)
            for seed in self.seeds
            for fraction in self.fractions
            for arm in self.arms
        ]

    def encoder_of(self, arm: str, seed: int) -> str | None:
        """Name of the pre-training run behind an arm; None for random weights."""
        if self.arms[arm] is None:
            return None
        return f"{arm}-{seed}" if self.pretrain_each_seed else arm

    def pretraining(self, arm: str, seed: int) -> PretrainConfig:
        """The run behind an arm that pre-trains.

        Raises:
            UserError: Every mistake in it, a line each; so do the next two.
        """
        decided = self._decided("pretrain", str(self.encoder_of(arm, seed)))
        decided |= {"seed": seed} if self.pretrain_each_seed else {}
        return _build(PretrainConfig, merge(self.pretrain, self.arms[arm] or {}) | decided)

    def finetuning(self, cell: Cell) -> FinetuneConfig:
        """The finetuning of a cell."""
        encoder = self.encoder_of(cell.arm, cell.seed)
        changes = {
            "init": "none" if encoder is None else str(self.folder / "pretrain" / encoder),
            "label_fraction": cell.fraction,
            "seed": cell.seed,
        }
        tree = self.finetune | self._decided("finetune", cell.name) | changes
        for name in ("where", "val_where"):
            tree[name] = self._of_cases(tree.get(name, FinetuneConfig.model_fields[name].default))
        return _build(FinetuneConfig, tree)

    def evaluation(self, cell: Cell) -> EvaluateConfig:
        """The evaluation of a cell."""
        run = {"store": self.store, "run": self._decided("finetune", cell.name)["run"]}
        split = self.evaluate.get("split", EvaluateConfig.model_fields["split"].default)
        where = self._of_cases(self.evaluate.get("where") or f"split == {split!r}")
        return _build(EvaluateConfig, self.evaluate | run | {"where": where})

    def _of_cases(self, where: Any) -> Any:
        """An expression that holds for `cases` only; what is none is left for its own field."""
        if self.cases == "True" or not isinstance(where, str):
            return where
        return f"({where}) and ({self.cases})"

    def _decided(self, verb: str, name: str) -> dict[str, Any]:
        model = self.model.model_dump(mode="json")
        return {"store": self.store, "run": str(self.folder / verb / name), "model": model}

    def rules(self) -> Iterator[Problem]:
        """What a comparison needs, and every mistake in a run that follows from it."""
        if is_url(self.out):
            yield Problem(("out",), f"out: {self.out} is a URL; it has to be a local folder")
        for name in ("arms", "fractions", "seeds"):
            values = [*getattr(self, name)]
            if not values:
                yield Problem((name,), f"{name}: is empty")
            if len({*values}) < len(values):
                yield Problem((name,), f"{name}: {values} names one twice")
        wrong = expressions.mistake(self.cases)
        if wrong:
            yield Problem(("cases",), f"cases: {self.cases!r} is wrong: {wrong}")
        for arm in self.arms:
            if not re.fullmatch(r"\w+", arm):
                line = f"arms.{arm}: folders are named so; right are letters, digits and _"
                yield Problem(("arms",), line)
        decided = list(self._decided_fields())
        yield from decided
        if self.cells and not decided and not wrong:
            yield from self._mistakes_in_runs()

    def _decided_fields(self) -> Iterator[Problem]:
        """Fields of a section that the comparison decides."""
        sections: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [
            (name, getattr(self, name), fields) for name, fields in _DECIDED.items()
        ]
        if self.pretrain_each_seed:
            sections.append(("pretrain", self.pretrain, ("seed",)))
        sections += [
            (f"arms.{arm}", changes, _DECIDED_OF_ARMS)
            for arm, changes in self.arms.items()
            if changes
        ]
        for section, given, fields in sections:
            for field in fields:
                if field in given:
                    line = f"{section}.{field}: is decided by the comparison; leave it out"
                    yield Problem((section.split(".")[0],), line)

    def _mistakes_in_runs(self) -> Iterator[Problem]:
        """Of each section once, not for every run it is a part of."""
        cell = self.cells[0]
        sections: dict[str, Callable[[], JobConfig]] = {
            "finetune": lambda: self.finetuning(cell),
            "evaluate": lambda: self.evaluation(cell),
        }
        for section, make in sections.items():
            yield from _mistakes(section, make)
        pretrains = [arm for arm, changes in self.arms.items() if changes is not None]
        if pretrains:
            plain = self.model_copy(update={"arms": {"plain": {}}})
            wrong = list(_mistakes("pretrain", lambda: plain.pretraining("plain", cell.seed)))
            yield from wrong
            for arm in pretrains if not wrong else []:
                make = lambda arm=arm: self.pretraining(arm, cell.seed)  # noqa: E731
                yield from _mistakes(f"arms.{arm}", make)
        yield from self._unfit()

    def _unfit(self) -> Iterator[Problem]:
        if self.finetune.get("task", "segmentation") != "segmentation":
            line = f"finetune.task: {self.finetune['task']} is not compared; segmentation is"
            yield Problem(("finetune",), line)
        weights = self.evaluate.get("weights", ["last"])
        if isinstance(weights, list | tuple) and weights and weights[0] != "last":
            line = f"evaluate.weights: {weights} has to begin with last, which the table shows"
            yield Problem(("evaluate",), line)


def _build(kind: type[Job], tree: Mapping[str, Any]) -> Job:
    return build(kind, copy.deepcopy(dict(tree)))  # looking for mistakes takes the tree apart


def _mistakes(section: str, make: Callable[[], JobConfig]) -> Iterator[Problem]:
    try:
        make()
    except UserError as error:
        for line in error.lines:
            yield Problem((section.split(".")[0],), f"{section}.{line}")
