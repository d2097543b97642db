"""Stop texts and answers in several turns by real generators: plain transformers, and vLLM in a process of its own."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_generate import make_renderer
from tiny import write_folder

from rlpost.collect import answers
from rlpost.generate.hf import FolderHf
from rlpost.recipe import GeneratorRecipe, Model, Recipe
from rlpost.types import Request, Sampling, Task

GREEDY = Sampling(max_new_tokens=24, temperature=0.0, stop_ids=(1,))
REQUESTS = [Request(i, Task(f"t{i}", "ab="), (2 + i, 3, 28), n=1, seed=11 + i) for i in range(4)]
MANY = [replace(one, n=3) for one in REQUESTS]


def make_recipe():
    generator = GeneratorRecipe(kv_cache_gib=0.05, max_num_seqs=16, seeding="request")
    return Recipe(model=Model(dtype="float32", context=64), generator=generator)


def in_three(stop):
    """Leads an answer over three turns; the tool says more than a block of the cache holds."""

    async def leads(talk):
        await talk.generate(stop=stop, max_new_tokens=6)
        talk.append("toolsays" * 2)
        await talk.generate(max_new_tokens=5)
        talk.append("again")
        await talk.generate(stop=stop)

    return leads


def observe(generator, stop):
    """What a generator makes of stop texts, as JSON."""
    plain = generator.generate(REQUESTS, GREEDY)
    cut = generator.generate(REQUESTS, replace(GREEDY, stop=stop))
    drawn = generator.generate([replace(REQUESTS[0], n=32)], replace(GREEDY, temperature=1.0, stop=("m", "xy")))
    long = replace(GREEDY, max_new_tokens=50)
    turns = answers(generator, make_renderer(), REQUESTS, replace(long, rollout=in_three(stop)))
    mixed = answers(generator, make_renderer(), MANY, replace(long, temperature=1.0, rollout=in_three(stop)))
    names = {"plain": plain, "cut": cut, "drawn": drawn, "turns": turns, "mixed": mixed}
    return {name: [as_json(one) for one in rollouts] for name, rollouts in names.items()}


def as_json(one):
    prompt, logp = list(one.prompt_ids), [None if math.isnan(x) else x for x in one.behavior_logp]
    return {"prompt": prompt, "ids": list(one.token_ids), "logp": logp, "text": one.text, "finish": one.finish_reason}


def stop_texts(generator):
    """Two characters from the middle of each greedy answer."""
    return tuple(dict.fromkeys(one.text[4:6] for one in generator.generate(REQUESTS, GREEDY)))


def run_both(world):
    from rlpost.generate.local_vllm import FolderVllm

    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), hidden=64)
        hf = FolderHf(make_recipe(), folder, make_renderer(), world)
        stop = stop_texts(hf)
        vllm = FolderVllm(make_recipe(), folder, make_renderer(), world)
        try:
            found = {"vllm": observe(vllm, stop), "hf": observe(hf, stop), "stop": stop}
        finally:
            vllm.close()
        with torch.no_grad():
            found["own"] = [trainer_logp(hf.model, one) for one in found["vllm"]["mixed"]]
        return found


def trainer_logp(model, one):
    ids = torch.tensor([one["prompt"] + one["ids"]])
    logp_TV = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
    return logp_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(one["prompt"]) - 1 :].tolist()


def check_stops(found, stop):
    """Answers end with the token that completes the first stop text, or an end token, or are cut off."""
    for one, whole in zip(found["cut"], found["plain"], strict=True):
        first = min(whole["text"].index(text) + len(text) for text in stop if text in whole["text"])
        assert one["ids"] == whole["ids"][:first] and one["finish"] == "stop" and len(one["logp"]) == first
    for one in found["drawn"]:
        ends = [one["text"].index(text) + len(text) for text in ("m", "xy") if text in one["text"]]
        length = min(ends) if ends else len(one["text"])
        assert len(one["text"]) == length and len(one["logp"]) == len(one["ids"])
        assert one["finish"] == ("stop" if ends or one["ids"][-1] == 1 else "length")
    assert {one["finish"] for one in found["drawn"]} >= {"stop"}


def check_turns(found):
    """Tool tokens, and no others, have no log-prob."""
    for one in (*found["turns"], *found["mixed"]):
        assert one["text"].count("toolsays" * 2) == 1 and "again" in one["text"]
        assert one["logp"].count(None) == len("toolsays" * 2 + "again")


def test_hf_ends_at_stop_texts_and_goes_on_after_tools(single_rank, tmp_path):
    hf = FolderHf(make_recipe(), write_folder(tmp_path, hidden=64), make_renderer(), single_rank)
    stop = stop_texts(hf)
    found = observe(hf, stop)
    check_stops(found, stop)
    check_turns(found)


@pytest.fixture(scope="module")
def both():
    [found] = run_ranks(run_both, num_ranks=1)
    return found


@pytest.mark.slow
def test_vllm_ends_at_stop_texts_as_hf_does(both):
    check_stops(both["vllm"], both["stop"])
    for name in ("plain", "cut"):
        assert [(one["ids"], one["finish"]) for one in both["vllm"][name]] == [
            (one["ids"], one["finish"]) for one in both["hf"][name]
        ]


@pytest.mark.slow
def test_vllm_and_hf_write_the_same_greedy_answers_in_several_turns(both):
    check_turns(both["vllm"])
    assert [(one["ids"], one["finish"]) for one in both["vllm"]["turns"]] == [
        (one["ids"], one["finish"]) for one in both["hf"]["turns"]
    ]


@pytest.mark.slow
def test_t16_log_probs_behind_a_tool_are_the_trainers(both):
    pairs = [
        (behavior, own)
        for one, own_T in zip(both["vllm"]["mixed"], both["own"], strict=True)
        for behavior, own in zip(one["logp"], own_T, strict=True)
        if behavior is not None
    ]
    assert len(pairs) > 50 and max(abs(behavior - own) for behavior, own in pairs) < 1e-4
