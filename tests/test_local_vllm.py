"""How weights get into a real vLLM engine: in place, by its reload, and through its own weight-transfer API."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_generate import make_canary, make_renderer
from tiny import tiny_policy, write_folder

from rlpost.engine import Engine
from rlpost.errors import RunError
from rlpost.generate.vllm_features import VllmFeatures, _layout, loads_in_place, probe
from rlpost.policy import load_policy
from rlpost.recipe import EngineRecipe, GeneratorRecipe, Model, Recipe
from rlpost.weights import WeightStream

ALL = VllmFeatures("9.9", True, (1, 2), True, ("nccl",), True, True, True)


def test_the_installed_vllm_has_what_rlpost_uses():
    found = probe()
    assert found.missing("reload_from_iterator", "sleep_levels", "weight_transfer", "rl_routes") == []
    assert found.missing("processed_logprobs", "kv_cache_memory_bytes") == []
    assert {"nccl", "ipc"} <= set(found.transfer_engines) and found.sleep_levels == (1, 2)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            {"reload_from_iterator": False},
            r"^generator.kind=local_vllm needs .* reload_weights\(weights_it",
        ),
        ({"sleep_levels": (), "rl_routes": False}, r"LLM\.sleep.* and the routes .*installed 9\.9 has not\)"),
    ],
)
def test_what_is_missing_is_named_in_one_message(missing, message):
    with pytest.raises(RunError, match=message):
        replace(ALL, **missing).need(*missing, use="generator.kind=local_vllm")
    ALL.need(*missing, use="generator.kind=local_vllm")


def test_probing_notices_that_a_part_is_not_there(monkeypatch):
    import vllm
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(GPUModelRunner, "reload_weights", lambda self: None)
    monkeypatch.setattr(vllm.LLM, "sleep", lambda self: None)
    assert probe().missing("reload_from_iterator", "sleep_levels", "weight_transfer") == [
        "reload_from_iterator",
        "sleep_levels",
    ]


# Whether weights may be written over those of a running engine.


class Attention(torch.nn.Module):
    def process_weights_after_loading(self, dtype): ...


class FoldsWeights(torch.nn.Module):
    def process_weights_after_loading(self, dtype): ...


class UnquantizedLinearMethod: ...


class Packs: ...


def in_place(monkeypatch, change=lambda layer: None, *, lora=None):
    """The verdict on a small model whose weights were recorded before `change`."""
    from vllm.model_executor.model_loader.reload import layerwise

    layer = torch.nn.Linear(3, 2)
    layer.quant_method = UnquantizedLinearMethod()
    model = torch.nn.Sequential(layer, Attention())
    infos = {}
    for one in model.modules():
        params = {name: param.detach().to("meta") for name, param in one.named_parameters(recurse=False)}
        infos[one] = SimpleNamespace(restore_metadata=(params, {}))
    change(layer)
    monkeypatch.setattr(layerwise, "get_layerwise_info", lambda one: infos.get(one, infos[model]))
    config = SimpleNamespace(lora_config=lora, model_config=SimpleNamespace(is_multimodal_model=False))
    return loads_in_place(SimpleNamespace(vllm_config=config, model_runner=SimpleNamespace(get_model=lambda: model)))


def emptied(layer):
    layer.weight = torch.nn.Parameter(torch.empty(0))


def transposed(layer):
    layer.weight.data = layer.weight.data.new_empty(3, 2).t()


def cast(layer):
    layer.weight.data = layer.weight.data.to(torch.bfloat16)


def one_more(layer):
    layer.scale = torch.nn.Parameter(torch.ones(1))


def packed(layer):
    layer.quant_method = Packs()


def folded(layer):
    layer.inner = FoldsWeights()


@pytest.mark.parametrize("change", [emptied, transposed, cast, one_more, packed, folded])
def test_weights_are_written_in_place_only_where_vllm_left_them_as_they_came(monkeypatch, change):
    assert in_place(monkeypatch)
    assert not in_place(monkeypatch, change)
    assert not in_place(monkeypatch, lora="any")


# A real engine, in a process of its own.


def use_engine(world, tie, dtype):
    from rlpost.generate.local_vllm import LocalVllm

    register_in_process_transfer()
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), tie=tie, hidden=64)
        asked = Recipe(
            model=Model(dtype=dtype, context=64),
            generator=GeneratorRecipe(
                kv_cache_gib=0.05, max_num_seqs=16, options={"weight_transfer_config": {"backend": "in_process"}}
            ),
        )
        recipe = EngineRecipe(zero_stage=3)
        policy = load_policy(folder, asked.model)
        engine = Engine(policy, recipe, dtype=dtype, temperature=1.0, total_updates=1, world=world)
        generator = LocalVllm(asked, folder, make_renderer(), make_canary(), world)
        try:
            return compare_ways(generator, engine)
        finally:
            generator.close()


def compare_ways(generator, engine):
    """Log-probs of the canary after the same weights took each way, between which every weight is moved."""
    from rlpost.generate.weight_source import PolicySource

    stream = WeightStream(engine.deepspeed.module, bucket_bytes=5000)
    source = PolicySource(stream)
    sent = start_in_process_transfer(generator.llm, source)
    [in_place] = generator.llm.collective_rpc(loads_in_place)
    [layouts_kept] = generator.llm.collective_rpc(weights_are_there)
    found = {"synced": [], "reloaded": [], "sent": []}
    for moved in (0.0, 0.05):
        for param in engine.deepspeed.module.parameters():
            param.ds_tensor.data.add_(moved * torch.randn(param.ds_tensor.shape).to(param.dtype))
        ways = {
            "synced": lambda: generator._sync(engine),
            "reloaded": lambda: reload(generator.llm, stream),
            "sent": sent.send_weights,
        }
        for name, push in ways.items():
            reload(generator.llm, zeros(stream))  # a way that leaves a weight as it was is seen
            push()
            generator.llm.reset_prefix_cache()
            found[name].append(generator._score(generator.canary.token_ids))
    found |= {"trainer": engine.token_logp(generator.canary.micro, temperature=1.0)[0][0, :-1].tolist()}
    report = {"bytes": generator.report.num_bytes, "gb_per_s": generator.report.gb_per_s, "all": stream.num_bytes}
    meta = [one.name for one in source.metadata()] == [name for name, _ in stream]
    groups = [name for names, _ in source.iter_groups() for name in names] == [one.name for one in source.metadata()]
    return found | report | {"in_place": in_place, "layouts_kept": layouts_kept, "meta": meta, "groups": groups}


def zeros(stream):
    return [(name, torch.zeros(shape, dtype=dtype)) for name, dtype, shape in stream.metadata()]


def reload(llm, weights):
    from rlpost.generate.local_vllm import repack_head

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    llm.collective_rpc(repack_head)


def weights_are_there(worker):
    return all(param.numel() > 0 for param in worker.model_runner.get_model().parameters())


def register_in_process_transfer():
    """An engine of vLLM's weight-transfer API that hands tensors over within the process, as a CPU can."""
    from vllm.distributed.weight_transfer import (
        TrainerWeightTransferEngine,
        WeightTransferEngine,
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Update:
        weights: list = field(default_factory=list)

    class Inbox(WeightTransferEngine):
        init_info_cls, update_info_cls = SimpleNamespace, Update

        def init_transfer_engine(self, init_info): ...

        def start_weight_update(self):
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info):
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info):
            self.model.load_weights(update_info.weights)

        def finish_weight_update(self):
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self): ...

    class Outbox(TrainerWeightTransferEngine):
        @classmethod
        def trainer_init(cls, init_info, *, client, source=None):
            client.init_weight_transfer_engine({})
            return cls(client=client, source=source, is_sender=init_info.is_sender)

        def send_weights(self):
            self.client.start_weight_update()
            for names, tensors in self.source.iter_groups():
                self.client.update_weights({"weights": list(zip(names, tensors, strict=True))})
            self.client.finish_weight_update()

    WeightTransferEngineFactory.register_engine("in_process", Inbox)
    WeightTransferTrainerFactory.register_engine("in_process", Outbox)


