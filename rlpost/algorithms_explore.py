"""Algorithms that ask for more than one wave of plain rollouts: wide groups, hints, an expert's answers.

Rows of `ALGORITHMS` (`algorithms.py`), each with the explorers (`rlpost/explore/`) that make it.
"""

from __future__ import annotations

from rlpost.bundle import Bundle

_GRPO = {
    "advantage": {"use": "grpo", "scale_by_std": True},
    "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
    "groups": {"without_spread": "drop"},
}

EXPLORING: dict[str, Bundle] = {
    "brorl": Bundle(
        summary="prorl_v2 with hundreds of rollouts a prompt, in as many updates",
        paper="BroRL, arXiv:2510.01180",
        conflicts="ScaleRL finds no use in wider groups at a fixed batch; BroRL's batch grows with the width, and its "
        "learning rate with the square root of that: engine.lr_rollouts=8192 (512 prompts x 16)",
        section={
            "advantage": {"use": "reinforce_pp_baseline", "count": "rollouts"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28},
            "kl": {"coef": 1e-4, "place": "loss", "estimator": "k2", "reset": {"every": 300}},
            "groups": {"without_spread": "refill", "max_waves": 10},
            "mismatch": {"mode": "decoupled", "weights": [{"use": "icepop", "low": 0.5, "high": 5.0}]},
        },
        explore=[{"use": "broaden", "width": 512, "chunk": 64}],
    ),
    "guide_grpo": Bundle(
        summary="grpo; where all fail, answers under a hint take the group's place, learned as if without it",
        paper="Guide, arXiv:2506.13923",
        conflicts="the release takes gamma from each micro-batch, here from the whole step; it keeps surplus "
        "groups for the next step; the paper's own tables were not read",
        section={
            **_GRPO,
            "off_policy": {"loss": {"use": "shaped", "quantile": 0.9}, "behavior": "generator", "statistics": "role"},
        },
        explore=[{"use": "guide", "place": "group", "prompt": "plain", "n": 8}],
    ),
    "guide_ppo": Bundle(
        summary="ppo with the hints of guide_grpo: values of the problem alone, ratios against what was sampled",
        paper="Guide, arXiv:2506.13923",
        conflicts="not in the release; the clipped loss of all tokens is from memory of the paper and not verified",
        section={
            "advantage": {"use": "gae", "lam": 1.0},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "groups": {"without_spread": "keep"},
        },
        explore=[{"use": "guide", "place": "group", "prompt": "plain", "n": 8}],
    ),
    "luffy": Bundle(
        summary="dr_grpo with a worked solution in each group, its ratio shaped",
        paper="arXiv:2504.14945",
        conflicts="7 rollouts and 1 solution in the paper: sampling.group_size=7; the script removes the clip and the "
        "token mean and has entropy.coef=.001, the paper .01",
        section={
            "advantage": {"use": "dr_grpo"},
            "loss": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2},
            "groups": {"without_spread": "drop"},
            "entropy": {"coef": 0.01},
            "off_policy": {"loss": {"use": "shaped", "gamma": 0.1}, "statistics": "pooled"},
        },
        explore=[{"use": "expert", "place": "add", "threshold": 1.0}],
    ),
    "ghpo": Bundle(
        summary="grpo; where all fail, on the problem with the first quarter, half, three quarters of its solution",
        paper="arXiv:2507.10628",
        conflicts="the loss conditions on the hint, where Guide takes it away; its reward of form (.5) is left out",
        section=_GRPO,
        explore=[
            {
                "use": "guide",
                "source": "solution",
                "levels": [0.25, 0.5, 0.75],
                "unit": "characters",
                "template": "{prompt}\n\nThe text below is the beginning of the answer:\n{hint}",
                "place": "group",
                "prompt": "hinted",
                "n": 8,
            }
        ],
    ),
    "scaf_grpo": Bundle(
        summary="grpo; one failure gives way to an answer under the weakest hint that helps",
        paper="arXiv:2510.19807",
        conflicts="hints of several levels, from knowledge to solution, in tasks.train.hints; none in the first 50 "
        "steps; prompt=plain is its other variant",
        section=_GRPO,
        explore=[{"use": "guide", "place": "failures", "k": 1, "n": 1, "prompt": "hinted", "start_step": 50}],
    ),
    "egsr": Bundle(
        summary="grpo; where all fail, the policy writes an expert's solution anew, and learns that",
        paper="ADCL and EGSR, arXiv:2505.08364",
        conflicts="prompt, number and ratio are not published: 4 answers, replacing 4 failures, first ratio 1 "
        "(off_policy.behavior=generator: against the hinted prompt); source=answer is its weaker variant",
        section={**_GRPO, "off_policy": {"behavior": "plain", "statistics": "pooled"}},
        explore=[
            {
                "use": "guide",
                "source": "solution",
                "levels": [1.0],
                "template": "{prompt}\n\nA correct solution:\n{hint}\n\nWrite it in your own words, step by step.",
                "place": "failures",
                "k": 4,
                "n": 4,
                "prompt": "plain",
            }
        ],
    ),
}
"""Algorithms that ask for more than one wave of plain rollouts (`rlpost/explore/`)."""
