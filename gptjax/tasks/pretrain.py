"""Pretraining task."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from gptjax.config import DataConfig
from gptjax.data.lm import LMBatches, validation_batches
from gptjax.data.prepare import TokenizedSplits, open_dataset
from gptjax.data.token_files import is_prepared_dir
from gptjax.errors import ConfigError
from gptjax.evaluation import perplexity
from gptjax.fileio.download import sha256_of_files
from gptjax.fileio.paths import user_path
from gptjax.inference.generate import complete
from gptjax.parallel.sharding import local_batch_rows, shard_tree, to_host
from gptjax.plots.report import write_report
from gptjax.runtime.prng import make_key
from gptjax.tasks.builder import TaskStages, describe_model, make_initial_params, with_model_config
from gptjax.tokenizer import tokenizer
from gptjax.training import estimate
from gptjax.training.finetune import load_init_model, model_provenance
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.metrics import format_number, read_events
from gptjax.training.optimizer import make_optimizer
from gptjax.training.task import EvalResult, RunContext, Task, describe_devices, describe_length
from gptjax.training.train_step import TrainState, init_state, make_train_step
from gptjax.weights.load import resolve_model
from gptjax.weights.model_folder import Model, save

DOCUMENT_MODE = {"auto": True, "packed": True, "concat": False}  # data.batching
SAMPLE_TOKENS = 60


class PretrainData(NamedTuple):
    """Data of a pretraining run."""

    splits: TokenizedSplits
    init_model: Model | None


def load_pretrain_data(run: RunContext) -> tuple[RunContext, PretrainData]:
    """Opens or prepares the token files; resolves the model's config."""
    isolate_documents(run.config.data.batching)  # rejects others
    if run.config.finetune.trainable != "all":
        raise ConfigError(
            f"finetune.trainable={run.config.finetune.trainable!r} is not supported for "
            "pretraining, which trains all parameters. Remove the option."
        )
    init_model = load_init_model(run.config.finetune)
    splits = open_dataset(resolve_data_config(run), run.run_dir / "data")
    size, requested = splits.tokenizer.vocab_size, run.config.model.vocab_size
    if requested not in (0, size):
        raise ConfigError(
            f"model.vocab_size={requested} does not match the tokenizer "
            f"{splits.tokenizer.name}, which has {size} tokens. Remove the option, or "
            "pad with model.vocab_multiple."
        )
    return with_model_config(run, init_model, splits.tokenizer), PretrainData(splits, init_model)


def make_pretrain_task(run: RunContext, data: PretrainData) -> Task:
    """Makes the pretraining task."""
    config, train_config = run.config, run.config.train
    init_model, tokens = data.init_model, data.splits.tokenizer
    params = shard_tree(make_initial_params(run, init_model, tokens), run.mesh)
    optimizer = make_optimizer(config.optim, train_config.steps)
    isolated = isolate_documents(config.data.batching)
    loss_fn = make_lm_loss_fn(config.model, train_config.loss_chunk_size, isolated)
    batches = LMBatches(
        data.splits.train,
        rows=config.data.batch_size,
        context=config.model.context_length,
        seed=train_config.seed,
        isolate_documents=isolated,
        local_rows=local_batch_rows(config.data.batch_size, run.mesh),
    )

    def to_model(state: TrainState) -> Model:
        return Model(config.model, to_host(state.params), tokens)

    return Task(
        init_state=init_state(params, optimizer, make_key(train_config.seed)),
        train_step=make_train_step(loss_fn, optimizer, train_config.accumulate),
        batches=batches.iterate,
        evaluate=make_pretrain_evaluate(run, data.splits),
        to_model=to_model,
        tokens_per_step=config.data.batch_size * config.model.context_length,
        provenance={"data": hash_splits(data.splits), **model_provenance(tokens, init_model)},
        summary=format_pretrain_summary(run, data.splits),
        sample=make_sample(run, to_model),
    )


def resolve_data_config(run: RunContext) -> DataConfig:
    """The run's `[data]`, with the initial model's tokenizer if nothing names one."""
    config = run.config
    is_prepared = is_prepared_dir(user_path(config.data.source))
    if not config.finetune.init_from or config.data.tokenizer or is_prepared:
        return config.data
    model_dir = resolve_model(config.finetune.init_from)
    name = str(model_dir) if tokenizer.is_tokenizer_dir(model_dir) else "gpt2"
    return dataclasses.replace(config.data, tokenizer=name)


