"""Run the command line with `python -m segmamba`."""

import sys

from segmamba.cli import main

sys.exit(main())
