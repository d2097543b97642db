"""What a decoder-only transformer costs, in parameters, floating-point operations and bytes: arithmetic, nothing else.

In the formulas: `L` layers, `D` hidden size, `H` query heads, `K` key-value heads, `d` size of a head, `M` size of the
MLP, `V` vocabulary. A multiplication with its addition is 2 FLOPs. A `pair` is a query and a key, in one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32 = 4
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a dense decoder with a gated MLP: the weights that are multiplied by.

    >>> shape = Shape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=10)
    >>> shape.attention_weights, shape.mlp_weights, shape.head_weights
    (384, 768, 80)
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    head_norms: bool = False
    """Queries and keys are normalised by head, as in Qwen3."""

    @property
    def attention_weights(self) -> int:
        """L D d (2 H + 2 K): queries, keys, values and the way out."""
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """3 L D M: gate, up and down."""
        return 3 * self.layers * self.hidden * self.mlp

    @property
    def head_weights(self) -> int:
        """D V; the embedding has as many, and multiplies by none."""
        return self.hidden * self.vocab


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of packed documents where a kernel skips what is masked: sum over documents of n (n + 1) / 2.

    >>> causal_pairs([3, 2])
    9
    """
    return sum(n * (n + 1) // 2 for n in lengths)


def full_pairs(rows: Sequence[int]) -> int:
    """Pairs of whole rows, masked ones too, which is what plain attention computes: sum over rows of n^2.

    >>> full_pairs([3, 2])
    13
    """
    return sum(n * n for n in rows)


def forward_flops(shape: Shape, *, positions: int, pairs: int, logits: int) -> int:
    """2 (attention + MLP weights) positions + 4 L H d pairs + 2 D V logits; `logits`: positions that the head sees."""
    return _linear(shape, positions) + _attention(shape, pairs) + 2 * shape.head_weights * logits


def backward_flops(
    shape: Shape,
    *,
    positions: int,
    pairs: int,
    logits: int,
    fused_attention: bool = False,
    checkpointed: bool = False,
    logits_again: bool = False,
) -> int:
    """Twice the forward pass, and what is computed anew: 5/2 of attention where fused, most of the layers, the logits.

    A fused kernel keeps no probabilities: FlashAttention-2, section 4.1, arXiv:2307.08691. A checkpointed layer runs
    forward again; where torch stops early, it saves the last product (2 D M a position), which is not counted on here.
    """
    attention = _attention(shape, pairs)
    whole = 2 * forward_flops(shape, positions=positions, pairs=pairs, logits=logits)
    if fused_attention:
        whole += attention // 2
    if checkpointed:
        whole += _linear(shape, positions) + attention
    if logits_again:
        whole += 2 * shape.head_weights * logits
    return whole


@dataclass(frozen=True, slots=True)
class Costs:
    """What a pass of one real model costs, by the layers that it has: adapters beside frozen weights too.

    A linear layer takes 2 FLOPs a weight and position forward, as many backward where its input has a gradient (`dx`),
    and again where it is trained (`dw`).

    >>> costs = Costs(weights=10, dx=10, dw=10, pair=4, head=5)
    >>> costs.forward(positions=3, pairs=2, logits=1), costs.needed(positions=3, pairs=2, logits=1)
    (78, 234)
    """

    weights: int
    """Of the linear layers below the head, as many as are multiplied by."""
    dx: int
    dw: int
    pair: int
    """FLOPs of a pair over all layers, 4 L H d."""
    head: int
    """Weights of the language-model head; 0 where there is none."""
    head_trained: bool = True
    fused_attention: bool = False
    checkpointed: bool = False
    non_embedding: int = 0
    """Parameters without embedding, head and adapters: the N of 6 N T."""

    @classmethod
    def of(cls, shape: Shape, *, fused_attention: bool = False, checkpointed: bool = False) -> Costs:
        """Those of a model of this shape, all of it trained."""
        weights = shape.attention_weights + shape.mlp_weights
        return cls(
            weights=weights,
            dx=weights,
            dw=weights,
            pair=_attention(shape, 1),
            head=shape.head_weights,
            fused_attention=fused_attention,
            checkpointed=checkpointed,
            non_embedding=weights,
        )

    def forward(self, *, positions: int, pairs: int, logits: int) -> int:
        """A forward pass."""
        return 2 * self.weights * positions + self.pair * pairs + 2 * self.head * logits

    def backward(self, *, positions: int, pairs: int, logits: int) -> int:
        """A backward pass as it runs: attention and layers again where they are computed anew, logits always."""
        again = self.pair * pairs // 2 if self.fused_attention else 0
        if self.checkpointed:
            again += 2 * self.weights * positions + self.pair * pairs
        return again + 2 * self.head * logits + self._gradients(positions, pairs, logits)

    def needed(self, *, positions: int, pairs: int, logits: int) -> int:
        """Forward and backward with nothing computed twice: what a utilisation counts (PaLM, arXiv:2204.02311)."""
        sizes = {"positions": positions, "pairs": pairs, "logits": logits}
        return self.forward(**sizes) + self._gradients(positions, pairs, logits)

    def generation(self, *, prompt: int, completions: Sequence[int], block: int, known: int = 0) -> int:
        """The answers to one prompt, of which each but the first finds whole blocks of `block` tokens computed.

        The first finds those of the `known` tokens that an earlier call has computed. The last token of a prompt is
        computed for every answer; block 0: nothing is found again.
        """
        total = 0
        for i, completion in enumerate(completions):
            there = prompt - 1 if i else min(known, prompt - 1)
            found = there // block * block if block else 0
            pairs = causal_pairs([prompt + completion - 1]) - causal_pairs([found])
            total += self.forward(positions=prompt + completion - 1 - found, pairs=pairs, logits=completion)
        return total

    def _gradients(self, positions: int, pairs: int, logits: int) -> int:
        head = self.head * (2 if self.head_trained else 1)
        return 2 * (self.dx + self.dw) * positions + 2 * self.pair * pairs + 2 * head * logits


def prefill_flops(shape: Shape, *, prompt: int) -> int:
    """Forward over a prompt, with logits at its end."""
    return forward_flops(shape, positions=prompt, pairs=causal_pairs([prompt]), logits=1)


def decode_flops(shape: Shape, *, prompt: int, completion: int) -> int:
    """Forward over all but the last of `completion` tokens, one at a time; prefill has given the first."""
    return forward_flops(
        shape, positions=completion - 1, pairs=decode_pairs(prompt=prompt, completion=completion), logits=completion - 1
    )


def decode_pairs(*, prompt: int, completion: int) -> int:
    """Sum over the steps s = 1 ... completion - 1 of what is looked at: prompt + s.

    >>> decode_pairs(prompt=5, completion=3)
    13
    """
    return causal_pairs([prompt + completion - 1]) - causal_pairs([prompt])


def cache_bytes(shape: Shape, itemsize: int) -> int:
    """2 L K d itemsize: keys and values of one position in the cache of the generator."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize


def state_bytes(num_params: int, itemsize: int, *, zero_stage: int, ranks: int) -> dict[str, int]:
    """What one rank holds of a module in training with AdamW, as DeepSpeed keeps it. ZeRO: arXiv:1910.02054.

    Stage 1 shards master copy and moments over the ranks, 2 the gradients as well, 3 the weights as well. Master copy,
    moments and the sum of gradients are float32. Stage 0, which trains float32 only, has no master copy; from stage 1
    on there is one for float32 weights too. In bfloat16, stage 1 keeps the gradients of the last micro-batch beside
    their sum.
    """
    shard = -(-num_params // ranks)
    gradient = FLOAT32 + (itemsize if zero_stage == 1 and itemsize < FLOAT32 else 0)
    return {
        "weights": (shard if zero_stage == 3 else num_params) * itemsize,
        "gradients": (shard if zero_stage >= 2 else num_params) * gradient,
        "master copy": shard * FLOAT32 if zero_stage else 0,
        "moments": 2 * FLOAT32 * (shard if zero_stage else num_params),
    }


def activation_bytes(shape: Shape, itemsize: int, *, positions: int, eager_row: int = 0, checkpointed: bool) -> int:
    """What the layers keep for the backward pass: bytes of a layer times `L`, or one layer and the inputs of all.

    Of a position in a layer, with b bytes an element: each of two norms keeps its input in float32 (4 D), the
    normalised (b D) and the scaled (b D), which is what the products take; attention its queries, its keys and values
    repeated for every query head, and its output, 4 b H d, with norms by head (4 + b) (H + K) d more; the MLP gate, up,
    the activated gate and their product, 4 b M. Plain attention over rows of `eager_row` also keeps its
    probabilities, in float32 and in the model's type.
    """
    b, width = itemsize, shape.heads * shape.head_dim
    layer = 2 * (FLOAT32 + 2 * b) * shape.hidden + 4 * b * width + 4 * b * shape.mlp
    if shape.head_norms:
        layer += (FLOAT32 + b) * (width + shape.kv_heads * shape.head_dim)
    layer += shape.heads * eager_row * (FLOAT32 if b == FLOAT32 else FLOAT32 + b)
    if checkpointed:
        return positions * (shape.layers * shape.hidden * b + layer)
    return positions * shape.layers * layer


def logits_bytes(shape: Shape, itemsize: int, *, chunk: int) -> int:
    """A chunk of the head at its peak: the product and three float32 tensors of its size (`[chunk, V]`); and the sum of
    the weight's gradient over chunks in float32 beside one summand (`[V, D]`)."""
    return chunk * shape.vocab * (itemsize + 3 * FLOAT32) + shape.head_weights * (FLOAT32 + itemsize)


def _linear(shape: Shape, positions: int) -> int:
    return 2 * (shape.attention_weights + shape.mlp_weights) * positions


def _attention(shape: Shape, pairs: int) -> int:
    return 4 * shape.layers * shape.heads * shape.head_dim * pairs
