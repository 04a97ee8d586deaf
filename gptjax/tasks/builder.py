"""Stages of a run, shared by all tasks, and the task of a fine-tuning run."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.bucketing import BucketedBatches
from gptjax.data.text import TEST_SPLIT, VALIDATION_SPLIT
from gptjax.model.lora import merge_adapters
from gptjax.parallel.sharding import shard_tree, to_host
from gptjax.plots.report import write_report
from gptjax.runtime.prng import make_key
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training import finetune
from gptjax.training.estimate import parameter_count
from gptjax.training.metrics import log_event
from gptjax.training.optimizer import make_optimizer
from gptjax.training.run_dir import hash_rows
from gptjax.training.task import EvalResult, RunContext, Task, describe_devices, describe_length
from gptjax.training.train_step import TrainState, init_state
from gptjax.tree import Params, num_params
from gptjax.weights.model_folder import Model, save, save_adapters


class TaskStages(NamedTuple):
    """Stages of one kind of training, in the order in which they run."""

    # Reads the data; returns the run with its resolved config, and the data.
    load_data: Callable[[RunContext], tuple[RunContext, Any]]
    make_task: Callable[[RunContext, Any], Task]
    # Writes results, figures and report; returns the trained model.
    finalize: Callable[[RunContext, Any, Task, TrainState], Model]


def with_model_config(
    run: RunContext, init_model: Model | None, tokenizer: Tokenizer, num_classes: int = 0
) -> RunContext:
    """Returns the run with its resolved model config."""
    model = finetune.resolve_model_config(run.config.model, init_model, tokenizer, num_classes)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))


def make_initial_params(run: RunContext, init_model: Model | None, tokenizer: Tokenizer) -> Params:
    """Parameters before the first step: the initial model's, or new ones."""
    key = make_key(run.config.train.seed)
    return finetune.initial_params(run.config.model, init_model, tokenizer, key)


class FinetuneInputs(NamedTuple):
    """Inputs of a fine-tuning run; their hashes are stored in meta.json."""

    rows: Mapping[str, Iterable[Any]]  # JSON values by split
    tokenizer: Tokenizer
    init_model: Model | None
    summary_lines: list[str]  # about the data
    class_names: tuple[str, ...] = ()  # of a classifier
    columns: tuple[str, ...] = ()  # of its text and label
    chat_template: str = ""  # of an assistant
    params: Params | None = None  # of the full model before the first step, if known


def make_finetune_task(
    run: RunContext,
    inputs: FinetuneInputs,
    *,
    loss_fn: finetune.FinetuneLossFn,
    batches: BucketedBatches,
    tokens_per_step: float,
    evaluate: Callable[[Model, int, bool], EvalResult],
    **notes: str,
) -> Task:
    """Makes the task of a fine-tuning run; `run` has its resolved config.

    `evaluate(model, step, is_last)` returns the score that selects the model in model/.
    `notes` are those of `summarize_finetuning`.
    """
    config, key = run.config, make_key(run.config.train.seed)
    batches = batches.limit_shapes(config.train.steps)
    tokenizer, template, params = inputs.tokenizer, inputs.chat_template, inputs.params
    if params is None:
        params = make_initial_params(run, inputs.init_model, tokenizer)
    trainable_params, frozen_params = shard_tree(
        finetune.split_trainable(config, params, key), run.mesh
    )
    optimizer = make_optimizer(config.optim, config.train.steps)

    def to_model(state: TrainState) -> Model:
        params, adapters = finetune.combine_params(config, to_host(state.params), frozen_params)
        params = finetune.merge_last_layers(params)
        params = merge_adapters(params, adapters) if adapters else params
        names = {"labels": inputs.class_names, "columns": inputs.columns}
        return Model(config.model, params, tokenizer, chat_template=template, **names)

    def save_best(state: TrainState) -> None:
        trainable_params = to_host(state.params)
        model = to_model(state._replace(params=trainable_params))
        save(model, run.run_dir / "model", step=int(state.step))
        if adapters := finetune.combine_params(config, trainable_params, frozen_params)[1]:
            save_adapters(adapters, run.run_dir / "adapters.safetensors")

    return Task(
        init_state=init_state(trainable_params, optimizer, key),
        train_step=finetune.make_finetune_step(config, loss_fn, optimizer),
        batches=lambda start, stop: map(batches.batch_at, range(start, stop)),
        evaluate=lambda state, step, is_last: evaluate(to_model(state), step, is_last),
        to_model=to_model,
        tokens_per_step=tokens_per_step,
        provenance={
            "data": {split: hash_rows(part) for split, part in inputs.rows.items()},
            **finetune.model_provenance(tokenizer, inputs.init_model, template),
        },
        summary=summarize_finetuning(
            run, inputs, batches, num_params(trainable_params), num_params(frozen_params), **notes
        ),
        frozen_params=(frozen_params,),
        save_best=save_best,
    )


