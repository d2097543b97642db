"""Ulysses sequence parallelism: rows cut over 2 and 4 ranks under gloo give what one rank gives of whole rows."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from lab import make_lab, train_here
from ranks import run_ranks
from test_invariance import CLIP, RECIPE, value_model
from tiny import CPU, VOCAB, gradients, ragged

from rlpost import losses
from rlpost.batch import make_batch, with_scores
from rlpost.critic import Critic
from rlpost.document import Document
from rlpost.engine import Engine, Frozen
from rlpost.errors import RunError
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.policy import Policy, seen
from rlpost.sequence_parallel import Columns, columns_of, in_columns
from rlpost.types import Batch
from rlpost.update import update

DOCUMENTS = [replace(one, group=i % 3, advantage=float(i - 5)) for i, one in enumerate(ragged(11, seed=3))]
FEW = [Document((5, 7), (3, 4), (-1.0, -2.0), 0.7), Document((5, 7), (6, 4, 8), (-1.0, -2.0, -1.5), -0.4)]
"""A row so short that a part of four of it may train nothing; the two share their prompt."""
STAGES = (0, 2, 3)
HEADS = [(4, 4), (4, 2), (4, 1)]
"""Heads and key-value heads; where these are fewer than ranks, several ranks hold the same."""
CLOSE = {"rel": 2e-5, "abs": 5e-6}
"""Of float32, where sums run in another order."""
LAB = ["steps=2", "generator.seeding=request", "model.init.num_kv_heads=1", "algorithm.kl.coef=0.1", "sft.batch_size=8"]


def llama(heads=4, kv_heads=2, *, seed=0):
    """A tiny Llama whose heads divide among four ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def packer(size, world, **changes):
    """Two rows of at most 31 positions."""
    return Packer(62, 31, CPU, hidden_size=32, columns=columns_of(size, world), **changes)


def share(documents, world):
    """A rank's own documents; the last of several ranks has none."""
    if world.size == 1:
        return documents
    return [] if world.rank == world.size - 1 else documents[world.rank :: world.size - 1]


def make_engines(world, size, stage):
    settings = {"dtype": "float32", "total_updates": 2, "world": world}
    asked = replace(RECIPE, zero_stage=stage, sequence_parallel=size)
    policy = Engine(Policy(llama(), logp_chunk=7), asked, temperature=0.9, **settings)
    frozen = Frozen(Policy(llama(seed=5), logp_chunk=7), asked, dtype="float32", temperature=1.0, world=world)
    return policy, frozen, Critic(value_model(llama().model), asked, **settings)


def figures(world, size, stage, factor=1.0):
    """Scores of this rank's documents, and losses, gradient norms and weights of two optimizer steps."""
    policy, frozen, critic = make_engines(world, size, stage)

    def scores(micro):
        logp_BT, entropy_BT = policy.token_logp(micro)
        found = {"logp": logp_BT, "entropy": entropy_BT}
        return found | {"ref": frozen.token_logp(micro), "value": critic.values(micro)}

    scored = with_scores(share(DOCUMENTS, world), packer(size, world), world, scores)
    found = {"norms": [], "losses": [], "micros": []}
    found["scores"] = {str(one.advantage): {name: x.tolist() for name, x in one.scores.items()} for one in scored}
    for documents, name, prompts_shared in ((DOCUMENTS, "gspo", False), (FEW, "ppo_clip", True)):
        cutter = packer(size, world, share_prompts=prompts_shared)
        batch, metrics, whole_loss = make_batch(share(documents, world), cutter, world), Metrics(world), []
        found["micros"].append([len(batch.micros), any(micro.shares_prompts for micro in batch.micros)])
        if size > 1:  # a micro-batch that trains nothing
            batch = Batch((*batch.micros, cutter.empty()), batch.step_tokens)
        loss_of = partial(policy_loss, policy, name, factor, whole_loss)
        found["norms"] += [update(policy, batch, loss_of, metrics)]
        found["norms"] += [update(critic, batch, partial(value_loss, critic), metrics)]
        found["losses"].append([sum(whole_loss), metrics.reduce()["policy/loss"]])
    return found | {"weights": gathered(policy) | gathered(critic)}


def policy_loss(engine, name, factor, whole_loss, micro):
    logp_BT, _ = engine.token_logp(micro)
    where = {"document_BT": micro.document_BT, "mask_BT": micro.mask_BT} if name == "gspo" else {}
    how = {"clip_low": CLIP, "clip_high": CLIP} | where
    loss_BT, _ = getattr(losses, name)(logp_BT, micro.behavior_logp_BT, micro.adv_BT, **how)
    loss = losses.weighted_sum(loss_BT, micro.weight_BT, engine.world.size)
    whole_loss.append(loss.item() / engine.world.size)
    return factor * loss, {"policy/loss": loss_BT}


