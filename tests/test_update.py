from types import SimpleNamespace

import pytest
import torch
from tiny import CPU, ragged

from rlpost.batch import Packer
from rlpost.metrics import Metrics
from rlpost.types import Batch
from rlpost.update import update


class Engine:
    """A policy whose log-probs are given; it keeps what is done to it."""

    def __init__(self, size):
        self.world = SimpleNamespace(size=size, all_gather_object=lambda item: [item])
        self.calls, self.total = [], 0.0

    def token_logp(self, micro):
        self.calls.append("forward")
        return -micro.tokens_BT.float(), micro.tokens_BT.float() / 10

    def backward(self, loss):
        self.calls.append("backward")
        self.total += loss.item()

    def step(self):
        self.calls.append("step")
        return 0.25


@pytest.mark.parametrize("size", [1, 4])
def test_update_adds_up_micro_batches_and_logs_the_mean_over_their_tokens(size):
    micros = tuple(Packer(20, 20, CPU).micros(ragged()))
    count = sum(int(micro.mask_BT.sum()) for micro in micros)
    engine = Engine(size)
    metrics = Metrics(engine.world)

    def loss_of(micro, logp_BT):
        return -logp_BT * 2, {"policy/ratio_max": micro.tokens_BT.float()}

    update(engine, Batch(micros, step_tokens=3 * count), loss_of, metrics)
    tokens = torch.cat([micro.tokens_BT[micro.mask_BT] for micro in micros]).double()
    assert engine.calls == ["forward", "backward"] * len(micros) + ["step"]
    assert engine.total == pytest.approx(2 * tokens.sum().item() * size / (3 * count))
    assert metrics.reduce() == pytest.approx(
        {
            "policy/loss": 2 * tokens.mean().item(),
            "policy/entropy": tokens.mean().item() / 10,
            "policy/ratio_max": tokens.max().item(),
            "optim/grad_norm": 0.25,
        }
    )


def test_t4_a_step_without_tokens_is_still_one_step():
    engine = Engine(1)
    metrics = Metrics(engine.world)
    update(engine, Batch((Packer(2, 2, CPU).empty(),), 0), lambda micro, logp_BT: (logp_BT, {}), metrics)
    assert engine.calls == ["forward", "backward", "step"] and engine.total == 0.0
    assert metrics.reduce() == {"optim/grad_norm": 0.25}
