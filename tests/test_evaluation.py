"""`rlpost eval`: data sets by name and file, intervals, answers that are kept, on real generators and ranks."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tiny import write_folder

from rlpost.__main__ import BAD_RECIPE, FAILED, main
from rlpost.errors import RecipeError, RunError
from rlpost.evaluation.answers import append, open_folder, read_answers
from rlpost.evaluation.intervals import intervals
from rlpost.evaluation.model import evaluate_sets
from rlpost.evaluation.options import asked_of, numbers
from rlpost.evaluation.sets import SETS, recipes_of

WORDS = ["cat", "dog", "horse", "hen", "sheep", "pig", "goose"]
REWARD = '''
def has_a(rollout):
    """1 where the answer has an a."""
    return float("a" in rollout.text)


def first_letter(rollout):
    return rollout.text[:1] or None
'''
SET = """
tasks: {eval: {path: words.jsonl, extra: [size], answer: null}, prompting: {suffix: "="}}
rewards: [{use: "evalrewards:has_a"}]
sampling: {max_new_tokens: 6}
evaluation: {vote: "evalrewards:first_letter", by: size}
"""
HF = ["generator.kind=hf", "model.dtype=float32", "model.context=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with a tiny model, two data sets and a reward."""
    folder = tmp_path_factory.mktemp("eval")
    write_folder(folder / "model")
    (folder / "evalrewards.py").write_text(REWARD)
    rows = [{"prompt": word, "size": len(word)} for word in WORDS]
    for name, some in (("words", rows), ("few", rows[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "words.yaml").write_text(SET)
    (folder / "few.yaml").write_text(SET.replace("words.jsonl", "few.jsonl"))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def evaluate(world, sets, out, *overrides, **asked):
    recipes = recipes_of("model", sets, [*HF, *overrides], asked={"n": 4, **asked})
    return evaluate_sets(recipes, world, out=out)


def test_a_model_on_two_sets_keeps_every_answer_and_what_it_depends_on(here, single_rank, tmp_path, capsys):
    found = evaluate(single_rank, ["words.yaml", "few.yaml"], tmp_path / "out", k=[3])
    figures = found["words"]["figures"]
    assert {"pass@1", "pass@2", "pass@3", "pass@4", "maj@4", "truncated_frac", "pass@1/size=3"} <= figures.keys()
    assert figures["num_problems"] == 7 and found["few"]["figures"]["num_problems"] == 2
    low, high = found["words"]["intervals"]["pass@1"]
    assert 0 <= low <= figures["pass@1"] == figures["mean@4"] <= high <= 1
    lines = read_answers(tmp_path / "out")
    assert [line["key"] for line in lines if line["set"] == "few"] == [line["key"] for line in lines[:2]]
    words = [line for line in lines if line["set"] == "words"]
    share = [sum("a" in answer["text"] for answer in line["answers"]) / 4 for line in words]
    assert figures["pass@1"] == pytest.approx(sum(share) / 7)
    result = json.loads((tmp_path / "out/result.json").read_text())
    asked = result["sets"]["words"]["asked"]
    assert asked["weights_sha256"]["model.safetensors"] and asked["file_sha256"] and asked["seed"] == 0
    assert result["versions"]["torch"] and "git_commit" in result and result["sets"]["words"]["figures"] == figures
    assert "words" in capsys.readouterr().err


def test_a_folder_goes_on_where_it_was_cut_off_and_refuses_another_question(here, single_rank, tmp_path):
    whole = evaluate(single_rank, ["words.yaml"], tmp_path / "whole")
    file, cut = tmp_path / "whole/answers.jsonl", tmp_path / "cut"
    evaluate(single_rank, ["words.yaml"], cut)
    lines = file.read_text().splitlines(keepends=True)
    (cut / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # killed while it wrote
    assert evaluate(single_rank, ["words.yaml"], cut) == whole
    assert (cut / "answers.jsonl").read_text() == file.read_text()
    with pytest.raises(RunError, match=r"another question, which differs in words\.evaluation\.temperature"):
        evaluate(single_rank, ["words.yaml"], cut, temperature=0.5)


def test_a_finished_folder_asks_no_model(here, single_rank, tmp_path, monkeypatch):
    whole = evaluate(single_rank, ["few.yaml"], tmp_path)

    def refuse(*_):
        raise AssertionError("no generator is needed")

    monkeypatch.setattr("rlpost.evaluation.model.folder_generator", refuse)
    assert evaluate(single_rank, ["few.yaml"], tmp_path) == whole


def test_two_evaluations_are_compared_problem_by_problem(here, single_rank, tmp_path):
    """The same model against itself differs by nothing; sets and numbers of answers must fit."""
    evaluate(single_rank, ["words.yaml"], tmp_path / "a")
    recipes = recipes_of("model", ["words.yaml"], [*HF, "seed=1"], asked={"n": 4})
    found = evaluate_sets(recipes, single_rank, out=tmp_path / "b", against=tmp_path / "a")["words"]["against"]
    first, second = ({line["key"]: line["row"] for line in read_answers(tmp_path / name)} for name in "ab")
    each = [(second[key]["correct"] - first[key]["correct"]) / 4 for key in first]
    mean, low, high = found["difference"]["pass@1"]
    assert found["problems"] == 7 and mean == pytest.approx(np.mean(each)) and low <= mean <= high
    same = evaluate_sets(recipes, single_rank, out=tmp_path / "b", against=tmp_path / "b")["words"]["against"]
    assert set(map(tuple, same["difference"].values())) == {(0.0, 0.0, 0.0)}
    for sets, n, message in ((["few.yaml"], 4, "none to few"), (["words.yaml"], 2, "give the same -n")):
        with pytest.raises(RunError, match=message):
            evaluate_sets(recipes_of("model", sets, HF, asked={"n": n}), single_rank, out=None, against=tmp_path / "a")


def on_ranks(world, folder, out):
    import os

    os.chdir(folder)
    return evaluate(world, ["words.yaml"], Path(out), until=8)


@pytest.mark.slow
def test_two_ranks_answer_as_one(here, single_rank, tmp_path):
    alone = evaluate(single_rank, ["words.yaml"], tmp_path / "one", until=8)
    for found in run_ranks(on_ranks, folder=str(here), out=str(tmp_path / "two")):
        assert found == json.loads(json.dumps(alone))
    assert (tmp_path / "two/answers.jsonl").read_text() == (tmp_path / "one/answers.jsonl").read_text()


@pytest.mark.slow
def test_vllm_reads_the_weights_itself_and_answers_like_the_reference(here, single_rank, tmp_path):
    """By the log-probs of the model, most frequent first letters agree; request seeds make it repeatable."""
    small = ["generator.kv_cache_gib=0.25", "generator.max_num_seqs=16", "model.dtype=float32", "model.context=32"]
    small += ["generator.options.max_num_batched_tokens=32"]  # less than the prompts of 16 answers
    recipes = recipes_of("model", ["words.yaml"], small, asked={"n": 64})
    with vllm_sized_model(here):
        vllm = evaluate_sets(recipes, single_rank, out=tmp_path / "vllm")
        again = evaluate_sets(recipes, single_rank, out=tmp_path / "again")
        hf = evaluate_sets(recipes_of("model", ["words.yaml"], HF, asked={"n": 64}), single_rank, out=tmp_path / "hf")
    assert again == vllm
    for name in ("pass@1", "length_mean", "truncated_frac"):
        a, b = (one["words"]["figures"][name] for one in (vllm, hf))
        assert a == pytest.approx(b, abs=4 * math.sqrt(0.25 / (7 * 64)) * (6 if name == "length_mean" else 1)), name


@contextmanager
def vllm_sized_model(folder):
    """For a while the model has heads of a size that vLLM's attention for CPUs knows."""
    (folder / "model").rename(folder / "tiny")
    write_folder(folder / "model", hidden=64)
    try:
        yield
    finally:
        (folder / "model").rename(folder / "larger")
        (folder / "tiny").rename(folder / "model")


def test_intervals_cover_the_truth_also_for_few_problems():
    """Beta-distributed problems, 8 answers each: 95 % of the intervals have the true mean in them, or nearly."""
    rng = np.random.default_rng(0)
    inside = {20: 0, 60: 0}
    for problems in inside:
        for draw in range(200):
            rates = rng.binomial(8, rng.beta(0.5, 1.5, problems)) / 8
            low, high = intervals({"pass@1": list(rates)}, seed=draw)["pass@1"]
            inside[problems] += low <= 0.25 <= high
    assert all(0.92 <= count / 200 <= 0.985 for count in inside.values()), inside


def test_intervals_have_a_width_where_nothing_varies_and_none_where_there_is_nothing():
    found = intervals({"pass@1": [0.0] * 40, "length_mean": [5.0] * 3, "pass@2": [None, 1.0], "maj@2": [None]})
    assert found["pass@1"] == pytest.approx((0.0, 0.0876), abs=1e-4) and found["length_mean"] == (5.0, 5.0)
    assert "pass@2" not in found and "maj@2" not in found


def test_sets_by_name_by_name_with_a_file_and_of_a_recipe(here):
    row = json.dumps({"question": "1+1?", "answer": "so #### 2"}) + "\n"
    (here / "mine.jsonl").write_text(row)
    [(name, recipe)] = recipes_of(
        "model", ["gsm8k=mine.jsonl"], ["model.context=32", "sampling.max_new_tokens=8"], asked={}
    )
    assert (name, recipe.tasks.eval.path, recipe.tasks.eval.answer_regex) == ("gsm8k", "mine.jsonl", "#### (.+)")
    assert recipe.model.path == "model" and recipe.generator.seeding == "request"
    (here / "whole.yaml").write_text(
        "model: {path: model, context: 32}\nrewards: [{use: final_number}]\nsampling: {max_new_tokens: 8}\n"
        "tasks: {train: {path: words.jsonl}, eval: {path: mine.jsonl, prompt: question}}\n"
    )
    [(name, recipe)] = recipes_of("whole.yaml", [], ["seed=3"], asked={"k": [1, 4], "n": 4}, limit=1)
    assert (name, recipe.seed, recipe.evaluation.n, recipe.tasks.eval.limit) == ("whole", 3, 4, 1)
    assert recipe.generator.seeding == "call"  # a recipe says itself
    [(name, recipe)] = recipes_of("whole.yaml", ["few.jsonl"], [], asked={})
    assert (name, recipe.tasks.eval.path, recipe.tasks.eval.prompt) == ("few", "few.jsonl", "question")


@pytest.mark.parametrize("name", SETS)
def test_every_named_set_is_a_sound_recipe(name, here):
    [(_, recipe)] = recipes_of("model", [name], ["model.context=4096"], asked={})
    assert recipe.tasks.eval.path.startswith("hf:") and recipe.rewards


@pytest.mark.parametrize(
    ("sets", "overrides", "message"),
    [
        ([], [], "--tasks must name what to ask the model model"),
        (["gsm9k"], [], "no such data set, did you mean `gsm8k`"),
        (["gsm9k=words.jsonl"], [], "`gsm9k` is no data set, did you mean `gsm8k`"),
        (["words.yaml", "words.yaml"], [], "each data set once"),
        (["words.yaml"], ["evaluation.k=[9]"], "evaluation.k must be numbers from 1 to evaluation.n"),
        (["words.yaml"], ["evaluation.temperature=0"], "evaluation.n must be 1 for evaluation.temperature=0"),
        (["words.yaml"], ["evaluation.until=2"], "evaluation.until must be at least evaluation.n"),
        (["words.yaml"], ["evaluation.vote=evalrewards:first_leter"], "did you mean `first_letter`"),
    ],
)
def test_what_cannot_be_asked_says_why(sets, overrides, message, here):
    with pytest.raises(RecipeError) as error:
        recipes_of("model", sets, [*HF, *overrides], asked={})
    assert message in str(error.value)


def test_the_command_prints_figures_as_json_and_its_errors_on_one_line(here, single_rank, tmp_path, capsys):
    from rlpost.world import World

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "stop", lambda self: None)  # the session's process group goes on
        out = ["--out", str(tmp_path / "out")]
        assert main(["eval", "model", *HF, "--tasks", "few.yaml", "-k", "1,2", *out]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["few"]["n"] == 2 and "pass@2" in said["few"]
        assert main(["eval", "model", *HF, "--tasks", "few.yaml", "-n", "3", *out]) == FAILED
        assert "holds answers to another question, which differs in few.evaluation.n" in capsys.readouterr().err
    assert main(["eval", "model"]) == BAD_RECIPE
    assert "--tasks must name" in capsys.readouterr().err


def test_k_and_n_of_the_command_line():
    import argparse

    assert numbers("4,1") == [4, 1]
    options = argparse.Namespace(k=[4, 1], n=None, passuntil=64)
    assert asked_of(options) == {"k": [1, 4], "n": 4, "until": 64}
    with pytest.raises(argparse.ArgumentTypeError):
        numbers("0,x")


def test_answers_are_read_back_as_they_were_written(tmp_path):
    assert open_folder(tmp_path / "new", {"a": 1}) == []
    append(tmp_path / "new", [{"set": "é", "place": 0}])
    assert open_folder(tmp_path / "new", {"a": 1}) == [{"set": "é", "place": 0}]
    (tmp_path / "new/answers.jsonl").write_text("no\n")
    with pytest.raises(RunError, match="one JSON object a line"):
        read_answers(tmp_path / "new")
