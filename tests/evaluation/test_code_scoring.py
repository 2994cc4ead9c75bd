"""From problems to pass@1: prompts, what is taken of a text, generation that stops by rule, the count."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ders.evaluation import code_scoring
from ders.evaluation.code_options import CodeOptions
from ders.evaluation.code_problems import CodeProblem, HumanEval, HumanEvalPlus
from ders.evaluation.code_prompts import prompt_ids, sanitized, settled
from ders.evaluation.code_scoring import CodeScore, generate_completions, score_code
from ders.evaluation.sandbox import Sandbox
from ders.models import generation
from ders.models.bundle import ModelBundle
from ders.models.generation import generate_texts

PROBLEMS = HumanEval().problems()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each byte: decoding gives the very text."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *signs])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def bundle(tokenizer: Any) -> ModelBundle:
    torch.manual_seed(0)
    shapes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=4096, **shapes)
    return ModelBundle(LlamaForCausalLM(config), tokenizer)


def writes(bundle: ModelBundle, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model write the text of the longest prompt it has one for, token by token; returns the steps taken."""
    tokenizer, steps = bundle.tokenizer, []

    def forward(input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        nonlocal seen
        seen = input_ids if seen is None or input_ids.shape[1] > 1 else torch.cat([seen, input_ids], 1)
        steps.append(1)
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        for row, ids in enumerate(seen.tolist()):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            prompt = next(prompt for prompt in texts if text.startswith(prompt))
            rest = texts[prompt][len(text) - len(prompt) :]
            logits[row, -1, tokenizer(rest[:1])["input_ids"][0] if rest else tokenizer.eos_token_id] = 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    seen = None
    monkeypatch.setattr(bundle.model, "forward", forward)
    return steps


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\n\ndef g():\n    pass\n", "    return 1\n\n\n"),
        ("    return 1\nclass A:\n", "    return 1\n"),
        ("    return 1\nif __name__ == '__main__':\n    f()", "    return 1\n"),
        ("    return 1\nprint(f())\n", "    return 1\n"),
        ("    return 1\n# so\n", "    return 1\n"),
        ("    return 1\n```\nThat is it", "    return 1\n"),
        ("    return 1\n<|endoftext|>def", "    return 1\n"),
        ("    # a comment\n    if x:\n        return 1\n    def g(): pass\n", None),
        ("    define = 1\n\n    return define\n", None),
        ("def f(x):\n    return 1\n", None),  # the first line may be the function itself
        ("", ""),
    ],
)
def test_completions_end_at_a_new_statement(text: str, taken: str | None) -> None:
    assert sanitized("completion", text, "f") == (text if taken is None else taken)
    assert settled("completion", text, "f") is (taken not in (None, text))


def test_magicoder_ends_at_the_fence() -> None:
    text = "\n    return 1\n\ndef helper():\n    pass\n```\nThis ```works```"
    assert sanitized("magicoder", text, "f") == "\n    return 1\n\ndef helper():\n    pass\n"
    assert settled("magicoder", text, "f")
    assert not settled("magicoder", "\n    return 1\n``", "f")


@pytest.mark.parametrize(
    ("text", "block", "done"),
    [
        ("Here:\n```python\ndef f(x):\n    return 1\n```\nIt works.", "def f(x):\n    return 1", True),
        ("```\nf(1)\n```\nThen:\n```py\nimport re\ndef f(x):\n    pass\n```", "import re\ndef f(x):\n    pass", True),
        ("```python\n    return 1\n```\n", "    return 1", False),
        ("```python\ndef f(x):\n    return 1\n", "def f(x):\n    return 1\n", False),
        ("def f(x):\n    return 1", "def f(x):\n    return 1", False),
        ("```python\ndef fast():\n    pass\n```", "def fast():\n    pass", False),
    ],
)
def test_chats_are_read_by_their_blocks(text: str, block: str, done: bool) -> None:
    assert sanitized("chat", text, "f") == f"\n{block}\n"
    assert settled("chat", text, "f") is done


def test_prompts(tokenizer: Any) -> None:
    problem = PROBLEMS[0]
    asked = f"Write a solution to the following problem:\n```python\n{problem.prompt.strip()}\n```"

    def text(prompt: str) -> str:
        return tokenizer.decode(prompt_ids(tokenizer, prompt, problem), skip_special_tokens=False)

    assert text("completion") == f"<s>{problem.prompt.rstrip()}"
    start = "<s>You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
    whole = text("magicoder")
    assert whole.startswith(
        f"{start}responses to user instructions.\n\n@@ Instruction\n{asked}\n\n@@ Response\n```python"
    )
    assert whole.endswith(f"@@ Response\n```python\n{problem.prompt.strip()}")
    with pytest.raises(ValueError, match="no chat template: use"):
        text("chat")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    assert text("chat") == f"<user>{asked}<answer>"
    tokenizer.chat_template = None