def summarize_finetuning(
    run: RunContext,
    inputs: FinetuneInputs,
    batches: BucketedBatches,
    num_trained: int,
    num_frozen: int,
    *,
    rows_name: str = "rows",
    init_note: str = "",
    trained_note: str = "",
) -> list[str]:
    """Formats the summary printed before training.

    `rows_name` is the unit of data.batch_size; the notes are about the initial model
    and the trained tokens.
    """
    config, shapes = run.config, batches.batch_shapes
    init_from = config.finetune.init_from or "random initialization"
    return [
        f"run      {run.run_dir}",
        *inputs.summary_lines,
        f"model    {describe_model(run)}, from {init_from}{init_note}",
        f"trained  {num_trained:,} parameters ({config.finetune.trainable}), "
        f"{num_frozen:,} frozen{trained_note}",
        f"step     {config.data.batch_size} {rows_name} of {', '.join(map(str, shapes))} tokens: "
        f"{len(shapes)} compiled shape{'s' * (len(shapes) > 1)}",
        describe_length(config.train.steps, config.train.steps / batches.steps_per_epoch),
        describe_devices(run),
    ]


def describe_model(run: RunContext) -> str:
    """Number of parameters and shape of the run's model."""
    c = run.config.model
    return (
        f"{parameter_count(c):,} parameters: {c.n_layers} layers, {c.n_heads} heads, "
        f"width {c.d_model}"
    )


def evenly_spaced(items: Sequence[Any], max_items: int) -> list[Any]:
    """At most `max_items` of the items, evenly spaced.

    >>> evenly_spaced("abcdefg", 3), evenly_spaced([], 3)
    (['a', 'd', 'g'], [])
    """
    chosen = np.linspace(0, len(items) - 1, min(max_items, len(items))).round().astype(int)
    return [items[n] for n in chosen]


def final_split(splits: Mapping[str, Any]) -> str:
    """Split of the final evaluation: test, or validation if there is none."""
    return TEST_SPLIT if TEST_SPLIT in splits else VALIDATION_SPLIT


def report_result(
    run: RunContext,
    task: Task,
    split: str,
    metrics: Mapping[str, Any],
    result: str,
    *,
    files: str = "",
    **report: Any,
) -> None:
    """Logs the metrics of the best model on a split; writes figures and report.md.

    The result is one line for the log and the report; `files` are other files of the
    task, for the log; `report` are further arguments of `write_report`.
    """
    if split == TEST_SPLIT:  # others were logged during training
        log_event(run.metrics_path, "eval", run.config.train.steps, split=split, **metrics)
    report = {"units_per_step": task.tokens_per_step, **report}
    write_report(run.run_dir, summary=task.summary, result=result, **report)
    run.log(f"done     {result}")
    run.log(f"wrote    {run.run_dir}/model (best on validation), {files}report.md, figures")
