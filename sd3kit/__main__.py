"""`python -m sd3kit` is the command `sd3kit`."""

import sys

from .command.cli import main

sys.exit(main())
