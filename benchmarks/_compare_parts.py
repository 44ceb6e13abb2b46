"""The parts of a comparison in their order: a verb, its config, and whether it is complete."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._compare_config import Cell, CompareConfig
from glmae_ray.config import PretrainConfig
from glmae_ray.config_finetune import EvaluateConfig, FinetuneConfig
from glmae_ray.encoder_out import INIT
from glmae_ray.paths import publish, read_file

_WEIGHTS = ("segmenter.safetensors", "segmenter_best.safetensors")


@dataclass(frozen=True)
class Part:
    """One `glmae` command of a comparison.

    Attributes:
        verb: Of the command.
        name: Among those of its verb.
        cfg: What it does.
        folder: Of the comparison.
        after: Title of the part without which it cannot be done.
    """

    verb: str
    name: str
    cfg: PretrainConfig | FinetuneConfig | EvaluateConfig
    folder: Path
    after: str | None = None

    @property
    def title(self) -> str:
        """Verb and name."""
        return f"{self.verb} {self.name}"

    @property
    def config(self) -> Path:
        """The config file of its command."""
        return self.folder / "configs" / f"{self.verb}-{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What all tries said."""
        return self.folder / "logs" / f"{self.verb}-{self.name}.log"

    @property
    def result(self) -> Path:
        """Of an evaluation: what came out, beside the facts it belongs to."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def command(self) -> Sequence[str]:
        """What is run."""
        return [sys.executable, "-m", "glmae_ray.cli", self.verb, str(self.config)]

    def write_config(self) -> None:
        """Leave the file that the command reads."""
        tree = self.cfg.model_dump(mode="json", exclude_unset=True)
        publish(self.config, json.dumps(tree, indent=1) + "\n")  # JSON is YAML too

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        if isinstance(self.cfg, EvaluateConfig):
            return self.outcome() is not None
        summary = _read(Path(self.cfg.run) / "summary.json")
        if summary is None or summary["steps"] < self.cfg.steps:
            return False
        return isinstance(self.cfg, PretrainConfig) or _starts_from_init(self.cfg)

    def outcome(self) -> dict[str, Any] | None:
        """The evaluation of these very weights with this config, once it is complete."""
        result = _read(self.result)
        return result["evaluation"] if result and result["facts"] == self._facts() else None

    def keep_outcome(self) -> None:
        """Keep what an evaluation has just left: another one may write over it."""
        evaluation = _read(Path(self.cfg.run) / "evaluation.json")
        kept = {"facts": self._facts(), "evaluation": evaluation}
        publish(self.result, json.dumps(kept, indent=1) + "\n")

    def _facts(self) -> dict[str, Any]:
        run = Path(self.cfg.run)
        config = self.cfg.model_dump(mode="json", exclude={"store", "run", "workers", "ray"})
        return {"config": config, "sha256": {name: _sha256(run / name) for name in _WEIGHTS}}


def parts_of(cfg: CompareConfig) -> list[Part]:
    """All of them: pre-training first, then each cell's finetuning and evaluation."""
    parts: dict[str, Part] = {}
    for cell in cfg.cells:
        if encoder := cfg.encoder_of(cell.arm, cell.seed):
            pretraining = cfg.pretraining(cell.arm, cell.seed)
            part = Part("pretrain", encoder, pretraining, cfg.folder)
            parts.setdefault(part.title, part)
    for cell in cfg.cells:
        for part in _parts_of_cell(cfg, cell):
            parts[part.title] = part
    return list(parts.values())


def evaluation_of(cfg: CompareConfig, cell: Cell) -> Part:
    """The last part of a cell."""
    return _parts_of_cell(cfg, cell)[-1]


def _parts_of_cell(cfg: CompareConfig, cell: Cell) -> tuple[Part, Part]:
    encoder = cfg.encoder_of(cell.arm, cell.seed)
    after = encoder and f"pretrain {encoder}"
    finetune = Part("finetune", cell.name, cfg.finetuning(cell), cfg.folder, after)
    evaluation = cfg.evaluation(cell)
    return finetune, Part("evaluate", cell.name, evaluation, cfg.folder, finetune.title)


def _starts_from_init(cfg: FinetuneConfig) -> bool:
    """Whether a run started from the encoder that is there now."""
    if cfg.scratch:
        return True
    report = _read(Path(cfg.run) / INIT)
    return report is not None and report["sha256"] == _sha256(Path(cfg.init, "encoder.safetensors"))


def _read(path: Path) -> Any:
    raw = read_file(path)
    return None if raw is None else json.loads(raw)


def _sha256(path: Path) -> str | None:
    raw = read_file(path)
    return None if raw is None else hashlib.sha256(raw).hexdigest()
