"""How much of a run's time do checkpoints take, and how large are they?

    python -m benchmarks.checkpoint [--quick] --out FILE.json

Preset `small` in float32, 2 views of 96^3 and 8 of 64^3, 1 sample a step, a checkpoint every 25
steps. One training takes turns: 25 steps without a checkpoint, 25 behind one that is written in
the background, 25 behind one that training waits for, each to the disk (of TMPDIR) and to a
stand-in for an object store that takes in 50 MB/s over loopback. Engine, loop and saver are those
of `glmae pretrain`.

Lost is the time for which training stood still, and what steps beside a write took more than the
median of the others behind the same checkpoint (of those without a checkpoint, if the write was
beside all). A step's length decides which share that is; the table has the shortest step with
which it would be 5 %. The walls of 25 steps with and without are the check on it, noisier.

Bytes are expected for float32 weights, teacher and two moments of AdamW; from ZeRO stage 1 on
DeepSpeed adds a copy of the weights that its optimizer steps on.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks._checkpoint_measure import EVERY, Block, Mode, Weighed, measure_blocks, weigh
from benchmarks._checkpoint_server import BUCKET, slow_bucket
from benchmarks._report import arguments, environment, report, spread

_PACKAGES = ["deepspeed", "numpy", "s3fs", "torch"]
_STORE_RATE = 50e6  # bytes a second: one modest link
_MOST = 0.05  # of the wall time: our decision
_NONE, _DISK, _STORE = "no checkpoint", "disk", "object store"
_BEHIND, _WAITING = "in the background", "training waits"
_SIZES = [(stage, workers) for stage in (0, 2) for workers in (1, 2)]

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    args = arguments((__doc__ or "").splitlines()[0])
    facts = environment(_PACKAGES)
    with tempfile.TemporaryDirectory(prefix="glmae-bench-") as folder:
        weighed = {size: _weighed(Path(folder), *size) for size in _SIZES}
        blocks = _blocks(Path(folder), rounds=3 if args.quick else 8, threads=facts["cores"])
    sizes = [size_row(found, stage, workers) for (stage, workers), found in weighed.items()]
    times = [time_row(name, found, blocks[_NONE]) for name, found in blocks.items()]
    ratios = _time_ratios(times) | {
        f"bytes, ZeRO {row['ZeRO stage']}, workers {row['workers']}: found / expected": row[
            "found / expected"
        ]
        for row in sizes
    }
    report("checkpoint", rows=[*times, *sizes], ratios=ratios, facts=facts, out=args.out)


def _blocks(folder: Path, *, rounds: int, threads: int) -> dict[str, list[Block]]:
    modes = [Mode(_NONE)]
    for place, url in ((_DISK, str(folder)), (_STORE, BUCKET)):
        for how, behind in ((_BEHIND, True), (_WAITING, False)):
            run = f"{url}/{'behind' if behind else 'waiting'}"
            modes.append(Mode(f"{place}, {how}", run, background=behind))
    with slow_bucket(rate=_STORE_RATE) as variables, _processes(1) as pool:
        options = {"rounds": rounds, "threads": threads}
        return pool.submit(measure_blocks, modes, variables, **options).result()


def _weighed(folder: Path, stage: int, workers: int) -> Weighed:
    run = folder / f"stage-{stage}-{workers}"
    with _processes(workers) as pool:
        port = _free_port()
        options = {"stage": stage, "workers": workers, "port": port}
        futures = [pool.submit(weigh, run, rank=rank, **options) for rank in range(workers)]
        first, *_ = [future.result() for future in futures]
        return first


def time_row(name: str, blocks: Sequence[Block], without: Sequence[Block]) -> Row:
    """What checkpoints of one mode cost; a block of each round.

    Args:
        name: Of the mode.
        blocks: Its blocks.
        without: Those of the same rounds without a checkpoint.
    """
    row: Row = {
        "what": name,
        "checkpoints": len(blocks),
        f"wall of {EVERY} steps, s": spread([block.wall_s for block in blocks], digits=3),
    }
    if name == _NONE:
        seconds = [second for block in blocks for second in block.step_s]
        return row | {"a step, s": spread(seconds, digits=3)}
    pairs = list(zip(blocks, without, strict=True))
    slowed = [block.slowed_s(_undisturbed_s(block, other)) for block, other in pairs]
    lost = [block.held_s + more for block, more in zip(blocks, slowed, strict=True)]
    shares = [each / block.wall_s for each, block in zip(lost, blocks, strict=True)]
    return row | {
        "stood still, s": spread([block.held_s for block in blocks], digits=3),
        "of CPU": spread([block.held_cpu_s for block in blocks], digits=3),
        "written in, s": spread([_length_s(block) for block in blocks], digits=3),
        "steps slowed by, s": spread(slowed, digits=3),
        "lost, s": spread(lost, digits=3),
        "lost / wall": spread(shares),
        "wall / without": spread([block.wall_s / other.wall_s for block, other in pairs]),
        "5 % from a step of, s": round(shortest_step_s(statistics.median(lost)), 3),
    }


def shortest_step_s(lost_s: float) -> float:
    """Seconds of the step with which a checkpoint every 25 costs no more than it may."""
    return lost_s * (1 - _MOST) / (_MOST * EVERY)


def size_row(found: Weighed, stage: int, workers: int) -> Row:
    """A checkpoint's bytes against what its numbers take in float32."""
    total = sum(found.files.values())
    expected = 4 * (3 * found.trained + found.teacher)
    return {
        "what": "bytes",
        "ZeRO stage": stage,
        "workers": workers,
        "weights, MB": round(4 * found.trained / 1e6, 1),
        "teacher, MB": round(4 * found.teacher / 1e6, 1),
        "expected, MB": round(expected / 1e6, 1),
        "found, MB": round(total / 1e6, 1),
        "found / expected": round(total / expected, 4),
        "found / weights": round(total / (4 * found.trained), 3),
        "largest files, MB": _largest(found.files),
    }


def _largest(files: Mapping[str, int]) -> str:
    sizes = sorted(files.values(), reverse=True)
    return " + ".join(f"{size / 1e6:.1f}" for size in sizes if size > 1e6)


def _undisturbed_s(block: Block, without: Block) -> float:
    return statistics.median(block.step_s or without.step_s)


def _length_s(block: Block) -> float:
    return sum(end - begin for begin, end in block.writes)


def _time_ratios(rows: Sequence[Row]) -> dict[str, float]:
    by_name = {row["what"]: row for row in rows}
    ratios = {}
    for place in (_DISK, _STORE):
        behind, waiting = (by_name[f"{place}, {how}"] for how in (_BEHIND, _WAITING))
        for row in (behind, waiting):
            ratios[f"{row['what']}: time lost / wall time"] = row["lost / wall"]["median"]
            ratios[f"{row['what']}: wall / without checkpoints"] = row["wall / without"]["median"]
        ratios[f"{place}: lost {_BEHIND} / where {_WAITING}"] = (
            behind["lost, s"]["median"] / waiting["lost, s"]["median"]
        )
    return ratios


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
