"""A user's folder outside the repository: a recipe, a reward beside it, and the command line as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlpost.world import World

ROOT = Path(__file__).parent.parent
RECIPE = """
steps: 4
save_every: 2
prompts_per_step: 4
model:
  dtype: float32
  context: 64
  init: {tokenizer: char, alphabet: "0123456789+-=;#", hidden_size: 64, intermediate_size: 128, num_layers: 2,
         num_heads: 2}
tasks:
  train: {path: "rlpost.testbed:chain_sums", config: {split: train, size: 64, min_terms: 2, max_terms: 3}}
  eval: {path: "rlpost.testbed:chain_sums", config: {split: eval, size: 8, min_terms: 2, max_terms: 3}}
sft:
  tasks: {path: "rlpost.testbed:chain_sums", solution: solution,
          config: {split: train, size: 64, min_terms: 2, max_terms: 3, seed: 1}}
  steps: 4
  batch_size: 8
  lr: 1.0e-3
rewards: [{use: exact_chain}, {use: "mylab.rewards:brevity", target: 24, isolate: false}]
sampling: {group_size: 4, max_new_tokens: 24}
engine: {lr: 1.0e-3}
generator: {kv_cache_gib: 0.25, max_num_seqs: 64}
evaluation: {n: 2}
"""
REWARDS = '''
import os
import signal
from pathlib import Path


def brevity(rollout, *, target: int = 200) -> float:
    """1 at no tokens, 0 at `target` and above; runs the accident of the test where its file is there."""
    accident, _, trigger = os.environ.get("ACCIDENT", "").partition(":")
    if accident and Path(trigger).exists():
        if accident == "raise":
            raise KeyError("no such column")
        os.kill(os.getpid(), getattr(signal, accident))
    return max(0.0, 1.0 - len(rollout.token_ids) / target)


def sevens(rollout) -> float:
    """The share of sevens."""
    return rollout.text.count("7") / len(rollout.token_ids)


def nothing(rollout) -> None:
    """Judges none."""


def foreseeable(rollout) -> float:
    """1 where the problem begins with a plus, whatever the answer."""
    return float(rollout.task.prompt[1] == "+")
'''
LOSSES = '''
import torch


def cispo_two_sided(logp_BT, behavior_logp_BT, adv_BT, *, low: float = 0.2, high: float):
    """Clipped importance weight, bounded on both sides."""
    ratio_BT = torch.exp(logp_BT - behavior_logp_BT).detach()
    clipped_BT = ratio_BT.clamp(1 - low, 1 + high)
    return -clipped_BT * adv_BT * logp_BT, {"ratio": ratio_BT, "bounded": (clipped_BT != ratio_BT).float()}


def length_mean(logp_BT, behavior_logp_BT, adv_BT, *, document_BT, mask_BT):
    """REINFORCE that also says how many tokens are trained in a row, from what the run hands it."""
    trained_BT = (mask_BT & (document_BT >= 0)).float()
    return -adv_BT * logp_BT * trained_BT, {"row_tokens": trained_BT.sum(-1, keepdim=True).expand_as(logp_BT)}
'''
VARYING = (
    *("unix_s", "time/", "reward/latency/", "total/device_s", "energy/", "total/energy"),
    *("sync/seconds", "sync/gb_per_s", "servers/update_s", "memory/"),
)


def make_lab(folder: Path) -> Path:
    """The user's folder, and another one to start from."""
    (folder / "mylab").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "mylab" / "rewards.py").write_text(REWARDS)
    (folder / "mylab" / "losses.py").write_text(LOSSES)
    return folder


def rlpost(
    lab: Path, *arguments: str, ranks: int = 1, accident: str = "", timeout_s: int = 400, anew: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m rlpost COMMAND tiny.yaml ...` from another folder; `anew`: one rank, by an interpreter of its own."""
    import nursery  # here, as benchmarks make labs as well, and have no tests on their path

    command, *rest = arguments
    recipe = [] if command == "export" else [str(lab / "tiny.yaml"), f"run_dir={lab / 'runs'}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCIDENT": accident}
    argv, cwd = [command, *recipe, *rest], lab / "elsewhere"
    if not anew:
        return nursery.run_module("rlpost", *argv, env=env, cwd=cwd, ranks=ranks, timeout_s=timeout_s)
    return subprocess.run(
        [sys.executable, "-m", "rlpost", *argv],
        cwd=cwd,
        env=nursery.outside(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def train(lab: Path, name: str, *overrides: str, ranks: int = 1, anew: bool = False) -> list[dict[str, Any]]:
    """Train to the end, and return what the run logged of every step."""
    done = rlpost(lab, "train", f"name={name}", *overrides, ranks=ranks, anew=anew)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return logged(lab, name)


def train_here(lab: Path, world: World, name: str, *overrides: str) -> list[dict[str, Any]]:
    """`train` in this process, with the plain generator: a second instead of ten. What is logged of every step."""
    from rlpost.check import load_and_check
    from rlpost.train import train as run

    own = [f"run_dir={lab / 'runs'}", f"name={name}", "generator.kind=hf", "tasks.eval=null", "save_every=0"]
    run(load_and_check(lab / "tiny.yaml", [*own, *overrides], world.size), world)
    return logged(lab, name)


def logged(lab: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (lab / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if not key.startswith(VARYING)} for line in lines]


def base_model(lab: Path) -> Path:
    """The supervised model that the run `first` started from."""
    state = lab / "runs/first/checkpoints/step-000004/state.json"
    return lab / "elsewhere" / json.loads(state.read_text())["model"]


def weights(lab: Path, name: str, step: int) -> dict[str, Any]:
    """The float32 weights in a run's checkpoint."""
    from rlpost.engine import checkpoint_weights

    return checkpoint_weights(lab / "runs" / name / "checkpoints" / f"step-{step:06d}")
