"""A trained policy as an ordinary Hugging Face folder, or as a folder of peft."""

from __future__ import annotations

import pytest
import torch
from lab import base_model, rlpost, weights
from tiny import write_folder

from rlpost.checkpoint import Checkpoints
from rlpost.engine import Engine
from rlpost.errors import RunError
from rlpost.export import export_policy, export_run
from rlpost.policy import load_policy
from rlpost.recipe import EngineRecipe, Lora, Model, Recipe, Tasks, TaskSource, load, to_yaml
from rlpost.weights import WeightStream

IDS = torch.arange(2, 29)[None]
STATES = [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32"), (3, "bfloat16")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exported_folder_gives_the_logits_of_the_trained_policy(lab) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = rlpost(lab, "export", str(lab / "runs/first"), anew=True)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_export_of_a_folder_that_is_no_run_says_so(lab) -> None:
    done = rlpost(lab, "export", str(lab / "mylab"), anew=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {lab / 'mylab'} must be the folder of a run (it has no recipe.yaml): name one such as "
        "runs/quickstart\n"
    )


def make_run(folder, world, stage, dtype="float32", lora=None, *, hidden=32):
    """The folder of a run that has ended, and its engine: weights are moved by one optimizer step."""
    start = write_folder(folder / "start", hidden=hidden)
    model = Model(path=str(start), dtype=dtype, lora=lora)
    engine = Engine(
        load_policy(start, model, seed=3),
        EngineRecipe(zero_stage=stage, lr=0.03),
        dtype=dtype,
        temperature=1.0,
        total_updates=9,
        world=world,
    )
    for _ in range(2):  # the first moves B alone
        mask = torch.ones_like(IDS, dtype=torch.bool)
        logp_BT, _ = engine.deepspeed(IDS, torch.arange(27)[None], IDS.roll(-1, 1), mask, temperature=1.0)
        engine.backward(-logp_BT.sum())
        engine.step()
    run = folder / "run"
    run.mkdir()
    tasks = Tasks(train=TaskSource(path="data.jsonl"))
    (run / "recipe.yaml").write_text(to_yaml(Recipe(model=model, tasks=tasks, engine=EngineRecipe(zero_stage=stage))))
    Checkpoints(run, world, keep=1).save(2, engine, {"model": str(start)})
    return run, engine


def logits(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    return model.eval()(IDS).logits.detach()


@pytest.mark.parametrize("lora", [None, Lora(rank=3)], ids=["whole", "lora"])
@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_an_exported_folder_holds_what_generators_are_given(single_rank, tmp_path, stage, dtype, lora) -> None:
    from safetensors.torch import load_file

    run, engine = make_run(tmp_path, single_rank, stage, dtype, lora)
    folder = export_run(run, single_rank, checkpoint=None, to=None)
    assert folder == run / "model" and (folder / "tokenizer.json").is_file()
    found = load_file(folder / "model.safetensors")
    streamed = dict(WeightStream(engine.deepspeed.module, bucket_bytes=5000))
    assert found.keys() == streamed.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in streamed.items())
    start = load_file(tmp_path / "start/model.safetensors")
    moved = {name for name in found if not torch.equal(found[name], start[name].to(found[name].dtype))}
    assert moved == {name for name in found if lora is None or "_proj" in name}
    export_policy(engine, tmp_path / "now", like=tmp_path / "start")
    assert torch.equal(logits(tmp_path / "now"), logits(folder))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_exported_adapter_is_one_of_peft_with_the_logits_of_the_policy(single_rank, tmp_path, stage) -> None:
    run, engine = make_run(tmp_path, single_rank, stage, lora=Lora(rank=3, targets=["q_proj", "down_proj"]))
    folder = export_run(run, single_rank, checkpoint=None, to=None, adapter=True)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    expected = engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits.detach()
    assert torch.equal(logits(tmp_path / "start", folder), expected)
    assert float((logits(tmp_path / "start") - expected).abs().max()) > 0.1


def test_an_adapter_of_a_run_without_one_is_refused(single_rank, tmp_path) -> None:
    run, _ = make_run(tmp_path, single_rank, 2)
    with pytest.raises(RunError, match=r"must be a run with model.lora for --adapter"):
        export_run(run, single_rank, checkpoint=None, to=None, adapter=True)


def test_an_exported_policy_of_four_bits_is_an_ordinary_model(single_rank, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    run, engine = make_run(tmp_path, single_rank, 2, lora=Lora(rank=3, quantize="nf4"), hidden=64)
    folder = export_run(run, single_rank, checkpoint=None, to=None)
    assert "quantization" not in (folder / "config.json").read_text()
    expected = engine.deepspeed.module.model(input_ids=IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(logits(folder), expected, rtol=0, atol=1e-4)
