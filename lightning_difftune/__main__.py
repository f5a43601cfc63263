"""``python -m lightning_difftune`` is ``difftune``."""

import sys

from lightning_difftune.cli import main

if __name__ == "__main__":
    sys.exit(main())
