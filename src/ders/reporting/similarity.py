"""How alike experts stay: cosines and sizes of deltas against how fast and how long was trained."""

from statistics import mean
from typing import Any

from ders.reporting.identity import digest, identity
from ders.reporting.tables import Row, caption, nats, percent, pipes, score_of


def similarity_markdown(rows: list[Row], kept: dict[str, Any], title: str, command: str) -> str:
    """The table of a claim on similarity, a line per learning rate and number of steps.

    Args:
        kept: by run folder's name, what was kept of its analysis: cosines among an FFN and its experts, and norms of
            deltas over those of their base, of the first and the last MoE layer.
    """
    records = [record for row in rows for record in row.records]
    score = score_of(records).metric
    # Distances: cosines this near to 1 would all print alike.
    away = ["1 − cosine to the FFN, largest", "between experts, largest", "to the FFN, mean"]
    header = ["learning rate", "steps", *away, "largest delta, % of base", score, "seeds"]
    lines = [header, ["---:"] * len(header)]
    for row in sorted(rows, key=_trained):
        found = [kept[name] for name in _folders(row) if name in kept]
        if not found:
            continue
        matrices = [matrix for one in found for layer in one["layers"].values() for matrix in layer.values()]
        to_base = [cosine for matrix in matrices for cosine in matrix[0][1:]]
        between = [matrix[i][j] for matrix in matrices for i in range(1, len(matrix)) for j in range(1, i)]
        ratios = [ratio for one in found for layer in one["ratios"].values() for m in layer.values() for ratio in m]
        metric = f"test/{score}"
        told = (nats if score == "loss" else percent)(row.mean(metric), row.spread(metric))
        rate, steps = _trained(row)
        distances = [f"{1 - cosine:.1e}" for cosine in (min(to_base), min(between), mean(to_base))]
        figures = [*distances, f"{100 * max(ratios):.2f}"]
        lines.append([f"{rate:g}", str(steps), *figures, told, str(len(row.records))])
    return f"{caption(records, title, command)}\n\n{pipes(lines)}\n"


def _trained(row: Row) -> tuple[float, int]:
    stage = row.records[0]["config"]["stage"]["moe"]
    return stage["optimizer"]["lr"], stage["max_steps"] or 0


def _folders(row: Row) -> list[str]:
    return [f"{record['method']}-{digest(identity(record['config']))}" for record in row.records]
