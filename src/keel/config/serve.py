"""Settings of `keel serve`."""

from typing import Annotated

from pydantic import Field

from keel.config.base import Settings


class ServeConfig(Settings):
    """Settings of `keel serve`: show all runs under a folder, live, in a web page."""

    folder: str = "runs"
    """Folder whose runs are listed, at any depth"""
    host: str = "127.0.0.1"
    """Address to listen on; an address that other machines can reach needs `public`"""
    public: bool = False
    """Allow an address that other machines can reach"""
    names: list[str] = []
    """More host names or addresses of this server; required for 0.0.0.0"""
    address: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """Public address behind a TLS proxy, as in https://runs.example"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8643
    """Port to listen on"""
    browser: bool = True
    """Open the page in a browser"""
