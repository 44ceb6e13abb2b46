"""Which start makes the better segmenter: random weights, or encoders pre-trained in several ways?

    python -m benchmarks.compare CONFIG.yaml store=STORE out=FOLDER [key=value ...]
    python -m benchmarks.compare --quick --out FILE.json

Arms (ways to pre-train, and none) by label fractions by seeds: one `glmae pretrain` an arm, then
for each cell `glmae finetune` and `glmae evaluate` on the test cases, with the same people, crops
and steps whatever the arm. FOLDER/comparison.md has the table, .csv and .json all there is to it.
The figures are those of the last weights. Whenever it ends, the same command continues; more arms,
fractions and seeds may be added. `--quick` is a small one on phantom people.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks._compare_cases import check_cases
from benchmarks._compare_chart import draw_comparison
from benchmarks._compare_config import CompareConfig
from benchmarks._compare_folder import alone_in, claim
from benchmarks._compare_outcome import outcome_of
from benchmarks._compare_parts import Part, parts_of
from benchmarks._compare_run import Runner
from benchmarks._compare_table import as_csv, markdown, screen
from benchmarks._report import commit, environment, report
from benchmarks._stores import phantom_store
from glmae_ray.config_loading import load, shipped
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.paths import publish, to_place

_PACKAGES = ["torch", "monai", "ray", "deepspeed", "numpy", "glmae-ray"]
_PEOPLE = 20  # phantoms of --quick


def main(argv: list[str] | None = None) -> int:
    """Compare.

    Returns:
        0 done; 1 a part failed; 2 the user can fix it (a line each on stderr); 128 and the number
        of a signal that asked it to stop.
    """
    args = _arguments(argv)
    try:
        if args.quick:
            return _quick(args.out)
        found = compare(load(CompareConfig, args.words))
    except UserError as error:
        print(*(f"compare: {line}" for line in error.lines), sep="\n", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        command = f"python -m benchmarks.compare {words}"
        print(f"compare: {stopped}; continue with: {command}", file=sys.stderr)
        return 128 + stopped.number
    return 1 if found["faults"] else 0


def compare(cfg: CompareConfig) -> dict[str, Any]:
    """Do what is left of a comparison; print and write the table.

    Raises:
        UserError: Config, store or folder do not fit; nothing was started.
        StoppedError: A signal came.
    """
    cfg = cfg.model_copy(update={name: str(to_place(getattr(cfg, name))) for name in _PATHS})
    facts = environment(_PACKAGES)
    cases, parts = check_cases(cfg), parts_of(cfg)
    with alone_in(cfg.folder) as lock:
        claim(cfg, fingerprint=cases.fingerprint)
        _tell(cfg, parts)
        with Runner(lock) as runner:
            faults = runner.run(parts)
        found = outcome_of(cfg, cases, faults)
        _write(cfg, found, parts, facts)
    print(*screen(found), sep="\n")
    print(f"comparison: {cfg.folder / 'comparison.md'}")
    return found


_PATHS = ("store", "out")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=lines[0])
    parser.add_argument("words", nargs="*", metavar="[CONFIG.yaml] key=value")
    parser.add_argument("--quick", action="store_true", help="on phantoms, within 10 minutes")
    parser.add_argument("--out", type=Path, help="of --quick: the JSON file to write")
    args = parser.parse_args(argv)
    if args.quick != (args.out is not None) or (args.quick and args.words):
        parser.error("--quick and --out FILE.json go together, without other words")
    return args


def _tell(cfg: CompareConfig, parts: list[Part]) -> None:
    done = sum(part.is_complete() for part in parts)
    print(f"{len(parts)} parts, {done} of them complete: {cfg.folder}")
    for name in cfg.baselines:
        if name not in cfg.arms:
            print(f"baselines: {name} is no arm here; nothing is held against it")
    sys.stdout.flush()


def _write(
    cfg: CompareConfig, found: dict[str, Any], parts: list[Part], facts: dict[str, Any]
) -> None:
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": facts,
        **found,
        "config": cfg.model_dump(mode="json"),
        "commands": {part.title: f"glmae {part.verb} {part.config}" for part in parts},
        "configs": {part.title: part.cfg.model_dump(mode="json") for part in parts},
    }
    publish(cfg.folder / "comparison.json", json.dumps(document, indent=1) + "\n")
    publish(cfg.folder / "comparison.csv", as_csv(found))
    publish(cfg.folder / "comparison.md", markdown(found))
    draw_comparison(found, cfg.folder / "comparison.png")


def _quick(out: Path) -> int:
    """A comparison of phantom people, as a benchmark like the others."""
    facts = environment(_PACKAGES)
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as scratch:
        store = phantom_store(Path(scratch), people=_PEOPLE, splits=(0.6, 0.2, 0.2))
        words = [str(shipped("compare/phantoms.yaml")), f"store={store}", f"out={scratch}/out"]
        found = compare(load(CompareConfig, words))
    rows = [
        {"arm": cell["arm"], "fraction": cell["fraction"], "Dice": cell["mean"]["dice"]}
        for cell in found["cells"]
        if "failed" not in cell
    ]
    dices = {(row["arm"], row["fraction"]): row["Dice"] for row in rows}
    ratios = {
        f"{one['arm']} / {one['against']}, Dice at {100 * one['fraction']:g} %": (
            dices[one["arm"], one["fraction"]] / dices[one["against"], one["fraction"]]
        )
        for one in found["differences"]
        if "failed" not in one
    }
    report("compare", rows=rows, ratios=ratios, facts=facts, out=out)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