def start_in_process_transfer(llm, source):
    from vllm.distributed.weight_transfer import WeightSource, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

    from rlpost.generate.local_vllm import repack_head

    class Client:
        def init_weight_transfer_engine(self, init_info):
            llm.init_weight_transfer_engine({"init_info": init_info})

        def start_weight_update(self):
            llm.start_weight_update()

        def update_weights(self, update_info):
            llm.update_weights({"update_info": update_info})

        def finish_weight_update(self, weight_version=None):
            llm.finish_weight_update(weight_version)
            llm.collective_rpc(repack_head)

    @dataclass
    class InProcess(TrainerInitInfo):
        backend = "in_process"

    assert isinstance(source, WeightSource) and source.held_names() is None
    return WeightTransferTrainerFactory.trainer_init(InProcess(rank=0), client=Client(), source=source)


@pytest.mark.slow
@pytest.mark.parametrize(("tie", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_every_way_into_vllm_gives_the_same_weights(tie, dtype):
    [result] = run_ranks(use_engine, num_ranks=1, tie=tie, dtype=dtype)
    assert result["synced"] == result["reloaded"] == result["sent"]
    first, second = result["synced"]
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.05
    tolerance = {"bfloat16": 0.2, "float32": 1e-4}[dtype]
    assert second == pytest.approx(result["trainer"], abs=tolerance)
    assert result["in_place"] == result["layouts_kept"]  # a packed weight is removed
    assert result["meta"] and result["groups"]
    assert result["bytes"] == result["all"] > 0 and result["gb_per_s"] > 0


def test_layout_is_what_a_copy_in_place_needs():
    weight = tiny_policy().model.lm_head.weight
    assert _layout(weight) == _layout(weight.detach().to("meta")) != _layout(weight.t())
