"""Direct preference optimization (DPO) task.

Rafailov et al. 2023, equation 7. The reference model is the one the run starts from;
its log-probabilities are computed once before the first step, so that only one model is
in memory. The reward of an answer is beta times the log-ratio of its probabilities
under model and reference.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.config import RunConfig
from gptjax.data.conversations import PreferencePair, read_preference_pairs
from gptjax.data.preference import (
    CHOSEN,
    REJECTED,
    PreferenceBatches,
    make_preference_batches,
)
from gptjax.data.sft import Example, encode_segments, truncate_left
from gptjax.errors import ConfigError, DataError
from gptjax.parallel.sharding import shard_tree, to_host
from gptjax.plots.report import write_samples
from gptjax.runtime.preemption import check_interrupted
from gptjax.tokenizer.chat_template import ChatTemplate
from gptjax.training import estimate
from gptjax.training.finetune import (
    choose_chat_template,
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
from gptjax.training.loss import batch_per_token_loss
from gptjax.training.metrics import log_event, metric_series, read_events
from gptjax.training.optimizer import make_optimizer
from gptjax.training.run_dir import hash_pytree
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
PerExample = Float[Array, "B 2"]
ExamplePairs = list[tuple[Example, Example]]


class DPOData(NamedTuple):
    """Data of a DPO run."""

    pairs: dict[str, ExamplePairs]  # chosen and rejected, by split
    chat_template: ChatTemplate
    log_lines: list[str]  # summary lines


class DPOMetrics(NamedTuple):
    """Metrics of a model on preference pairs."""

    loss: float  # nats per pair
    margin: float  # reward of the chosen answer minus that of the rejected one
    accuracy: float  # fraction of pairs with a positive margin; 0 counts as half
    chosen_reward: float
    rejected_reward: float


def train_dpo(
    config: RunConfig,
    run_dir: Path,
    log: LogFn = print,
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> Model:
    """Trains with DPO; resumes if the run exists.

    Returns the model of the step with the lowest loss on the validation pairs.

    Raises:
        GptjaxError: invalid data, config or run folder.
        Interrupted: interrupted by a signal; the same call resumes.
    """
    return finetune(config, run_dir, log, make_dpo_task, finalize_dpo, options)


def make_dpo_task(
    run: RunContext,
) -> tuple[RunContext, Task, dict[str, PreferenceBatches]]:
    """Builds the DPO task; also returns batches with reference log-probabilities."""
    config = run.config
    init_model = load_init_model(config, run.log)
    if init_model is None:
        raise ConfigError(
            "train.task='dpo' requires an initial model: set finetune.init_from to the "
            "folder of a run with train.task='sft'."
        )
    tokenizer = init_model.tokenizer
    is_supported = config.data.completion_only_loss and config.data.batching in (
        "auto",
        "padded",
    )
    if config.data.tokenizer or not is_supported:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}, data.batching={config.data.batching!r} "
            f"and data.completion_only_loss={config.data.completion_only_loss} are not supported for "
            "train.task='dpo', which uses the tokenizer of finetune.init_from, padded "
            "batches and completion-only loss. Remove these options."
        )
    data = load_dpo_data(config, init_model)
    config = dataclasses.replace(
        config, model=resolve_model_config(config.model, init_model, tokenizer)
    )
    run = dataclasses.replace(run, config=config)
    key = jax.random.key(config.train.seed)
    params = initial_params(config.model, init_model, tokenizer, key)
    batches = {}
    for split, pairs in data.pairs.items():
        batch_options: Any = {
            "rows": config.data.batch_size,
            "context": config.model.context_length,
        }
        batch_options |= {"fill": tokenizer.eot_token, "seed": config.train.seed}
        reference_logprobs = sequence_logprobs(
            config, params, make_preference_batches(pairs, **batch_options)
        )
        batches[split] = make_preference_batches(
            pairs, reference_logprobs=reference_logprobs, **batch_options
        )
    trainable_params, frozen_params = shard_tree(
        split_trainable(config, params, key), run.mesh
    )
    optimizer = make_optimizer(config.optim, config.train.steps)

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

    num_tokens = sum(len(x.ids) - 1 for pair in data.pairs[TRAIN_SPLIT] for x in pair)
    task = Task(
        init_state=init_state(trainable_params, optimizer, key),
        train_step=make_finetune_step(config, dpo_loss_fn, optimizer),
        batches=functools.partial(iterate_batches, batches[TRAIN_SPLIT]),
        tokens_per_step=num_tokens / batches[TRAIN_SPLIT].steps_per_epoch,
        evaluate=make_dpo_evaluate(run, batches, to_model, save_best),
        to_model=to_model,
        provenance={
            **finetune_provenance(
                tokenizer, init_model, data.pairs, data.chat_template
            ),
            "reference": {s: hash_pytree(b.reference) for s, b in batches.items()},
        },
        summary=format_dpo_summary(
            run,
            data,
            batches[TRAIN_SPLIT],
            num_params(trainable_params),
            num_params(frozen_params),
        ),
        frozen_params=(frozen_params,),
    )
    return run, task, batches


def load_dpo_data(c: RunConfig, init_model: Model) -> DPOData:
    """Loads, splits and tokenizes the preference pairs."""
    all_pairs, columns = read_preference_pairs(c.data.source)
    splits = train_val_test_split(c, all_pairs, "pairs")
    template = choose_chat_template(c.data.chat_template, init_model)
    context = min(c.model.context_length, init_model.config.context_length)
    pairs, num_equal, num_too_long = {}, 0, 0
    for name, part in splits.items():
        unequal = [pair for pair in part if pair.chosen != pair.rejected]
        tokenized = [
            tokenize_pair(pair, init_model, template, context) for pair in unequal
        ]
        pairs[name] = [pair for pair in tokenized if pair is not None]
        num_equal, num_too_long = (
            num_equal + len(part) - len(unequal),
            num_too_long + tokenized.count(None),
        )
        if not pairs[name]:
            raise DataError(
                f"no {name} pair of {c.data.source} has two different answers that fit "
                f"model.context_length={context}. Raise it, or shorten them."
            )
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in pairs.items())
    log_lines = [f"data     {columns}", f"pairs    {sizes}"]
    if num_equal or num_too_long:
        log_lines.append(
            f"dropped  {num_equal} pairs with equal answers, {num_too_long} with an answer that "
            f"does not fit {context} tokens"
        )
    return DPOData(pairs, template, log_lines)


def tokenize_pair(
    pair: PreferencePair, init_model: Model, template: ChatTemplate, context: int
) -> tuple[Example, Example] | None:
    """Both conversations of a pair as tokens, or None if one does not fit."""
    examples = []
    for answer in (pair.chosen, pair.rejected):
        messages = [*pair.prompt, {"role": "assistant", "content": answer}]
        example = encode_segments(init_model.tokenizer, template.segments(messages))
        answer_start, _ = example.answer_spans[
            -1
        ]  # earlier answers are part of the prompt
        loss_mask = [on and n >= answer_start for n, on in enumerate(example.loss_mask)]
        examples.append(truncate_left(example._replace(learned=loss_mask), context + 1))
    chosen, rejected = examples
    return None if chosen is None or rejected is None else (chosen, rejected)


def answer_logprobs(
    config: RunConfig, params: Params, batch: Any, key: Any = None, adapters: Any = None
) -> PerExample:
    """Log-probability (nats) of each answer in a batch, including its end token."""
    rows = {
        name: array.reshape(-1, array.shape[-1])
        for name, array in batch.items()
        if name != "reference_logprobs"
    }
    loss_RT = batch_per_token_loss(
        config.model,
        params,
        rows,
        chunk_size=config.train.loss_chunk_size,
        dropout_key=key if config.model.dropout else None,
        adapters=adapters,
    )
    return -jnp.sum(loss_RT * rows["loss_weights"], axis=-1).reshape(-1, 2)


def sequence_logprobs(
    config: RunConfig, params: Params, batches: PreferenceBatches
) -> Float[np.ndarray, "P 2"]:
    """Log-probability of each answer, in the order of the pairs."""
    logprob_P2 = np.zeros((len(batches.pairs), 2), np.float32)
    for indices, batch in batches.in_order():
        check_interrupted()
        logprob_P2[indices] = np.asarray(jit_answer_logprobs(config)(params, batch))[
            : len(indices)
        ]
    return logprob_P2


@functools.lru_cache(maxsize=2)
def jit_answer_logprobs(config: RunConfig) -> Callable[[Params, Any], PerExample]:
    """Jitted `answer_logprobs` of a run."""
    return jax.jit(functools.partial(answer_logprobs, config))


def dpo_loss(logratio_B2: PerExample, beta: float) -> Float[Array, " B"]:
    """DPO loss of each pair.

    Args:
        logratio_B2: log-probability ratios of both answers to the reference (nats).
        beta: strength of the KL penalty.

    >>> import jax.numpy as jnp
    >>> print(dpo_loss(jnp.zeros((1, 2)), 0.1)[0])  # ln 2, before the first step
    0.6931472
    """
    return -jax.nn.log_sigmoid(
        beta * (logratio_B2[:, CHOSEN] - logratio_B2[:, REJECTED])
    )


def dpo_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Summed DPO loss of a batch, and its number of pairs."""
    logprob_B2 = answer_logprobs(config, params, batch, key, adapters)
    loss_B = dpo_loss(
        logprob_B2 - batch["reference_logprobs"], config.finetune.dpo_beta
    )
    valid_B = jnp.any(batch["loss_weights"] > 0, axis=(1, 2))
    return jnp.sum(jnp.where(valid_B, loss_B, 0.0)), valid_B.sum().astype(jnp.float32)


