"""The gradient noise scale with prompts as the unit: how many prompts a step needs before more of them help little.

McCandlish et al., arXiv:1812.06162. Rollouts of one prompt share their baseline, so a prompt is one draw. The prompts
of an optimizer step are dealt to cells, and no micro-batch holds documents of two of them; a cell's gradient is caught
as autograd gives it, before DeepSpeed reduces, shards or clips anything. That costs no pass of the model and no memory
the size of a gradient: only a random projection of each cell's is kept, and the ranks add up theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlpost.types import Batch, Micro
from rlpost.world import World

CELLS = 8
"""More make the estimate surer, and the micro-batches of the step that is measured smaller."""
WIDTH = 65_521
"""Numbers of a projection, whose squared norm is off by about sqrt(2 / WIDTH), 0.6 %. A prime: the columns of a matrix
then fall everywhere. A gradient that is not longer is kept as it is."""
TILE = 1 << 22
"""Random signs, turned by a random angle for each part of the gradient that is as long."""
DECAY = 0.9
"""Of the moving means, for each measurement."""
LossOf = Callable[[Micro], tuple[Tensor, dict[str, Tensor]]]


def pair_estimate(sum_sq: float, cells_sq: float, counts: Sequence[int]) -> tuple[float, float]:
    """(|G|^2, tr Cov) of one prompt's gradient, both unbiased, from `counts` prompts in each of several cells.

    With x_p the share of a prompt in the sum Y of n gradients, y_j the sum of a cell and G = n E x, Cov = n^2 Cov x:

        E |Y|^2       = |G|^2 + tr Cov / n
        E sum |y_j|^2 = |G|^2 sum n_j^2 / n^2 + tr Cov / n

    For two sizes of batch that is appendix A of arXiv:1812.06162.

    >>> pair_estimate(sum_sq=10.0, cells_sq=7.0, counts=[1, 1])
    (6.0, 8.0)
    """
    total = sum(counts)
    share = sum(count * count for count in counts) / total**2
    grad_sq = (sum_sq - cells_sq) / (1 - share)
    return grad_sq, total * (sum_sq - grad_sq)


class Projection:
    """A random linear map of gradients to `width` numbers that keeps squared norms on average; the same on every rank.

    Each element has a random sign and is added to the place of its position modulo `width`: a count sketch (Charikar et
    al. 2002). Gradients that are not longer than `width` in all are laid end to end.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, device: torch.device, width: int = WIDTH) -> None:
        self.exact = sum(sizes) <= width
        self.width = sum(sizes) if self.exact else width
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))] if self.exact else [0] * len(sizes)
        dice = torch.Generator().manual_seed(seed)
        if not self.exact:
            self.signs = (torch.randint(0, 2, (TILE,), generator=dice, dtype=torch.int8) * 2 - 1).to(device)
        self.turns = [
            [] if self.exact else torch.randint(0, TILE, (-(-size // TILE), 2), generator=dice).tolist()
            for size in sizes
        ]

    def add(self, into_W: Tensor, index: int, gradient: Tensor) -> None:
        """Add the projection of gradient number `index`."""
        flat = gradient.detach().reshape(-1)
        if self.exact:
            into_W[self.starts[index] : self.starts[index] + len(flat)] += flat
            return
        for (turn, place), part in zip(self.turns[index], flat.split(TILE), strict=True):
            signed = torch.empty(-(-len(part) // self.width) * self.width, dtype=into_W.dtype, device=part.device)
            signed[len(part) :] = 0.0
            ahead = min(len(part), TILE - turn)
            torch.mul(part[:ahead], self.signs[turn : turn + ahead], out=signed[:ahead])
            torch.mul(part[ahead:], self.signs[: len(part) - ahead], out=signed[ahead : len(part)])
            folded = signed.view(-1, self.width).sum(0)
            into_W += folded.roll(place % self.width)


def cells_of(groups: Sequence[int], cells: int) -> dict[int, int]:
    """The cell of each group, dealt out in the order of their ids, whatever rank holds them.

    >>> cells_of([7, 3, 5], 2)
    {3: 0, 5: 1, 7: 0}
    """
    return {group: i % cells for i, group in enumerate(sorted(groups))}


class NoiseScale:
    """Measures an optimizer step every `every` steps, and remembers the moving means."""

    def __init__(self, world: World, *, every: int, group_size: int, width: int = WIDTH) -> None:
        self.world, self.every, self.group_size, self.width = world, every, group_size, width
        self.grad_sq, self.trace = 0.0, 0.0
        """Moving means that start at 0: the same factor would correct both, and only their ratio is shown."""
        self._step = -1
        self._seen: dict[str, float] = {}

    def cells(self, step: int) -> int:
        """Cells of the step's first optimizer step; 1: it is not measured."""
        self._step, self._seen = step, {}
        return CELLS if self.every and step % self.every == 0 else 1

    @contextmanager
    def watch(self, module: nn.Module, batch: Batch, loss_of: LossOf, *, first: bool = True) -> Iterator[LossOf]:
        """Within it, backward passes of what the given loss gives are measured, where the batch has cells.

        Only in the `first` update of a step: later epochs meet the same rollouts with a policy that has seen them.
        """
        counts = [count for count in batch.prompts if count]
        if len(counts) < 2 or not first:
            yield loss_of
            return
        params = [param for param in module.parameters() if param.requires_grad]
        sizes = [int(getattr(param, "ds_numel", param.numel())) for param in params]
        device = self.world.device
        projection = Projection(sizes, seed=self._step, device=device, width=self.width)
        sums_CW = torch.zeros(len(batch.prompts), projection.width, device=device)
        turn, cell = iter(batch.cells), [0]

        def watched(micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
            cell[0] = next(turn)
            return loss_of(micro)

        def catch(index: int) -> Callable[[Tensor], None]:
            return lambda gradient: projection.add(sums_CW[cell[0]], index, gradient)

        handles = [param.register_hook(catch(i)) for i, param in enumerate(params)]
        try:
            yield watched
        finally:
            for handle in handles:
                handle.remove()
        self.world.add(sums_CW)
        sums_CW = sums_CW.double() / self.world.size  # DeepSpeed's mean over ranks
        self._note(float(sums_CW.sum(0).square().sum()), float(sums_CW.square().sum()), counts)

    def _note(self, sum_sq: float, cells_sq: float, counts: Sequence[int]) -> None:
        grad_sq, trace = pair_estimate(sum_sq, cells_sq, counts)
        if not math.isfinite(grad_sq + trace):  # nor is the gradient, with which no step is taken
            return
        self.grad_sq = DECAY * self.grad_sq + (1 - DECAY) * grad_sq
        self.trace = DECAY * self.trace + (1 - DECAY) * trace
        prompts = sum(counts)
        self._seen = {"prompts": float(prompts), "grad_sq": grad_sq, "trace": trace}
        if self.grad_sq > 0 and self.trace > 0:
            scale = self.trace / self.grad_sq
            self._seen |= {"scale": scale, "scale_rollouts": scale * self.group_size}
            self._seen["step_frac"] = 1 / (1 + scale / prompts)

    def figures(self) -> dict[str, float]:
        """What was measured in this step; no scale while the mean of |G|^2 is lost in the noise."""
        return {f"noise/{name}": x for name, x in self._seen.items()}

    def state_dict(self) -> dict[str, Any]:
        """The moving means."""
        return {"grad_sq": self.grad_sq, "trace": self.trace}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.grad_sq, self.trace = state["grad_sq"], state["trace"]
