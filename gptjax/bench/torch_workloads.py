"""PyTorch versions of the workloads; needs the extra `peers`.

The only module that imports PyTorch; used by `gptjax bench --peers` alone.
"""

import importlib
from collections.abc import Callable
from typing import Any

from gptjax.bench.workloads import MATMUL_SIZE, PROMPT_LENGTH, WorkFn, make_temp_dir, random_tokens
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError

TORCH_WEIGHT_DECAY, TORCH_LEARNING_RATE, TORCH_BETAS = 0.1, 6e-4, (0.9, 0.95)
TORCH_CPU = "cpu"
INSTALL_COMMANDS = {
    "torch": "pip install -e '.[peers]' (in a clone of gptjax)",
    "transformers": "pip install -e '.[peers]' (in a clone of gptjax)",
    "llms_from_scratch": "pip install --no-deps llms-from-scratch",
}


def import_peer(name: str) -> Any:
    """Imports an optional module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"gptjax bench --peers needs {name.split('.')[0]}, which is not installed: "
            f"{INSTALL_COMMANDS[name.split('.')[0]]}"
        ) from error


def transformers_model(preset: str, context: int = 1024) -> Any:
    """GPT-2 in transformers with random parameters, without dropout."""
    transformers, shape = import_peer("transformers"), GPTConfig.preset(preset)
    config = transformers.GPT2Config(
        n_positions=max(context, 1024),
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.d_model,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.set_attn_implementation("sdpa")
    return model


def make_torch_train_work(
    model: Any, logits_fn: Callable[[Any], Any], tokens: Any, device: str = TORCH_CPU
) -> WorkFn:
    """Train steps of a PyTorch model with AdamW and clipping at 1, as in gptjax.

    On a GPU with bfloat16 autocast, TF32 otherwise, torch.compile for model and loss,
    and fused AdamW.
    """
    torch = import_peer("torch")
    on_gpu, model = device != TORCH_CPU, model.to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: Any = {
        "lr": TORCH_LEARNING_RATE,
        "betas": TORCH_BETAS,
        "weight_decay": TORCH_WEIGHT_DECAY,
    }
    optimizer = torch.optim.AdamW(groups, fused=on_gpu or None, **options)
    token_BT, target_BT = (
        torch.tensor(part, device=device) for part in (tokens[:, :-1], tokens[:, 1:])
    )

    def loss_fn(token_BT: Any, target_BT: Any) -> Any:
        logits = logits_fn(token_BT)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target_BT.flatten())

    if on_gpu:
        torch.set_float32_matmul_precision("high")
    compiled_loss_fn = torch.compile(loss_fn) if on_gpu else loss_fn

    def work() -> int:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = compiled_loss_fn(token_BT, target_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        synchronize_device(device)
        return target_BT.numel()

    return work


def synchronize_device(device: str) -> None:
    """Waits for the GPU."""
    if device != TORCH_CPU:
        import_peer("torch").cuda.synchronize()


def transformers_train(preset: str, rows: int, context: int, device: str = TORCH_CPU) -> WorkFn:
    """Train steps; units are tokens."""
    model = transformers_model(preset, context).train()

    def logits_of(token_BT: Any) -> Any:
        return model(token_BT, use_cache=False).logits

    return make_torch_train_work(model, logits_of, random_tokens(rows, context + 1), device)


def book_model_config(preset: str, context: int) -> dict[str, Any]:
    """Config of the book's GPTModel for a preset, without dropout."""
    shape = GPTConfig.preset(preset)
    return {
        "vocab_size": shape.vocab_size,
        "context_length": context,
        "emb_dim": shape.d_model,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "drop_rate": 0.0,
        "qkv_bias": True,
    }


def book_train(preset: str, rows: int, context: int) -> WorkFn:
    """Train steps of the book's GPTModel; units are tokens."""
    shape = book_model_config(preset, GPTConfig.preset(preset).context_length)
    model = import_peer("llms_from_scratch.ch04").GPTModel(shape).train()
    return make_torch_train_work(model, model, random_tokens(rows, context + 1))


def transformers_decode(
    preset: str, rows: int, new: int, device: str = TORCH_CPU, cache: str = "dynamic"
) -> WorkFn:
    """Greedy decoding after a short prompt, on a GPU in bfloat16; units are tokens.

    With the fixed-size `cache` "static", transformers compiles the decode step.
    """
    torch, model = import_peer("torch"), transformers_model(preset).eval()
    model = model.to(device, torch.float32 if device == TORCH_CPU else torch.bfloat16)
    token_BT = torch.tensor(random_tokens(rows, PROMPT_LENGTH), device=device)
    options: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if cache != "dynamic":
        options["cache_implementation"] = cache

    def work() -> int:
        with torch.inference_mode():
            mask = torch.ones_like(token_BT)
            model.generate(token_BT, attention_mask=mask, pad_token_id=0, **options)
        synchronize_device(device)
        return rows * new

    return work


def transformers_prefill(preset: str, rows: int, context: int) -> WorkFn:
    """Prefill up to the first new token; units are prompt tokens."""
    torch, model = import_peer("torch"), transformers_model(preset).eval()
    token_BT = torch.tensor(random_tokens(rows, context))

    def work() -> int:
        with torch.inference_mode():
            model(token_BT, use_cache=True, logits_to_keep=1).logits.argmax()
        return rows * context

    return work


def transformers_load(preset: str) -> WorkFn:
    """Loads a model folder; units are models."""
    folder = make_temp_dir()
    transformers_model(preset).save_pretrained(folder)
    kind = import_peer("transformers").GPT2LMHeadModel

    def work() -> int:
        kind.from_pretrained(folder)
        return 1

    return work


def torch_matmul() -> WorkFn:
    """Matmul of large square matrices; units are floating-point operations."""
    torch = import_peer("torch")
    x = torch.randn(MATMUL_SIZE, MATMUL_SIZE)

    def work() -> int:
        torch.mm(x, x)
        return 2 * MATMUL_SIZE**3

    return work


TORCH_WORKLOADS: dict[str, Callable[..., WorkFn]] = {
    "transformers_train": transformers_train,
    "transformers_decode": transformers_decode,
    "transformers_prefill": transformers_prefill,
    "transformers_load": transformers_load,
    "torch_matmul": torch_matmul,
    "book_train": book_train,
}
