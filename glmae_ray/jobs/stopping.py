"""Stop politely: a signal to the driver becomes a wish that the workers read where they meet."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import ray
from ray.experimental import internal_kv

from glmae_ray.errors import StoppedError

_NAMESPACE = b"glmae-stop"
_KNOCK_S, _HEAD_S = 2.0, 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_requested(run: str) -> str | None:
    """Name of the signal that asked a run to stop; None where none did."""
    found = internal_kv._internal_kv_get(run.encode(), namespace=_NAMESPACE)
    return None if found is None else found.decode()


def ask_to_stop(run: str, name: str) -> None:
    """Ask a run to stop, as its driver does when a signal of this name comes."""
    internal_kv._internal_kv_put(run.encode(), name.encode(), True, namespace=_NAMESPACE)


def fit_or_stop(fit: Callable[[], Any], *, run: str) -> None:
    """Run `fit` to its end; SIGINT or SIGTERM asks the workers to save and end, a second leaves.

    Ray Train's own handler would end the workers where they are.

    Args:
        fit: Trains; returns when the workers have ended.
        run: Which run is asked to stop.

    Raises:
        StoppedError: `fit` ended after a signal.
        KeyboardInterrupt: A second signal came before that.
    """
    ended, outcome = threading.Event(), _Outcome()

    def train() -> None:
        try:
            fit()
        except BaseException as error:
            outcome.error = error
        finally:
            ended.set()

    def ask(number: int, _: FrameType | None) -> None:
        if outcome.signal is not None:
            raise KeyboardInterrupt
        outcome.signal = number
        name = signal.Signals(number).name
        print(f"{name}: saving a checkpoint, then leaving; again: leave at once", file=sys.stderr)
        ask_to_stop(run, name)

    internal_kv._internal_kv_del(run.encode(), namespace=_NAMESPACE)
    if threading.current_thread() is not threading.main_thread():
        _fit_where_no_signal_comes(fit, run)
        return
    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        threading.Thread(target=train, daemon=True, name="fit").start()
        _wait_for(ended, outcome)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        internal_kv._internal_kv_del(run.encode(), namespace=_NAMESPACE)
    if outcome.error is not None:
        raise outcome.error
    if outcome.signal is not None:
        raise StoppedError(outcome.signal)


def _fit_where_no_signal_comes(fit: Callable[[], Any], run: str) -> None:
    """Run `fit` in the thread of an actor, whose driver may ask it to stop."""
    try:
        fit()
        if name := stop_requested(run):
            raise StoppedError(signal.Signals[name])
    finally:
        internal_kv._internal_kv_del(run.encode(), namespace=_NAMESPACE)


def _wait_for(ended: threading.Event, outcome: _Outcome) -> None:
    head = _Head()
    while not ended.wait(0.2):  # a signal is handled between two waits
        if head.is_lost():
            _leave_without_head()
    if outcome.error is not None and not head.answers():
        _leave_without_head()


class _Head:
    """Knocks at the cluster's head; Ray ends a driver without one after a minute, in its words."""

    def __init__(self) -> None:
        self._answered = self._asked = time.monotonic()

    def is_lost(self) -> bool:
        """Whether it has been silent for too long."""
        now = time.monotonic()
        if now - self._asked >= _KNOCK_S:
            self._asked = now
            if self.answers():
                self._answered = time.monotonic()
        return now - self._answered > _HEAD_S

    def answers(self) -> bool:
        """Whether it does now."""
        if not ray.is_initialized():
            return True
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
        except OSError:
            return False
        return True


def _leave_without_head() -> NoReturn:
    """End this process: to leave Ray in order takes a head."""
    line = (
        "the head of the cluster does not answer any more; start the cluster again, and the same "
        "command continues"
    )
    print(f"glmae pretrain: failed: {line}", file=sys.stderr, flush=True)
    os._exit(1)


class _Outcome:
    """What the two threads know of each other."""

    signal: int | None = None
    error: BaseException | None = None
