"""What N ranks saved in shares, as whole tensors of which any number of ranks can take theirs.

DeepSpeed's converter writes master weights, moments and step counts of what is trained. It leaves
out the rest: the teacher, which is frozen, and buffers such as the centre. They are added here.

FOLDER/
  engine/       the files of every rank's `Engine.snapshot`
  universal/    what `to_universal` makes of it
    zero/       a folder for each trained parameter, and the optimizer's settings
    *_model_states.pt   DeepSpeed's counters, and what `Engine.snapshot` added to them
    rest.pt     {name: tensor} of frozen parameters and buffers
    files.json  {file: sha256} of all others, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmae_ray.paths import UNFINISHED

SAVED, UNIVERSAL = "engine", "universal"  # the tags under which DeepSpeed finds them
_REST, _FILES = "rest.pt", "files.json"
_WHOLE = "mp_rank_00_model_states.pt"  # stages 1 and 2: every weight
_SHARE = "zero_pp_rank_{}_mp_rank_00_model_states.pt"  # stage 3: a rank's share of the frozen ones
_OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_WEIGHTS = ("module", "frozen_param_fragments")  # in a file of model states
_CONVERT = "from deepspeed.checkpoint import ds_to_universal as it; it.main(it.parse_arguments())"


def to_universal(folder: Path, out: Path) -> None:
    """Make `out/universal` of `folder/engine`, which may come from any number of ranks.

    Needs no process group, GPU or compiler; let one process do it. What an earlier call has made
    is replaced in one piece: whatever is killed leaves the old one, the new one or none.

    Args:
        folder: With the files of every rank's `Engine.snapshot` at ZeRO stage 1, 2 or 3.
        out: What `Engine.load` will be given; may be the same.

    Raises:
        FileNotFoundError: A file is not there, of those that the ranks wrote.
        RuntimeError: DeepSpeed cannot convert it, for the reason that it gives.
    """
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(f"{UNIVERSAL}.*{UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)  # of a converter that outlived its caller, maybe
    with tempfile.TemporaryDirectory(UNFINISHED, prefix=f"{UNIVERSAL}.", dir=out) as name:
        made = _make(Path(name), (folder / SAVED).absolute())
        if (out / UNIVERSAL).exists():
            (out / UNIVERSAL).rename(Path(name, "replaced"))
        made.rename(out / UNIVERSAL)


def read_rest(folder: Path) -> dict[str, Tensor]:
    """Frozen parameters and buffers by name, of a folder `universal` that is whole.

    Raises:
        FileNotFoundError: There is none in this folder, or it is not as it was made.
    """
    made = folder / UNIVERSAL
    try:
        expected = json.loads((made / _FILES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        expected = None
    if expected is None or _digests(made) != expected:
        raise FileNotFoundError(f"{made}: not there, or not as to_universal has made it")
    return torch.load(made / _REST, map_location="cpu", weights_only=True)


def _make(work: Path, saved: Path) -> Path:
    """The folder as it will be published, in a folder of its own."""
    made, first = work / UNIVERSAL, _first(saved)
    states = _model_states(saved)
    rest = _rest(states)
    _convert(work, saved)
    for name in rest:  # DeepSpeed copies those of stages 1 and 2, and never reads them
        shutil.rmtree(made / "zero" / name, ignore_errors=True)
    torch.save(rest, made / _REST)
    for file in made.glob(_SHARE.format("*")):
        file.unlink()
    kept = {key: value for key, value in states[0].items() if key not in _WEIGHTS}
    torch.save(kept, made / first)
    (made / _FILES).write_text(json.dumps(_digests(made), indent=1), encoding="utf-8")
    return made


def _first(saved: Path) -> str:
    """The file of model states that rank 0 wrote."""
    return _WHOLE if (saved / _WHOLE).exists() else _SHARE.format(0)


def _model_states(saved: Path) -> list[dict[str, Any]]:
    """What is in each file of model states."""
    first = _read(saved / _first(saved))
    ranks = range(first["dp_world_size"])
    for rank in ranks:
        (saved / _OPTIMIZER.format(rank)).stat()  # the converter takes what it finds for all
    if first["global_steps"] == first["skipped_steps"]:
        raise RuntimeError(f"{saved}: no step was taken, so there are no moments to convert")
    if _first(saved) == _WHOLE:
        return [first]
    return [first, *(_read(saved / _SHARE.format(rank)) for rank in ranks[1:])]


def _read(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _rest(states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Frozen parameters and buffers by name; of stage 3 the former are in shares."""
    first = states[0]
    trained = set().union(*first["param_shapes"])
    rest = {name: value for name, value in first["module"].items() if name not in trained}
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        shares = [of_rank["frozen_param_fragments"][name].flatten() for of_rank in states]
        rest[name] = torch.cat(shares)[: shape.numel()].view(shape)  # the last share is padded
    return rest


def _convert(work: Path, saved: Path) -> None:
    """Let DeepSpeed write `work/universal`."""
    # Under names that it can take for patterns; it looks for files with glob and re.
    (work / SAVED).symlink_to(saved, target_is_directory=True)
    options = ["--input_folder", SAVED, "--output_folder", UNIVERSAL, "--inject_missing_state"]
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, *options],
        cwd=work,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode
        raise RuntimeError(f"{saved}: DeepSpeed cannot convert it: {reason}")


def _digests(made: Path) -> dict[str, str]:
    """The sha256 of every file but the list of them."""
    digests = {}
    for file in sorted(made.rglob("*")):
        if file.is_file() and file.name != _FILES:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            digests[file.relative_to(made).as_posix()] = digest
    return digests
