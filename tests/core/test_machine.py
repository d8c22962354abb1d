"""Parsing the description of the processor."""

import pytest

from tersor.core import device, machine, target

X86 = """processor\t: 0
model name\t: Some CPU @ 2 GHz
flags\t\t: fpu fma avx2 {}
"""
ARM = """processor\t: 0
Features\t: fp asimd i8mm
"""


@pytest.fixture
def described(tmp_path, monkeypatch):
    """A function that replaces the description of the processor by the given text."""

    def describe(text, kind="x86_64"):
        (tmp_path / "cpuinfo").write_text(text)
        for module in (device, machine, target):
            monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
        monkeypatch.setattr(machine.platform, "machine", lambda: kind)

    return describe


@pytest.mark.parametrize(
    ("flag", "kind"),
    [("", "avx2"), ("avx512_vnni", "vnni"), ("avx_vnni", "vnni"), ("amx_int8", "vnni"), ("sse", "avx2")],
)
def test_an_x86_processor_is_parsed(described, flag, kind):
    described(X86.format(flag))
    found = machine.machine()
    assert found["cpu"] == "Some CPU @ 2 GHz"
    assert found["instruction_sets"][:2] == ["avx2", "fma"]
    assert found["instruction_sets"][2:] == [flag] * (flag not in {"", "sse"})
    assert target.cpu_kind.__wrapped__() == kind
    assert {"fma", "avx2"} <= device.cpu_flags.__wrapped__()


def test_an_arm_processor_is_parsed(described):
    described(ARM, "aarch64")
    found = machine.machine()
    assert found["cpu"] == "aarch64"
    assert found["instruction_sets"] == ["asimd", "i8mm"]
    assert target.cpu_kind.__wrapped__() == "arm64"


@pytest.mark.parametrize(("limit", "threads"), [(None, 6), ("4", 4), ("3,2", 3), ("12", 6), ("0", 6), ("many", 6)])
def test_threads_are_the_physical_cores_within_the_limit(monkeypatch, limit, threads):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 12 if logical else 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert machine.default_threads() == threads
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(2), raising=False)
    assert machine.default_threads() == 2
