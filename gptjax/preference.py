"""Preference tuning: DPO, from an assistant and pairs of answers to a better one.

Rafailov et al. 2023, equation 7. The reference is the model that the run starts from;
its log-probabilities are computed once, before the first step, so that only one model
is in memory. A reward is beta times what an answer's log-probability has gained.
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

from gptjax import budget, report
from gptjax.config import RunConfig
from gptjax.data.conversations import Pair, read_pairs
from gptjax.data.examples import Example, encode, fitted
from gptjax.data.pair_batches import CHOSEN, REJECTED, PairBatches, pair_batches
from gptjax.errors import ConfigError, DataError
from gptjax.fingerprint import of_arrays
from gptjax.loss import batch_token_nats
from gptjax.model import Params
from gptjax.optim import make_optimizer
from gptjax.report_answers import write_answers
from gptjax.run_loop import tune_run
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line, length_line
from gptjax.sharding import local, place
from gptjax.starting import (
    choose_template,
    open_start,
    settled_model,
    split_items,
    starting_params,
    tuning_facts,
)
from gptjax.stopping import poll
from gptjax.template import Template
from gptjax.train import TrainState, init_state
from gptjax.trainable import make_tuned_step, parted, save_tuned, stream, whole
from gptjax.tree import count
from gptjax.weights.folder import Model

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PerAnswer = Float[Array, "B 2"]
Pairs = list[tuple[Example, Example]]


class Sets(NamedTuple):
    """What a run reads."""

    pairs: dict[str, Pairs]  # chosen and rejected, by split
    template: Template
    said: list[str]  # what was found


class Preferred(NamedTuple):
    """How a model does on pairs."""

    loss: float  # nats per pair
    margin: float  # reward of the chosen answer less that of the rejected one
    accuracy: float  # part of the pairs whose margin is positive; of 0 counts half
    chosen_reward: float
    rejected_reward: float


def train_preference(
    config: RunConfig, folder: Path, say: Say = print, wishes: Wishes = NO_WISHES
) -> Model:
    """Tunes as `config` says in the run folder `folder`, or goes on where it ended.

    The model of the step with the least loss on the validation pairs is kept.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: a signal came; the same call goes on later.
    """
    return tune_run(config, folder, say, make_task, finish, wishes)


def make_task(run: Run) -> tuple[Run, Task, dict[str, PairBatches]]:
    """Preference tuning as the loop wants it, and the pairs with their reference."""
    c = run.config
    start = open_start(c, run.say)
    if start is None:
        raise ConfigError(
            "preference tuning needs an assistant to start from: set tune.start to the "
            "folder of a run with train.task = 'instruct'."
        )
    tokenizer = start.tokenizer
    usual = c.data.mask_prompt and c.data.batching in ("auto", "padded")
    if c.data.tokenizer or not usual:
        raise ConfigError(
            f"data.tokenizer={c.data.tokenizer!r}, data.batching={c.data.batching!r} "
            f"and data.mask_prompt={c.data.mask_prompt} do not fit preference tuning, "
            "which keeps the tokenizer of tune.start, pads, and compares answers "
            "alone. Leave them out."
        )
    sets = read_sets(c, start)
    c = dataclasses.replace(c, model=settled_model(c.model, start, tokenizer))
    run = dataclasses.replace(run, config=c)
    key = jax.random.key(c.train.seed)
    params = starting_params(c.model, start, tokenizer, key)
    batches = {}
    for split, pairs in sets.pairs.items():
        shape: Any = {"rows": c.data.batch_size, "context": c.model.context_length}
        shape |= {"fill": tokenizer.eot, "seed": c.train.seed}
        reference = log_probabilities(c, params, pair_batches(pairs, **shape))
        batches[split] = pair_batches(pairs, reference=reference, **shape)
    trained, frozen = place(parted(c, params, key), run.mesh)
    optimizer = make_optimizer(c.optim, c.train.steps)

    def model_of(state: TrainState) -> Model:
        params = whole(c, local(state.params), frozen)
        return Model(c.model, params, tokenizer, template=sets.template.source)

    def keep(state: TrainState) -> None:
        state = state._replace(params=local(state.params))
        save_tuned(c, run.folder, model_of(state), state.params, frozen)

    tokens = sum(len(x.ids) - 1 for pair in sets.pairs[TRAIN] for x in pair)
    task = Task(
        fresh=init_state(trained, optimizer, key),
        step=make_tuned_step(c, loss, optimizer),
        batches=functools.partial(stream, batches[TRAIN]),
        tokens_per_step=tokens / batches[TRAIN].steps_per_epoch,
        evaluate=make_evaluate(run, batches, model_of, keep),
        model=model_of,
        facts={
            **tuning_facts(tokenizer, start, sets.pairs, sets.template),
            "reference": {s: of_arrays(b.reference) for s, b in batches.items()},
        },
        plan=plan_lines(run, sets, batches[TRAIN], count(trained), count(frozen)),
        fixed=(frozen,),
    )
    return run, task, batches


def read_sets(c: RunConfig, start: Model) -> Sets:
    """The pairs of each split as tokens; only answers are learned."""
    every, detected = read_pairs(c.data.source)
    split = split_items(c, every, "pairs")
    template = choose_template(c.data.template, start)
    context = min(c.model.context_length, start.config.context_length)
    pairs, equal, long = {}, 0, 0
    for name, part in split.items():
        unequal = [pair for pair in part if pair.chosen != pair.rejected]
        found = [examples_of(pair, start, template, context) for pair in unequal]
        pairs[name] = [pair for pair in found if pair is not None]
        equal, long = equal + len(part) - len(unequal), long + found.count(None)
        if not pairs[name]:
            raise DataError(
                f"no {name} pair of {c.data.source} has two different answers that fit "
                f"model.context_length={context}. Raise it, or shorten them."
            )
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in pairs.items())
    said = [f"data     {detected}", f"pairs    {sizes}"]
    if equal or long:
        said.append(
            f"left out {equal} pairs of equal answers, {long} with an answer that does "
            f"not fit {context} tokens"
        )
    return Sets(pairs, template, said)


def examples_of(
    pair: Pair, start: Model, template: Template, context: int
) -> tuple[Example, Example] | None:
    """The two conversations as tokens, or None where one does not fit."""
    both = []
    for answer in (pair.chosen, pair.rejected):
        messages = [*pair.prompt, {"role": "assistant", "content": answer}]
        example = encode(start.tokenizer, template.pieces(messages))
        first, _ = example.answers[-1]  # answers before it are part of the prompt
        learned = [on and n >= first for n, on in enumerate(example.learned)]
        both.append(fitted(example._replace(learned=learned), context + 1))
    chosen, rejected = both
    return None if chosen is None or rejected is None else (chosen, rejected)


def answer_nats(
    c: RunConfig, params: Params, batch: Any, key: Any = None, adapters: Any = None
) -> PerAnswer:
    """Log-probability of each answer of a batch of pairs, its end included; nats."""
    rows = {
        name: array.reshape(-1, array.shape[-1])
        for name, array in batch.items()
        if name != "reference"
    }
    nats_RT = batch_token_nats(
        c.model,
        params,
        rows,
        chunk=c.train.loss_chunk,
        dropout_key=key if c.model.dropout else None,
        adapters=adapters,
    )
    return -jnp.sum(nats_RT * rows["weights"], axis=-1).reshape(-1, 2)


def log_probabilities(
    c: RunConfig, params: Params, batches: PairBatches
) -> Float[np.ndarray, "P 2"]:
    """The log-probability of each answer, in the order of the pairs."""
    found = np.zeros((len(batches.pairs), 2), np.float32)
    for chosen, batch in batches.in_order():
        poll()
        found[chosen] = np.asarray(compiled_nats(c)(params, batch))[: len(chosen)]
    return found


@functools.lru_cache(maxsize=2)
def compiled_nats(c: RunConfig) -> Callable[[Params, Any], PerAnswer]:
    """`answer_nats` of a run, compiled once for each shape of batch."""
    return jax.jit(functools.partial(answer_nats, c))


def dpo_nats(gain_B2: PerAnswer, beta: float) -> Float[Array, " B"]:
    """The DPO loss of each pair.

    Args:
        gain_B2: what the log-probabilities of both answers have gained; nats.
        beta: how much a gain counts.

    >>> import jax.numpy as jnp
    >>> print(dpo_nats(jnp.zeros((1, 2)), 0.1)[0])  # ln 2, before the first step
    0.6931472
    """
    return -jax.nn.log_sigmoid(beta * (gain_B2[:, CHOSEN] - gain_B2[:, REJECTED]))


def loss(
    c: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """The DPO loss of a batch, summed, and the number of pairs."""
    logprob_B2 = answer_nats(c, params, batch, key, adapters)
    nats_B = dpo_nats(logprob_B2 - batch["reference"], c.tune.beta)
    real_B = jnp.any(batch["weights"] > 0, axis=(1, 2))
    return jnp.sum(jnp.where(real_B, nats_B, 0.0)), real_B.sum().astype(jnp.float32)


def compare(c: RunConfig, model: Model, batches: PairBatches) -> Preferred:
    """How the model does on all pairs of the batches."""
    gain_P2 = log_probabilities(c, model.params, batches) - batches.reference
    reward_P2 = c.tune.beta * gain_P2.astype(np.float64)
    margin_P = reward_P2[:, CHOSEN] - reward_P2[:, REJECTED]
    return Preferred(
        loss=float(np.logaddexp(0, -margin_P).mean()),
        margin=float(margin_P.mean()),
        accuracy=float(np.mean((np.sign(margin_P) + 1) / 2)),
        chosen_reward=float(reward_P2[:, CHOSEN].mean()),
        rejected_reward=float(reward_P2[:, REJECTED].mean()),
    )


def make_evaluate(
    run: Run,
    batches: dict[str, PairBatches],
    model_of: Callable[[TrainState], Model],
    keep: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Compares on the validation and some training pairs; keeps the best model."""
    most = run.config.train.eval_batches * run.config.data.batch_size
    some = {TRAIN: first_pairs(batches[TRAIN], most), VALIDATION: batches[VALIDATION]}

    def evaluate(state: TrainState, done: int, last: bool) -> str:
        model = model_of(state)
        found = {split: compare(run.config, model, some[split]) for split in some}
        for split, scores in found.items():
            report.write_event(
                run.metrics, "eval", done, split=split, **scores._asdict()
            )
        events = report.read_events(run.metrics)
        _, losses = report.series(events, "eval", "loss", VALIDATION)
        if losses[-1] <= min(losses):
            keep(state)
        held = found[VALIDATION]
        return f"val {held.loss:.4f} margin {held.margin:.3f} {words(held)}"

    return evaluate


