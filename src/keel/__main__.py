"""`python -m keel VERB ...` is `keel VERB ...`; with more processes: `torchrun --nproc-per-node 2 -m keel train ...`"""

import sys


def run() -> int:
    """Run the command line and return its exit code."""
    from keel.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
