"""Rewards become advantages: the recipe's choices on real groups, with hand-derived numbers."""

import math
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from rlpost.algorithm_recipe import Algorithm, CriticRecipe, Kl
from rlpost.batch import documents_of
from rlpost.credit import add_length_rewards, credit
from rlpost.types import Group, Rollout, Task

nan = math.nan
WEIGHTS = {"right": 1.0, "style": 0.5}


class Alone:
    rank, size = 0, 1

    def all_gather_object(self, item):
        return [item]


def rollout(group, reward, length=2, *, parts=None, finish="stop"):
    ids = tuple(range(4, 4 + length))
    parts = {"right": reward, "style": 0.0} if parts is None else parts
    return Rollout(
        Task("t", "1+1="), group, (2, 3), (2, 3), ids, (-0.5,) * length, finish, 0, reward=reward, reward_parts=parts
    )


def groups_of(*rows):
    return [
        Group(i, Task("t", "1+1="), [rollout(i, *one) if isinstance(one, tuple) else rollout(i, one) for one in row])
        for i, row in enumerate(rows)
    ]


def advantage(use, **options):
    return Algorithm(advantage={"use": use, **options})


def credited(algorithm, groups, *, documents=None, kl_coef=0.0, world=None):
    train_truncated = algorithm.truncated == "keep"
    documents = documents or documents_of(groups, train_truncated=train_truncated)
    found = credit(groups, documents, algorithm, WEIGHTS, kl_coef=kl_coef, world=world or Alone())
    return [torch.as_tensor(one.advantage, dtype=torch.float64).expand(len(one.token_ids)).tolist() for one in found]


