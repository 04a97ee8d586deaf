"""Runs the `gptjax` command: `python -m gptjax`."""

import sys

from gptjax.cli.main import main

sys.exit(main())
