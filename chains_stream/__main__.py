"""`python -m chains_stream` is `chains`."""

import sys

from chains_stream.cli import main

if __name__ == "__main__":  # not in the processes that an engine starts: each imports its parent's main module
    sys.exit(main())
