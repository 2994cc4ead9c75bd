"""Loggers beside the CSV file, the real ones: what they hold, and that nothing of them stops a run."""

import csv
import json
import logging
import os
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ders.cli.app import UserError
from ders.training.loggers import ForgivingLogger, report
from ders.training.tensorboard_logger import TensorBoardLogger
from ders.training.wandb_logger import WandbLogger


def records(file: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: LevelDB's log format, 32 KiB blocks of checksum, length, type and payload."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a header never crosses blocks
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(held)
            held = b""


def segments(folder: Path) -> list[list[Any]]:
    """Records of each start of a run, the oldest first."""
    return [list(records(file)) for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]


def rows(segment: list[Any]) -> list[dict[str, Any]]:
    """Logged rows, what wandb adds left out but for `_step`."""
    found = []
    for record in segment:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            for item in record.history.item:
                *path, key = item.nested_key or [item.key]
                place = row
                for part in path:
                    place = place.setdefault(part, {})
                place[key] = json.loads(item.value_json)
            found.append({key: value for key, value in row.items() if key not in ("_timestamp", "_runtime", "_wandb")})
    return found


def service() -> int:
    """The process of wandb's service."""
    for status in Path("/proc").glob("[0-9]*/status"):
        text = status.read_text()
        if f"PPid:\t{os.getpid()}\n" in text and "wandb-core" in text and "State:\tZ" not in text:
            return int(status.parent.name)
    raise AssertionError("wandb's service is not running")


def files_elsewhere() -> set[Path]:
    """What wandb keeps in a user's home unless told otherwise."""
    places = [Path.home() / place / "wandb" for place in (".cache", ".config", ".local/share")]
    return {file for place in places for file in place.rglob("*")}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "ders.training.loggers"]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def metrics_of(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (int(row["step"]), key): float(value)
            for row in csv.DictReader(file)
            for key, value in row.items()
            if value and key != "step"
        }


def test_a_run_and_its_continuation(
    run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"WANDB_API_KEY": "key-that-is-planted-here", "MY_TOKEN": "token-that-is-planted-here"}
    for key, value in secrets.items():
        monkeypatch.setenv(key, value)
    before, elsewhere = dict(os.environ), files_elsewhere()
    both = ("logger=wandb_tensorboard", "seed=9")
    run_job(*both, "trainer.max_steps=2")
    folder = run_job(*both, "ckpt_path=last")
    assert dict(os.environ) == before
    assert not warnings_of(caplog)
    assert files_elsewhere() == elsewhere  # all of a run lies in its folder
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(secret.encode() in content for secret in secrets.values()), file
    record = json.loads((folder / "record.json").read_text())
    logged = metrics_of(folder)
    scores = {metric: score["value"] for metric, score in record["metrics"].items()}

    # wandb: one id, the optimizer step as its step, every step once, the configuration as plain data.
    first, second = segments(folder)
    for segment in (first, second):
        run = next(r.run for r in segment if r.WhichOneof("record_type") == "run")
        assert (run.run_id, run.display_name, run.host) == (folder.name, folder.name, "")
        config = {
            item.key: json.loads(item.value_json)
            for r in segment
            for item in [*r.run.config.update, *r.config.update]
            if item.key
        }
        config.pop("_wandb", None)
        assert {**config, "ckpt_path": None, "trainer": None} == {
            **record["config"], "ckpt_path": None, "trainer": None
        }  # fmt: skip
        assert config["trainer"]["max_steps"] == (2 if segment is first else None)
    held = [row for segment in (first, second) for row in rows(segment)]
    assert [row["_step"] for row in held] == [0, 1, 2, 3]
    for (step, key), value in logged.items():
        assert held[step][key] == pytest.approx(value), (step, key)
    assert held[3]["test/accuracy"] == scores["test/accuracy"]
    tables = {
        key: json.loads((next((folder / "wandb").glob("*-run-*/files/" + held[3][key]["path"]))).read_text())
        for key in ("scores", "predictions")
    }
    assert {metric: value for metric, value, _ in tables["scores"]["data"]} == pytest.approx(scores)
    assert {"question", "answer", "prediction"} <= set(tables["predictions"]["columns"])
    assert 24 <= len(tables["predictions"]["data"]) <= 50
    assert held[3]["figures/loss"]["_type"] == held[3]["figures/expert_load"]["_type"] == "image-file"
    files = {file.name for run in (folder / "wandb").glob("offline-run-*") for file in (run / "files").iterdir()}
    assert files == {"media"}  # no metadata, no requirements, no code, no diff, no console

    # TensorBoard: the same values, every step once.
    shown = events(folder)
    drawn = {(e.step, key): e.value for key in shown.Tags()["scalars"] for e in shown.Scalars(key)}
    assert {place: drawn[place] for place in logged} == pytest.approx(logged, rel=1e-6)
    assert {key for _, key in drawn} == {key for _, key in logged} | set(scores)
    assert [e.step for e in shown.Scalars("train/loss")] == [0, 1, 2, 3]
    assert set(shown.Tags()["images"]) == {"figures/loss", "figures/expert_load"}
    texts = {key: shown.Tensors(key)[-1].tensor_proto.string_val[0].decode() for key in shown.Tags()["tensors"]}
    assert "| test/accuracy | " in texts["scores/text_summary"]
    assert "sparsity: 0.9999" in texts["config/text_summary"]
    assert "| --- |" in texts["predictions/text_summary"]


