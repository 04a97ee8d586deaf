"""What may change when a run goes on: every option of a config is in one class.

"identity"     what is trained, on what: another value is another run
"trajectory"   what the next steps compute: only with --allow-change
"operational"  what is shown and kept, and where the work is done: free
"""

from collections.abc import Iterable, Sequence

from gptjax.config import RunConfig, difference, suggestion
from gptjax.errors import ConfigError, ModelError

ON_SPIKE = "on-spike"  # no option of a config, but it decides the steps, too
CLASSES = {  # class: {section: options}
    "identity": {
        "model": "vocab_size context_length n_layers n_heads d_model qkv_bias "
        "tie_embeddings vocab_multiple causal n_classes head_bias pool",
        "data": "source tokenizer text label split balance dedupe test_fraction "
        "val_fraction val_seed template mask_prompt",
        "train": "task seed",
        "tune": "start trainable lora_rank lora_targets",
    },
    "trajectory": {
        "model": "dropout dtype attention remat",
        "data": "batch_size batching",
        "optim": "peak_lr schedule warmup_steps final_lr weight_decay decay_all beta1 "
        "beta2 grad_clip",
        # Evaluations decide which model fine-tuning keeps; spikes are looked for in
        # what is logged, and after one a run goes back to where it was saved.
        "train": "steps accumulate loss_chunk log_every eval_every eval_batches",
        "tune": "lora_alpha lm_weight beta",
        "checkpoint": "every",
    },
    "operational": {
        "train": "sample_prompt",
        "checkpoint": "keep",
        "mesh": "data fsdp tensor",
    },
}


def class_of(name: str) -> str:
    """The class of an option, `section.option`.

    Raises:
        ConfigError: there is no such option.
    """
    known = {ON_SPIKE: "trajectory"}
    for kind, sections in CLASSES.items():
        for section, options in sections.items():
            known |= {f"{section}.{option}": kind for option in options.split()}
    if name not in known:
        raise ConfigError(
            f"--allow-change {name}: there is no such option.{suggestion(name, known)} "
            "Write it as --allow-change section.option."
        )
    return known[name]


def check_allowed(names: Iterable[str]) -> None:
    """Raises for the first name that is no option which may change when asked.

    Raises:
        ConfigError: it is none, or says what is trained.
    """
    for name in names:
        if class_of(name) == "identity":
            raise ConfigError(
                f"--allow-change {name}: {name} says what is trained, so a run cannot "
                "change it. Start another one with --run DIR."
            )


def settled_changes(
    folder: str, before: RunConfig, after: RunConfig, allowed: Sequence[str]
) -> list[str]:
    """What changes when the run goes on, as lines `section.option: old -> new`.

    Args:
        folder: of the run, for messages.
        before: its config so far.
        after: its config from now on.
        allowed: options of class "trajectory" that the user lets change.

    Raises:
        ConfigError: one of the allowed ones cannot be.
        ModelError: something changes that may not.
    """
    check_allowed(allowed)
    changes = {line.partition(":")[0]: line for line in difference(before, after)}
    fixed = [line for name, line in changes.items() if class_of(name) == "identity"]
    asked = [
        name
        for name in changes
        if class_of(name) == "trajectory" and name not in allowed
    ]
    if fixed:
        raise ModelError(
            f"the run in {folder} was started with another config: {'; '.join(fixed)}. "
            "It says what is trained: use the config of the run to resume it, or "
            "another --run DIR to start anew."
        )
    if asked:
        flags = " ".join(f"--allow-change {name}" for name in asked)
        raise ModelError(
            f"the run in {folder} was started with another config: "
            f"{'; '.join(changes[name] for name in asked)}. Use its config to resume "
            f"it as if it had never stopped, or let it change with {flags}."
        )
    return list(changes.values())
