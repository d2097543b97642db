"""Log-probs and entropies in chunks against plain torch: values, gradients, and what is alive at once."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlpost.head import Head, token_logp
from tests.bench import logp

N, D, V = 13, 6, 11


def plain(hidden, weight, bias, target, head):
    """The textbook way: all logits, log_softmax, autograd."""
    logits = nn.functional.linear(hidden, weight, bias) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / head.temperature, -1)
    return logp.gather(-1, target[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def case(*, bias=True, dtype=torch.float64, seed=0, n=N):
    dice = torch.Generator().manual_seed(seed)
    shapes = [(n, D), (V, D), *([(V,)] if bias else [])]
    tensors = [(2 * torch.randn(shape, generator=dice, dtype=torch.float64)).to(dtype) for shape in shapes]
    target = torch.randint(V, (n,), generator=dice)
    up = [torch.randn(n, generator=dice, dtype=torch.float64) for _ in range(2)]
    return tensors, target, up


def results(function, head, *, bias=True, dtype=torch.float64, n=N):
    """Values and gradients of sum(g logp) + sum(h H)."""
    tensors, target, (g, h) = case(bias=bias, dtype=dtype, n=n)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    hidden, weight, *rest = leaves
    logp, entropy = function(hidden, weight, rest[0] if rest else None, target, head)
    loss = (g * logp).sum()
    if head.entropy_grad:
        loss = loss + (h * entropy).sum()
    loss.backward()
    return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


HEADS = {
    "plain": Head(chunk=4),
    "one chunk": Head(chunk=64),
    "one token": Head(chunk=1),
    "temperature": Head(temperature=0.6, chunk=4),
    "scale": Head(scale=0.25, chunk=4),
    "softcap": Head(softcap=3.0, temperature=0.7, scale=0.5, chunk=4),
    "entropy": Head(chunk=4, entropy_grad=True),
    "everything": Head(softcap=2.0, temperature=1.3, scale=1.5, chunk=5, entropy_grad=True),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_t36_chunks_give_the_values_and_gradients_of_all_logits_at_once(name, bias):
    for ours, theirs in zip(
        results(token_logp, HEADS[name], bias=bias), results(plain, HEADS[name], bias=bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradient_is_that_of_finite_differences(name):
    (hidden, weight, bias), target, _ = case(n=3)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def function(hidden, weight, bias):
        logp, entropy = token_logp(hidden, weight, bias, target, HEADS[name])
        return (logp, entropy) if HEADS[name].entropy_grad else logp

    assert torch.autograd.gradcheck(function, leaves)


def test_entropy_is_only_a_figure_unless_its_gradient_is_asked_for():
    (hidden, weight, bias), target, _ = case()
    _, entropy = token_logp(hidden.requires_grad_(), weight, bias, target, Head())
    assert not entropy.requires_grad


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_t20_extreme_logits_stay_finite(size):
    hidden = torch.full((2, 1), 1.0, requires_grad=True)
    weight = torch.tensor([[size], [0.0], [-size]])
    logp, entropy = token_logp(hidden, weight, None, torch.tensor([0, 2]), Head(entropy_grad=True))
    (logp.sum() + entropy.sum()).backward()
    assert bool(torch.isfinite(logp).all() & torch.isfinite(entropy).all() & torch.isfinite(hidden.grad).all())
    assert sorted(logp.tolist()) == [-2e4, 0.0]


def test_t29_bfloat16_weights_give_float32_results_and_sums_over_chunks_are_not_rounded():
    many = results(token_logp, Head(chunk=1), dtype=torch.bfloat16, n=512)
    exact = results(plain, Head(), n=512)
    assert many[0].dtype == many[1].dtype == torch.float32
    assert [grad.dtype for grad in many[2:]] == [torch.bfloat16] * 3
    scale = exact[3].abs().max()
    # 512 products rounded on their way into a bfloat16 sum would be off by several hundredths of the largest.
    assert float((many[3].double() - exact[3]).abs().max() / scale) < 0.02


def exact_results(function, head, **options):
    """Values and gradients with leaves in bfloat16, the logits of `function` float32 products of them."""

    def in_float32(hidden, weight, bias, target, head):
        if function is plain:
            hidden, weight, bias = (None if one is None else one.float() for one in (hidden, weight, bias))
        return function(hidden, weight, bias, target, head)

    return results(in_float32, head, dtype=torch.bfloat16, n=64, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_float32_head_has_values_and_gradients_of_plain_float32(name, bias, monkeypatch):
    monkeypatch.setattr("rlpost.head.BLOCK", 4)  # three pieces of the vocabulary
    head = replace(HEADS[name], exact=True)
    ours, theirs = exact_results(token_logp, head, bias=bias), exact_results(plain, head, bias=bias)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)  # one rounding of the sum
    rounded = exact_results(token_logp, HEADS[name], bias=bias)
    assert not torch.allclose(rounded[0], theirs[0], rtol=1e-5, atol=1e-5)


def test_a_float32_head_of_a_finer_model_changes_nothing():
    ours, theirs = results(token_logp, Head(chunk=4, exact=True)), results(token_logp, Head(chunk=4))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_float32_head_never_copies_the_whole_weight(monkeypatch):
    monkeypatch.setattr("rlpost.head.BLOCK", 2)
    copied = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.float32:
                copied.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    (hidden, weight, _), target, _ = case(dtype=torch.bfloat16)
    with Watch():
        token_logp(hidden, weight, None, target, Head(chunk=4, exact=True))
    assert (2, D) in copied
    assert max(rows for rows, _ in copied) <= 4


def test_no_tokens_give_no_numbers_and_gradients_of_zero():
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    logp, entropy = token_logp(hidden, weight, None, torch.zeros(0, dtype=torch.long), Head())
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and not weight.grad.any()


def test_only_a_chunk_of_logits_is_alive_at_once():
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(one.numel() for one in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(one))
            return out

    with Watch():
        results(token_logp, Head(chunk=4, entropy_grad=True), dtype=torch.float32, n=400)
    assert max(largest) <= 400 * D + V * D < 400 * V


def test_bench_compares_the_same_numbers_in_every_way():
    case = logp.Case(tokens=2048, vocab=50, hidden=8, chunk=300)
    found = logp.errors(case)
    assert set(found) == {"plain", "trl", "chunked"}
    assert all(error < 1e-5 for of in found.values() for error in of.values())
    rounded = logp.errors(replace(case, dtype="bfloat16", ways=logp.IN_BFLOAT16))
    assert rounded["float32 head"]["logp"] < 1e-6
    assert rounded["chunked"]["logp"] > 1e-5
    turn = {way: {"forward_s": 1.0, "backward_s": seconds, "peak_mib": 10.0 * seconds} for way, seconds in WAYS.items()}
    logp.against_plain(turn)
    assert (turn["chunked"]["time_frac"], turn["chunked"]["memory_frac"]) == (0.5, 1 / 3)


WAYS = {"plain": 3.0, "chunked": 1.0}
