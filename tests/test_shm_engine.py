"""Weights through a file in shared memory: what is written is what is read, and nothing else is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory

from rlpost.generate import shm_engine
from rlpost.generate.shm_engine import ShmEngine, ShmTrainerInit, ShmUpdate


class Source(WeightSource):
    def __init__(self) -> None:
        self.weights = {
            "a": torch.arange(7, dtype=torch.float32),
            "b": torch.full((3, 5), -1.5, dtype=torch.bfloat16),
            "c": torch.tensor(2.0),
        }

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in self.weights.items()]

    def __iter__(self):
        return iter(self.weights.items())


class Client:
    """What the sender is told to say to servers."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def __getattr__(self, name: str):
        return lambda *given: self.said.append((name, *given))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shm_engine, "SHM", tmp_path)
    shm_engine.register()
    init = ShmTrainerInit(run="r", writes=True, rank=0)
    trainer = WeightTransferTrainerFactory.trainer_init(init, client=Client(), source=Source())
    yield trainer
    trainer.shutdown()
    assert list(tmp_path.iterdir()) == []


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, torch.Tensor] = {}

    def load_weights(self, weights) -> None:
        self.got = {name: tensor.clone() for name, tensor in weights}


def engine(model: Model) -> ShmEngine:
    made = object.__new__(ShmEngine)
    made.model, made.vllm_config, made.device = model, None, torch.device("cpu")
    return made


def test_a_server_reads_what_the_trainer_wrote(trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_engine, "loads_in_place", lambda worker: True)
    model, source = Model(), trainer.source
    for _ in range(2):
        source.weights["a"] += 1
        engine(model).update_weights(trainer.publish())
        assert model.got.keys() == source.weights.keys()
        assert all(torch.equal(model.got[name], one) for name, one in source.weights.items())


def test_a_whole_round_is_driven_as_vllm_has_it(trainer) -> None:
    trainer.send_weights()
    assert [one[0] for one in trainer.client.said] == ["start_weight_update", "update_weights", "finish_weight_update"]


@pytest.mark.parametrize("where", [0, 60, 64, 130])
def test_another_byte_is_another_checksum(trainer, where: int) -> None:
    update = trainer.publish()
    with open(update["path"], "r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"checksum of .* must be"):
        engine(Model()).update_weights(update)


def test_other_names_or_shapes_are_another_checksum() -> None:
    update = ShmUpdate("", ["a", "b"], ["float32"] * 2, [[16], [16]], "")
    buffer = torch.zeros(update.offsets()[1], dtype=torch.uint8)
    swapped = ShmUpdate("", ["b", "a"], ["float32"] * 2, [[16], [16]], "")
    folded = ShmUpdate("", ["a", "b"], ["float32"] * 2, [[4, 4], [16]], "")
    assert len({one.sum_of(buffer) for one in (update, swapped, folded)}) == 3


def test_only_the_newest_set_is_kept_and_what_a_dead_run_left_is_removed(trainer, tmp_path: Path) -> None:
    names = [Path(trainer.publish()["path"]).name for _ in range(2)]
    trainer.source.weights["more"] = torch.ones(100)
    names.append(Path(trainer.publish()["path"]).name)
    assert [one.name for one in tmp_path.iterdir()] == names[-1:]
    (tmp_path / "rlpost-weights-dead-1-1").write_bytes(b"x")
    alive = os.open(tmp_path / "rlpost-weights-alive-1-1", os.O_RDWR | os.O_CREAT)
    fcntl.flock(alive, fcntl.LOCK_EX)
    shm_engine.remove_left_over()
    assert {one.name for one in tmp_path.iterdir()} == {names[-1], "rlpost-weights-alive-1-1"}
    os.close(alive)
    shm_engine.remove_left_over()
    assert [one.name for one in tmp_path.iterdir()] == names[-1:]
