"""Settings of `keel rank`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.base import Count, Settings
from keel.config.judge import RaterJudge
from keel.config.sections import check_host_names


class RankConfig(Settings):
    """Settings of `keel rank`: collect rankings of responses from people in a web page."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "answers",
        "store",
        "raters",
        "overlap",
        "mode",
        "instructions",
        "export",
        "form",
        "aggregate",
        "backup",
        "judge.url",
        "host",
        "public",
        "port",
    )

    answers: str | None = None
    """File of `prompt, responses` rows (2 to 9 responses), as `keel sample` writes it; required to create a store"""
    store: str = "ratings.db"
    """SQLite file that holds responses, raters and rankings; created if it does not exist"""
    raters: list[str] = ["me"]
    """Names of the raters, each of whom gets a private link; raters of an earlier call are kept"""
    overlap: Count | None = None
    """Number of raters for each item (default: 1, or the number that the store was created with)"""
    mode: Literal["rankings", "pairs"] = "rankings"
    """rankings: rank all responses of a row; pairs: compare two at a time (longer rows are split into pairs)"""
    instructions: str | None = None
    """Text file to show to raters on their first page"""
    tags: list[str] = []
    """Labels that a rater may put on an item"""
    seed: int = 0
    """Random seed of the order in which each rater sees the responses, and of the split into pairs"""
    host: str = "127.0.0.1"
    """Address to listen on; an address that other machines can reach needs `public`"""
    public: bool = False
    """Allow an address that other machines can reach"""
    names: list[str] = []
    """More host names or addresses of this server, the first of them used in the links; required for 0.0.0.0"""
    address: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """Public address behind a TLS proxy, as in https://rank.example"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8642
    """Port to listen on"""
    browser: bool = True
    """Open the first rater's page in a browser"""
    export: str | None = None
    """Write the rankings to this file, and exit"""
    backup: str | None = None
    """Write a complete copy of the store to this new file, even while it is in use, and exit"""
    form: Literal["rankings", "pairs"] = "rankings"
    """With `export`: one row for each ranking, or one for each pair"""
    aggregate: bool = False
    """With `export`: write one consensus for each item, with raters weighted by their agreement, instead of one row for
    each rater"""

    judge: RaterJudge | None = None
    """Let a language model rank all items, beside the people, and exit"""
    judges: Literal["exclude", "include"] = "exclude"
    """With `export`: leave the rankings of judges out, or count judges as raters, in rows, weights and consensus"""

    @model_validator(mode="after")
    def _check_host(self) -> "RankConfig":
        check_host_names(self.host, self.names)
        return self
