"""The same optimizer step for every way to split the work: ranks, micro-batches, packing, ZeRO stage, aggregation."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from exact import exact_llama
from ranks import run_ranks
from splits import Parts
from tiny import CPU, gradients, logp_and_entropy, ragged, tiny_llama, tiny_policy

from rlpost import losses
from rlpost.batch import make_batch
from rlpost.critic import Critic, ValueModel
from rlpost.engine import Engine
from rlpost.metrics import Metrics
from rlpost.policy import Policy
from rlpost.recipe import EngineRecipe
from rlpost.update import update
from rlpost.world import World

STAGES = (0, 1, 2, 3)
MODES = ("token_mean", "seq_mean", "seq_sum_const", "prompt_mean")
SPLITS = {"1x12": 12, "3x4": 4, "12x1": 1}
MAX_TOKENS = 4
CLIP, TAU = 0.4, 0.3
RECIPE = EngineRecipe(lr=0.3, eps=1.0, grad_clip=0.0)
"""With eps far above the gradient, Adam's first step is the gradient itself, to first order: nothing is hidden."""
CASES = list(product(SPLITS, (True, False), MODES))
HALF = [(s, p, m) for s, p, m in CASES if (list(SPLITS).index(s) + p + MODES.index(m)) % 2]
"""Every pair of split, packing and mode: enough for ZeRO-3, which is slow."""


def window(count, *, seed):
    """Documents of three groups, with values and returns; one has a token, and another all of them, left out."""
    dice = torch.Generator().manual_seed(seed)
    documents = []
    for i, one in enumerate(ragged(count, seed=seed)):
        size = (len(one.token_ids),)
        scores = {name: torch.randn(size, generator=dice) for name in ("value", "return")}
        documents.append(replace(one, group=i % 3, scores=scores))
    silent = (math.nan,) * len(documents[2].token_ids)
    documents[2] = replace(documents[2], behavior_logp=silent)
    assert len(documents[1].token_ids) > 1
    documents[1] = replace(documents[1], behavior_logp=(math.nan, *documents[1].behavior_logp[1:]))
    return documents


WINDOWS = [window(12, seed=0), window(5, seed=4)]
"""Two optimizer steps."""
SHARES = (7, 3)
"""Documents of the first of two ranks."""


def value_model(model):
    """A value model whose head does not start at 0, so that the whole transformer has a gradient."""
    values = ValueModel(model)
    with torch.no_grad():
        values.head.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        values.head.bias.fill_(0.2)
    return values.to(next(model.parameters()).dtype)


def loss_of(name, forward, dp_size, micro):
    """Loss of a micro-batch as a run would compute it."""
    x_BT, mu_BT, adv_BT = forward(micro), micro.behavior_logp_BT, micro.adv_BT
    whole = {"document_BT": micro.document_BT, "mask_BT": micro.mask_BT}
    if name == "ppo_clip":
        loss_BT, _ = losses.ppo_clip(x_BT, mu_BT, adv_BT, clip_low=CLIP, clip_high=CLIP)
    elif name == "gspo":
        loss_BT, _ = losses.gspo(x_BT, mu_BT, adv_BT, clip_low=CLIP, clip_high=CLIP, **whole)
    elif name == "kimi_mirror":
        loss_BT, _ = losses.kimi_mirror(x_BT, mu_BT, adv_BT, tau=TAU, **whole)
    else:
        loss_BT, _ = losses.value_clip(x_BT, micro.scores["value"], micro.scores["return"], clip=CLIP)
    return losses.weighted_sum(loss_BT, micro.weight_BT, dp_size), {}


def plain_outputs(module, one):
    """Log-probs, or values, of one document's trained tokens, from the model's own forward pass on it alone."""
    ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
    kept = torch.tensor(one.trained)
    if isinstance(module, ValueModel):
        hidden_TD = module.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        return (hidden_TD @ module.head.weight + module.head.bias)[len(one.prompt_ids) - 1 :][kept]
    logp_TV = torch.log_softmax(module.model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
    return logp_TV.gather(-1, ids[0, 1:, None])[len(one.prompt_ids) - 1 :, 0][kept]


def plain_loss(name, x_T, one):
    """The sum of one document's token losses."""
    kept = torch.tensor(one.trained)
    if name == "value_clip":
        value_T, return_T = one.scores["value"][kept], one.scores["return"][kept]
        near_T = torch.minimum(torch.maximum(x_T, value_T - CLIP), value_T + CLIP)
        return 0.5 * torch.maximum((x_T - return_T) ** 2, (near_T - return_T) ** 2).sum()
    log_rho_T, adv = x_T - torch.tensor(one.behavior_logp)[kept], torch.tensor(one.advantage)
    if name == "kimi_mirror":
        return -(adv * x_T).sum() + TAU / 2 * log_rho_T.sum() ** 2
    log_ratio_T = log_rho_T.mean().expand_as(log_rho_T) if name == "gspo" else log_rho_T
    ratio_T = log_ratio_T.exp()
    return -torch.minimum(ratio_T * adv, ratio_T.clamp(1 - CLIP, 1 + CLIP) * adv).sum()


def plain_weights(mode, documents):
    """What one token of each document counts, in the float32 of a micro-batch."""
    counts = [one.num_trained for one in documents]
    in_group = Counter()
    for one, count in zip(documents, counts, strict=True):
        in_group[one.group] += count
    found = []
    for one, count in zip(documents, counts, strict=True):
        share = {
            "token_mean": sum(counts),
            "seq_mean": count * sum(map(bool, counts)),
            "seq_sum_const": MAX_TOKENS * sum(map(bool, counts)),
            "prompt_mean": in_group[one.group] * sum(map(bool, in_group.values())),
        }[mode]
        found.append(torch.tensor(1 / share if count else 0.0))
    return found


def plain_backward(module, name, mode, documents):
    """The gradient of an optimizer step, one document at a time."""
    for one, weight in zip(documents, plain_weights(mode, documents), strict=True):
        if one.num_trained:
            (weight * plain_loss(name, plain_outputs(module, one), one)).backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "kimi_mirror", "value_clip"])
