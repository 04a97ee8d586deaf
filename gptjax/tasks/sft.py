"""Supervised fine-tuning (SFT) task."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import RunConfig
from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    Example,
    SFTBatches,
    encode_conversations,
    make_sft_batches,
    truncate_all,
)
from gptjax.errors import DataError
from gptjax.evaluation.instructions import (
    ResponseEval,
    example_loss,
    generate_responses,
    group_scores,
    mean_scores,
    to_rows,
    write_rows,
)
from gptjax.parallel.sharding import shard_tree, to_host
from gptjax.plots.report import write_samples
from gptjax.tokenizer.chat_template import ChatTemplate
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training import estimate
from gptjax.training.finetune import (
    choose_chat_template,
    choose_tokenizer,
    finetune_provenance,
    full_params,
    initial_params,
    iterate_batches,
    load_init_model,
    make_finetune_step,
    resolve_model_config,
    save_finetuned,
    split_trainable,
    train_val_test_split,
)
from gptjax.training.loss import batch_loss
from gptjax.training.metrics import log_event, metric_series, read_events
from gptjax.training.optimizer import make_optimizer
from gptjax.training.task import (
    DEFAULT_RESUME_OPTIONS,
    LogFn,
    ResumeOptions,
    RunContext,
    Task,
    describe_devices,
    describe_length,
)
from gptjax.training.train_step import TrainState, init_state
from gptjax.training.trainer import finetune
from gptjax.tree import Params, num_params
from gptjax.weights.model_folder import Model

TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT = "train", "validation", "test"
NUM_EVAL_SAMPLES = 32  # validation rows with a generated answer at each evaluation
NUM_TEST_SAMPLES = (
    512  # test rows with a generated answer, before the first step and at the end
)
ANSWER_SLACK = 16  # tokens beyond the longest answer in the data
MAX_ANSWER_TOKENS = 256


class SFTData(NamedTuple):
    """Data of an SFT run, by split."""

    conversations: dict[str, list[Conversation]]
    examples: dict[str, list[Example]]  # with the loss mask used for training
    completion_examples: dict[
        str, list[Example]
    ]  # the same with completion-only loss masks
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    log_lines: list[str]  # summary lines

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest last answer, including its end token."""
        last = [
            x.answer_spans[-1]
            for part in self.completion_examples.values()
            for x in part
        ]
        return max(stop - start for start, stop in last)


MakeSFTTaskFn = Callable[[RunContext], tuple[RunContext, Task, SFTData]]


