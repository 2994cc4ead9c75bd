"""Memory that is freed stays with the process, and is used again."""

import platform
import resource
import subprocess
import sys

import pytest

TOUCH = """
import resource, sys, torch
from ders.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(2): torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_mapped_anew() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", TOUCH, how], capture_output=True, check=True).stdout)

    pages = 64_000_000 // resource.getpagesize()
    # Of twenty times, one or two may find no place among what is kept.
    assert faults("keep") <= 2 * pages < 15 * pages < faults("leave")