def evaluate_pairs(
    config: RunConfig, model: Model, batches: PreferenceBatches
) -> DPOMetrics:
    """Evaluates a model on all pairs of the batches."""
    logratio_P2 = (
        sequence_logprobs(config, model.params, batches) - batches.reference_logprobs
    )
    reward_P2 = config.finetune.dpo_beta * logratio_P2.astype(np.float64)
    margin_P = reward_P2[:, CHOSEN] - reward_P2[:, REJECTED]
    return DPOMetrics(
        loss=float(np.logaddexp(0, -margin_P).mean()),
        margin=float(margin_P.mean()),
        accuracy=float(np.mean((np.sign(margin_P) + 1) / 2)),
        chosen_reward=float(reward_P2[:, CHOSEN].mean()),
        rejected_reward=float(reward_P2[:, REJECTED].mean()),
    )


def make_dpo_evaluate(
    run: RunContext,
    batches: dict[str, PreferenceBatches],
    to_model: Callable[[TrainState], Model],
    save_best: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Evaluates on validation and some training pairs; saves the best model."""
    max_train_pairs = run.config.train.eval_batches * run.config.data.batch_size
    eval_splits = {
        TRAIN_SPLIT: take_pairs(batches[TRAIN_SPLIT], max_train_pairs),
        VALIDATION_SPLIT: batches[VALIDATION_SPLIT],
    }

    def evaluate(state: TrainState, step: int, is_last: bool) -> str:
        model = to_model(state)
        metrics = {
            split: evaluate_pairs(run.config, model, eval_splits[split])
            for split in eval_splits
        }
        for split, scores in metrics.items():
            log_event(run.metrics_path, "eval", step, split=split, **scores._asdict())
        events = read_events(run.metrics_path)
        _, losses = metric_series(events, "eval", "loss", VALIDATION_SPLIT)
        if losses[-1] <= min(losses):
            save_best(state)
        validation = metrics[VALIDATION_SPLIT]
        return f"val {validation.loss:.4f} margin {validation.margin:.3f} {format_preference_accuracy(validation)}"

    return evaluate


def format_preference_accuracy(metrics: DPOMetrics) -> str:
    """Preference accuracy, for the progress line."""
    return f"accuracy {metrics.accuracy:.1%}"


def take_pairs(batches: PreferenceBatches, max_pairs: int) -> PreferenceBatches:
    """Batches restricted to the first pairs."""
    lengths = list(batches.sampler.lengths)[:max_pairs]
    return batches._replace(
        pairs=batches.pairs[:max_pairs],
        reference_logprobs=batches.reference_logprobs[:max_pairs],
        deal=dataclasses.replace(batches.sampler, lengths=lengths),
    )


def format_dpo_summary(
    run: RunContext,
    data: DPOData,
    batches: PreferenceBatches,
    num_trainable: int,
    num_frozen: int,
) -> list[str]:
    """Summary printed before training."""
    config, steps = run.config, run.config.train.steps
    shapes = ", ".join(map(str, batches.batch_shapes))
    return [
        f"run      {run.run_dir}",
        *data.log_lines,
        f"model    {estimate.parameter_count(config.model):,} parameters: "
        f"{config.model.n_layers} layers, {config.model.n_heads} heads, width {config.model.d_model}, "
        f"from {config.finetune.init_from} (also the reference; beta {config.finetune.dpo_beta})",
        f"trained  {num_trainable:,} parameters ({config.finetune.trainable}), {num_frozen:,} frozen",
        f"step     {config.data.batch_size} pairs of rows of {shapes} tokens: "
        f"{len(batches.batch_shapes)} compiled shapes",
        describe_length(steps, steps / batches.steps_per_epoch),
        describe_devices(run),
    ]


def finalize_dpo(
    run: RunContext, task: Task, model: Model, batches: dict[str, PreferenceBatches]
) -> None:
    """Evaluates the best model on the test pairs; writes figures and report.md."""
    split = TEST_SPLIT if TEST_SPLIT in batches else VALIDATION_SPLIT
    metrics = evaluate_pairs(run.config, model, batches[split])
    events = read_events(run.metrics_path)
    if split == TEST_SPLIT and not any(e.get("split") == TEST_SPLIT for e in events):
        step = run.config.train.steps
        log_event(run.metrics_path, "eval", step, split=TEST_SPLIT, **metrics._asdict())
    text = (
        f"{split} loss {metrics.loss:.4f}, margin {metrics.margin:.4f}, {format_preference_accuracy(metrics)} on "
        f"{len(batches[split].pairs):,} pairs (chance: 50%)"
    )
    write_samples(
        run.run_dir,
        summary=task.summary,
        result=text,
        tokens_per_step=round(task.tokens_per_step),
    )
    run.log(f"done     {text}")
    run.log(f"wrote    {run.run_dir}/model (best on validation), report.md, figures")
