import math
import random
from dataclasses import replace

import pytest
import torch
from threads import World
from tiny import CPU, gradients, logp_and_entropy, ragged, tiny_policy

from rlpost.batch import document, documents_of, in_parts, make_batch, with_scores
from rlpost.document import Document
from rlpost.packing import DENSE_ROW_TOKENS, Packer, pack, row_tokens_of
from rlpost.recipe import BatchRecipe, Model, Recipe
from rlpost.types import Group, Rollout, Task

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
"""Rows of another shape sum in another order in float32."""


def packer(micro_tokens=40, row_tokens=20):
    return Packer(micro_tokens, row_tokens, CPU)


def trained_logps(policy, micros):
    """Log-prob of each trained token, by document: documents are told apart by their advantage."""
    found = {}
    for micro in micros:
        logp_BT, _ = logp_and_entropy(policy, micro)
        for advantage, logp in zip(micro.adv_BT[micro.mask_BT].tolist(), logp_BT[micro.mask_BT], strict=True):
            found.setdefault(advantage, []).append(logp)
    return {advantage: torch.stack(values) for advantage, values in found.items()}


def distinct(documents):
    return [replace(one, advantage=float(i)) for i, one in enumerate(documents)]


def backward_of(policy, micros):
    policy.zero_grad()
    for micro in micros:
        logp_BT, _ = logp_and_entropy(policy, micro)
        (logp_BT * micro.adv_BT).sum().backward()
    return gradients(policy)


def own_logp(policy, one):
    """Log-probs of a document's completion from the model's own logits, without anything of `batch.py`."""
    ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
    logp_TV = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)
    return logp_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(one.prompt_ids) - 1 :]


def padded(documents):
    """One document a row, filled up to the longest: what packing replaces."""
    width = max(one.length for one in documents)
    return [packer().micro([[one] for one in documents], width)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_t27_packed_padded_and_single_log_probs_are_the_models_own(attention):
    policy, documents = tiny_policy(attention=attention), distinct(ragged())
    single = [packer().micro([[one]], one.length) for one in documents]
    packed = packer().micros(documents)
    assert len(packed) < len(documents) and any(len(micro.tokens_BT) > 1 for micro in packed)
    for micros in (packed, padded(documents), single):
        found = trained_logps(policy, micros)
        for one in documents:
            torch.testing.assert_close(found[one.advantage], own_logp(policy, one), **TOLERANCE)


def test_t16_t27_packed_padded_and_single_gradients_are_equal():
    policy, documents = tiny_policy(), ragged()
    packed = backward_of(policy, packer().micros(documents))
    single = backward_of(policy, [packer().micro([[one]], one.length) for one in documents])
    filled = backward_of(policy, padded(documents))
    for name, grad in single.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(packed[name], grad, rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(filled[name], grad, rtol=1e-5, atol=1e-5 * scale)


def test_t27_the_order_of_documents_changes_nothing():
    policy, documents = tiny_policy(), distinct(ragged())
    first = trained_logps(policy, packer().micros(documents))
    for seed in range(3):
        shuffled = random.Random(seed).sample(documents, len(documents))
        again = trained_logps(policy, packer(micro_tokens=30, row_tokens=30).micros(shuffled))
        for advantage, logp in first.items():
            torch.testing.assert_close(again[advantage], logp, **TOLERANCE)


def test_t27_a_neighbour_in_the_row_is_not_attended_to():
    policy, (one, left, right) = tiny_policy(), ragged(3)
    rows = [[left, one], [right, one]]
    width = max(sum(document.length for document in row) for row in rows)
    logp_BT, _ = logp_and_entropy(policy, packer().micro(rows, width))
    a, b = (row[start.length :][: one.length - 1] for row, start in zip(logp_BT, (left, right), strict=True))
    torch.testing.assert_close(a, b, **TOLERANCE)


def test_t28_position_t_speaks_of_the_token_at_t_plus_one():
    one = Document((5, 6, 7), (8, 9, 1), (-0.1, -0.2, -0.3), advantage=2.0)
    micro = packer().micro([[one, one]], 14)
    assert micro.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 1, 5, 6, 7, 8, 9, 1, 0, 0]]
    assert micro.target_BT.tolist() == [[6, 7, 8, 9, 1, 0, 6, 7, 8, 9, 1, 0, 0, 0]]
    assert micro.position_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]]
    assert micro.mask_BT.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0]]
    behavior = [0, 0, -0.1, -0.2, -0.3, 0]
    torch.testing.assert_close(micro.behavior_logp_BT, torch.tensor([[*behavior, *behavior, 0, 0]]))
    assert micro.adv_BT.tolist() == [[0, 0, 2, 2, 2, 0, 0, 0, 2, 2, 2, 0, 0, 0]]


