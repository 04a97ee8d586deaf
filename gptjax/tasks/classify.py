"""Classification fine-tuning task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.config import RunConfig
from gptjax.data.classification import ClassificationBatches, LabeledTexts, read_labeled_texts, take
from gptjax.data.splits import describe_splits, stratified_split
from gptjax.data.text import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import ConfigError
from gptjax.evaluation.classification import ClassificationResult, evaluate_classifier
from gptjax.inference.classify import CLASSIFY_BATCH_SIZE, bucket_lengths
from gptjax.model.classifier import classifier_hidden_states, pool_and_project
from gptjax.model.gpt import unembedding_matrix
from gptjax.plots.report import Misclassification, write_classification_report
from gptjax.tasks.builder import (
    FinetuneSummary,
    TaskStages,
    load_best_model,
    make_finetune_task,
    make_initial_params,
    with_model_config,
)
from gptjax.tokenizer.tokenizer import Tokenizer
from gptjax.training.finetune import (
    check_validation_split,
    choose_tokenizer,
    finetune_provenance,
    load_init_model,
)
from gptjax.training.loss import classification_loss, fused_cross_entropy
from gptjax.training.metrics import log_event
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from gptjax.tree import Params
from gptjax.weights.model_folder import Model


class ClassificationData(NamedTuple):
    """Data of a classification run."""

    rows: dict[str, LabeledTexts]  # by split
    ids: dict[str, list[list[int]]]  # by split, truncated to the context
    tokenizer: Tokenizer
    init_model: Model | None
    summary_lines: list[str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes [C]."""
        return self.rows[TRAIN_SPLIT].class_names


def load_classification_data(run: RunContext) -> tuple[RunContext, ClassificationData]:
    """Loads, splits and tokenizes the labeled rows; resolves the model's config."""
    c = run.config
    init_model = load_init_model(c.finetune, run.log)
    if c.data.batching not in ("auto", "padded"):
        raise ConfigError(
            f"data.batching={c.data.batching!r} is not supported for classification, "
            "which uses one row per text. Remove the option."
        )
    texts, columns = read_labeled_texts(c.data.source, c.data.text_column, c.data.label_column)
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
    tokenizer = choose_tokenizer(c.data.tokenizer, init_model, lambda: rows[TRAIN_SPLIT].texts)
    max_length = c.model.context_length
    if init_model is not None:
        max_length = min(max_length, init_model.config.context_length)
    ids, num_truncated = {}, 0
    for split, part in rows.items():
        token_ids = [tokenizer.encode(text) for text in part.texts]
        num_truncated += sum(len(row) > max_length for row in token_ids)
        ids[split] = [row[:max_length] for row in token_ids]
    summary_lines = [f"data     {columns}", *describe_splits(rows)]
    if num_truncated:
        summary_lines.append(f"too long {num_truncated} texts truncated to the context")
    data = ClassificationData(rows, ids, tokenizer, init_model, summary_lines)
    run = with_model_config(run, init_model, tokenizer, len(data.class_names))
    return run, data


