"""``python -m rlhf_lightning``."""

import sys

from rlhf_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
