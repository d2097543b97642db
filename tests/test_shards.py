"""What one layout wrote is read by another: the same numbers, on any stage and number of ranks."""

import json
import resource
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from test_engine import STATES, WINDOWS, make_engine, recipe, take, weights

from rlpost.collect import shard
from rlpost.errors import RunError
from rlpost.shards import MOMENTS, save_tensors, whole_weights

NEXT = {0: 3, 1: 2, 2: 0, 3: 1}
"""The stage that reads what each stage wrote; in bfloat16 there is no stage 0."""


def reader(stage, dtype):
    return NEXT[stage] if dtype == "float32" or NEXT[stage] else 3


def asked(stage):
    # Under ZeRO-3 vectors then stay on every rank once they were used, and matrices do not.
    partly = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}} if stage == 3 else {}
    return recipe(stage, schedule="linear", warmup_steps=3, lr=1e-2, eps=1e-8, grad_clip=1.0, deepspeed=partly)


def saved(world, folder, dtype, stage):
    """An engine after two steps, saved."""
    engine = make_engine(world, asked(stage), dtype=dtype)
    for window in WINDOWS:
        take(engine, [one for _, one in shard(window, world.rank, world.size)])
    engine.save(Path(folder))


def numbers(folder):
    """Every number in a checkpoint of an engine: weights and moments, whole, by name."""
    shapes = json.loads((folder / "meta.json").read_text())["shapes"]
    sizes = {f"{kind}/{name}": torch.Size(shapes[name]).numel() for name in shapes for kind in ("weight", *MOMENTS)}
    found = {key: torch.full((size,), torch.nan) for key, size in sizes.items()}
    for file in folder.glob("rank-*.safetensors"):
        with safe_open(file, framework="pt") as pieces:
            for key in pieces.keys():  # noqa: SIM118
                whose, _, start = key.rpartition("@")
                piece = pieces.get_tensor(key)
                place = found[whose][int(start) : int(start) + len(piece)]
                assert place.isnan().all()  # nothing is written twice
                place.copy_(piece)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


ACROSS = [(0, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16")]
"""What is written by one number of ranks and read by the other."""


def save_all(world, folder, states=ACROSS):
    for stage, dtype in states:
        saved(world, Path(folder) / f"{world.size}-{stage}-{dtype}", dtype, stage)


def load_all(world, folder):
    """Load what every stage of the other number of ranks wrote into another stage, save it again, take a step."""
    steps = {}
    for stage, dtype in ACROSS:
        source, here = Path(folder) / f"{3 - world.size}-{stage}-{dtype}", reader(stage, dtype)
        engine = make_engine(world, asked(here), dtype=dtype, seed=5)
        engine.load(source)
        engine.save(Path(folder) / f"{source.name}-on-{here}")
        expected = whole_weights(source / "engine")
        forward = all(torch.equal(x, expected[f"model.{name}"].to(x.dtype)) for name, x in weights(engine).items())
        lr = engine.deepspeed.get_lr()[0]
        take(engine, [one for _, one in shard(WINDOWS[0], world.rank, world.size)])
        steps[f"{source.name}-on-{here}"] = [forward, lr, engine.updates, engine.lr]
    return steps


def check(folder, steps):
    for name, (forward, lr, updates, step_lr) in steps.items():
        source, again = (Path(folder) / part / "engine" for part in (name.partition("-on-")[0], name))
        before, after = numbers(source), numbers(again)
        assert before.keys() == after.keys() and len(before) > 10
        assert all(torch.equal(before[key], after[key]) for key in before), name
        about, copied = (json.loads((place / "meta.json").read_text()) for place in (source, again))
        assert about == copied and about["adam_steps"] == 2
        assert forward, name
        assert (updates, lr) == (3, step_lr) and step_lr == pytest.approx(1e-2), name


@pytest.fixture(scope="module")
def written(tmp_path_factory, single_rank):
    folder = tmp_path_factory.mktemp("layouts")
    save_all(single_rank, folder, STATES)
    return folder


@pytest.mark.parametrize(("stage", "dtype"), STATES)
def test_a_stage_reads_what_every_stage_of_one_rank_wrote(single_rank, written, stage, dtype):
    for source in (s for s, kind in STATES if kind == dtype):
        engine = make_engine(single_rank, asked(stage), dtype=dtype, seed=5)
        engine.load(written / f"1-{source}-{dtype}")
        engine.save(written / f"1-{source}-{dtype}-on-{stage}")
        before = numbers(written / f"1-{source}-{dtype}/engine")
        after = numbers(written / f"1-{source}-{dtype}-on-{stage}/engine")
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_number_of_ranks_of_another_stage_reads_the_same_numbers(tmp_path, single_rank):
    save_all(single_rank, tmp_path)
    run_ranks(save_all, folder=str(tmp_path))
    check(tmp_path, load_all(single_rank, tmp_path))
    for steps in run_ranks(load_all, folder=str(tmp_path)):
        check(tmp_path, steps)


def test_a_file_of_shards_holds_no_pickle_and_each_number_once(written):
    for stage, dtype in STATES:
        folder = written / f"1-{stage}-{dtype}" / "engine"
        assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "rank-0000.safetensors"]
        numbers(folder)


def test_before_the_first_step_there_are_no_moments(single_rank, tmp_path):
    first, stepped = (make_engine(single_rank, asked(0), seed=seed) for seed in (0, 1))
    first.save(tmp_path)
    take(stepped, WINDOWS[1])
    stepped.load(tmp_path)
    assert take(first, WINDOWS[0]) == take(stepped, WINDOWS[0])
    assert all(torch.equal(tensor, weights(stepped)[name]) for name, tensor in weights(first).items())


def test_another_model_and_a_missing_shard_are_refused(single_rank, written, tmp_path):
    from tiny import tiny_policy

    from rlpost.engine import Engine

    other = tiny_policy(vocab=40)
    engine = Engine(other, asked(2), dtype="float32", temperature=1.0, total_updates=4, world=single_rank)
    with pytest.raises(RunError, match=r"must be of this model \(\S+ is \[\d+, \d+\] there and \[\d+, \d+\] here\)"):
        engine.load(written / "1-2-float32")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/meta.json").write_bytes((written / "1-2-float32/engine/meta.json").read_bytes())
    with pytest.raises(RunError, match=r"must hold all of \S+ \(weight: it has 0 of \d+ numbers\)"):
        make_engine(single_rank, asked(2)).load(tmp_path)


def test_a_file_that_cannot_be_written_whole_is_an_error_of_the_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_tensors({"x": torch.zeros(1 << 20)}, tmp_path / "rank-0000.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
