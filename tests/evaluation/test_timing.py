"""Pairing, against a clock that tells exactly what each run is made to take."""

import pytest

from ders.evaluation.options import Options, Shares
from ders.evaluation.timing import Run, Sample, Series, Variant, cpu_stopwatch, paired, spread


class Machine:
    """Runs that advance a clock by what they take, on a machine that gets slower all the time."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.order = 0.0, drift, []

    def clock(self) -> float:
        return self.now

    def taking(self, name: str, seconds: float) -> Run:
        def run() -> None:
            self.order.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return run

    def stopwatch(self, run: Run, repeats: int) -> Sample:
        started = self.now
        for _ in range(repeats):
            run()
        wall = (self.now - started) / repeats
        return Sample(wall, 2 * wall)


def test_every_variant_stands_between_two_runs_of_the_reference() -> None:
    machine = Machine()
    variants = [Variant("a", machine.taking("a", 2.0)), Variant("b", machine.taking("b", 3.0))]
    base, series = paired(machine.taking("dense", 1.0), variants, machine.stopwatch, 0.0, clock=machine.clock)
    rounds = ["dense", "a", "dense", "b", "dense"]
    assert machine.order[3:] == rounds * 3  # after one run each to warm up
    assert series["a"].to_reference == [2, 2, 2]
    assert series["b"].to_reference == [3, 3, 3]
    assert (base.wall, series["b"].wall, series["b"].cpu) == (1, 3, 6)


def test_a_drifting_machine_does_not_move_the_ratios() -> None:
    machine = Machine(drift=1e-3)
    variants = [Variant(name, machine.taking(name, 1.5)) for name in "abcdef"]
    base, series = paired(machine.taking("dense", 1.0), variants, machine.stopwatch, 200.0, clock=machine.clock)
    assert base.samples[-1].wall > 1.1 * base.samples[0].wall
    for one in series.values():
        assert one.to_reference == pytest.approx([1.5] * len(one.to_reference), rel=2e-3)


def test_the_budget_decides_the_rounds() -> None:
    machine = Machine()
    variants = [Variant("a", machine.taking("a", 2.0))]
    _, series = paired(machine.taking("dense", 1.0), variants, machine.stopwatch, 41.0, clock=machine.clock)
    assert len(series["a"].samples) == 10  # 4 seconds a round
    assert machine.now == 1 + 2 + 40


def test_short_runs_are_repeated_within_a_sample() -> None:
    machine = Machine()
    variants = [Variant("a", machine.taking("a", 4e-3))]
    paired(machine.taking("dense", 1e-3), variants, machine.stopwatch, 0.0, clock=machine.clock)
    assert machine.order[4 : 4 + 12] == ["dense"] * 5 + ["a"] * 2 + ["dense"] * 5


def test_who_leaves_early() -> None:
    machine = Machine()
    variants = [
        Variant("fast", machine.taking("fast", 2.0), peer=True),
        Variant("near", machine.taking("near", 2.4), peer=True),
        Variant("slow", machine.taking("slow", 2.6), peer=True),
        Variant("few", machine.taking("few", 50.0), rounds=3),
        Variant("mine", machine.taking("mine", 40.0)),
    ]
    _, series = paired(machine.taking("dense", 1.0), variants, machine.stopwatch, 500.0, clock=machine.clock)
    counts = {name: len(one.samples) for name, one in series.items()}
    assert (counts["slow"], counts["few"]) == (2, 3)
    assert counts["fast"] == counts["near"] == counts["mine"] > 3


def test_a_real_stopwatch() -> None:
    sample = cpu_stopwatch(lambda: sum(range(10**5)), 3)
    assert 0 < sample.cpu < 10 * sample.wall < 1


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3, "low": 2, "high": 4}
    assert spread([1.23456]) == dict.fromkeys(("median", "low", "high"), 1.235)
    assert Series().samples == []


def test_shares_of_the_time() -> None:
    machine = Machine()
    shares = Shares(100.0, [1.0, 3.0, 1.0], machine.clock)
    assert shares.take() == 20
    machine.now = 40.0  # the first part took twice as long
    assert shares.take() == 45
    machine.now = 300.0
    assert shares.take() == 0


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"grid": "half"}, "grid must be one of default, full: got 'half'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda: got 'tpu'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16: got 'int8'"),
        ({"budget_seconds": 0}, "budget_seconds must be positive: got 0"),
        ({"budget_seconds": "long"}, "budget_seconds must be a number of seconds: got 'long'"),
        ({"budget_seconds": True}, "budget_seconds must be a number of seconds: got True"),
    ],
)
def test_bad_dials(dials: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**dials)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Options().chosen_device == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        Options(device="cuda")
