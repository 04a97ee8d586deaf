"""Classification fine-tuning task."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import RunConfig
from gptjax.data.classification import (
    ClassificationBatches,
    LabeledTexts,
    read_labeled_texts,
    take,
)
from gptjax.data.splits import describe_splits, stratified_split
from gptjax.errors import ConfigError
from gptjax.evaluation.classification import ClassificationResult, evaluate_classifier
from gptjax.inference.classify import CLASSIFY_BATCH_SIZE, bucket_lengths
from gptjax.model.classifier import classifier_hidden_states, pool_and_project
from gptjax.model.gpt import unembedding_matrix
from gptjax.parallel.sharding import shard_tree, to_host
from gptjax.plots.report import Misclassification, write_classification_report
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training import estimate
from gptjax.training.finetune import (
    check_validation_split,
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
)
from gptjax.training.loss import classification_loss, fused_cross_entropy
from gptjax.training.metrics import log_event, read_events
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


class ClassificationData(NamedTuple):
    """Data of a classification run."""

    rows: dict[str, LabeledTexts]  # by split
    ids: dict[str, list[list[int]]]
    tokenizer: Tokenizer
    columns: str  # summary line with the detected columns
    num_truncated: int  # rows longer than the context


MakeClassificationTaskFn = Callable[
    [RunContext], tuple[RunContext, Task, ClassificationData]
]


def train_classifier(
    config: RunConfig,
    run_dir: Path,
    log: LogFn = print,
    make_task: MakeClassificationTaskFn | None = None,
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> Model:
    """Fine-tunes a classifier; resumes if the run exists.

    Returns the model of the step with the best validation accuracy; only this one is
    evaluated on the test rows.

    Args:
        config: must match that of an existing run.
        run_dir: run folder; created if missing.
        log: receives log lines.
        make_task: replaces `make_classification_task`.
        options: config options that may change, and the spike policy.

    Raises:
        GptjaxError: invalid data, config or run folder.
        Interrupted: interrupted by a signal; the same call resumes.
    """
    return finetune(
        config,
        run_dir,
        log,
        make_task or make_classification_task,
        finalize_classification,
        options,
    )


def make_classification_task(
    run: RunContext,
) -> tuple[RunContext, Task, ClassificationData]:
    """Builds the classification task; also returns its data."""
    config = run.config
    init_model = load_init_model(config, run.log)
    data = load_classification_data(config, init_model)
    class_names, tokenizer = data.rows[TRAIN_SPLIT].class_names, data.tokenizer
    model_config = resolve_model_config(
        config.model, init_model, tokenizer, len(class_names)
    )
    config = dataclasses.replace(config, model=model_config)
    run = dataclasses.replace(run, config=config)
    key = jax.random.key(config.train.seed)
    params = initial_params(config.model, init_model, tokenizer, key)
    trainable_params, frozen_params = shard_tree(
        split_trainable(config, params, key), run.mesh
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    batches = ClassificationBatches(
        data.ids[TRAIN_SPLIT],
        data.rows[TRAIN_SPLIT].labels,
        config.data.batch_size,
        bucket_lengths(config.model),
        tokenizer.eot_token,
        config.train.seed,
    )

    def to_model(state: TrainState) -> Model:
        return Model(
            config.model,
            full_params(config, to_host(state.params), frozen_params),
            tokenizer,
            class_names,
        )

    def save_best(state: TrainState) -> None:
        state = state._replace(params=to_host(state.params))
        save_finetuned(
            config, run.run_dir, to_model(state), state.params, frozen_params
        )

    mean_length = sum(map(len, data.ids[TRAIN_SPLIT])) / len(data.ids[TRAIN_SPLIT])
    task = Task(
        init_state=init_state(trainable_params, optimizer, key),
        train_step=make_finetune_step(config, classification_loss_fn, optimizer),
        batches=functools.partial(iterate_batches, batches),
        tokens_per_step=mean_length * config.data.batch_size,
        evaluate=make_classification_evaluate(run, data, to_model, save_best),
        to_model=to_model,
        provenance=finetune_provenance(
            tokenizer, init_model, text_label_pairs(data.rows)
        ),
        summary=format_classification_summary(
            run, data, batches, num_params(trainable_params), num_params(frozen_params)
        ),
        frozen_params=(frozen_params,),
    )
    return run, task, data


def load_classification_data(
    c: RunConfig, init_model: Model | None
) -> ClassificationData:
    """Loads, splits and tokenizes the labeled rows."""
    if c.data.batching not in ("auto", "padded"):
        raise ConfigError(
            f"data.batching={c.data.batching!r} is not supported for classification, "
            "which uses one row per text. Remove the option."
        )
    texts, columns = read_labeled_texts(
        c.data.source, c.data.text_column, c.data.label_column
    )
    rows = stratified_split(
        texts,
        c.data.split_strategy,
        val_fraction=c.data.val_fraction,
        test_fraction=c.data.test_fraction,
        seed=c.data.split_seed,
        balance_classes=c.data.balance_classes,
        deduplicate=c.data.deduplicate,
    )
    rows = check_validation_split(c, rows, "rows")
    tokenizer = choose_tokenizer(
        c.data.tokenizer, init_model, lambda: rows[TRAIN_SPLIT].texts
    )
    max_length = c.model.context_length
    if init_model is not None:
        max_length = min(max_length, init_model.config.context_length)
    ids, num_truncated = {}, 0
    for split, part in rows.items():
        token_ids = [tokenizer.encode(text) for text in part.texts]
        num_truncated += sum(len(row) > max_length for row in token_ids)
        ids[split] = [row[:max_length] for row in token_ids]
    return ClassificationData(rows, ids, tokenizer, columns, num_truncated)


def text_label_pairs(rows: dict[str, LabeledTexts]) -> dict[str, Any]:
    """(text, class name) pairs by split."""
    return {
        split: zip(part.texts, (part.class_names[n] for n in part.labels), strict=True)
        for split, part in rows.items()
    }


def classification_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Classification loss plus `finetune.lm_loss_weight` times next-token loss."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    dropout_key = key if config.model.dropout else None
    x_BTD, _ = classifier_hidden_states(
        config.model,
        params,
        tokens,
        lengths,
        dropout_key=dropout_key,
        adapters=adapters,
    )
    logit_BC = pool_and_project(config.model, params, x_BTD, lengths)
    loss_sum, weight = classification_loss(
        logit_BC, batch["labels"], batch["loss_weights"]
    )
    if config.finetune.lm_loss_weight:
        position_BT = jnp.arange(tokens.shape[1])[None]
        inside_BT = (position_BT < lengths[:, None] - 1) & (
            batch["loss_weights"][:, None] > 0
        )
        lm_weight_BT = inside_BT.astype(jnp.float32)
        target_BT = jnp.roll(tokens, -1, axis=1)
        table_VD = unembedding_matrix(config.model, params)
        lm_loss_sum = fused_cross_entropy(
            config.model,
            x_BTD,
            table_VD,
            target_BT,
            lm_weight_BT,
            config.train.loss_chunk_size,
        )
        # Mean over tokens, weighted by the number of texts.
        loss_sum += (
            config.finetune.lm_loss_weight
            * weight
            * lm_loss_sum
            / jnp.maximum(lm_weight_BT.sum(), 1)
        )
    return loss_sum, weight


def make_classification_evaluate(
    run: RunContext,
    data: ClassificationData,
    to_model: Callable[[TrainState], Model],
    save_best: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Evaluates on validation and some training rows; saves the best model.

    The best model has the highest validation accuracy; ties go to the lower loss.
    """
    max_train_rows = run.config.train.eval_batches * CLASSIFY_BATCH_SIZE
    train_subset = (
        np.linspace(0, len(data.ids[TRAIN_SPLIT]) - 1, max_train_rows)
        .round()
        .astype(int)
    )
    train_subset = np.unique(train_subset).tolist()

    def evaluate_split(
        model: Model, split: str, step: int, rows: list[int] | None
    ) -> ClassificationResult:
        texts, ids = data.rows[split], data.ids[split]
        if rows is not None:
            texts, ids = take(texts, rows), [ids[n] for n in rows]
        result = evaluate_classifier(model, texts, ids)
        log_evaluation(run, split, step, result)
        return result

    def evaluate(state: TrainState, step: int, is_last: bool) -> str:
        model = to_model(state)
        evaluate_split(model, TRAIN_SPLIT, step, None if is_last else train_subset)
        previous_scores = [
            (event["accuracy"], -event["loss"])
            for event in read_events(run.metrics_path)
            if event["event"] == "eval" and event["split"] == VALIDATION_SPLIT
        ]
        result = evaluate_split(model, VALIDATION_SPLIT, step, None)
        if (result.metrics.accuracy, -result.loss) > max(
            previous_scores, default=(-1.0, 0.0)
        ):
            save_best(state)
        return f"val {result.loss:.4f} acc {result.metrics.accuracy:.1%}"

    return evaluate


