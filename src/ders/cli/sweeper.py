"""What the runs of a claim are: lists of overrides."""

import itertools
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser


def expand(runs: Sequence[str], arguments: Sequence[str] = ()) -> list[list[str]]:
    """Override lists, one per job: each run's line, its `a=1,2` as a product.

    Arguments from the command line go to every job and win over a run's own; runs that become alike run once.
    """
    jobs: list[tuple[str, ...]] = []
    for run in runs:
        given = {argument.split("=", 1)[0].lstrip("+~") for argument in arguments}
        own = [o for o in shlex.split(run) if o.split("=", 1)[0].lstrip("+~") not in given]
        choices = []
        for override in OverridesParser.create().parse_overrides([*arguments, *own]):
            if override.is_sweep_override():
                key = str(override.input_line).split("=", 1)[0]
                choices.append([f"{key}={v}" for v in override.sweep_string_iterator()])
            else:
                choices.append([str(override.input_line)])
        jobs += itertools.product(*choices)
    return [list(job) for job in dict.fromkeys(jobs)]
