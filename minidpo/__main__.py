"""`python -m minidpo`, for where the `minidpo` script is not installed."""

import sys

from .cli import main

sys.exit(main())
