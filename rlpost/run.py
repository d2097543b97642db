"""The parts of a run, built in the order of the data flow; what can be wrong is found before memory is taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlpost.accounts import Accounts, Counted
from rlpost.alarms import Lookout
from rlpost.checkpoint import Checkpoints, Saves, open_run
from rlpost.chosen import Chosen, difficulty_of_tasks
from rlpost.clock import Clock
from rlpost.critic import Critic, load_value_model
from rlpost.devices import peak_here
from rlpost.energy import meter
from rlpost.engine import Engine, Frozen, Reference, WithoutAdapters
from rlpost.errors import RunError
from rlpost.evaluate import Evaluator
from rlpost.explorers import Explorers
from rlpost.frontier import Frontier
from rlpost.generate.base import Canary, Generator, canary_tokens
from rlpost.health import Health
from rlpost.history import lines_of
from rlpost.law import EntropyLaw
from rlpost.metrics import Metrics
from rlpost.mixture import mixed
from rlpost.model_costs import model_costs
from rlpost.model_source import context_length, model_folder
from rlpost.noise_scale import NoiseScale
from rlpost.objective import Objective
from rlpost.packing import Packer, make_packer
from rlpost.parking import Parking, park_of
from rlpost.peak import gauge_of
from rlpost.pipeline import Pipeline
from rlpost.plugins import bind
from rlpost.policy import load_policy, uses_flash_attention
from rlpost.random_state import seed_all
from rlpost.recipe import GeneratorRecipe, Recipe
from rlpost.render import Renderer, check_lengths, generation_eos_ids, load_tokenizer
from rlpost.reward_recipe import bind_rewards
from rlpost.rollout_recipe import bind_rollout
from rlpost.samples import Samples
from rlpost.score import Rewards
from rlpost.servers.start import Started, start_servers
from rlpost.sft import base_model
from rlpost.shards import Write
from rlpost.task_filters import of_length
from rlpost.tasks import load_task_sets
from rlpost.trackers import Trackers
from rlpost.types import Sampling, Task
from rlpost.votes import voter
from rlpost.widths import lr_scale, updates_a_step
from rlpost.world import World


@dataclass
class Run:
    """The parts of a run, in the order of the data flow."""

    recipe: Recipe
    world: World
    folder: Path
    """Where the run's files go."""
    model: Path
    """The weights and the tokenizer that the run started from."""
    clock: Clock
    curriculum: Any
    renderer: Renderer
    generator: Generator
    sampling: Sampling
    rewards: Rewards
    explorers: Explorers
    packer: Packer
    engine: Engine
    reference: Reference | None
    critic: Critic | None
    objective: Objective
    evaluator: Evaluator | None
    accounts: Accounts
    trackers: Trackers
    samples: Samples
    chosen: Chosen
    checkpoints: Checkpoints
    lookout: Lookout = field(default_factory=Lookout)
    frontier: Frontier = field(default_factory=Frontier)
    law: EntropyLaw = field(default_factory=EntropyLaw)
    start_step: int = 0
    next_group: int = 0
    """The id of the next group to be generated."""
    task_keys: frozenset[str] | None = None
    """Of the training tasks: what a curriculum may choose from, beside what was added to it."""
    evals: dict[str, Any] = field(default_factory=dict)
    """Held-out figures `before` and `after`."""
    health: Health = field(init=False)
    metrics: Metrics = field(init=False)
    noise: NoiseScale = field(init=False)
    pipeline: Pipeline = field(init=False)
    evaluation_due: bool = False
    """Whether the evaluation after the newest whole step is still to be done: the run was asked to leave in it."""

    def __post_init__(self) -> None:
        """What follows from the recipe and the parts."""
        recipe, world = self.recipe, self.world
        self.health, self.metrics = Health(recipe.failure), Metrics(world)
        self.noise = NoiseScale(world, every=recipe.logging.noise_every, group_size=recipe.sampling.group_size)
        self.pipeline = make_pipeline(recipe.generator, in_threads=self.generator.concurrent)

    def close(self) -> None:
        """End what lives beside the loop, the generator last."""
        with ExitStack() as ends:
            for part in (self.generator, self.trackers, self.checkpoints, self.rewards, self.pipeline):
                ends.callback(part.close)

    @property
    def engines(self) -> Engines:
        """Every engine whose weights a checkpoint holds."""
        every: list[Saves | None] = [self.engine, self.critic, self.reference]
        return Engines([part for part in every if part is not None])


