"""Classification fine-tuning task."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from gptjax.config import DataConfig, RunConfig
from gptjax.data.classification import (
    ClassificationBatches,
    LabeledTexts,
    encode_truncated,
    read_labeled_texts,
    take,
)
from gptjax.data.splits import describe_dropped, describe_splits, drop_duplicates, stratified_split
from gptjax.data.text import TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import ConfigError
from gptjax.evaluation.classification import ClassificationResult, evaluate_classifier
from gptjax.exporters.hf import hf_problem
from gptjax.inference.classify import CLASSIFY_BATCH_SIZE, bucket_lengths
from gptjax.model.classifier import classifier_hidden_states, pool_and_project
from gptjax.model.gpt import unembedding_matrix
from gptjax.plots.curves import accuracy_figure, confusion_figure
from gptjax.plots.report import Misclassification, list_mistakes, per_class_table
from gptjax.runtime.timing import log_progress
from gptjax.tasks import builder
from gptjax.training import finetune
from gptjax.training.loss import cross_entropy_sum, fused_cross_entropy
from gptjax.training.metrics import read_events
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from gptjax.tree import Params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

MAX_TRAIN_ROWS = 10_000  # in the last evaluation


class ClassificationData(NamedTuple):
    """Data of a classification run."""

    rows: dict[str, LabeledTexts]  # by split
    ids: dict[str, Sequence[list[int]]]  # by split, truncated to the context
    inputs: builder.FinetuneInputs


def load_classification_data(run: RunContext) -> tuple[RunContext, ClassificationData]:
    """Loads, splits and tokenizes the labeled rows; resolves the model's config."""
    c = run.config
    if c.data.batching not in ("auto", "padded"):
        raise ConfigError(
            f"data.batching={c.data.batching!r} is not supported for classification, "
            "which uses one row per text. Remove the option."
        )
    init_model = finetune.load_init_model(c.finetune)
    texts, columns = read_labeled_texts(c.data.source, c.data.text_column, c.data.label_column)
    unique = drop_duplicates(texts) if c.data.deduplicate else texts
    rows = stratified_split(
        unique,
        c.data.split_strategy,
        val_fraction=c.data.val_fraction,
        test_fraction=c.data.test_fraction,
        seed=c.data.split_seed,
        balance_classes=c.data.balance_classes,
    )
    dropped = [
        *describe_dropped(texts, [unique], "repeated texts (data.deduplicate)"),
        *describe_dropped(unique, rows.values(), downsampling_reason(c.data)),
    ]
    rows = finetune.check_validation_split(c, rows, "rows")
    train = rows[TRAIN_SPLIT].texts
    tokenizer = finetune.choose_tokenizer(
        c.data.tokenizer, init_model, lambda: log_progress(train, len(train), "counting", "texts")
    )
    max_length = finetune.max_context(c.model, init_model)
    ids, num_truncated = {}, 0
    for split, part in rows.items():
        tracked = log_progress(part.texts, len(part), "encoding", f"{split} texts")
        ids[split], count = encode_truncated(tokenizer, tracked, max_length)
        num_truncated += count
    summary_lines = [f"data     {columns}", *dropped, *describe_splits(rows)]
    if num_truncated:
        summary_lines.append(f"too long {num_truncated} texts truncated to the context")
    if problem := hf_problem(c.model, is_classifier=True):
        summary_lines.append(f"export   not with --to hf: {problem}")
    text_label_pairs = {
        split: zip(part.texts, (part.class_names[n] for n in part.labels), strict=True)
        for split, part in rows.items()
    }
    class_names = rows[TRAIN_SPLIT].class_names
    inputs = builder.FinetuneInputs(
        text_label_pairs, tokenizer, init_model, summary_lines, class_names, texts.columns
    )
    run = builder.with_model_config(run, init_model, tokenizer, len(class_names))
    return run, ClassificationData(rows, ids, inputs)


def downsampling_reason(config: DataConfig) -> str:
    """Why a split leaves out rows of the larger classes."""
    if config.split_strategy == "stratified":
        return "classes balanced (data.balance_classes)"
    return (
        f"left out by data.split_strategy={config.split_strategy}. Keep all rows with "
        "--data.split_strategy stratified"
    )


def make_classification_task(run: RunContext, data: ClassificationData) -> Task:
    """Makes the classification task."""
    config, ids = run.config, data.ids[TRAIN_SPLIT]
    batches = ClassificationBatches(
        ids,
        data.rows[TRAIN_SPLIT].labels,
        rows=config.data.batch_size,
        bucket_lengths=bucket_lengths(config.model),
        pad_id=data.inputs.tokenizer.eot_token,
        seed=config.train.seed,
    )
    return builder.make_finetune_task(
        run,
        data.inputs,
        loss_fn=classification_loss_fn,
        batches=batches,
        tokens_per_step=sum(map(len, ids)) / len(ids) * config.data.batch_size,
        evaluate=make_classification_evaluate(run, data),
    )


