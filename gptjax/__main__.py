"""Runs the `gptjax` command: `python -m gptjax`."""

import sys

from gptjax.cli import main

sys.exit(main())
