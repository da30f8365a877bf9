"""Memory that was freed stays with the process."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from callbacks import freed_memory
from callbacks.freed_memory import KeepFreedMemory

FAULTS = """
import resource, sys, torch
from callbacks.freed_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print(-1)
    sys.exit()
def step():
    first, second = torch.zeros(2**23), torch.zeros(2**24)  # 32 and 64 MiB
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_the_next_step_takes_what_the_last_one_freed() -> None:
    faults = {}
    for what in ("leave", "keep"):
        done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    if faults["keep"] < 0:
        pytest.skip("another C library")
    assert faults["keep"] < faults["leave"] / 10  # pages may be of 4 KiB or larger: the count is the system's


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    for name in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    asked: list[bool] = []
    monkeypatch.setattr(freed_memory, "keep_freed_memory", lambda: asked.append(True))
    return asked


def on(device: str) -> SimpleNamespace:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_only_before_training_and_only_on_the_cpu(asked) -> None:
    KeepFreedMemory().setup(on("cpu"), None, "test")
    KeepFreedMemory().setup(on("cuda"), None, "fit")
    assert asked == []
    KeepFreedMemory().setup(on("cpu"), None, "fit")
    assert asked == [True]


@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1"), ("MALLOC_TRIM_THRESHOLD_", "1")]
)
def test_what_the_user_has_set_stays(asked, monkeypatch, name, value) -> None:
    monkeypatch.setenv(name, value)
    KeepFreedMemory().setup(on("cpu"), None, "fit")
    assert asked == []


def test_other_systems_are_left_alone(asked, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    KeepFreedMemory().setup(on("cpu"), None, "fit")
    assert asked == []
