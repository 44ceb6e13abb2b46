"""The sections about data: which cases, which views of them, and who makes them."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from glmae_ray.config_base import Chances, Config, Jitter, Share, Size


class ViewsConfig(Config):
    """The views of one sample; grades as in docs/method.md."""

    global_count: PositiveInt = 2  # decision: ours
    local_count: PositiveInt = 8  # decision: ours
    global_size: Size = (160, 160, 160)  # verified
    local_size: Size = (96, 96, 96)  # verified
    # Crop as a share of each axis of the foreground box: lowest, highest. Decision: ours.
    global_scale: tuple[Share, Share] = (0.5, 1.0)
    local_scale: tuple[Share, Share] = (0.25, 0.5)
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6  # lineage; at random: verified
    # A view is read from the coarsest pyramid level on which its box has this share of the view's
    # voxels along each axis. Our decision: 0.75 differs from level 0 by less than a scanner's
    # noise and than resizing without anti-aliasing (docs/design/0003), at two thirds of the cost.
    level_share: PositiveFloat = 0.75
    # HU that become 0 and 1 in CT (verified: the paper's Table I; onto [0, 1]: lineage); other
    # modalities use the case's 0.5 and 99.5 percentiles (decision: ours).
    window: tuple[float, float] = (-1000.0, 1000.0)
    # Augmentation, off (lineage: none but the crop), one draw a view for all its channels.
    # A mirror image along Z, Y, X; one number: the same probability on every axis.
    flips: Chances = (0.0, 0.0, 0.0)
    # Contrast about the window's middle by 1 +- this; brightness by +- this share of the window.
    jitter_scale: Jitter = 0.0
    jitter_shift: Jitter = 0.0


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of a view's tokens stay visible: floor(tokens (1 - ratio)), but one at least."""
    # 1e-9 keeps 1000 * (1 - 0.6) = 399.99999999999994 from losing a token.
    return max(1, int(tokens * (1 - ratio) + 1e-9))


class SamplingConfig(Config):
    """Which cases a pass shows, and how often; expressions as in `glmae_ray/expressions.py`."""

    where: str = "split == 'train'"
    # Expression: factor of the weight of every case for which it holds; 0 leaves them out.
    weights: dict[str, NonNegativeFloat] = {}
    # Expression: part of the samples that its cases get together; each case is of exactly one.
    shares: dict[str, PositiveFloat] = {}

    @property
    def expressions(self) -> list[tuple[str, str]]:
        """Every expression behind the name of its field."""
        fields = {"where": [self.where], "weights": self.weights, "shares": self.shares}
        return [(f"sampling.{field}", text) for field, texts in fields.items() for text in texts]


class CacheLimits(NamedTuple):
    """Where a machine keeps what it read from an object store, and how many bytes at most."""

    folder: str
    size: int


class PipelineConfig(Config):
    """Who makes the views, how far ahead, and what happens where a case cannot be read."""

    prefetch_batches: NonNegativeInt = 4  # ready for each worker before it asks
    makers: PositiveInt | None = None  # tasks at a time at most; None: as many as find CPUs
    # CPUs of a task; None: 1, and half of one for a store on S3, where it mostly waits.
    cpus_per_maker: PositiveFloat | None = None
    # Where they run: custom resources that each takes, labels that its node has.
    resources: dict[str, PositiveFloat] = {}
    labels: dict[str, str] = {}
    on_error: Literal["error", "skip"] = "error"  # skip: another case stands in
    skip_warning: Share = 0.01  # share of the samples with a stand-in that is told
    patience_s: PositiveFloat = 60.0  # wait for a batch after which is told what is slow
    cache: str | None = None  # folder on each node for what comes from S3; None: kept nowhere
    cache_gb: PositiveFloat = 50.0

    @property
    def cache_limits(self) -> CacheLimits | None:
        """The cache as the store takes it."""
        return None if self.cache is None else CacheLimits(self.cache, int(self.cache_gb * 1e9))
