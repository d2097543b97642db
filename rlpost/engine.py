"""DeepSpeed behind a few verbs: `token_logp`, `backward`, `step`, `save`, `load`. The only file that knows it.

One owner of loss scaling: `losses.weighted_sum` has brought the weights of the whole optimizer step to a loss before
`backward`, so DeepSpeed's own division by accumulation steps is off (`managed_gradient_accumulation: false`: the caller
says where an optimizer step ends) and its mean over ranks is undone by `dp_size`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rlpost.adapter import adapters_off
from rlpost.errors import RunError
from rlpost.parking import Parking, Shelf
from rlpost.policy import Policy, seen
from rlpost.recipe import EngineRecipe
from rlpost.sequence_parallel import columns_of
from rlpost.shards import Shards, Write, save_tensors, whole_weights
from rlpost.types import Micro
from rlpost.weights import PREFIX, WeightStream
from rlpost.world import World

COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""What DeepSpeed counts."""
REFERENCE_FILE = "reference.safetensors"
LARGEST_BUCKET = 500_000_000
"""Gradients that are reduced at once; DeepSpeed's default."""


class Trained:
    """A module in training: sharded weights, optimizer, learning-rate schedule. Frozen weights stay out of them."""

    tag: ClassVar[str]
    """Its folder in a checkpoint."""
    lr_key: ClassVar[str]
    """The recipe's key of its learning rate, for messages."""

    def __init__(
        self, module: nn.Module, recipe: EngineRecipe, *, dtype: str, total_updates: int, world: World
    ) -> None:
        self.recipe, self.world, self.dtype = recipe, world, dtype
        self.columns = columns_of(recipe.sequence_parallel, world)
        self.updates = 0
        """Optimizer steps taken: the policy's version."""
        self.lr = 0.0
        """Learning rate of the last optimizer step."""
        self.skipped = 0
        """Of these optimizer steps, those without effect because the gradient was not finite; since the start."""
        self.skipped_in_a_row = 0
        self._norm: float | None = None
        module.to(world.device)
        trained = [param for param in module.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=recipe.lr,
            betas=(recipe.betas[0], recipe.betas[1]),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        clips_itself = recipe.zero_stage == 0 and dtype == "float32"
        if clips_itself:
            # DeepSpeed's plain path clips without telling the norm; every other path tells it.
            optimizer.register_step_pre_hook(self._clip)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(recipe, step, total_updates))
        self.deepspeed, *_ = _deepspeed().initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(recipe, dtype, clip=not clips_itself, numel=numel_of(trained)),
            dist_init_required=False,
        )
        self.shelf = Shelf(module, world.device, self.deepspeed.optimizer, self.deepspeed.basic_optimizer)
        self.shards = Shards(self.deepspeed, world.rank, world.size)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient to that of the optimizer step in progress."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Take one optimizer step with the gradients since the last, and return their norm before clipping.

        A gradient that is not finite changes nothing: no weight, no moment, on any rank.
        """
        self.lr = float(self.deepspeed.get_lr()[0])
        self.deepspeed.step()
        self.updates += 1
        norm = self._norm if self._norm is not None else self.deepspeed.get_global_grad_norm()
        norm = float(norm) if norm is not None else math.nan
        finite = math.isfinite(norm)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return norm

    def clear_optimizer(self) -> None:
        """Forget the optimizer's moments and step counts; weights and learning-rate schedule stay as they are."""
        self.shards.clear_optimizer()

    def snapshot(self) -> Write:
        """Copy trained weights, optimizer and schedule; every rank calls it, and the result writes its own shard."""
        self.shelf.back()
        counts = {name: getattr(self.deepspeed, name) for name in COUNTS}
        schedule = self.deepspeed.lr_scheduler.last_epoch
        return self.shards.snapshot(self.tag, {"updates": self.updates, "schedule": schedule, "counts": counts})

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer and schedule; every rank calls it and writes its own shard."""
        self.snapshot()(folder)
        self.world.barrier()

    def load(self, folder: Path) -> None:
        """Read what was saved, with any number of ranks and any ZeRO stage."""
        self.shelf.back()
        about = self.shards.load(folder / self.tag)
        self.updates = int(about["updates"])
        for name, count in about["counts"].items():
            setattr(self.deepspeed, name, count)
        schedule, groups = self.deepspeed.lr_scheduler, self.deepspeed.basic_optimizer.param_groups
        schedule.last_epoch = int(about["schedule"])
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, lr in zip(groups, schedule._last_lr, strict=True):
            group["lr"] = lr

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._norm = float(torch.nn.utils.clip_grad_norm_(params, self.recipe.grad_clip or math.inf))
        if not math.isfinite(self._norm):  # as DeepSpeed's other paths do by themselves
            for param in params:
                param.grad = None


class Engine(Trained):
    """The policy in training."""

    tag = "engine"
    lr_key = "engine.lr"

    def __init__(
        self, policy: Policy, recipe: EngineRecipe, *, dtype: str, temperature: float, total_updates: int, world: World
    ) -> None:
        super().__init__(policy, recipe, dtype=dtype, total_updates=total_updates, world=world)
        self.temperature = temperature
        self.parking = Parking()

    def token_logp(self, micro: Micro, *, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy `[B, T]` of the micro-batch's targets; None: at the sampling temperature."""
        temperature = temperature or self.temperature
        inputs = micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT
        return self.deepspeed(*inputs, temperature=temperature, seen_BTT=seen(micro), columns=self.columns)


