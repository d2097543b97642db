"""A trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

import pytest
import torch
from lab import base_model, rlpost, weights

from rlpost.policy import load_policy
from rlpost.recipe import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_exported_folder_gives_the_logits_of_the_trained_policy(lab) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = rlpost(lab, "export", str(lab / "runs/first"))
    assert (done.returncode, done.stderr) == (0, "")
    folder = lab / "runs/first/model"
    assert done.stdout.splitlines()[-1] == f"model: {folder}"

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    trained = load_policy(base_model(lab), load(lab / "tiny.yaml").model).eval()
    before = trained.model.get_input_embeddings().weight.clone()
    trained.load_state_dict(weights(lab, "first", 4), strict=False)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("7-0+6=")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained.model(ids).logits, rtol=0, atol=0)
    assert not torch.equal(before, trained.model.get_input_embeddings().weight)


def test_export_of_a_folder_that_is_no_run_says_so(lab) -> None:
    done = rlpost(lab, "export", str(lab / "mylab"))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {lab / 'mylab'} must be the folder of a run (it has no recipe.yaml): name one such as "
        "runs/quickstart\n"
    )
