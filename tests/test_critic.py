"""The value model and its training."""

import math
from functools import partial

import pytest
import torch
from exact import exact_llama
from tiny import CPU, gradients, ragged, tiny_llama, tiny_policy

from rlpost.batch import make_batch
from rlpost.critic import Critic, ValueModel, load_value_model
from rlpost.document import Document
from rlpost.engine import Engine, checkpoint_weights
from rlpost.errors import RunError
from rlpost.losses import value_clip, weighted_sum
from rlpost.metrics import Metrics
from rlpost.packing import Packer
from rlpost.policy import load_policy
from rlpost.recipe import EngineRecipe, Model
from rlpost.update import update

PACKER = Packer(30, 20, CPU)
DOCUMENTS = [Document(one.prompt_ids, one.token_ids, one.behavior_logp) for one in ragged()]


def opened(model):
    """A value model whose head is not 0."""
    values = ValueModel(model)
    with torch.no_grad():
        values.head.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        values.head.bias.fill_(0.2)
    return values.to(model.dtype)


def values_of(model, micro):
    return model(micro.tokens_BT, micro.position_BT, micro.mask_BT)


def value_loss(critic, micro):
    """Towards 1 at every token."""
    value_BT = critic.values(micro)
    loss_BT, _ = value_clip(value_BT, torch.zeros_like(value_BT), torch.ones_like(value_BT), clip=10.0)
    return weighted_sum(loss_BT, micro.weight_BT, critic.world.size), {}


def take(critic):
    batch = make_batch(DOCUMENTS, PACKER, critic.world)
    return update(critic, batch, partial(value_loss, critic), Metrics(critic.world))


def make_critic(world, *, stage=2, dtype="float32", seed=0):
    model = tiny_llama(seed=seed).model
    for param in model.parameters():
        param.data = param.data.to(getattr(torch, dtype))
    recipe = EngineRecipe(zero_stage=stage, lr=3e-3, grad_clip=1.0)
    return Critic(ValueModel(model), recipe, dtype=dtype, total_updates=10, world=world)


def test_values_are_0_at_the_start_and_float32():
    for dtype in (torch.float32, torch.bfloat16):
        for micro in PACKER.micros(DOCUMENTS):
            value_BT = values_of(ValueModel(tiny_llama().model.to(dtype)), micro)
            assert value_BT.dtype == torch.float32 and value_BT.shape == micro.mask_BT.shape and not value_BT.any()


def test_the_head_computes_in_float32_what_it_is_given_in_bfloat16():
    model, [micro] = opened(tiny_llama().model.to(torch.bfloat16)), Packer(200, 40, CPU).micros(DOCUMENTS)
    hidden = model.model(input_ids=micro.tokens_BT, position_ids=micro.position_BT, use_cache=False).last_hidden_state
    expected_BT = hidden.float() @ model.head.weight.float() + model.head.bias.float()
    torch.testing.assert_close(values_of(model, micro)[micro.mask_BT], expected_BT[micro.mask_BT], rtol=1e-6, atol=1e-6)


def test_t28_the_value_at_t_is_of_the_tokens_up_to_t_alone():
    model, neighbour = opened(exact_llama().model), DOCUMENTS[5]
    for one in DOCUMENTS[:4]:
        value_T = values_of(model, PACKER.micro([[neighbour, one]]))[0, neighbour.length :]
        for t in range(len(one.token_ids)):
            tokens = torch.tensor([[*one.prompt_ids, *one.token_ids[:t]]])
            last_D = model.model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(
                value_T[len(one.prompt_ids) - 1 + t], last_D @ model.head.weight + model.head.bias[0]
            )


def test_values_are_0_under_the_mask_and_in_an_empty_micro_batch():
    model = opened(tiny_llama().model)
    for micro in (*PACKER.micros(DOCUMENTS), PACKER.empty()):
        assert not values_of(model, micro)[~micro.mask_BT].any()
        assert values_of(model, micro)[micro.mask_BT].all()


def test_t6_an_empty_micro_batch_gives_a_zero_gradient_on_every_weight():
    model, micro = opened(tiny_llama().model), PACKER.empty()
    weighted_sum(values_of(model, micro), micro.weight_BT, 2).backward()
    assert all(not grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_load_value_model_has_the_policys_base_model_and_no_language_model_head(tmp_path, dtype, tie):
    tiny_llama(tie=tie).save_pretrained(tmp_path)
    recipe = Model(dtype=dtype, attention="eager", gradient_checkpointing=True)
    values, policy = load_value_model(tmp_path, recipe), load_policy(tmp_path, recipe)
    base = dict(policy.model.base_model.named_parameters())
    assert dict(values.named_parameters()).keys() == {f"model.{name}" for name in base} | {"head.weight", "head.bias"}
    assert all(torch.equal(values.model.get_parameter(name), param) for name, param in base.items())
    assert {param.dtype for param in values.parameters()} == {getattr(torch, dtype)}
    assert values.model.config._attn_implementation == "eager"
    assert values.training and values.model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16"), (3, "float32")]
)
def test_a_critic_learns_the_return(single_rank, stage, dtype):
    critic = make_critic(single_rank, stage=stage, dtype=dtype)
    norms = [take(critic) for _ in range(10)]
    micro = PACKER.micros(DOCUMENTS)[0]
    error_BT = (critic.values(micro).detach() - 1)[micro.mask_BT].abs()
    assert norms[0] > 0 and float(error_BT.mean()) < 0.35  # 1 at the start


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_a_critic_resumes_exactly_beside_its_policy(single_rank, tmp_path, stage, dtype):
    recipe = EngineRecipe(zero_stage=stage, lr=1e-3)
    policy = tiny_policy(dtype=getattr(torch, dtype))
    engine = Engine(policy, recipe, dtype=dtype, temperature=1.0, total_updates=4, world=single_rank)
    first = make_critic(single_rank, stage=stage, dtype=dtype)
    take(first)
    for trained in (engine, first):
        trained.save(tmp_path)
    norm = take(first)
    second = make_critic(single_rank, stage=stage, dtype=dtype, seed=5)
    second.load(tmp_path)
    assert second.updates == 1 and take(second) == norm
    for micro in PACKER.micros(DOCUMENTS):
        assert torch.equal(second.values(micro), first.values(micro))
    assert {"engine", "critic"} <= {path.name for path in tmp_path.iterdir()}
    assert torch.equal(checkpoint_weights(tmp_path)["model.model.norm.weight"].float(), torch.ones(32))


def test_loading_a_critic_from_a_checkpoint_without_one_says_which(single_rank, tmp_path):
    (tmp_path / "engine").mkdir()
    with pytest.raises(RunError, match=r"must hold an engine checkpoint \(it has no critic/meta.json\).*resume=never"):
        make_critic(single_rank).load(tmp_path)


def test_a_gradient_that_is_not_finite_changes_no_critic(single_rank):
    critic = make_critic(single_rank)

    def broken(micro):
        return critic.values(micro).sum() * math.inf, {}

    before = [param.detach().clone() for param in critic.deepspeed.module.parameters()]
    norm = update(critic, make_batch(DOCUMENTS, PACKER, single_rank), broken, Metrics(single_rank))
    assert not math.isfinite(norm) and critic.skipped_in_a_row == 1
    assert all(map(torch.equal, before, critic.deepspeed.module.parameters()))
