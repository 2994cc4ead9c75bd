"""Which config owns which dial, to say so when a dial is set that nothing uses."""

import re
from pathlib import Path

import yaml

_OWNERS = ("method", "upcycling", "compression")
_NOT_DIALS = (*_OWNERS, "defaults")


def dials_by_owner(conf: Path) -> dict[str, list[str]]:
    """Root-level dials by the choice that brings them, those it inherits included: `{"method=ders_lm": ["rank"]}`."""
    return {
        f"{group}={file.stem}": sorted(dials_of(file, conf))
        for group in _OWNERS
        for file in sorted((conf / group).glob("*.yaml"))
    }


def dials_of(file: Path, conf: Path) -> set[str]:
    """Root-level dials that a configuration file brings."""
    content = yaml.safe_load(file.read_text()) or {}
    found = {key for key in content if key not in _NOT_DIALS}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= dials_of(file.with_name(f"{entry}.yaml"), conf)
    return found


def explain_unknown_key(error: Exception, conf: Path, arguments: list[str]) -> str | None:
    """A message for "key is not in struct" that names the dial, its owners and the remedy; None for other errors."""
    match = re.search(r"Could not override '(\w+)'", str(error))
    if match is None:
        return None
    dial = match[1]
    owners = dials_by_owner(conf)
    having = [owner for owner, dials in owners.items() if dial in dials]
    if not having:
        return f"there is no dial {dial!r}. The same command with --cfg job prints all there are"
    chosen = [argument for argument in arguments if argument in owners]
    uses = "".join(f"; {owner} has {', '.join(owners[owner]) or 'none of its own'}" for owner in chosen)
    return f"{dial} is a dial of {' or '.join(having)}{uses}. Drop {dial}=… or choose another"
