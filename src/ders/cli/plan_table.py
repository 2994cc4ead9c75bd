"""The numbers of a plan as a table for people."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

_COUNTS = {
    "total_params": "total",
    "added_params": "added",
    "added_params_universal": "  of which universal FFNs",
    "added_params_paper": "added as the paper counts",
    "active_params": "active for a token",
    "trainable_params": "trainable",
}
_STRATEGIES = {
    "ddp": "ZeRO 0, as DDP",
    "zero_1": "ZeRO 1",
    "zero_1_offload": "ZeRO 1, offload",
    "zero_2": "ZeRO 2",
    "zero_2_offload": "ZeRO 2, offload",
    "zero_3": "ZeRO 3",
    "zero_3_offload": "ZeRO 3, offload",
}


def print_table(result: dict[str, Any]) -> None:
    """Columns: the dense model, its vanilla form, the one that was asked for."""
    columns = result["columns"]
    table = Table(title=_title(result), title_justify="left", caption=_caption(result), caption_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")

    def row(label: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *(value(column) for column in columns.values()))

    table.add_row("[bold]parameters")
    for key, label in _COUNTS.items():
        row(label, lambda column, key=key: count(column[key]))  # type: ignore[misc]
    table.add_section()
    row("[bold]stored", lambda column: size(column["stored_bytes"]))
    table.add_section()
    table.add_row(f"[bold]training, a GPU of {result['gpus']}")
    for key, label in _STRATEGIES.items():
        row(label, lambda column, key=key: size(column["state_bytes"].get(key, {}).get("gpu")))  # type: ignore[misc]
    row("activations (estimate)", lambda column: size(column["activation_bytes"]))
    table.add_section()
    table.add_row("[bold]a decoded token")
    row("weights read", lambda column: size(column["decode_bytes_per_token"]))
    row("FLOPs", lambda column: count(column["flops_per_token"]))
    # A pipe has no width: wide enough for four columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _title(result: dict[str, Any]) -> str:
    title = f"{result['model']}, {result['method']}"
    if result["compression"]:
        title += f" + {result['compression']}"
    if result["setting"]:
        dials = " ".join(f"{dial}={value}" for dial, value in result["setting"].items())
        title += f", {dials} to fit {result['budget_gib']} GiB"
    return title


def _caption(result: dict[str, Any]) -> str:
    return (
        f"scale {result['scale']}, {result['dtype']}, trainable={result['trainable']}, {result['tokens_per_gpu']:,} "
        f"tokens per GPU, batch {result['batch']}.\nTraining: weights in bf16, master weights "
        "and moments of AdamW in fp32 (DeepSpeed's mixed precision); activations apart."
    )


def count(value: float | None) -> str:
    """`1,234`, `0.26 M`, `2.52 B`; – where there is none."""
    if value is None:
        return "–"
    for unit, scale, least in (("T", 1e12, 1e12), ("B", 1e9, 1e8), ("M", 1e6, 1e5)):
        if value >= least:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as KiB, MiB or GiB; – where there is none."""
    if value is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= scale / 10:
            return f"{value / scale:,.2f} {unit}"
    return f"{value / 2**10:,.2f} KiB"
