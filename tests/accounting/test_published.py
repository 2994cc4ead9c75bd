"""Every number of added parameters that the paper prints, by the rule, from the shapes in the model configs."""

import pytest

from ders.accounting.formula import Architecture
from ders.cli.app import composed, prepare_hydra
from ders.cli.plan_models import PlannedModels
from ders.reporting.published import (
    as_printed,
    cells,
    computed_added,
    describe,
    disagreements,
    load_published,
    misprinted,
    printed,
)

MODELS = (
    "moe_llava_stablelm",
    "moe_llava_qwen",
    "moe_llava_phi",
    "med_moe_stablelm",
    "med_moe_phi",
    "coder_moe",
)
CELLS, AGREE = 196, 181


@pytest.fixture(scope="module")
def architectures() -> dict[str, Architecture]:
    """Read off the models of the configs, built and upcycled on the meta device."""
    prepare_hydra()
    configs = {name: composed("plan", [f"model={name}", "method=vanilla"]) for name in MODELS}
    return {name: Architecture.of(PlannedModels(config).vanilla()) for name, config in configs.items()}


def test_all_cells_but_the_misprints(architectures: dict[str, Architecture]) -> None:
    found = {str(one.cell): one for one in disagreements(architectures)}
    listed = {str(cell) for cell in misprinted()}
    unexpected = [str(found[name]) for name in found.keys() - listed]
    assert not unexpected, "not printed as the rule has it, nor listed as misprints:\n" + "\n".join(unexpected)
    computed = {
        str(cell): f"{computed_added(cell.row, architectures[cell.row['model']])[cell.part]:,} by {describe(cell.row)}"
        for cell in misprinted()
    }
    agreeing = [f"{name}: computed {computed[name]}" for name in listed - found.keys()]
    assert not agreeing, "listed as misprints, and printed as the rule has it:\n" + "\n".join(agreeing)
    assert (len(list(cells())), len(list(cells())) - len(found)) == (CELLS, AGREE)


def test_a_misprint_names_what_the_rule_gives(architectures: dict[str, Architecture]) -> None:
    found = {str(one.cell): one for one in disagreements(architectures)}
    misprints = [m for m in load_published()["misprints"] if any("added" in cell["field"] for cell in m["cells"])]
    by_print = {(m["printed"], m["computed"]) for m in misprints}
    assert {(one.cell.text, as_printed(one.computed, like=one.cell.text)) for one in found.values()} == by_print


@pytest.mark.parametrize("model", MODELS)
def test_another_width_would_show(architectures: dict[str, Architecture], model: str) -> None:
    """The comparison sees a wrong architecture: one whose FFNs are a tenth wider."""
    right = architectures[model]
    wider = Architecture(
        matrices=tuple((rows * 11 // 10, columns) for rows, columns in right.matrices),
        biases=right.biases,
        num_layers=right.num_layers,
        num_experts=right.num_experts,
        router_params=right.router_params,
        universal=right.universal,
    )
    assert len(disagreements({**architectures, model: wider})) > CELLS - AGREE


def test_a_disagreement_tells_all() -> None:
    tiny = Architecture(((10, 10),), 0, 1, 2, 0, universal=True)
    first = disagreements(dict.fromkeys(MODELS, tiny))[0]
    assert str(first) == (
        "table_1 moe_llava_stablelm vanilla field=added_params: printed 1.24B, computed 0.00B (200) by vanilla()"
    )


@pytest.mark.parametrize(
    ("count", "like", "text"),
    [
        (1_245_810_000, "1.24B", "1.25B"),
        (1_245_000_000, "1.24B", "1.25B"),
        (325_030_000, "325M", "325M"),
        (32_860_000, "32.9M", "32.9M"),
        (264_400, "0.26M", "0.26M"),
        (0, "0.42B", "0.00B"),
    ],
)
def test_as_printed(count: int, like: str, text: str) -> None:
    assert as_printed(count, like) == text


def test_parts_of_a_row() -> None:
    architecture = Architecture(((10, 20),), 0, 3, 4, 80, universal=True)
    row = {"method": "ders_lm", "rank": 2, "added_params": {"universal": "1M", "experts": "2M"}}
    assert printed(row) == {"universal": "1M", "experts": "2M", "total": None}
    assert computed_added(row, architecture) == {"universal": 600, "experts": 960, "total": 1560}
    row |= {"extended": True, "added_params": "3M"}
    assert printed(row) == {"universal": None, "experts": None, "total": "3M"}
    assert computed_added(row, architecture) == {"universal": None, "experts": None, "total": 1140}
    assert printed({"added_params": None}) == {"universal": None, "experts": None, "total": None}
