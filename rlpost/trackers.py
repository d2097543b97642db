"""Where figures go: `metrics.jsonl` always, TensorBoard and W&B when the recipe asks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.errors import RunError

if TYPE_CHECKING:
    from rlpost.recipe import Recipe
    from rlpost.world import World


def rewind_jsonl(path: Path, step: int, size: int | None = None) -> None:
    """Drop the lines of `step` and later, what stands behind `size` bytes, and a last line that is half written."""
    if not path.exists():
        return
    shorter = path.with_name(path.name + ".tmp")
    end = math.inf if size is None else size
    with path.open("rb") as lines, shorter.open("wb") as kept:
        at = 0
        for line in lines:
            at += len(line)
            if at <= end and line.endswith(b"\n") and json.loads(line)["step"] < step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    shorter.replace(path)


def settle(path: Path) -> int:
    """Bytes of a file that is only added to, all of them on the disk; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


class Trackers:
    """Writes a step's figures from the main rank; on other ranks every call does nothing."""

    def __init__(self, run_dir: Path, recipe: Recipe, world: World) -> None:
        _check_installed(recipe)
        self._recipe = recipe
        self._run_dir = run_dir
        self._writes = world.is_main
        self._purge_step: int | None = None
        self._opened = False
        self.newest: dict[str, float] = {}
        """What was logged since the last `settle`, on every rank."""
        self._file: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None

    def rewind(self, step: int, size: int | None = None) -> None:
        """Forget figures of `step` and later, before anything is logged: the run continues there.

        `size`: what `settle` said when the state was saved.
        """
        if self._opened:
            raise RuntimeError("rewind() must come before the first log()")
        if self._writes:
            rewind_jsonl(self._run_dir / "metrics.jsonl", step, size)
            self._purge_step = step

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one line of figures; what is not finite becomes null, because JSON has no word for it."""
        self.newest |= figures
        if not self._writes:
            return
        if not self._opened:
            self._open()
        row = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, "unix_s": round(time.time(), 3), **row}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **figures})

    def settle(self) -> int:
        """Bring all figures to the disk, so that a state saved now has none before it missing; bytes of the lines."""
        self.newest = {}
        if self._tensorboard is not None:
            self._tensorboard.flush()
        return settle(self._run_dir / "metrics.jsonl") if self._writes else 0

    def close(self) -> None:
        """Flush and close whatever was opened."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None
        self._opened = False

    def _open(self) -> None:
        self._opened = True
        self._file = (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        if self._recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._run_dir / "tensorboard"
            self._tensorboard = SummaryWriter(str(folder), purge_step=self._purge_step)
        if self._recipe.logging.wandb is not None:
            self._wandb = _open_wandb(self._run_dir, self._recipe)


def _check_installed(recipe: Recipe) -> None:
    wanted = {
        "tensorboard": ("logging.tensorboard=true", recipe.logging.tensorboard, "logging.tensorboard=false"),
        "wandb": (f"logging.wandb={recipe.logging.wandb}", recipe.logging.wandb is not None, "logging.wandb=null"),
    }
    for package, (setting, asked, way_out) in wanted.items():
        if asked and find_spec(package) is None:
            raise RunError(
                f"{setting} needs the package {package}, which is not installed: pip install {package}, or {way_out}"
            )


def _open_wandb(run_dir: Path, recipe: Recipe) -> Any:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    id_file = run_dir / "wandb_id.txt"
    run_id = id_file.read_text(encoding="utf-8") if id_file.exists() else wandb.util.generate_id()
    id_file.write_text(run_id, encoding="utf-8")
    run = wandb.init(
        project=recipe.logging.wandb,
        name=recipe.name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        config=asdict(recipe),
    )
    # W&B's own counter cannot go back when a run resumes before its last line; a step of ours can.
    run.define_metric("*", step_metric="step")
    return run
