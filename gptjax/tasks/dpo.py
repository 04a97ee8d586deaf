"""Direct preference optimization (DPO) task.

Rafailov et al. 2023, equation 7. The reference model is the one the run starts from;
its log-probabilities are computed once before the first step, so that only one model is
in memory. The reward of an answer is beta times the log-ratio of its probabilities
under model and reference.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.config import RunConfig
from gptjax.data.bucketing import buckets
from gptjax.data.conversations import PreferencePair, read_preference_pairs
from gptjax.data.sft import (
    CHOSEN,
    REJECTED,
    Example,
    PreferenceBatches,
    encode_segments,
    truncate_left,
)
from gptjax.data.text import TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import ConfigError, DataError
from gptjax.runtime.preemption import check_interrupted
from gptjax.runtime.timing import log_progress
from gptjax.tasks import builder
from gptjax.tokenizer.chat_template import ChatTemplate
from gptjax.training import finetune
from gptjax.training.loss import batch_per_token_loss
from gptjax.training.run_dir import hash_pytree
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from gptjax.tree import Params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

PerExample = Float[Array, "B 2"]
ExamplePairs = list[tuple[Example, Example]]


class DPOData(NamedTuple):
    """Data of a DPO run."""

    batches: dict[str, PreferenceBatches]  # by split, with reference log-probabilities
    inputs: builder.FinetuneInputs  # with the parameters of the reference


def load_dpo_data(run: RunContext) -> tuple[RunContext, DPOData]:
    """Loads the pairs and computes their log-probabilities under the initial model."""
    init_model = load_dpo_init_model(run)
    tokenizer = init_model.tokenizer
    template = finetune.choose_chat_template(run.config.data.chat_template, init_model, tokenizer)
    pairs, summary_lines = load_pairs(run.config, init_model, template)
    run = builder.with_model_config(run, init_model, tokenizer)
    config = run.config
    params = builder.make_initial_params(run, init_model, tokenizer)
    batches = {}
    for split, split_pairs in pairs.items():
        zero_batches = PreferenceBatches(
            split_pairs,
            np.zeros((len(split_pairs), 2), np.float32),
            rows=config.data.batch_size,
            bucket_lengths=buckets(config.model.context_length),
            pad_id=tokenizer.eot_token,
            seed=config.train.seed,
        )
        reference_logprobs = sequence_logprobs(config, params, zero_batches)
        batches[split] = dataclasses.replace(zero_batches, reference_logprobs=reference_logprobs)
    inputs = builder.FinetuneInputs(
        *(pairs, tokenizer, init_model, summary_lines), chat_template=template.source, params=params
    )
    return run, DPOData(batches, inputs)


def load_dpo_init_model(run: RunContext) -> Model:
    """Loads the model to start from; rejects options that do not apply to DPO."""
    init_model, data = finetune.load_init_model(run.config.finetune), run.config.data
    if init_model is None:
        raise ConfigError(
            "train.task='dpo' requires an initial model: set finetune.init_from to the "
            "folder of a run with train.task='sft'."
        )
    is_padded = data.batching in ("auto", "padded")
    if data.tokenizer or not (data.completion_only_loss and is_padded):
        raise ConfigError(
            f"data.tokenizer={data.tokenizer!r}, data.batching={data.batching!r} and "
            f"data.completion_only_loss={data.completion_only_loss} are not supported "
            "for train.task='dpo', which uses the tokenizer of finetune.init_from, "
            "padded batches and completion-only loss. Remove these options."
        )
    return init_model


def load_pairs(
    config: RunConfig, init_model: Model, template: ChatTemplate
) -> tuple[dict[str, ExamplePairs], list[str]]:
    """Loads, splits and tokenizes the pairs; also returns summary lines."""
    all_pairs, columns = read_preference_pairs(config.data.source)
    splits = finetune.train_val_test_split(config, all_pairs, "pairs")
    context = finetune.max_context(config.model, init_model)
    pairs, num_equal, num_too_long = {}, 0, 0
    for name, part in splits.items():
        unequal = [pair for pair in part if pair.chosen != pair.rejected]
        tracked = log_progress(unequal, len(unequal), "encoding", f"{name} pairs")
        tokenized = [tokenize_pair(pair, init_model, template, context) for pair in tracked]
        pairs[name] = [pair for pair in tokenized if pair is not None]
        num_equal += len(part) - len(unequal)
        num_too_long += tokenized.count(None)
        if not pairs[name]:
            raise DataError(
                f"no {name} pair of {config.data.source} has two different answers "
                f"that fit model.context_length={context}. Raise it, or shorten them."
            )
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in pairs.items())
    summary_lines = [f"data     {columns}", f"pairs    {sizes}"]
    if num_equal or num_too_long:
        summary_lines.append(
            f"dropped  {num_equal} pairs with equal answers, {num_too_long} with an "
            f"answer that does not fit {context} tokens"
        )
    return pairs, summary_lines


def tokenize_pair(
    pair: PreferencePair, init_model: Model, template: ChatTemplate, context: int
) -> tuple[Example, Example] | None:
    """Both conversations of a pair as tokens, or None if one does not fit."""
    examples = []
    for answer in (pair.chosen, pair.rejected):
        messages = [*pair.prompt, {"role": "assistant", "content": answer}]
        example = encode_segments(init_model.tokenizer, template.segments(messages))
        # Earlier answers are part of the prompt.
        answer_start, _ = example.answer_spans[-1]
        loss_mask = [on and n >= answer_start for n, on in enumerate(example.loss_mask)]
        examples.append(truncate_left(example._replace(loss_mask=loss_mask), context + 1))
    chosen, rejected = examples
    return None if chosen is None or rejected is None else (chosen, rejected)


def make_dpo_task(run: RunContext, data: DPOData) -> Task:
    """Makes the DPO task."""
    batches = data.batches[TRAIN_SPLIT]
    num_tokens = sum(len(x.ids) - 1 for pair in batches.pairs for x in pair)
    task = builder.make_finetune_task(
        run,
        data.inputs,
        loss_fn=dpo_loss_fn,
        batches=batches,
        tokens_per_step=num_tokens / batches.steps_per_epoch,
        evaluate=make_dpo_evaluate(run, data.batches),
        rows_name="pairs of rows",
        init_note=f" (also the reference; beta {run.config.finetune.dpo_beta})",
    )
    reference = {name: hash_pytree(part.reference_logprobs) for name, part in data.batches.items()}
    return dataclasses.replace(task, provenance={**task.provenance, "reference": reference})


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


jit_answer_logprobs = jax.jit(answer_logprobs, static_argnums=0)


def sequence_logprobs(
    config: RunConfig, params: Params, batches: PreferenceBatches
) -> Float[np.ndarray, "P 2"]:
    """Log-probability of each answer, in the order of the pairs."""
    logprob_P2 = np.zeros((len(batches.pairs), 2), np.float32)
    for indices, batch in batches.in_order():
        check_interrupted()
        logprob_B2 = jit_answer_logprobs(config, params, batch)
        logprob_P2[indices] = np.asarray(logprob_B2)[: len(indices)]
    return logprob_P2


def dpo_loss(logratio_B2: PerExample, beta: float) -> Float[Array, " B"]:
    """DPO loss of each pair, from log-probability ratios to the reference (nats).

    >>> import jax.numpy as jnp
    >>> print(dpo_loss(jnp.zeros((1, 2)), 0.1)[0])  # ln 2, before the first step
    0.6931472
    """
    return -jax.nn.log_sigmoid(beta * (logratio_B2[:, CHOSEN] - logratio_B2[:, REJECTED]))


def dpo_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Summed DPO loss of a batch, and its number of pairs."""
    logprob_B2 = answer_logprobs(config, params, batch, key, adapters)
    loss_B = dpo_loss(logprob_B2 - batch["reference_logprobs"], config.finetune.dpo_beta)
    valid_B = jnp.any(batch["loss_weights"] > 0, axis=(1, 2))
    return jnp.sum(jnp.where(valid_B, loss_B, 0.0)), valid_B.sum().astype(jnp.float32)


