"""What every command shares: where the repository is, how Hydra is started, how errors are told."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ders.cli.dials import explain_unknown_key

log = logging.getLogger(__name__)

# The install is editable: configurations, claims and results lie beside the sources.
ROOT = Path(__file__).resolve().parents[3]
SCALES = ("tiny", "paper")

# Launchers' configurations here are named as the plug-ins' own, whose schemas check them. Said here, for a
# launcher's worker composes before it calls anything of ours.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/.*' is validated against ConfigStore schema")


class UserError(Exception):
    """Something the person at the keyboard can mend; shown without a traceback."""


def prepare_hydra() -> None:
    """Make the repository known from any working folder, and errors readable."""
    if not (ROOT / "conf").is_dir():
        sys.exit(f"error: no configurations in {ROOT}. The commands need a clone, installed by `pip install -e .`")
    os.environ["DERS_ROOT"] = str(ROOT)
    OmegaConf.register_new_resolver("scaled", _scaled, replace=True)
    # Let errors come through to `launch`, which tells them shorter.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Fast tokenizers warn about every fork otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def _scaled(tiny: Any, paper: Any, *, _root_: DictConfig) -> Any:
    """`${scaled:TINY,PAPER}`: the value for the scale of this run; what is resolved holds only that one."""
    if _root_.scale not in SCALES:
        raise UserError(f"scale must be {' or '.join(SCALES)}: got {_root_.scale!r}")
    return tiny if _root_.scale == "tiny" else paper


def launch(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run a Hydra command; exits with 1 and a readable message on an error of the user's."""
    prepare_hydra()
    warnings.showwarning = _log_warning
    command = hydra.main(config_path=str(ROOT / "conf"), config_name=config_name, version_base="1.3")(task)
    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain_unknown_key(error, ROOT / 'conf', sys.argv[1:]) or error}")
    except (UserError, ValueError, ArithmeticError, OSError) as error:
        if os.environ.get("DERS_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(DERS_TRACEBACK=1 shows where)")


def _log_warning(message: Warning | str, *_: object) -> None:
    log.warning("%s", message)


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """A configuration as the command line would compose it; not for use inside a sweep, which it would end."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config_name, overrides=overrides)


def check_format(given: str) -> None:
    """What a command prints: a table for people, or one JSON object.

    Raises:
        UserError: anything else was asked for.
    """
    if given not in ("table", "json"):
        raise UserError(f"format must be table or json: got {given!r}")


def to_plain(config: Any) -> Any:
    """A resolved configuration as plain data."""
    return OmegaConf.to_container(config, resolve=True)
