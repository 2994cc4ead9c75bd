import math
from pathlib import Path
from typing import Any

import pytest
from reporting.paper_records import record, records_of

from ders.accounting.formula import Architecture
from ders.reporting.paper import Key, by_key, lines_of, measured_key, paired, printed_key, printed_score
from ders.reporting.paper_figures import dials_of, draw_paper
from ders.reporting.paper_notes import computed, counted, misprints_of
from ders.reporting.paper_table import as_data, paper_markdown, points
from ders.reporting.published import load_published
from ders.reporting.tables import rows_of

PUBLISHED = load_published()
STABLELM = Architecture(((5632, 2048), (5632, 2048), (2048, 5632)), 0, 12, 4, 8192)
CODER = Architecture(((5504, 2048), (5504, 2048), (2048, 5504)), 0, 24, 4, 16400, universal=True)


def rows(table: str) -> list[dict[str, Any]]:
    return PUBLISHED["tables"][table]["rows"]


def formula(row: dict[str, Any]) -> Any:
    return computed(row, {"moe_llava_stablelm": STABLELM, "coder_moe": CODER}[row["model"]])


def test_every_printed_row_finds_the_run_that_repeats_it() -> None:
    for name, table in PUBLISHED["tables"].items():
        lines = [line for line in lines_of([name], PUBLISHED, rows_of(records_of(table["rows"]))) if line.printed]
        assert len(lines) == len(table["rows"]), name
        for line in lines:
            assert line.ours, (name, line.key)
            assert measured_key(line.ours) == line.key == printed_key(line.printed or {})


def test_frozen_extended_and_compressed_rows_are_told_apart() -> None:
    records = [
        record("coder_moe", "ders_sm", 0, 0.5, sparsity=0.9),
        record("coder_moe", "ders_sm", 0, 0.5, sparsity=0.9, trainable="frozen_shared"),
        record("coder_moe", "ders_sm", 0, 0.5, sparsity=0.9, extended=True),
        record("coder_moe", "sparsify", 0, 0.5, sparsity=0.9),
        record("coder_moe", "vanilla", 0, 0.5, extended=False),
    ]
    assert list(by_key(rows_of(records))) == [
        Key("coder_moe", "ders_sm", 0.9),
        Key("coder_moe", "ders_sm", 0.9, frozen_base=True),
        Key("coder_moe", "ders_sm", 0.9, extended=True),
        Key("coder_moe", "sparsify", 0.9),
        Key("coder_moe", "vanilla"),
    ]


def test_differences_are_paired_by_seed() -> None:
    ours = [record("m", "ders_lm", s, v, rank=1) for s, v in ((0, 0.6), (1, 0.8), (2, 0.9))]
    vanilla = [record("m", "vanilla", s, v) for s, v in ((1, 0.7), (0, 0.65))]
    row, other = rows_of(ours + vanilla)
    assert paired(row, other) == pytest.approx([-5, 10])


def test_a_score_is_the_score_before_it_is_the_accuracy() -> None:
    one = record("m", "dense", 0, 0.25)
    one["metrics"]["test/accuracy"] = {"value": 0.5, "count": 10}
    (row,) = rows_of([one])
    assert paired(row, row) == [0]
    del one["metrics"]["test/score"]
    vanilla = record("m", "vanilla", 0, 0.25)
    assert paired(row, rows_of([vanilla])[0]) == [25]


def test_a_table_without_overall_has_the_plain_mean() -> None:
    assert printed_score({"scores": {"a": 1.0, "b": 4.0}}) == 2.5
    assert printed_score({"scores": {"a": 1.0, "b": 4.0, "overall": 9.0}}) == 9.0


def test_vanilla_of_a_table_that_prints_none_comes_from_another() -> None:
    first = lines_of(["table_4a"], PUBLISHED, [])[0]
    assert first.key == Key("coder_moe", "ders_sm", 0.9999)
    assert first.printed_less_vanilla == pytest.approx(59.6 - 60.2)


