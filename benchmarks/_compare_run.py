"""Do the parts of a comparison one after the other, each as a process of `glmae`.

A part is cheap to begin again where it stopped, for that is what `glmae` itself does. One that
fails is told with its line, and the others go on; what needs it is left out.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType
from typing import Self

from benchmarks._compare_folder import tell_who
from benchmarks._compare_parts import Part
from glmae_ray.errors import StoppedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Runner:
    """Runs parts; a signal goes on to the one that runs, and ends the row."""

    def __init__(self, lock: int) -> None:
        """Take the locked file of the folder, which each part keeps open as long as it lives."""
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, parts: Sequence[Part]) -> dict[str, str]:
        """Do what is left of the parts, in their order.

        Returns:
            Title of each that failed -> why.

        Raises:
            StoppedError: A signal came; the part that ran has ended.
        """
        faults: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            self._leave_if_asked()
            head = f"[{number:{len(str(len(parts)))}}/{len(parts)}] {part.title}"
            if part.after in faults:
                faults[part.title] = f"not done: {part.after} failed"
                print(f"{head}: {faults[part.title]}", flush=True)
            elif not part.is_complete():
                began = time.monotonic()
                fault = self._do(part)
                self._leave_if_asked()
                if fault is not None:
                    faults[part.title] = fault
                said = "done" if fault is None else f"failed: {fault}; log: {part.log}"
                print(f"{head}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        return faults

    def _do(self, part: Part) -> str | None:
        """Run a part to its end; why it failed, if it did."""
        part.write_config()
        part.log.parent.mkdir(exist_ok=True)
        with part.log.open("ab") as log:
            begin = log.tell()
            # A session of its own: Ctrl-C reaches it through `_pass_on`, and so only once. What it
            # says goes into a file: a pipe would break it when this process is killed.
            self._process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lock],
                start_new_session=True,
            )
            tell_who(self._lock, f"process {self._process.pid}: {part.title} ({part.log})")
            if self._signal is not None:  # it came before there was a process
                self._process.send_signal(self._signal)
            status = self._process.wait()
            self._process = None
        if status != 0:
            return _reason(part, status, begin)
        if part.verb == "evaluate":
            part.keep_outcome()
        return None if part.is_complete() else "it ended without an error and is not complete"

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            name = signal.Signals(number).name
            print(f"{name}: waiting for what runs to save and end", flush=True)
            self._process.send_signal(number)

    def _leave_if_asked(self) -> None:
        if self._signal is not None:
            raise StoppedError(self._signal)


def _reason(part: Part, status: int, begin: int) -> str:
    """The line in which a command says why it failed."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    with part.log.open("rb") as log:
        log.seek(begin)
        lines = log.read().decode(errors="replace").strip().splitlines()
    start = f"glmae {part.verb}: "
    told = [
        line.removeprefix(start).removeprefix("failed: ")
        for line in lines
        if line.startswith(start)
    ]
    return "; ".join(told or lines[-1:]) or f"exit code {status}"
