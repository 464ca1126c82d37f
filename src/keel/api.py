"""The commands of keel as Python functions. Nothing heavy is imported before one of them is called."""

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
    """What a training run made."""

    folder: Path
    """the run folder: settings, metrics, checkpoints"""
    model: Path
    """the trained model as a transformers folder"""
    metrics: dict[str, float]
    """of the last step (`train`), or of the held-out rows"""

    @property
    def metrics_file(self) -> Path:
        """One line of JSON for each step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class SamplingResult:
    """Responses to each prompt, and where they are."""

    file: Path
    """rows of `prompt, responses`, with the other columns of the prompts"""
    rows: list[dict[str, Any]]
    """the same rows"""
    truncated: float
    """share of the responses that ended at the length limit"""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of policies with 95% intervals, and where they are."""

    metrics: dict[str, Any]
    """as documented for `keel evaluate`: "policy", "against", and the comparison"""
    file: Path | None
    """the JSON file with metrics and responses, if `output` was given"""


def sft(
    config: "SftConfig | Mapping[str, Any]", data: Any = None, eval_data: Any = None, resume: bool = False
) -> TrainingResult:
    """Fine-tune a language model on conversations, completions or texts, as `keel sft` does.

    Args:
        config: an SftConfig, or its settings as a mapping.
        data: in place of the file of `data.path`: a list or a datasets.Dataset of rows. They are written into the run
            folder, so that the run can be resumed.
        eval_data: in the same way in place of `data.eval_path`.
        resume: continue the run in `output`.

    Raises ConfigError or DataError for settings or rows that cannot be used.
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

    The arguments are those of `sft`, with the settings of a RewardConfig.
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

    The arguments are those of `sft`, with the settings of a DpoConfig.
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
        scorers: reward functions in Python, besides those of `rewards`.
        prompts: in place of the file of `prompts.path`: a list or a datasets.Dataset of texts, chats, or rows.
        resume: continue the run in `output`.

    Raises ConfigError, DataError or RewardError for what cannot be used, Diverged before an update that would do harm.
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
        prompts: in place of the file of `prompts.path`: a list or a datasets.Dataset of texts, chats, or rows.

    Raises ConfigError or DataError for settings or prompts that cannot be used.
    """
    from keel.config import SampleConfig
    from keel.data.rows import read_rows
    from keel.evaluation.sample import sample_responses

    with _prompts_file(config, prompts) as path:
        settings = _settings(SampleConfig, config, prompts=path)
        made = sample_responses(settings)
    file = Path(settings.output)
    return SamplingResult(file, [row.values for row in read_rows(str(file))], float(made["truncated"]))


def evaluate(
    config: "EvaluateConfig | Mapping[str, Any]", prompts: Any = None, scorers: Sequence[RewardFunction] = ()
) -> EvaluationResult:
    """Evaluate policies, alone and against another, as `keel evaluate` does.

    Args:
        config: an EvaluateConfig, or its settings as a mapping.
        prompts: in place of the file of `prompts.path`: a list or a datasets.Dataset of texts, chats, or rows.
        scorers: reward functions in Python, besides those of `rewards`.

    Raises ConfigError, DataError or RewardError.
    """
    from keel.config import EvaluateConfig
    from keel.evaluation.evaluate import evaluate_policies as evaluate_policies

    with _prompts_file(config, prompts) as path:
        settings = _settings(EvaluateConfig, config, prompts=path)
        metrics = evaluate_policies(settings, scorers)
    return EvaluationResult(metrics, Path(settings.output) if settings.output else None)


def doctor(run: str | Path) -> "Diagnosis":
    """Report what is wrong with a run, as `keel doctor` does: findings with evidence, likely causes and what to change.

    Args:
        run: the run folder, of a run that has ended or is still running.

    Raises ConfigError for a folder that holds no run.
    """
    from keel.diagnosis.doctor import diagnose
    from keel.run.read.run import read_run

    return diagnose(read_run(str(run)))


def _settings(kind: type[SettingsT], config: "Settings | Mapping[str, Any]", **paths: Path | None) -> SettingsT:
    """The settings, with the path of a section replaced for each of `paths` that is given."""
    from keel.config import Settings, parse

    values = config.model_dump() if isinstance(config, Settings) else dict(config)
    for section, path in paths.items():
        if path is not None:
            values[section] = {**(values.get(section) or {}), "path": str(path)}
    return parse(kind, values)


def _with_data(kind: type[SettingsT], config: "Settings | Mapping[str, Any]", data: Any, eval_data: Any) -> SettingsT:
    """The settings, with rows given in Python written into the run folder and named there."""
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
                raise ConfigError("rows given in Python are kept in the run folder", "output", "name a run folder")
            section[key] = str(write_rows(rows, Path(values["output"]), name, "text", "messages"))
    return parse(kind, {**values, "data": section})


@contextmanager
def _prompts_file(config: "Settings | Mapping[str, Any]", prompts: Any) -> Iterator[Path | None]:
    """A file of prompts given in Python, under the column that the settings name; None without any."""
    from keel.config import Settings
    from keel.data.python_rows import write_rows

    values = config.model_dump() if isinstance(config, Settings) else config
    column = str((values.get("prompts") or {}).get("column", "prompt"))
    if prompts is None:
        yield None
    elif isinstance(prompts, str | Path):
        yield Path(prompts)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield write_rows(prompts, Path(folder), "prompts", column, column)
