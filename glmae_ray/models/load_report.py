"""What became of all that an encoder's file holds, for people and as facts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from glmae_ray.models.encoder_formats import Axes
from glmae_ray.models.encoder_names import some

_RULES = ("axes", "heads", "positions", "channels")


@dataclass(frozen=True)
class LoadReport:
    """What was taken from a file, what was not, and the rules that filled the gaps.

    Attributes:
        source: The file.
        sha256: Of its bytes.
        part: `student` or `teacher`.
        loaded: Names in the encoder that came from the file.
        skipped: Names in the file that did not, each with the reason.
        missing: Names that the file could have had and has not.
        order: Of the file's axes.
        axes: The same, and how it is known.
        heads: Their number, and how it is known.
        positions: Where the encoder's positions come from.
        channels: The rule by which the patch kernel got the channels that were asked for.
        warnings: What may surprise.
        facts: What we wrote beside the file, if it is ours.
    """

    source: str
    sha256: str
    part: str
    loaded: tuple[str, ...]
    skipped: dict[str, str]
    missing: tuple[str, ...]
    order: Axes
    axes: str
    heads: str
    positions: str
    channels: str
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"encoder: {len(self.loaded)} tensors of the {self.part} from {self.source}"]
        lines += [f"{name}: {getattr(self, name)}" for name in _RULES]
        for reason, count in Counter(self.skipped.values()).items():
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"skipped: {count} {reason} ({some(names)})")
        if self.missing:
            lines.append(f"missing: {some(list(self.missing))}")
        return lines + [f"warning: {line}" for line in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON facts."""
        report = asdict(self)
        del report["facts"]
        return report | {"origin": self.origin()}

    def origin(self) -> dict[str, Any]:
        """Where the weights come from, by which rules, and what the file says of that itself."""
        origin = {name: getattr(self, name) for name in ("source", "sha256", "part", *_RULES)}
        before = self.facts.get("origin")
        return origin | {"origin": before} if before else origin
