"""What the book's training loops read and look at, in PyTorch's order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.book import Loader, TorchGenerator, epochs
from gptjax.book.schedule import first_batches, make_book_evaluate, plan_batch_schedule
from gptjax.config import RunConfig, TrainConfig
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from tests.small_models import make_model
from tests.torch_peer import import_torch

# Training and validation rows, rows of a batch, steps between looks, batches of a look,
# looks at the end of an epoch: chapters 5, 6 and 7.
CHAPTERS = [(18, 2, 2, 5, 5, 0), (1045, 149, 8, 50, 5, 1), (935, 55, 8, 5, 5, 0)]


def planned(train, validation, size, every, most, after, steps):
    return plan_batch_schedule(
        Loader(train, size),
        Loader(validation, size, shuffle=False, drop_last=False),
        TorchGenerator(123),
        TrainConfig(steps=steps, eval_every=every, eval_batches=most),
        after,
    )


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_steps_of_a_run_are_those_of_the_epochs(chapter):
    train, _, size, every, _, after = chapter

    course = planned(*chapter, steps=300)

    order = epochs(train, size, 123, eval_every=every, eval_after=after)
    flat = itertools.chain.from_iterable(order)
    assert course.train_batches == list(itertools.islice(flat, 300))
    assert sorted(course.eval_batches)[:3] == [1, every + 1, 2 * every + 1]


def test_a_look_is_the_mean_of_the_means_of_its_batches(tmp_path):
    run = RunContext(RunConfig(train=TrainConfig(eval_batches=2)), tmp_path)
    told = EvalResult([("eval", {"loss": 1.0})], "told", (0.5,))
    zero = jnp.int32(0)
    state = TrainState(zero, {}, (), zero, jax.random.key(0))
    task = Task(
        init_state=state,
        train_step=print,
        batches=lambda first, stop: iter(()),
        tokens_per_step=1,
        evaluate=lambda *at: told,
        to_model=lambda state: make_model(),
        provenance={},
        summary=[],
    )
    course = planned(18, 5, 2, 5, 2, 0, steps=9)
    before = {"loss": first_batches({"train": Loader(4, 2)}, TorchGenerator(0), 1)}

    def score(model, split, rows):
        return {"loss": sum(rows) / len(rows)}

    evaluate = make_book_evaluate(run, task, course, before, score)
    results = {step: evaluate(state, step, False) for step in (0, 1, 2, 6)}

    for result in results.values():
        assert (result.events[0], result.text, result.score) == (
            *(told.events[0], told.text, told.score),
        )
    assert results.pop(2) == told
    books = {step: result.events[1:] for step, result in results.items()}
    assert [kind for ((kind, _),) in books.values()] == ["book"] * 3
    for step in (1, 6):
        ((_, values),) = books[step]
        rows = np.concatenate(course.eval_batches[step])
        assert values["train_loss"] == pytest.approx(rows.mean())
        assert values["validation_loss"] == (0.5 + 2.5) / 2
        (line,) = results[step].log_lines
        assert line.startswith(f"book     train loss {values['train_loss']:.3f}, val")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_looks_of_a_run_are_those_of_a_loop_in_pytorch(chapter):
    torch = import_torch()
    train, validation, size, every, most, after = chapter
    course = planned(*chapter, steps=250)

    def loader(items, whole):
        data = torch.utils.data.DataLoader
        flags = {"shuffle": whole, "drop_last": whole, "collate_fn": list}
        return data(range(items), size, **flags)

    loaders = loader(train, True), loader(validation, False)
    torch.manual_seed(123)
    step = 0
    while step < 250:
        for batch in loaders[0]:
            if step < 250:
                assert course.train_batches[step] == batch
            if step % every == 0:
                some, other = (list(itertools.islice(x, most)) for x in loaders)
                assert course.eval_batches[step + 1] == some
                assert course.val_batches[:most] == other
            step += 1
        for _ in range(after):
            for one in loaders:
                next(iter(one))
