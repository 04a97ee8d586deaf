"""Supervised fine-tuning (SFT) task: conversations to an assistant."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gptjax.config import DataConfig, GPTConfig, RunConfig
from gptjax.data.conversations import Conversation, read_conversations
from gptjax.data.packed_rows import take_rows
from gptjax.data.sft import (
    TRAIN_ON_ALL,
    TRAIN_ON_COMPLETIONS,
    Example,
    encode_conversations,
    find_sft_batching,
    make_sft_batches,
    mask_all_but_answers,
    truncate_all,
)
from gptjax.data.text import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import DataError
from gptjax.evaluation.instructions import (
    LOSS_BATCH_SIZE,
    ResponseEval,
    example_loss,
    generate_responses,
    group_scores,
    mean_scores,
    write_responses,
)
from gptjax.plots.report import code_block, markdown_table
from gptjax.runtime.timing import log_progress
from gptjax.tasks import builder
from gptjax.training import finetune
from gptjax.training.loss import batch_loss
from gptjax.training.metrics import metric_series, read_events
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from gptjax.tree import Params
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

NUM_EVAL_SAMPLES = 32  # validation rows with a generated answer at each evaluation
# Test rows with a generated answer, before the first step and at the end
NUM_TEST_SAMPLES = 512
ANSWER_SLACK = 16  # tokens beyond the longest answer in the data
MAX_ANSWER_TOKENS = 256


class SFTData(NamedTuple):
    """Data of an SFT run, by split."""

    conversations: dict[str, Sequence[Conversation]]
    examples: dict[str, Sequence[Example]]  # with the loss mask used for training
    completion_examples: dict[str, Sequence[Example]]  # with completion-only loss masks
    inputs: builder.FinetuneInputs


def load_sft_data(run: RunContext) -> tuple[RunContext, SFTData]:
    """Loads, splits and tokenizes the conversations; resolves the model's config."""
    c = run.config
    trained_segments = segments_with_loss(c.data)
    init_model = finetune.load_init_model(c.finetune)
    all_conversations, columns = read_conversations(c.data.source)
    splits = finetune.train_val_test_split(c, all_conversations, "rows")
    train = splits[TRAIN_SPLIT]
    tracked = log_progress(train, len(train), "counting", "conversations")
    texts = (message["content"] for x in tracked for message in x.messages)
    tokenizer = finetune.choose_tokenizer(c.data.tokenizer, init_model, lambda: texts)
    template = finetune.choose_chat_template(c.data.chat_template, init_model, tokenizer)
    context = finetune.max_context(c.model, init_model)
    conversations, examples, completion_examples = {}, {}, {}
    num_truncated = num_dropped = 0
    for name, part in splits.items():
        tracked = log_progress(part, len(part), "encoding", f"{name} conversations")
        truncated = truncate_all(
            encode_conversations(tokenizer, template, tracked, trained_segments), context
        )
        if not truncated.examples:
            raise DataError(
                f"no {name} conversation of {c.data.source} has an answer that fits "
                f"model.context_length={context}. Raise it, or shorten the answers."
            )
        conversations[name] = take_rows(part, truncated.kept_indices)
        examples[name] = truncated.examples
        completion_examples[name] = mask_all_but_answers(truncated.examples)
        num_truncated += truncated.num_truncated
        num_dropped += truncated.num_dropped
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in examples.items())
    summary_lines = [f"data     {columns}", f"rows     {sizes}"]
    if num_truncated or num_dropped:
        summary_lines.append(
            f"too long {num_truncated} conversations truncated on the left, "
            f"{num_dropped} dropped (the answer alone does not fit {context} tokens)"
        )
    messages = {split: (x.messages for x in part) for split, part in conversations.items()}
    inputs = builder.FinetuneInputs(
        messages, tokenizer, init_model, summary_lines, chat_template=template.source
    )
    run = builder.with_model_config(run, init_model, tokenizer)
    return run, SFTData(conversations, examples, completion_examples, inputs)


def segments_with_loss(config: DataConfig) -> frozenset[str]:
    """Kinds of segments that are trained on."""
    batching = find_sft_batching(config.batching)
    return batching.completion_segments if config.completion_only_loss else TRAIN_ON_ALL


def make_sft_task(run: RunContext, data: SFTData) -> Task:
    """Makes the SFT task."""
    config, examples = run.config, data.examples[TRAIN_SPLIT]
    batches = make_sft_batches(
        config.data.batching,
        examples,
        rows=config.data.batch_size,
        context=config.model.context_length,
        pad_id=data.inputs.tokenizer.eot_token,
        seed=config.train.seed,
    )
    num_trained = num_tokens = 0
    for example in examples:
        num_trained += sum(example.loss_mask)
        num_tokens += len(example.ids)
    return builder.make_finetune_task(
        run,
        data.inputs,
        loss_fn=sft_loss_fn,
        batches=batches,
        tokens_per_step=(num_tokens - len(examples)) / batches.steps_per_epoch,
        evaluate=make_sft_evaluate(run, data),
        trained_note=f"; loss on {num_trained / num_tokens:.0%} of the tokens",
    )


