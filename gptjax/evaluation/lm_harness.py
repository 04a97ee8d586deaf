"""Adapter of a model for EleutherAI's lm-evaluation-harness, which needs [lm-eval].

`python -m gptjax.evaluation.lm_harness` is the command line of the harness, which then
knows the model `gptjax`:

    python -m gptjax.evaluation.lm_harness run --model gptjax \
        --model_args pretrained=runs/mine --tasks hellaswag

Neither PyTorch nor transformers is needed.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import SAMPLING_RANGES, did_you_mean
from gptjax.errors import ConfigError, DataError, GptjaxError, install_command, short_message
from gptjax.fileio.atomic import write_jsonl
from gptjax.fileio.download import is_offline
from gptjax.fileio.paths import require_new_file, user_path
from gptjax.inference.assistant import chat_template_of
from gptjax.inference.generate import (
    GenerationConfig,
    check_language_model,
    complete_batches,
    truncate_prompts,
)
from gptjax.inference.loglikelihood import (
    ScoringRequest,
    encode_pair,
    encode_start,
    score_continuations,
)
from gptjax.runtime.terminal import logger, print_message
from gptjax.tokenizer.chat_template import ZERO_WIDTH_SPACE
from gptjax.tokenizer.template_worker import EOT_MARK, EOT_TEXT, ChatMessage
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `check_harness` names the extra
    TemplateLM: Any = object

DEFAULT_NEW_TOKENS = 256  # of the harness, if a task says nothing
# Of generation; the harness has other names for the rest of `GenerationConfig`.
SAMPLING_OPTIONS = SAMPLING_RANGES.keys() - {"max_new_tokens", "samples"}


class GptjaxLM(TemplateLM):
    """Model of gptjax as a model of the harness.

    Batches have a fixed number of tokens, and JAX chooses the device.
    """

    def __init__(
        self,
        pretrained: str | Model,
        int8: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Takes a model or a MODEL of the command line.

        The harness always passes the last three arguments, which have no effect.
        """
        del batch_size, max_batch_size, device
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, int8=int8)
        check_language_model(self.model)
        self.special: Iterable[str] = ()  # special tokens that prompts may contain

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.model.tokenizer.eot_token

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context."""
        bos_token = self.model.tokenizer.bos_token
        return self.eot_token_id if bos_token is None else bos_token

    @property
    def max_length(self) -> int:
        """Context length of the model."""
        return self.model.config.context_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the cache of requests."""
        return self.model.tokenizer.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes the start of a text, or any text if `add_special_tokens` is False."""
        if add_special_tokens is False:
            return self.model.tokenizer.encode(string, [*self.special])
        return encode_start(self.model.tokenizer, string, [*self.special])

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores each continuation: its log-likelihood, and whether it is greedy."""
        pairs = [
            encode_pair(self.model.tokenizer, *request.args, special=[*self.special])
            for request in requests
        ]
        return self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [ScoringRequest(context, [target]) for _, context, target in requests]
        return [tuple(score) for (score,) in score_continuations(self.model, pairs)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Sums the log-likelihood of all tokens of each text, in disjoint windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(*request.args), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens(itertools.chain.from_iterable(windows)))
        return [sum(logprob for logprob, _ in itertools.islice(scores, len(x))) for x in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates up to the first stop text of each request, which is removed."""
        by_options: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(n)
        texts = [""] * len(requests)
        for indices in by_options.values():
            config = self.make_generation_config(requests[indices[0]].args[1])
            prompts = [self.tok_encode(requests[n].args[0]) for n in indices]
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
            prompts = truncate_prompts(prompts, self.max_length - config.max_new_tokens)
            results = complete_batches(self.model, prompts, config, "generating")
            for n, result in zip(indices, results, strict=True):
                texts[n] = self.decode_until(result.ids, config.stop)
        return texts

    def make_generation_config(self, options: dict[str, Any]) -> GenerationConfig:
        """Converts the options of a task.

        A task that asks for as many tokens as the context has gets half of it.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        stop, max_new_tokens = options.pop("until"), options.pop("max_gen_toks")
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        if unknown := sorted(options.keys() - SAMPLING_OPTIONS):
            raise ConfigError(
                f"generation_kwargs: {unknown[0]} is not supported. Use until, max_gen_toks, "
                f"do_sample, {', '.join(sorted(SAMPLING_OPTIONS))}."
            )
        if max_new_tokens >= self.max_length:
            max_new_tokens = self.max_length // 2
            logger.warning(f"max_gen_toks was lowered to {max_new_tokens}, half of the context")
        return GenerationConfig(
            max_new_tokens=max_new_tokens, stop=[text for text in stop if text], **options
        )

    def decode_until(self, ids: Iterable[int], stop: Iterable[str]) -> str:
        """Decodes tokens that are not special, up to the first stop text."""
        special = set(self.model.tokenizer.special_tokens.values())
        text = self.model.tokenizer.decode(i for i in ids if i not in special)
        for end in stop:
            text = text.partition(end)[0]
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the chat template if it is applied."""
        return self.model.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[ChatMessage], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation; from then on, prompts contain special tokens.

        Those in messages get a zero-width space inserted. Without generation prompt,
        the last message is the start of the answer.
        """
        template, tokenizer = chat_template_of(self.model), self.model.tokenizer
        self.special = tokenizer.special_tokens
        messages = [
            {**message, "content": self.escape(message["content"])} for message in chat_history
        ]
        end = EOT_TEXT if EOT_TEXT in self.special else tokenizer.eot_name
        segments = template.segments(messages, add_generation_prompt)
        text = "".join(end if segment.is_eot else segment.text for segment in segments)
        if add_generation_prompt:
            return text
        return text.removesuffix(template.suffix.replace(EOT_MARK, end))

    def escape(self, text: str) -> str:
        """Breaks the special tokens in the text of a message."""
        for name in self.special:
            text = text.replace(name, name[0] + ZERO_WIDTH_SPACE + name[1:])
        return text


def check_harness() -> None:
    """Raises ConfigError without the harness; sets it offline if gptjax is."""
    if TemplateLM is object:
        raise ConfigError(
            f"lm-evaluation-harness is not installed. Run: {install_command('lm-eval')}"
        )
    if is_offline():  # read once, when the libraries are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def evaluate_tasks(
    load_model: Callable[[], Model],
    names: Sequence[str],
    num_few_shot: int | None,
    out: Path | None,
) -> dict[str, dict[str, int | float]]:
    """Evaluates a model on tasks of the harness; returns metrics by task.

    Tasks are loaded before the model. Writes the results per row to `out`.
    """
    check_harness()
    from lm_eval import simple_evaluate

    require_new_file(out)
    tasks = load_tasks(names)
    results = simple_evaluate(
        model=GptjaxLM(load_model()),
        tasks=tasks,
        num_fewshot=num_few_shot,
        log_samples=out is not None,
    )
    if out is not None:
        write_samples(results["samples"], out)
    return {name: read_metrics(values) for name, values in results["results"].items()}


