"""What a search goes by."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ders.cli.app import UserError
from ders.reporting.figures import read_metrics

log = logging.getLogger(__name__)

SCORE = "val/accuracy"


def validation_score(folder: Path) -> float | None:
    """`val/accuracy` of a run's last validation; None where it had none.

    Never a test score: what is chosen by its test score has no honest test score left.

    Raises:
        UserError: this is a job of a search, which cannot go on without.
    """
    file = folder / "metrics.csv"
    values = read_metrics(file).get(SCORE, []) if file.exists() else []
    if not values:
        if _in_a_search():
            raise UserError(
                f"{folder} has no {SCORE}, which a search goes by: it ended before its first "
                "validation, or its strategy divides the weights and validates by loss"
            )
        return None
    step, score = values[-1]
    log.info("%s %.4f, at step %d", SCORE, score, step + 1)
    return score


def check_search(config: DictConfig) -> None:
    """Refuse a job of a search that will have no validation to be chosen by, before it trains.

    Raises:
        UserError: validation is off, or the job trains nothing.
    """
    if not _in_a_search():
        return
    if config.get("compression"):
        raise UserError(f"a search goes by {SCORE}, and a compression is scored on the test questions only")
    if config.stage.moe.validate_every is None:
        raise UserError(f"a search goes by {SCORE}: set stage.moe.validate_every to a number of steps")


def _in_a_search() -> bool:
    return HydraConfig.initialized() and bool(HydraConfig.get().runtime.choices.get("hparams_search"))
