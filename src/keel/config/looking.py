"""Settings of the verbs that look at runs: doctor, report, serve, drift."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from keel.config.sections import CountOrNone, Dtype, PromptSettings, Settings


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Runs = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class DoctorConfig(Settings):
    """Settings of `keel doctor`: say whether runs are healthy, or what is wrong and what to change."""

    runs: Runs
    """run folders, finished, running or dead"""


class ReportConfig(Settings):
    """Settings of `keel report`: one page about one run, or comparing several."""

    runs: Runs
    """run folders, or folders that hold runs; the first run is the one that samples and tokens are shown of"""
    output: str | None = None
    """the page to write (default: report.html in the run's folder, of a reward model's run run-report.html; of several
    runs comparison.html in the first folder that is named)"""
    browser: bool = False
    """open it"""


class ServeConfig(Settings):
    """Settings of `keel serve`: all runs under a folder, live, in a web page."""

    folder: str = "runs"
    """runs below this folder are listed"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines can reach needs `public`"""
    public: bool = False
    """allow an address that other machines can reach"""
    names: list[str] = []
    """further names or addresses under which it is called; needed for 0.0.0.0, which is nobody's name"""
    address: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """where it is found behind a proxy that speaks TLS, as in https://runs.example"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8643
    """port to listen on"""
    browser: bool = True
    """open it in a browser"""


class DriftConfig(Settings):
    """Settings of `keel drift`: do the run's reward models still apply to the prompts or answers of today?"""

    run: str
    """the run folder of `keel train` that made the policy"""
    prompts: PromptSettings | None = None
    """today's prompts; the run's policy answers them"""
    answers: str | None = None
    """instead: logged rows of `prompt, response`, which are judged as they are"""
    slices: list[str] = []
    """columns by whose values the figures are told apart"""
    dtype: Dtype = "float32"
    """number format of the weights of policy and reference"""
    output: str | None = None
    """write figures and answers (JSON) to this file, and beside it what people should rank if the figures moved"""
    max_prompts: CountOrNone = 0
    """at most so many of today's rows, chosen at random; 0 = all"""
    seed: int = 0
    """of sampling, of the choice of rows and of the tests"""

    @model_validator(mode="after")
    def _exactly_one(self) -> "DriftConfig":
        if (self.prompts is None) == (self.answers is None):
            raise ValueError("give either prompts.path or answers")
        return self
