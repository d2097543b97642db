"""The gradient noise scale: by hand, without bias, before reduction, and the same for every split of the work."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from splits import Parts
from test_engine import make_engine, policy_loss, recipe, weights
from tiny import CPU, ragged, tiny_policy

from rlpost import noise_scale
from rlpost.batch import make_batch
from rlpost.losses import ppo_clip
from rlpost.metrics import Metrics
from rlpost.noise_scale import NoiseScale, Projection, cells_of, pair_estimate
from rlpost.packing import Packer
from rlpost.types import Batch
from rlpost.update import update

STAGES = (0, 1, 2, 3)
DOCUMENTS = [replace(one, group=10 + i % 5) for i, one in enumerate(ragged(12, seed=0))]
"""Five prompts, two of them with three answers and the others with two."""
SPLITS = {"3x4": Parts(1, 1, CPU, 4), "12x1": Parts(1, 1, CPU, 1), "packed": Packer(30, 20, CPU)}
CELLS = 8


class OneRank:
    size, device = 1, CPU

    def add(self, tensor):
        pass


def noise(world, **changes):
    return NoiseScale(world, **({"every": 1, "group_size": 4} | changes))


def test_linear_regression_matches_hand_table():
    """Loss (w x - y)^2 / 2 at w = (1, 2): the gradients are (1, 0), (0, 2), (2, 2) and (0, 0)."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    rows = [((1, 0), 0), ((0, 1), 0), ((1, 1), 1), ((1, -1), -1)]

    def loss_of(i):
        x, y = rows[i]
        return (model(torch.tensor(x, dtype=torch.float32)) - y).square().sum() / 2 / len(rows), {}

    found = noise(OneRank())
    assert found.cells(0) == CELLS
    with found.watch(model, Batch((), 0, cells=(0, 1, 2, 3), prompts=(1, 1, 1, 1, 0, 0, 0, 0)), loss_of) as watched:
        for i in range(4):
            watched(i)[0].backward()
    # Mean (0.75, 1), of squared norm 1.5625; variances about it 6.75 / 3 = 2.25; 1.5625 - 2.25 / 4 = 1.
    expected = {"prompts": 4, "grad_sq": 1, "trace": 2.25, "scale": 2.25, "scale_rollouts": 9, "step_frac": 1 / 1.5625}
    assert found.figures() == pytest.approx({f"noise/{name}": x for name, x in expected.items()}, rel=1e-6)
    assert model.weight.grad.tolist() == [[0.75, 1.0]]


@pytest.mark.parametrize("counts", [(1,) * 16, (8, 8), (1, 2, 5, 8)], ids=str)
def test_pair_estimate_has_no_bias(counts):
    """Over many steps its mean is the truth, within four of its own standard errors."""
    dice = torch.Generator().manual_seed(0)
    repeats, n, size = 4000, sum(counts), 20
    true_G, scale_G = torch.linspace(-0.3, 0.5, size), torch.linspace(0.5, 2.0, size)
    gradients = true_G + scale_G * torch.randn(repeats, n, size, generator=dice)
    cells = torch.stack([cell.sum(1) for cell in (gradients / n).split(counts, dim=1)], 1)
    sums = [cells.sum(1).square().sum(-1).tolist(), cells.square().sum((1, 2)).tolist()]
    found = torch.tensor([pair_estimate(*pair, counts) for pair in zip(*sums, strict=True)])
    truth = torch.tensor([float(true_G.square().sum()), float(scale_G.square().sum())])
    assert ((found.mean(0) - truth).abs() < 4 * found.std(0) / math.sqrt(repeats)).all()
    assert (found.std(0) / math.sqrt(repeats) < 0.1 * truth).all()


def test_projection_keeps_a_short_gradient_as_it_is():
    projection, into_W = Projection([2, 3], seed=0, device=CPU, width=8), torch.zeros(5)
    projection.add(into_W, 1, torch.tensor([3.0, 4.0, 5.0]))
    projection.add(into_W, 0, torch.tensor([1.0, 2.0]))
    assert into_W.tolist() == [1, 2, 3, 4, 5]


