"""Which config owns which dial, to say so when a dial is set that nothing uses."""

import re
from pathlib import Path

import yaml

_GROUPS = ("method", "upcycling")


def dials_by_owner(conf: Path) -> dict[str, list[str]]:
    """Root-level dials of every method, `{method: [dial, …]}`, those it inherits included."""
    owned: dict[str, list[str]] = {}
    for file in sorted((conf / "method").glob("*.yaml")):
        owned[file.stem] = sorted(_dials(file, conf))
    return owned


def _dials(file: Path, conf: Path) -> set[str]:
    content = yaml.safe_load(file.read_text()) or {}
    found = {key for key in content if key not in (*_GROUPS, "defaults")}
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            for group, name in entry.items():
                found |= _dials(conf / group.lstrip("/") / f"{name}.yaml", conf)
    return found


def explain_unknown_key(error: Exception, conf: Path, arguments: list[str]) -> str | None:
    """A message for "key is not in struct" that names the dial, its owners and the remedy; None for other errors."""
    match = re.search(r"Could not override '(\w+)'", str(error))
    if match is None:
        return None
    dial = match[1]
    owners = dials_by_owner(conf)
    chosen = next((a.split("=", 1)[1] for a in arguments if a.startswith("method=")), None)
    having = [method for method, dials in owners.items() if dial in dials]
    if not having:
        return f"there is no dial {dial!r}. `python train.py --cfg job` prints all there are"
    uses = f"; method={chosen} has {', '.join(owners[chosen]) or 'none of its own'}" if chosen in owners else ""
    return f"{dial} is a dial of method={' or '.join(having)}{uses}. Drop {dial}=… or choose another method"
