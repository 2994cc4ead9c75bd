"""Loggers beside the CSV file: they watch a run and can neither end it nor hold it up."""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

PREDICTIONS = 50  # rows of the table of predictions


class ForgivingLogger(Logger):
    """Passes calls on to another logger until one of them fails or does not return in time.

    Then it warns once, with the logger's name and the reason, and passes on nothing more. Calls that the other logger
    does not know are left out. The other logger stays open when Lightning ends a fit, for scores and figures come
    later: `close` ends it.

    Args:
        label: names the logger in its warning.
        logger: any Lightning logger. It may have `log_table(name, columns, rows)`, `log_figure(name, file)` and
            `abandon()`, which is called after a failure, besides.
        patience: seconds a call may take.
    """

    def __init__(self, label: str, logger: Logger, *, patience: float = 90.0) -> None:
        super().__init__()
        self.label, self.logger, self.patience = label, logger, patience
        self.failure: str | None = None

    @property
    def name(self) -> str:
        return self.label

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._pass_on("log_metrics", dict(metrics), step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._pass_on("log_hyperparams", params)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows under a name; a cell is a number or text."""
        self._pass_on("log_table", name, columns, rows)

    def log_figure(self, name: str, file: Path) -> None:
        """A PNG file under a name."""
        self._pass_on("log_figure", name, file)

    def save(self) -> None:
        self._pass_on("save")

    def finalize(self, status: str) -> None:
        self.save()

    def close(self, status: str) -> None:
        """End the other logger: `success` or `failed`."""
        self._pass_on("finalize", status)

    def _pass_on(self, method: str, *args: Any) -> None:
        call = getattr(self.logger, method, None)
        if self.failure is not None or call is None:
            return
        self.failure = _failure_of(lambda: call(*args), self.patience)
        if self.failure is not None:
            log.warning(
                "logger %s: %s failed (%s). The run goes on without it; metrics.csv is complete",
                *(self.label, method, self.failure),
            )
            _failure_of(getattr(self.logger, "abandon", lambda: None), self.patience)


def _failure_of(call: Callable[[], Any], seconds: float) -> str | None:
    """Why a call failed, if it did. A thread of its own, left behind if need be, is all that can bound what hangs."""
    outcome: list[str | None] = []

    def attempt() -> None:
        try:
            call()
        except BaseException as error:  # also an exit, which is the logger's and not ours
            outcome.append(f"{type(error).__name__}: {error}")
        else:
            outcome.append(None)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer in {seconds:g} s"


def report(loggers: Sequence[ForgivingLogger], folder: Path, scores: dict[str, dict[str, Any]], step: int) -> None:
    """What a finished run folder holds, to its loggers: scores as values and as a table, predictions, figures.

    Args:
        folder: holds `figures/*.png` and, where there is a test split, `predictions.jsonl`.
        scores: `value` and `count` of each metric.
        step: the optimizer step that the scores belong to.
    """
    if not loggers:
        return
    file = folder / "predictions.jsonl"  # data without a test split leaves none
    predictions = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    # Evenly over the split: its rows come in an order, as kind by kind.
    predictions = predictions[:: -(-len(predictions) // PREDICTIONS) or 1]
    columns = list(dict.fromkeys(key for row in predictions for key in row))
    for logger in loggers:
        if scores:
            logger.log_metrics({metric: score["value"] for metric, score in scores.items()}, step)
            rows = [[metric, score["value"], score["count"]] for metric, score in scores.items()]
            logger.log_table("scores", ["metric", "value", "count"], rows)
        if predictions:
            logger.log_table("predictions", columns, [[_cell(row.get(key)) for key in columns] for row in predictions])
        for file in sorted((folder / "figures").glob("*.png")):
            logger.log_figure(f"figures/{file.stem}", file)


def _cell(value: Any) -> float | str:
    """One type down a column is what a table service takes: numbers stay, all else is text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