def words(found: Preferred) -> str:
    """Which part of the pairs is preferred as it should be."""
    return f"prefers {found.accuracy:.1%}"


def first_pairs(batches: PairBatches, most: int) -> PairBatches:
    """The first pairs of some batches."""
    lengths = list(batches.deal.lengths)[:most]
    return batches._replace(
        pairs=batches.pairs[:most],
        reference=batches.reference[:most],
        deal=dataclasses.replace(batches.deal, lengths=lengths),
    )


def plan_lines(
    run: Run, sets: Sets, batches: PairBatches, trained: int, frozen: int
) -> list[str]:
    """The block that says what will happen, before anything does."""
    c, steps = run.config, run.config.train.steps
    shapes = ", ".join(map(str, batches.shapes))
    return [
        f"run      {run.folder}",
        *sets.said,
        f"model    {budget.parameter_count(c.model):,} parameters: "
        f"{c.model.n_layers} layers, {c.model.n_heads} heads, width {c.model.d_model}, "
        f"from {c.tune.start}, which is the reference (beta {c.tune.beta})",
        f"trained  {trained:,} parameters ({c.tune.trainable}), {frozen:,} frozen",
        f"step     {c.data.batch_size} pairs of rows of {shapes} tokens, so "
        f"{len(batches.shapes)} programs",
        length_line(steps, steps / batches.steps_per_epoch),
        device_line(run),
    ]


def finish(run: Run, task: Task, model: Model, batches: dict[str, PairBatches]) -> None:
    """Compares on the test pairs with the best model; writes pictures and report.md."""
    split = TEST if TEST in batches else VALIDATION
    found = compare(run.config, model, batches[split])
    seen = report.read_events(run.metrics)
    if split == TEST and not any(e.get("split") == TEST for e in seen):
        done = run.config.train.steps
        report.write_event(run.metrics, "eval", done, split=TEST, **found._asdict())
    text = (
        f"{split} loss {found.loss:.4f}, margin {found.margin:.4f}, {words(found)} of "
        f"{len(batches[split].pairs):,} pairs as it should (guessing: 50%)"
    )
    write_answers(
        run.folder,
        plan=task.plan,
        result=text,
        tokens_per_step=round(task.tokens_per_step),
    )
    run.say(f"done     {text}")
    run.say(f"wrote    {run.folder}/model (best on validation), report.md, pictures")