@dataclass(frozen=True)
class Engines:
    """Several engines that are saved and loaded together."""

    parts: Sequence[Saves]

    def snapshot(self) -> Write:
        """Copy this rank's shards; the result writes them."""
        writes = [part.snapshot() for part in self.parts]

        def write(folder: Path) -> None:
            for one in writes:
                one(folder)

        return write

    def load(self, folder: Path) -> None:
        """Read what was written."""
        for part in self.parts:
            part.load(folder)


def clock_of(world: World) -> Clock:
    """A clock for this rank's device."""
    return Clock(torch.cuda.synchronize if world.device.type == "cuda" else None, gauge=gauge_of(world.device))


def build(recipe: Recipe, world: World, clock: Clock) -> Run:
    """Make every part, and go on from a checkpoint where the recipe asks for it."""
    with clock("setup"):
        run = assemble(recipe, world, clock)
        resume(run)
    clock.lap()
    return run


def assemble(recipe: Recipe, world: World, clock: Clock) -> Run:
    """The parts, new; text is checked before anything is trained, and the generator takes its memory last."""
    train_tasks, eval_tasks = load_task_sets(recipe)
    rewards = bind_rewards(recipe.rewards, recipe.failure, of_groups=recipe.group_rewards)
    renderer = make_renderer(recipe, start := model_folder(recipe, world))
    curriculum = make_curriculum(recipe, train_tasks := of_length(train_tasks, recipe.tasks.sources, renderer))
    sampling = training_sampling(recipe, train_tasks, renderer)
    evaluator = make_evaluator(recipe, eval_tasks, renderer, rewards, world)
    folder = open_run(recipe, world)
    with clock("sft"):
        model = base_model(recipe, world) if recipe.sft else start
    servers = start_servers(recipe, model, folder, world)  # which takes as long as what follows
    engine, reference, critic = make_engines(recipe, model, world)
    generator = make_generator(recipe, model, renderer, train_tasks[0], engine, servers=servers)
    accounts = make_accounts(recipe, engine, critic, by_document=uses_flash_attention(recipe.model))
    return Run(
        recipe=recipe,
        world=world,
        folder=folder,
        model=model,
        clock=clock,
        curriculum=curriculum,
        renderer=renderer,
        generator=Counted(generator, accounts, clock),
        sampling=sampling,
        rewards=rewards,
        explorers=make_explorers(recipe, renderer, sampling),
        packer=make_packer(recipe, world, model),
        engine=engine,
        reference=reference,
        critic=critic,
        objective=Objective(recipe.algorithm, world),
        evaluator=evaluator,
        accounts=accounts,
        trackers=Trackers(folder, recipe, world),
        samples=Samples(folder, recipe.logging.samples_per_step),
        chosen=make_chosen(recipe, folder, train_tasks, world),
        checkpoints=make_checkpoints(recipe, folder, world),
        task_keys=frozenset(task.key for task in train_tasks),
    )


def resume(run: Run) -> None:
    """Go on from a checkpoint where the recipe asks for it and there is one, else with random numbers of the seed."""
    seed_all(run.recipe.seed + run.world.rank)  # whatever was drawn while the parts were made
    if run.recipe.resume == "never":
        return
    try:
        _restore(run)
    except RunError:
        run.generator.close()
        raise


