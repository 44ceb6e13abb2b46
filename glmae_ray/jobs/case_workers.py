"""Actors of Ray that do one case after the other, each with what it has loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

from glmae_ray.errors import UserError

Item = TypeVar("Item")

_CPUS = 4  # of an actor without a GPU: convolutions gain little from more


class Worker(Protocol):
    """What an actor is made of."""

    def do(self, item: Any) -> Any:
        """Do one case."""


class Failed(NamedTuple):
    """In place of a result: the case could not be done, or the process that was at it is gone."""

    reason: str


class _Crew(NamedTuple):
    """How many actors there are, and what each is given."""

    actors: int
    cpus: int
    gpus: int


def over_cases(
    make: Callable[..., Worker], *args: Any, todo: Sequence[Item], workers: int | None = None
) -> Iterator[tuple[Item, Any]]:
    """Every item with what `make(*args).do(item)` gives, as they finish.

    A process that dies, such as of too little memory, costs the item that it was at.

    Args:
        make: A class; each actor is one of it.
        *args: Of the class.
        todo: The items.
        workers: Actors at most; None: one a GPU, or without any one for every 4 CPUs.

    Raises:
        UserError: An actor cannot be made.
        Exception: What `do` raises.
    """
    import ray  # after ray_session has set what Ray reads when it is imported

    crew = _crew(ray.cluster_resources(), ray.nodes(), workers)
    kind = ray.remote(num_cpus=crew.cpus, num_gpus=crew.gpus)(make)
    idle = [kind.remote(*args) for _ in range(min(crew.actors, len(todo)))]
    queue, flying = iter(todo), {}
    while True:
        for item in islice(queue, len(idle)):
            actor = idle.pop()
            flying[actor.do.remote(item)] = actor, item
        if not flying:
            return
        (done,), _ = ray.wait(list(flying), num_returns=1)
        actor, item = flying.pop(done)
        try:
            result = ray.get(done)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            if getattr(error, "actor_init_failed", False):
                raise UserError(f"workers cannot start: {str(error).splitlines()[-1]}") from None
            line = " ".join(str(error).split())[:200]
            result = Failed(f"the process at it died ({line}); too large for the memory?")
            actor = kind.remote(*args)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None
        idle.append(actor)
        yield item, result


def _crew(total: dict[str, float], nodes: Sequence[Any], workers: int | None) -> _Crew:
    gpus = int(total.get("GPU", 0))
    if gpus:
        return _Crew(min(gpus, workers or gpus), cpus=1, gpus=1)
    each = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    cpus = max(1, min(_CPUS, max(each)))
    actors = max(1, sum(own // cpus for own in each))
    return _Crew(min(actors, workers or actors), cpus, gpus=0)
