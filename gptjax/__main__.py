"""`python -m gptjax` is the `gptjax` command."""

import sys

from gptjax.cli import main

sys.exit(main())
