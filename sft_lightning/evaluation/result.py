"""Hold the samples of an evaluation, compute its metrics, and write and read both."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.evaluation.comparison import RATES, by_prompt, rewarded
from sft_lightning.evaluation.statistics import majority_accuracy, pass_at_k, rate_interval
from sft_lightning.system.files import write_atomically

# Fields of a row of predictions.jsonl that a comparison needs.
_NEEDED = ("index", "sample", "prompt", "ground_truth", "format_correct", "answer_correct")


@dataclass
class EvaluationResult:
    """The result of an evaluation. All metrics follow from the samples, so results of parts are joined by them.

    Attributes:
        samples: One row for each answer, in the order of the prompts: ``index`` (of the prompt), ``sample`` (which of
            its answers), ``prompt, response, ground_truth, format_correct, strict_format_correct, answer_correct,
            answer`` (what the grader read), ``failure, timed_out, stop_reason, num_tokens, mean_entropy`` (nats).
        step: Optimizer steps of the model; None if unknown.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None

    @property
    def num_examples(self) -> int:
        """Number of prompts."""
        return len(by_prompt(self.samples))

    @property
    def num_samples(self) -> int:
        """Answers per prompt."""
        return max((sample["sample"] + 1 for sample in self.samples), default=1)

    @property
    def num_format_correct(self) -> int:
        return sum(sample["format_correct"] for sample in self.samples)

    @property
    def num_answer_correct(self) -> int:
        return sum(sample["answer_correct"] for sample in self.samples)

    @property
    def num_rewarded(self) -> int:
        """Number of samples with the right format and answer."""
        return sum(map(rewarded, self.samples))

    @property
    def num_timed_out(self) -> int:
        return sum(sample["timed_out"] for sample in self.samples)

    @property
    def format_accuracy(self) -> float:
        """In [0, 1]; 0 without samples, like the other rates."""
        return self._rate("format_accuracy") or 0.0

    @property
    def answer_accuracy(self) -> float:
        return self._rate("answer_accuracy") or 0.0

    @property
    def mean_reward(self) -> float:
        return self._rate("mean_reward") or 0.0

    @property
    def stop_reasons(self) -> dict[str, int]:
        """Stop reason -> number of samples."""
        return self._count("stop_reason")

    @property
    def failures(self) -> dict[str, int]:
        """Failure -> number of samples."""
        return self._count("failure")

    def rates(self) -> dict[str, tuple[float, float, float]]:
        """Returns each rate that the grader knows with its 95% bounds; empty without samples."""
        outcomes = {name: self._outcomes(name) for name in RATES}
        return {
            name: (sum(map(sum, known)) / len(self.samples), *rate_interval(known))
            for name, known in outcomes.items()
            if known
        }

    def metrics(self) -> dict[str, Any]:
        """Returns the content of ``metrics.json``. Rates that the grader does not know and empty means are None."""
        strict = self._outcomes("strict_format_accuracy")
        num_strict = None if strict is None else sum(map(sum, strict))
        return {
            "step": self.step,
            "num_examples": self.num_examples,
            "num_samples": self.num_samples,
            "num_format_correct": self.num_format_correct,
            "num_strict_format_correct": num_strict,
            "num_answer_correct": self.num_answer_correct,
            "num_rewarded": self.num_rewarded,
            "num_timed_out": self.num_timed_out,
            **{name: self._rate(name) for name in RATES},
            "intervals": {name: list(bounds) for name, (_, *bounds) in self.rates().items()},
            **self._over_samples(),
            "mean_num_tokens": self._lengths(),
            "mean_entropy": self._mean_entropy(),
            "stop_reasons": self.stop_reasons,
            "failures": self.failures,
        }

    def write(self, output_dir: str | Path) -> None:
        """Writes ``predictions.jsonl``, one sample a line, and ``metrics.json``, each atomically."""
        folder = Path(output_dir)
        with write_atomically(folder / "predictions.jsonl") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples)
        with write_atomically(folder / "metrics.json") as file:
            file.write(json.dumps(self.metrics(), indent=2) + "\n")

    def _outcomes(self, name: str) -> list[list[bool]] | None:
        """Returns which samples of each prompt are right, or None if the grader does not know."""
        outcomes = [[RATES[name](sample) for sample in samples] for samples in by_prompt(self.samples)]
        return None if any(None in samples for samples in outcomes) else outcomes

    def _rate(self, name: str) -> float | None:
        outcomes = self._outcomes(name)
        return None if outcomes is None else sum(map(sum, outcomes)) / max(1, len(self.samples))

    def _over_samples(self) -> dict[str, dict[str, float]]:
        """Returns pass@k for each power of two and for all samples, and maj@k for all samples."""
        num_samples, prompts = self.num_samples, by_prompt(self.samples)
        if num_samples == 1:
            return {"pass_at": {}, "maj_at": {}}
        counts = [(len(samples), sum(one["answer_correct"] for one in samples)) for samples in prompts]
        ks = [k for k in range(1, num_samples + 1) if k & (k - 1) == 0 or k == num_samples]
        majority = [
            majority_accuracy([s["answer"] for s in one], [s["answer_correct"] for s in one]) for one in prompts
        ]
        return {
            "pass_at": {str(k): _mean(pass_at_k(*count, k) for count in counts) for k in ks},
            "maj_at": {str(num_samples): _mean(majority)},
        }

    def _lengths(self) -> dict[str, float | None]:
        groups: dict[str, list[int]] = {"all": [], "right": [], "wrong": []}
        for sample in self.samples:
            groups["all"].append(sample["num_tokens"])
            groups["right" if sample["answer_correct"] else "wrong"].append(sample["num_tokens"])
        return {name: _mean(lengths) if lengths else None for name, lengths in groups.items()}

    def _mean_entropy(self) -> float | None:
        known = [(one["mean_entropy"], one["num_tokens"]) for one in self.samples if one["mean_entropy"] is not None]
        num_tokens = sum(length for _, length in known)
        return sum(entropy * length for entropy, length in known) / num_tokens if num_tokens else None

    def _count(self, key: str) -> dict[str, int]:
        counts = Counter(sample[key] for sample in self.samples if sample[key] is not None)
        return dict(sorted(counts.items()))


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the samples that an evaluation wrote.

    Raises:
        UserError: If there is no ``predictions.jsonl``, or a line of it is not a sample.
    """
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise UserError(f"'{folder}' holds no predictions.jsonl; name a folder that an evaluation wrote")
    samples = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a sample ({error}); evaluate again") from None
            if not isinstance(sample, dict):
                raise UserError(f"{path}:{number}: not a sample but a {type(sample).__name__}; evaluate again")
            if missing := [name for name in _NEEDED if name not in sample]:
                raise UserError(f"{path}:{number}: a sample without {', '.join(missing)}; evaluate again")
            if wrong := wrong_fields(sample):
                raise UserError(f"{path}:{number}: a sample with a wrong type of {', '.join(wrong)}; evaluate again")
            samples.append(sample)
    return samples


def wrong_fields(sample: Mapping[str, Any]) -> list[str]:
    """Returns the names of a sample's fields whose values an evaluation does not write, by their types."""
    return [name for name, is_right in _FIELDS.items() if name in sample and not is_right(sample[name])]


def wrong_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the same for the fields of a ``metrics.json``."""
    return [name for name, is_right in _METRICS.items() if name in metrics and not is_right(metrics[name])]


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or _is_count(value)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _all(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("index", "sample"), _is_count),
    "num_tokens": lambda value: value is None or _is_count(value),
    **dict.fromkeys(("prompt", "response"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("format_correct", "answer_correct"), lambda value: isinstance(value, bool)),
    "strict_format_correct": lambda value: value is None or isinstance(value, bool),
    **dict.fromkeys(("failure", "stop_reason"), _is_text),
    "mean_entropy": _is_number,
}
_METRICS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("num_examples", "num_samples"), _is_count),
    **dict.fromkeys(RATES, lambda value: value is None or _is_share(value)),
    "intervals": _all(lambda bounds: isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_share, bounds))),
    **dict.fromkeys(("failures", "stop_reasons"), _all(_is_count)),
    "mean_num_tokens": _all(_is_number),
    "mean_entropy": _is_number,
}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
