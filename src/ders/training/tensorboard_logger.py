"""TensorBoard event files of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Event files in `tensorboard/` of a run folder; a resumed run goes on there.

    Args:
        folder: the run folder.
        name: the run's name.
        start: optimizer steps done before: what an earlier attempt wrote of later steps is hidden.
    """

    def __init__(self, folder: Path, name: str, *, start: int = 0) -> None:
        super().__init__()
        self.folder, self._name, self._start = folder, name, start
        self._last = max(start - 1, 0)
        self._writer: SummaryWriter | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return self._name

    @property
    def experiment(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._start or None)
        return self._writer

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._text("config", f"```yaml\n{yaml.safe_dump(params, sort_keys=False, allow_unicode=True)}```")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._last = self._last if step is None else step
        for key, value in metrics.items():
            self.experiment.add_scalar(key, value, self._last)
        # A killed run must find its rows up to the checkpoint it goes on from.
        self.experiment.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))

    def log_figure(self, name: str, file: Path) -> None:
        with Image.open(file) as image:
            self.experiment.add_image(name, np.asarray(image.convert("RGB")), self._last, dataformats="HWC")

    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _text(self, name: str, text: str) -> None:
        self.experiment.add_text(name, text, self._last)
        self.experiment.flush()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
