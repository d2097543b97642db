from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, ragged

from rlpost.batch import make_batch
from rlpost.losses import weighted_sum
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.types import Batch
from rlpost.update import update


class Engine:
    """What an optimizer step does to a policy, written down."""

    def __init__(self):
        self.calls, self.total = [], 0.0

    def backward(self, loss):
        self.calls.append("backward")
        self.total += loss.item()

    def step(self):
        self.calls.append("step")
        return 0.25


def world(size=1):
    """One of `size` ranks that all hold the same."""
    return SimpleNamespace(size=size, device=CPU, all_gather_object=lambda item: [item] * size, max=lambda value: value)


@pytest.mark.parametrize("size", [1, 4])
def test_update_adds_up_micro_batches_and_logs_the_mean_over_their_tokens(size):
    ranks, engine = world(size), Engine()
    batch = make_batch(ragged(), Packer(20, 20, CPU), ranks)
    metrics = Metrics(world())

    def loss_of(micro):
        engine.calls.append("loss")
        x_BT = micro.target_BT.float()
        return weighted_sum(x_BT, micro.weight_BT, size), {"policy/entropy": x_BT / 10, "policy/ratio_max": x_BT}

    norm = update(engine, batch, loss_of, metrics)
    tokens = torch.cat([micro.target_BT[micro.mask_BT] for micro in batch.micros]).double()
    assert len(batch.micros) > 1 and engine.calls == ["loss", "backward"] * len(batch.micros) + ["step"]
    # The engine averages over ranks, so what each of them adds up is the mean over all tokens of the step.
    assert engine.total == pytest.approx(tokens.mean().item())
    assert norm == 0.25
    assert metrics.reduce() == pytest.approx(
        {"policy/entropy": tokens.mean().item() / 10, "policy/ratio_max": tokens.max().item()}
    )


def test_t4_a_step_without_tokens_is_still_one_step():
    engine, metrics = Engine(), Metrics(world())
    batch = Batch((Packer(2, 2, CPU).empty(),), 0)

    def loss_of(micro):
        return weighted_sum(micro.target_BT.float() + 1, micro.weight_BT, 1), {"policy/entropy": micro.target_BT}

    assert update(engine, batch, loss_of, metrics) == 0.25
    assert engine.calls == ["backward", "step"] and engine.total == 0.0
    assert metrics.reduce() == {}
