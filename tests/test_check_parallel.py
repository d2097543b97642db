"""Where several ranks share each row: what `check` refuses, and what is found once a model's folder is there."""

import json
from pathlib import Path

import pytest
import torch

from rlpost.check_parallel import parallel_problems, split_problems
from rlpost.errors import RunError
from rlpost.packing import make_packer
from rlpost.recipe import Recipe, load


def recipe(*overrides: str) -> Recipe:
    return load(Path(__file__).parent.parent / "recipes/quickstart.yaml", overrides)


def test_one_rank_a_row_has_no_problem() -> None:
    assert parallel_problems(recipe("model.attention=eager"), 3) == []
    assert split_problems({"num_attention_heads": 3, "sliding_window": 8}, 1) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ([], 3, "engine.sequence_parallel must divide the number of ranks (got 2 on 3)"),
        (["model.attention=eager"], 2, "model.attention must be auto, sdpa or flash_attention_2"),
        (["algorithm.loss=clip_cov"], 2, "engine.sequence_parallel must be 1 for algorithm.loss=clip_cov (got 2)"),
        (
            ["model.init.num_heads=1"],
            2,
            "engine.sequence_parallel must divide the model's attention heads (got 2 a",
        ),
        (
            ["model.init.num_heads=6", "model.init.num_kv_heads=3"],
            2,
            "engine.sequence_parallel must divide the model's key-value heads, or be a multiple of them (got 2 and 3)",
        ),
        (
            ["model.init=null", "model.path={folder}"],
            2,
            "engine.sequence_parallel must be 1 for a model with a",
        ),
    ],
)
def test_each_problem_is_named(tmp_path: Path, overrides: list[str], world_size: int, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "sliding_window": 8}))
    named = [one.format(folder=tmp_path) for one in overrides]
    (problem,) = parallel_problems(recipe("engine.sequence_parallel=2", *named), world_size)
    assert problem.startswith(message)


def test_fewer_key_value_heads_than_ranks_are_repeated() -> None:
    assert split_problems({"num_attention_heads": 8, "num_key_value_heads": 2}, 4) == []


def test_a_model_of_the_hub_is_checked_when_it_is_there(tmp_path: Path) -> None:
    asked = recipe("engine.sequence_parallel=2", "model.init=null", "model.path=owner/name")
    assert parallel_problems(asked, 2) == []
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 5}))

    class World:
        device, rank, size = torch.device("cpu"), 0, 2

    with pytest.raises(RunError, match=r"must divide the model's attention heads \(got 2 and 5\)"):
        make_packer(asked, World(), tmp_path)  # type: ignore[arg-type]
