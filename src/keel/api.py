"""The commands of keel as Python functions. Each imports torch when it is called, not before."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from keel.config import (
        DpoConfig,
        EvaluateConfig,
        RewardConfig,
        SampleConfig,
        Settings,
        SftConfig,
        TrainConfig,
    )
    from keel.diagnosis.findings import Diagnosis

RewardFunction = Callable[..., Any]
SettingsT = TypeVar("SettingsT", bound="Settings")


@dataclass(frozen=True)
class TrainingResult:
    """The files and metrics of a training run."""

    folder: Path
    """run folder, with settings, metrics and checkpoints"""
    model: Path
    """trained model, as a transformers folder"""
    metrics: dict[str, float]
    """metrics of the last step (`train`), or of the held-out rows (`sft`, `reward`, `dpo`)"""

    @property
    def metrics_file(self) -> Path:
        """file with a line of JSON for each step"""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """folder of the checkpoints"""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class SamplingResult:
    """Sampled responses, and the file that holds them."""

    file: Path
    """JSON lines with `prompt`, `responses` and the other columns of the prompts"""
    rows: list[dict[str, Any]]
    """the rows of `file`"""
    truncated: float
    """share of responses that were cut at the length limit"""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of policies with 95% intervals, and the file that holds them."""

    metrics: dict[str, Any]
    """metrics under "policy" and "against", and those of the comparison, as in docs/evaluation.md"""
    file: Path | None
    """JSON file with metrics and responses; None unless `output` is set"""


def sft(
    config: "SftConfig | Mapping[str, Any]", data: Any = None, eval_data: Any = None, resume: bool = False
) -> TrainingResult:
    """Fine-tune a language model on conversations, completions or texts, as `keel sft` does.

    Args:
        config: an SftConfig, or its settings as a mapping.
        data: rows to use instead of the file `data.path`, as a list, a datasets.Dataset or another iterable, which
            is read to its end. They are written into the run folder, so that the run can be resumed.
        eval_data: held-out rows to use instead of the file `data.eval_path`.
        resume: whether to continue the run in `output`.

    Returns:
        The run, with the metrics on the held-out rows.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: a row cannot be used.
        Diverged: the loss or a gradient is not finite.
    """
    from keel.config import SftConfig
    from keel.supervised.sft import sft as fine_tune

    settings = _with_data(SftConfig, config, data, eval_data)
    metrics = fine_tune(settings, resume)
    return TrainingResult(Path(settings.output), Path(settings.output) / "model", metrics)


def reward(
    config: "RewardConfig | Mapping[str, Any]", data: Any = None, eval_data: Any = None, resume: bool = False
) -> TrainingResult:
    """Train a reward model, or an ensemble, on pairs or rankings, as `keel reward` does.

    Args, results and errors are those of `sft`, with a RewardConfig. A gate that is not met raises no error.
    """
    from keel.config import RewardConfig
    from keel.supervised.reward import reward as train_reward_model

    settings = _with_data(RewardConfig, config, data, eval_data)
    metrics = train_reward_model(settings, resume)
    return TrainingResult(Path(settings.output), Path(settings.output) / "model", metrics)


def dpo(
    config: "DpoConfig | Mapping[str, Any]", data: Any = None, eval_data: Any = None, resume: bool = False
) -> TrainingResult:
    """Train a policy on pairs or rankings without a reward model, as `keel dpo` does.

    Args, results and errors are those of `sft`, with a DpoConfig.
    """
    from keel.config import DpoConfig
    from keel.supervised.dpo import dpo as train_on_preferences

    settings = _with_data(DpoConfig, config, data, eval_data)
    metrics = train_on_preferences(settings, resume)
    return TrainingResult(Path(settings.output), Path(settings.output) / "policy", metrics)