def _restore(run: Run) -> None:
    path = run.checkpoints.newest() if run.recipe.resume == "auto" else Path(run.recipe.resume)
    sizes: dict[str, int] = {}
    if path is not None:
        state = run.checkpoints.load(path, run.engines)
        run.objective.load_state_dict(state["objective"])
        run.next_group = int(state["next_group"])
        run.curriculum.load_state_dict(state["curriculum"])
        run.explorers.load_state_dict(state["explorers"])
        run.frontier.load_state_dict(state["frontier"])
        run.pipeline.load_state_dict(state.get("pipeline", {}), run.world)
        run.clock.load_state_dict(state["clock"])
        run.accounts.load_state_dict(state["accounts"])
        run.noise.load_state_dict(state["noise"])
        run.law.load_state_dict(state["law"])
        run.evals.update(state["evals"])
        run.evaluation_due = bool(state.get("evaluation_due"))
        run.start_step = int(state["step"])
        if run.folder.resolve() in path.resolve().parents:  # else the files are of another run
            sizes = state["sizes"]
    run.trackers.rewind(run.start_step, sizes.get("metrics"))
    if run.world.is_main:
        run.samples.rewind(run.start_step, sizes.get("samples"))
        run.chosen.rewind(run.start_step)
        run.lookout = Lookout(lines_of(run.folder / "metrics.jsonl"))


def make_checkpoints(recipe: Recipe, folder: Path, world: World) -> Checkpoints:
    """The run's checkpoints."""
    background = world.apart() if recipe.save_in_background else None
    keep, keep_every = recipe.keep_checkpoints, recipe.keep_every
    return Checkpoints(folder, world, keep=keep, keep_every=keep_every, background=background)


def make_pipeline(recipe: GeneratorRecipe, *, in_threads: bool) -> Pipeline:
    """Where rollouts are on their way."""
    how = {"first_come": recipe.first_come, "partial": recipe.partial_tokens is not None, "in_threads": in_threads}
    return Pipeline(ahead=recipe.max_staleness, **how)


def make_renderer(recipe: Recipe, model: Path) -> Renderer:
    """The renderer of a model folder."""
    context = context_length(recipe.model, model)
    tokenizer = load_tokenizer(model, trust_remote_code=recipe.model.trust_remote_code)
    return Renderer(tokenizer, recipe.tasks.prompting, context, eos_ids=generation_eos_ids(model))


def make_curriculum(recipe: Recipe, tasks: list[Task]) -> Any:
    """The curriculum that the recipe names, over the training tasks."""
    curriculum = bind(recipe.curriculum, "curricula", where="curriculum", skip=1, supplied=("seed",))
    return mixed(recipe.tasks, tasks, lambda some: curriculum(some, seed=recipe.seed))


def make_chosen(recipe: Recipe, folder: Path, tasks: list[Task], world: World) -> Chosen:
    """What is written of the tasks that each step chooses."""
    mine = tasks if world.is_main else []
    columns = ("difficulty", recipe.evaluation.by)
    return Chosen(folder, mine, difficulty=difficulty_of_tasks(mine, recipe.curriculum, columns), writes=world.is_main)


def training_sampling(recipe: Recipe, tasks: list[Task], renderer: Renderer) -> Sampling:
    """How rollouts are drawn in training; every training prompt must leave room for them."""
    asked = recipe.sampling
    check_room(recipe, tasks, renderer, asked.max_new_tokens, "tasks.train")
    how = asked.temperature, asked.top_p, asked.top_k
    repeats = None if asked.repeats is None else (asked.repeats, asked.repeat_tokens)
    return Sampling(asked.max_new_tokens, *how, renderer.stop_ids, repeats, rollout=bind_rollout(recipe))


def check_room(recipe: Recipe, tasks: list[Task], renderer: Renderer, max_new_tokens: int, where: str) -> None:
    """Every prompt must leave room for an answer, and for what may follow where answers are interrupted."""
    interruption = recipe.algorithm.interruption
    if interruption.text is not None:
        max_new_tokens += len(renderer.text_ids(interruption.text)) + interruption.answer_tokens
        where = f"{where} with algorithm.interruption"
    check_lengths(tasks, renderer, max_new_tokens, where)


def make_explorers(recipe: Recipe, renderer: Renderer, sampling: Sampling) -> Explorers:
    """What the recipe's `explore` lists."""
    given = {
        "seed": recipe.seed,
        "renderer": renderer,
        "sampling": sampling,
        "group_size": recipe.sampling.group_size,
    }
    return Explorers(recipe.explore, given, context=renderer.context)