def test_t22_the_end_token_is_trained_exactly_once():
    one = Document((5, 6), (7, 1), (-0.1, -0.2), advantage=1.0)
    micro = packer().micro([[one]], 4)
    assert micro.target_BT[micro.mask_BT].tolist() == [7, 1]


def test_a_document_without_a_prompt_trains_all_but_its_first_token():
    one = Document((), (7, 8, 1), (-0.1, -0.2, -0.3), advantage=1.0)
    micro = packer().micro([[one]], 3)
    assert micro.target_BT[micro.mask_BT].tolist() == [8, 1] and one.num_trained == 2
    torch.testing.assert_close(micro.behavior_logp_BT, torch.tensor([[-0.2, -0.3, 0.0]]))


def test_an_empty_completion_trains_nothing():
    one = Document((5, 6), (), (), advantage=1.0)
    assert one.num_trained == Document((), (), (), advantage=1.0).num_trained == 0
    assert not packer().micro([[one]], 2).mask_BT.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_t20_t34_a_log_prob_that_is_not_finite_is_masked_and_zero(bad):
    one = Document((5, 6), (7, 8, 1), (-0.1, bad, -0.3), advantage=2.0)
    micro = packer().micro([[one]], 5)
    assert micro.target_BT[micro.mask_BT].tolist() == [7, 1] and one.num_trained == 2
    torch.testing.assert_close(micro.behavior_logp_BT, torch.tensor([[0, -0.1, 0, -0.3, 0]]))
    assert micro.adv_BT.tolist() == [[0, 2, 0, 2, 0]]


@pytest.mark.parametrize("seed", range(30))
def test_pack_keeps_every_document_once_and_never_overflows(seed):
    dice = random.Random(seed)
    lengths = [dice.randint(1, 50) for _ in range(dice.randint(0, 60))]
    capacity = dice.randint(max(lengths, default=1), 120)
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    # First fit leaves at most one row half empty.
    assert sum(2 * sum(lengths[i] for i in row) <= capacity for row in rows) <= 1


@pytest.mark.parametrize("seed", range(10))
def test_micros_stay_within_the_budget_and_hold_every_trained_token(seed):
    dice = random.Random(seed)
    documents = ragged(dice.randint(1, 40), seed=seed)
    longest = max(one.length for one in documents)
    micro_tokens = dice.randint(longest, 80)
    micros = packer(micro_tokens, dice.randint(1, micro_tokens)).micros(documents)
    assert all(micro.tokens_BT.numel() <= micro_tokens for micro in micros)
    assert sum(int(micro.mask_BT.sum()) for micro in micros) == sum(one.num_trained for one in documents)


def test_a_document_longer_than_a_micro_batch_gets_one_of_its_own():
    documents = [Document((5,) * 30, (6,) * 30, (-1.0,) * 30, advantage=1.0), *ragged(3)]
    micros = packer(micro_tokens=20, row_tokens=20).micros(documents)
    assert max(micro.tokens_BT.numel() for micro in micros) == 60
    assert micros[0].tokens_BT.shape == (1, 60)


