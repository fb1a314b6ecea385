"""``python -m pgl``: the same as the command ``pgl``."""

import sys

from pgl.cli import main

# The guard keeps worker processes, which import this file anew, from starting the command again.
if __name__ == "__main__":
    sys.exit(main())
