import math
from typing import Any

import pytest
from reporting.paper_records import record, records_of

from ders.reporting.comparisons import Comparison, comparisons_of
from ders.reporting.noise import noise_of, t_quantile
from ders.reporting.paper import by_key
from ders.reporting.published import load_published
from ders.reporting.tables import rows_of
from ders.reporting.verdicts import judge, load_claims, verdicts_markdown, word

PUBLISHED = load_published()
CLAIMS = {claim["id"]: claim for claim in load_claims()}


def comparison(expect: str, margin: float, ours: list[float] | None = None, quantity: str | None = None) -> Comparison:
    return Comparison("a against b", expect, margin, quantity, None, 0.1, ours or [], 0.25)


@pytest.mark.parametrize(
    ("expect", "margin", "difference", "noise", "expected"),
    [
        ("not_worse", 1, -0.4, 0.5, "supported"),
        ("not_worse", 1, -0.6, 0.5, "undecided"),
        ("not_worse", 1, -1.6, 0.5, "contradicted"),
        ("better", 0, 0.6, 0.5, "supported"),
        ("better", 0, 0.4, 0.5, "undecided"),
        ("better", 0, -0.6, 0.5, "contradicted"),
        ("worse", 20, -21, 0.5, "supported"),
        ("worse", 20, -20, 0.5, "undecided"),
        ("worse", 20, -3, 0.5, "contradicted"),
        ("smaller", 64, 65, 0.0, "supported"),
        ("smaller", 64, 60, 0.0, "contradicted"),
        ("better", 0, 50.0, float("nan"), "undecided"),
    ],
)
def test_a_word_needs_more_than_the_noise(
    expect: str, margin: float, difference: float, noise: float, expected: str
) -> None:
    assert word(comparison(expect, margin), difference, noise) == expected


def test_noise_is_pooled_over_seeds_and_at_least_one_question() -> None:
    # Sums of squares 2 and 0 over 2 degrees of freedom: s = 1, over root 2 seeds. Of 5%, each of the two has half.
    pair = [comparison("better", 0, [1.0, 3.0]), comparison("better", 0, [5.0, 5.0])]
    assert noise_of(pair) == pytest.approx([6.2053 / 2**0.5] * 2, rel=1e-4)
    assert noise_of(pair[:1]) == pytest.approx([12.7062], rel=1e-4)  # s = root 2, one degree of freedom
    assert noise_of([comparison("better", 0, [1.0, 1.0])]) == [0.25]
    assert math.isnan(noise_of([comparison("better", 0, [1.0])])[0])


def test_what_was_not_run_leaves_the_others_their_level() -> None:
    pair = [comparison("better", 0, [1.0, 3.0]), comparison("better", 0, [5.0, 5.0])]
    assert noise_of([*pair, comparison("better", 0)])[:2] == noise_of(pair)


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [(0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 5, 2.571), (0.05, 10, 2.228), (0.01, 3, 5.841), (0.001, 20, 3.850)],
)
def test_quantiles_are_those_of_printed_tables(level: float, freedom: int, expected: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(expected, abs=5e-4)


def test_counts_are_no_part_of_the_noise_of_scores() -> None:
    found = noise_of([comparison("smaller", 0, [40.0], "model_size"), comparison("better", 0, [1.0, 3.0])])
    assert found == pytest.approx([0, 12.7062], rel=1e-4)  # one comparison is left to chance


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("general_sparsity_0_9_free", "supported"),
        ("general_extremes_harmless", "contradicted"),
        ("layer_65_percent_smaller", "supported"),
        ("medical_extremes_negligible", "contradicted"),
        ("medical_extended_extremes_slight", "contradicted"),
        ("code_1_bit_collapses", "supported"),
        ("code_less_redundant", "supported"),
        ("less_sparse_is_better", "undecided"),
        ("code_upcycling_better", "undecided"),
        ("medical_upcycling_same_or_better", "undecided"),
        ("trainable_base_needed", "supported"),
        ("general_upcycling_same_or_better", "supported"),
        ("low_rank_is_enough", "supported"),
        ("advice_by_base", "contradicted"),
        ("experts_stay_near_base", "undecided"),
        ("not_for_scratch_trained", "undecided"),
    ],
)
def test_what_the_printed_numbers_say(name: str, expected: str) -> None:
    verdict = judge(CLAIMS[name], PUBLISHED, {}, [])
    assert (verdict.printed, verdict.measured) == (expected, "not run")