def make_evaluator(
    recipe: Recipe, tasks: list[Task], renderer: Renderer, rewards: Rewards, world: World
) -> Evaluator | None:
    """The held-out evaluation, where there are held-out tasks."""
    if not tasks:
        return None
    asked = recipe.evaluation
    max_new_tokens = asked.max_new_tokens or recipe.sampling.max_new_tokens
    check_room(recipe, tasks, renderer, max_new_tokens, "tasks.eval")
    how = asked.temperature, asked.top_p
    sampling = Sampling(max_new_tokens, *how, stop_ids=renderer.stop_ids, rollout=bind_rollout(recipe))
    vote = voter(asked.vote, recipe.rewards[0]["use"]) if recipe.rewards else None
    interruption = recipe.algorithm.interruption
    return Evaluator(tasks, asked, renderer, rewards, sampling, recipe.seed, world, interruption, vote)


def make_engines(recipe: Recipe, model: Path, world: World) -> tuple[Engine, Reference | None, Critic | None]:
    """The engine that trains, and the frozen reference and the critic where the objective asks for them."""
    algorithm, engine = recipe.algorithm, recipe.engine
    shared: dict[str, Any] = {"dtype": recipe.model.dtype, "world": world}
    with_critic = algorithm.advantage["use"] == "gae"
    alone = (algorithm.critic.pretrain_steps or 0) if with_critic else 0
    a_step = updates_a_step(recipe) * algorithm.epochs
    engine = replace(engine, lr=engine.lr * lr_scale(recipe))
    by_temperature = shared | {"temperature": recipe.sampling.temperature}
    has_bonus = algorithm.entropy.coef > 0 or algorithm.entropy.target is not None
    policy = load_policy(model, recipe.model, entropy_grad=has_bonus, seed=recipe.seed)
    trained = Engine(policy, engine, total_updates=(recipe.steps - alone) * a_step, **by_temperature)
    reference: Reference | None = None
    if algorithm.kl.coef and recipe.model.lora is not None:
        reference = WithoutAdapters(trained)
    elif algorithm.kl.coef:
        reference = Frozen(load_policy(model, recipe.model), engine, **by_temperature)
    critic: Critic | None = None
    if with_critic:
        own = replace(engine, lr=(algorithm.critic.lr or recipe.engine.lr) * lr_scale(recipe))
        critic = Critic(load_value_model(model, recipe.model), own, total_updates=recipe.steps * a_step, **shared)
    others = [part.shelf for part in (reference, critic) if isinstance(part, Frozen | Critic)]
    trained.parking = Parking(park_of(recipe, on_gpu=world.device.type == "cuda"), trained.shelf, others)
    return trained, reference, critic


def make_accounts(recipe: Recipe, engine: Engine, critic: Critic | None, *, by_document: bool) -> Accounts:
    """The ledger, with what passes of policy and critic cost."""
    model, world = recipe.model, engine.world
    return Accounts(
        model_costs(engine.deepspeed.module.model, model, with_head=True),
        model_costs(critic.deepspeed.module.model, model, with_head=False) if critic is not None else None,
        ranks=world.size,
        by_document=by_document,
        sharing=recipe.engine.sequence_parallel,
        peak=peak_here(model.dtype) if world.device.type == "cuda" else None,
        meter=meter(world.device, local_rank=world.local_rank),
    )


def make_generator(
    recipe: Recipe,
    model: Path,
    renderer: Renderer,
    first_task: Task,
    engine: Engine,
    *,
    servers: Started | None = None,
) -> Generator:
    """The generator that the recipe names, with a canary cut from the first training prompt."""
    tolerance, world = recipe.generator.canary_tolerance, engine.world
    assert tolerance is not None
    prompt_ids = renderer.prompt_ids(first_task)
    canary = Canary.of(canary_tokens(prompt_ids, len(renderer.tokenizer)), tolerance=tolerance, device=world.device)
    if recipe.generator.kind == "hf":
        from rlpost.generate.hf import HfGenerator

        return HfGenerator(recipe, renderer, canary, world)
    if servers is not None:
        from rlpost.generate.remote_vllm import RemoteVllm

        return RemoteVllm(recipe, renderer, canary, world, servers)
    from rlpost.generate.local_vllm import LocalVllm

    with engine.parking.making_room():
        engine.parking.policy_was_sent()  # nothing of it is needed yet
        return LocalVllm(recipe, model, renderer, canary, world)
