"""What a simulation of a pipeline says in a row of figures."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.simulate.cluster import Cluster
from rlpost.simulate.pipeline import Pipeline, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over the steps after the first `ahead` + 1, in which the pipeline fills; shares of tokens over all steps.

    Where the longest answers decide, a pipeline goes in bursts: waves that were given out together become whole
    together, and `ahead` short steps follow a long one. So the means are over whole bursts.

    >>> figures(simulated(Cluster(gpus=2, steps=3, prompts_per_step=2, group_size=2, max_staleness=0))).stale_mean
    0.0
    """

    step_s: float
    wait_s: float
    """Of it: the trainer waits for rollouts."""
    train_s: float
    sync_s: float
    """Until the new weights have arrived, with the time in which replicas come to a halt."""
    trained_per_s: float
    """Tokens of answers that are trained a second."""
    trained_per_gpu_s: float
    generated_per_s: float
    trainer_frac: float
    """Of the time the trainer trains."""
    generator_frac: float
    """Of the time a replica decodes or reads prompts."""
    slots_frac: float
    """Of its slots are taken."""
    stale_mean: float
    """Optimizer steps between the weights that wrote a token and those that are trained on it."""
    stale_max: int
    read_again_frac: float
    """Tokens of answers that were read again at new weights, over tokens generated."""
    lost_frac: float
    """Tokens that died with a replica, over tokens generated."""
    dropped_frac: float
    """Tokens thrown away as too stale, over tokens generated."""
    length_bias: float
    """Mean length of trained answers over that of all that were given out for these steps, less 1."""
    answer_s: float
    """Seconds of an answer in its slot."""
    deaths: int


def simulated(cluster: Cluster) -> Result:
    """A description's simulation."""
    return Pipeline(cluster).run()


def first_counted(cluster: Cluster) -> int:
    """The first step that means are over; in parts, none before the longest answers can be whole.

    >>> [first_counted(Cluster(steps=10, max_staleness=k)) for k in (0, 1, 2, 12)]
    [1, 2, 4, 9]
    >>> first_counted(Cluster(steps=100, max_staleness=0, partial_tokens=1024))
    16
    """
    burst = cluster.waves_ahead + 1
    filled = burst + (cluster.steps - burst) % burst
    if cluster.partial_tokens is not None:
        filled = min(-(-cluster.lengths.max_new_tokens // cluster.partial_tokens), cluster.steps // 2)
    return filled if filled < cluster.steps else cluster.steps - 1


def figures(result: Result) -> Figures:
    """The row of a simulation."""
    cluster, work = result.cluster, result.work
    steps = result.steps[first_counted(cluster) :]
    num, seconds = len(steps), steps[-1].end - steps[0].begin
    trained = max(1, sum(step.tokens for step in steps))
    of_trained = sum(step.tokens for step in result.steps) / max(1, len(result.trained))
    of_drawn = result.drawn_tokens / result.drawn_groups
    whole_s = result.steps[-1].end * cluster.num_replicas
    rate = trained * cluster.train.kept_frac / seconds
    return Figures(
        step_s=seconds / num,
        wait_s=sum(step.begun - step.synced for step in steps) / num,
        train_s=sum(step.train_s for step in steps) / num,
        sync_s=sum(step.synced - step.begin for step in steps) / num,
        trained_per_s=rate,
        trained_per_gpu_s=rate / cluster.gpus,
        generated_per_s=work.generated / result.steps[-1].end,
        trainer_frac=sum(step.train_s for step in steps) / seconds,
        generator_frac=sum(step.busy_s for step in steps) / (seconds * cluster.num_replicas),
        slots_frac=work.resident_s / (whole_s * result.slots),
        stale_mean=sum(step.stale_sum for step in steps) / trained,
        stale_max=max(step.oldest for step in steps),
        read_again_frac=work.read_again / work.generated,
        lost_frac=work.lost / work.generated,
        dropped_frac=result.dropped_tokens / work.generated,
        length_bias=of_trained / of_drawn - 1,
        answer_s=work.stay_s / max(1, work.left),
        deaths=result.deaths,
    )
