"""`rlpost simulate pipeline`: descriptions and their errors, descriptions from runs, the search, the files."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpost.__main__ import FAILED, main
from rlpost.errors import RunError
from rlpost.simulate.cluster import Cluster, changed, load
from rlpost.simulate.measured import described, fit_decode, likeness
from rlpost.simulate.pipeline_figures import figures, first_counted, simulated
from rlpost.simulate.pipeline_search import GOOD_ENOUGH, search
from rlpost.simulate.rates import rates

QUICK = ["gpus=4", "prompts_per_step=4", "group_size=4", "steps=5", "lengths.mean=50", "lengths.max_new_tokens=200"]


def test_description_is_a_file_under_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("gpus: 16\nlengths: {kind: fixed, mean: 100}\nreplicas: {table: [[1, 0.01], [64, 0.03]]}\n")
    cluster = load(file, ["gpus=32", "lengths.prompt=7", "failures.mtbf_h=1e3"], under={"seed": 4, "gpus": 8})
    assert (cluster.gpus, cluster.generating, cluster.training, cluster.seed) == (32, 16, 16, 4)
    assert (cluster.lengths.mean, cluster.lengths.prompt, cluster.failures.mtbf_h) == (100, 7, 1000.0)
    assert rates(cluster).decode_s[64] == pytest.approx(0.03)


def test_rates_are_guessed_from_model_and_device_and_can_all_be_given() -> None:
    guessed = rates(Cluster())
    # 7.6e9 weights of 2 bytes at 60 % of 3.35e12 bytes/s, the cache of one answer, and 3.04 ms beside.
    assert guessed.decode_s[1] == pytest.approx(15.2e9 / 2.01e12 + 0.00304, rel=0.02)
    assert guessed.train_rate == pytest.approx(32 * 989e12 * 0.4 / (6 * 7.6e9))
    assert guessed.sync_s == pytest.approx(1.76)
    given = load(
        None,
        ["replicas.step_s=0.1", "replicas.sequence_s=0.2", "replicas.prefill_rate=9", "train.rate=5", "sync.seconds=3"],
    )
    found = rates(given)
    assert found.decode_s[2] == pytest.approx(0.5)
    assert (found.prefill_rate, found.train_rate, found.sync_s) == (9, 5 * 32, 3)
    assert rates(load(None, ["replicas.cache_tokens=5000"])).slots == 5000 // (256 + 2324)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=3"], "gpu: no such key, did you mean `gpus`?"),
        (["gpus=many"], "gpus must be an integer (got 'many')"),
        (["lengths=3"], "lengths must be a mapping of keys to values (got 3)"),
        (["steps=0"], "steps must be >= 1 (got 0)"),
        (["lengths.tail=1"], "lengths.tail must be > 1 (got 1)"),
        (["placement=far"], "placement must be 'separate' or 'colocated' (got 'far')"),
        (["generator_gpus=64"], "generator_gpus must leave a GPU of gpus=64 to the trainer (got 64)"),
        (["replicas.tensor_parallel=3", "generator_gpus=4"], "multiple of replicas.tensor_parallel=3"),
        (["placement=colocated", "generator_gpus=4"], "generator_gpus must be left out for placement=colocated"),
        (["replicas.step_s=0.1"], "replicas.step_s and replicas.sequence_s must be given together"),
        (["replicas.table=[[4, 0.2], [2, 0.1]]"], "replicas.table must be pairs of rising answers"),
        (["lengths.kind=quantiles"], "lengths.quantiles must be pairs of share and tokens"),
        (["ahead=2"], "ahead must be <= max_staleness=1 (got 2)"),
        (["late=drop"], "late=drop needs first_come=true"),
        (["partial_tokens=5", "max_staleness=2"], "partial_tokens needs max_staleness=0 (got 2)"),
        (["model.device=tpu"], "model.device must be one of h100"),
        (["train.kept_frac=0"], "train.kept_frac must be above 0 and at most 1 (got 0)"),
    ],
)
def test_what_is_wrong_with_a_description_is_told_with_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        load(None, overrides)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RunError, match="2 problems in the description of the cluster") as error:
        load(None, ["gpu=3", "steps=few"])
    assert "gpu: no such key" in str(error.value) and "steps must be an integer" in str(error.value)


def made_run(folder: Path, cluster: Cluster, recipe: dict[str, Any], *, every_sample: bool) -> Path:
    """The folder of a run whose seconds are those of a simulation, as one rank would log them."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows, samples, spent = [], [], 0.0
    for number in range(cluster.steps):
        one = changed(cluster, steps=1, seed=cluster.seed + number)
        step, (lengths, size) = simulated(one).steps[0], lengths_of(one)
        train_s = step.train_s - one.train.fixed_s
        spent += train_s
        rows.append(
            {
                "step": number,
                "unix_s": 1.8e9,
                "time/generate_s": step.ready - step.synced,
                "time/train_s": train_s,
                "time/sync_s": step.synced - step.begin,
                "time/log_s": one.train.fixed_s,
                "time/step_s": step.end - step.begin,
                "rollouts/num": len(lengths),
                "groups/num": one.prompts_per_step,
                "rollouts/length_mean": sum(lengths) / len(lengths),
                "rollouts/length_max": max(lengths),
                **{f"rollouts/length_p{p}": sorted(lengths)[len(lengths) * p // 100] for p in (10, 50, 90, 99)},
                "tokens/generated": sum(lengths),
                "tokens/trained": sum(lengths),
                "tokens/prompt": one.prompts_per_step * one.lengths.prompt,
                "total/device_s/train": spent,
            }
        )
        samples += [{"step": number, "group": i // size, "num_tokens": n} for i, n in enumerate(lengths)]
    kept = samples if every_sample else samples[:20]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def lengths_of(cluster: Cluster) -> tuple[list[int], int]:
    """The lengths that a simulation of one step draws, and how many are of one group."""
    import numpy as np

    from rlpost.simulate.rates import draw

    rng = np.random.default_rng([cluster.seed, 0])
    drawn = draw(cluster.lengths, cluster.prompts_per_step, cluster.group_size, rng)
    return drawn.ravel().tolist(), cluster.group_size


def one_rank(max_num_seqs: int, seed: int = 0) -> tuple[Cluster, dict[str, Any]]:
    """A colocated run of one GPU, and the recipe that says the same."""
    words = ["gpus=1", "placement=colocated", "max_staleness=0", "steps=30", "prompts_per_step=16", "group_size=8"]
    words += ["lengths.mean=80", "lengths.sigma=0.8", "lengths.max_new_tokens=400", "lengths.prompt=10"]
    words += ["replicas.step_s=0.02", "replicas.sequence_s=0.001", "replicas.prefill_rate=1e9", "train.rate=900"]
    words += [f"replicas.max_num_seqs={max_num_seqs}", "sync.seconds=0.5", "train.fixed_s=1.5", f"seed={seed}"]
    sampling = {"group_size": 8, "max_new_tokens": 400}
    recipe = {"steps": 30, "prompts_per_step": 16, "sampling": sampling, "generator": {"max_num_seqs": max_num_seqs}}
    return load(None, words), recipe


@pytest.mark.parametrize("every_sample", [True, False])
def test_a_run_gives_the_description_that_predicts_it(tmp_path: Path, every_sample: bool) -> None:
    cluster, recipe = one_rank(128)
    run = made_run(tmp_path / "run", cluster, recipe, every_sample=every_sample)
    found = load(None, under=described([run]))
    assert (found.gpus, found.placement, found.max_staleness) == (1, "colocated", 0)
    assert (found.prompts_per_step, found.group_size, found.lengths.prompt) == (16, 8, 10)
    assert found.train.rate == pytest.approx(900, rel=1e-6)
    assert (found.train.fixed_s, found.sync.seconds) == pytest.approx((1.5, 0.5))
    predicted, exact = figures(simulated(found)), figures(simulated(cluster))
    tolerance = 0.05 if every_sample else 0.12
    assert predicted.step_s == pytest.approx(exact.step_s, rel=tolerance)
    assert predicted.wait_s == pytest.approx(exact.wait_s, rel=tolerance)
    if every_sample:
        assert found.lengths.alike == pytest.approx(0.3, abs=0.1)


def test_two_runs_of_different_widths_tell_the_two_costs_of_decoding_apart(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / str(seqs), *one_rank(seqs, seed=seqs), every_sample=True) for seqs in (128, 4)]
    found = load(None, under=described(runs))
    assert found.replicas.step_s == pytest.approx(0.02, rel=0.1)
    assert found.replicas.sequence_s == pytest.approx(0.001, rel=0.3)
    assert fit_decode([(10.0, 20.0, 1.0)]) == fit_decode([(10.0, 20.0, 1.0)] * 2)  # no spread: the plan's ratio
    step_s, sequence_s = fit_decode([(10.0, 20.0, 1.0)])
    assert step_s / sequence_s == pytest.approx(75) and 10 * step_s + 20 * sequence_s == pytest.approx(1.0)


def test_a_pipeline_with_servers_takes_the_cost_of_decoding_from_a_synchronous_run(tmp_path: Path) -> None:
    cluster, recipe = one_rank(128)
    synchronous = made_run(tmp_path / "synchronous", cluster, recipe, every_sample=True)
    generator = {"kind": "remote_vllm", "servers": {"replicas": 2, "tensor_parallel": None}, "max_num_seqs": 128}
    generator |= {"max_staleness": 4, "first_come": True, "partial_tokens": None}
    piped = made_run(tmp_path / "piped", cluster, recipe | {"generator": generator}, every_sample=True)
    with pytest.raises(RunError, match=r"piped must be a run with generator.max_staleness=0 and whole answers, or"):
        described([piped])
    found = load(None, under=described([piped, synchronous]))
    assert (found.gpus, found.generating, found.training) == (3, 2, 1)
    assert (found.max_staleness, found.ahead, found.first_come, found.partial_tokens) == (4, 2, True, None)
    alone = load(None, under=described([synchronous]))
    assert found.replicas.step_s == alone.replicas.step_s
    assert figures(simulated(found)).step_s < figures(simulated(alone)).step_s


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 3\n")
    with pytest.raises(RunError, match="must hold two steps or more that generated and trained"):
        described([tmp_path])


def test_likeness_of_lengths_is_that_of_their_groups() -> None:
    rows = [{"step": 0, "group": i, "num_tokens": n} for i, group in enumerate([[9, 9], [90, 90]]) for n in group]
    assert likeness(rows) == 1.0
    assert likeness([row | {"group": i % 2} for i, row in enumerate(rows)]) == 0.0
    assert likeness([{"step": 0, "group": 0, "num_tokens": 5}] * 3) == 0.0


def test_search_finds_what_trying_every_split_finds() -> None:
    cluster = load(None, [*QUICK, "gpus=12", "prompts_per_step=16", "steps=9", "max_staleness=2", "train.rate=300"])
    cluster = changed(cluster, replicas=load(None, ["replicas.step_s=0.02", "replicas.sequence_s=0.01"]).replicas)
    found = search(cluster, [2, 8])
    every = [
        figures(simulated(changed(cluster, generator_gpus=gpus, max_staleness=k))).trained_per_s
        for gpus in range(1, 12)
        for k in (0, 1, 2)
    ]
    assert found.trials[0].rate >= GOOD_ENOUGH * max(every)
    rates_found = [trial.rate for trial in found.trials]
    assert rates_found == sorted(rates_found, reverse=True)
    assert {trial.cluster.max_staleness for trial in found.trials} == {0, 1, 2}
    assert {trial.cluster.group_size for trial in found.trials} == {2, 4, 8}
    assert {trial.cluster.rollouts for trial in found.trials} == {64}
    assert found.advised.rate >= GOOD_ENOUGH * found.trials[0].rate
    near = [trial for trial in found.trials if trial.rate >= GOOD_ENOUGH * found.trials[0].rate]
    assert found.advised.cluster.max_staleness == min(trial.cluster.max_staleness for trial in near)
    with pytest.raises(RunError, match=r"--group-sizes must divide the 64 rollouts of a step \(got 5\)"):
        search(cluster, [5])


def test_command_prints_tables_and_writes_its_files(tmp_path: Path, capsys) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("max_staleness: 2\n")
    out = ["--out", str(tmp_path / "deep" / "out")]
    assert main(["simulate", "pipeline", str(file), *QUICK, *out]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("2 replicas of 1 GPU:", "staleness of a token", "length bias"))
    folder = tmp_path / "deep" / "out"
    whole = json.loads((folder / "pipeline.json").read_text())
    assert (whole["cluster"]["max_staleness"], len(whole["steps"])) == (2, 5)
    assert (folder / "pipeline.png").read_bytes().startswith(b"\x89PNG")

    assert main(["simulate", "pipeline", *QUICK, *out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["step_s"] > 0

    assert main(["simulate", "pipeline", *QUICK, "--search", "--group-sizes", "2", *out]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("the best ways", "the best of each kind", "advised"))
    assert max(len(line.rstrip()) for line in printed.splitlines() if "written" not in line) < 120
    trials = json.loads((folder / "pipeline.json").read_text())
    assert trials["advised"] in trials["trials"]

    cluster, recipe = one_rank(128)
    run = made_run(tmp_path / "run", cluster, recipe, every_sample=True)
    assert main(["simulate", "pipeline", "steps=4", "--from-run", str(run), *out]) == 0
    assert "lengths: quantiles" in capsys.readouterr().out


def test_command_takes_one_description(tmp_path: Path, capsys) -> None:
    assert main(["simulate", "pipeline", "a.yaml", "b.yaml", "--out", str(tmp_path / "none")]) == FAILED
    assert (
        capsys.readouterr().err == "error: simulate pipeline takes one description and key=value (got a.yaml, b.yaml)\n"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_thousands_of_gpus_are_simulated_in_tens_of_seconds() -> None:
    cluster = load(None, ["gpus=4096", "prompts_per_step=512", "steps=100", "max_staleness=2", "failures.mtbf_h=200"])
    began = time.process_time()
    result = simulated(cluster)
    assert time.process_time() - began < 90  # 25 where two cores were shared by others
    assert len(set(result.trained)) == 51_200 and result.deaths > 0
    assert first_counted(cluster) == 4