def test_every_figure_of_a_document_lies_where_its_token_is_predicted():
    marks = {"mark": torch.tensor([10.0, 20.0, 30.0])}
    one = Document(
        (5, 6), (7, 8, 1), (-0.1, math.nan, -0.3), torch.tensor([1.0, 2.0, 3.0]), version=4, scores=marks, weight=0.5
    )
    other = Document((9,), (3,), (-0.4,), advantage=6.0, version=7, scores={"mark": torch.tensor([40.0])}, weight=0.25)
    micro = packer().micro([[one, replace(other, imitation_weight=0.125)]], 8)
    assert micro.mask_BT.int().tolist() == [[0, 1, 0, 1, 0, 1, 0, 0]]
    assert micro.document_BT.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1]]
    assert micro.version_BT.tolist() == [[4, 4, 4, 4, 4, 7, 7, 0]]
    assert micro.adv_BT.tolist() == [[0, 1, 0, 3, 0, 6, 0, 0]]
    assert micro.weight_BT.tolist() == [[0, 0.5, 0, 0.5, 0, 0.25, 0, 0]]
    assert micro.imitation_weight_BT.tolist() == [[0, 0, 0, 0, 0, 0.125, 0, 0]]
    assert micro.scores["mark"].tolist() == [[0, 10, 0, 30, 0, 40, 0, 0]]


def test_without_a_prompt_the_first_tokens_figures_are_left_out():
    one = Document((), (7, 8, 1), (-0.1, -0.2, -0.3), torch.tensor([1.0, 2.0, 3.0]))
    assert packer().micro([[one]], 4).adv_BT.tolist() == [[2, 3, 0, 0]]
    assert one.trained == [False, True, True]


def test_a_score_that_is_not_finite_under_the_mask_leaves_zero():
    one = Document((5,), (7, 8), (math.nan, -0.2), scores={"mark": torch.tensor([math.nan, 2.0])})
    assert packer().micro([[one]], 3).scores["mark"].tolist() == [[0, 2, 0]]


def test_documents_are_numbered_apart_over_all_rows_of_a_micro_batch():
    [micro] = packer(100, 20).micros(ragged(6))
    numbers = [number for row in micro.document_BT.tolist() for number in dict.fromkeys(row) if number >= 0]
    assert len(micro.tokens_BT) > 1 and numbers == list(range(6))


def group(place, rewards, finish="stop"):
    task = Task(f"t{place}", "1+1=")
    rollouts = [
        Rollout(
            *(task, place, (2, 3), (2, 3), (4 + place, 1), (-0.5, -0.25), finish, 3),
            reward=reward,
            reward_parts={"right": reward},
        )
        for reward in rewards
    ]
    return Group(place, task, rollouts)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (1, [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]),
        (2, [[0, 0, 1, 1], [2, 2, 3, 3, 4, 4]]),
        (5, [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]]),
        (7, [[], [0, 0], [1, 1], [], [2, 2], [3, 3], [4, 4]]),
    ],
)
def test_parts_are_nearly_equal_and_keep_groups_whole(parts, wanted):
    documents = documents_of([group(i, [0.0, 1.0]) for i in range(5)])
    shuffled = random.Random(0).sample(documents, len(documents))
    assert [[one.group for one in part] for part in in_parts(shuffled, range(5), parts)] == wanted


def test_a_wide_group_may_be_cut_into_parts():
    documents = documents_of([group(0, [0.0, 1.0] * 4)])
    assert [len(part) for part in in_parts(documents, [0], 4, cut=True)] == [2, 2, 2, 2]
    assert [len(part) for part in in_parts(documents, [0], 4)] == [0, 0, 0, 8]


def test_t3_each_minibatch_counts_its_own_tokens():
    documents = documents_of([group(i, [0.0, 1.0]) for i in range(5)])
    batches = [make_batch(part, packer(), World()) for part in in_parts(documents, range(5), 2)]
    assert [batch.step_tokens for batch in batches] == [8, 12]
    assert [batch.micros[0].weight_BT.sum().item() for batch in batches] == pytest.approx([1.0, 1.0])