@pytest.mark.parametrize("width", [5, 32])
def test_texts_are_greedy_and_whole(bundle: ModelBundle, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_ROUND", width)
    prompts = [bundle.tokenizer(text)["input_ids"] for text in ("def f(x):\n", "x", "y = 1")]
    with torch.no_grad():
        bundle.model.lm_head.weight[bundle.tokenizer.eos_token_id] = 0  # it would end them all after four tokens
    written = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):  # the oracle: no cache, no padding
            ids.append(int(bundle.model(torch.tensor([ids])).logits[0, -1].argmax()))
        written.append(ids[len(prompt) :])
    # One ends early, by a token that the others do not write, and their caches must stay theirs.
    bundle.model.generation_config.eos_token_id = end = next(
        token for token in written[0][:5] if token not in written[1] + written[2]
    )
    written[0] = written[0][: written[0].index(end)]
    assert [len(new) < 5 for new in written] == [True, False, False]
    together = generate_texts(bundle.model, bundle.tokenizer, prompts, 12, lambda row, text: False)
    for prompt, new, text in zip(prompts, written, together, strict=True):
        whole = bundle.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
        assert text == whole[len(bundle.tokenizer.decode(prompt)) :]
    assert bundle.model.training


def test_spaces_at_the_start_are_kept_where_decoding_drops_them() -> None:
    from tokenizers import decoders

    vocabulary = {"<pad>": 0, "</s>": 1, "▁▁▁▁return": 2, "▁1": 3, "f:": 4, "<unk>": 5}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.decoder = decoders.Metaspace()
    slow = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    from ders.models.generation import _continuation

    assert _continuation(slow, [4], [2, 3]) == "    return 1"


@pytest.mark.parametrize("width", [7, 32])
def test_generation_ends_where_the_text_is_settled(
    bundle: ModelBundle, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_ROUND", width)
    problems = [
        CodeProblem("a", 'def f(x):\n    """One."""\n', "f", "", ""),
        CodeProblem("b", 'def g(x):\n    """The second, longer."""\n', "g", "", ""),
        CodeProblem("c", 'def h(x):\n    """Three."""\n', "h", "", ""),
    ]
    written = {
        problems[0].prompt.rstrip(): "\n    return 1\n",
        problems[1].prompt.rstrip(): "\n    return 2\n\ndef more():\n" + "    x = 1\n" * 50,
        problems[2].prompt.rstrip(): "\n    return 3\n# and\n" + "    y = 1\n" * 50,
    }
    steps = writes(bundle, written, monkeypatch)
    options = CodeOptions(max_new_tokens=300, batch_size=2)
    assert generate_completions(bundle, problems, options) == [
        "\n    return 1\n", "\n    return 2\n\n", "\n    return 3\n",
    ]  # fmt: skip
    assert len(steps) < 60
    assert code_scoring.generate_completions(bundle, problems, CodeOptions(max_new_tokens=8)) == [
        "\n    ret", "\n    ret", "\n    ret",
    ]  # fmt: skip


CHOSEN = [problem for number, problem in enumerate(PROBLEMS) if number % 10 == 0 or number in (32, 33, 38, 53)]


def verdicts(sandbox: Sandbox, problems: list[CodeProblem], *, canonical: bool) -> list[bool]:
    def judged(problem: CodeProblem) -> bool:
        program = problem.prompt + (problem.canonical if canonical else "    pass\n")
        return sandbox.judge(program, problem.entry_point, problem.prompt, problem.check).passed

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judged, problems))


@pytest.mark.usefixtures("sandbox")
def test_canonical_solutions_pass_and_empty_ones_do_not() -> None:
    careful = Sandbox(10.0)
    assert len(PROBLEMS) == 164
    assert all(verdicts(careful, CHOSEN, canonical=True))
    assert not any(verdicts(careful, CHOSEN, canonical=False))


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_all_canonical_solutions_pass_and_no_empty_one_does() -> None:
    careful = Sandbox(10.0)
    assert sum(verdicts(careful, PROBLEMS, canonical=True)) == 164
    assert sum(verdicts(careful, PROBLEMS, canonical=False)) == 0