def classification_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Classification loss plus `finetune.lm_loss_weight` times next-token loss."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    dropout_key = key if config.model.dropout else None
    x_BTD, _ = classifier_hidden_states(
        config.model, params, tokens, lengths, dropout_key=dropout_key, adapters=adapters
    )
    logit_BC = pool_and_project(config.model, params, x_BTD, lengths)
    loss_sum, weight = cross_entropy_sum(logit_BC, batch["labels"], batch["loss_weights"])
    if config.finetune.lm_loss_weight:
        position_BT = jnp.arange(tokens.shape[1])[None]
        lm_weight_BT = (position_BT < lengths[:, None] - 1).astype(jnp.float32)
        target_BT = jnp.roll(tokens, -1, axis=1)
        table_VD = unembedding_matrix(config.model, params)
        lm_loss_sum = fused_cross_entropy(
            config.model, x_BTD, table_VD, target_BT, lm_weight_BT, config.train.loss_chunk_size
        )
        # Mean over the tokens of the whole batch, weighted by its number of texts.
        num_texts, num_targets = batch["batch_totals"].max(axis=0)
        scale = config.finetune.lm_loss_weight * num_texts
        loss_sum += scale * lm_loss_sum / jnp.maximum(num_targets, 1)
    return loss_sum, weight


def make_classification_evaluate(
    run: RunContext, data: ClassificationData
) -> Callable[[Model, int, bool], EvalResult]:
    """Evaluates on some validation and training rows, at the end on more training rows.

    The best model has the highest validation accuracy; ties go to the lower loss.
    """
    max_rows = run.config.train.eval_batches * CLASSIFY_BATCH_SIZE
    subsets = {
        split: builder.evenly_spaced(range(len(ids)), max_rows) for split, ids in data.ids.items()
    }
    last_rows = builder.evenly_spaced(range(len(data.ids[TRAIN_SPLIT])), MAX_TRAIN_ROWS)

    def evaluate_rows(model: Model, split: str, rows: list[int]) -> ClassificationResult:
        ids = data.ids[split]
        return evaluate_classifier(model, take(data.rows[split], rows), [ids[n] for n in rows])

    def evaluate(model: Model, step: int, is_last: bool) -> EvalResult:
        train_rows = last_rows if is_last else subsets[TRAIN_SPLIT]
        train_result = evaluate_rows(model, TRAIN_SPLIT, train_rows)
        result = evaluate_rows(model, VALIDATION_SPLIT, subsets[VALIDATION_SPLIT])
        accuracy = result.metrics.accuracy
        return EvalResult(
            events=[
                ("eval", {"split": TRAIN_SPLIT, **metric_values(train_result)}),
                ("eval", {"split": VALIDATION_SPLIT, **metric_values(result)}),
            ],
            text=f"val {result.loss:.4f} acc {accuracy:.1%}",
            score=(accuracy, -result.loss),
        )

    return evaluate


def metric_values(result: ClassificationResult) -> dict[str, float]:
    """Values of an "eval" event."""
    names = ("accuracy", "macro_f1", "balanced_accuracy")
    return {"loss": result.loss, **{name: getattr(result.metrics, name) for name in names}}


def finalize_classification(
    run: RunContext, data: ClassificationData, task: Task, state: TrainState
) -> Model:
    """Evaluates the best model on the test rows; writes figures and report.md."""
    model, split = load(run.run_dir / "model"), builder.final_split(data.rows)
    texts, train_labels = data.rows[split], data.rows[TRAIN_SPLIT].labels
    result = evaluate_classifier(model, texts, data.ids[split])
    predicted_N, prob_N = result.prob_NC.argmax(axis=-1), result.prob_NC.max(axis=-1)
    scores, names = result.metrics, texts.class_names
    mistakes = [
        Misclassification(texts.texts[n], names[label], names[predicted_N[n]], float(prob_N[n]))
        for n, label in enumerate(texts.labels)
        if predicted_N[n] != label
    ]
    majority_label = max(set(train_labels), key=train_labels.count)
    baseline = texts.labels.count(majority_label) / len(texts.labels)
    text = (
        f"{split} accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}, "
        f"balanced accuracy {scores.balanced_accuracy:.4f} on {len(texts.labels):,} texts "
        f"(majority-class baseline: {baseline:.4f})"
    )
    examples_per_step = run.config.data.batch_size
    figures = {
        "accuracy": accuracy_figure(read_events(run.metrics_path), examples_per_step),
        "confusion": confusion_figure(result.confusion_CC, names),
    }
    details = [*per_class_table(result.confusion_CC, names), *list_mistakes(mistakes)]
    report = {"units_per_step": examples_per_step, "unit": "example", "figures": figures}
    if run.config.finetune.lm_loss_weight:
        report["auxiliary_loss"] = "next-token loss"
    builder.report_result(run, task, split, metric_values(result), text, details=details, **report)
    return model


CLASSIFY = builder.TaskStages(
    load_classification_data, make_classification_task, finalize_classification
)