def test_projection_keeps_squared_norms_on_average(monkeypatch):
    """Also of a matrix of rank one, whose equal rows fall on the same places; the spread is that of a count sketch."""
    monkeypatch.setattr(noise_scale, "TILE", 150)
    width, repeats = 31, 400
    row = torch.randn(40, generator=torch.Generator().manual_seed(1))
    gradients = [torch.ones(9, 1) * row, row[:7]]
    truth = float(sum(x.square().sum() for x in gradients))
    found = []
    for seed in range(repeats):
        projection, into_W = Projection([360, 7], seed=seed, device=CPU, width=width), torch.zeros(width)
        for i, gradient in enumerate(gradients):
            projection.add(into_W, i, gradient)
        found.append(float(into_W.square().sum()) / truth)
    ratio = torch.tensor(found)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(repeats)
    assert float(ratio.std()) == pytest.approx(math.sqrt(2 / width), rel=0.35)


def test_projection_is_linear_and_the_same_for_the_same_seed():
    gradient, widths = torch.randn(300), {"device": CPU, "width": 31}
    once, twice = torch.zeros(31), torch.zeros(31)
    Projection([300], seed=3, **widths).add(once, 0, gradient)
    again = Projection([300], seed=3, **widths)
    again.add(twice, 0, gradient / 4)
    again.add(twice, 0, 3 * gradient.to(torch.bfloat16).float() / 4)
    torch.testing.assert_close(once, twice, rtol=0, atol=0.05)
    other = torch.zeros(31)
    Projection([300], seed=4, **widths).add(other, 0, gradient)
    assert float((once - other).abs().max()) > 1


def plain_estimate():
    """From the gradient of each prompt, one document at a time, in plain torch."""
    policy = tiny_policy()
    total, mine = sum(one.num_trained for one in DOCUMENTS), []
    for group in sorted({one.group for one in DOCUMENTS}):
        policy.zero_grad()
        for one in (one for one in DOCUMENTS if one.group == group):
            ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
            logp_TV = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
            logp_T = logp_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(one.prompt_ids) - 1 :]
            behavior_T, adv_T = torch.tensor(one.behavior_logp), torch.full_like(logp_T, one.advantage)
            loss_T, _ = ppo_clip(logp_T, behavior_T, adv_T, clip_low=0.2, clip_high=0.28)
            (loss_T.sum() / total).backward()
        mine.append(torch.cat([param.grad.reshape(-1) for param in policy.parameters()]).double())
    return float(sum(mine).square().sum()), float(sum(x.square().sum() for x in mine)), len(mine)


