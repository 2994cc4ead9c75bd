"""A sweeper over a list of override sets. Hydra accepts sweepers only from this namespace, which it scans."""

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RunsSweeper(Sweeper):
    """Runs each entry of `runs` with the configured launcher.

    Args:
        runs: lines of overrides.
        common: overrides of every run, before its own, which win.
        about: how the claim's table and figure are called and drawn; read by `scripts/tables.py`.
    """

    def __init__(self, runs: Sequence[str], common: str = "", **about: Any) -> None:
        self.runs, self.common, self.about = runs, common, about

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports this file in every application of the environment: torch must not come along.
        from ders.cli.sweeper import expand

        returns = self.launcher.launch(expand(list(self.runs), arguments, self.common), initial_job_idx=0)
        # Every job has run; reading the values raises the first failure, so the exit code tells.
        return [job.return_value for job in returns]