def make_pretrain_evaluate(
    run: RunContext, splits: TokenizedSplits
) -> Callable[[TrainState, int, bool], EvalResult]:
    """Evaluates on held-out text: `train.eval_batches` batches, all at the end."""
    config, held_out = run.config, splits.validation
    isolated = isolate_documents(config.data.batching)
    eval_step = perplexity.make_eval_step(config.model, config.train.loss_chunk_size, run.mesh)

    def evaluate(state: TrainState, step: int, is_last: bool) -> EvalResult:
        if held_out is None:
            return EvalResult([], "")
        batches = validation_batches(
            held_out,
            rows=config.data.batch_size,
            context=config.model.context_length,
            isolate_documents=isolated,
            max_batches=None if is_last else config.train.eval_batches,
        )
        lengths = splits.tokenizer.byte_lengths
        result = perplexity.evaluate(eval_step, state.params, batches, lengths)
        event = {"split": "validation", **result.to_dict()}
        return EvalResult([("eval", event)], f"val {result.loss:.4f}")

    return evaluate


def isolate_documents(batching: str) -> bool:
    """True if attention is confined to single documents."""
    if batching not in DOCUMENT_MODE:
        raise ConfigError(
            f"data.batching={batching!r} is not supported for pretraining, which fills "
            "every row with text. Choose packed or concat."
        )
    return DOCUMENT_MODE[batching]


def hash_splits(dataset: TokenizedSplits) -> dict[str, dict[str, str]]:
    """SHA-256 of each shard by split; as recorded, since its blocks are verified."""
    splits = {"train": dataset.train, "validation": dataset.validation}
    return {
        split: {x.path.name: x.sha256 or sha256_of_files([x.path]) for x in tokens.shards}
        for split, tokens in splits.items()
        if tokens is not None
    }


def format_pretrain_summary(run: RunContext, data: TokenizedSplits) -> list[str]:
    """Summary printed before training."""
    c, train_config, rows = run.config.model, run.config.train, run.config.data.batch_size
    resolved_config = estimate.resolve_config(run.config)
    memory_parts = estimate.memory_bytes(resolved_config, estimate.mesh_sizes(run.mesh))
    sizes = " + ".join(f"{name} {estimate.format_bytes(n)}" for name, n in memory_parts.items())
    tokens = rows * c.context_length
    step_shape = f"{rows} rows x {c.context_length} tokens"
    if train_config.accumulate > 1:
        step_shape += f" in {train_config.accumulate} micro-batches"
    num_held_out = len(data.validation) if data.validation else 0
    origin = f", from {start}" if (start := run.config.finetune.init_from) else ""
    return [
        f"run      {run.run_dir}",
        f"model    {describe_model(run)}{origin}",
        f"data     {len(data.train):,} training tokens, {num_held_out:,} held out; "
        f"{data.tokenizer.name} tokenizer, {c.vocab_size:,} tokens{data.train.unread}",
        f"step     {step_shape} = {tokens:,} tokens, "
        f"{format_number(tokens * estimate.flops_per_token(c))} FLOPs",
        describe_length(train_config.steps, train_config.steps * tokens / len(data.train)),
        f"memory   about {estimate.format_bytes(sum(memory_parts.values()))} per device: {sizes}",
        f"attention {resolved_config.model.attention}, remat {c.remat}",
        describe_devices(run),
    ]


def make_sample(
    run: RunContext, to_model: Callable[[TrainState], Model]
) -> Callable[[TrainState, int], str | None] | None:
    """Completes `train.sample_prompt`; None if that is empty."""
    train_config = run.config.train
    if not train_config.sample_prompt:
        return None

    def sample(state: TrainState, step: int) -> str:
        (completion,) = complete(
            to_model(state),
            train_config.sample_prompt,
            max_new_tokens=SAMPLE_TOKENS,
            temperature=0.8,
            seed=train_config.seed,
        )
        return train_config.sample_prompt + completion.text

    return sample


def finalize_pretrain(run: RunContext, _data: Any, task: Task, state: TrainState) -> Model:
    """Writes model/, figures and report.md, and logs the result."""
    model, num_skipped = task.to_model(state), int(state.num_skipped)
    save(model, run.run_dir / "model")
    evals = [e for e in read_events(run.metrics_path) if e["event"] == "eval"]
    result = f"{run.config.train.steps:,} steps without an evaluation"
    if evals:
        result = f"validation loss {evals[-1]['loss']:.4f} nats per token"
        if evals[-1]["bits_per_byte"]:
            result += f", {evals[-1]['bits_per_byte']:.4f} bits per byte"
    if num_skipped:
        result += f"; {num_skipped} steps skipped (non-finite)"
    write_report(
        run.run_dir, summary=task.summary, result=result, units_per_step=task.tokens_per_step
    )
    run.log(f"done     {result}")
    run.log(f"wrote    {run.run_dir}/model, report.md, loss.png, lr.png, metrics.jsonl")
    return model


PRETRAIN = TaskStages(load_pretrain_data, make_pretrain_task, finalize_pretrain)