def test_steps_after_the_checkpoint_do_not_appear_twice(tmp_path: Path) -> None:
    for start, values in ((0, [1.0, 2.0, 3.0, 4.0]), (2, [30.0, 40.0])):
        logger = TensorBoardLogger(tmp_path, "x", start=start)
        for step, value in enumerate(values, start):
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(0, 1), (1, 2), (2, 30), (3, 40)]


def test_a_run_outlives_its_logger_and_the_next_job_has_its_own(
    run_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_metrics = WandbLogger.log_metrics

    def killed_at_step_1(self: WandbLogger, metrics: dict[str, float], step: int | None = None) -> None:
        if step == 1:
            os.kill(service(), signal.SIGKILL)
            time.sleep(0.2)
        log_metrics(self, metrics, step)

    with monkeypatch.context() as patched:
        patched.setattr(WandbLogger, "log_metrics", killed_at_step_1)
        hurt = run_job("logger=wandb", "seed=21")
    (warning,) = warnings_of(caplog)
    assert re.match(r"logger wandb: log_metrics failed \(Connection\w+: .*metrics.csv is complete", warning)
    assert json.loads((hurt / "record.json").read_text())["status"] == "finished"
    assert [step for step, key in metrics_of(hurt) if key == "train/loss"] == [0, 1, 2, 3]
    # The next job of a sweep, in the same process.
    healthy = run_job("logger=wandb", "seed=22")
    assert len(warnings_of(caplog)) == 1
    (segment,) = segments(healthy)
    assert [row["_step"] for row in rows(segment)] == [0, 1, 2, 3]
    assert {healthy.name in file.name for file in healthy.glob("wandb/offline-run-*")} == {True}
    assert len(list(hurt.glob("wandb/offline-run-*"))) == 1


def test_a_service_that_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = ForgivingLogger("wandb", WandbLogger(tmp_path, "stopped"), patience=20)
    logger.log_metrics({"loss": 1.0}, 0)
    process = service()
    logger.patience = 1
    os.kill(process, signal.SIGSTOP)
    try:
        logger.close("success")
    finally:
        os.kill(process, signal.SIGKILL)
    assert warnings_of(caplog) == [
        "logger wandb: finalize failed (no answer in 1 s). The run goes on without it; metrics.csv is complete"
    ]


def test_a_service_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wandb.sdk.lib.service.service_process.start", lambda *_: (_ for _ in ()).throw(OSError("no")))
    logger = ForgivingLogger("wandb", WandbLogger(tmp_path, "unborn"))
    before = dict(os.environ)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.close("success")
    (warning,) = warnings_of(caplog)
    assert "log_metrics failed (" in warning
    assert dict(os.environ) == before


def test_no_key_and_no_question_for_one(tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logger = ForgivingLogger("wandb", WandbLogger(tmp_path, "online", mode="online"), patience=20)
    logger.log_metrics({"loss": 1.0}, 0)
    (warning,) = warnings_of(caplog)
    assert "api_key not configured" in warning or "API key" in warning


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, kind in (("wandb", WandbLogger), ("tensorboard", TensorBoardLogger)):
        (tmp_path / name).write_text("a file in the folder's place")
        logger = ForgivingLogger(name, kind(tmp_path, "x"))
        logger.log_metrics({"loss": 1.0}, 0)
        logger.close("failed")
    assert [re.search(r"logger (\w+): log_metrics failed \(\w*Error", w)[1] for w in warnings_of(caplog)] == [
        "wandb", "tensorboard"
    ]  # fmt: skip


# TensorBoard's writing thread dies of it, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    wandb = ForgivingLogger("wandb", WandbLogger(tmp_path, "full"), patience=20)
    wandb.log_metrics({"loss": 1.0}, 0)
    resource.prlimit(service(), resource.RLIMIT_FSIZE, (0, 0))  # the service can write no byte more
    tensorboard = ForgivingLogger("tensorboard", TensorBoardLogger(tmp_path, "full"), patience=5)
    tensorboard.log_metrics({"loss": 1.0}, 0)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", no_space)
    started = time.perf_counter()
    for step in range(1, 20):
        for logger in (wandb, tensorboard):
            logger.log_metrics({"loss": 1.0}, step)
    # wandb's service says nothing of it: the logger looks for itself.
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    for logger in (wandb, tensorboard):
        logger.log_metrics({"loss": 1.0}, 20)
        logger.close("success")
    assert time.perf_counter() - started < 30
    assert sorted(w.split(":")[0] for w in warnings_of(caplog)) == ["logger tensorboard", "logger wandb"]
    assert all("No space left on device" in w for w in warnings_of(caplog))


class Hostile(Logger):
    """Fails, exits or hangs in every call."""

    name = version = None

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.calls = act, 0

    def log_metrics(self, *_: Any) -> None:
        self.calls += 1
        self.act()

    log_hyperparams = save = finalize = log_table = log_figure = abandon = log_metrics


def leave() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("act", "reason"),
    [(lambda: 1 / 0, "ZeroDivisionError"), (leave, "SystemExit: 3"), (lambda: time.sleep(5), "no answer in 0.1 s")],
)
def test_one_warning_and_then_silence(
    act: Callable[[], None], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "figures" / "loss.png")
    hostile = Hostile(act)
    logger = ForgivingLogger("hostile", hostile, patience=0.1)
    logger.log_hyperparams({"a": 1})
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.save()
    report([logger], tmp_path, {"test/accuracy": {"value": 0.5, "count": 2}}, 2)
    logger.finalize("success")
    logger.close("success")
    assert len(warnings_of(caplog)) == 1
    assert reason in warnings_of(caplog)[0]
    assert hostile.calls == 2  # the first call, and `abandon`
    assert logging.getLogger("ders.training.loggers").isEnabledFor(logging.WARNING)


def test_the_first_process_alone_logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from ders.cli.train import _loggers

    config = OmegaConf.create({"logger": {"x": {"_target_": "ders.training.tensorboard_logger.TensorBoardLogger"}}})
    monkeypatch.setenv("LOCAL_RANK", "1")
    with _loggers(config, {}, tmp_path, None) as loggers:
        assert loggers == []
    assert not list(tmp_path.iterdir())


def test_an_unknown_mode_is_told_before_anything_is_read(run_job: Callable[..., Path]) -> None:
    with pytest.raises(
        (UserError, ValueError), match="mode of the wandb logger must be offline or online: got 'cloud'"
    ):
        run_job("logger=wandb", "logger.wandb.mode=cloud")
