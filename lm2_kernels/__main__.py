"""``python -m lm2_kernels``; see :mod:`lm2_kernels.cli`."""

import sys

from lm2_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
