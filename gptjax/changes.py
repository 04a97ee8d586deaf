"""Resume policy: which options may change when a run resumes.

"identity"     model, data and task: fixed, another value needs a new run
"trajectory"   affects the results of later steps: only with --allow-change
"operational"  affects only output, checkpoints kept and placement: free to change
"""

from collections.abc import Iterable, Sequence

from gptjax.config import RunConfig, config_diff, did_you_mean
from gptjax.errors import ConfigError, ModelError

ON_SPIKE = "on-spike"  # a flag, not a config option, but affects the steps too
RESUME_POLICIES = {  # class: {section: options}
    "identity": {
        "model": "vocab_size context_length n_layers n_heads d_model qkv_bias "
        "tie_embeddings vocab_multiple causal n_classes head_bias pool",
        "data": "source tokenizer text_column label_column split_strategy balance_classes deduplicate test_fraction "
        "val_fraction split_seed chat_template completion_only_loss",
        "train": "task seed",
        "finetune": "init_from trainable lora_rank lora_targets",
    },
    "trajectory": {
        "model": "dropout dtype attention remat",
        "data": "batch_size batching",
        "optim": "peak_lr schedule warmup_steps final_lr_fraction weight_decay decay_norms_and_biases beta1 "
        "beta2 grad_clip",
        # Evaluations choose the best model of fine-tuning; spikes are detected in the
        # logged steps, and a rollback restores a checkpoint.
        "train": "steps accumulate loss_chunk_size log_every eval_every eval_batches",
        "finetune": "lora_alpha lm_loss_weight dpo_beta",
        "checkpoint": "every",
    },
    "operational": {
        "train": "sample_prompt",
        "checkpoint": "keep",
        "mesh": "data fsdp tensor",
    },
}


def resume_policy(name: str) -> str:
    """Resume policy of an option, `section.option`.

    Raises:
        ConfigError: unknown option.
    """
    known = {ON_SPIKE: "trajectory"}
    for policy, sections in RESUME_POLICIES.items():
        for section, options in sections.items():
            known |= {f"{section}.{option}": policy for option in options.split()}
    if name not in known:
        raise ConfigError(
            f"--allow-change {name}: unknown option.{did_you_mean(name, known)} Write it "
            "as --allow-change section.option."
        )
    return known[name]


def check_allow_change(names: Iterable[str]) -> None:
    """Checks that every name is an option that --allow-change accepts.

    Raises:
        ConfigError: the option is unknown or part of the identity of a run.
    """
    for name in names:
        if resume_policy(name) == "identity":
            raise ConfigError(
                f"--allow-change {name}: {name} is fixed for a run. Start a new run "
                "with --run DIR."
            )


def check_config_changes(
    run_dir: str, before: RunConfig, after: RunConfig, allowed: Sequence[str]
) -> list[str]:
    """Lists the changes of a resumed run as `section.option: old -> new`.

    `allowed` has the "trajectory" options that the user allows to change.

    Raises:
        ConfigError: one of the allowed options can never change.
        ModelError: an option changes that may not.
    """
    check_allow_change(allowed)
    changes = {line.partition(":")[0]: line for line in config_diff(before, after)}
    identity_changes = [
        line for name, line in changes.items() if resume_policy(name) == "identity"
    ]
    not_allowed = [
        name
        for name in changes
        if resume_policy(name) == "trajectory" and name not in allowed
    ]
    if identity_changes:
        raise ModelError(
            f"the run in {run_dir} was started with another config: "
            f"{'; '.join(identity_changes)}. These options are fixed for a run: resume it with "
            "its own config, or start a new run with another --run DIR."
        )
    if not_allowed:
        flags = " ".join(f"--allow-change {name}" for name in not_allowed)
        raise ModelError(
            f"the run in {run_dir} was started with another config: "
            f"{'; '.join(changes[name] for name in not_allowed)}. Resume it with its own "
            f"config, or allow the change with {flags}."
        )
    return list(changes.values())
