"""`python -m cluster.upload`: how much `ray job submit --working-dir .` would send from here."""

from __future__ import annotations

import logging
import tempfile
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package


def pack(folder: Path, target: Path) -> Path:
    """A folder as Ray packs it, without what .gitignore and .rayignore name."""
    quiet = logging.getLogger("cluster.upload")  # Ray would tell each ignore file
    create_package(str(folder), target, include_gitignore=True, excludes=[".git"], logger=quiet)
    return target


def main() -> None:
    """Print the size of the package, and which files make it so large."""
    with tempfile.TemporaryDirectory() as folder:
        package = pack(Path.cwd(), Path(folder) / "package.zip")
        with zipfile.ZipFile(package) as archive:
            files = sorted(archive.infolist(), key=lambda info: -info.compress_size)
        print(f"{package.stat().st_size / 1e6:.2f} MB in {len(files)} files; the largest:")
        for info in files[:5]:
            print(f"{info.compress_size / 1e6:9.3f} MB  {info.filename}")


if __name__ == "__main__":
    main()
