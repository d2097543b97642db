"""Energy counters: what they read, where they wrap, and where there are none."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rlpost.energy import Meter, gpu_counter, meter, rapl_counter


def package(folder, name, microjoules, most=999_999):
    (folder / name).mkdir()
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


def test_meter_gives_what_was_used_since_the_last_reading():
    readings = iter([10.0, 12.5, 13.0])
    use = Meter({"gpu": lambda: next(readings)})
    assert [use(), use()] == [{"gpu": 2.5}, {"gpu": 0.5}]
    assert Meter({})() == {}


def test_rapl_adds_up_packages_and_starts_again_at_its_range(tmp_path):
    first, second = package(tmp_path, "intel-rapl:0", 999_000), package(tmp_path, "intel-rapl:1", 5)
    package(tmp_path, "intel-rapl:0:0", 77)  # a part of the first, which has it already
    use = Meter({"cpu": rapl_counter(tmp_path)})
    first.write_text("500\n")  # 999,000 -> 999,999 -> 0 -> 500
    second.write_text("1505\n")
    assert use()["cpu"] == pytest.approx((1500 + 1500) / 1e6)


def test_rapl_that_is_not_there_or_not_readable_counts_nothing(tmp_path):
    assert rapl_counter(tmp_path) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert rapl_counter(tmp_path) is None


@pytest.fixture
def nvml(monkeypatch):
    """The part of NVML's Python binding that is used, with the second of two GPUs as the one of this process."""
    library = ModuleType("pynvml")
    library.__spec__ = SimpleNamespace()
    library.NVMLError = type("NVMLError", (Exception,), {})
    millijoules = {b"GPU-aa": iter(range(0, 9000, 1500)), b"GPU-bb": iter([7000, 8000, 8250])}
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(millijoules[handle])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bb"))
    return library


def test_a_gpu_is_found_by_its_uuid_and_counts_millijoules(nvml):
    use = Meter({"gpu": gpu_counter(torch.device("cuda", 0))})  # the first reading was the trial
    assert use() == {"gpu": pytest.approx(0.25)}


def test_a_gpu_that_does_not_tell_counts_nothing(nvml):
    def refuse(handle):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert gpu_counter(torch.device("cuda", 0)) is None


def test_processors_are_counted_by_the_first_rank_of_a_machine_only():
    assert meter(torch.device("cpu"), local_rank=1)() == {}
