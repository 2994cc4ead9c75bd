"""How many programs pass, of several models: a table from the records that evaluations kept."""

from typing import Any

from ders.reporting.tables import mib, pipes


def programs_markdown(records: dict[str, dict[str, Any]]) -> str:
    """A line per model, in the order of their names; what all share stands above.

    Args:
        records: by the name of a line.
    """
    first = next(iter(records.values()))["result"]
    commits = sorted({record["commit"][:10] for record in records.values()})
    lines = [["", "pass@1", "95 % interval", "passed", "timed out", "stored", "computed in"]]
    lines.append(["---", *["---:"] * 5, "---"])
    for name, record in sorted(records.items()):
        found = record["result"]
        low, high = 100 * found["pass@1_low"], 100 * found["pass@1_high"]
        counts = [f"{found['num_passed']} of {found['num_problems']}", str(found["num_timed_out"])]
        size = mib(found["stored_bytes"])
        lines.append([name, f"{100 * found['pass@1']:.1f}", f"{low:.1f} to {high:.1f}", *counts, size, found["dtype"]])
    how = f"greedy, prompt as {first['prompt']}, at most {first['max_new_tokens']} new tokens"
    return f"**{first['evaluation']}**, {how}; commit {', '.join(commits)}.\n\n{pipes(lines)}\n"


def differing_dials(record: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """By which dials a record was made that are not these: lines of one table must not differ in them."""
    dials = ("prompt", "max_new_tokens", "batch_size", "time_limit", "num_problems")
    return [dial for dial in dials if record["config"]["evaluation"][dial] != options[dial]]
