import json
from types import SimpleNamespace

import pytest
import torch

from rlpost.errors import RunError
from rlpost.model_source import READY, cached_folder, context_length, is_ready, model_folder
from rlpost.recipe import InitModel, Model, Recipe

WORLD = SimpleNamespace(is_main=True, rank=0, local_rank=0, size=1, barrier=lambda: None)


def recipe(run_dir, *, seed=0, **model):
    init = InitModel(tokenizer="char", alphabet="0123", hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2)
    settings = {"init": init, "dtype": "float32", "context": 32} | model
    return Recipe(run_dir=str(run_dir), seed=seed, model=Model(**settings))


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_init_makes_a_folder_that_transformers_reads(tmp_path):
    from transformers import AutoTokenizer

    folder = model_folder(recipe(tmp_path), WORLD)
    assert AutoTokenizer.from_pretrained(folder).encode("31") == [5, 3]
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"], config["eos_token_id"]) == (6, 32, 1)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}


def test_init_is_made_once_and_a_folder_cut_off_is_made_again(tmp_path):
    folder = model_folder(recipe(tmp_path), WORLD)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_folder(recipe(tmp_path), WORLD) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    (folder / READY).unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    model_folder(recipe(tmp_path), WORLD)
    assert is_ready(folder) and weights(folder)


def test_init_depends_on_the_seed_alone_and_leaves_the_random_state(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = model_folder(recipe(tmp_path / "a"), WORLD)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = model_folder(recipe(tmp_path / "b"), WORLD), model_folder(recipe(tmp_path / "b", seed=1), WORLD)
    assert again != other
    first, second, third = weights(one), weights(again), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_cached_folders_differ_by_everything_that_was_asked(tmp_path):
    folders = {cached_folder(tmp_path, kind, asked) for kind in ("init", "gguf") for asked in ({"a": 1}, {"a": 2})}
    assert len(folders) == 4
    assert cached_folder(tmp_path, "init", {"a": 1, "b": 2}) == cached_folder(tmp_path, "init", {"b": 2, "a": 1})


def test_a_local_folder_is_used_as_it_is(tmp_path):
    assert model_folder(Recipe(model=Model(path=str(tmp_path))), WORLD) == tmp_path


@pytest.mark.parametrize("text", [None, "{"])
def test_a_folder_without_a_readable_config_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"model\.path must be a model folder with a readable config\.json"):
        context_length(Model(), tmp_path)


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({"max_position_embeddings": 64}, None, 64),
        ({"max_position_embeddings": 64}, 32, 32),
        ({"text_config": {"max_position_embeddings": 16}}, None, 16),
        ({}, 8, 8),
    ],
)
def test_context_is_what_was_asked_or_what_the_model_was_made_for(tmp_path, config, asked, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(Model(context=asked), tmp_path) == expected


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [({"max_position_embeddings": 64}, 65, "at most what the model was made for"), ({}, None, "must be given")],
)
def test_a_context_that_cannot_be_is_refused(tmp_path, config, asked, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=f"model.context must be.*{message}|model.context {message}"):
        context_length(Model(context=asked), tmp_path)


def test_no_model_at_all_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"model\.path or model\.init must be given"):
        model_folder(Recipe(run_dir=str(tmp_path)), WORLD)


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(RunError, match="run_dir must be writable"):
        model_folder(recipe(tmp_path), WORLD)
