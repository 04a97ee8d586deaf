"""Fine-tuning into an assistant: conversations and a config in, a model out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import budget, report
from gptjax.config import RunConfig
from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.example_batches import ExampleBatches, example_batches
from gptjax.data.examples import ANSWERS, EVERYTHING, Example, encode_all, fit_all
from gptjax.errors import DataError
from gptjax.examine import (
    Answered,
    by_task,
    example_loss,
    mean_scores,
    respond,
    response_rows,
    write_rows,
)
from gptjax.loss import batch_nats
from gptjax.model import Params
from gptjax.optim import make_optimizer
from gptjax.report_answers import write_answers
from gptjax.run_loop import tune_run
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line, length_line
from gptjax.sharding import local, place
from gptjax.starting import (
    choose_template,
    choose_tokenizer,
    open_start,
    settled_model,
    split_items,
    starting_params,
    tuning_facts,
)
from gptjax.template import Template
from gptjax.tokenizer import Tokenizer
from gptjax.train import TrainState, init_state
from gptjax.trainable import make_tuned_step, parted, save_tuned, stream, whole
from gptjax.tree import count
from gptjax.weights.folder import Model

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ANSWERED = 32  # validation rows that are answered at each evaluation
TESTED = 512  # test rows that are answered, before the first step and at the end
LONGER = 16  # tokens that an answer may have beyond the longest in the data
MOST_TOKENS = 256  # of an answer, where the data have longer ones


class Sets(NamedTuple):
    """What a run reads, by split."""

    conversations: dict[str, list[Conversation]]
    examples: dict[str, list[Example]]  # of these, as they are learned
    answers: dict[str, list[Example]]  # the same, with only the answers learned
    tokenizer: Tokenizer
    template: Template
    said: list[str]  # what was found

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest last answer, its end included."""
        last = [x.answers[-1] for part in self.answers.values() for x in part]
        return max(stop - start for start, stop in last)


MakeTask = Callable[[Run], tuple[Run, Task, Sets]]