def evaluate_pairs(config: RunConfig, model: Model, batches: PreferenceBatches) -> dict[str, float]:
    """Evaluates a model on all pairs; returns the fields of an "eval" event.

    The margin is the reward of the chosen answer minus that of the rejected one; the
    accuracy is the fraction of positive margins, where 0 counts as half.
    """
    logratio_P2 = sequence_logprobs(config, model.params, batches) - batches.reference_logprobs
    reward_P2 = config.finetune.dpo_beta * logratio_P2.astype(np.float64)
    margin_P = reward_P2[:, CHOSEN] - reward_P2[:, REJECTED]
    return {
        "loss": float(np.logaddexp(0, -margin_P).mean()),
        "margin": float(margin_P.mean()),
        "accuracy": float(np.mean((np.sign(margin_P) + 1) / 2)),
        "chosen_reward": float(reward_P2[:, CHOSEN].mean()),
        "rejected_reward": float(reward_P2[:, REJECTED].mean()),
    }


def make_dpo_evaluate(
    run: RunContext, batches: dict[str, PreferenceBatches]
) -> Callable[[Model, int, bool], EvalResult]:
    """Evaluates on some training pairs and validation pairs, which select the model."""
    max_pairs = run.config.train.eval_batches * run.config.data.batch_size

    def subset(split: str) -> PreferenceBatches:
        pairs, logprobs = batches[split].pairs, batches[split].reference_logprobs
        return dataclasses.replace(
            batches[split], pairs=pairs[:max_pairs], reference_logprobs=logprobs[:max_pairs]
        )

    subsets = {split: subset(split) for split in (TRAIN_SPLIT, VALIDATION_SPLIT)}

    def evaluate(model: Model, step: int, is_last: bool) -> EvalResult:
        metrics = {
            split: evaluate_pairs(run.config, model, part) for split, part in subsets.items()
        }
        validation = metrics[VALIDATION_SPLIT]
        return EvalResult(
            events=[("eval", {"split": split, **values}) for split, values in metrics.items()],
            text=f"val {validation['loss']:.4f} margin {validation['margin']:.3f} "
            f"accuracy {validation['accuracy']:.1%}",
            score=(-validation["loss"], float(step)),  # of equal losses, the later
        )

    return evaluate


def finalize_dpo(run: RunContext, data: DPOData, task: Task, state: TrainState) -> Model:
    """Evaluates the best model on the test pairs; writes figures and report.md."""
    model, split = load(run.run_dir / "model"), builder.final_split(data.batches)
    metrics = evaluate_pairs(run.config, model, data.batches[split])
    text = (
        f"{split} loss {metrics['loss']:.4f}, margin {metrics['margin']:.4f}, "
        f"accuracy {metrics['accuracy']:.1%} on {len(data.batches[split].pairs):,} "
        "pairs (chance: 50%)"
    )
    units = {"units_per_step": run.config.data.batch_size, "unit": "pair"}
    builder.report_result(run, task, split, metrics, text, **units)
    return model


DPO = builder.TaskStages(load_dpo_data, make_dpo_task, finalize_dpo)