def train(
    config: "TrainConfig | Mapping[str, Any]",
    scorers: Sequence[RewardFunction] | None = None,
    prompts: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train a policy on rewards, as `keel train` does.

    Args:
        config: a TrainConfig, or its settings as a mapping.
        scorers: Python reward functions, in addition to the scorers of `rewards`.
        prompts: prompts to use instead of the file `prompts.path`: a list, a datasets.Dataset or another iterable of
            texts, chats or rows, which is read to its end. Every process and every resumed run must pass the same ones.
        resume: whether to continue the run in `output`.

    Returns:
        The run, with the metrics of its last step.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: a prompt cannot be used.
        RewardError: a scorer fails, or returns something that is not a score.
        Diverged: numbers of an update are not finite, the policy has collapsed, or the doctor stops the run.
    """
    from keel.config import TrainConfig
    from keel.training.policy import train_policy

    metrics = train_policy(config, scorers or (), prompts, resume=resume)
    output = Path(str(config.output if isinstance(config, TrainConfig) else config["output"]))
    return TrainingResult(output, output / "policy", metrics)


def sample(config: "SampleConfig | Mapping[str, Any]", prompts: Any = None) -> SamplingResult:
    """Sample a model's responses to prompts, as `keel sample` does.

    Args:
        config: a SampleConfig, or its settings as a mapping.
        prompts: prompts to use instead of the file `prompts.path`, as a list or a datasets.Dataset of texts, chats or
            rows.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: a prompt cannot be used.
    """
    from keel.config import SampleConfig
    from keel.data.rows import read_rows
    from keel.evaluation.sample import sample_responses
    from keel.world import World

    with _prompts_file(config, prompts) as path:
        settings = _settings(SampleConfig, config, prompts=path)
        counts = sample_responses(settings)
    file = Path(settings.output)
    # The other processes may be on machines that do not see the file.
    rows = World.from_environment().from_main(lambda: [row.values for row in read_rows(str(file))])
    return SamplingResult(file, rows, float(counts["truncated"]))


def evaluate(
    config: "EvaluateConfig | Mapping[str, Any]", prompts: Any = None, scorers: Sequence[RewardFunction] = ()
) -> EvaluationResult:
    """Evaluate policies, alone or against another policy, as `keel evaluate` does.

    A gate that is not met raises no error: `metrics["gate"]["passed"]` is False.

    Args:
        config: an EvaluateConfig, or its settings as a mapping.
        prompts: prompts to use instead of the file `prompts.path`, as a list or a datasets.Dataset of texts, chats or
            rows.
        scorers: Python reward functions, in addition to the scorers of `rewards`.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: a prompt cannot be used.
        RewardError: a scorer fails, or returns something that is not a score.
    """
    from keel.config import EvaluateConfig
    from keel.evaluation.evaluate import evaluate_policies as evaluate_policies

    with _prompts_file(config, prompts) as path:
        settings = _settings(EvaluateConfig, config, prompts=path)
        metrics = evaluate_policies(settings, scorers)
    return EvaluationResult(metrics, Path(settings.output) if settings.output else None)


def doctor(run: str | Path) -> "Diagnosis":
    """Diagnose a run, as `keel doctor` does: findings with evidence, likely causes and suggested changes.

    Args:
        run: run folder. The run may be running, finished or dead.

    Raises:
        ConfigError: the folder holds no run.
    """
    from keel.diagnosis.doctor import diagnose
    from keel.run.read.run import read_run

    return diagnose(read_run(str(run)))


def _settings(kind: type[SettingsT], config: "Settings | Mapping[str, Any]", **paths: Path | None) -> SettingsT:
    """Parse settings, with `path` of a section replaced for each entry of `paths` that is not None."""
    from keel.config import Settings, parse

    values = config.model_dump() if isinstance(config, Settings) else dict(config)
    for section, path in paths.items():
        if path is not None:
            values[section] = {**(values.get(section) or {}), "path": str(path)}
    return parse(kind, values)


def _with_data(kind: type[SettingsT], config: "Settings | Mapping[str, Any]", data: Any, eval_data: Any) -> SettingsT:
    """Parse settings. Rows that are Python objects are written to files in the run folder, and replace its paths."""
    from keel.config import Settings, parse
    from keel.data.python_rows import write_rows
    from keel.errors import ConfigError

    values = config.model_dump() if isinstance(config, Settings) else dict(config)
    section = dict(values.get("data") or {})
    for key, name, rows in (("path", "data", data), ("eval_path", "eval_data", eval_data)):
        if isinstance(rows, str | Path):
            section[key] = str(rows)
        elif rows is not None:
            if not values.get("output"):
                raise ConfigError("rows of Python objects are saved in the run folder", "output", "set a run folder")
            section[key] = str(write_rows(rows, Path(values["output"]), name, "text", "messages"))
    return parse(kind, {**values, "data": section})


@contextmanager
def _prompts_file(config: "Settings | Mapping[str, Any]", prompts: Any) -> Iterator[Path | None]:
    """Yield a temporary file of prompts that are Python objects, in the column of the settings. None yields None."""
    from keel.config import Settings
    from keel.data.python_rows import write_rows

    values = config.model_dump() if isinstance(config, Settings) else config
    column = str((values.get("prompts") or {}).get("column", "prompt"))
    if prompts is None:
        yield None
    elif isinstance(prompts, str | Path):
        yield Path(prompts)
    else:
        # Temporary is enough: unlike training, sampling and evaluation cannot be resumed.
        with tempfile.TemporaryDirectory() as folder:
            yield write_rows(prompts, Path(folder), "prompts", column, column)