def train_assistant(
    config: RunConfig,
    folder: Path,
    say: Say = print,
    make: MakeTask | None = None,
    wishes: Wishes = NO_WISHES,
) -> Model:
    """Fine-tunes as `config` says in the run folder `folder`, or goes on.

    The model of the step that predicted the validation answers best is kept, and only
    it is shown the test rows.

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
    """Instruction tuning as the loop wants it, and what it reads."""
    c = run.config
    start = open_start(c, run.say)
    sets = read_sets(c, start)
    tokenizer = sets.tokenizer
    c = dataclasses.replace(c, model=settled_model(c.model, start, tokenizer))
    run = dataclasses.replace(run, config=c)
    key = jax.random.key(c.train.seed)
    params = starting_params(c.model, start, tokenizer, key)
    trained, frozen = place(parted(c, params, key), run.mesh)
    optimizer = make_optimizer(c.optim, c.train.steps)
    batches = example_batches(
        c.data.batching,
        sets.examples[TRAIN],
        rows=c.data.batch_size,
        context=c.model.context_length,
        fill=tokenizer.eot,
        seed=c.train.seed,
    )

    def model_of(state: TrainState) -> Model:
        params = whole(c, local(state.params), frozen)
        return Model(c.model, params, tokenizer, template=sets.template.source)

    def keep(state: TrainState) -> None:
        state = state._replace(params=local(state.params))
        save_tuned(c, run.folder, model_of(state), state.params, frozen)

    tokens = sum(len(x.ids) - 1 for x in sets.examples[TRAIN])
    task = Task(
        fresh=init_state(trained, optimizer, key),
        step=make_tuned_step(c, loss, optimizer),
        batches=functools.partial(stream, batches),
        tokens_per_step=tokens / batches.steps_per_epoch,
        evaluate=make_evaluate(run, sets, model_of, keep),
        model=model_of,
        facts=tuning_facts(
            tokenizer,
            start,
            {s: (x.messages for x in part) for s, part in sets.conversations.items()},
            sets.template,
        ),
        plan=plan_lines(run, sets, batches, count(trained), count(frozen)),
        fixed=(frozen,),
    )
    return run, task, sets


def read_sets(c: RunConfig, start: Model | None) -> Sets:
    """The conversations of each split, as messages and as tokens."""
    every, detected = read_conversations(c.data.source)
    split = split_items(c, every, "rows")
    template = choose_template(c.data.template, start)
    texts = (m["content"] for x in split[TRAIN] for m in x.messages)
    tokenizer = choose_tokenizer(c.data.tokenizer, start, lambda: texts)
    context = c.model.context_length
    if start is not None:
        context = min(context, start.config.context_length)
    kinds = ANSWERS if c.data.mask_prompt else EVERYTHING
    if c.data.mask_prompt and c.data.batching == "book":
        kinds = kinds | {"header"}  # as in Raschka 2024, exercise 7.2
    conversations, examples, answers = {}, {}, {}
    cut = skipped = 0
    for name, part in split.items():
        fitted = fit_all(encode_all(tokenizer, template, part, kinds), context)
        if not fitted.examples:
            raise DataError(
                f"no {name} conversation of {c.data.source} has an answer that fits "
                f"model.context_length={context}. Raise it, or shorten the answers."
            )
        conversations[name] = [part[n] for n in fitted.kept]
        examples[name] = fitted.examples
        only = encode_all(tokenizer, template, conversations[name], ANSWERS)
        answers[name] = fit_all(only, context).examples
        cut, skipped = cut + fitted.cut, skipped + fitted.skipped
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in examples.items())
    said = [f"data     {detected}", f"rows     {sizes}"]
    if cut or skipped:
        said.append(
            f"too long {cut} conversations cut at their front, {skipped} left out as "
            f"the answer alone does not fit {context} tokens"
        )
    return Sets(conversations, examples, answers, tokenizer, template, said)


def loss(
    c: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Nats of what is learned of a batch, and how many tokens that is."""
    return batch_nats(
        c.model,
        params,
        batch,
        chunk=c.train.loss_chunk,
        dropout_key=key if c.model.dropout else None,
        adapters=adapters,
    )


def make_evaluate(
    run: Run,
    sets: Sets,
    model_of: Callable[[TrainState], Model],
    keep: Callable[[TrainState], None],
) -> Callable[[TrainState, int, bool], str]:
    """Scores the validation rows and some of the training rows; keeps the best model.

    Better is a lower loss on the validation answers. A fixed few of these rows are
    answered, too; before the first step also the test rows, to compare with.
    """
    rows = spread(sets.conversations[VALIDATION], ANSWERED)
    tests = spread(sets.conversations.get(TEST, []), TESTED)
    some = spread(range(len(sets.examples[TRAIN])), run.config.train.eval_batches * 8)

    def note(split: str, done: int, model: Model, values: dict[str, Any]) -> None:
        chosen = some if split == TRAIN else range(len(sets.examples[split]))
        found = example_loss(model, [sets.examples[split][n] for n in chosen])
        only = found
        if not run.config.data.mask_prompt or run.config.data.batching == "book":
            only = example_loss(model, [sets.answers[split][n] for n in chosen])
        numbers = {"loss": found.loss, "response_loss": only.loss, **values}
        report.write_event(run.metrics, "eval", done, split=split, **numbers)

    def evaluate(state: TrainState, done: int, last: bool) -> str:
        model = model_of(state)
        note(TRAIN, done, model, {})
        scores = mean_scores(respond(model, rows, most_tokens(model, sets)))
        note(VALIDATION, done, model, scores)
        if done == 0 and TEST in sets.examples:
            tested = respond(model, tests, most_tokens(model, sets))
            note(TEST, done, model, mean_scores(tested) | tasks_of(tested))
        events = report.read_events(run.metrics)
        _, losses = report.series(events, "eval", "response_loss", VALIDATION)
        if losses[-1] <= min(losses):
            keep(state)
        match, rouge = scores["exact_match"], scores["rouge_l"]
        return f"val {losses[-1]:.4f} exact {match:.1%} rouge {rouge:.2f}"

    return evaluate