def close(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "wanted"),
    [
        (advantage("dr_grpo"), [0.75, -0.25, -0.25, -0.25]),
        (advantage("grpo", scale_by_std=True), [1.5, -0.5, -0.5, -0.5]),
        (advantage("grpo", scale_by_std=False), [0.75, -0.25, -0.25, -0.25]),
        (advantage("rloo"), [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (advantage("passk", scale_by_std=False), [1.0, 0.0, 0.0, 0.0]),
        (advantage("opo"), [1 - 4 / 10, -0.4, -0.4, -0.4]),
        (advantage("remax"), [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_a_group_is_credited_as_the_recipe_says(algorithm, wanted):
    groups = groups_of([(1.0, 4), (0.0, 2), (0.0, 2), (0.0, 2)])
    groups[0].greedy_reward = 0.25
    close([one[:1] for one in credited(algorithm, groups)], [[value] for value in wanted])


def test_a_users_advantage_is_called_with_the_groups_rewards():
    groups = groups_of([1.0, 0.0, 3.0])
    close(credited(advantage("test_credit:halved", by=4.0), groups), [[0.25] * 2, [0.0] * 2, [0.75] * 2])


def halved(rewards_G, *, by: float):
    """An advantage as a user would write it."""
    return rewards_G / by


def test_batch_std_divides_by_one_deviation_of_centred_rewards():
    groups = groups_of([1.0, 0.0], [3.0, 0.0])
    std = math.sqrt((2 * 0.25 + 2 * 2.25) / 3)
    close(credited(advantage("batch_std"), groups), [[x / std] * 2 for x in (0.5, -0.5, 1.5, -1.5)])


@pytest.mark.parametrize(("count", "weights"), [("tokens", (4, 2, 2, 2)), ("rollouts", (1, 1, 1, 1))])
def test_reinforce_pp_baseline_whitens_over_tokens_or_rollouts(count, weights):
    groups = groups_of([(1.0, 4), (0.0, 2)], [(3.0, 2), (0.0, 2)])
    raw = torch.tensor([0.5, -0.5, 1.5, -1.5], dtype=torch.float64)
    spread = raw.repeat_interleave(torch.tensor(weights))
    wanted = (raw - spread.mean()) / spread.std()
    found = credited(advantage("reinforce_pp_baseline", count=count), groups)
    close([one[:1] for one in found], [[float(value)] for value in wanted])


def test_gdpo_normalises_each_reward_and_the_length_reward_in_its_group():
    first, second = (
        rollout(0, 1.0, parts={"right": 1.0, "style": 0.0}),
        rollout(0, 0.5, parts={"right": 0.0, "style": 1.0}),
    )
    group = Group(0, Task("t", "1+1="), [first, second])
    first.length_reward = -1.0
    lead = 0.5 / math.sqrt(0.5)  # each part: +-lead for the better and the worse
    raw = torch.tensor([lead - 0.5 * lead - lead, -lead + 0.5 * lead + lead])
    wanted = (raw - raw.mean()) / raw.std()
    close([one[:1] for one in credited(advantage("gdpo"), [group])], [[float(x)] for x in wanted])


def test_t38_an_unjudged_rollout_stays_out_of_every_baseline():
    groups = groups_of([1.0, None, 0.0])
    for use in ("dr_grpo", "rloo", "opo", "batch_std", "gdpo", "reinforce_pp"):
        with_it = credited(advantage(use), groups)
        without = credited(advantage(use), groups_of([1.0, 0.0]))
        close([with_it[0], with_it[2]], without)
        assert with_it[1] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("truncated", "wanted", "trained"),
    [
        ("keep", [2 / 3, -1 / 3, -1 / 3], [2, 2, 2]),
        ("mask", [2 / 3, -1 / 3, -1 / 3], [2, 2, 0]),  # in the baseline, not in the loss
        ("exclude", [0.5, -0.5, 0.0], [2, 2, 0]),  # in neither
    ],
)
def test_t23_truncated_answers_in_the_baseline_and_in_the_loss(truncated, wanted, trained):
    group = Group(0, Task("t", "1+1="), [rollout(0, 1.0), rollout(0, 0.0), rollout(0, 0.0, finish="length")])
    algorithm = replace(advantage("dr_grpo"), truncated=truncated)
    documents = documents_of([group], train_truncated=truncated == "keep")
    assert [one.num_trained for one in documents] == trained
    close([one[:1] for one in credited(algorithm, [group])], [[value] for value in wanted])


def scored(groups, **scores):
    """Documents with made-up scores `[T]`, the same for each."""
    documents = documents_of(groups)
    return [replace(one, scores={name: torch.tensor(x) for name, x in scores.items()}) for one in documents]


def test_kl_in_the_reward_is_taken_off_the_whole_answer_before_the_group_is_compared():
    groups = groups_of([1.0, 0.0])
    algorithm = replace(advantage("dr_grpo"), kl=Kl(coef=0.5, place="reward", estimator="k1"))
    first, second = documents_of(groups)
    documents = [
        replace(first, scores={"prox_logp": torch.tensor([-1.0, -1.0]), "ref_logp": torch.tensor([-2.0, -1.0])}),
        replace(second, scores={"prox_logp": torch.tensor([-1.0, -1.0]), "ref_logp": torch.tensor([-1.0, -1.0])}),
    ]
    close(credited(algorithm, groups, documents=documents, kl_coef=0.5), [[0.25] * 2, [-0.25] * 2])  # .5 against 0


def test_reinforce_pp_credits_a_token_with_what_is_still_to_come():
    groups = groups_of([(1.0, 3)])
    algorithm = replace(advantage("reinforce_pp"), kl=Kl(coef=0.5, place="reward", estimator="k1"))
    documents = scored(groups, prox_logp=[-1.0, -1.0, -1.0], ref_logp=[-2.0, -1.0, -3.0])
    to_come = torch.tensor([1 - 0.5 - 1.0, 1 - 1.0, 1 - 1.0])  # penalties .5, 0, 1
    wanted = ((to_come - to_come.mean()) / to_come.std()).tolist()
    close(credited(algorithm, groups, documents=documents, kl_coef=0.5), [wanted])


def gae_case(critic=None, **options):
    algorithm = Algorithm(
        advantage={"use": "gae", "lam": 1.0, "length_alpha": 0.0, **options}, critic=critic or CriticRecipe()
    )
    groups = groups_of([(1.0, 3), (0.0, 2)])
    first, second = documents_of(groups)
    documents = [
        replace(first, scores={"value": torch.tensor([0.5, 0.25, 0.75])}),
        replace(second, scores={"value": torch.tensor([0.5, 0.0])}),
    ]
    return algorithm, groups, documents


def whitened(*rows):
    flat = torch.cat([torch.tensor(row, dtype=torch.float64) for row in rows])
    return [[(x - float(flat.mean())) / float(flat.std()) for x in row] for row in rows]


def test_gae_with_lambda_one_is_return_minus_value_whitened_over_tokens():
    algorithm, groups, documents = gae_case()
    close(credited(algorithm, groups, documents=documents), whitened([0.5, 0.75, 0.25], [-0.5, 0.0]))


def test_gae_has_its_own_lambda_for_actor_and_critic():
    algorithm, groups, documents = gae_case(lam=0.5, critic=CriticRecipe(gamma=0.5, lam=0.0))
    # deltas: .5 * .25 - .5, .5 * .75 - .25, 1 - .75;  and .5 * 0 - .5, 0
    d = [-0.375, 0.125, 0.25]
    close(
        credited(algorithm, groups, documents=documents),
        whitened([d[0] + 0.25 * (d[1] + 0.25 * d[2]), d[1] + 0.25 * d[2], d[2]], [-0.5, 0.0]),
    )
    found = credit(groups, documents, algorithm, WEIGHTS, kl_coef=0.0, world=Alone())
    assert found[0].scores["return"].tolist() == pytest.approx([0.5 - 0.375, 0.25 + 0.125, 1.0])


def test_vapo_lambda_grows_with_the_answer():
    algorithm, groups, documents = gae_case(length_alpha=0.5, lam=0.0)
    # lambda: 1 - 1 / (.5 * 3) = 1 / 3 of three tokens, 0 of two
    d = [-0.25, 0.5, 0.25]
    close(
        credited(algorithm, groups, documents=documents),
        whitened([d[0] + (d[1] + d[2] / 3) / 3, d[1] + d[2] / 3, d[2]], [-0.5, 0.0]),
    )


def test_t30_gae_skips_tokens_that_the_policy_did_not_write():
    algorithm, groups, documents = gae_case()
    plain = credited(algorithm, groups, documents=documents)
    injected = [
        replace(
            documents[0],
            token_ids=(4, 9, 9, 5, 6),
            behavior_logp=(-0.5, nan, nan, -0.5, -0.5),
            scores={"value": torch.tensor([0.5, 7.0, -7.0, 0.25, 0.75])},
        ),
        documents[1],
    ]
    first, second = credited(algorithm, groups, documents=injected)
    assert [first[0], *first[3:]] == plain[0] and second == plain[1]
    assert first[1:3] == [0.0, 0.0]


def spread_over_ranks(world, use, options):
    groups = groups_of([(1.0, 4), (0.0, 2), (0.5, 3)], [(3.0, 2), (0.0, 5)], [(2.0, 1), (1.0, 2), (0.0, 2)])
    mine = groups if world.size == 1 else (groups[:1] if world.rank == 0 else groups[1:])
    values = [0.1 * i for i in range(5)]
    documents = [
        replace(one, scores={"value": torch.tensor(values[: len(one.token_ids)])}) for one in documents_of(mine)
    ]
    return credited(advantage(use, **options), mine, documents=documents, world=world)


@pytest.mark.slow
def test_t31_moments_of_the_batch_do_not_depend_on_the_ranks():
    cases = {
        "batch_std": {},
        "reinforce_pp": {},
        "gdpo": {},
        "reinforce_pp_baseline": {"count": "tokens"},
        "gae": {"lam": 0.9, "length_alpha": 0.0},
    }
    both = run_ranks(every_case, cases=cases)
    for use, options in cases.items():
        close(both[0][use] + both[1][use], spread_over_ranks(Alone(), use, options))


def every_case(world, cases):
    return {use: spread_over_ranks(world, use, options) for use, options in cases.items()}


def test_length_rewards_as_the_recipe_says():
    def rewards(section, step=0):
        groups = groups_of([(1.0, 10), (1.0, 20), (0.0, 5)])
        add_length_rewards(groups, section, budget=20, step=step)
        return [one.length_reward for one in groups[0].rollouts]

    assert rewards({"use": "none"}) == [0.0, 0.0, 0.0]
    soft = {"use": "soft_overlong", "buffer_frac": 0.5, "weight": 2.0}
    assert rewards(soft) == [0.0, -2.0, 0.0]
    kimi = {"use": "kimi", "weight": 0.6, "warmup_steps": 3}
    assert rewards(kimi, step=2) == [0.0, 0.0, 0.0]
    assert rewards(kimi, step=3) == pytest.approx([0.6 * (0.5 - 5 / 15), -0.3, 0.0])
    cosine = {"use": "cosine", "low": -1.0, "high": 0.0, "steps_on": 2, "steps_off": 1, "weight": 1.0}
    assert rewards(cosine, step=1) == pytest.approx([-0.5, -1.0, -0.5 + 0.5 * math.cos(math.pi / 4)])
    assert rewards(cosine, step=2) == [0.0, 0.0, 0.0]


def test_t10_a_group_without_spread_in_its_rewards_can_have_it_in_its_lengths():
    groups = groups_of([(1.0, 10), (1.0, 20)])
    add_length_rewards(groups, {"use": "kimi", "weight": 1.0, "warmup_steps": 0}, budget=20, step=0)
    assert not groups[0].has_spread  # what is dropped or refilled goes by the task's reward alone
    close([one[:1] for one in credited(advantage("dr_grpo"), groups)], [[0.5], [-0.5]])
