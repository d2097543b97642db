"""The ledger of a run: against what PyTorch counts, over ranks, and from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lab import make_lab, train_here
from test_flops import counted
from test_metrics import OneRank, Ranks
from tiny import CPU, logp_and_entropy, ragged, tiny_llama

from rlpost.accounts import Accounts, Counted
from rlpost.clock import Clock
from rlpost.flops import Costs, causal_pairs
from rlpost.generate.hf import HfGenerator
from rlpost.metrics import Metrics
from rlpost.model_costs import model_costs
from rlpost.packing import Packer
from rlpost.policy import Policy
from rlpost.recipe import Model
from rlpost.types import Request, Sampling, Task

COSTS = Costs(weights=10, dx=10, dw=10, pair=4, head=5, non_embedding=12)
EAGER = Model(path="here", attention="eager")
DOCUMENTS = [replace(one, prompt_ids=(5, 6, 7, 8), group=0) for one in ragged(6, seed=0)]
"""Of one prompt."""


def accounts(**changes) -> Accounts:
    return Accounts(**({"policy": COSTS, "critic": COSTS, "ranks": 1} | changes))


def ledger(of: Accounts) -> dict[str, float]:
    metrics = Metrics(OneRank())
    of.log(metrics)
    return metrics.reduce()


def one_row():
    [micro] = Packer(200, 200, CPU).micros(DOCUMENTS)
    return micro


def sizes_of(micro) -> dict[str, int]:
    """As plain attention pays for it."""
    positions = micro.tokens_BT.numel()
    return {"positions": positions, "pairs": positions * micro.tokens_BT.shape[1], "logits": micro.num_trained}


@pytest.mark.parametrize("shared", [False, True])
def test_training_and_scoring_are_what_torch_counts(shared) -> None:
    model = tiny_llama(attention="eager")
    policy, found = Policy(model, logp_chunk=7), accounts(policy=model_costs(model, EAGER, with_head=True))
    micros = Packer(64, 64, CPU, share_prompts=shared).micros(DOCUMENTS)
    assert any(micro.shares_prompts for micro in micros) == shared
    work = {"flops/prox": 0, "flops/train": 0}
    for micro in micros:
        found.passed("prox", micro)
        found.passed("train", micro, trained=True)
        forward = counted(lambda micro=micro: logp_and_entropy(policy, micro))
        logp_BT, _ = logp_and_entropy(policy, micro)
        work["flops/prox"] += forward
        work["flops/train"] += forward + counted(lambda logp_BT=logp_BT: logp_BT.sum().backward())
    logged = ledger(found)
    assert {name: logged[name] for name in work} == work
    assert logged["flops/needed_train"] < logged["flops/train"]
    assert logged["tokens/processed"] == sum(one.length for one in DOCUMENTS)


def test_a_shared_prompt_is_one_copy_in_what_is_needed_and_one_each_in_what_is_processed() -> None:
    alone, lengths = one_row(), [one.length for one in DOCUMENTS]
    [shared] = Packer(200, 200, CPU, share_prompts=True).micros(DOCUMENTS)
    assert shared.shares_prompts
    assert alone.num_tokens == alone.num_positions == shared.num_tokens == sum(lengths)
    assert shared.num_positions == sum(lengths) - 5 * 3  # all of it but the last token, which predicts
    assert alone.num_pairs == causal_pairs(lengths)
    assert shared.num_pairs == causal_pairs(lengths) - 5 * causal_pairs([3])
    assert alone.num_trained == shared.num_trained == int(shared.mask_BT.sum())
    empty = Packer(8, 8, CPU).empty()
    assert (empty.num_tokens, empty.num_positions, empty.num_pairs, empty.num_trained) == (0, 0, 0, 0)


def make_generator() -> HfGenerator:
    """The real one, with its model already there."""
    recipe = SimpleNamespace(engine=SimpleNamespace(sync_bucket_mib=1))
    renderer, world = SimpleNamespace(decode=lambda ids: ""), SimpleNamespace(device=CPU)
    generator = HfGenerator(recipe, renderer, None, world)  # type: ignore[arg-type]
    generator.model = tiny_llama(attention="eager").eval()
    return generator


def test_generation_with_transformers_is_what_torch_counts() -> None:
    generator, clock = make_generator(), Clock()
    found = accounts(policy=model_costs(generator.model, EAGER, with_head=True))
    short, long = (
        Request(0, Task("a", "a"), (2, 3, 28), n=5, seed=11),
        Request(1, Task("b", "b"), (4,) * 7, n=3, seed=12),
    )
    wrapped, rollouts = Counted(generator, found, clock), []

    def run() -> None:
        with clock("generate"):
            rollouts.extend(wrapped.generate([short, long], Sampling(max_new_tokens=6, stop_ids=(1, 4, 9))))

    assert counted(run) == found._now["flops/generate"]
    logged = ledger(found)
    assert logged["tokens/prompt"] == 10 and 0 < logged["flops/needed_generate"] < logged["flops/generate"]
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 1  # some rows waited for the longest


def test_answers_find_whole_blocks_of_their_prompt() -> None:
    alone = COSTS.generation(prompt=9, completions=[3], block=4)
    assert alone == COSTS.forward(positions=11, pairs=causal_pairs([11]), logits=3)
    second = COSTS.generation(prompt=9, completions=[3, 3], block=4) - alone
    assert second == COSTS.forward(positions=3, pairs=causal_pairs([11]) - causal_pairs([8]), logits=3)
    # The last token of a prompt gives the first log-prob, so a prompt of 8 is not found whole.
    short = COSTS.generation(prompt=8, completions=[1, 1], block=4)
    short -= COSTS.generation(prompt=8, completions=[1], block=4)
    assert short == COSTS.forward(positions=4, pairs=causal_pairs([8]) - causal_pairs([4]), logits=1)
    assert COSTS.generation(prompt=9, completions=[3, 3], block=0) == 2 * alone


def test_a_later_turn_finds_what_an_earlier_one_has_computed() -> None:
    found, clock = accounts(), Clock()
    turns = iter([3, 5])
    inner = SimpleNamespace(
        generate=lambda requests, sampling, whole: [SimpleNamespace(token_ids=(1,) * next(turns))], prompt_block=4
    )
    wrapped = Counted(inner, found, clock)  # type: ignore[arg-type]
    with clock("generate"):  # a prompt of 9, 3 tokens of the policy, 4 of a tool, 5 of the policy
        wrapped.generate([Request(0, Task("a", "a"), (1,) * 9, n=1, seed=0)], Sampling(9))
        wrapped.generate([Request(0, Task("a", "a"), (1,) * 16, n=1, seed=0, known=11)], Sampling(9))
    logged = ledger(found)
    assert logged["tokens/prompt"] == 9 + 5  # the last token of the first turn comes with those of the tool
    first = COSTS.forward(positions=11, pairs=causal_pairs([11]), logits=3)
    again = COSTS.forward(positions=12, pairs=causal_pairs([20]) - causal_pairs([8]), logits=5)
    assert logged["flops/generate"] == first + again
    needed = COSTS.forward(positions=9, pairs=causal_pairs([20]) - causal_pairs([11]), logits=5)
    assert logged["flops/needed_generate"] == first + needed
    whole = COSTS.generation(prompt=9, completions=[12], block=1)  # as one answer, but for the logits of the tool
    assert first + needed == whole - COSTS.forward(positions=0, pairs=0, logits=4)


def test_purposes_are_the_phases_of_the_clock_and_an_evaluation_stays_out_of_the_step() -> None:
    clock, found = Clock(), accounts()
    answers = [SimpleNamespace(token_ids=(1,) * 3)] * 2
    inner = SimpleNamespace(generate=lambda requests, sampling, whole: answers, prompt_block=4)
    wrapped = Counted(inner, found, clock)  # type: ignore[arg-type]
    phases = ("generate", "measure", "evaluate")
    for phase in phases:
        with clock(phase):
            wrapped.generate([Request(0, Task("a", "a"), (1,) * 9, n=2, seed=0)], Sampling(4))
    spent = COSTS.generation(prompt=9, completions=[3, 3], block=4)
    assert [found._now[f"flops/{phase}"] for phase in phases] == [spent] * 3
    assert (found._now["tokens/prompt"], found._now["tokens/evaluated"]) == (18, 6)


def test_sums_over_ranks_and_device_seconds_are_of_all_of_them() -> None:
    micro = one_row()

    def work(rank, world):
        found, metrics = accounts(ranks=2, peak=1e3), Metrics(world)
        for _ in range(rank + 1):
            found.passed("train", micro, trained=True)
        shown = []
        for _ in range(2):
            found.log(metrics)
            metrics.mean("time/train_s", 2.0 + rank)
            metrics.mean("time/step_s", 9.0)
            metrics.sum("rollouts/num", 4)
            shown.append(found.close_step(metrics.reduce()))
        return shown[0], found.totals

    (first, totals), other = Ranks(2).run(work)
    assert other == (first, totals)
    sizes = sizes_of(micro)
    needed = 3 * COSTS.needed(positions=micro.num_positions, pairs=micro.num_pairs, logits=micro.num_trained)
    assert first["flops/total"] == totals["flops/total"] == 3 * (COSTS.forward(**sizes) + COSTS.backward(**sizes))
    assert first["flops/six_nt"] == 6 * 12 * 3 * micro.num_tokens
    assert first["mfu/train"] == pytest.approx(needed / (1e3 * 2 * 2.5))
    assert totals["rollouts/num"] == 16 and totals["device_s"] == totals["device_s/train"] == 2 * 2 * 2.5
    assert first["total/rollouts/num"] == 8


def test_ranks_that_share_a_row_share_its_cost() -> None:
    whole, half = accounts(), accounts(sharing=2)
    for one in (whole, half):
        one.passed("train", one_row(), trained=True)
    assert ledger(half) == {name: x / 2 for name, x in ledger(whole).items()}


def test_attention_by_document_pays_for_no_masked_pair() -> None:
    micro, found = one_row(), accounts(by_document=True)
    found.passed("reference", micro)
    assert ledger(found) == {"flops/reference": COSTS.forward(**sizes_of(micro) | {"pairs": micro.num_pairs})}


def test_a_model_whose_cost_is_not_known_logs_tokens_and_no_flops() -> None:
    micro, found = one_row(), accounts(policy=None)
    found.passed("train", micro, trained=True)
    assert ledger(found) == {"tokens/processed": micro.num_tokens}
    assert "flops/total" not in found.close_step({"tokens/processed": 4.0})
    assert found.totals == {"tokens/processed": 4.0}


def test_accounts_resume_exactly() -> None:
    found, resumed = accounts(), accounts()
    found.close_step({"tokens/generated": 5.0, "time/train_s": 1.0, "energy/gpu_j": 2.0})
    shown = found.close_evaluation([{"flops/evaluate": 3.0}, {"flops/evaluate": 4.0, "tokens/evaluated": 1.0}])
    assert shown["flops/evaluate"] == shown["total/flops/evaluate"] == 7 and shown["tokens/evaluated"] == 1
    resumed._now["flops/train"] = 1.0  # of a step that failed
    resumed.load_state_dict(json.loads(json.dumps(found.state_dict())))
    for one in (found, resumed):
        one.close_step(ledger(one) | {"tokens/generated": 1.0})
    assert resumed.totals == found.totals
    assert found.totals["flops/evaluate"] == 7 and found.totals["tokens/generated"] == 6


def test_an_interrupted_run_has_the_totals_of_one_that_was_not(single_rank, tmp_path) -> None:
    lab = make_lab(tmp_path)
    asked = ["sft=null", "logging.noise_every=2", "tasks.train.config.size=6"]
    whole = train_here(lab, single_rank, "whole", *asked, "steps=4")
    train_here(lab, single_rank, "cut", *asked, "steps=2")
    cut = train_here(lab, single_rank, "cut", *asked, "steps=4", "resume=auto")
    assert cut == whole and len(whole) == 4
    last = whole[-1]
    for name in ("tokens/generated", "tokens/prompt", "flops/train", "flops/generate", "flops/total", "rollouts/num"):
        assert last[f"total/{name}"] == pytest.approx(sum(line[name] for line in whole), rel=1e-12)
        assert last[f"total/{name}"] > 0
    assert whole[2]["noise/prompts"] == 4 and "noise/prompts" not in whole[1]
    assert sum(line["capability/revisited"] for line in whole) > 0
    summary = json.loads((lab / "runs/cut/summary.json").read_text())
    assert summary["totals"]["flops/total"] == last["total/flops/total"]
