"""By how much the loss is multiplied under fp16, where DeepSpeed's own scale does not work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class LossScale:
    """By how much the loss is multiplied so that gradients fit into float16.

    It halves when one overflows and doubles after 2000 steps without, as torch's `GradScaler`.
    """

    value: float = 2.0**16
    steady: int = 0  # steps since it changed

    def follow(self, *, overflow: bool) -> None:
        """Count a step, in which a gradient overflowed or none did."""
        self.steady += 1
        if overflow:
            self.value, self.steady = self.value / 2, 0
        elif self.steady == 2000:
            self.value, self.steady = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be as another was."""
        self.value, self.steady = state["value"], state["steady"]