def test_t1_t3_t32_every_split_has_the_same_gradient_in_float64(name, mode):
    of_values = name == "value_clip"
    module = value_model(exact_llama().model) if of_values else Policy(exact_llama(), logp_chunk=5)
    plain_backward(module, name, mode, WINDOWS[0])
    expected = gradients(module)
    assert all(float(grad.abs().max()) > 1e-4 for grad in expected.values())

    def forward(micro):
        if of_values:
            return module(micro.tokens_BT, micro.position_BT, micro.mask_BT)
        return logp_and_entropy(module, micro)[0]

    for size, packed in product(SPLITS.values(), (True, False)):
        module.zero_grad()
        parts = Parts(1, 1, CPU, size, packed)
        for micro in make_batch(WINDOWS[0], parts, World(), mode, MAX_TOKENS).micros:
            loss_of(name, forward, 1, micro)[0].backward()
        for key, grad in gradients(module).items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-9, msg=f"{key} {size} {packed}")


@cache
def plain_steps(name, mode):
    """Weights after the optimizer steps of plain torch in float32."""
    module = value_model(tiny_llama().model) if name == "value_clip" else tiny_policy()
    settings = {"lr": RECIPE.lr, "betas": tuple(RECIPE.betas), "eps": RECIPE.eps, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(module.parameters(), **settings)
    for documents in WINDOWS:
        optimizer.zero_grad()
        plain_backward(module, name, mode, documents)
        optimizer.step()
    return {key: param.detach().clone() for key, param in module.named_parameters()}


def engine_steps(world, name, stage, case):
    """Weights after the optimizer steps of an engine, each rank with its share of the documents."""
    split, packed, mode = case
    settings = {"dtype": "float32", "total_updates": 2, "world": world}
    if name == "value_clip":
        engine = Critic(value_model(tiny_llama().model), replace(RECIPE, zero_stage=stage), **settings)
    else:
        engine = Engine(tiny_policy(chunk=16), replace(RECIPE, zero_stage=stage), temperature=1.0, **settings)

    def forward(micro):
        return engine.values(micro) if name == "value_clip" else engine.token_logp(micro)[0]

    parts = Parts(1, 1, CPU, SPLITS[split], packed)
    for documents, share in zip(WINDOWS, SHARES, strict=True):
        mine = documents if world.size == 1 else documents[:share] if world.is_main else documents[share:]
        batch = make_batch(mine, parts, world, mode, MAX_TOKENS)
        update(engine, batch, partial(loss_of, name, forward, world.size), Metrics(world))
    return whole(engine)


def whole(engine):
    from deepspeed import zero

    with zero.GatheredParameters(list(engine.deepspeed.module.parameters())):
        return {key: param.detach().clone() for key, param in engine.deepspeed.module.named_parameters()}


def excess(got, expected):
    """The largest |got - expected| beyond a relative 1e-5."""
    assert got.keys() == expected.keys()
    return max(float(((got[key] - x).abs() - 1e-5 * x.abs()).max()) for key, x in expected.items())


def too_far(world, name, stage):
    """The cases whose weights are not those of plain torch, one document at a time, and by how much."""
    found = {}
    for case in HALF if stage == 3 else CASES:
        distance = excess(engine_steps(world, name, stage, case), plain_steps(name, case[2]))
        if not distance <= 2e-6:
            found[str(case)] = distance
    return found


@pytest.mark.parametrize("name", ["ppo_clip", "value_clip"])
def test_the_modes_of_aggregation_lead_to_different_weights(name):
    start = value_model(tiny_llama().model) if name == "value_clip" else tiny_policy()
    after = [dict(start.named_parameters()), *(plain_steps(name, mode) for mode in MODES)]
    for i, one in enumerate(after):
        assert all(excess(one, other) > 1e-3 for other in after[:i])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["ppo_clip", "value_clip"])
def test_t2_t4_t32_every_split_takes_the_same_steps_on_one_rank(single_rank, name, stage):
    assert too_far(single_rank, name, stage) == {}


def on_two_ranks(world):
    return {f"{name}-{stage}": too_far(world, name, stage) for name in ("ppo_clip", "value_clip") for stage in STAGES}


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(on_two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["ppo_clip", "value_clip"])
def test_t5_t32_every_split_takes_the_same_steps_on_two_ranks(two_ranks, name, stage):
    assert [rank[f"{name}-{stage}"] for rank in two_ranks] == [{}, {}]
