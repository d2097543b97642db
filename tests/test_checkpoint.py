import json
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from rlpost.checkpoint import Checkpoints, open_run, state_to_json
from rlpost.errors import RunError
from rlpost.recipe import Recipe


class World:
    device = torch.device("cpu")

    def __init__(self, rank=0, size=1, items=None, meet=None):
        self.rank, self.size, self.items, self.meet = rank, size, items, meet

    @property
    def is_main(self):
        return self.rank == 0

    def all_gather_object(self, item):
        if self.size == 1:
            return [item]
        self.items[self.rank] = item
        self.meet.wait(timeout=5)
        items = list(self.items)
        self.meet.wait(timeout=5)
        return items


def ranks(size, work):
    items, meet = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(World(rank, size, items, meet)), range(size)))


class Engine:
    def __init__(self, weight=0.0, rank=0):
        self.weight, self.rank = weight, rank

    def snapshot(self):
        weight = torch.tensor(self.weight)

        def write(folder):
            (folder / "engine").mkdir(exist_ok=True)
            torch.save(weight, folder / "engine" / f"shard-{self.rank}.pt")

        return write

    def load(self, folder):
        self.weight = torch.load(folder / "engine" / f"shard-{self.rank}.pt", weights_only=True).item()


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, World(), keep=2)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir() if path.name != "latest")


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_checkpoint_resumes_exactly(checkpoints):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second draw in their state
    state = {"curriculum": {"seen": ["a", "b"], "rate": 0.1}, "clock": {"total": {"train": 1.5}}}
    path = checkpoints.save(12, Engine(0.25), state)
    expected = [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist()]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    engine = Engine()
    loaded = checkpoints.load(path, engine)
    assert path.name == "step-000012"
    assert engine.weight == 0.25
    assert {key: loaded[key] for key in state} == state
    assert (loaded["step"], loaded["world_size"]) == (12, 1) and "torch" in loaded["versions"]
    assert [random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist()] == expected