def make_classification_task(run: RunContext, data: ClassificationData) -> Task:
    """Makes the classification task."""
    config, tokenizer = run.config, data.tokenizer
    ids = data.ids[TRAIN_SPLIT]
    batches = ClassificationBatches(
        ids,
        data.rows[TRAIN_SPLIT].labels,
        rows=config.data.batch_size,
        bucket_lengths=bucket_lengths(config.model),
        pad_id=tokenizer.eot_token,
        seed=config.train.seed,
    )
    return make_finetune_task(
        run,
        make_initial_params(run, data.init_model, tokenizer),
        loss_fn=classification_loss_fn,
        batches=batches,
        tokens_per_step=sum(map(len, ids)) / len(ids) * config.data.batch_size,
        evaluate=make_classification_evaluate(run, data),
        make_model=lambda params: Model(config.model, params, tokenizer, data.class_names),
        provenance=finetune_provenance(tokenizer, data.init_model, text_label_pairs(data.rows)),
        summary=FinetuneSummary(data.summary_lines, "rows"),
    )


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
        config.model, params, tokens, lengths, dropout_key=dropout_key, adapters=adapters
    )
    logit_BC = pool_and_project(config.model, params, x_BTD, lengths)
    loss_sum, weight = classification_loss(logit_BC, batch["labels"], batch["loss_weights"])
    if config.finetune.lm_loss_weight:
        position_BT = jnp.arange(tokens.shape[1])[None]
        inside_BT = (position_BT < lengths[:, None] - 1) & (batch["loss_weights"][:, None] > 0)
        lm_weight_BT = inside_BT.astype(jnp.float32)
        target_BT = jnp.roll(tokens, -1, axis=1)
        table_VD = unembedding_matrix(config.model, params)
        lm_loss_sum = fused_cross_entropy(
            config.model, x_BTD, table_VD, target_BT, lm_weight_BT, config.train.loss_chunk_size
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
    run: RunContext, data: ClassificationData
) -> Callable[[Model, int, bool], EvalResult]:
    """Evaluates on validation and some training rows.

    The best model has the highest validation accuracy; ties go to the lower loss.
    """
    max_train_rows = run.config.train.eval_batches * CLASSIFY_BATCH_SIZE
    last_row = len(data.ids[TRAIN_SPLIT]) - 1
    train_subset = np.linspace(0, last_row, max_train_rows).round().astype(int)
    train_subset = np.unique(train_subset).tolist()

    def evaluate_split(model: Model, split: str, rows: list[int] | None) -> ClassificationResult:
        texts, ids = data.rows[split], data.ids[split]
        if rows is not None:
            texts, ids = take(texts, rows), [ids[n] for n in rows]
        return evaluate_classifier(model, texts, ids)

    def evaluate(model: Model, step: int, is_last: bool) -> EvalResult:
        train_rows = None if is_last else train_subset
        train_result = evaluate_split(model, TRAIN_SPLIT, train_rows)
        result = evaluate_split(model, VALIDATION_SPLIT, None)
        accuracy = result.metrics.accuracy
        return EvalResult(
            events=[
                ("eval", to_event(TRAIN_SPLIT, train_result)),
                ("eval", to_event(VALIDATION_SPLIT, result)),
            ],
            text=f"val {result.loss:.4f} acc {accuracy:.1%}",
            score=(accuracy, -result.loss),
        )

    return evaluate


def to_event(split: str, result: ClassificationResult) -> dict[str, Any]:
    """Values of an "eval" event."""
    return {
        "split": split,
        "loss": result.loss,
        "accuracy": result.metrics.accuracy,
        "macro_f1": result.metrics.macro_f1,
        "balanced_accuracy": result.metrics.balanced_accuracy,
    }


def finalize_classification(
    run: RunContext, data: ClassificationData, task: Task, state: TrainState
) -> Model:
    """Evaluates the best model on the test rows; writes figures and report.md."""
    model = load_best_model(run)
    split = TEST_SPLIT if TEST_SPLIT in data.rows else VALIDATION_SPLIT
    texts, ids = data.rows[split], data.ids[split]
    result = evaluate_classifier(model, texts, ids)
    step = run.config.train.steps
    if split == TEST_SPLIT:
        log_event(run.metrics_path, "eval", step, **to_event(TEST_SPLIT, result))
    predicted_N = result.prob_NC.argmax(axis=-1)
    misclassified = [n for n, label in enumerate(texts.labels) if predicted_N[n] != label]
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
    return model


def majority_baseline(train: LabeledTexts, texts: LabeledTexts) -> str:
    """Accuracy of always predicting the most frequent training label."""
    frequent = max(set(train.labels), key=train.labels.count)
    return f"{texts.labels.count(frequent) / len(texts.labels):.4f}"


CLASSIFY = TaskStages(load_classification_data, make_classification_task, finalize_classification)