def log_evaluation(
    run: RunContext, split: str, step: int, result: ClassificationResult
) -> None:
    """Writes an evaluation to metrics.jsonl."""
    scores = result.metrics
    log_event(
        run.metrics_path,
        "eval",
        step,
        split=split,
        loss=result.loss,
        accuracy=scores.accuracy,
        macro_f1=scores.macro_f1,
        balanced_accuracy=scores.balanced_accuracy,
    )


def format_classification_summary(
    run: RunContext,
    data: ClassificationData,
    batches: ClassificationBatches,
    num_trainable: int,
    num_frozen: int,
) -> list[str]:
    """Summary printed before training."""
    config, splits = run.config, data.rows
    steps, rows = config.train.steps, config.data.batch_size
    batch_lengths = batches.sampler.batch_shapes
    truncation_note = (
        f"; {data.num_truncated} truncated to the context" if data.num_truncated else ""
    )
    return [
        f"run      {run.run_dir}",
        f"data     {data.columns}",
        *describe_splits(splits),
        f"model    {estimate.parameter_count(config.model):,} parameters: "
        f"{config.model.n_layers} layers, {config.model.n_heads} heads, width {config.model.d_model}, "
        f"from {config.finetune.init_from or 'random initialization'}",
        f"trained  {num_trainable:,} parameters ({config.finetune.trainable}), {num_frozen:,} frozen",
        f"step     {rows} rows of up to {', '.join(map(str, batch_lengths))} tokens: "
        f"{len(batch_lengths)} compiled shapes{truncation_note}",
        describe_length(steps, steps / batches.sampler.steps_per_epoch),
        describe_devices(run),
    ]