def test_the_table_has_three_groups_and_the_controls() -> None:
    records = records_of(rows("table_1")[:3], noise=0)
    lines = [x for x in lines_of(["table_1"], PUBLISHED, rows_of(records)) if x.key.model == "moe_llava_stablelm"]
    text = paper_markdown(lines, PUBLISHED, formula, "A title", "python train.py experiments=table_1")
    # The mean of the eight cells: 57.6625 for DeRS-SM, 57.3625 for vanilla.
    assert "| 0.26M | 57.7 | +0.3 | 0.26M | 1,692 | 57.7 ± 0.0 | +0.30 ± 0.00 | 2 |" in text
    assert "| MoE-LLaVA-StableLM | vanilla | 1.24B<sup>1</sup> | 57.4 |  | 1.25B |" in text
    assert "*dense, the same training*" in text
    assert "|  | *question-only prior* |  |  |  |  |  | 20.0 |  |  |" in text
    assert "Added parameters: 2 of 3 cells as printed, 1 misprint listed." in text
    assert "- <sup>1</sup> added parameters: printed 1.24B, computed 1.25B." in text
    assert "another task" in text
    assert "commit cccccccccc" in text


def test_rows_that_were_not_run_are_dashes() -> None:
    lines = lines_of(["table_3"], PUBLISHED, rows_of([record("coder_moe", "vanilla", 0, 0.6)]))
    text = paper_markdown(lines, PUBLISHED, formula, "A", "b")
    assert "|  | ders_lm rank 4 | 0.81B + 9.09M | 60.9 | +0.7 | 0.81B + 9.09M | – | – | – | – |" in text
    assert as_data(lines[1], formula)["ours"] is None


@pytest.mark.parametrize("tables", [["table_2"], ["table_4a", "table_4b"], ["table_s15"]])
def test_rows_without_a_score_are_dashes_and_draw_nothing(tables: list[str], tmp_path: Path) -> None:
    records = records_of([row for table in tables for row in rows(table)] + rows("table_3")[:1])
    for one in records:
        one["metrics"] = {}
    lines = lines_of(tables, PUBLISHED, rows_of(records))
    assert draw_paper(lines, "A title", tmp_path / "a.png").exists()
    text = paper_markdown(lines, PUBLISHED, lambda row: None, "A", "b")
    assert "| 500 + 1,192 | – | – | 2 |" in text


def test_tables_say_what_their_counts_and_memory_are() -> None:
    def text(table: str) -> str:
        lines = lines_of([table], PUBLISHED, rows_of(records_of(rows(table))))
        return paper_markdown(lines, PUBLISHED, lambda row: None, "A", "b")

    assert "Ours counts routers and the biases" in text("table_s17")
    assert "Ours counts routers" not in text("table_3")
    assert "resident size of the whole process" in text("table_6")
    assert "resident" not in text("table_3")


def test_a_count_that_no_misprint_explains_is_told() -> None:
    lines = lines_of(["table_3"], PUBLISHED, [])
    assert counted(lines, PUBLISHED, formula) == "Added parameters: 5 of 6 cells as printed, 1 misprint listed."
    wrong = counted(lines, {**PUBLISHED, "misprints": []}, formula)
    assert wrong == "Added parameters: 5 of 6 cells as printed, 0 misprints listed, 1 unexplained."


def test_misprints_are_found_by_cell_and_by_value() -> None:
    def found(table: str, place: int) -> list[str]:
        return [misprint["id"] for misprint, _ in misprints_of(table, rows(table)[place], PUBLISHED)]

    assert found("table_5", 0) == ["table_5_mbpp"]
    assert found("table_5", 1) == []
    assert "rad_closed_82_3" in found("table_2", 0)
    assert "rad_closed_82_3" not in found("table_2", 1)


def test_points() -> None:
    assert (points([]), points([1.0]), points([0.0, 1.0])) == ("", "+1.00", "+0.50 ± 0.71")
    assert points([50.0, 51.0], sign=False) == f"50.5 ± {math.sqrt(0.5):.1f}"


@pytest.mark.parametrize(
    ("tables", "dials"),
    [(["table_1"], []), (["table_4a", "table_4b"], ["ders_sm", "ders_lm"]), (["table_s10"], ["quantize"])],
)
def test_figures(tables: list[str], dials: list[str], tmp_path: Path) -> None:
    lines = lines_of(tables, PUBLISHED, rows_of(records_of([row for table in tables for row in rows(table)])))
    assert dials_of(lines) == dials
    assert draw_paper(lines, "A title", tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
