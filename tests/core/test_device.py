from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from tersor.core import device
from tersor.core.device import cpu_flags, layout_for, precision_for, seeded, set_layout

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "fma"}, None),
        ({"avx2", "avx512_vnni"}, None),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"avx2", "amx_bf16"}, torch.bfloat16),
        (set(), None),
    ],
)
def test_auto_is_bfloat16_if_the_processor_supports_it(monkeypatch, flags, expected):
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset(flags))
    assert precision_for(CPU, "auto") is expected
    assert precision_for(CPU, "float32") is None
    assert precision_for(CPU, "bfloat16") is torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, None)])
def test_a_gpu_that_emulates_bfloat16_uses_float32(monkeypatch, native, expected):
    supported = lambda including_emulation=True: native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision_for(torch.device("cuda"), "auto") is expected


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch has no torch.cpu.get_capabilities")
def test_the_cpu_flags_agree_with_torch():
    known = torch.cpu.get_capabilities()
    for flag in ("amx_bf16", "avx512_bf16", "avx2"):
        assert (flag in cpu_flags()) == bool(known.get(flag, False)), flag


def test_set_layout_keeps_parameters_and_skips_5_d_tensors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(3, 4))
    before = [*model.parameters()]
    values = [parameter.detach().clone() for parameter in before]
    set_layout(model, layout_for(CPU))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), values, strict=True))
    set_layout(model, layout_for(torch.device("mps")))
    assert model[0].weight.is_contiguous()


def test_seeded_draws_from_the_seed_and_restores_the_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(5):
        drawn = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)


def test_seeded_does_not_seed_the_generators_of_gpus(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
    with seeded(5):
        pass
    assert not calls


FAULTS = """
import resource
import torch
from torch import nn
from tersor.core.device import keep_freed_memory
network = nn.Sequential(*[each for _ in range(4) for each in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())])
images = torch.randn(8, 16, 64, 64)
def after(steps):
    for _ in range(steps):
        network(images).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
warm = after(6)
print(after(4) - warm)
keep_freed_memory()
warm = after(6)
print(after(4) - warm)
"""


EAGER = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""The initial values of glibc. It raises them at run time, depending on the order in which memory is freed."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
@pytest.mark.slow
def test_freed_memory_is_reused_by_the_next_step():
    environment = {**os.environ, **EAGER}
    command = [sys.executable, "-c", FAULTS]
    child = subprocess.run(command, capture_output=True, check=True, env=environment)
    given_back, kept = map(int, child.stdout.split())
    assert kept < given_back / 10, (kept, given_back)
