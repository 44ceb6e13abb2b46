"""Files that are published in the background: a store that is slow or gone stops no step.

Each is published whole, as it is then, not more often than every few seconds; what fails is tried
again. One thread does it, which is there as long as anything waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from glmae_ray.paths import Place, publish

EVERY_S = 5.0  # between two publications of a file
_BUSY = 0.1  # share of the time that a file may take: one that grows is published less often

Tell = Callable[[str, str], None]  # kind of event, line


@dataclass
class _Parcel:
    """A file: how often it was put, and which of these was tried, and sent, last."""

    place: Place
    content: Callable[[], bytes]
    every_s: float
    put: int = 0
    tried: int = 0
    sent: int = 0
    due: float = 0.0  # of the monotonic clock


class Outbox:
    """Publishes what is put into it; for use by several threads."""

    def __init__(self, tell: Tell) -> None:
        """Start empty.

        Args:
            tell: Takes `late_write` when a store begins to fail, `written_again` when all that
                waited is in it.
        """
        self._tell = tell
        self._parcels: dict[str, _Parcel] = {}
        self._changed = threading.Condition()
        self._works = False
        self._flushes = 0  # that wait now
        self._failing: dict[str, float] = {}  # since when, by place

    def put(
        self, place: Place, content: Callable[[], bytes], *, every_s: float | None = None
    ) -> None:
        """Have a file published soon, in place of what waits for the same place.

        Args:
            place: Where.
            content: Gives all of it, when its turn comes; called by another thread.
            every_s: Seconds at least between two publications; None: `EVERY_S`; 0 for a file that
                is put once.
        """
        with self._changed:
            pause = EVERY_S if every_s is None else every_s
            parcel = self._parcels.setdefault(str(place), _Parcel(place, content, pause))
            parcel.content, parcel.every_s = content, pause
            parcel.put += 1
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="outbox", daemon=True).start()
            self._changed.notify_all()

    def flush(self, *, timeout_s: float) -> bool:
        """Publish all that waits now, once, without pauses; whether it is all in the store."""
        with self._changed:
            goals = [(parcel, parcel.put) for parcel in self._waiting()]
            for parcel, _ in goals:
                parcel.tried = parcel.sent
            self._flushes += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: all(parcel.tried >= goal for parcel, goal in goals), timeout_s
            )
            self._flushes -= 1
            return all(parcel.sent >= goal for parcel, goal in goals)

    def _waiting(self) -> list[_Parcel]:
        return [parcel for parcel in self._parcels.values() if parcel.sent < parcel.put]

    def _work(self) -> None:
        while (parcel := self._next()) is not None:
            self._send(parcel)

    def _next(self) -> _Parcel | None:
        """The next file, when it is due; None as soon as none waits."""
        with self._changed:
            while waiting := self._waiting():
                urgent = [p for p in waiting if self._flushes and p.tried < p.put]
                parcel = min(urgent or waiting, key=lambda p: p.due)
                left = 0.0 if urgent else parcel.due - time.monotonic()
                if left <= 0:
                    return parcel
                self._changed.wait(left)
            self._works = False
            return None

    def _send(self, parcel: _Parcel) -> None:
        number, began = parcel.put, time.monotonic()
        failure = None
        try:
            publish(parcel.place, parcel.content())
        except Exception as error:  # whatever it is, the thread is the only one that tries again
            failure = error
        self._note(parcel.place, failure)
        now = time.monotonic()
        with self._changed:
            parcel.tried = number
            parcel.due = now + parcel.every_s
            if failure is None:
                parcel.sent = number
                parcel.due = now + max(parcel.every_s, (now - began) / _BUSY)
                if not parcel.every_s and number == parcel.put:
                    del self._parcels[str(parcel.place)]
            else:
                parcel.due = now + max(parcel.every_s, EVERY_S)
            self._changed.notify_all()

    def _note(self, place: Place, failure: Exception | None) -> None:
        """Tell the first failure of an outage, and its end."""
        name = str(place)
        if failure is not None:
            told = bool(self._failing)
            self._failing.setdefault(name, time.monotonic())
            if not told:
                reason = " ".join(str(failure).split()) or type(failure).__name__
                where = "" if name in reason else f"{name}: "
                line = f"{where}{reason}; it stays in memory until it can be written"
                self._tell("late_write", line)
            return
        since = self._failing.pop(name, None)
        if since is not None and not self._failing:
            line = f"{name}: written again, after {time.monotonic() - since:.0f} s"
            self._tell("written_again", line)
