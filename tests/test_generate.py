import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from tiny import CPU, VOCAB, tiny_policy, tiny_tokenizer, write_folder

from rlpost.batch import document, make_batch
from rlpost.engine import Engine
from rlpost.errors import RunError
from rlpost.generate.base import Canary, SyncReport, canary_tokens, circles
from rlpost.generate.hf import HfGenerator, processed_logp
from rlpost.losses import ppo_clip, weighted_sum
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.policy import load_policy
from rlpost.recipe import EngineRecipe, GeneratorRecipe, Model, Prompting, Recipe
from rlpost.render import Renderer
from rlpost.types import Request, Sampling, Task
from rlpost.update import update

SAMPLING = Sampling(max_new_tokens=12, temperature=0.6, stop_ids=(1, 4))
REQUESTS = [Request(7, Task("a", "ab="), (2, 3, 28), n=5, seed=11), Request(8, Task("b", "c="), (4, 28), n=4, seed=12)]


def make_canary(tolerance=1e-3):
    return Canary.of(canary_tokens((2, 3, 28), VOCAB), tolerance=tolerance, device=CPU)


def make_renderer():
    return Renderer(tiny_tokenizer(), Prompting(), context=64)


def make_engine(world, policy, *, temperature=0.6):
    asked = EngineRecipe(lr=0.05, eps=1e-3)
    return Engine(policy, asked, dtype="float32", temperature=temperature, total_updates=9, world=world)


def trainer_logps(engine, rollouts):
    """The trainer's log-probs of each rollout's tokens."""
    results = []
    for rollout in rollouts:
        one = document(replace(rollout, reward=1.0))
        micro = Packer(1, 1, CPU).micro([[one]], one.length)
        results.append(engine.token_logp(micro)[0][micro.mask_BT].tolist())
    return results


def furthest(engine, rollouts):
    pairs = zip(trainer_logps(engine, rollouts), rollouts, strict=True)
    return max(abs(a - b) for own, rollout in pairs for a, b in zip(own, rollout.behavior_logp, strict=True))


def learn(engine, rollouts):
    """One update on some rollouts, with advantages that differ."""
    documents = [
        replace(document(replace(rollout, reward=1.0)), advantage=2.0 * (i % 2) - 1)
        for i, rollout in enumerate(rollouts)
    ]
    batch = make_batch(documents, Packer(64, 64, CPU), engine.world)

    def loss_of(micro):
        logp_BT, _ = engine.token_logp(micro)
        loss_BT, _ = ppo_clip(logp_BT, micro.behavior_logp_BT, micro.adv_BT, clip_low=0.2, clip_high=0.28)
        return weighted_sum(loss_BT, micro.weight_BT, engine.world.size), {}

    update(engine, batch, loss_of, Metrics(engine.world))


def test_a_request_is_told_of_when_its_answers_have_ended_and_with_these_very_answers(single_rank):
    engine = make_engine(single_rank, tiny_policy())
    generator = HfGenerator(Recipe(), make_renderer(), make_canary(), single_rank)
    told = []
    with generator.awake(engine, 0):
        rollouts = generator.generate(REQUESTS, SAMPLING, told.append)
    assert [len(group) for group in told] == [5, 4]
    assert [id(one) for group in told for one in group] == [*map(id, rollouts)]


# The canary.


class Scores:
    """An engine that gives these log-probs."""

    def __init__(self, logp):
        self.logp = torch.tensor([[*logp, 0.0]])

    def token_logp(self, micro, *, temperature):
        return self.logp, None


def test_canary_reports_mean_and_largest_difference():
    canary, report = Canary.of((2, 3, 4, 5), tolerance=0.3, device=CPU), SyncReport()
    canary.compare(canary.trainer_logp(Scores([-1.0, -2.0, -3.0])), [-1.0, -2.25, -3.5], report)
    assert (report.canary_mean, report.canary_max) == (0.25, 0.5)


@pytest.mark.parametrize("generator_logp", [[-1.0, -2.4, -3.6], [-1.0, math.nan, -3.0], [-1.0, -math.inf, -3.0]])
def test_t39_canary_stops_the_run_where_log_probs_differ(generator_logp):
    canary = Canary.of((2, 3, 4, 5), tolerance=0.3, device=CPU)
    with pytest.raises(RunError, match=r"generator\.canary_tolerance.* 0\.3 nats .*over 3 tokens"):
        canary.compare(canary.trainer_logp(Scores([-1.0, -2.0, -3.0])), generator_logp, SyncReport())


