"""A sweeper over a list of override sets. Hydra accepts sweepers only from this namespace, which it scans."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RunsSweeper(Sweeper):
    """Runs each entry of `runs` with the configured launcher.

    Args:
        runs: lines of overrides; without any, the product of the command line's.
        common: overrides of every run, before its own, which win.
        about: how the claim's table and figure are called and drawn; read by `scripts/tables.py`.
    """

    def __init__(self, runs: Sequence[str] = (), common: str = "", **about: Any) -> None:
        self.runs, self.common, self.about = runs, common, about

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports this file in every application of the environment: torch must not come along.
        from ders.cli.sweeper import expand
        from ders.cli.sweeps import Sweep

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        jobs, refused = [], []
        for job in expand(list(self.runs) or [""], arguments, self.common, parser):
            error = self._refusal(job)
            if error is None:
                jobs.append(job)
            else:
                refused.append((job, error))
        sweep = Sweep.current
        if refused and (not jobs or sweep is None):  # nothing is as intended: better said before anything runs
            raise refused[0][1]
        if sweep is not None:
            sweep.plan(jobs, refused)
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        # Every job has run. A table tells what failed; without one, reading the values raises the first failure.
        return None if sweep is not None else [job.return_value for job in returns]

    def _refusal(self, job: list[str]) -> Exception | None:
        """Why a job cannot be composed: launchers would stop at it, with others still to run."""
        try:
            self.context.config_loader.load_sweep_config(self.config, job)
        except Exception as error:
            return error
        return None
