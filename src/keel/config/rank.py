"""Settings of `keel rank`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.sections import Count, Settings, check_host_names


class RankConfig(Settings):
    """Settings of `keel rank`: people rank answers in a web page."""

    answers: str | None = None
    """rows of `prompt, responses` (2 to 9 answers), as `keel sample` writes them; needed to begin a store"""
    store: str = "ratings.db"
    """the SQLite file that holds answers, raters and rankings; a later call goes on with it"""
    raters: list[str] = ["me"]
    """names of the raters, each of whom gets a private link; those of an earlier call stay"""
    overlap: Count | None = None
    """raters who rank each item (default: 1, or what the store was told before)"""
    mode: Literal["rankings", "pairs"] = "rankings"
    """rank all answers of a row, or compare two at a time (rows of more are cut into pairs)"""
    instructions: str | None = None
    """a text file that raters see before they begin"""
    tags: list[str] = []
    """labels that a rater may put on an item"""
    seed: int = 0
    """of the order in which each rater sees the answers, and of the cutting into pairs"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines can reach needs `public`"""
    public: bool = False
    """allow an address that other machines can reach"""
    names: list[str] = []
    """further names or addresses under which raters call it, the first of them in the links; needed for 0.0.0.0, which
    is nobody's name"""
    address: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """where raters find it behind a proxy that speaks TLS, as in https://rank.example"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8642
    """port to listen on"""
    browser: bool = True
    """open the first rater's page in a browser"""
    export: str | None = None
    """write what was ranked to this file, and end"""
    backup: str | None = None
    """write a complete copy of the store to this new file, also while it is in use, and end"""
    form: Literal["rankings", "pairs"] = "rankings"
    """of the export: one row a ranking, or one a pair"""
    aggregate: bool = False
    """of the export: one consensus for each item, raters weighed by how well they agree (default: one row a rater)"""

    @model_validator(mode="after")
    def _has_a_name(self) -> "RankConfig":
        check_host_names(self.host, self.names)
        return self
