"""Fine-tuning into a classifier: labelled texts and a config in, a model out."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import budget, report
from gptjax.classifier import class_nats, head_logits, read
from gptjax.config import RunConfig
from gptjax.data.folds import describe, split_rows
from gptjax.data.labelled import Labelled, read_labelled, select
from gptjax.data.labelled_batches import LabelledBatches
from gptjax.errors import ConfigError
from gptjax.loss import weighted_nats
from gptjax.model import Params, output_table
from gptjax.optim import make_optimizer
from gptjax.prediction import ROWS, Judged, judge, sizes_of
from gptjax.report_classes import Mistake, write_classification
from gptjax.run_loop import tune_run
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line, length_line
from gptjax.sharding import local, place
from gptjax.starting import (
    choose_tokenizer,
    open_start,
    settled_model,
    starting_params,
    tuning_facts,
    with_validation,
)
from gptjax.tokenizer import Tokenizer
from gptjax.train import TrainState, init_state
from gptjax.trainable import make_tuned_step, parted, save_tuned, stream, whole
from gptjax.tree import count
from gptjax.weights.folder import Model

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Sets(NamedTuple):
    """What a run reads."""

    rows: dict[str, Labelled]  # by split
    ids: dict[str, list[list[int]]]
    tokenizer: Tokenizer
    detected: str  # a line about the file
    cut: int  # rows that are longer than the context


MakeTask = Callable[[Run], tuple[Run, Task, Sets]]


def train_classifier(
    config: RunConfig,
    folder: Path,
    say: Say = print,
    make: MakeTask | None = None,
    wishes: Wishes = NO_WISHES,
) -> Model:
    """Fine-tunes as `config` says in the run folder `folder`, or goes on.

    The model of the step that did best on the validation rows is kept, and only it
    is shown the test rows.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make: makes the task, where it is not `make_task`.
        wishes: what may change, and what follows a spike.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: a signal came; the same call goes on later.
    """
    return tune_run(config, folder, say, make or make_task, finish, wishes)


def make_task(run: Run) -> tuple[Run, Task, Sets]:
    """Classification as the loop wants it, and what it reads."""
    c = run.config
    start = open_start(c, run.say)
    sets = read_sets(c, start)
    names, tokenizer = sets.rows[TRAIN].names, sets.tokenizer
    model = settled_model(c.model, start, tokenizer, len(names))
    c = dataclasses.replace(c, model=model)
    run = dataclasses.replace(run, config=c)
    key = jax.random.key(c.train.seed)
    params = starting_params(c.model, start, tokenizer, key)
    trained, frozen = place(parted(c, params, key), run.mesh)
    optimizer = make_optimizer(c.optim, c.train.steps)
    batches = LabelledBatches(
        sets.ids[TRAIN],
        sets.rows[TRAIN].labels,
        c.data.batch_size,
        sizes_of(c.model),
        tokenizer.eot,
        c.train.seed,
    )

    def model_of(state: TrainState) -> Model:
        return Model(c.model, whole(c, local(state.params), frozen), tokenizer, names)

    def keep(state: TrainState) -> None:
        state = state._replace(params=local(state.params))
        save_tuned(c, run.folder, model_of(state), state.params, frozen)

    tokens = sum(map(len, sets.ids[TRAIN])) / len(sets.ids[TRAIN])
    task = Task(
        fresh=init_state(trained, optimizer, key),
        step=make_tuned_step(c, loss, optimizer),
        batches=functools.partial(stream, batches),
        tokens_per_step=tokens * c.data.batch_size,
        evaluate=make_evaluate(run, sets, model_of, keep),
        model=model_of,
        facts=tuning_facts(tokenizer, start, texts_of(sets.rows)),
        plan=plan_lines(run, sets, batches, count(trained), count(frozen)),
        fixed=(frozen,),
    )
    return run, task, sets


def read_sets(c: RunConfig, start: Model | None) -> Sets:
    """The labelled rows of each split, as text and as tokens."""
    if c.data.batching not in ("auto", "padded"):
        raise ConfigError(
            f"data.batching={c.data.batching!r} is not for classification, which gives "
            "each text a row of its own. Leave it out."
        )
    data, detected = read_labelled(c.data.source, c.data.text, c.data.label)
    rows = split_rows(
        data,
        c.data.split,
        val_fraction=c.data.val_fraction,
        test_fraction=c.data.test_fraction,
        seed=c.data.val_seed,
        balance=c.data.balance,
        dedupe=c.data.dedupe,
    )
    rows = with_validation(c, rows, "rows")
    tokenizer = choose_tokenizer(c.data.tokenizer, start, lambda: rows[TRAIN].texts)
    longest = c.model.context_length
    if start is not None:
        longest = min(longest, start.config.context_length)
    ids, cut = {}, 0
    for split, part in rows.items():
        every = [tokenizer.encode(text) for text in part.texts]
        cut += sum(len(row) > longest for row in every)
        ids[split] = [row[:longest] for row in every]
    return Sets(rows, ids, tokenizer, detected, cut)


def texts_of(rows: dict[str, Labelled]) -> dict[str, Any]:
    """The texts of each split with the names of their classes."""
    return {
        split: zip(part.texts, (part.names[n] for n in part.labels), strict=True)
        for split, part in rows.items()
    }


def loss(
    c: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Nats of the right classes, plus the next-token loss as `tune.lm_weight` says."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    dropout_key = key if c.model.dropout else None
    x_BTD, _ = read(
        c.model, params, tokens, lengths, dropout_key=dropout_key, adapters=adapters
    )
    logit_BC = head_logits(c.model, params, x_BTD, lengths)
    nats, weight = class_nats(logit_BC, batch["classes"], batch["weights"])
    if c.tune.lm_weight:
        place_BT = jnp.arange(tokens.shape[1])[None]
        inside_BT = (place_BT < lengths[:, None] - 1) & (batch["weights"][:, None] > 0)
        counted_BT = inside_BT.astype(jnp.float32)
        target_BT = jnp.roll(tokens, -1, axis=1)
        table_VD = output_table(c.model, params)
        lm_nats = weighted_nats(
            c.model, x_BTD, table_VD, target_BT, counted_BT, c.train.loss_chunk
        )
        # A mean over tokens that counts as often as there are texts.
        nats += c.tune.lm_weight * weight * lm_nats / jnp.maximum(counted_BT.sum(), 1)
    return nats, weight


def make_evaluate(
    run: Run,
    sets: Sets,
    model_of: Callable[[TrainState], Model],
    keep: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Judges the validation rows and some of the training rows; keeps the best model.

    Better is a higher accuracy, and of two that are equal the lower loss.
    """
    most = run.config.train.eval_batches * ROWS
    some = np.linspace(0, len(sets.ids[TRAIN]) - 1, most).round().astype(int)
    some = np.unique(some).tolist()

    def score(model: Model, split: str, done: int, rows: list[int] | None) -> Judged:
        data, ids = sets.rows[split], sets.ids[split]
        if rows is not None:
            data, ids = select(data, rows), [ids[n] for n in rows]
        result = judge(model, data, ids)
        write_judged(run, split, done, result)
        return result

    def evaluate(state: TrainState, done: int, last: bool) -> str:
        model = model_of(state)
        score(model, TRAIN, done, None if last else some)
        before = [
            (event["accuracy"], -event["loss"])
            for event in report.read_events(run.metrics)
            if event["event"] == "eval" and event["split"] == VALIDATION
        ]
        result = score(model, VALIDATION, done, None)
        if (result.scores.accuracy, -result.nats) > max(before, default=(-1.0, 0.0)):
            keep(state)
        return f"val {result.nats:.4f} acc {result.scores.accuracy:.1%}"

    return evaluate


