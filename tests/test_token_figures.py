import base64
import json
from array import array

import pytest
import torch
from lab import train_here

from rlpost.model_recipe import InitModel
from rlpost.render import build_tokenizer
from rlpost.token_figures import packed, pieces_of, token_figures
from rlpost.types import Rollout, Task


def unpacked(figures):
    levels = array("b")
    levels.frombytes(base64.b64decode(figures["bytes"]))
    return [level / 127 * figures["max"] for level in levels]


def rollout(token_ids, text):
    logp = tuple(-0.25 * (i + 1) for i in range(len(token_ids)))
    given = {"group": 0, "prompt_ids": (5,), "sampled_prompt_ids": (5,), "finish_reason": "stop", "version": 0}
    return Rollout(Task("a", "1+1=", "2"), token_ids=tuple(token_ids), behavior_logp=logp, text=text, **given)


def test_packed_numbers_are_within_half_a_level():
    values = [0.0, 0.5, -1.7, 3.25, -3.25, float("nan"), float("-inf")]
    found = unpacked(packed(values))
    assert found == pytest.approx([0.0, 0.5, -1.7, 3.25, -3.25, 0.0, 0.0], abs=3.25 / 127 / 2 + 1e-9)
    assert packed([]) == {"max": 0.0, "bytes": ""}
    assert unpacked(packed([0.0, 0.0])) == [0.0, 0.0]


def test_pieces_of_bytes_make_up_letters_that_several_tokens_share():
    tokenizer = build_tokenizer(InitModel(tokenizer="byte"))
    text = "aß\N{PILE OF POO}</script>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())

    def decode(some):
        return tokenizer.decode(list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    pieces = pieces_of([*ids, tokenizer.eos_token_id], text, decode)
    assert pieces == [1, 0, 1, 0, 0, 0, 1, *[1] * len("</script>"), 0]


def test_pieces_of_a_tokenizer_that_strips_the_first_space():
    words = {1: "one", 2: " two", 3: " three"}

    def decode(ids):
        return "".join(words[i] for i in ids).lstrip()

    assert pieces_of([1, 2, 3], "one two three", decode) == [3, 4, 6]


def test_tokens_that_do_not_make_up_the_text_have_no_pieces():
    assert pieces_of([1, 2], "other", lambda ids: "x" * len(ids)) is None
    figures = token_figures(rollout([1, 2], "other"), None, None, lambda ids: "x" * len(ids))
    assert figures.keys() == {"logp"}


def test_figures_of_a_rollout():
    one = rollout([1, 2], "ab")
    figures = token_figures(one, 0.123456, torch.tensor([-0.5, -0.5]), lambda ids: "".join("?ab"[i] for i in ids))
    assert figures["advantage"] == 0.1235
    assert base64.b64decode(figures["pieces"]) == b"\x01\x01"
    assert unpacked(figures["logp"]) == pytest.approx([-0.25, -0.5], abs=0.003)
    assert unpacked(figures["logp_diff"]) == pytest.approx([-0.25, 0.0], abs=0.003)
    by_token = token_figures(one, torch.tensor([1.0, -0.5]), None, lambda ids: "".join("?ab"[i] for i in ids))
    assert unpacked(by_token["advantage"]) == pytest.approx([1.0, -0.5], abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [[], ["algorithm.minibatches=2"]], ids=["a pass of its own", "scored by the step"])
def test_a_run_writes_what_trainer_and_generator_say_of_each_token(lab, single_rank, more):
    name = f"tokens-{len(more)}"
    logged = train_here(lab, single_rank, name, "steps=2", "sampling.temperature=0.8", *more)
    rows = [json.loads(line) for line in (lab / "runs" / name / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4
    for row in rows:
        figures = row["tokens"]
        pieces = base64.b64decode(figures["pieces"])
        assert len(pieces) == row["num_tokens"] and sum(pieces) == len(row["completion"])
        assert len(unpacked(figures["logp"])) == row["num_tokens"] and max(unpacked(figures["logp"])) <= 0
    trained = [row["tokens"] for row in rows if "advantage" in row["tokens"]]
    assert trained
    assert max(figures["logp_diff"]["max"] for figures in trained) < 1e-4, "temperature and prompt are the generator's"
    chosen = [json.loads(line) for line in (lab / "runs" / name / "chosen.jsonl").read_text().splitlines()]
    assert [line["groups"] for line in chosen] == [row["groups/num"] for row in logged if "groups/num" in row]
    assert (lab / "runs" / name / "report.html").exists()
