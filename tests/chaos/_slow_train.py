"""`gptjax`, with a pause after each logged step, so that faults find it training.

python -m tests.chaos._slow_train SECONDS train ...
"""

import sys
import time
from typing import Any

from gptjax.cli import main
from gptjax.training import metrics

if __name__ == "__main__":
    write, pause = metrics.log_train_metrics, float(sys.argv[1])

    def slowly(*args: Any) -> Any:
        time.sleep(pause)
        return write(*args)

    metrics.log_train_metrics = slowly
    sys.exit(main.main(sys.argv[2:]))
