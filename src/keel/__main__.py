"""Run `keel VERB ...` as `python -m keel VERB ...`, or with several processes as `torchrun -m keel VERB ...`."""

import sys


def run() -> int:
    """Run the command line and return its exit code."""
    from keel.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
