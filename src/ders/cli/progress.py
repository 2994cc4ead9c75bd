"""How long work on many bytes still takes: a bar on a terminal, a line each tenth elsewhere; always on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what to call with (bytes done, bytes in all), as often as one likes."""
    if not sys.stderr.isatty():
        yield _lines(label)
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str) -> Callable[[int, int], None]:
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        tenths = 10 * done // max(total, 1)
        if tenths > told:
            told = tenths
            print(f"{label}: {10 * tenths} % of {total / 1e6:,.1f} MB", file=sys.stderr, flush=True)

    return report
