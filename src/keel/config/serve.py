"""Settings of `keel serve`."""

from typing import Annotated

from pydantic import Field

from keel.config.sections import Settings


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
