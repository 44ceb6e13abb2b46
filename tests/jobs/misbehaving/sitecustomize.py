"""Imported by every Python that has this folder on its path: one rank misbehaves at one step.

GLMAE_TEST_FAULT names a folder. In its `fault.json`, where there is one: `rank`; `call`, of
`Engine.step` in a process, from 1; `what`, `raise` or `hang`; and `times`, how often it happens
over all processes, each of which leaves a mark in the folder.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "glmae_ray.engine"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the engine's module as others do, and has it changed once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, *_: object
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            _change(module, Path(os.environ["GLMAE_TEST_FAULT"]))

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _change(module: ModuleType, folder: Path) -> None:
    if not (folder / "fault.json").exists():
        return
    fault = json.loads((folder / "fault.json").read_text())
    step, calls = module.Engine.step, 0

    def misbehave(engine: Any, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        here = os.environ.get("RANK") == str(fault["rank"]) and calls == fault["call"]
        if here and _may_happen(folder, fault["times"]):
            if fault["what"] == "hang":
                time.sleep(3600)
            raise ValueError("the optimizer is on strike")
        step(engine, *args, **options)

    module.Engine.step = misbehave


def _may_happen(folder: Path, times: int) -> bool:
    if len(list(folder.glob("mark-*"))) >= times:
        return False
    (folder / f"mark-{time.time_ns()}").touch()
    return True


if "GLMAE_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())
