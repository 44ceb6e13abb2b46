"""One worker's time between a start and an end of the run: what follows each step."""

from __future__ import annotations

import time
from typing import Any, Protocol

from glmae_ray import checkpoint
from glmae_ray.checkpoint import Checkpoint
from glmae_ray.config_train import TrainConfig
from glmae_ray.engine import Engine
from glmae_ray.errors import CommonError
from glmae_ray.jobs.hang import HangWatch
from glmae_ray.jobs.interval import Interval
from glmae_ray.jobs.meetings import Meetings, Orders
from glmae_ray.jobs.operator_metrics import OperatorMetrics
from glmae_ray.jobs.profiles import PROFILES
from glmae_ray.jobs.resuming import resume
from glmae_ray.jobs.saving import Saver
from glmae_ray.jobs.sittings import begin_sitting, ledger
from glmae_ray.loop import StepInfo
from glmae_ray.paths import to_place
from glmae_ray.ranks import Ranks
from glmae_ray.reading import Maker
from glmae_ray.tracking import CLOSE_S, Record, RunLog, flush, write_event
from glmae_ray.watch import Event


class HeldOut(Protocol):
    """What a run is measured on beside training."""

    def measure(self, step: int, log: RunLog | None) -> tuple[Record, float] | None:
        """Measure, and paint what there is to see. Collective.

        Args:
            step: Steps done.
            log: Takes pictures; rank 0 has one.

        Returns:
            What comes into the record, and the figure of which less is better, by which the best
            checkpoint is known; None where there is nothing to measure.
        """
        ...


class Beside(Protocol):
    """What is done beside training, in processes of its own."""

    def begin(self, step: int, log: RunLog | None) -> None:
        """Start what is due at the first step of a sitting. Collective."""
        ...

    def after(self, step: int, log: RunLog | None) -> None:
        """Start what is due, and write what has come. Collective."""
        ...

    def close(self, log: RunLog | None) -> None:
        """Wait for what is left of a run that is over, or stop it."""
        ...