def write_judged(run: Run, split: str, done: int, result: Judged) -> None:
    """Writes an evaluation to the metrics."""
    found = result.scores
    report.write_event(
        run.metrics,
        "eval",
        done,
        split=split,
        loss=result.nats,
        accuracy=found.accuracy,
        macro_f1=found.macro_f1,
        balanced_accuracy=found.balanced_accuracy,
    )


def plan_lines(
    run: Run, sets: Sets, batches: LabelledBatches, trained: int, frozen: int
) -> list[str]:
    """The block that says what will happen, before anything does."""
    c, data = run.config, sets.rows
    steps, rows = c.train.steps, c.data.batch_size
    lengths = batches.deal.shapes
    cut = f"; {sets.cut} are longer than the context and cut" if sets.cut else ""
    return [
        f"run      {run.folder}",
        f"data     {sets.detected}",
        *describe(data),
        f"model    {budget.parameter_count(c.model):,} parameters: "
        f"{c.model.n_layers} layers, {c.model.n_heads} heads, width {c.model.d_model}, "
        f"from {c.tune.start or 'random ones'}",
        f"trained  {trained:,} parameters ({c.tune.trainable}), {frozen:,} frozen",
        f"step     {rows} rows of up to {', '.join(map(str, lengths))} tokens, so "
        f"{len(lengths)} programs{cut}",
        length_line(steps, steps / batches.deal.steps_per_epoch),
        device_line(run),
    ]


def finish(run: Run, task: Task, model: Model, sets: Sets) -> None:
    """Shows the best model the test rows; writes pictures and report.md."""
    split = TEST if TEST in sets.rows else VALIDATION
    data, ids = sets.rows[split], sets.ids[split]
    result = judge(model, data, ids)
    done = run.config.train.steps
    seen = report.read_events(run.metrics)
    if split == TEST and not any(e.get("split") == TEST for e in seen):
        write_judged(run, TEST, done, result)
    best_N = result.chance_NC.argmax(axis=-1)
    wrong = [n for n, label in enumerate(data.labels) if best_N[n] != label]
    wrong.sort(key=lambda n: -result.chance_NC[n, best_N[n]])
    mistakes = [
        Mistake(
            data.texts[n],
            data.names[data.labels[n]],
            data.names[best_N[n]],
            float(result.chance_NC[n, best_N[n]]),
        )
        for n in wrong
    ]
    found = result.scores
    text = (
        f"{split} accuracy {found.accuracy:.4f}, macro-F1 {found.macro_f1:.4f}, "
        f"balanced accuracy {found.balanced_accuracy:.4f} on {len(ids):,} texts "
        f"(always the label that training has most: {baseline(sets.rows[TRAIN], data)})"
    )
    write_classification(
        run.folder,
        plan=task.plan,
        result=text,
        matrix=result.matrix_CC,
        names=data.names,
        mistakes=mistakes,
        examples_per_step=run.config.data.batch_size,
    )
    run.say(f"done     {text}")
    run.say(f"wrote    {run.folder}/model (best on validation), report.md, pictures")


def baseline(train: Labelled, data: Labelled) -> str:
    """Accuracy of always saying the most frequent label of the training rows."""
    frequent = max(set(train.labels), key=train.labels.count)
    return f"{data.labels.count(frequent) / len(data.labels):.4f}"