def train_sft(
    config: RunConfig,
    run_dir: Path,
    log: LogFn = print,
    make_task: MakeSFTTaskFn | None = None,
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> Model:
    """Fine-tunes an assistant; resumes if the run exists.

    Returns the model of the step with the lowest loss on validation answers; only this
    one is evaluated on the test rows after training.

    Args:
        config: must match that of an existing run.
        run_dir: run folder; created if missing.
        log: receives log lines.
        make_task: replaces `make_sft_task`.
        options: config options that may change, and the spike policy.

    Raises:
        GptjaxError: invalid data, config or run folder.
        Interrupted: interrupted by a signal; the same call resumes.
    """
    return finetune(
        config, run_dir, log, make_task or make_sft_task, finalize_sft, options
    )


def make_sft_task(run: RunContext) -> tuple[RunContext, Task, SFTData]:
    """Builds the SFT task; also returns its data."""
    config = run.config
    init_model = load_init_model(config, run.log)
    data = load_sft_data(config, init_model)
    tokenizer = data.tokenizer
    config = dataclasses.replace(
        config, model=resolve_model_config(config.model, init_model, tokenizer)
    )
    run = dataclasses.replace(run, config=config)
    key = jax.random.key(config.train.seed)
    params = initial_params(config.model, init_model, tokenizer, key)
    trainable_params, frozen_params = shard_tree(
        split_trainable(config, params, key), run.mesh
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    batches = make_sft_batches(
        config.data.batching,
        data.examples[TRAIN_SPLIT],
        rows=config.data.batch_size,
        context=config.model.context_length,
        pad_id=tokenizer.eot_token,
        seed=config.train.seed,
    )

    def to_model(state: TrainState) -> Model:
        params = full_params(config, to_host(state.params), frozen_params)
        return Model(
            config.model, params, tokenizer, chat_template=data.chat_template.source
        )

    def save_best(state: TrainState) -> None:
        state = state._replace(params=to_host(state.params))
        save_finetuned(
            config, run.run_dir, to_model(state), state.params, frozen_params
        )

    num_tokens = sum(len(x.ids) - 1 for x in data.examples[TRAIN_SPLIT])
    task = Task(
        init_state=init_state(trainable_params, optimizer, key),
        train_step=make_finetune_step(config, sft_loss_fn, optimizer),
        batches=functools.partial(iterate_batches, batches),
        tokens_per_step=num_tokens / batches.steps_per_epoch,
        evaluate=make_sft_evaluate(run, data, to_model, save_best),
        to_model=to_model,
        provenance=finetune_provenance(
            tokenizer,
            init_model,
            {s: (x.messages for x in part) for s, part in data.conversations.items()},
            data.chat_template,
        ),
        summary=format_sft_summary(
            run, data, batches, num_params(trainable_params), num_params(frozen_params)
        ),
        frozen_params=(frozen_params,),
    )
    return run, task, data


def load_sft_data(c: RunConfig, init_model: Model | None) -> SFTData:
    """Loads, splits and tokenizes the conversations."""
    all_conversations, columns = read_conversations(c.data.source)
    splits = train_val_test_split(c, all_conversations, "rows")
    template = choose_chat_template(c.data.chat_template, init_model)
    texts = (m["content"] for x in splits[TRAIN_SPLIT] for m in x.messages)
    tokenizer = choose_tokenizer(c.data.tokenizer, init_model, lambda: texts)
    context = c.model.context_length
    if init_model is not None:
        context = min(context, init_model.config.context_length)
    trained_segments = (
        TRAIN_ON_COMPLETIONS if c.data.completion_only_loss else TRAIN_ON_ALL
    )
    if c.data.completion_only_loss and c.data.batching == "book":
        trained_segments = trained_segments | {
            "header"
        }  # as in Raschka 2024, exercise 7.2
    conversations, examples, completion_examples = {}, {}, {}
    num_truncated = num_dropped = 0
    for name, part in splits.items():
        truncated = truncate_all(
            encode_conversations(tokenizer, template, part, trained_segments), context
        )
        if not truncated.examples:
            raise DataError(
                f"no {name} conversation of {c.data.source} has an answer that fits "
                f"model.context_length={context}. Raise it, or shorten the answers."
            )
        conversations[name] = [part[n] for n in truncated.kept_indices]
        examples[name] = truncated.examples
        completions = encode_conversations(
            tokenizer, template, conversations[name], TRAIN_ON_COMPLETIONS
        )
        completion_examples[name] = truncate_all(completions, context).examples
        num_truncated, num_dropped = (
            num_truncated + truncated.num_truncated,
            num_dropped + truncated.num_dropped,
        )
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in examples.items())
    log_lines = [f"data     {columns}", f"rows     {sizes}"]
    if num_truncated or num_dropped:
        log_lines.append(
            f"too long {num_truncated} conversations truncated on the left, {num_dropped} dropped "
            f"(the answer alone does not fit {context} tokens)"
        )
    return SFTData(
        conversations, examples, completion_examples, tokenizer, template, log_lines
    )


def sft_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Summed loss of a batch, and its number of trained tokens."""
    return batch_loss(
        config.model,
        params,
        batch,
        chunk_size=config.train.loss_chunk_size,
        dropout_key=key if config.model.dropout else None,
        adapters=adapters,
    )


def make_sft_evaluate(
    run: RunContext,
    data: SFTData,
    to_model: Callable[[TrainState], Model],
    save_best: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Evaluates on validation and some training rows; saves the best model.

    The best model has the lowest loss on validation answers. Also generates answers to
    a fixed subset of these rows, and before the first step to test rows as a baseline.
    """
    rows = evenly_spaced(data.conversations[VALIDATION_SPLIT], NUM_EVAL_SAMPLES)
    test_rows = evenly_spaced(data.conversations.get(TEST_SPLIT, []), NUM_TEST_SAMPLES)
    train_subset = evenly_spaced(
        range(len(data.examples[TRAIN_SPLIT])), run.config.train.eval_batches * 8
    )

    def log_split(split: str, step: int, model: Model, values: dict[str, Any]) -> None:
        indices = (
            train_subset if split == TRAIN_SPLIT else range(len(data.examples[split]))
        )
        all_tokens = example_loss(model, [data.examples[split][n] for n in indices])
        completions = all_tokens
        if (
            not run.config.data.completion_only_loss
            or run.config.data.batching == "book"
        ):
            completions = example_loss(
                model, [data.completion_examples[split][n] for n in indices]
            )
        numbers = {"loss": all_tokens.loss, "response_loss": completions.loss, **values}
        log_event(run.metrics_path, "eval", step, split=split, **numbers)

    def evaluate(state: TrainState, step: int, is_last: bool) -> str:
        model = to_model(state)
        log_split(TRAIN_SPLIT, step, model, {})
        scores = mean_scores(
            generate_responses(model, rows, answer_token_limit(model, data))
        )
        log_split(VALIDATION_SPLIT, step, model, scores)
        if step == 0 and TEST_SPLIT in data.examples:
            test_responses = generate_responses(
                model, test_rows, answer_token_limit(model, data)
            )
            log_split(
                TEST_SPLIT,
                step,
                model,
                mean_scores(test_responses) | task_exact_matches(test_responses),
            )
        events = read_events(run.metrics_path)
        _, losses = metric_series(events, "eval", "response_loss", VALIDATION_SPLIT)
        if losses[-1] <= min(losses):
            save_best(state)
        match, rouge = scores["exact_match"], scores["rouge_l"]
        return f"val {losses[-1]:.4f} exact {match:.1%} rouge {rouge:.2f}"

    return evaluate


def task_exact_matches(responses: list[ResponseEval]) -> dict[str, dict[str, float]]:
    """Exact match by task, as a field of an event; empty if the data name no tasks."""
    exact = {
        task: scores["exact_match"] for task, scores in group_scores(responses).items()
    }
    return {"tasks": exact} if exact else {}


def evenly_spaced(items: Sequence[Any], max_items: int) -> list[Any]:
    """At most `max_items` of the items, evenly spaced.

    >>> evenly_spaced("abcdefg", 3), evenly_spaced([], 3)
    (['a', 'd', 'g'], [])
    """
    chosen = (
        np.linspace(0, len(items) - 1, min(max_items, len(items))).round().astype(int)
    )
    return [items[n] for n in chosen]


def answer_token_limit(model: Model, data: SFTData) -> int:
    """Maximum tokens per generated answer: slightly above the longest in the data."""
    limit = min(MAX_ANSWER_TOKENS, model.config.context_length)
    return min(data.longest_answer + ANSWER_SLACK, limit)


def format_sft_summary(
    run: RunContext,
    data: SFTData,
    batches: SFTBatches,
    num_trainable: int,
    num_frozen: int,
) -> list[str]:
    """Summary printed before training."""
    config, steps = run.config, run.config.train.steps
    shapes = ", ".join(map(str, batches.batch_shapes))
    examples = data.examples[TRAIN_SPLIT]
    trained_fraction = sum(sum(x.loss_mask) for x in examples) / sum(
        len(x.ids) for x in examples
    )
    return [
        f"run      {run.run_dir}",
        *data.log_lines,
        f"model    {estimate.parameter_count(config.model):,} parameters: "
        f"{config.model.n_layers} layers, {config.model.n_heads} heads, width {config.model.d_model}, "
        f"from {config.finetune.init_from or 'random initialization'}",
        f"trained  {num_trainable:,} parameters ({config.finetune.trainable}), {num_frozen:,} frozen; "
        f"loss on {trained_fraction:.0%} of the tokens",
        f"step     {config.data.batch_size} rows of {shapes} tokens: "
        f"{len(batches.batch_shapes)} compiled shapes",
        describe_length(steps, steps / batches.steps_per_epoch),
        describe_devices(run),
    ]


def finalize_sft(run: RunContext, task: Task, model: Model, data: SFTData) -> None:
    """Evaluates the best model; writes its answers, figures and report.md."""
    split = TEST_SPLIT if TEST_SPLIT in data.examples else VALIDATION_SPLIT
    rows = evenly_spaced(data.conversations[split], NUM_TEST_SAMPLES)
    responses = generate_responses(model, rows, answer_token_limit(model, data))
    result, scores = (
        example_loss(model, data.completion_examples[split]),
        mean_scores(responses),
    )
    step = run.config.train.steps
    evaluations = [
        event
        for event in read_events(run.metrics_path)
        if event["event"] == "eval" and event["split"] == split
    ]
    if split == TEST_SPLIT and evaluations[-1]["step"] != step:
        numbers = {
            "response_loss": result.loss,
            **scores,
            **task_exact_matches(responses),
        }
        log_event(run.metrics_path, "eval", step, split=TEST_SPLIT, **numbers)
    write_rows(to_rows(responses), run.run_dir / "responses.jsonl")
    text = (
        f"{split} loss {result.loss:.4f} nats per answer token (before: "
        f"{evaluations[0]['response_loss']:.4f}), exact match {scores['exact_match']:.4f} on "
        f"{len(responses):,} answers (before: {evaluations[0]['exact_match']:.4f}), "
        f"token F1 {scores['token_f1']:.4f}, ROUGE-L {scores['rouge_l']:.4f}"
    )
    write_samples(
        run.run_dir,
        summary=task.summary,
        result=text,
        task_scores=group_scores(responses),
        samples=[
            (x.conversation.messages, x.response, x.reference)
            for x in evenly_spaced(responses, 8)
        ],
        tokens_per_step=round(task.tokens_per_step),
    )
    run.log(f"done     {text}")
    run.log(
        f"wrote    {run.run_dir}/model (best on validation), responses.jsonl, "
        "report.md, figures"
    )
