"""``python -m weightflip report RUN_DIR``."""

from __future__ import annotations

import sys

from weightflip.report.cli import main

sys.exit(main())
