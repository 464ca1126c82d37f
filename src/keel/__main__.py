"""`python -m keel VERB ...` is `keel VERB ...`; with more processes: `torchrun --nproc-per-node 2 -m keel train ...`"""

import sys


def run() -> int:
    """The exit code of the command line."""
    from keel.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
