"""A small Llama and ragged documents, the same in every process."""

import random

import torch

from rlpost.document import Document
from rlpost.policy import Policy, seen

VOCAB = 29
CPU = torch.device("cpu")


def tiny_llama(*, seed=0, tie=True, hidden=32, vocab=VOCAB, attention="sdpa"):
    """Random weights large enough that distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_policy(*, chunk=64, dtype=torch.float32, **options):
    policy = Policy(tiny_llama(**options), logp_chunk=chunk)
    for param in policy.parameters():  # and no buffer: rotary frequencies stay in float32
        param.data = param.data.to(dtype)
    return policy


def ragged(count=12, *, seed=0, vocab=VOCAB):
    """Documents of different prompt and completion lengths, log-probs and advantages."""
    dice = random.Random(seed)

    def ids(low, high):
        return tuple(dice.randrange(2, vocab) for _ in range(dice.randint(low, high)))

    documents = []
    for _ in range(count):
        token_ids = ids(1, 9)
        logp = tuple(-3 * dice.random() for _ in token_ids)
        documents.append(Document(ids(1, 6), token_ids, logp, advantage=dice.gauss(0, 1)))
    return documents


def logp_and_entropy(policy, micro, temperature=1.0):
    inputs = micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT
    return policy(*inputs, temperature=temperature, seen_BTT=seen(micro))


def gradients(module):
    return {name: param.grad.clone() for name, param in module.named_parameters()}


def tiny_tokenizer():
    """As many tokens as the model: <pad>, <eos>, and one a character."""
    from rlpost.recipe import InitModel
    from rlpost.render import build_tokenizer

    return build_tokenizer(InitModel(tokenizer="char", alphabet="abcdefghijklmnopqrstuvwxyz="))


def write_folder(folder, **options):
    """A model folder as transformers and vLLM read it."""
    tiny_llama(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
