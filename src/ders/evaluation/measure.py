"""Time and memory of whole commands, and of the disk below them."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One command as its user sees it.

    Attributes:
        seconds: from its start to its end, start-up included.
        anonymous_bytes: the peak of its anonymous memory (RssAnon); file pages that are only mapped do not count.
    """

    seconds: float
    anonymous_bytes: int
    stdout: str


def measure(command: list[str]) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message ends with what it printed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], anonymous_bytes(process.pid))
            ended.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}: {stderr[-2000:]}")
    return Measured(seconds, peak[0], stdout)


def idle(imports: str) -> Measured:
    """A process that does nothing but import."""
    return measure([sys.executable, "-c", f"import {imports}, time; time.sleep(0.5)"])


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def read_seconds(files: list[Path]) -> float:
    """Reading files from the disk, in large pieces, into memory that is used again."""
    forget(files)
    buffer = bytearray(1 << 24)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - started


def write_seconds(folder: Path, count: int) -> float:
    """Writing `count` bytes to the disk and waiting until they are there."""
    block = os.urandom(1 << 24)
    file = folder / "reference.bin"
    started = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as handle:
            for start in range(0, count, len(block)):
                handle.write(block[: count - start])
            os.fsync(handle.fileno())
        return time.perf_counter() - started
    finally:
        file.unlink(missing_ok=True)


def forget(files: list[Path]) -> None:
    """Let the system drop what it cached of files, so that the next read is from the disk."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