def test_printed_numbers_are_named() -> None:
    text = judge(CLAIMS["code_upcycling_better"], PUBLISHED, {}, []).printed_because
    assert "ders_sm sparsity 0.9 against vanilla +0.80" in text
    assert "ders_lm rank 4 against vanilla +0.70" in text
    lower = judge(CLAIMS["general_upcycling_same_or_better"], PUBLISHED, {}, []).printed_because
    assert lower.endswith(
        "Lower, though within the margin: MoE-LLaVA-Qwen ders_sm sparsity 0.9999 against vanilla; "
        "MoE-LLaVA-Qwen ders_lm rank 1 against vanilla."
    )
    saved = judge(CLAIMS["cheaper_to_train_and_serve"], PUBLISHED, {}, []).printed_because
    assert all(percent in saved for percent in ("52.7%", "21.2%", "43.8%"))


def ours(*scores: tuple[str, list[float]], **dials: Any) -> dict[Any, Any]:
    records = []
    for method, values in scores:
        given = {"sparsity": 0.9} if method == "ders_sm" else {"rank": 4} if method == "ders_lm" else {}
        records += [record("coder_moe", method, seed, value, **given, **dials) for seed, value in enumerate(values)]
    return by_key(rows_of(records))


def test_our_runs_decide_only_beyond_the_noise() -> None:
    claim = CLAIMS["code_upcycling_better"]
    vanilla = ("vanilla", [0.50, 0.52])
    clear = judge(claim, PUBLISHED, ours(vanilla, ("ders_sm", [0.60, 0.62]), ("ders_lm", [0.60, 0.62])), [])
    assert clear.measured == "supported"
    assert "over 2 seeds, 95% for all 2 together, at least one question (0.25 points)" in clear.measured_because
    within = judge(claim, PUBLISHED, ours(vanilla, ("ders_sm", [0.51, 0.56]), ("ders_lm", [0.52, 0.53])), [])
    assert within.measured == "undecided"
    assert "so few seeds" in within.measured_because
    worse = judge(claim, PUBLISHED, ours(vanilla, ("ders_sm", [0.60, 0.62]), ("ders_lm", [0.40, 0.42])), [])
    assert worse.measured == "contradicted"
    assert "1 supported, 1 contradicted of 2" in worse.measured_because
    partly = judge(claim, PUBLISHED, ours(vanilla, ("ders_sm", [0.60, 0.62])), [])
    assert (partly.measured, "1 not run of 2" in partly.measured_because) == ("undecided", True)
    one = judge(claim, PUBLISHED, ours(("vanilla", [0.5]), ("ders_sm", [0.9]), ("ders_lm", [0.9])), [])
    assert (one.measured, "noise unknown" in one.measured_because) == ("undecided", True)


def test_sizes_are_exact_and_inference_memory_is_not_judged() -> None:
    vanilla, ranked = ("vanilla", [0.5]), ("ders_lm", [0.5])
    one = judge(CLAIMS["cheaper_to_train_and_serve"], PUBLISHED, ours(vanilla, ranked), [])
    assert one.measured == "undecided"
    assert "1 supported, 1 undecided of 2: model size of" in one.measured_because
    assert "44.4% less exactly (supported)" in one.measured_because
    assert one.measured_because.endswith("Inference memory is not measured by our runs.")
    two = judge(
        CLAIMS["cheaper_to_train_and_serve"], PUBLISHED, ours(("vanilla", [0.5] * 2), ("ders_lm", [0.5] * 2)), []
    )
    assert two.measured == "supported"
    assert "2 supported of 2" in two.measured_because
    none = judge(CLAIMS["cheaper_to_train_and_serve"], PUBLISHED, {}, [])
    assert (none.measured, "not measured by our runs" in none.measured_because) == ("not run", True)


