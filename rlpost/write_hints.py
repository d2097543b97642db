"""`rlpost hints`: a model writes hints for the training tasks, once; `guide` reads them with `source: file`.

The model is the recipe's own, through its generator, or one behind an OpenAI-compatible endpoint, such as `vllm serve`.
Each task is a line of JSON, written as soon as it is there: a command that was interrupted goes on with the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.explore._hints import fill, leaks, read_hints
from rlpost.types import Sampling, Task

ASK = (
    "Here is a problem and its solution.\n\nProblem: {prompt}\n\nSolution: {solution}\n\nWrite a hint for a student "
    "who has not seen the solution. {hint} Do not state the final answer. Reply with the hint alone."
)
LEVELS = (
    "In one sentence, name the idea that the solution rests on, without any of its steps.",
    "In two sentences, say how to begin: the idea and the first step.",
    "In a few sentences, outline all steps but the last one.",
)
"""What is asked for at each level, from the weakest on."""
TEMPERATURE, TOKENS = 0.7, 256
Ask = Callable[[Sequence[Task]], list[str]]
"""Tasks whose prompts ask for a hint -> the hints, in order."""


def write_hints(tasks: Sequence[Task], ask: Ask, to: Path, *, levels: int, chunk: int, template: str = ASK) -> int:
    """Append the hints of every task that `to` does not hold yet, and return how many tasks that were."""
    done = _cut_torn_line(to)
    left = [task for task in tasks if task.key not in done]
    for start in range(0, len(left), chunk):
        some = left[start : start + chunk]
        asked = [_asking(task, template, text) for task in some for text in LEVELS[:levels]]
        texts = iter(ask(asked))
        with to.open("a", encoding="utf-8") as file:
            for task in some:
                hints = [next(texts).strip() for _ in range(levels)]
                row = {"key": task.key, "hints": hints, "leaks": [leaks(hint, task.answer) for hint in hints]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"hints: {len(done) + start + len(some)} of {len(tasks)} tasks", file=sys.stderr, flush=True)
    return len(left)


def _asking(task: Task, template: str, what: str) -> Task:
    prompt = task.prompt if isinstance(task.prompt, str) else task.prompt[-1]["content"]
    return replace(task, prompt=fill(template, task, prompt, what))


def _cut_torn_line(file: Path) -> set[str]:
    """The keys that a file holds, after a last line that was cut off is gone; the file is made where there is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_bytes() if file.exists() else b""
        file.write_bytes(text[: text.rfind(b"\n") + 1])
    except OSError as error:
        raise RunError(f"--out {file} must be a file that can be written ({error.strerror}): choose another") from error
    return set(read_hints(file))


def ask_endpoint(
    url: str, model: str, *, at_once: int = 16, temperature: float = TEMPERATURE, tokens: int = TOKENS
) -> Ask:
    """Replies of a chat model behind an OpenAI-compatible endpoint; its key, if it wants one, is in OPENAI_API_KEY."""
    from rlpost.generate import writers

    sampling = Sampling(max_new_tokens=tokens, temperature=temperature)

    def ask(tasks: Sequence[Task]) -> list[str]:
        asks = [writers.Ask(str(place), task) for place, task in enumerate(tasks)]
        with closing(writers.Endpoint(url, model, at_once=at_once, timeout_s=300.0)) as endpoint:
            found = {one.id: written[0].text for one, written in endpoint.stream(asks, sampling)}
        return [found[one.id] for one in asks]

    return ask


def hints_of_recipe(recipe: Any, world: Any, to: Path, *, levels: int, chunk: int) -> int:
    """`write_hints` by the recipe's own model and generator, in this process."""
    from rlpost.collect import collect
    from rlpost.model_source import model_folder
    from rlpost.recipe import Prompting
    from rlpost.run import make_engines, make_generator, make_renderer
    from rlpost.sft import base_model
    from rlpost.tasks import load_task_sets

    if world.size > 1:
        raise RunError(f"rlpost hints must run on one rank (got {world.size}): start it without torchrun")
    tasks, _ = load_task_sets(recipe)
    model = base_model(recipe, world) if recipe.sft else model_folder(recipe, world)
    recipe = replace(recipe, tasks=replace(recipe.tasks, prompting=Prompting(chat=recipe.tasks.prompting.chat)))
    renderer = make_renderer(recipe, model)
    sampling = Sampling(min(TOKENS, renderer.context // 2), TEMPERATURE, stop_ids=renderer.stop_ids)
    engine, *_ = make_engines(recipe, model, world)

    with closing(make_generator(recipe, model, renderer, tasks[0], engine)) as generator:

        def ask(asked: Sequence[Task]) -> list[str]:
            shared = {"group_size": 1, "first_group": 0, "seed": recipe.seed}
            with generator.awake(engine, engine.updates):
                groups = collect(generator, renderer, list(enumerate(asked)), sampling, **shared)
            return [group.rollouts[0].text for group in groups]

        return write_hints(tasks, ask, to, levels=levels, chunk=chunk)