def value_loss(engine, micro):
    loss_BT = (engine.values(micro) - micro.adv_BT) ** 2
    return losses.weighted_sum(loss_BT, micro.weight_BT, engine.world.size), {}


def gathered(engine):
    from deepspeed import zero

    with zero.GatheredParameters(list(engine.deepspeed.module.parameters())):
        named = engine.deepspeed.module.named_parameters()
        return {f"{engine.tag}.{name}": param.detach().flatten().tolist() for name, param in named}


def split_gradients(policy, micro, world, columns):
    """Log-probs of a micro-batch, and the gradient of their weighted sum, added up over the ranks of a row."""
    inputs = micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT
    policy.zero_grad()
    logp_BT, _ = policy(*inputs, temperature=1.0, seen_BTT=seen(micro), columns=columns)
    (logp_BT * micro.adv_BT).sum().backward()
    every = world.all_gather_object(gradients(policy))
    return logp_BT, {name: sum(one[name] for one in every) for name in every[0]}


def head_cases(world):
    """How far log-probs and gradients of a row over all ranks are from those of a whole row, for heads and masks.

    With a shared prompt the parts are checkpointed as well, so that the exchange runs again in the backward pass.
    """
    found, columns = {}, columns_of(world.size, world)
    for heads in HEADS:
        alone, cut = (Policy(llama(*heads), logp_chunk=7) for _ in range(2))
        for shared in (False, True):
            if shared:
                cut.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            [micro, *_] = Packer(62, 31, CPU, share_prompts=shared).micros([*FEW, *DOCUMENTS] if not shared else FEW)
            logp_BT, grads = split_gradients(cut, micro, world, columns)
            whole_BT, wanted = split_gradients(alone, micro, Alone(), Columns())
            far = [float((grads[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted]
            found[f"{heads} {shared}"] = [float((logp_BT - whole_BT).detach().abs().max()), max(far)]
    return found


class Alone:
    def all_gather_object(self, item):
        return [item]


def boundary(world):
    """Log-probs of one document across every border, between two others, from rows cut over all ranks."""
    engine = Engine(
        Policy(llama(), logp_chunk=7),
        replace(RECIPE, zero_stage=2, sequence_parallel=world.size),
        dtype="float32",
        temperature=1.0,
        total_updates=1,
        world=world,
    )
    micro = Packer(62, 31, CPU).micro([row_across()])
    with torch.no_grad():
        logp_BT, _ = engine.token_logp(micro)
    return logp_BT[0, micro.mask_BT[0]].tolist()


def row_across():
    """Three documents in 23 positions: the middle one covers 4 to 20, every border of two and of four parts."""
    long = Document(tuple(range(2, 8)), tuple(range(8, 19)), (0.0,) * 11)
    return [Document((2, 3), (4, 5), (0.0, 0.0)), long, Document((9,), (7,), (0.0,))]


def recipe_run(world, folder):
    """What a short run logs; the ranks write into folders of their own, of which the first rank's holds something."""
    return train_here(Path(folder), world, f"on-{world.size}", *LAB, f"engine.sequence_parallel={world.size}")


def on_two_ranks(world, folder):
    found = {str(stage): figures(world, 2, stage) for stage in STAGES}
    found |= {"twice": figures(world, 2, 2, factor=2.0), "boundary": boundary(world)}
    return found | {"run": recipe_run(world, folder)}


def on_four_ranks(world):
    found = {str(size): figures(world, size, 2) for size in (2, 4)}
    return found | {"heads": head_cases(world), "boundary": boundary(world)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def two_ranks(lab):
    return run_ranks(on_two_ranks, folder=str(lab))


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(on_four_ranks, num_ranks=4)


@pytest.fixture(scope="module")
def whole(single_rank):
    return figures(single_rank, 1, 0)


def assert_equal(ranks, size, whole):
    """The losses, norms and weights of whole rows, and each document's scores, on the rank that it came from."""
    for at, wanted in enumerate(whole["losses"]):
        assert sum(one["losses"][at][0] for one in ranks[::size]) == pytest.approx(wanted[0], **CLOSE)
    for one in ranks:
        assert one["norms"] == pytest.approx(whole["norms"], **CLOSE)
        assert [logged for _, logged in one["losses"]] == pytest.approx([x for _, x in whole["losses"]], **CLOSE)
        assert one["weights"].keys() == whole["weights"].keys()
        for name, wanted in whole["weights"].items():
            got_N, wanted_N = torch.tensor(one["weights"][name]), torch.tensor(wanted)
            torch.testing.assert_close(got_N, wanted_N, rtol=2e-5, atol=1e-5)
    places = [Place(rank, len(ranks)) for rank in range(len(ranks))]
    assert [len(one["scores"]) for one in ranks] == [len(share(DOCUMENTS, place)) for place in places]
    found = {key: scores for one in ranks for key, scores in one["scores"].items()}
    assert found.keys() == whole["scores"].keys()
    for key, scores in whole["scores"].items():
        for name, wanted in scores.items():
            assert found[key][name] == pytest.approx(wanted, **CLOSE), name


class Place:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_a_row_take_the_steps_of_one(two_ranks, whole, stage):
    assert_equal([one[str(stage)] for one in two_ranks], 2, whole)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_four_ranks_take_the_steps_of_one(four_ranks, whole, size):
    assert_equal([one[str(size)] for one in four_ranks], size, whole)


def test_the_batches_hold_rows_of_several_documents_and_a_shared_prompt(two_ranks, whole):
    (several, _), (_, shares_prompts) = whole["micros"]
    assert several > 1 and shares_prompts
    assert all(one["2"]["micros"] == whole["micros"] for one in two_ranks)


@pytest.mark.slow
def test_the_ranks_of_a_group_share_its_batches_and_groups_share_the_work(four_ranks, whole):
    assert all(one["4"]["micros"] == whole["micros"] for one in four_ranks)
    groups = [one["2"]["micros"] for one in four_ranks]
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[0][0][0] < whole["micros"][0][0]


def test_a_loss_times_the_ranks_of_a_row_would_show(two_ranks, whole):
    (norm, *_), (right, *_) = two_ranks[0]["twice"]["norms"], whole["norms"]
    assert norm == pytest.approx(2 * right, rel=1e-5)
    with pytest.raises(AssertionError):
        assert_equal([one["twice"] for one in two_ranks], 2, whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", [f"{heads} {shared}" for heads in HEADS for shared in (False, True)])
def test_heads_divide_and_few_key_value_heads_are_repeated(four_ranks, case):
    for one in four_ranks:
        logp_far, grad_far = one["heads"][case]
        assert logp_far < 1e-5 and grad_far < 1e-5


@cache
def golden():
    """Each document of the row alone, by the model's own logits."""
    model, found = llama(), []
    for one in row_across():
        ids = torch.tensor([[*one.prompt_ids, *one.token_ids]])
        logp_TV = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], -1)
        found += logp_TV.gather(-1, ids[0, 1:, None])[len(one.prompt_ids) - 1 :, 0].tolist()
    return found


@pytest.mark.parametrize("ranks", ["two_ranks", pytest.param("four_ranks", marks=pytest.mark.slow)])
def test_a_token_at_a_border_is_predicted_by_the_position_before_it(ranks, request):
    """Of 23 positions, filled up to 24, the last of a part predicts the first of the next."""
    [middle] = [i for i, one in enumerate(row_across()) if one.length > 4]
    start = sum(one.length for one in row_across()[:middle])
    first, last = start + len(row_across()[middle].prompt_ids) - 1, start + row_across()[middle].length - 2
    assert sum(one.length for one in row_across()) == 23
    assert first <= 11 <= last and first <= 17 <= last  # trained: ends of parts, of two and of four
    for one in request.getfixturevalue(ranks):
        assert one["boundary"] == pytest.approx(golden(), **CLOSE)


def test_a_run_on_two_ranks_a_row_logs_what_one_rank_logs(two_ranks, single_rank, lab):
    wanted, got = train_here(lab, single_rank, "on-1", *LAB), two_ranks[0]["run"]
    assert len(got) == len(wanted) == 2
    same = ("policy/", "reward/", "optim/", "tokens/", "mismatch/", "rollouts/", "groups/")
    for one, other in zip(got, wanted, strict=True):
        compared = {key: x for key, x in other.items() if key.startswith(same)}
        assert {"policy/loss", "policy/kl_ref", "optim/grad_norm", "tokens/trained"} <= compared.keys()
        assert {key: one[key] for key in compared} == pytest.approx(compared, rel=1e-3, abs=1e-5)


def test_columns_cover_a_row_once():
    x_BT = torch.arange(1, 15).reshape(2, 7)
    parts = [Columns(rank, 4).own(x_BT) for rank in range(4)]
    assert torch.equal(torch.cat(parts, 1)[:, :7], x_BT) and [part.shape for part in parts] == [(2, 2)] * 4
    assert Counter(torch.cat(parts, 1).flatten().tolist())[0] == 2
    assert Columns().own(x_BT) is x_BT


def test_seen_keeps_documents_apart_and_lets_the_filling_see_itself():
    position_BT = torch.tensor([[0, 1, 0, 1, 2]])
    seen_TT = Columns(0, 2).seen(position_BT, None)[0]
    rows = ["100000", "110000", "001000", "001100", "001110", "000001"]
    assert seen_TT.int().tolist() == [list(map(int, row)) for row in rows]


def test_a_model_that_does_not_ask_for_the_exchange_is_refused(single_rank, whole):
    model = llama().model
    columns = Columns(0, 1, single_rank.neighbours(1))

    class Deaf(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, ulysses):
            return input_ids

    with pytest.raises(RunError, match=r"engine\.sequence_parallel must be 1"):
        in_columns(Deaf(), columns, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
