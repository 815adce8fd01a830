"""The adapter under the real harness, with local task files, against one text at a time in float64."""

import copy
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_experiment import write_tiny_experiment

from lightning_moe.cli import main
from lightning_moe.errors import UserError
from lightning_moe.runs.folder import RUN_VARIABLE

pytestmark = pytest.mark.lm_eval

LENGTH = 32
QUESTIONS = [
    {
        "question": f"line {i} of file {i + 7} says {i} in",
        "choices": [" words", " lines and lines", " 7"],
        "answer": i % 3,
    }
    for i in range(7)
]
TEXTS = ["line 3 of file 12 says 36 in words\n" * 6, "α short one – ünïcode", "", "line 0 of file 1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIGHTNING_MOE_CACHE", str(folder / "cache"))
        patch.setenv(RUN_VARIABLE, "")
        config = write_tiny_experiment(folder, max_steps=20, val_check_interval=20)
        config["data"]["sequence_length"] = LENGTH
        flags = {f"--{key}={json.dumps(value)}" for key, value in _flat(config)}
        assert main(["fit", "--run_name=tiny", "--tracking.enabled=false", *sorted(flags)]) == 0
        yield folder / "runs/tiny/checkpoints/last.ckpt"


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        whole = isinstance(value, dict) and "class_path" not in value
        pairs += _flat(value, f"{prefix}{key}.") if whole else [(f"{prefix}{key}", value)]
    return pairs


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from lightning_moe.evaluation.lm_eval import LightningMoE

    return LightningMoE(str(checkpoint), batch_size=3)


class Reference:
    """One text at a time, float64, the whole forward pass for every token."""

    def __init__(self, model: Any) -> None:
        self.decoder, self.codec = copy.deepcopy(model.decoder).double(), model.codec

    @torch.no_grad()
    def next(self, ids: list[int]) -> torch.Tensor:
        return self.decoder(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    def continuation(self, context: list[int], ids: list[int]) -> tuple[float, bool]:
        total, greedy = 0.0, True
        everything = [*context, *ids]
        first = max(0, len(everything) - 1 - LENGTH)  # the window that ends with the last token
        for position in range(len(context), len(everything)):
            scores = self.next(everything[first:position])
            total += float(scores[everything[position]])
            greedy &= int(scores.argmax()) == everything[position]
        return total, greedy

    def rolling(self, text: str) -> float:
        ids = [self.codec.end_of_text_id, *self.codec.encode(text)]
        total = 0.0
        for position in range(1, len(ids)):
            start = (position - 1) // LENGTH * LENGTH  # windows side by side
            if position > (len(ids) - 1) // LENGTH * LENGTH:  # the last one ends with the text
                start = max(0, len(ids) - 1 - LENGTH)
            total += float(self.next(ids[start:position])[ids[position]])
        return total

    def greedy(self, text: str, new: int, stop: str) -> str:
        ids = [self.codec.end_of_text_id, *self.codec.encode(text)]
        start = len(ids)
        while len(ids) < start + new:
            ids.append(int(self.next(ids).argmax()))
            out = self.codec.decode(ids[start:])
            if ids[-1] == self.codec.end_of_text_id or stop in out:
                break
        return self.codec.decode(ids[start:]).split(stop)[0]


def request(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0)


def test_loglikelihoods_are_those_of_each_text_alone(model: Any) -> None:
    reference = Reference(model)
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    pairs += [("", "line 1"), ("line ", "2 of"), ("line 4 of file 5 " * 9, "says 20 in words")]  # the last: cut off
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        spaces = len(context) - len(context.rstrip())
        whole = model.tok_encode(context + continuation)
        before = model.tok_encode(context[: len(context) - spaces])
        expected = reference.continuation(before, whole[len(before) :])
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert len({round(score, 3) for score, _ in found}) > 10  # not all alike


def test_rolling_scores_every_token_once(model: Any) -> None:
    reference = Reference(model)
    found = model.loglikelihood_rolling([request(text) for text in TEXTS], disable_tqdm=True)
    assert found == pytest.approx([reference.rolling(text) for text in TEXTS], abs=1e-3)
    assert len(model.codec.encode(TEXTS[0])) > 2 * LENGTH
    assert found[2] == 0


def test_generation_is_greedy_and_stops(model: Any) -> None:
    reference = Reference(model)
    contexts = ["line 1 of file", "line 12 of file 3 says 36", "w", ""]
    for stop in ("w", "\n"):
        options = {"until": [stop], "max_gen_toks": 9, "do_sample": False}
        found = model.generate_until([request(text, options) for text in contexts], disable_tqdm=True)
        assert found == [reference.greedy(text, 9, stop) for text in contexts]


def test_a_long_context_loses_its_beginning(model: Any) -> None:
    text = "line 12 of file 3 says 36 in words " * 20
    tail = model._tail(text, 10)
    assert text.endswith(tail)
    assert 5 < len(model.codec.encode(tail)) <= 10
    requests = [request(text, {"until": []}), request("line", {"until": []})]
    with pytest.warns(
        UserWarning, match="1 of 2 contexts are longer than the model's 32 tokens and lose their beginning"
    ):
        assert isinstance(model.generate_until(requests, disable_tqdm=True)[0], str)
    with pytest.warns(UserWarning, match="1 of 2 contexts are longer"):
        model.loglikelihood([request(text, " words"), request("line", " words")], disable_tqdm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loglikelihood([request("line", " words")], disable_tqdm=True)


def test_what_cannot_be_used_is_refused(model: Any, checkpoint: Path) -> None:
    from lightning_moe.evaluation.lm_eval import LightningMoE

    with pytest.raises(UserError, match="does not fit into the model's context of 32"):
        model.loglikelihood([request("line", " 1 2 3" * 40)], disable_tqdm=True)
    with pytest.raises(UserError, match="batch_size='auto'"):
        LightningMoE(str(checkpoint), batch_size="auto")
    with pytest.raises(UserError, match="nowhere"):
        LightningMoE("nowhere.ckpt")


def write_tasks(folder: Path) -> None:
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text))
    common = {"dataset_path": "json", "test_split": "test"}
    files = {name: {"data_files": {"test": str(folder / f"{name}.jsonl")}} for name in ("questions", "texts")}
    tasks: list[dict[str, Any]] = [
        {
            "task": "tiny_choice",
            "dataset_kwargs": files["questions"],
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        {
            "task": "tiny_text",
            "dataset_kwargs": files["texts"],
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
    ]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))


def test_the_command_gives_the_numbers_of_the_reference(model: Any, checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    command = [sys.executable, "-m", "lightning_moe.evaluation", "run", "--model", "lightning_moe"]
    command += ["--model_args", f"ckpt_path={checkpoint}", "--tasks", "tiny_choice,tiny_text", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    reference = Reference(model)
    right = 0
    for q in QUESTIONS:
        before = model.tok_encode(q["question"])
        scores = [
            reference.continuation(before, model.tok_encode(q["question"] + choice)[len(before) :])[0]
            for choice in q["choices"]
        ]
        right += max(range(3), key=scores.__getitem__) == q["answer"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    nats = -sum(reference.rolling(text) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert results["tiny_text"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert results["tiny_text"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-5)


def test_the_documented_core_tasks_are_the_harnesss() -> None:
    from lm_eval.tasks import TaskManager

    page = Path(__file__).parents[2] / "docs/evaluation.md"
    names = re.findall(r"^\| [\w ()-]+ \| `(\w+)` \|", page.read_text(), re.M)
    assert len(names) >= 20
    assert set(names) <= set(TaskManager().all_tasks)