class Sitting:
    """Logs, validates, saves, goes back, and ends, all workers at the same steps."""

    def __init__(
        self,
        cfg: TrainConfig,
        engine: Engine,
        *,
        ranks: Ranks,
        maker: Maker,
        held_out: HeldOut,
        beside: Beside | None = None,
    ) -> None:
        """Load the newest checkpoint and write down that a sitting begins. Collective.

        Args:
            cfg: The run, on as many workers as there are.
            engine: Holds the module.
            ranks: This worker among the others.
            maker: That of the samples.
            held_out: What is measured every `validation.every_steps`.
            beside: What is done beside training.
        """
        self._cfg, self._engine, self._ranks, self._maker = cfg, engine, ranks, maker
        self._held_out, self._beside = held_out, beside
        self._run = to_place(cfg.run)
        self._metrics = OperatorMetrics(cfg, rank=ranks.rank)
        found = resume(engine, self._run, ranks=ranks, tell=self.tell)
        self.start = found.step if found else 0
        self._passed: list[list[int]] = found.state["passed"] if found else []
        number = self._begin(found)
        self._metrics.begin(number)
        self._saver = Saver(self._run, cfg=cfg, ranks=ranks, sitting=number, tell=self.tell)
        self._meetings = Meetings(cfg, ranks=ranks, start=self.start)
        self._ledger = ledger(self._run, cfg=cfg, sitting=number, rank=ranks.rank)
        self._log: RunLog | None = None
        if ranks.rank == 0:
            self._log = RunLog(self._run, step=self.start, tensorboard=cfg.log.tensorboard)
        self._interval = Interval(cfg, log=self._log, metrics=self._metrics)
        self._hang = HangWatch(cfg.run, ranks=ranks, limit_s=_hang_s(cfg), tell=self.tell)
        self._gone_back_to: set[str] = set()

    def _begin(self, found: Checkpoint | None) -> int:
        """Write down that the sitting begins; its number."""
        if self._ranks.rank != 0:
            return self._ranks.told(-1)
        name = found.place.name if found else None
        number = begin_sitting(
            self._run, start=self.start, workers=self._ranks.size, checkpoint=name
        )
        for left in checkpoint.unfinished(self._run, before=number):
            checkpoint.remove(left)
        return self._ranks.told(number)

    def tell(self, event: Event) -> None:
        """Have what a person should read in the run's events, and count it."""
        write_event(self._run, event, rank=self._ranks.rank)
        self._metrics.event(event.kind)

    def begin(self) -> None:
        """Do what is due before the first step. Collective."""
        if self.start == 0:
            self.validate(step=0)
        if self._beside is not None:
            self._beside.begin(self.start, self._log)

    def after_step(self, info: StepInfo) -> bool:
        """Do what is due after a step; whether the run goes on, or is done. Collective."""
        cfg, step = self._cfg, info.step
        last = step == cfg.steps
        self._hang.beat(step)
        self._interval.add(info)
        self._metrics.step(info)
        if self._ledger:
            self._ledger(step)
        orders = self._meetings.after(step) or Orders(step)
        if step % cfg.log.every_steps == 0 or last or orders.save:
            for event in self._interval.write(self._engine, maker=self._maker):
                self.tell(event)
            if self._interval.skips_in_a_row >= cfg.optim.rewind_after and not last:
                self._go_back(step)
        val_loss = None
        if step % cfg.validation.every_steps == 0 or last:
            val_loss = self.validate(step=step)
        # Amid skipped steps nothing is new, and what can be gone back to would be pushed out.
        due = step % cfg.save.every_steps == 0 and not self._interval.skips_in_a_row
        if due or last or orders.save:
            wait = last or orders.leaving or orders.stop is not None
            self._save(step, val_loss=val_loss, wait=wait)
        if self._beside is not None:
            self._beside.after(step, self._log)
        self._hang.beat(step)
        return orders.stop is None or last

    def validate(self, *, step: int) -> float | None:
        """Measure what is held out; the figure of which less is better. Collective."""
        began = time.perf_counter()
        found = self._held_out.measure(step, self._log)
        if found is None:
            return None
        record, figure = found
        self._write_aside(step, began, record)
        return figure

    def __enter__(self) -> Sitting:
        """Sit."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the sitting; after an error without what the other workers would have to join."""
        self._hang.close()
        if kind is None:
            self.close()
        else:
            flush(self._run)

    def close(self) -> None:
        """End the sitting: what was saved is written. Collective."""
        self._hang.close()
        self._saver.close()
        if self._beside is not None:
            self._beside.close(self._log)
        if self._log is not None:
            self._log.close()
        flush(self._run, timeout_s=CLOSE_S)

    def _save(self, step: int, *, val_loss: float | None, wait: bool) -> None:
        began = time.perf_counter()
        state: dict[str, Any] = {
            "step": step,
            "samples": step * self._cfg.global_batch,
            "passed": self._passed,
            "val_loss": val_loss,
        }
        saved = self._saver.save(self._engine, state=state, wait=wait)
        self._meetings.saved(took_s=saved.took_s)
        self._metrics.saved(saved)
        self._write_aside(step, began, {"save_s": saved.held_s})
        if wait:
            self._meetings.saved_and_waited()

    def _go_back(self, step: int) -> None:
        """Take the weights of the last good checkpoint, and go on behind the samples so far."""
        bad = step - self._interval.skips_in_a_row
        self._saver.settle()
        found = resume(
            self._engine,
            self._run,
            ranks=self._ranks,
            tell=self.tell,
            wanted=lambda c: c.step <= bad and c.place.name not in self._gone_back_to,
        )
        if found is None:
            raise CommonError(
                f"step {step}: {self._interval.skips_in_a_row} steps in a row were skipped for "
                "numbers that are not finite, and there is no earlier checkpoint to go back to; "
                f"see events.jsonl for their cases, and try a lower {self._cfg.lr_field} or "
                "engine.precision=float32"
            )
        self._gone_back_to.add(found.place.name)
        self._passed = [*self._passed, [found.step, step]]
        self._interval.forget_skips()
        if self._ranks.rank == 0:
            facts = {"step": step, "to": found.step, "checkpoint": found.place.name}
            line = (
                f"step {step}: {self._cfg.optim.rewind_after} or more steps in a row were skipped; "
                f"weights, moments, teacher and centre are those of step {found.step} again, and "
                f"the samples of steps {found.step + 1} to {step} are left behind"
            )
            self.tell(Event("went_back", line, facts))

    def _write_aside(self, step: int, began: float, record: Record) -> None:
        """A record of what was done beside training, and how long it took."""
        if self._log is not None:
            aside = {"step": step, "samples": step * self._cfg.global_batch} | record
            self._log.write(aside | {"aside_s": time.perf_counter() - began})


def _hang_s(cfg: TrainConfig) -> float:
    return cfg.resources.hang_s or PROFILES[cfg.resources.profile].hang_s
