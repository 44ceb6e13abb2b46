"""The search over finetuning runs: which fields, by which rule, judged when."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, ValidationError

from glmae_ray.config_base import BrokenRulesError, Problem
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import build, merge, read_yaml
from glmae_ray.config_run import RayConfig
from glmae_ray.config_train import JobConfig
from glmae_ray.errors import UserError
from glmae_ray.search_space import KINDS, Space, grid_size, sampled

Tree = dict[str, Any]

# The same for every trial: where it runs, what it is judged by.
_SAME = {
    *("store", "run", "ray", "resources", "pipeline", "save", "log", "accept_store_change"),
    *("task", "structures", "targets", "val_where", "validation"),
}
# What takes effect in a run that goes on from another's checkpoint, whose weights and moments keep
# their shapes. Weight decay and shares of the rate are among what a checkpoint brings.
_MOVABLE = ("optim.lr", "optim.clip", "augment.", "loss.", "crops.foreground")
_REQUIRED = [name for name, field in FinetuneConfig.model_fields.items() if field.is_required()]


def _flat(given: Any, above: str = "") -> Any:
    """Sections as dotted names: on the shell `search.optim.lr={...}` is a section in a section."""
    if not isinstance(given, dict):
        return given
    names: Tree = {}
    for key, value in given.items():
        if isinstance(value, dict) and value and not set(value) & KINDS:
            names |= _flat(value, f"{above}{key}.")
        else:
            names[f"{above}{key}"] = value
    return names


class SearchConfig(JobConfig):
    """`glmae tune`: trials, each a finetuning run with other values of the fields in `search`.

    A trial is `base`, a YAML file of `glmae finetune`, with the fields of `finetune` and then a
    sample of `search` put in.
    """

    store: str
    run: str
    base: str | None = None
    finetune: Tree = {}
    # Dotted field: {kind: values}; see `Space`.
    search: Annotated[Tree, BeforeValidator(_flat)]
    trials: PositiveInt | None = None  # None: once through all grids; of pbt the population
    algorithm: Literal["random", "optuna"] = "random"  # grids are gone through beside it
    # asha and median stop trials that are behind; pbt has them go on from better ones.
    schedule: Literal["none", "asha", "median", "pbt"] = "none"
    # Held-out Dice after the last step; with `seconds` also how long that took, for optuna.
    objective: Literal["dice", "dice_and_seconds"] = "dice"
    judge_steps: PositiveInt | None = None  # between two judgements; None: validation.every_steps
    retries: NonNegativeInt = 1  # of a trial that failed
    at_a_time: PositiveInt | None = None  # trials at most; None: as many as the cluster holds
    seed: NonNegativeInt = 0
    ray: RayConfig = RayConfig()

    @property
    def spaces(self) -> dict[str, Space]:
        """The fields and what they may be; `rules` tells those that cannot be read."""
        found = {}
        for name, given in self.search.items():
            with suppress(ValueError):
                found[name] = Space.parse(given)
        return found

    @property
    def tree(self) -> Tree:
        """`base` with the fields of `finetune`."""
        return merge(read_yaml(Path(self.base)) if self.base else {}, self.finetune)

    @property
    def count(self) -> int:
        """How many trials there are."""
        return self.trials or grid_size(self.spaces)

    def sample(self, number: int) -> Tree:
        """What trial `number` tries, by dotted name, where that does not hang on the others."""
        return sampled(self.spaces, number, seed=self.seed)

    def trial_tree(self, sample: Tree, *, run: str) -> Tree:
        """The tree of a trial's finetuning run."""
        tree = merge(self.tree, {"store": self.store, "run": run})
        for name, value in sample.items():
            tree = merge(tree, nested(name, value))
        return tree

    def trial(self, sample: Tree, *, run: str) -> FinetuneConfig:
        """A trial's finetuning run.

        Raises:
            UserError: The fields of the sample do not fit each other.
        """
        return build(FinetuneConfig, copy.deepcopy(self.trial_tree(sample, run=run)))

    @property
    def example(self) -> FinetuneConfig:
        """The finetuning run without a sample, but for fields that have to be stated."""
        return self.trial(self._stand_ins(), run=self.run)

    @property
    def judge_every(self) -> int:
        """Steps between two judgements."""
        return self.judge_steps or self.example.validation.every_steps

    def _stand_ins(self) -> Tree:
        missing = [name for name in self.spaces if name in _REQUIRED and name not in self.tree]
        return {name: self.spaces[name].probes()[0] for name in missing}

    def rules(self) -> Iterator[Problem]:
        """The spaces have to be of fields that take them, the rest has to fit together."""
        yield from self._space_problems()
        try:
            tree = self.tree
        except UserError as error:
            yield from _about(("base",), error.lines)
            return
        for name in sorted({"store", "run"} & set(tree)):
            yield Problem(("finetune",), f"finetune.{name}: is that of the search; give {name}=...")
        try:
            example = self.example
        except UserError as error:
            yield from _about(("finetune",), [f"finetune.{line}" for line in error.lines])
            return
        for name in self.spaces:
            yield from _about((f"search.{name}",), self._refused(name))
        yield from self._algorithm_rules()
        yield from self._schedule_rules(example)

    def _space_problems(self) -> Iterator[Problem]:
        if not self.search:
            yield Problem(("search",), "search: is empty; name fields of finetuning to search over")
        for name, given in self.search.items():
            field = f"search.{name}"
            if name in _SAME or name.split(".")[0] in _SAME:
                yield Problem(
                    (field,), f"{field}: is the same for every trial; give finetune.{name}"
                )
                continue
            try:
                Space.parse(given)
            except ValueError as error:
                yield Problem((field,), f"{field}: {error}")

    def _refused(self, name: str) -> list[str]:
        """What is wrong with values of a field, each by itself."""
        others, lines = set(self.spaces) - {name}, []
        for value in self.spaces[name].probes():
            tree = self.trial_tree({**self._stand_ins(), name: value}, run=self.run)
            lines += [f"search.{line}" for line in _mistakes(tree, others)]
        return list(dict.fromkeys(lines))

    def _algorithm_rules(self) -> Iterator[Problem]:
        grids = [name for name, space in self.spaces.items() if space.kind == "grid"]
        if self.algorithm == "optuna":
            for name in grids:
                line = f"search.{name}: optuna goes through no grid; use choice"
                yield Problem(("algorithm", f"search.{name}"), line)
        if self.trials is None and (not grids or len(grids) < len(self.spaces)):
            yield Problem(
                ("trials",), "trials: is missing; only grids alone say how many there are"
            )
        if self.objective == "dice_and_seconds":
            if self.algorithm != "optuna":
                line = "objective: only algorithm=optuna weighs Dice against seconds"
                yield Problem(("objective", "algorithm"), line)
            if self.schedule != "none":
                line = "objective: a trial that is stopped early has no seconds; use schedule=none"
                yield Problem(("objective", "schedule"), line)

    def _schedule_rules(self, example: FinetuneConfig) -> Iterator[Problem]:
        if not isinstance(example.resources.workers, int):
            line = "finetune.resources.workers: a range; trials beside each other take a number"
            yield Problem(("finetune",), line)
        if self.schedule == "none":
            if self.judge_steps is not None:
                yield Problem(("judge_steps",), "judge_steps: has no effect with schedule=none")
            return
        if "steps" in self.spaces:
            line = f"search.steps: schedule={self.schedule} compares trials of equal length"
            yield Problem(("schedule", "search.steps"), line)
        every, judge = example.validation.every_steps, self.judge_every
        fields = ("judge_steps", "finetune")
        if judge % every:
            line = f"judge_steps: {judge} is not a multiple of validation.every_steps {every}"
            yield Problem(fields, line)
        if judge >= example.steps:
            line = f"judge_steps: {judge} is not below finetune.steps {example.steps}"
            yield Problem(fields, line)
        if self.schedule == "pbt":
            yield from self._pbt_rules(example)

    def _pbt_rules(self, example: FinetuneConfig) -> Iterator[Problem]:
        if self.algorithm != "random":
            line = "algorithm: pbt chooses by itself; use algorithm=random"
            yield Problem(("algorithm", "schedule"), line)
        if self.trials is not None and self.trials < 2:
            yield Problem(("trials", "schedule"), "trials: pbt needs a population, 2 at least")
        if self.judge_every % example.save.every_steps:
            line = (
                f"judge_steps: {self.judge_every} is not a multiple of finetune.save.every_steps "
                f"{example.save.every_steps}: pbt goes on from the checkpoints of these steps"
            )
            yield Problem(("judge_steps", "finetune"), line)
        for name in self.spaces:
            if not name.startswith(_MOVABLE):
                line = (
                    f"search.{name}: cannot change while a run goes on; pbt takes "
                    f"{', '.join(start + '*' * start.endswith('.') for start in _MOVABLE)}"
                )
                yield Problem((f"search.{name}", "schedule"), line)


def nested(name: str, value: Any) -> Tree:
    """A dotted field as a tree."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def _mistakes(tree: Tree, others: set[str]) -> list[str]:
    """What is wrong with a finetuning run, but for rules that other searched fields are part of."""
    try:
        FinetuneConfig.model_validate(tree)
    except BrokenRulesError as broken:
        return [problem.line for problem in broken.problems if not set(problem.fields) & others]
    except ValidationError:
        try:
            build(FinetuneConfig, copy.deepcopy(tree))
        except UserError as error:
            return list(error.lines)
    return []


def _about(fields: tuple[str, ...], lines: list[str] | tuple[str, ...]) -> Iterator[Problem]:
    for line in lines:
        yield Problem(fields, line)