def tasks_of(answered: list[Answered]) -> dict[str, dict[str, float]]:
    """What metrics.jsonl says of the tasks, where the data name some: exact matches."""
    exact = {task: scores["exact_match"] for task, scores in by_task(answered).items()}
    return {"tasks": exact} if exact else {}


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly apart.

    >>> spread("abcdefg", 3), spread([], 3)
    (['a', 'd', 'g'], [])
    """
    chosen = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[n] for n in chosen]


def most_tokens(model: Model, sets: Sets) -> int:
    """How long answers may get: a little longer than those in the data."""
    most = min(MOST_TOKENS, model.config.context_length)
    return min(sets.longest_answer + LONGER, most)


def plan_lines(
    run: Run, sets: Sets, batches: ExampleBatches, trained: int, frozen: int
) -> list[str]:
    """The block that says what will happen, before anything does."""
    c, steps = run.config, run.config.train.steps
    shapes = ", ".join(map(str, batches.shapes))
    example = sets.examples[TRAIN]
    learned = sum(sum(x.learned) for x in example) / sum(len(x.ids) for x in example)
    return [
        f"run      {run.folder}",
        *sets.said,
        f"model    {budget.parameter_count(c.model):,} parameters: "
        f"{c.model.n_layers} layers, {c.model.n_heads} heads, width {c.model.d_model}, "
        f"from {c.tune.start or 'random ones'}",
        f"trained  {trained:,} parameters ({c.tune.trainable}), {frozen:,} frozen; "
        f"{learned:.0%} of the tokens are learned",
        f"step     {c.data.batch_size} rows of {shapes} tokens, so "
        f"{len(batches.shapes)} programs",
        length_line(steps, steps / batches.steps_per_epoch),
        device_line(run),
    ]


def finish(run: Run, task: Task, model: Model, sets: Sets) -> None:
    """Lets the best model answer the test rows; writes them, pictures and report.md."""
    split = TEST if TEST in sets.examples else VALIDATION
    rows = spread(sets.conversations[split], TESTED)
    answered = respond(model, rows, most_tokens(model, sets))
    found, scores = example_loss(model, sets.answers[split]), mean_scores(answered)
    done = run.config.train.steps
    seen = [
        event
        for event in report.read_events(run.metrics)
        if event["event"] == "eval" and event["split"] == split
    ]
    if split == TEST and seen[-1]["step"] != done:
        numbers = {"response_loss": found.loss, **scores, **tasks_of(answered)}
        report.write_event(run.metrics, "eval", done, split=TEST, **numbers)
    write_rows(response_rows(answered), run.folder / "responses.jsonl")
    text = (
        f"{split} loss {found.loss:.4f} nats per token of the answers (before: "
        f"{seen[0]['response_loss']:.4f}); {scores['exact_match']:.4f} of "
        f"{len(answered):,} answers exact (before: {seen[0]['exact_match']:.4f}), "
        f"token F1 {scores['token_f1']:.4f}, ROUGE-L {scores['rouge_l']:.4f}"
    )
    write_answers(
        run.folder,
        plan=task.plan,
        result=text,
        tasks=by_task(answered),
        answers=[
            (x.conversation.messages, x.response, x.reference)
            for x in spread(answered, 8)
        ],
        tokens_per_step=round(task.tokens_per_step),
    )
    run.say(f"done     {text}")
    run.say(
        f"wrote    {run.folder}/model (best on validation), responses.jsonl, "
        "report.md, pictures"
    )