def test_t28_canary_scores_every_token_but_the_first():
    micro = Canary.of((2, 3, 4), tolerance=1.0, device=CPU).micro
    assert micro.target_BT[micro.mask_BT].tolist() == [3, 4]


def test_canary_tokens_are_the_prompt_s_first_and_never_few():
    assert canary_tokens(range(100), 200) == tuple(range(64))
    assert canary_tokens((5, 6, *range(14)), 29) == (5, 6, *range(14))
    short = canary_tokens((2,), 29)
    assert len(short) == 16 and short[0] == 2 and all(0 <= token < 29 for token in short)


# Plain transformers, the reference.


@pytest.fixture
def hf(single_rank):
    engine = make_engine(single_rank, tiny_policy(tie=False))
    generator = HfGenerator(Recipe(), make_renderer(), make_canary(), single_rank)
    return engine, generator


def test_t16_hf_behaviour_log_probs_are_the_trainers_after_two_updates(hf):
    engine, generator = hf
    for version in range(3):
        with generator.awake(engine, version):
            rollouts = generator.generate(REQUESTS, SAMPLING)
        assert furthest(engine, rollouts) < 1e-5
        assert {rollout.version for rollout in rollouts} == {version}
        assert generator.report.canary_max < 1e-5 and generator.report.num_bytes > 0
        learn(engine, rollouts)


