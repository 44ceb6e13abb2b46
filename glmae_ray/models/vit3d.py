"""A 3-D vision transformer that encodes only the patches it is shown.

Letters: B views, C channels, ZYX voxels, N tokens, K kept tokens, M masked tokens, E embedding,
P voxel values of a patch. Module names are timm's (`patch_embed.proj`, `blocks.0.attn.qkv`, ...),
which are also those of the published GL-MAE encoder file. Grades as in docs/method.md: V read in a
first-hand source, L default of the same group's other code, D our decision.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Grid = tuple[int, int, int]


def patchify(volumes_BCZYX: Tensor, patch: Grid) -> Tensor:
    """Cut volumes into patches, (B, N, P); P runs over C, z, y, x as in a Conv3d weight."""
    b, c, *sides = volumes_BCZYX.shape
    (z, y, x), (pz, py, px) = patch_grid(sides, patch), patch
    cut = volumes_BCZYX.reshape(b, c, z, pz, y, py, x, px)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, z * y * x, c * pz * py * px)


def unpatchify(patches_BNP: Tensor, *, grid: Grid, patch: Grid) -> Tensor:
    """Put patches back together, (B, C, Z, Y, X): the inverse of `patchify`."""
    b, (z, y, x), (pz, py, px) = patches_BNP.shape[0], grid, patch
    cut = patches_BNP.reshape(b, z, y, x, -1, pz, py, px).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cut.reshape(b, -1, z * pz, y * py, x * px)


def patch_grid(sides: Grid | list[int], patch: Grid) -> Grid:
    """Patches along Z, Y and X."""
    z, y, x = (side // part for side, part in zip(sides, patch, strict=True))
    return z, y, x


@functools.lru_cache(maxsize=32)
def sincos_positions(
    grid: Grid, width: int, device: torch.device | None = None, temperature: float = 10000.0
) -> Tensor:
    """Fixed 3-D sine-cosine positions, (1 + N, width) float32; the first row, CLS, is zero.

    Per axis `width / 6` frequencies temperature^(-i / (width / 6)), sines before cosines, axes
    in the order Y, Z, X: the layout of MONAI's `build_sincos_position_embedding` (grade D; the
    zero of CLS is L). Exact for the grid at hand: 10^3 and 6^3 share nothing but the formula.
    """
    # Also where the teacher asks first: an inference tensor could not be used outside.
    with torch.inference_mode(False):
        frequencies = temperature ** -(torch.arange(width // 6).float() / (width // 6))
        z, y, x = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
        waves = []
        for axis in (y, z, x):
            angles = axis.reshape(-1, 1) * frequencies
            waves += [angles.sin(), angles.cos()]
        # Made on the CPU, the same bits everywhere, and kept on the device: steps copy nothing.
        return torch.cat([torch.zeros(1, width), torch.cat(waves, dim=1)]).to(device)


def interpolate_positions(table_NE: Tensor, *, grid: Grid, to: Grid) -> Tensor:
    """Positions of another grid by trilinear interpolation, (1 + M, E); the CLS row stays.

    Args:
        table_NE: (1 + N, E), CLS first, patches in the order of `grid`.
        grid: Patches along Z, Y, X. Three numbers and never a cube root: int(216 ** (1/3)) is 5.
        to: The grid that is wanted.
    """
    if grid == to:
        return table_NE
    cls, patches = table_NE[:1], table_NE[1:].T.reshape(1, -1, *grid)
    return torch.cat([cls, F.interpolate(patches, size=to, mode="trilinear").flatten(2)[0].T])


def gather_tokens(tokens_BNE: Tensor, index_BK: Tensor) -> Tensor:
    """Pick tokens (or patches) by number, (B, K, E)."""
    return tokens_BNE.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BNE.shape[-1]))


def _pick(tokens_BNE: Tensor, index_BK: Tensor | None) -> Tensor:
    return tokens_BNE if index_BK is None else gather_tokens(tokens_BNE, index_BK)


class PatchProjection(nn.Conv3d):
    """The Conv3d patch embedding (V), applied as a product to patches that are already cut out."""

    def forward(self, patches_BKP: Tensor) -> Tensor:
        """Embed patches, (B, K, E)."""
        return F.linear(patches_BKP, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection under timm's name."""

    def __init__(self, *, channels: int, patch: Grid, width: int) -> None:
        """Build a projection of `channels` x `patch` voxels to `width`."""
        super().__init__()
        self.proj = PatchProjection(channels, width, kernel_size=patch, stride=patch)

    def forward(self, patches_BKP: Tensor) -> Tensor:
        """Embed patches, (B, K, E)."""
        return self.proj(patches_BKP)


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernels."""

    def __init__(self, width: int, *, heads: int) -> None:
        """Split `width` over `heads`."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNE: Tensor, index_BK: Tensor | None = None) -> Tensor:
        """Mix tokens, (B, N, E); with an index give those only, (B, K, E)."""
        b, n, e = x_BNE.shape
        # Split before heads come to the front: its gradient is then put together in one pass.
        qkv_BNHD = self.qkv(x_BNE).reshape(b, n, 3, self.heads, -1).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in qkv_BNHD)
        mixed_BHND = F.scaled_dot_product_attention(query, key, value)
        return self.proj(_pick(mixed_BHND.transpose(1, 2).reshape(b, n, e), index_BK))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, *, hidden: int) -> None:
        """Expand `width` to `hidden` and back."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token, (..., E)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: LayerNorm eps 1e-6, MLP ratio 4, qkv bias (V)."""

    def __init__(self, width: int, *, heads: int) -> None:
        """Build attention and MLP of one width."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden=4 * width)

    def forward(self, x_BNE: Tensor, index_BK: Tensor | None = None) -> Tensor:
        """Transform tokens, (B, N, E); with an index those only, (B, K, E), which attend to all."""
        x = _pick(x_BNE, index_BK) + self.attn(self.norm1(x_BNE), index_BK)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """3-D ViT with a learned CLS token, a final norm (V) and positions for whatever grid it meets.

    Positions are fixed sin-cos, exact on any grid, unless a file brought a table of its own.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        *,
        channels: int,
        patch: Grid,
        width: int,
        depth: int,
        heads: int,
        recompute: bool = False,
    ) -> None:
        """Build `depth` blocks; weights start as in MAE's public code (Xavier uniform).

        Args:
            channels: Of the scans.
            patch: Voxels of a patch along Z, Y, X.
            width: E; divisible by 6 for the positions, and by `heads`.
            depth: Number of blocks.
            heads: Of the attention.
            recompute: Keep only each block's input for the backward pass (activation
                checkpointing).
        """
        super().__init__()
        self.patch, self.recompute = patch, recompute
        self.patch_embed = PatchEmbed(channels=channels, patch=patch, width=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads=heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("pos_embed", None)
        self.pos_grid: Grid | None = None
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)

    def adopt_positions(self, table_NE: Tensor, *, grid: Grid) -> None:
        """Use a table of positions in place of sin-cos; saved with the weights, never trained.

        Args:
            table_NE: (1 + N, E), CLS first.
            grid: Patches along Z, Y, X that it was made for; other grids are interpolated.
        """
        self.pos_embed = table_NE.detach().to(self.cls_token).unsqueeze(0)
        self.pos_grid = grid

    def positions(self, grid: Grid) -> Tensor:
        """Positions of a grid, (1 + N, E), CLS first, on the encoder's device."""
        if self.pos_embed is None or self.pos_grid is None:
            return sincos_positions(grid, self.cls_token.shape[-1], self.cls_token.device)
        return interpolate_positions(self.pos_embed[0], grid=self.pos_grid, to=grid)

    def forward(
        self,
        patches_BKP: Tensor,
        *,
        grid: Grid,
        kept_BK: Tensor | None = None,
        only_cls: bool = False,
    ) -> Tensor:
        """Encode patches, (B, 1 + K, E), CLS first.

        Args:
            patches_BKP: The visible patches only.
            grid: Patches along Z, Y, X of the whole view.
            kept_BK: Which of the N patches of the view these are; None: all, in order.
            only_cls: Give CLS alone, (B, 1, E), the same; the last block then skips the others.
        """
        x = self._embed(patches_BKP, grid, kept_BK)
        index_B1 = x.new_zeros((len(x), 1), dtype=torch.int64) if only_cls else None
        return self.norm(run_blocks(self.blocks, x, recompute=self.recompute, index_BK=index_B1))

    def taps(self, patches_BNP: Tensor, *, grid: Grid, after: Sequence[int]) -> list[Tensor]:
        """Tokens on their way through the blocks, and at last what `forward` gives.

        Args:
            patches_BNP: All patches of a view, in order.
            grid: Patches along Z, Y, X.
            after: Numbers of blocks, ascending, after which to look; no norm is applied there.

        Returns:
            Tensors (B, 1 + N, E), CLS first: one for each of `after`, and the normed last one.
        """
        x, seen, start = self._embed(patches_BNP, grid, None), [], 0
        for stop in after:
            x = run_blocks(self.blocks[start:stop], x, recompute=self.recompute)
            seen.append(x)
            start = stop
        return [*seen, self.norm(run_blocks(self.blocks[start:], x, recompute=self.recompute))]

    def _embed(self, patches_BKP: Tensor, grid: Grid, kept_BK: Tensor | None) -> Tensor:
        """Tokens with their positions, (B, 1 + K, E), CLS first."""
        x = self.patch_embed(patches_BKP)
        positions = self.positions(grid)
        x = x + (positions[1:] if kept_BK is None else positions[1:][kept_BK])
        cls = (self.cls_token + positions[0]).to(x.dtype)
        return torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)


def run_blocks(
    blocks: nn.ModuleList, x_BNE: Tensor, *, recompute: bool, index_BK: Tensor | None = None
) -> Tensor:
    """Apply blocks in turn.

    Args:
        blocks: Of one width.
        x_BNE: Tokens.
        recompute: Run a block again in the backward pass in place of keeping what is inside.
        index_BK: The tokens that are asked for, (B, K, E) then; None: all.
    """
    for number, block in enumerate(blocks, start=1):
        index = index_BK if number == len(blocks) else None
        if recompute and torch.is_grad_enabled():
            # Nothing in a block is random.
            x_BNE = checkpoint(block, x_BNE, index, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BNE = block(x_BNE, index)
    return x_BNE


def initialise(module: nn.Module) -> None:
    """Xavier-uniform matrices (the patch projection seen as one) and zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | PatchProjection):
            nn.init.xavier_uniform_(part.weight.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
