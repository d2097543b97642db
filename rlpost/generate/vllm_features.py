"""What the installed vLLM can do, asked of the parts that rlpost calls, not of its version number."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, get_args

from rlpost.errors import RunError

NAMES = {
    "reload_from_iterator": "reload_weights(weights_iterator=...) of its model runner",
    "sleep_levels": "LLM.sleep(level=...) and wake_up(tags=...)",
    "weight_transfer": "WeightSource and WeightTransferTrainerFactory in vllm.distributed.weight_transfer",
    "rl_routes": "the routes in vllm.entrypoints.rl.online (/update_weights, /pause)",
    "processed_logprobs": "logprobs_mode=processed_logprobs",
    "kv_cache_memory_bytes": "the argument kv_cache_memory_bytes",
}
"""Each feature as its absence is reported."""


@dataclass(frozen=True, slots=True)
class VllmFeatures:
    """What one vLLM can do; a field is true where it can.

    >>> VllmFeatures("0.1", True, (1, 2), True, ("nccl",), True, True, True).missing("sleep_levels", "rl_routes")
    []
    """

    version: str
    reload_from_iterator: bool
    """Weights can be streamed into a running engine of this process."""
    sleep_levels: tuple[int, ...]
    """1 keeps the weights in main memory, 2 drops them."""
    weight_transfer: bool
    """A trainer can hand a `WeightSource` to vLLM's own transfer engines."""
    transfer_engines: tuple[str, ...]
    """Those that are registered on the trainer's side: nccl, ipc and so on."""
    rl_routes: bool
    """A server can be paused and given weights over HTTP."""
    processed_logprobs: bool
    """Log-probs can be those of the distribution that is sampled from."""
    kv_cache_memory_bytes: bool
    """The cache's size can be given outright."""

    def missing(self, *names: str) -> list[str]:
        """Those of some features that it does not have."""
        known = {field.name for field in fields(self)}
        assert known.issuperset(names), sorted(set(names) - known)
        return [name for name in names if not getattr(self, name)]

    def need(self, *names: str, use: str) -> None:
        """Stop the run with one message where any of these features is not there, for the recipe's `use`."""
        missing = self.missing(*names)
        if missing:
            raise RunError(
                f"{use} needs a vLLM that has {' and '.join(NAMES[name] for name in missing)} (the installed "
                f"{self.version} has not): install the version that launch/setup.sh does, or use generator.kind=hf"
            )


def probe() -> VllmFeatures:
    """Ask the installed vLLM; it is imported, and no engine is started."""
    import vllm
    from vllm.config import CacheConfig, ModelConfig

    transfer = _module("vllm.distributed.weight_transfer")
    sleep, wake_up = getattr(vllm.LLM, "sleep", None), getattr(vllm.LLM, "wake_up", None)
    return VllmFeatures(
        version=str(vllm.__version__),
        reload_from_iterator=_reloads_from_iterator(),
        sleep_levels=(1, 2) if _takes(sleep, "level") and _takes(wake_up, "tags") else (),
        weight_transfer=hasattr(transfer, "WeightSource") and hasattr(transfer, "WeightTransferTrainerFactory"),
        transfer_engines=_transfer_engines(transfer),
        rl_routes=_module("vllm.entrypoints.rl.online.api_router") is not None,
        processed_logprobs="processed_logprobs" in _choices(ModelConfig, "logprobs_mode"),
        kv_cache_memory_bytes=any(field.name == "kv_cache_memory_bytes" for field in fields(CacheConfig)),
    )


PLAIN = {"NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}
"""What may stand for `quant_method` of a layer whose weights are used as they come."""


def loads_in_place(worker: Any) -> bool:
    """Whether weights can be written straight over those of a running engine, a fraction of the cost of a reload.

    They can where vLLM has brought none into a layout of its own (packed for a CPU's matrix product, quantized, experts
    fused) and derives nothing from them: each is as it was recorded to be before vLLM's processing after loading.
    """
    layerwise = _module("vllm.model_executor.model_loader.reload.layerwise")
    config, model = worker.vllm_config, worker.model_runner.get_model()
    if not hasattr(layerwise, "get_layerwise_info") or config.lora_config or config.model_config.is_multimodal_model:
        return False
    return all(_as_recorded(layer, layerwise.get_layerwise_info(layer)) for layer in model.modules())


def _as_recorded(layer: Any, info: Any) -> bool:
    derives = hasattr(layer, "process_weights_after_loading") and type(layer).__name__ != "Attention"
    if derives or type(getattr(layer, "quant_method", None)).__name__ not in PLAIN:
        return False
    own = {name: param for name, param in layer.named_parameters(recurse=False) if name != "bias"}  # not recorded
    recorded = {name: meta for name, meta in info.restore_metadata[0].items() if name != "bias"}
    return own.keys() == recorded.keys() and all(_layout(own[name]) == _layout(recorded[name]) for name in own)


def _layout(tensor: Any) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def _reloads_from_iterator() -> bool:
    """Whether each kind of model runner that this vLLM may choose does."""
    modules = [_module(name) for name in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")]
    runners = [module.GPUModelRunner for module in modules if module is not None]
    return bool(runners) and all(_takes(getattr(one, "reload_weights", None), "weights_iterator") for one in runners)


def _transfer_engines(transfer: Any) -> tuple[str, ...]:
    factory = getattr(transfer, "WeightTransferTrainerFactory", None)
    return tuple(sorted(getattr(factory, "_registry", ())))


def _module(name: str) -> Any:
    """A module of vLLM; None where this version has none of that name."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # something that the module itself needs
        return None


def _takes(function: Any, parameter: str) -> bool:
    return function is not None and parameter in inspect.signature(function).parameters


def _choices(config: Any, name: str) -> tuple[Any, ...]:
    """The values that a field of one of vLLM's configurations allows."""
    return next((get_args(field.type) for field in fields(config) if field.name == name), ())
