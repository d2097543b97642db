"""Reward by a reward model on a server, such as vLLM's with a sequence classifier."""

from __future__ import annotations

from rewards._endpoint import post
from rlpost.samples import prompt_text
from rlpost.types import Rollout


async def reward_model(
    rollout: Rollout,
    *,
    url: str,
    model: str,
    template: str = "{prompt}\n{answer}",
    label: int = 0,
    requests_per_s: float = 0.0,
    tries: int = 5,
    cache: str | None = None,
) -> float:
    """The value of one label, as vLLM's `/classify` gives it for the prompt and the answer put into `template`.

    `url` is the server's, such as http://HOST:8000; `vllm serve MODEL --runner pooling` starts one.
    """
    text = template.replace("{prompt}", prompt_text(rollout.task)).replace("{answer}", rollout.text)
    body = {"model": model, "input": text}
    found = await post(f"{url.rstrip('/')}/classify", body, per_second=requests_per_s, tries=tries, cache=cache)
    return float(found["data"][0]["probs"][label])
