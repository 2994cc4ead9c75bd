"""What all verdicts rest on: which runs, and which cosines."""

import json
from pathlib import Path

from reporting.paper_records import record

from ders.cli.papers import rows_behind, smallest_cosines, write_verdicts
from ders.reporting.paper import measured_key
from ders.reporting.published import load_published
from ders.reporting.tables import rows_of
from ders.reporting.verdicts import judge, load_claims


def test_the_heading_tells_scale_and_seeds(tmp_path: Path) -> None:
    verdicts = [judge(claim, load_published(), {}, []) for claim in load_claims()]
    records = [record("coder_moe", "vanilla", seed, 0.5) for seed in range(2)]
    records += [record("something_else", "vanilla", seed, 0.5) for seed in range(5)]

    def heading(*given: dict) -> str:  # type: ignore[type-arg]
        write_verdicts(verdicts, tmp_path / "claims.md", rows_of(list(given)))
        return (tmp_path / "claims.md").read_text().split("\n- ")[0]

    assert "Ours was run at scale tiny, with 2 seeds a row. At scale tiny the models and the data are" in heading(
        *records
    )
    full = heading(record("coder_moe", "vanilla", 0, 0.5) | {"scale": "paper"})
    assert "Ours was run at scale paper, with 1 seed a row.\n" in full
    assert "stand-ins" not in full
    assert "Of ours nothing was run yet." in heading()
    assert "Of printed scores that is 1 point" in heading()


def test_only_cosines_with_the_parent_of_listed_runs_count(tmp_path: Path) -> None:
    (tmp_path / "similarity").mkdir()
    for name, base, cosine in (("a", "parent", 0.9995), ("b", "mean", 0.5), ("gone", "parent", 0.4)):
        kept = {"base": base, "layers": {"0": {"fc1": [[1.0, cosine], [cosine, 1.0]]}}}
        (tmp_path / "similarity" / f"{name}.json").write_text(json.dumps(kept))
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert smallest_cosines(tmp_path) == [0.9995]


def test_a_run_of_two_claims_counts_once_and_other_claims_do_not(tmp_path: Path) -> None:
    claims = {"a": {"published": ["table_3"]}, "b": {"published": ["table_6"]}, "c": {"published": []}}
    for name, model in (("a", "coder_moe"), ("b", "coder_moe"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{model}.json").write_text(json.dumps(record(model, "vanilla", 0, 0.5)))
    (row,) = rows_behind(claims, tmp_path)
    assert (measured_key(row).model, len(row.records)) == ("coder_moe", 1)
