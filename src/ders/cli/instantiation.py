"""From configuration nodes to objects, of this package and the libraries it names only."""

from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from ders.cli.app import UserError

_ALLOWED = ("ders.", "torch.optim.", "transformers.optimization.", "lightning.")


def instantiate(node: Any) -> Any:
    """`hydra.utils.instantiate`, for targets of this package and the libraries it names only."""
    for target in _targets(OmegaConf.to_container(node, resolve=True)):
        # The module where a target is defined counts: `ders.x.os.system` would be found through an import.
        if not target.startswith(_ALLOWED) or not _module_of(target).startswith(_ALLOWED):
            raise UserError(f"_target_ {target} is not allowed: it must be defined in {' or '.join(_ALLOWED)}")
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise UserError(str(error.__cause__ or error)) from error


def _module_of(target: str) -> str:
    try:
        return f"{hydra.utils.get_object(target).__module__}."
    except Exception as error:
        raise UserError(f"_target_ {target} cannot be found: {error}") from error


def _targets(data: Any) -> list[str]:
    if isinstance(data, dict):
        own = [str(data["_target_"])] if "_target_" in data else []
        return own + [t for value in data.values() for t in _targets(value)]
    return [t for value in data for t in _targets(value)] if isinstance(data, list) else []
