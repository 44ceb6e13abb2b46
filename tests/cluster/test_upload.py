"""What `ray job submit --working-dir .` takes along."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from cluster.upload import main, pack
from tests.cluster.machine import ROOT

LIMIT = 5 << 20  # bytes; Ray's own limit is a hundred times that


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The repository as Ray packs it."""
    return pack(ROOT, tmp_path_factory.mktemp("package") / "package.zip")


def test_the_upload_is_small(package):
    assert package.stat().st_size < LIMIT, f"{package.stat().st_size / 1e6:.1f} MB"


def test_the_upload_has_what_a_run_needs_and_no_more(package):
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "glmae_ray").rglob("*.py")}
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert code | configs <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".git", ".venv", "docs", "tests", "shared", "runs"}


def test_stores_and_runs_in_the_working_dir_stay_at_home(tmp_path):
    for name in ("ct.zarr/cases/a/0", "runs/first/metrics.jsonl", "glmae_ray/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    with zipfile.ZipFile(pack(tmp_path, tmp_path / "p.zip")) as archive:
        files = [name for name in archive.namelist() if not name.endswith("/")]
    assert [name for name in files if name.endswith(("0", ".jsonl", "a.py"))] == ["glmae_ray/a.py"]


def test_the_size_is_told(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    main()
    first, *largest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\.\d\d MB in \d+ files; the largest:", first)
    assert len(largest) == 5
