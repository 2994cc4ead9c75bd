"""A sweeper over a list of override sets, as claims need."""

import itertools
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


def expand(runs: Sequence[str], arguments: Sequence[str] = ()) -> list[list[str]]:
    """Override lists, one per job: each run's line, its `a=1,2` as a product.

    Arguments from the command line go to every job and win over a run's own.
    """
    jobs: list[list[str]] = []
    for run in runs:
        given = {argument.split("=", 1)[0].lstrip("+~") for argument in arguments}
        own = [o for o in shlex.split(run) if o.split("=", 1)[0].lstrip("+~") not in given]
        choices = []
        for override in OverridesParser.create().parse_overrides([*arguments, *own]):
            if override.is_sweep_override():
                choices.append([f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()])
            else:
                choices.append([str(override.input_line)])
        jobs += [list(job) for job in itertools.product(*choices)]
    return jobs


class RunsSweeper(Sweeper):
    """Runs each entry of `runs` with the configured launcher.

    Args:
        runs: lines of overrides.
        title, dial: what the claim's table and figure are called and drawn over; read by `scripts/tables.py`.
    """

    def __init__(self, runs: Sequence[str], title: str = "", dial: str | None = None) -> None:
        self.runs, self.title, self.dial = runs, title, dial

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        returns = self.launcher.launch(expand(list(self.runs), arguments), initial_job_idx=0)
        # Every job has run; reading the values raises the first failure, so the exit code tells.
        return [job.return_value for job in returns]
