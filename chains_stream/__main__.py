"""`python -m chains_stream` is `chains`."""

import sys

from chains_stream.cli import main

sys.exit(main())
