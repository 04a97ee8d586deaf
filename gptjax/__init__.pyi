from . import (
    checkpoint as checkpoint,
)
from . import (
    data as data,
)
from . import (
    evaluation as evaluation,
)
from . import (
    inference as inference,
)
from . import (
    model as model,
)
from . import (
    parallel as parallel,
)
from . import (
    plots as plots,
)
from . import (
    tasks as tasks,
)
from . import (
    tokenizer as tokenizer,
)
from . import (
    training as training,
)
from . import (
    weights as weights,
)
from .cli.notebook import load_ipython_extension as load_ipython_extension
from .config import GPTConfig as GPTConfig
from .config import RunConfig as RunConfig
from .errors import GptjaxError as GptjaxError
from .evaluation.perplexity import score as score
from .inference.assistant import answer as answer
from .inference.assistant import stream_answer as stream_answer
from .inference.classify import classify as classify
from .inference.generate import GenerationConfig as GenerationConfig
from .inference.generate import complete as complete
from .inference.generate import generate as generate
from .inference.generate import stream as stream
from .model.gpt import apply as apply
from .model.gpt import hidden_states as hidden_states
from .model.gpt import init as init
from .tasks.train import train as train
from .training.optimizer import make_optimizer as make_optimizer
from .training.train_step import TrainState as TrainState
from .training.train_step import init_state as init_state
from .training.train_step import make_train_step as make_train_step
from .training.train_step import train_steps as train_steps
from .weights.load import load as load
from .weights.model_folder import Model as Model
from .weights.model_folder import save as save

__version__: str