def sft_loss_fn(
    config: RunConfig, params: Params, adapters: Any, batch: Any, key: Any
) -> tuple[Any, Any]:
    """Summed loss of a batch, and its number of trained tokens."""
    return batch_loss(
        config.model,
        params,
        batch,
        chunk_size=config.train.loss_chunk_size,
        dropout_key=key if config.model.dropout else None,
        adapters=adapters,
    )


def make_sft_evaluate(run: RunContext, data: SFTData) -> Callable[[Model, int, bool], EvalResult]:
    """Evaluates on some validation and training rows.

    The best model has the lowest loss on validation answers. Also generates answers to
    a fixed subset of these rows, and before the first step to test rows as a baseline.
    """
    rows = builder.evenly_spaced(data.conversations[VALIDATION_SPLIT], NUM_EVAL_SAMPLES)
    test_rows = builder.evenly_spaced(data.conversations.get(TEST_SPLIT, []), NUM_TEST_SAMPLES)
    max_rows = run.config.train.eval_batches * LOSS_BATCH_SIZE
    subsets = {
        split: builder.evenly_spaced(range(len(part)), max_rows)
        for split, part in data.examples.items()
    }
    test_examples = data.examples.get(TEST_SPLIT, [])
    subsets[TEST_SPLIT] = builder.evenly_spaced(range(len(test_examples)), NUM_TEST_SAMPLES)
    # Else the training loss is that of the answers.
    has_response_loss = segments_with_loss(run.config.data) != TRAIN_ON_COMPLETIONS

    def evaluate_split(model: Model, split: str, **values: Any) -> dict[str, Any]:
        indices = subsets[split]
        loss = example_loss(model, [data.examples[split][n] for n in indices]).loss
        response_loss = loss
        if has_response_loss:
            completions = [data.completion_examples[split][n] for n in indices]
            response_loss = example_loss(model, completions).loss
        return {"split": split, "loss": loss, "response_loss": response_loss, **values}

    token_limit = answer_token_limit(run.config.model, data)

    def evaluate(model: Model, step: int, is_last: bool) -> EvalResult:
        events = [evaluate_split(model, TRAIN_SPLIT)]
        scores = mean_scores(generate_responses(model, rows, token_limit))
        events.append(evaluate_split(model, VALIDATION_SPLIT, **scores))
        loss = events[-1]["response_loss"]
        if step == 0 and TEST_SPLIT in data.examples:
            responses = generate_responses(model, test_rows, token_limit)
            test_scores = mean_scores(responses) | task_exact_matches(responses)
            events.append(evaluate_split(model, TEST_SPLIT, **test_scores))
        return EvalResult(
            events=[("eval", event) for event in events],
            text=f"val {loss:.4f} exact {scores['exact_match']:.1%} rouge {scores['rouge_l']:.2f}",
            score=(-loss, float(step)),  # of equal losses, the later
        )

    return evaluate


def task_exact_matches(responses: list[ResponseEval]) -> dict[str, dict[str, float]]:
    """Exact match by task, as a field of an event; empty if the data name no tasks."""
    exact = {task: scores["exact_match"] for task, scores in group_scores(responses).items()}
    return {"tasks": exact} if exact else {}


def answer_token_limit(config: GPTConfig, data: SFTData) -> int:
    """Maximum tokens per generated answer: slightly above the longest in the data."""
    spans = (x.answer_spans[-1] for part in data.completion_examples.values() for x in part)
    longest = max(stop - start for start, stop in spans)  # with the end token
    return min(longest + ANSWER_SLACK, MAX_ANSWER_TOKENS, config.context_length)


def finalize_sft(run: RunContext, data: SFTData, task: Task, state: TrainState) -> Model:
    """Evaluates the best model; writes its answers, figures and report.md."""
    model, split = load(run.run_dir / "model"), builder.final_split(data.examples)
    rows = builder.evenly_spaced(data.conversations[split], NUM_TEST_SAMPLES)
    responses = generate_responses(model, rows, answer_token_limit(model.config, data))
    loss = example_loss(model, data.completion_examples[split]).loss
    scores = mean_scores(responses)
    write_responses(responses, run.run_dir / "responses.jsonl")
    text = (
        f"{split} loss {loss:.4f} nats per answer token"
        f"{format_before(run, split, 'response_loss')}, exact match "
        f"{scores['exact_match']:.4f} on {len(responses):,} answers"
        f"{format_before(run, split, 'exact_match')}, "
        f"token F1 {scores['token_f1']:.4f}, ROUGE-L {scores['rouge_l']:.4f}"
    )
    details = markdown_table("task", group_scores(responses))
    for one in builder.evenly_spaced(responses, 8):
        prompt = one.conversation.messages[-2]
        parts = [*filter(None, (prompt["content"], prompt.get("input")))]
        details += code_block(
            "\n".join([*parts, f"answer: {one.response}", f"wanted: {one.reference}"])
        )
    metrics = {"response_loss": loss, **scores, **task_exact_matches(responses)}
    files = "responses.jsonl, "
    builder.report_result(run, task, split, metrics, text, files=files, details=details)
    return model


def format_before(run: RunContext, split: str, name: str) -> str:
    """Metric before the first step, for the result line; "" if it was not logged."""
    steps, values = metric_series(read_events(run.metrics_path), "eval", name, split)
    return f" (before: {values[0]:.4f})" if 0 in steps else ""


SFT = builder.TaskStages(load_sft_data, make_sft_task, finalize_sft)
