import math
from dataclasses import replace

import pytest
import torch
from exact import exact_llama
from tiny import CPU, gradients, logp_and_entropy, ragged, tiny_llama, tiny_policy

from rlpost.losses import ppo_clip, weighted_sum
from rlpost.packing import Packer
from rlpost.policy import Policy, load_policy, uses_flash_attention
from rlpost.recipe import Model

PACKER = Packer(200, 40, CPU)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def one_micro():
    documents = ragged()
    total = sum(one.num_trained for one in documents)
    [micro] = PACKER.micros([replace(one, weight=1 / total) for one in documents])
    return micro


def own_distribution(model, micro, temperature):
    """From the model's own logits, one row at a time, with the block-diagonal mask that it builds from positions."""
    logits_BTV = model(input_ids=micro.tokens_BT, position_ids=micro.position_BT, use_cache=False).logits
    return torch.distributions.Categorical(logits=logits_BTV.double() / temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("tie", [True, False])
def test_t16_logp_and_entropy_are_those_of_the_models_own_logits(tie, temperature):
    policy, micro = tiny_policy(tie=tie), one_micro()
    logp_BT, entropy_BT = logp_and_entropy(policy, micro, temperature)
    own = own_distribution(policy.model, micro, temperature)
    mask_BT, own_logp_BT = micro.mask_BT, own.log_prob(micro.target_BT)
    torch.testing.assert_close(logp_BT[mask_BT].double(), own_logp_BT[mask_BT], **TOLERANCE)
    torch.testing.assert_close(entropy_BT[mask_BT].double(), own.entropy()[mask_BT], **TOLERANCE)
    assert not logp_BT[~micro.mask_BT].any() and not entropy_BT[~micro.mask_BT].any()


@pytest.mark.parametrize("kind", ["softcap", "multiplied", "divided"])
def test_logp_follows_what_a_model_does_to_its_logits(kind):
    import transformers as hf

    shape = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 1}
    settings = shape | heads | {"attn_implementation": "eager", "initializer_range": 0.3}
    make = {
        "softcap": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**settings, head_dim=16, final_logit_softcapping=1.5, attn_logit_softcapping=None)
        ),
        "multiplied": lambda: hf.CohereForCausalLM(hf.CohereConfig(**settings, logit_scale=0.25)),
        "divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**settings, logits_scaling=4.0)),
    }[kind]
    torch.manual_seed(0)
    policy, micro = Policy(make(), logp_chunk=7), one_micro()
    logp_BT, _ = logp_and_entropy(policy, micro)
    own_logp_BT = own_distribution(policy.model, micro, 1.0).log_prob(micro.target_BT)
    torch.testing.assert_close(logp_BT[micro.mask_BT].double(), own_logp_BT[micro.mask_BT], **TOLERANCE)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_t36_chunks_change_neither_log_probs_nor_gradients(chunk, tie):
    micro, results = one_micro(), []
    for size in (10_000, chunk):
        policy = tiny_policy(chunk=size, tie=tie)
        logp_BT, entropy_BT = logp_and_entropy(policy, micro, 0.6)
        (logp_BT * micro.adv_BT).sum().backward()
        results.append((logp_BT, entropy_BT, gradients(policy)))
    (logp, entropy, grads), (chunked_logp, chunked_entropy, chunked_grads) = results
    torch.testing.assert_close(chunked_logp, logp, **TOLERANCE)
    torch.testing.assert_close(chunked_entropy, entropy, **TOLERANCE)
    for name, grad in grads.items():
        torch.testing.assert_close(chunked_grads[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def exact_policy(*, chunk, entropy_grad=True):
    return Policy(exact_llama(), logp_chunk=chunk, entropy_grad=entropy_grad)


def test_entropy_has_a_gradient_only_when_asked_for():
    for asked in (False, True):
        logp_BT, entropy_BT = logp_and_entropy(exact_policy(chunk=7, entropy_grad=asked), one_micro(), 0.6)
        assert entropy_BT.requires_grad == asked and logp_BT.requires_grad
    with torch.no_grad():
        assert not logp_and_entropy(exact_policy(chunk=7), one_micro())[1].requires_grad


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_entropy_gradient_matches_finite_differences(chunk):
    policy, micro = exact_policy(chunk=chunk), one_micro()

    def mean_entropy():
        return weighted_sum(logp_and_entropy(policy, micro, 0.6)[1], micro.weight_BT, 1)

    mean_entropy().backward()
    generator = torch.Generator().manual_seed(0)
    for name, param in policy.named_parameters():
        direction = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                param.add_(direction, alpha=step)
                values.append(mean_entropy().item())
            param.add_(direction, alpha=1e-5)
        slope = (values[0] - values[1]) / 2e-5
        assert float((param.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("chunk", [1, 7])
def test_t36_chunks_do_not_change_the_gradient_of_the_entropy(chunk):
    grads = []
    for size in (10_000, chunk):
        policy, micro = exact_policy(chunk=size), one_micro()
        logp_BT, entropy_BT = logp_and_entropy(policy, micro, 0.6)
        weighted_sum(logp_BT * micro.adv_BT + entropy_BT, micro.weight_BT, 1).backward()
        grads.append(gradients(policy))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-12)


def test_chunks_are_never_larger_than_asked_for(monkeypatch):
    policy, micro = tiny_policy(chunk=7), one_micro()
    sizes, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: (sizes.append(x.shape), linear(x, w, b))[1])
    logp_BT, _ = logp_and_entropy(policy, micro)
    logp_BT.sum().backward()
    assert max(shape[0] for shape in sizes if len(shape) == 2) == 7


def test_logp_gradient_matches_a_plain_cross_entropy():
    policy, micro = tiny_policy(), one_micro()
    logp_BT, _ = logp_and_entropy(policy, micro)
    logp_BT.sum().backward()
    chunked = gradients(policy)
    plain = tiny_llama()
    own_distribution(plain, micro, 1.0).log_prob(micro.target_BT)[micro.mask_BT].sum().backward()
    for name, param in plain.named_parameters():
        scale = param.grad.abs().max().item()
        torch.testing.assert_close(chunked[f"model.{name}"], param.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("tie", [True, False])
def test_t6_an_empty_micro_batch_gives_a_finite_zero_gradient_on_every_weight(tie):
    policy = tiny_policy(tie=tie)
    micro = PACKER.empty()
    logp_BT, entropy_BT = logp_and_entropy(policy, micro)
    assert logp_BT.tolist() == entropy_BT.tolist() == [[0.0, 0.0]]
    weighted_sum(logp_BT, micro.weight_BT, 2).backward()
    assert all(not grad.any() for grad in gradients(policy).values())


@pytest.mark.parametrize("trash", [math.inf, -math.inf, math.nan, -1e10])
def test_t20_trash_under_the_mask_reaches_neither_loss_nor_gradient(trash):
    clean, results = one_micro(), []
    dirty = replace(
        clean,
        behavior_logp_BT=clean.behavior_logp_BT.masked_fill(~clean.mask_BT, trash),
        adv_BT=clean.adv_BT.masked_fill(~clean.mask_BT, trash),
    )
    for micro in (clean, dirty):
        policy = tiny_policy()
        logp_BT, _ = logp_and_entropy(policy, micro)
        loss_BT, _ = ppo_clip(logp_BT, micro.behavior_logp_BT, micro.adv_BT, clip_low=0.2, clip_high=0.28)
        loss = weighted_sum(loss_BT, micro.weight_BT, 1)
        loss.backward()
        results.append((loss.item(), gradients(policy)))
    (value, grads), (dirty_value, dirty_grads) = results
    assert value == dirty_value
    assert all(torch.equal(dirty_grads[name], grad) for name, grad in grads.items())


def test_t14_t33_two_forwards_in_training_mode_are_identical():
    model = tiny_llama()
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.5))
    policy, micro = Policy(model.train(), logp_chunk=7), one_micro()
    first, second = (logp_and_entropy(policy, micro)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_t29_bfloat16_weights_give_float32_log_probs_close_to_the_exact_ones():
    micro = one_micro()
    exact, _ = logp_and_entropy(tiny_policy(), micro)
    rounded, entropy = logp_and_entropy(tiny_policy(dtype=torch.bfloat16), micro)
    assert rounded.dtype == entropy.dtype == torch.float32
    assert (rounded - exact)[micro.mask_BT].abs().mean() < 0.1


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    grads = []
    for on in (False, True):
        policy = load_policy(tmp_path, Model(dtype="float32", gradient_checkpointing=on, logp_chunk=7))
        logp_BT, _ = logp_and_entropy(policy, one_micro())
        logp_BT.sum().backward()
        grads.append(gradients(policy))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


def test_offloaded_activations_change_no_gradient(tmp_path, monkeypatch):
    """The way to a GPU's host, on a CPU: what saves there is counted, and pins nothing."""
    tiny_llama().save_pretrained(tmp_path)
    kept, plain = [], torch.autograd.graph.saved_tensors_hooks

    def on_host(**_):
        return plain(lambda x: kept.append(x.shape) or x.clone(), lambda x: x.clone())

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", on_host)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    grads, micro = [], one_micro()
    for on in (False, True):
        recipe = Model(dtype="float32", attention="sdpa", gradient_checkpointing=True, offload_activations=on)
        policy = load_policy(tmp_path, recipe)
        logp_and_entropy(policy, micro)[0].sum().backward()
        grads.append(gradients(policy))
        inputs = [shape for shape in kept if shape == (*micro.tokens_BT.shape, 32)]
        assert len(inputs) == (2 if on else 0)  # the input of each of the two layers
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_policy_reads_a_folder_in_the_asked_type(tmp_path, dtype):
    tiny_llama(tie=False).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, Model(dtype=dtype, logp_chunk=5, attention="eager"))
    assert not policy.head.how.entropy_grad
    assert load_policy(tmp_path, Model(dtype=dtype), entropy_grad=True).head.how.entropy_grad
    assert {param.dtype for param in policy.parameters()} == {getattr(torch, dtype)}
    assert policy.training and policy.head.how.chunk == 5 and policy.model.config._attn_implementation == "eager"
    expected = tiny_policy(tie=False, dtype=getattr(torch, dtype), attention="eager")
    assert torch.equal(logp_and_entropy(policy, one_micro())[0], logp_and_entropy(expected, one_micro())[0])


def test_the_head_shares_its_weight_with_the_model():
    for tie in (True, False):
        policy = tiny_policy(tie=tie)
        assert policy.head.weight is policy.model.get_output_embeddings().weight
        assert (policy.head.weight is policy.model.get_input_embeddings().weight) == tie


def test_flash_attention_is_used_only_where_the_recipe_or_a_gpu_says_so(monkeypatch):
    assert uses_flash_attention(Model(attention="flash_attention_2"))
    assert not uses_flash_attention(Model(attention="sdpa"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not uses_flash_attention(Model(attention="auto"))