def test_temperature_zero_is_the_greedy_choice(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        greedy = generator.generate(REQUESTS, replace(SAMPLING, temperature=0.0))
        nearly = generator.generate(REQUESTS, replace(SAMPLING, temperature=1e-4))
    assert [rollout.token_ids for rollout in greedy] == [rollout.token_ids for rollout in nearly]
    assert len({rollout.token_ids for rollout in greedy[:5]}) == 1


REPEATS = {"repeats": (3, 4), "max_new_tokens": 24, "temperature": 0.3, "stop_ids": ()}
"""An untrained model at this temperature goes round in circles soon, and at different moments."""


def check_circles(rollouts, others):
    """Each answer ends where it has come full circle, and no earlier; `others` ran on, with the same dice."""
    assert "repetition" in {rollout["finish_reason"] for rollout in rollouts}
    for rollout, other in zip(rollouts, others, strict=True):
        ids = tuple(rollout["token_ids"])
        assert ids == tuple(other)[: len(ids)]
        at = [end for end in range(1, len(other) + 1) if circles(other[:end], 3, 4)]
        assert len(ids) == (at[0] if at else len(other))
        assert (rollout["finish_reason"] == "repetition") == (bool(at) and len(ids) < 24)


def test_hf_ends_what_goes_round_in_circles(hf):
    engine, generator = hf
    free = replace(SAMPLING, **REPEATS | {"repeats": None})
    with generator.awake(engine, 0):
        rollouts = generator.generate(REQUESTS, replace(SAMPLING, **REPEATS))
        others = generator.generate(REQUESTS, free)
    assert all(rollout.truncated for rollout in rollouts)
    check_circles([rollout_as_json(rollout) for rollout in rollouts], [other.token_ids for other in others])


def test_a_request_may_ask_for_fewer_tokens_than_the_sampling_allows(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        rollouts = generator.generate([replace(REQUESTS[0], limit=3), REQUESTS[1]], replace(SAMPLING, stop_ids=()))
    assert [len(one.token_ids) for one in rollouts] == [3] * 5 + [SAMPLING.max_new_tokens] * 4


def test_hf_gives_n_rollouts_a_request_in_order(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        rollouts = generator.generate(REQUESTS, SAMPLING)
    assert [rollout.group for rollout in rollouts] == [7] * 5 + [8] * 4
    for rollout in rollouts:
        assert rollout.prompt_ids == rollout.sampled_prompt_ids == REQUESTS[rollout.group - 7].prompt_ids
        assert len(rollout.token_ids) == len(rollout.behavior_logp)
        assert rollout.text == generator.renderer.decode(rollout.token_ids)


def check_ends(rollouts, sampling):
    """Both ways to end are seen, each where its reason says."""
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        stops = [token in sampling.stop_ids for token in rollout.token_ids]
        assert sum(stops) == (rollout.finish_reason == "stop")
        assert stops[-1] if rollout.finish_reason == "stop" else len(stops) == sampling.max_new_tokens


def test_t22_hf_ends_at_the_first_stop_token_which_it_keeps(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        rollouts = generator.generate([replace(request, n=16) for request in REQUESTS], SAMPLING)
    check_ends(rollouts, SAMPLING)


def test_hf_answers_depend_on_the_seed_and_on_nothing_else(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        first = generator.generate(REQUESTS, SAMPLING)
        torch.rand(3)
        assert generator.generate(REQUESTS[::-1], SAMPLING) == first[5:] + first[:5]
        other = generator.generate([replace(REQUESTS[0], seed=99)], SAMPLING)
    assert [rollout.token_ids for rollout in other] != [rollout.token_ids for rollout in first[:5]]


@pytest.mark.parametrize("sampling", [replace(SAMPLING, top_k=3), replace(SAMPLING, top_p=0.5)])
def test_t17_hf_log_probs_are_those_of_the_truncated_distribution(hf, sampling):
    engine, generator = hf
    with generator.awake(engine, 0):
        rollouts = generator.generate(REQUESTS, sampling)
    gaps = [
        behavior - trainer
        for rollout, own in zip(rollouts, trainer_logps(engine, rollouts), strict=True)
        for behavior, trainer in zip(rollout.behavior_logp, own, strict=True)
    ]
    # What is left out makes the rest likelier: the gap is -log of the mass kept.
    assert min(gaps) > -1e-5 and max(gaps) > 0.1


def test_t39_one_changed_weight_moves_the_generator_by_the_predicted_amount(hf):
    engine, generator = hf

    def own():
        return engine.token_logp(generator.canary.micro, temperature=1.0)[0][0, :-1].detach()

    with generator.awake(engine, 0):
        before, own_before = torch.tensor(generator._score()), own()
    with torch.no_grad():
        engine.deepspeed.module.model.lm_head.weight[9] += 0.5
    with generator.awake(engine, 1):
        after, own_after = torch.tensor(generator._score()), own()
    assert float((own_after - own_before).abs().max()) > 0.05
    torch.testing.assert_close(after - before, own_after - own_before, rtol=0, atol=1e-5)


def test_t39_stale_generator_weights_stop_the_run(hf):
    engine, generator = hf
    with generator.awake(engine, 0):
        pass
    with torch.no_grad():
        engine.deepspeed.module.model.lm_head.weight[9] += 0.5
    with (
        pytest.raises(RunError, match="does not sample from the policy that is trained"),
        generator.awake(engine, 0),
    ):
        pass


def test_processed_logp_matches_hand_table():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))

    def kept(**options):
        return processed_logp(logits, Sampling(max_new_tokens=1, **options)).exp()[0].tolist()

    assert kept() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert kept(temperature=0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert kept(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_k=99) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert kept(top_p=0.5) == pytest.approx([4 / 7, 3 / 7, 0, 0])  # the token that crosses the bound stays
    assert kept(top_p=1e-9) == [1.0, 0.0, 0.0, 0.0]
    # Temperature first: at 0.5 the first two have 25/30 of the mass.
    assert kept(temperature=0.5, top_p=0.8) == pytest.approx([16 / 25, 9 / 25, 0, 0])


# vLLM, in a process of its own: it cannot be started twice in one.


def run_vllm(world, tie):
    from rlpost.generate.local_vllm import LocalVllm

    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), tie=tie, hidden=64)
        asked = Recipe(
            model=Model(dtype="float32", context=64), generator=GeneratorRecipe(kv_cache_gib=0.05, max_num_seqs=16)
        )
        engine = make_engine(world, load_policy(folder, asked.model))
        generator = LocalVllm(asked, folder, make_renderer(), make_canary(), world)
        try:
            return use_vllm(generator, engine)
        finally:
            generator.close()


def use_vllm(generator, engine):
    dice = torch.get_rng_state()
    with generator.awake(engine, 0):
        generator.generate(REQUESTS, SAMPLING)
        own_dice = torch.equal(dice, torch.get_rng_state())
        result = {"own_dice": own_dice} | sample_vllm(generator)
    result |= {"furthest": [], "canary": [], "bytes": [], "versions": []}
    for version in range(3):
        with generator.awake(engine, version):
            rollouts = generator.generate(REQUESTS, SAMPLING)
        result["furthest"].append(furthest(engine, rollouts))
        result["canary"].append(generator.report.canary_max)
        result["bytes"].append(generator.report.num_bytes)
        result["versions"].append(sorted({rollout.version for rollout in rollouts}))
        learn(engine, rollouts)
    with generator.awake(engine, 3):
        pass
    with torch.no_grad():
        engine.deepspeed.module.model.model.norm.weight[0] += 3.0
    try:
        with generator.awake(engine, 3):
            result["stale"] = "not noticed"
    except RunError as error:
        result["stale"] = str(error)
    return result


def sample_vllm(generator):
    def ids(requests, **changes):
        return [rollout.token_ids for rollout in generator.generate(requests, replace(SAMPLING, **changes))]

    many = [replace(request, n=16) for request in REQUESTS]
    told = []
    rollouts = generator.generate(many, SAMPLING, told.append)
    torch.rand(3)
    result = {
        "rollouts": [rollout_as_json(rollout) for rollout in rollouts],
        "call_seed_repeats": ids(many) == [rollout.token_ids for rollout in rollouts],
        "told_whole": sorted(id(one) for group in told for one in group) == sorted(map(id, rollouts)),
        "told_sizes": [len(group) for group in told],
        "nothing": generator.generate([], SAMPLING),
        "greedy_logp": [one.behavior_logp for one in generator.generate(REQUESTS, replace(SAMPLING, top_k=1))],
    }
    generator.recipe.seeding = "request"
    result["circles"] = [rollout_as_json(one) for one in generator.generate(REQUESTS, replace(SAMPLING, **REPEATS))]
    result["others"] = ids(REQUESTS, **REPEATS | {"repeats": None})
    result["limited"] = [len(one) for one in ids([replace(REQUESTS[0], limit=3), REQUESTS[1]], stop_ids=())]
    together, alone = ids(REQUESTS), ids(REQUESTS[1:])
    result["request_seed_is_its_own"] = together[5:] == alone
    result["samples_differ"] = len(set(together[:5])) > 1
    generator.recipe.seeding = "call"
    return result


def rollout_as_json(rollout):
    keys = ("group", "prompt_ids", "token_ids", "behavior_logp", "finish_reason", "version", "text")
    return {key: getattr(rollout, key) for key in keys}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def vllm(request):
    [result] = run_ranks(run_vllm, num_ranks=1, tie=request.param)
    return result


@pytest.mark.slow
def test_vllm_ends_what_goes_round_in_circles_and_where_a_request_says(vllm):
    check_circles(vllm["circles"], vllm["others"])
    assert max(vllm["limited"][:5]) == 3 and max(vllm["limited"][5:]) > 3  # the model's own end may come first


@pytest.mark.slow
def test_vllm_tells_of_a_request_when_its_answers_have_ended(vllm):
    assert vllm["told_whole"] and vllm["told_sizes"] == [16, 16]


@pytest.mark.slow
def test_t16_t39_vllm_log_probs_are_the_trainers_after_two_updates(vllm):
    assert max(vllm["furthest"]) < 1e-4 and max(vllm["canary"]) < 1e-4
    assert vllm["versions"] == [[0], [1], [2]] and min(vllm["bytes"]) > 0


@pytest.mark.slow
def test_t39_vllm_with_stale_weights_stops_the_run(vllm):
    assert "does not sample from the policy that is trained" in vllm["stale"]


@pytest.mark.slow
def test_t22_vllm_ends_at_the_first_stop_token_which_it_keeps(vllm):
    check_ends([SimpleNamespace(**rollout) for rollout in vllm["rollouts"]], SAMPLING)


@pytest.mark.slow
def test_vllm_gives_n_rollouts_a_request_in_order(vllm):
    rollouts = vllm["rollouts"]
    assert [rollout["group"] for rollout in rollouts] == [7] * 16 + [8] * 16
    renderer = make_renderer()
    for rollout in rollouts:
        assert tuple(rollout["prompt_ids"]) == REQUESTS[rollout["group"] - 7].prompt_ids
        assert len(rollout["token_ids"]) == len(rollout["behavior_logp"])
        assert rollout["text"] == renderer.decode(rollout["token_ids"])
    assert vllm["nothing"] == []


@pytest.mark.slow
def test_vllm_seeds_reproduce(vllm):
    assert vllm["call_seed_repeats"] and vllm["request_seed_is_its_own"] and vllm["samples_differ"]


@pytest.mark.slow
def test_vllm_draws_nothing_of_what_the_trainer_draws(vllm):
    """Else a run that goes on, and scores its canary once more, would have other dice from there on."""
    assert vllm["own_dice"]


@pytest.mark.slow
def test_t17_vllm_log_probs_are_those_of_the_truncated_distribution(vllm):
    assert all(logp == pytest.approx([0.0] * len(logp), abs=1e-5) for logp in vllm["greedy_logp"])