def test_scores_count_what_passed(bundle: ModelBundle, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"HumanEval/0": PROBLEMS[0].canonical, "HumanEval/1": "    while True: pass\n"}
    monkeypatch.setattr(
        code_scoring, "generate_completions", lambda _, chosen, options: [answers.get(p.task_id, "") for p in chosen]
    )
    found = score_code(bundle, PROBLEMS, CodeOptions(num_problems=3), sandbox)
    assert [sample["reason"] for sample in found.samples] == ["passed", "timed out", "wrong answer"]
    assert found.samples[0] == {
        "task_id": "HumanEval/0", "completion": PROBLEMS[0].canonical, "passed": True, "reason": "passed",
    }  # fmt: skip
    told = found.to_dict()
    assert (told["num_passed"], told["num_problems"], told["num_available"], told["num_timed_out"]) == (1, 3, 164, 1)
    assert told["pass@1"] == pytest.approx(1 / 3)
    assert told["time_limit"] == sandbox.time_limit


PLUS = [
    {
        "task_id": "HumanEval/0", "prompt": 'def f(n):\n    """n!"""\n', "entry_point": "f", "contract": "", "atol": 0,
        "canonical_solution": "    return n * f(n - 1) if n else 1\n", "base_input": [[3]], "plus_input": [[0], [40]],
    },
    {
        "task_id": "HumanEval/1", "prompt": 'def g(xs):\n    """Halves."""\n', "entry_point": "g", "contract": "",
        "canonical_solution": "    return [x / 2 for x in xs]\n", "base_input": [[[1, 2]]], "plus_input": [[[]]],
        "atol": 0,
    },
    {
        "task_id": "HumanEval/32", "prompt": PROBLEMS[32].prompt, "entry_point": "find_zero", "contract": "",
        "canonical_solution": PROBLEMS[32].canonical, "base_input": [[[1, 2]]], "plus_input": [[[-1, 0, 1, 0]]],
        "atol": 1e-4,
    },
]  # fmt: skip


@pytest.mark.usefixtures("sandbox")
def test_plus_compares_with_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "HumanEvalPlus.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in PLUS)
    careful = Sandbox(10.0)
    problems = HumanEvalPlus(data=str(file)).problems()
    assert all(verdicts(careful, problems, canonical=True))
    assert not any(verdicts(careful, problems, canonical=False))
    answers = {
        "f": [
            ("    return 6 if n == 3 else 1\n", "wrong answer: for [40]"),
            ("    return [1, 1, 2, 6][n]\n", "IndexErr"),
        ],
        "g": [("    return [x / 2 + 1e-9 for x in xs]\n", "passed"), ("    return xs\n", "wrong answer")],
        "find_zero": [("    return -0.5 if xs[0] == 1 else -1.0\n", "passed"), ("    return -0.5\n", "wrong answer")],
    }
    for problem in problems:
        for body, reason in answers[problem.entry_point]:
            verdict = careful.judge(problem.prompt + body, problem.entry_point, problem.prompt, problem.check)
            assert verdict.reason.startswith(reason)


def test_plus_needs_its_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file\. evalplus publishes"):
        HumanEvalPlus(data=str(tmp_path / "x")).problems()
    for text in ("{", '{"task_id": "a"}\n', "[]"):
        (tmp_path / "x").write_text(text)
        with pytest.raises(ValueError, match="not in the layout"):
            HumanEvalPlus(data=str(tmp_path / "x")).problems()


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"), [(0, 164, 0, 0.02289), (82, 164, 0.42426, 0.57574), (1, 3, 0.06149, 0.79234)]
)
def test_the_interval_is_wilsons(passed: int, count: int, low: float, high: float) -> None:
    samples = [{"passed": number < passed} for number in range(count)]
    z, share = 1.959964, passed / count  # the textbook's formula
    middle, half = share + z**2 / (2 * count), z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    formula = [(middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1)]
    interval = CodeScore(samples, 0, count, {}).interval
    assert interval == pytest.approx(formula, abs=1e-6)
    assert interval == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("dial", "value"),
    [("prompt", "plain"), ("max_new_tokens", 0), ("batch_size", 1.5), ("num_problems", 0), ("workers", True)],
)
def test_dials_are_checked(dial: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.{dial} must be .*{value}"):
        CodeOptions(**{dial: value})
