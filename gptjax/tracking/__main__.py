"""Follower process: python -m gptjax.tracking RUN TRACKER.

It follows the run until its stdin is closed, which happens when the training process
ends, for whatever reason. It fails with one line on stderr.
"""

import os
import select
import sys
import threading
from pathlib import Path

from gptjax.runtime.terminal import print_message
from gptjax.tracking.follow import describe_failure, follow_run, limit_file_size
from gptjax.tracking.process import FINISH_SECONDS

POLL_SECONDS = 1.0  # between looks at metrics.jsonl
PRIORITY = 10  # niceness: training comes first


def is_training() -> bool:
    """Waits a moment; False if stdin was closed."""
    readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
    if readable:
        # A tracker that hangs must not outlive the training by much.
        timer = threading.Timer(2 * FINISH_SECONDS, os._exit, [1])
        timer.daemon = True
        timer.start()
    return not readable


def main(run_dir: Path, tracker: str) -> int:
    """Follows a run; returns the exit code."""
    os.nice(PRIORITY)
    try:
        limit_file_size(run_dir)
        follow_run(run_dir, tracker, is_training)
    except Exception as error:  # of any tracker
        print_message(describe_failure(error, tracker))
        return 1
    return 0


if __name__ == "__main__":
    # Without the exit handlers of a tracker, which may hang.
    os._exit(main(Path(sys.argv[1]), sys.argv[2]))
