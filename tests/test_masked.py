"""Sums over the trained positions of packed sequences."""

import torch

from rlpost.masked import blank, segment_mean, segment_sum

X = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
DOCUMENT = torch.tensor([[0, 0, 1], [1, 2, -1]])
MASK = torch.tensor([[True, True, False], [True, False, True]])


def test_segment_sum_adds_the_trained_positions_of_each_sequence():
    assert segment_sum(X, DOCUMENT, MASK).tolist() == [[3, 3, 8], [8, 0, 0]]


def test_segment_mean_divides_by_trained_positions_and_survives_a_sequence_without_any():
    assert segment_mean(X, DOCUMENT, MASK).tolist() == [[1.5, 1.5, 8], [8, 0, 0]]


def test_segment_mean_gradient_matches_finite_differences():
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, DOCUMENT, MASK), x)


def test_t20_blank_stops_the_gradient_as_well_as_the_value():
    x = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    (kept,) = blank(torch.tensor([True, False, False]), x)
    kept.exp().sum().backward()
    assert x.grad.tolist() == [torch.tensor(1.0).exp().item(), 0, 0]