def load_tasks(names: Sequence[str]) -> list[Any]:
    """Loads tasks and groups by name or from YAML files, with their data."""
    from lm_eval.tasks import TaskManager

    files = {name for name in names if name.endswith(".yaml")}
    # Indexing the thousands of tasks of the harness takes seconds.
    manager = TaskManager(include_defaults=bool(set(names) - files))
    tasks = []
    for name in names:
        is_known = user_path(name).is_file() if name in files else name in manager.task_index
        if not is_known:
            raise ConfigError(
                f"the harness has no task {name!r:.80}.{did_you_mean(name, manager.all_tasks)} "
                "Name a task, a group or the path of a .yaml file."
            )
        try:
            loaded = manager.load([name])
        except Exception as error:  # of data sets, hubs, templates and the code of a task
            raise DataError(
                f"the task {name!r} cannot be loaded: {short_message(error)}. Check its file, and "
                "the network or the Hugging Face cache."
            ) from error
        groups = loaded.get("groups") or {}
        tasks += [*groups.values()][:1] or [*loaded["tasks"].values()]
    return tasks


def read_metrics(values: dict[str, Any]) -> dict[str, int | float]:
    """Returns the numbers of a task; its usual filter is not named.

    >>> read_metrics({"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": "N/A"})
    {'acc': 0.25}
    """
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def write_samples(samples: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Writes the rows of all tasks as JSON lines, atomically."""
    from lm_eval.utils import handle_non_serializable as to_json

    rows = ({"task": task, **row} for task, rows in samples.items() for row in rows)
    write_jsonl(out, rows, to_json)
    logger.info(f"wrote    {out}")


def main() -> None:
    """Runs the command line of the harness, which then knows the model `gptjax`."""
    from gptjax.runtime.compilation_cache import persistent_cache

    try:
        check_harness()
        import lm_eval.models  # noqa: F401 (registers its own)
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model

        register_model("gptjax")(GptjaxLM)
        with persistent_cache():
            cli_evaluate()
    except GptjaxError as error:
        print_message(f"gptjax: {error}")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
