"""Tables of what compares processes, and of what is done to them."""

from typing import Any

from ders.reporting.tables import pipes

Record = dict[str, Any]


def goals_table(record: Record) -> str:
    """Where it was measured, then each goal with its figure, met or missed."""
    hardware, goals = record["hardware"], record["goals"]
    met = sum(goal["met"] for goal in goals)
    lines = [[f"goal ({met} of {len(goals)} met)", "figure", "limit", ""], ["---", "---:", "---:", "---"]]
    for goal in goals:
        verdict = "met" if goal["met"] else "**missed**"
        lines.append([goal["goal"], f"{goal['figure']:.3g}", f"{goal['limit']:.3g}", verdict])
    return (
        f"`{record['command']}`, commit {(record['commit'] or 'unknown')[:10]}, {hardware['cores']} cores of "
        f"{hardware['cpu']}, {record['seconds']:.0f} s.\n\n{pipes(lines)}"
    )


def equivalence_markdown(record: Record) -> str:
    """Differences of losses and weights: a table per case, a row per method, a column per strategy."""
    parts = [goals_table(record)]
    rows = record["rows"]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        strategies = list(dict.fromkeys(row["strategy"] for row in mine))
        lines = [["", *strategies], ["---", *["---:"] * len(strategies)]]
        for method in dict.fromkeys(row["method"] for row in mine):
            of = {row["strategy"]: row for row in mine if row["method"] == method}
            cells = [f"{of[s]['loss_difference']:.0e} · {of[s]['weights_difference']:.0e}" for s in strategies]
            lines.append([method, *cells])
        beside = "the same strategy's uninterrupted run" if case == "continued" else "one process"
        parts.append(
            f"**{case}**, largest relative difference of a loss · of the weights to {beside}\n\n{pipes(lines)}"
        )
    return "\n\n".join(parts) + "\n"


def memory_markdown(record: Record) -> str:
    """Measured beside planned bytes of a process."""
    lines = [
        ["", "strategy", "trained", "frozen", "measured", "planned", "over planned"],
        ["---", "---", *["---:"] * 5],
    ]
    for row in record["rows"]:
        counts = [f"{row[key] / 1e6:,.1f} M" for key in ("trainable", "frozen")]
        sizes = [f"{row[key] / 1e6:,.0f} MB" for key in ("held_bytes", "planned_bytes")]
        ratio = f"{row['held_bytes'] / row['planned_bytes']:.3f}"
        lines.append([row["method"], row["strategy"], *counts, *sizes, ratio])
    return f"{goals_table(record)}\n\n{pipes(lines)}\n"


def faults_markdown(record: Record) -> str:
    """What was done to each cell, where it went on, and how its end compares."""
    header = ["", "trainer", "kills", "went on from step", "slowest end, s", "losses", "weights", "tolerance"]
    lines = [header, ["---", "---", *["---:"] * 6]]
    for row in record["rows"]:
        stops = ", ".join(map(str, row["continued_from"]))
        stops += f" ({row['started_over']} ended before its kill)" if row["started_over"] else ""
        numbers = [f"{row[key]:.1e}" for key in ("loss_difference", "weights_difference", "tolerance")]
        shown = [str(row["kills"]), stops, f"{row['slowest_end_seconds']:.1f}"]
        lines.append([row["method"], row["trainer"], *shown, *numbers])
    disk = [["", "trainer", "exit code", "last checkpoint intact", "went on from step", "weights"], ["---"] * 6]
    for row in record["disk"]:
        if "not_measured" in row:
            disk.append([row["fault"], row["trainer"], row["not_measured"], "", "", ""])
            continue
        intact = "yes" if row["intact"] else "**no**"
        disk.append(
            [
                row["fault"],
                row["trainer"],
                str(row["exit_code"]),
                intact,
                str(row["continued_from"]),
                f"{row['weights_difference']:.1e}",
            ]
        )
    return (
        f"{goals_table(record)}\n\n**Killed** (SIGKILL to one process, drawn at random), continued, compared with the "
        f"run nothing happened to\n\n{pipes(lines)}\n\n**Disk**\n\n{pipes(disk)}\n"
    )
