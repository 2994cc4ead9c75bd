"""Configurations of a claim's many jobs, which differ in few choices."""

import copy
import functools

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ders.cli.app import ROOT, composed


def job_config(job: list[str]) -> DictConfig:
    """What `composed("train", job)` gives, but for jobs alike in their choices of files, which are read once."""
    parsed = OverridesParser.create().parse_overrides(job)
    if any(o.is_add() or o.is_delete() or o.package is not None for o in parsed):
        return composed("train", job)
    choices = [str(o.input_line) for o in parsed if (ROOT / "conf" / o.key_or_group).is_dir()]
    config = copy.deepcopy(_chosen(tuple(sorted(choices))))
    for override in parsed:
        if str(override.input_line) not in choices:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    return config


@functools.cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return composed("train", list(choices))