def test_runs_without_a_score_decide_nothing() -> None:
    found = ours(("vanilla", [0.5, 0.52]), ("ders_sm", [0.6, 0.62]), ("ders_lm", [0.6, 0.62]))
    for row in found.values():
        for one in row.records:
            one["metrics"] = {}
    verdict = judge(CLAIMS["code_upcycling_better"], PUBLISHED, found, [])
    assert (verdict.measured, "with a score" in verdict.measured_because) == ("not run", True)


def test_drops_are_paired_by_seed() -> None:
    names = {"coder_moe": ((0, 1), (1, 2)), "med_moe_phi": ((0, 1), (0, 1, 2))}
    records = []
    for model, (vanilla, sparse) in names.items():
        records += [record(model, "vanilla", seed, 0.5) for seed in vanilla]
        records += [record(model, "sparsify", seed, 0.4 - 0.1 * seed, sparsity=0.99) for seed in sparse]
    found = comparisons_of(CLAIMS["code_less_redundant"], PUBLISHED, by_key(rows_of(records)))
    # Seed 1 alone is in all four rows: both lose 20 points there.
    assert [c.ours for c in found if "Phi" in c.what] == [pytest.approx([0])]


def test_extended_rows_are_held_against_extended_rows() -> None:
    found = comparisons_of(CLAIMS["advice_by_base"], PUBLISHED, {})
    assert [round(c.printed or 0, 1) for c in found if c.what.startswith("Coder-MoE ders_lm")] == [-0.1, 0.6]
    assert sum(c.what.startswith("Med-MoE") for c in found) == 2
    assert {(c.expect, c.margin) for c in found} == {("better", 0)}


def test_cosines_decide_the_figure() -> None:
    claim = CLAIMS["experts_stay_near_base"]
    assert judge(claim, PUBLISHED, {}, [0.9995, 0.9992]).measured == "supported"
    assert judge(claim, PUBLISHED, {}, [0.9995, 0.9988]).measured == "contradicted"


def test_a_layer_is_what_it_stores() -> None:
    records = [record("moe_llava_qwen", "vanilla", 0, 0.5), record("moe_llava_qwen", "sparsify", 0, 0.5, sparsity=0.9)]
    records[0]["added_params_paper"], records[1]["added_params_paper"] = 300, 40  # 4 FFNs of 100, against 1.4
    (found,) = [
        c
        for c in comparisons_of(CLAIMS["layer_65_percent_smaller"], PUBLISHED, by_key(rows_of(records)))
        if "Qwen" in c.what
    ]
    assert found.ours == pytest.approx([65])


def test_every_claim_compares_rows_that_are_printed() -> None:
    for claim in load_claims():
        for spec in claim.get("compare", []):
            assert comparisons_of({**claim, "compare": [spec]}, PUBLISHED, {}), (claim["id"], spec)
        assert set(claim["tables"]) <= {*PUBLISHED["tables"], "figure_1"}
        assert ("compare" in claim) != ("not_printed" in claim)


def test_the_paper_repeated_without_noise_gives_its_own_verdicts() -> None:
    tables = PUBLISHED["tables"].values()
    repeated = by_key(rows_of(records_of([row for table in tables for row in table["rows"]], noise=0)))
    for name in ("general_extremes_harmless", "code_1_bit_collapses", "medical_extremes_negligible"):
        verdict = judge(CLAIMS[name], PUBLISHED, repeated, [])
        assert verdict.measured == verdict.printed


def test_the_text_has_both_verdicts() -> None:
    text = verdicts_markdown([judge(CLAIMS["code_1_bit_collapses"], PUBLISHED, {}, [])], heading="Claims:")
    assert text.startswith(
        "Claims:\n\n- With a single bit a weight in its deltas, the code model no longer solves its problems. (Fig"
    )
    assert "  - printed: **supported**. 1 supported of 1: Coder-MoE quantize bits 1 against vanilla -52.40." in text
    assert "  - ours: **not run**." in text
