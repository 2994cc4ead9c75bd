"""Records as runs of the paper's tables would leave them, scores drawn around those of a table."""

import random
from typing import Any

DIALS = {"ders_sm": "sparsity", "sparsify": "sparsity", "ders_lm": "rank", "quantize": "bits"}


def record(model: str, method: str, seed: int, score: float, **dials: Any) -> dict[str, Any]:
    """A finished tiny run; a method of compression is a vanilla run's, and `score` a fraction."""
    compressed = method in ("sparsify", "quantize", "base_only")
    trained = "vanilla" if compressed else method
    added = 0 if method == "dense" else 1192
    config = {"method": {"name": trained}, "model": {"name": model}, "seed": seed, "scale": "tiny", "num_experts": 4}
    config |= {"trainable": "paper", "trainer": {}, **dials}
    config |= {"compression": {"name": method}} if compressed else {}
    return {
        "status": "finished",
        "error": None,
        "command": "python train.py",
        "commit": "c" * 40,
        "dirty": False,
        "date": "2025-01-01T00:00:00+00:00",
        "hardware": {},
        "versions": {},
        "config": config,
        "seed": seed,
        "method": trained,
        "scale": "tiny",
        "data_hash": "ab",
        "added_params": added + 500,
        "added_params_universal": 500,
        "added_params_paper": added,
        "trainable_params": 812456,
        "total_params": 900000 if method == "vanilla" else 500000,
        "active_params": 400000,
        "stored_bytes": 2**20,
        "wall_seconds": 1.0,
        "peak_gib": 1.0 if method == "vanilla" else 0.8,
        "metrics": {
            "test/score": {"value": score, "count": 400},
            "test/prior": {"value": 0.2, "count": 400},
            "parent/score": {"value": 0.5, "count": 400},
        },
    }


def records_of(rows: list[dict[str, Any]], *, seeds: int = 2, noise: float = 0.003) -> list[dict[str, Any]]:
    """Runs of printed rows, scored as printed give or take some noise; with dense and base-only controls."""
    draw = random.Random(0)
    found = []
    for row in rows:
        base = sum(v for k, v in row["scores"].items() if k != "overall" or len(row["scores"]) == 1)
        base /= 100 * max(1, len([k for k in row["scores"] if k != "overall"]))
        dial = DIALS.get(row["method"])
        dials = {dial: row[dial]} if dial else {}
        dials |= {"extended": True} if row.get("extended") else {}
        dials |= {"trainable": "frozen_shared"} if row.get("frozen_base") else {}
        for seed in range(seeds):
            value = min(1.0, max(0.0, base + draw.gauss(0, noise)))
            found.append(record(row["model"], row["method"], seed, value, **dials))
            if row["method"] == "vanilla":
                found += [
                    record(row["model"], m, seed, value - 0.01, **d) for m, d in (("dense", {}), ("base_only", {}))
                ]
    return found