def test_newest_whole_checkpoint_is_found_and_only_the_last_are_kept(checkpoints):
    assert checkpoints.newest() is None
    for step in (2, 10, 9_999_999):
        checkpoints.save(step, Engine(), {})
    assert names(checkpoints) == ["step-000010", "step-9999999"]
    assert checkpoints.newest().name == "step-9999999"


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def torn_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {')


def shorter_shard(folder):
    shard = folder / "engine" / "shard-0.pt"
    shard.write_bytes(shard.read_bytes()[:-1])


def missing_shard(folder):
    (folder / "engine" / "shard-0.pt").unlink()


def flipped_shard(folder):
    flip_a_byte(folder / "engine" / "shard-0.pt")


@pytest.mark.parametrize("damage", [no_manifest, torn_manifest, shorter_shard, missing_shard, flipped_shard])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(tmp_path, checkpoints, damage):
    first = checkpoints.save(1, Engine(0.5), {})
    damage(checkpoints.save(2, Engine(), {}))
    fresh = Checkpoints(tmp_path, World(), keep=2)
    with pytest.warns(UserWarning, match=r"step-000002 is skipped, and the one before it used"):
        assert fresh.newest() == first
    engine = Engine()
    fresh.load(first, engine)
    assert engine.weight == 0.5
    with pytest.raises(RunError, match=r"step-000002 must be whole \(.+\): choose another, or resume=auto"):
        fresh.load(tmp_path / "checkpoints" / "step-000002", engine)


class Killed(BaseException):
    pass


def test_a_run_killed_while_saving_resumes_from_the_one_before(checkpoints):
    class Dies(Engine):
        def snapshot(self):
            return lambda folder: (Engine.snapshot(self)(folder), kill())

    def kill():
        raise Killed

    first = checkpoints.save(1, Engine(), {})
    with pytest.raises(Killed):
        checkpoints.save(2, Dies(), {})
    assert names(checkpoints) == ["step-000001", "tmp-step-000002"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == first
    checkpoints.save(2, Engine(), {})
    assert names(checkpoints) == ["step-000001", "step-000002"]


def test_saving_a_step_again_replaces_it_and_drops_the_future_that_was_left(checkpoints):
    for step, weight in ((1, 0.1), (2, 0.2), (1, 0.75)):
        checkpoints.save(step, Engine(weight), {})
    assert names(checkpoints) == ["step-000001"]
    engine = Engine()
    checkpoints.load(checkpoints.newest(), engine)
    assert engine.weight == 0.75


def test_ranks_write_their_own_state_and_agree(tmp_path):
    def save(world):
        return Checkpoints(tmp_path, world, keep=1).save(3, Engine(float(world.rank), world.rank), {"x": 1})

    def load(world):
        checkpoints, engine = Checkpoints(tmp_path, world, keep=1), Engine(rank=world.rank)
        state = checkpoints.load(checkpoints.newest(), engine)
        return state["x"], engine.weight

    (path,) = set(ranks(2, save))
    files = json.loads((path / "manifest.json").read_text())["files"]
    own = {f"rank-000{rank}.json" for rank in (0, 1)}
    assert set(files) == own | {"state.json", "engine/shard-0.pt", "engine/shard-1.pt"}
    assert ranks(2, load) == [(1, 0.0), (1, 1.0)]


def test_other_ranks_go_on_with_the_random_numbers_that_there_are(tmp_path):
    class Shared(Engine):
        def load(self, folder):
            self.weight = torch.load(folder / "engine" / "shard-0.pt", weights_only=True).item()

    def save(world):
        if world.is_main:  # one process has one generator: what the last one of them says does not matter here
            torch.manual_seed(3)
        return Checkpoints(tmp_path, world, keep=1).save(3, Engine(0.5, world.rank), {"x": 1})

    (path,) = set(ranks(2, save))
    engine = Shared()
    assert Checkpoints(tmp_path, World(), keep=1).load(path, engine)["world_size"] == 2
    assert engine.weight == 0.5
    text, end = (path / "rank-0001.json").read_text(), path / "rank-0002.json"
    assert json.loads(text)["torch"] and not end.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_names_the_folder_and_the_key(checkpoints, error):
    class Full(Engine):
        def snapshot(self):
            def write(folder):
                raise error

            return write

    first = checkpoints.save(1, Engine(), {})
    with pytest.raises(RunError, match=r"step 2 could not be written to .*checkpoints .*run_dir=") as caught:
        checkpoints.save(2, Full(), {})
    assert str(error) in str(caught.value)
    assert checkpoints.newest() == first


def test_a_failure_on_one_rank_is_raised_by_all(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")

    def save(world):
        with pytest.raises(RunError, match="could not be written"):
            Checkpoints(tmp_path, world, keep=1).save(1, Engine(rank=world.rank), {})
        return True

    assert ranks(2, save) == [True, True]


@pytest.mark.parametrize(
    ("state", "found"),
    [({"rates": {3: 0.5}}, r"key 3 in state\.rates"), ({"a": [{("x",): 1}]}, "in state.a"), ({"rng": {1, 2}}, "set")],
)
def test_state_that_would_not_come_back_the_same_is_refused(state, found):
    with pytest.raises(RunError, match=found):
        state_to_json(state)


def test_open_run_saves_recipe_and_versions(tmp_path):
    folder = open_run(Recipe(name="a", run_dir=str(tmp_path / "runs")), World())
    assert folder == tmp_path / "runs" / "a"
    assert "name: a" in (folder / "recipe.yaml").read_text()
    assert "torch" in json.loads((folder / "versions.json").read_text())


def test_open_run_refuses_a_folder_that_holds_another_run(tmp_path):
    open_run(Recipe(name="a", run_dir=str(tmp_path)), World())

    def again(world):
        with pytest.raises(RunError, match=r"resume=auto, choose another name=\.\.\., or remove the folder"):
            open_run(Recipe(name="a", run_dir=str(tmp_path), seed=5), world)
        return True

    assert ranks(2, again) == [True, True]
    assert "seed: 0" in (tmp_path / "a" / "recipe.yaml").read_text()


def test_open_run_goes_on_or_starts_fresh_with_resume(tmp_path):
    auto = Recipe(name="a", run_dir=str(tmp_path), resume="auto")
    assert open_run(auto, World()) == open_run(auto, World())
    own = str(tmp_path / "a" / "checkpoints" / "step-000001")
    assert open_run(Recipe(name="a", run_dir=str(tmp_path), resume=own), World()) == tmp_path / "a"
    assert open_run(Recipe(name="b", run_dir=str(tmp_path), resume=own), World()) == tmp_path / "b"
    with pytest.raises(RunError, match="holds another run"):
        open_run(Recipe(name="b", run_dir=str(tmp_path), resume=own), World())


def test_open_run_in_a_place_that_cannot_be_written_names_run_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"must be writable .*run_dir="):
        open_run(Recipe(name="a", run_dir=str(tmp_path / "file")), World())


def test_every_byte_of_a_manifest_may_flip(checkpoints):
    path = checkpoints.save(1, Engine(), {})
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    found = []
    for i in range(len(data)):
        manifest.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        fresh = Checkpoints(path.parent.parent, World(), keep=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(fresh.newest() is None)
    assert sum(found) > 0.9 * len(data)  # what is left is white space, and "score"


def test_a_manifest_that_names_a_file_elsewhere_is_damaged(checkpoints):
    path = checkpoints.save(1, Engine(), {})
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.warns(UserWarning, match=r"names a file outside of it \(\.\./state\.json\)"):
        assert checkpoints.newest() is None


def test_latest_leads_to_the_newest(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, Engine(float(step)), {})
    engine = Engine()
    assert checkpoints.load(checkpoints.folder / "latest", engine)["step"] == 3 and engine.weight == 3.0


def test_every_so_many_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, World(), keep=1, keep_every=4)
    for step, score in enumerate([0.1, 0.9, 0.3, None, 0.5, 0.2], start=1):
        checkpoints.save(step, Engine(), {}, score=score)
    assert names(checkpoints) == ["step-000002", "step-000004", "step-000006"]


class Slow(Engine):
    """Writes once it is allowed to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go = threading.Event()

    def snapshot(self):
        write = super().snapshot()
        return lambda folder: (self.go.wait(5), write(folder))


def test_training_goes_on_while_a_copy_is_written(tmp_path):
    def save(world, background):
        checkpoints = Checkpoints(tmp_path, world, keep=2, background=background)
        engine = Slow(0.25, world.rank)
        checkpoints.save(1, engine, {}, wait=False)
        engine.weight = 0.75  # the next step
        there = (tmp_path / "checkpoints/step-000001").exists()
        engine.go.set()
        checkpoints.wait()
        checkpoints.save(2, engine, {}, wait=False)
        checkpoints.close()
        return there

    apart, meet = [None] * 2, threading.Barrier(2)
    found = ranks(2, lambda world: save(world, World(world.rank, 2, apart, meet)))
    assert found == [False, False]
    checkpoints = Checkpoints(tmp_path, World(), keep=2)
    for step, weight in ((1, 0.25), (2, 0.75)):
        engine = Engine(rank=1)
        checkpoints.load(checkpoints.folder / f"step-00000{step}", engine)
        assert engine.weight == weight


def test_a_save_in_the_background_that_fails_is_made_up_for_by_the_next_or_stops_the_run(tmp_path):
    class Full(Engine):
        full = True

        def snapshot(self):
            write = super().snapshot()

            def attempt(folder):
                write(folder)
                if self.full:
                    raise OSError(28, "No space left on device")

            return attempt

    checkpoints, engine = Checkpoints(tmp_path, World(), keep=2, background=World()), Full(0.5)
    checkpoints.save(1, engine, {}, wait=False)
    with pytest.warns(UserWarning, match=r"step 1 could not be written .*; now step 2 is saved"):
        engine.full = True
        with pytest.raises(RunError, match="step 2 could not be written"):
            checkpoints.save(2, engine, {}, wait=False)
    assert names(checkpoints) == []  # what was half written takes no room
    checkpoints.save(3, engine, {}, wait=False)
    with pytest.warns(UserWarning, match="now step 4 is saved"):
        checkpoints._thread.join()
        engine.full = False
        checkpoints.save(4, engine, {}, wait=False)
    assert names(checkpoints) == ["step-000004"]
    engine.full = True
    checkpoints.save(5, engine, {}, wait=False)
    with pytest.raises(RunError, match="step 5 could not be written"):
        checkpoints.wait()
    assert checkpoints.newest().name == "step-000004"


def saved_with(tmp_path, recipe, **state):
    folder = open_run(recipe, World())
    Checkpoints(folder, World(), keep=1).save(1, Engine(), {"recipe": asdict(recipe), **state})
    return folder


def test_a_changed_recipe_needs_a_word_and_a_harmless_change_goes_on(tmp_path):
    first = Recipe(name="a", run_dir=str(tmp_path), resume="auto", rewards=[{"use": "exact_chain"}])
    folder = saved_with(tmp_path, first)
    with pytest.warns(UserWarning, match=r"only in files, speed or memory:\n  save_every: 50 -> 7"):
        open_run(replace(first, save_every=7), World())
    other = replace(first, seed=4, rewards=[{"use": "exact_chain", "weight": 0.5}])
    with pytest.raises(RunError, match=r"another seed, rewards.0.weight\).*resume_changed=true\n  seed: 0 -> 4\n"):
        open_run(other, World())
    assert "seed: 0" in (folder / "recipe.yaml").read_text()
    with pytest.warns(UserWarning, match=r"changes the run from here on:\n  seed: 0 -> 4"):
        open_run(replace(other, resume_changed=True), World())
    assert "seed: 4" in (folder / "recipe.yaml").read_text()


def test_a_field_that_the_checkpoint_does_not_know_had_its_default(tmp_path):
    first = Recipe(name="a", run_dir=str(tmp_path), resume="auto")
    saved = asdict(first)
    del saved["seed"], saved["engine"]["betas"]
    folder = open_run(first, World())
    Checkpoints(folder, World(), keep=1).save(1, Engine(), {"recipe": saved})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_run(first, World())
    with pytest.raises(RunError, match="another seed"):
        open_run(replace(first, seed=1), World())
