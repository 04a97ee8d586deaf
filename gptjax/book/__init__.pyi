from .learning_rate import BOOK_LEARNING_RATE as BOOK_LEARNING_RATE
from .loader import BOOK_BATCHING as BOOK_BATCHING
from .loader import Loader as Loader
from .loader import epochs as epochs
from .params import init_params as init_params
from .splits import book_split as book_split
from .torch_random import TorchGenerator as TorchGenerator
from .training import book_stages as book_stages