def test_a_group_without_documents_keeps_its_place_among_the_parts():
    documents = documents_of([group(2, [0.0, 1.0])])
    assert [len(part) for part in in_parts(documents, [1, 2], 2)] == [0, 2]


def test_a_token_carries_the_version_that_wrote_it_where_it_is_predicted():
    mixed = Document((5, 6), (7, 8, 3, 1), (-0.1,) * 4, version=4, later_versions=((1, 5), (3, 7)))
    alone = packer().micro([[mixed]], 8)
    assert alone.version_BT[alone.mask_BT].tolist() == [4, 5, 5, 7]
    shared = packer().micros([replace(mixed, group=1), replace(mixed, group=1, later_versions=())])
    assert [one.version_BT[one.mask_BT].tolist() for one in shared] == [[4, 5, 5, 7, 4, 4, 4, 4]]


def test_what_an_older_policy_began_is_context_where_the_recipe_says_so():
    [rollout] = group(0, [1.0]).rollouts
    rollout = replace(rollout, token_ids=(7, 8, 1), behavior_logp=(-0.5, -0.25, -1.0), later_versions=((2, 9),))
    assert rollout.versions == ((0, 3), (2, 9))
    assert document(rollout).trained == [True, True, True]
    assert document(rollout, train_earlier=False).trained == [False, False, True]
    assert document(replace(rollout, later_versions=()), train_earlier=False).trained == [True, True, True]
    assert not any(document(replace(rollout, reward=None), train_earlier=False).trained)


def test_t38_an_unjudged_rollout_keeps_its_place_with_no_trained_token():
    judged, unjudged = documents_of([group(0, [1.0, None])])
    assert (judged.num_trained, judged.correct, judged.version, judged.group) == (2, True, 3, 0)
    assert (unjudged.num_trained, unjudged.correct) == (0, False)


def test_a_truncated_answer_is_trained_unless_the_recipe_masks_it():
    (rollout,) = group(0, [0.0], finish="length").rollouts
    assert document(rollout).num_trained == 2
    assert document(rollout, train_truncated=False).num_trained == 0
    assert document(group(0, [0.0]).rollouts[0], train_truncated=False).num_trained == 2


def test_t37_the_loss_conditions_on_the_prompt_without_the_hint():
    rollout = replace(group(0, [1.0]).rollouts[0], sampled_prompt_ids=(9, 9, 2, 3))
    assert document(rollout).prompt_ids == (2, 3)


def test_rows_are_short_without_flash_attention_unless_the_recipe_says_otherwise():
    recipe = Recipe(model=Model(attention="sdpa"))
    assert row_tokens_of(recipe) == DENSE_ROW_TOKENS
    recipe.batch = BatchRecipe(micro_tokens=100)
    assert row_tokens_of(recipe) == 100
    recipe.batch = BatchRecipe(row_tokens=64)
    assert row_tokens_of(recipe) == 64
    assert row_tokens_of(Recipe(model=Model(attention="flash_attention_2"))) == 8192


def test_ranks_agree_on_their_number_of_passes_before_the_first_one():
    """A pass with sharded weights waits for all ranks: a rank with fewer documents must not wait elsewhere then."""
    order = []

    class Alone:
        rank, size = 0, 1

        def all_gather_object(self, item):
            return [item]

        def max(self, value):
            order.append("max")
            return value + 1

    def score(micro):
        order.append("pass")
        return {"logp": torch.zeros(micro.tokens_BT.shape)}

    [scored] = with_scores([Document((5,), (7, 1), (-0.1, -0.2))], packer(), Alone(), score)
    assert order == ["max", "pass", "pass"] and scored.scores["logp"].tolist() == [0.0, 0.0]
