import time
from types import SimpleNamespace

import pytest
import torch
from tiny import CPU

from rlpost import peak
from rlpost.peak import DevicePeak, ResidentPeak, ResidentSample, fullest, gauge_of, resident_gib

MIB = 1 << 20


def take(mib):
    """Memory that is touched, and let go."""
    held = bytearray(mib * MIB)
    held[:: 4 << 10] = b"x" * (mib * 256)


def test_resident_peak_is_that_since_the_last_call():
    try:
        gauge = ResidentPeak()
    except OSError:
        pytest.skip("this machine does not let a process take its high-water mark back")
    before = gauge()
    take(200)
    assert 0.15 < gauge() - before < 0.3
    assert gauge() - before < 0.05


def test_without_leave_to_reset_the_peak_it_is_sampled(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 3145728 kB\nVmRSS:\t 1048576 kB\n")
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    monkeypatch.setattr(peak, "PROCESS", tmp_path)
    gauge = gauge_of(CPU)
    assert isinstance(gauge, ResidentSample) and "ends of phases" in gauge.of
    assert gauge() == 1.0
    assert resident_gib("VmHWM") == 3.0


def test_a_gauge_costs_less_than_a_millisecond():
    gauge = gauge_of(CPU)
    started = time.perf_counter()
    for _ in range(20):
        gauge()
    assert (time.perf_counter() - started) / 20 < 1e-3


def test_device_peak_leaves_out_what_a_sleeping_generator_gave_back(monkeypatch):
    """Of 80 GiB the driver counts 10 as used; torch believes in 45, 40 of them asleep, and had 65 at the most."""
    resets = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 45 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 65 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    gauge = gauge_of(SimpleNamespace(type="cuda"))
    assert isinstance(gauge, DevicePeak)
    assert gauge() == 30.0 and len(resets) == 2


@pytest.mark.gpu
def test_device_peak_is_that_since_the_last_call():
    gauge = DevicePeak(torch.device("cuda", 0))
    torch.cuda.empty_cache()
    before = gauge()
    held = torch.zeros(1 << 28, device="cuda")
    del held
    torch.cuda.empty_cache()
    assert gauge() - before == pytest.approx(1.0, abs=0.1)
    assert gauge() - before == pytest.approx(0.0, abs=0.1)


def test_fullest_takes_each_phase_from_its_fullest_rank():
    assert fullest([]) == {}
    assert fullest([{"a": 1.0, "b": 4.0}, {"a": 2.0}]) == {"a": 2.0, "b": 4.0}