def measured(world, stage, packer, *, dtype="float32", share=None, width=noise_scale.WIDTH, cells=CELLS):
    """Figures of one optimizer step, the gradient's norm, and the weights after it."""
    engine = make_engine(world, recipe(stage), dtype=dtype)
    mine = DOCUMENTS if share is None else DOCUMENTS[:share] if world.is_main else DOCUMENTS[share:]
    found = noise(world, width=width)
    found.cells(0)
    batch = make_batch(mine, packer, world, cells=cells)
    with found.watch(engine.deepspeed.module, batch, partial(policy_loss, engine)) as loss_of:
        norm = update(engine, batch, loss_of, Metrics(world))
    return found.figures(), norm, weights(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_and_stage_measures_what_plain_torch_does_prompt_by_prompt(single_rank, stage, split):
    sum_sq, cells_sq, n = plain_estimate()
    grad_sq, trace = pair_estimate(sum_sq, cells_sq, [1] * n)
    figures, norm, _ = measured(single_rank, stage, SPLITS[split])
    assert figures["noise/prompts"] == n == 5
    assert figures["noise/grad_sq"] == pytest.approx(grad_sq, rel=1e-4, abs=1e-5 * sum_sq)
    assert figures["noise/trace"] == pytest.approx(trace, rel=1e-4)
    assert figures["noise/grad_sq"] + figures["noise/trace"] / n == pytest.approx(norm**2, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_measuring_changes_the_step_by_rounding_alone(single_rank, stage):
    _, norm, after = measured(single_rank, stage, SPLITS["packed"])
    figures, plain_norm, plain_after = measured(single_rank, stage, SPLITS["packed"], cells=1)
    assert figures == {} and norm == pytest.approx(plain_norm, rel=1e-5)
    torch.testing.assert_close(after, plain_after, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bfloat16_gradients_are_measured_near_the_engines_own_norm(single_rank, stage):
    figures, norm, _ = measured(single_rank, stage, SPLITS["packed"], dtype="bfloat16")
    assert figures["noise/grad_sq"] + figures["noise/trace"] / 5 == pytest.approx(norm**2, rel=0.05)


def test_a_projected_gradient_has_nearly_the_engines_norm(single_rank):
    figures, norm, _ = measured(single_rank, 2, SPLITS["packed"], width=4093)
    assert figures["noise/grad_sq"] + figures["noise/trace"] / 5 == pytest.approx(norm**2, rel=0.1)


def test_prompts_are_dealt_by_their_ids_whatever_rank_has_them():
    assert cells_of([7, 3, 9], 8) == cells_of([9, 7, 3], 8) == {3: 0, 7: 1, 9: 2}
    batch = make_batch(DOCUMENTS, SPLITS["packed"], SimpleNamespace(**vars_of_one_rank()), cells=2)
    assert batch.prompts == (3, 2) and sorted(batch.cells) == list(batch.cells) and set(batch.cells) == {0, 1}
    assert len(batch.cells) == len(batch.micros)


def vars_of_one_rank():
    return {"size": 1, "rank": 0, "max": lambda x: x, "all_gather_object": lambda x: [x]}


def test_only_every_so_many_steps_are_measured_and_none_where_it_is_off():
    often, never = noise(OneRank(), every=3), noise(OneRank(), every=0)
    assert [often.cells(step) for step in range(5)] == [CELLS, 1, 1, CELLS, 1]
    assert {never.cells(step) for step in range(5)} == {1}


def test_later_epochs_and_single_cells_are_not_measured():
    found, model = noise(OneRank()), torch.nn.Linear(1, 1)
    found.cells(0)
    for batch, first in ((Batch((), 0, cells=(0, 1), prompts=(1, 1)), False), (Batch((), 0, (0,), (4,)), True)):
        loss_of = object()
        with found.watch(model, batch, loss_of, first=first) as same:
            assert same is loss_of
    assert found.figures() == {} and not model.weight._backward_hooks


def test_the_scale_is_a_ratio_of_means_and_resumes_exactly():
    found, resumed = noise(OneRank()), noise(OneRank())
    found._note(2.0, 1.0, [1, 1])  # |G|^2 2, trace 0
    assert "noise/scale" not in found.figures()  # no noise was seen yet
    found._note(2.0, 2.0, [1, 1])  # |G|^2 0, trace 4
    assert found.figures()["noise/grad_sq"] == 0
    assert found.figures()["noise/scale"] == pytest.approx(4 * 0.1 / (2 * 0.1 * 0.9))
    resumed.load_state_dict(found.state_dict())
    for one in (found, resumed):
        one._note(3.0, 1.0, [2, 2])
    assert resumed.figures() == found.figures()


def on_two_ranks(world):
    return [measured(world, stage, SPLITS["packed"], share=share)[:2] for stage in STAGES for share in (7, 12)]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does_under_every_stage():
    sum_sq, cells_sq, n = plain_estimate()
    grad_sq, trace = pair_estimate(sum_sq, cells_sq, [1] * n)
    for rank in run_ranks(on_two_ranks):
        assert len(rank) == 8
        for figures, norm in rank:
            assert figures["noise/grad_sq"] == pytest.approx(grad_sq, rel=1e-4, abs=1e-5 * sum_sq)
            assert figures["noise/trace"] == pytest.approx(trace, rel=1e-4)
            assert figures["noise/grad_sq"] + figures["noise/trace"] / n == pytest.approx(norm**2, rel=1e-4)
