"""The image: of the project's versions, with what it needs, and written as it should be."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cluster.machine import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"


@pytest.fixture(scope="module")
def text() -> str:
    return DOCKERFILE.read_text()


def test_hadolint_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_has_the_python_and_the_torch_of_the_constraints(text):
    # The constraints are of the Python that runs the tests.
    assert f"uv venv --python {sys.version_info[0]}.{sys.version_info[1]} " in text
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert (
        f"Programming Language :: Python :: {sys.version_info[0]}.{sys.version_info[1]}"
        in classifiers
    )
    # Torch's builds for a CUDA differ in what follows the +, which == of the constraints allows.
    assert "\"$(grep '^torch==' constraints.txt)+${TORCH}\"" in text
    assert text.count("--constraint constraints.txt") == text.count("uv pip install") - 1
    base = re.search(r"^ARG CUDA=(\d+)\.(\d+)", text, re.MULTILINE)
    assert f"ARG TORCH=cu{base[1]}{base[2]}\n" in text


def test_it_runs_as_nobody_special_and_compiles_nothing(text):
    *_, last_user = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert last_user == "1000"  # that of kubernetes/base
    assert "DS_BUILD_OPS=0" in text
    assert not re.search(r"TOKEN|PASSWORD|SECRET", text)


def test_what_is_copied_is_sent_to_the_build_and_nothing_else(text):
    first, *back = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith(("#", "**"))
    ]  # fmt: skip
    assert first == "*"
    sent = {line.removeprefix("!") for line in back}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    copied = {source.split("/")[0] for line in copies for source in line.split()}
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)
    for name in (".git", ".venv", "shared", "runs", "tests"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in sent)


def test_it_has_what_scripts_and_hooks_call(text):
    packages = re.search(r"--no-install-recommends \\\n\s+(.*) \\\n", text)[1].split()
    # pkill and pgrep of the head's preStop, curl of node.sh, git of a run's environment.json
    assert {"procps", "curl", "git"} <= set(packages)
    assert "[cluster," in text  # Ray's dashboard
