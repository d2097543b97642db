"""Log-probs and entropies of given tokens from hidden states, without the logits of all of them.

Logits `[n, V]` are alive for `chunk` tokens at a time, in the forward pass and again in the backward pass, which makes
them anew: a fourth matrix product in exchange for memory that does not grow with the number of tokens `N`. Both passes
work in place on few buffers, so most of the time goes to the products. `D` is the width of a hidden state.

No fused kernel stands beside this. Liger 0.8.5 has one that gives log-prob and entropy, its
`LigerFusedLinearScaledCrossEntropyFunction`: for Hopper GPUs, in bfloat16, without bias, soft cap and scale, its weight
gradient summed in bfloat16. On any other device it is chunked torch as here, but rounds logits, entropies
and sums to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096
"""Rows of the weight that are alive in float32 at once, where it is kept in less."""


@dataclass(frozen=True, slots=True)
class Head:
    """How logits come from hidden states, beside the weight: `temperature` divides them last.

    >>> Head(temperature=0.5).chunk
    512
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    """Logits are bounded by `cap tanh(logits / cap)`."""
    chunk: int = 512
    """Tokens whose logits are alive at once."""
    entropy_grad: bool = False
    """Whether the entropy has a gradient; without it the entropy is only a figure."""
    exact: bool = False
    """Whether all products are made in float32, also of weights that are kept in less: a float32 head."""

    def dtype(self, weight_VD: Tensor) -> torch.dtype:
        """Of the factors of the products."""
        return torch.promote_types(weight_VD.dtype, torch.float32) if self.exact else weight_VD.dtype

    def blocks(self, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The weight as a factor, in pieces of the vocabulary where that takes a copy."""
        dtype = self.dtype(weight_VD)
        size = len(weight_VD) if dtype == weight_VD.dtype else BLOCK
        return ((block, weight_VD[block].to(dtype)) for block in _chunks(len(weight_VD), size))

    def logits(self, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits `[n, V]`, at least float32, whatever the weights are kept in."""
        dtype = self.dtype(weight_VD)
        if dtype == weight_VD.dtype:
            product_nV = torch.nn.functional.linear(hidden_nD, weight_VD, bias_V)
        else:
            hidden_nD = hidden_nD.to(dtype)
            product_nV = hidden_nD.new_empty(len(hidden_nD), len(weight_VD))
            for block, weight_vD in self.blocks(weight_VD):
                torch.mm(hidden_nD, weight_vD.T, out=product_nV[:, block])
            product_nV = product_nV if bias_V is None else product_nV.add_(bias_V)
        logits_nV = product_nV.to(torch.promote_types(product_nV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_nV = logits_nV.mul_(self.scale)
        if self.softcap:
            logits_nV = logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV if self.temperature == 1.0 else logits_nV.div_(self.temperature)


def token_logp(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, head: Head
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution `[N]`, at least float32, in nats."""
    logp_N, entropy_N, _ = _TokenLogp.apply(hidden_ND, weight_VD, bias_V, target_N, head)
    return logp_N, entropy_N


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        pieces = []
        for rows in _chunks(len(target_N), head.chunk):
            logits_nV = head.logits(hidden_ND[rows], weight_VD, bias_V)
            at_target_n = logits_nV.gather(-1, target_N[rows, None]).squeeze(-1)
            top_n = logits_nV.amax(-1, keepdim=True)
            # H = log Z - sum(z e^z) / Z with z = logits - top: no second softmax, no second buffer but e^z.
            exp_nV = logits_nV.sub_(top_n).exp()
            total_n = exp_nV.sum(-1)
            mean_n = exp_nV.mul_(logits_nV).sum(-1) / total_n
            log_total_n = total_n.log()
            lse_n = log_total_n + top_n.squeeze(-1)
            pieces.append((at_target_n - lse_n, log_total_n - mean_n, lse_n))
        logp_N, entropy_N, lse_N = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return logp_N, entropy_N, lse_N

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden_ND, weight_VD, bias_V, target_N, head = inputs
        _, entropy_N, lse_N = output
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, lse_N, entropy_N)
        ctx.head = head
        ctx.mark_non_differentiable(lse_N, *([] if head.entropy_grad else [entropy_N]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor, grad_entropy_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, lse_N, entropy_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        head: Head = ctx.head
        total = lse_N.dtype  # chunks add up in float32, where the weights' own dtype would round each sum
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=total) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=total) if wants_bias and bias_V is not None else None
        for rows in _chunks(len(target_N), head.chunk):
            logits_nV = head.logits(hidden_ND[rows], weight_VD, bias_V)
            saved_n, grads_n = (lse_N[rows], entropy_N[rows]), (grad_logp_N[rows], grad_entropy_N[rows])
            grad_nV = _grad_of_logits(logits_nV, target_N[rows], saved_n, grads_n, head)
            if grad_bias_V is not None:
                grad_bias_V += grad_nV.sum(0)
            grad_nV = grad_nV.to(head.dtype(weight_VD))
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = _product(grad_nV, head.blocks(weight_VD))
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_nV.T, hidden_ND[rows].to(grad_nV.dtype))
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        grad_bias = None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND, grad_weight, grad_bias, None, None


def _grad_of_logits(
    logits_nV: Tensor,
    target_n: Tensor,
    saved_n: tuple[Tensor, Tensor],
    grads_n: tuple[Tensor, Tensor],
    head: Head,
) -> Tensor:
    """The gradient for the head's product `[n, V]`; overwrites `logits_nV`.

    d logp / dz_v = [v = target] - p_v;   dH / dz_v = -p_v (log p_v + H)
    """
    (lse_n, entropy_n), (grad_logp_n, grad_entropy_n) = saved_n, grads_n
    slope_nV = None
    if head.softcap:
        slope_nV = 1 - (logits_nV * (head.temperature / head.softcap)).square_()
    log_p_nV = logits_nV.sub_(lse_n[:, None])
    if head.entropy_grad:
        p_nV = log_p_nV.exp()
        log_p_nV.add_(entropy_n[:, None]).mul_(grad_entropy_n[:, None]).add_(grad_logp_n[:, None])
        grad_nV = log_p_nV.mul_(p_nV).neg_()
    else:
        grad_nV = log_p_nV.exp_().mul_(-grad_logp_n[:, None])
    grad_nV.scatter_add_(-1, target_n[:, None], grad_logp_n[:, None].to(grad_nV.dtype))
    if slope_nV is not None:
        grad_nV.mul_(slope_nV)
    factor = head.scale / head.temperature
    return grad_nV if factor == 1.0 else grad_nV.mul_(factor)


def _product(grad_nV: Tensor, blocks: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """grad @ weight `[n, D]`, summed over the weight's pieces."""
    block, weight_vD = next(blocks)
    product_nD = grad_nV[:, block] @ weight_vD
    for block, weight_vD in blocks:
        product_nD.addmm_(grad_nV[:, block], weight_vD)
    return product_nD


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the product in the dtype of its factors and the sum in that of the total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, count)) for start in range(0, max(count, 1), chunk))
