"""TRL's GRPOTrainer on a job given as JSON: seconds and reward of each step; in its own process.

Everything that costs time and changes nothing is off: gradient checkpointing, checkpoints, reports, the reference.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.jobs import Job, share_of_vowels


def main() -> None:
    """Train as the job says, and write the figures where the second argument says."""
    job = Job(**json.loads(sys.argv[1]))
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    steps = Steps()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward(tokenizer)],
        args=config(job),
        train_dataset=Dataset.from_list([{"prompt": prompt(text, job)} for text in job.prompts]),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    steps.trainer = trainer
    trainer.train()
    Path(sys.argv[2]).write_text(json.dumps(steps.found))


def config(job: Job) -> GRPOConfig:
    """The job in TRL's terms: one generation and one optimizer step of all rollouts a step."""
    rollouts = job.prompts_per_step * job.group_size
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=job.steps,
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=rollouts // job.rows,
        num_generations=job.group_size,
        max_completion_length=job.max_new_tokens,
        temperature=1.0,
        top_k=0,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="dapo",  # one mean over all tokens, as in our recipe
        scale_rewards="group",
        epsilon=0.2,
        bf16=job.dtype == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=job.seed,
        use_transformers_continuous_batching=job.generator == "continuous_batching",
        cache_implementation=None if job.generator != "static" else "static",
    )


def prompt(text: str, job: Job) -> Any:
    """A prompt as TRL wants it."""
    return [{"role": "user", "content": text}] if job.chat else text


def reward(tokenizer: Any) -> Any:
    """The job's reward over what TRL calls completions."""

    def share(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [share_of_vowels(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids]

    return share


class Steps(TrainerCallback):
    """Seconds from the start of one step to its end, and TRL's own figures of it."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.trainer: Any = None
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called before the batch of a step is taken to the model."""
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called after each step."""
        if logs and "reward" in logs:
            self.found.append(
                {
                    "seconds": time.perf_counter() - self.started,
                    "reward": float(logs["reward"]),
                    "length": float(logs["completions/mean_length"]),
                    "grad_norm": float(logs.get("grad_norm", "nan")),
                }
            )
            print(self.found[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
