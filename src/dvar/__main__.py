"""The entry point of `python -m dvar`."""

import sys

from dvar.cli.main import main

sys.exit(main())
