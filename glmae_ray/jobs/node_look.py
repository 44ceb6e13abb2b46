"""What a node of a cluster says of itself; goes to nodes by value, also where we are not installed.

Ray, which comes with psutil, is all that they need.
"""

from __future__ import annotations

import hashlib
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MISSING = "missing"
OURS = "glmae-ray"


def look(packages: Sequence[str]) -> dict[str, Any]:
    """The fields of `Look` in jobs/doctor_nodes.py, of the node that this task runs on.

    Args:
        packages: Whose versions are wanted.
    """
    import psutil
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    # Ray tells nobody where it spills but its own process on the node, above all its tasks.
    raylet = next(p for p in psutil.Process().parents() if p.name() == "raylet")
    options = dict(
        word.removeprefix("--").split("=", 1) for word in raylet.cmdline() if "=" in word
    )
    spill = options["fallback_directory"]
    disk = shutil.disk_usage(spill)
    return {
        "versions": versions(packages),
        "source": source(),
        "token": is_token_auth_enabled(),
        "store_folder": options["plasma_directory"],
        "spill_folder": spill,
        "spill_bytes": disk.total,
        "spill_free": disk.free,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def now() -> float:
    """Seconds since 1970, by the clock of the node."""
    return time.time()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of packages; of ours that of the code that runs, which a job may bring."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = MISSING
    try:
        import glmae_ray
    except ImportError:
        return found | {OURS: MISSING}
    return found | {OURS: glmae_ray.__version__}


def source() -> str:
    """What changes with any line of this project's code; empty where it is not installed."""
    try:
        import glmae_ray
    except ImportError:
        return ""
    folder, digest = Path(glmae_ray.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