def finalize_classification(
    run: RunContext, task: Task, model: Model, data: ClassificationData
) -> None:
    """Evaluates the best model on the test rows; writes figures and report.md."""
    split = TEST_SPLIT if TEST_SPLIT in data.rows else VALIDATION_SPLIT
    texts, ids = data.rows[split], data.ids[split]
    result = evaluate_classifier(model, texts, ids)
    step = run.config.train.steps
    events = read_events(run.metrics_path)
    if split == TEST_SPLIT and not any(e.get("split") == TEST_SPLIT for e in events):
        log_evaluation(run, TEST_SPLIT, step, result)
    predicted_N = result.prob_NC.argmax(axis=-1)
    misclassified = [
        n for n, label in enumerate(texts.labels) if predicted_N[n] != label
    ]
    misclassified.sort(key=lambda n: -result.prob_NC[n, predicted_N[n]])
    mistakes = [
        Misclassification(
            texts.texts[n],
            texts.class_names[texts.labels[n]],
            texts.class_names[predicted_N[n]],
            float(result.prob_NC[n, predicted_N[n]]),
        )
        for n in misclassified
    ]
    scores = result.metrics
    text = (
        f"{split} accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, "
        f"balanced accuracy {scores.balanced_accuracy:.4f} on {len(ids):,} texts "
        f"(majority-class baseline: {majority_baseline(data.rows[TRAIN_SPLIT], texts)})"
    )
    write_classification_report(
        run.run_dir,
        summary=task.summary,
        result=text,
        confusion_CC=result.confusion_CC,
        class_names=texts.class_names,
        mistakes=mistakes,
        examples_per_step=run.config.data.batch_size,
    )
    run.log(f"done     {text}")
    run.log(f"wrote    {run.run_dir}/model (best on validation), report.md, figures")


def majority_baseline(train: LabeledTexts, texts: LabeledTexts) -> str:
    """Accuracy of always predicting the most frequent training label."""
    frequent = max(set(train.labels), key=train.labels.count)
    return f"{texts.labels.count(frequent) / len(texts.labels):.4f}"
