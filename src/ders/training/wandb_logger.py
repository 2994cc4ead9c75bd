"""A Weights & Biases run."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

MODES = ("offline", "online")


class WandbLogger(Logger):
    """One wandb run per run folder, named like it; a resumed run continues it, also offline.

    All its files lie in `wandb/` of the folder. It is told the configuration and what is logged, and collects nothing
    of its own: no code, no git state, no environment, no packages, no host, no console, no system metrics.

    Args:
        folder: the run folder.
        name: id and name of the wandb run.
        start: optimizer steps done before; 0 begins the wandb run anew.
        project: of the wandb run.
        mode: `offline` (nothing leaves the machine; `wandb sync` uploads later) or `online`.
        timeout: seconds to wait for wandb to start, and for its uploads at the end.

    Raises:
        ValueError: no such mode.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        start: int = 0,
        project: str = "ders",
        mode: str = "offline",
        timeout: float = 40.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode of the wandb logger must be {' or '.join(MODES)}: got {mode!r}")
        self.folder, self._name, self.start = folder.resolve(), name, start
        self.project, self.mode, self.timeout = project, mode, timeout
        self._last = max(start - 1, 0)
        self._run: Any = None
        self._environment: dict[str, str | None] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._name

    @property
    def experiment(self) -> Any:
        """The wandb run, started on first use.

        Raises:
            OSError: its folder cannot be written. wandb would go to a temporary one.
        """
        if self._run is None:
            self._run = self._start()
        return self._run

    def _start(self) -> Any:
        files = self.folder / "wandb"
        files.mkdir(parents=True, exist_ok=True)
        if not os.access(files, os.W_OK):
            raise PermissionError(f"{files} cannot be written")
        # Only the environment, read at import in part, says where wandb's service keeps its log and what it has yet to
        # upload, and that its own crashes are not to be reported to its makers.
        service = str(files / "service")
        for key, value in {
            "WANDB_CACHE_DIR": service,
            "WANDB_DATA_DIR": service,
            "WANDB_ERROR_REPORTING": "false",
        }.items():
            self._environment[key] = os.environ.get(key)
            os.environ[key] = value
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_service_wait=self.timeout)
        wandb.setup(quiet)  # silent also keeps it from asking for a key
        settings = wandb.Settings(
            disable_code=True,
            disable_git=True,
            save_code=False,
            console="off",
            silent=True,
            host="",
            symlink=False,
            init_timeout=self.timeout,
            finish_timeout=self.timeout,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=self.project,
            id=self._name,
            name=self._name,
            dir=str(self.folder),
            mode=self.mode,
            resume="allow" if self.start else None,
            reinit="create_new",  # whatever else runs in this process stays apart
            settings=settings,
        )

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(params, allow_val_change=True)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # wandb's own step is the optimizer step: values of one step make one row, and a step it has it takes only once.
        self._last = self._last if step is None else step
        if shutil.disk_usage(self.folder).free < 2**20:  # wandb's service would drop rows without a word
            raise OSError(errno.ENOSPC, "No space left on device")
        self.experiment.log(metrics, step=self._last)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self.experiment.log(
            {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=self._last
        )

    def log_figure(self, name: str, file: Path) -> None:
        import wandb

        self.experiment.log({name: wandb.Image(str(file))}, step=self._last)

    def finalize(self, status: str) -> None:
        """The next run of this process begins with a service of its own, in its own folder."""
        import wandb

        self._restore()
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
        wandb.teardown()

    def abandon(self) -> None:
        """Forget a service that may be dead: at exit, Python would wait for it otherwise."""
        import wandb

        self._restore()
        wandb.teardown()

    def _restore(self) -> None:
        for key, value in self._environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        self._environment.clear()