class Reference(Protocol):
    """What the policy in training is compared with."""

    def token_logp(self, micro: Micro) -> Tensor:
        """Log-probs `[B, T]` of the micro-batch's targets."""

    def follow(self, engine: Engine) -> None:
        """Become a copy of the policy in training as it is now; every rank calls it."""

    def snapshot(self) -> Write:
        """Copy what it has become; the result writes it."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


class WithoutAdapters:
    """The reference of a policy with adapters: that policy while they are off. It takes no memory and has no state."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @torch.no_grad()
    def token_logp(self, micro: Micro) -> Tensor:
        """Log-probs `[B, T]` of the micro-batch's targets."""
        with adapters_off(self.engine.deepspeed.module):
            logp_BT, _ = self.engine.token_logp(micro)
        return logp_BT

    def follow(self, engine: Engine) -> None:
        """Refused, as in `check`: the weights below the adapters do not move."""
        raise RunError("algorithm.kl.reset must be off with model.lora: set its triggers to 0, or model.lora=null")

    def snapshot(self) -> Write:
        """Nothing: it is the model that the run began with."""
        return lambda folder: None

    def load(self, folder: Path) -> None:
        """Nothing."""


class Frozen:
    """A policy that is only asked for log-probs: the reference. Sharded where the trained one is (ZeRO-3)."""

    def __init__(self, policy: Policy, recipe: EngineRecipe, *, dtype: str, temperature: float, world: World) -> None:
        self.recipe, self.temperature, self.world = recipe, temperature, world
        self.columns = columns_of(recipe.sequence_parallel, world)
        self.followed = False
        """Whether it has become a copy of the policy in training since the run began."""
        policy.requires_grad_(False).to(world.device)
        self.policy, self.shelf = policy, Shelf(policy, world.device)
        self._forward: Any = policy
        if recipe.zero_stage == 3 and world.size > 1:
            config = deepspeed_config(recipe, dtype, clip=False, numel=numel_of(policy.parameters()))
            self._forward, *_ = _deepspeed().initialize(model=policy, config=config, dist_init_required=False)

    @torch.no_grad()
    def token_logp(self, micro: Micro) -> Tensor:
        """Log-probs `[B, T]` of the micro-batch's targets."""
        inputs = micro.tokens_BT, micro.position_BT, micro.target_BT, micro.mask_BT
        how: dict[str, Any] = {"temperature": self.temperature, "seen_BTT": seen(micro), "columns": self.columns}
        logp_BT, _ = self._forward(*inputs, **how)
        return logp_BT

    def follow(self, engine: Engine) -> None:
        """Become a copy of the policy in training as it is now; every rank calls it."""
        self._become(WeightStream(engine.deepspeed.module, bucket_bytes=engine.recipe.sync_bucket_mib << 20))

    def snapshot(self) -> Write:
        """Copy the weights, where they are no longer those that the run began with; every rank calls it."""
        whole: dict[str, Tensor] = {}
        if self.followed:
            self.shelf.back()
            for name, tensor in WeightStream(self.policy, bucket_bytes=self.recipe.sync_bucket_mib << 20):
                if self.world.is_main:
                    whole[name] = tensor.to("cpu", copy=True).contiguous()

        def write(folder: Path) -> None:
            if whole:
                save_tensors(whole, folder / REFERENCE_FILE)

        return write

    def save(self, folder: Path) -> None:
        """Write the weights, where they are no longer those that the run began with; every rank calls it."""
        self.snapshot()(folder)
        self.world.barrier()

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with any number of ranks; without it the reference is that of the run's start."""
        file = folder / REFERENCE_FILE
        if not file.is_file():
            return
        from safetensors import safe_open

        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            self._become((name, weights.get_tensor(name)) for name in names)

    @torch.no_grad()
    def _become(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.shelf.back()
        params = dict(self.policy.named_parameters())
        for name, tensor in weights:
            param = params[PREFIX + name]
            if not hasattr(param, "ds_id"):
                param.copy_(tensor)
                continue
            with _deepspeed().zero.GatheredParameters([param], modifier_rank=0):
                if self.world.is_main:
                    param.copy_(tensor)
        self.followed = True


def lr_factor(recipe: EngineRecipe, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at a 0-based optimizer step: warm-up, plateau, decay.

    >>> from rlpost.recipe import EngineRecipe
    >>> [lr_factor(EngineRecipe(schedule="linear", warmup_steps=2), step, 4) for step in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return 1.0
    start = max(recipe.warmup_steps, round(total_steps * (1 - recipe.decay_frac)))
    done = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    return 1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def numel_of(params: Iterable[nn.Parameter]) -> int:
    """Numbers in some parameters."""
    return sum(param.numel() for param in params)


def deepspeed_config(recipe: EngineRecipe, dtype: str, *, clip: bool, numel: int = LARGEST_BUCKET) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe, for `numel` parameters; `engine.deepspeed` is merged over it."""
    # DeepSpeed sets the whole bucket aside, whether there are as many gradients or not.
    zero: dict[str, Any] = {"stage": recipe.zero_stage, "reduce_bucket_size": min(LARGEST_BUCKET, numel)}
    if recipe.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if recipe.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": recipe.grad_clip if clip else 0.0,
        "steps_per_print": 2**31,
    }
    return _merged(config, recipe.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return base | over | both


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # None of its compiled operators is used here, and on a CPU it would compile one at the first start.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The whole trained weights of the policy in a checkpoint, float32, whatever ZeRO stage and ranks wrote it."""
    return whole_weights(checkpoint / Engine.tag)
