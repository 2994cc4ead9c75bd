"""What the runs of a claim are: lists of overrides."""

import itertools
import shlex
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def expand(
    runs: Sequence[str], arguments: Sequence[str] = (), common: str = "", parser: OverridesParser | None = None
) -> list[list[str]]:
    """Override lists, one per job: `common` and each run's line, their `a=1,2` as a product.

    Arguments from the command line go to every job; they win over a run's own overrides, which win over `common`.
    Runs that become alike run once.

    Args:
        parser: knows the configuration files, for `group=glob(*)`.

    Raises:
        HydraException: an interval, which has no list of values.
    """
    parser = parser or OverridesParser.create()
    jobs: list[tuple[str, ...]] = []
    for run in runs:
        own = _without(shlex.split(run), arguments)
        shared = _without(_without(shlex.split(common), arguments), own)
        choices = []
        for override in parser.parse_overrides([*arguments, *shared, *own]):
            if override.is_interval_sweep():
                raise HydraException(f"{override.input_line}: an interval needs hparams_search=optuna; list values")
            if override.is_sweep_override():
                key = str(override.input_line).split("=", 1)[0]
                choices.append([f"{key}={v}" for v in override.sweep_string_iterator()])
            else:
                choices.append([str(override.input_line)])
        jobs += itertools.product(*choices)
    return [list(job) for job in dict.fromkeys(jobs)]


def _without(overrides: Iterable[str], winning: Iterable[str]) -> list[str]:
    """The overrides of what the winning ones leave unsaid."""
    said = {_key(override) for override in winning}
    return [override for override in overrides if _key(override) not in said]


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")
