"""Earlier names of options and values, which are rejected with the current ones."""

from collections.abc import Mapping
from typing import Any

RENAMED_OPTIONS = {  # earlier name: current name
    "data.text": "data.text_column",
    "data.label": "data.label_column",
    "data.split": "data.split_strategy",
    "data.balance": "data.balance_classes",
    "data.dedupe": "data.deduplicate",
    "data.val_seed": "data.split_seed",
    "data.template": "data.chat_template",
    "data.mask_prompt": "data.completion_only_loss",
    "optim.final_lr": "optim.final_lr_fraction",
    "optim.decay_all": "optim.decay_norms_and_biases",
    "train.loss_chunk": "train.loss_chunk_size",
    "tune": "finetune",
    "tune.start": "finetune.init_from",
    "tune.trainable": "finetune.trainable",
    "tune.lora_rank": "finetune.lora_rank",
    "tune.lora_alpha": "finetune.lora_alpha",
    "tune.lora_targets": "finetune.lora_targets",
    "tune.lm_weight": "finetune.lm_loss_weight",
    "tune.beta": "finetune.dpo_beta",
}
RENAMED_VALUES = {  # option: {earlier value: current value}
    "train.task": {"instruct": "sft", "preference": "dpo"},
    "data.batching": {"mixed": "concat"},
    "model.attention": {"plain": "reference", "prefix": "chunked", "blockwise": "flash"},
}


def find_renames(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists earlier names and values in a nested dict, with the current ones."""
    renames = []
    for key, value in table.items():
        name, values = f"{prefix}{key}", RENAMED_VALUES.get(f"{prefix}{key}", {})
        is_section = isinstance(value, Mapping) and not prefix  # a key may have 20,000 dots
        inner = find_renames(value, f"{name}.") if is_section else []
        if name in RENAMED_OPTIONS and not inner:
            inner = [f"`{name}` is now `{RENAMED_OPTIONS[name]}`"]
        if isinstance(value, str) and value in values:
            inner = [f"{name} = {value!r} is now {values[value]!r}"]
        renames += inner
    return renames
