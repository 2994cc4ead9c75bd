"""Claims as lists of jobs, and those that repeat the paper's tables."""

from typing import Any

import pytest
import yaml
from conftest import ROOT

from ders.cli.app import composed, prepare_hydra, to_plain
from ders.cli.jobs import job_config
from ders.cli.sweeper import expand
from ders.cli.tables import read_claim
from ders.reporting.paper import DIALS, Key, measured_key, printed_key
from ders.reporting.published import load_published
from ders.reporting.tables import Row

CLAIMS = sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))
PAPER = [name for name in CLAIMS if read_claim(name)["published"]]


def jobs_of(name: str) -> list[dict[str, Any]]:
    claim = read_claim(name)
    jobs = expand(claim["runs"], common=claim["common"])
    return [{key: yaml.safe_load(value) for key, value in (o.split("=", 1) for o in job)} for job in jobs]


def test_common_comes_first_and_yields() -> None:
    runs = ["method=a", "method=b seed=7"]
    assert expand(runs, common="model=x,y seed=0") == [
        ["model=x", "seed=0", "method=a"],
        ["model=y", "seed=0", "method=a"],
        ["model=x", "method=b", "seed=7"],
        ["model=y", "method=b", "seed=7"],
    ]
    assert expand(runs, ["seed=1", "model=z", "scale=paper"], "model=x,y seed=0") == [
        ["seed=1", "model=z", "scale=paper", "method=a"],
        ["seed=1", "model=z", "scale=paper", "method=b"],
    ]


def test_the_papers_tables_are_all_repeated_once() -> None:
    repeated = [table for name in PAPER for table in read_claim(name)["published"]]
    assert sorted(repeated) == sorted([*load_published()["tables"], "figure_1"])


@pytest.mark.parametrize("name", [name for name in PAPER if name != "figure_1"])
def test_every_printed_row_is_a_job(name: str) -> None:
    keys = set()
    for job in jobs_of(name):
        method = job.get("compression", job["method"])
        dial = job[DIALS[method]] if method in DIALS else None
        extended, frozen = job.get("extended", False), job.get("trainable") == "frozen_shared"
        keys.add((Key(job["model"], method, dial, extended, frozen), job["seed"]))
    tables = load_published()["tables"]
    printed = {printed_key(row) for table in read_claim(name)["published"] for row in tables[table]["rows"]}
    assert {(key, seed) for key in printed for seed in (0, 1)} <= keys
    models = {key.model for key in printed}
    assert {(Key(model, "dense"), 0) for model in models} <= keys
    assert {(Key(model, "vanilla"), 0) for model in models} <= keys


@pytest.mark.parametrize("name", ["table_2", "s7", "s11", "table_5"])
def test_composed_jobs_have_the_keys_of_the_printed_rows(name: str) -> None:
    """Of each method the first job, as train.py composes it: its record will be found beside the row it repeats."""
    prepare_hydra()
    claim = read_claim(name)
    first: dict[tuple[str, str, str], dict[str, Any]] = {}
    for job in expand(claim["runs"], common=claim["common"]):
        given = dict(override.split("=", 1) for override in job)
        kind = (given["method"], given.get("compression", ""), given.get("trainable", ""))
        first.setdefault(kind, to_plain(job_config(job)))
    found = set()
    for config in first.values():
        method = config["method"]["name"]
        found.add(measured_key(Row(method, {}, ({"config": config, "method": method},))))
    assert len(found) == len(first)
    model = claim["common"].split()[0].removeprefix("model=").split(",")[0]
    tables = load_published()["tables"]
    printed = [printed_key(row) for table in claim["published"] for row in tables[table]["rows"]]
    repeated = {(key.method, key.frozen_base): key for key in reversed(printed) if key.model == model}
    assert set(repeated.values()) <= found
    assert {(key.method, key.frozen_base) for key in found - set(printed)} <= {
        ("dense", False),
        ("vanilla", False),
        ("base_only", False),
        ("ders_sm", True),
    }


def test_dense_controls_have_no_upcycling() -> None:
    assert all("upcycling" not in job for name in PAPER for job in jobs_of(name) if job["method"] == "dense")


@pytest.mark.parametrize(
    "job",
    [
        ["method=ders_sm", "seed=3", "sparsity=0.99"],
        ["seed=1", "method=vanilla", "compression=quantize", "bits=4", "output_dir=/tmp/x"],
        ["method=ders_lm", "upcycling.layers=[1,3]", "rank=2", "++stage.moe.max_steps=3"],
        ["schedule@stage.moe.schedule=linear", "seed=2"],
    ],
)
def test_a_job_is_what_the_command_line_composes(job: list[str]) -> None:
    prepare_hydra()
    assert to_plain(job_config(job)) == to_plain(composed("train", job))
    assert to_plain(job_config([*job, "trainable=all"]))["trainable"] == "all"
    assert to_plain(job_config(job))["trainable"] == "paper"  # what is kept was not changed


def test_a_job_with_an_unknown_dial_fails() -> None:
    prepare_hydra()
    with pytest.raises(Exception, match="nonsense"):
        job_config(["method=dense", "nonsense=1"])
