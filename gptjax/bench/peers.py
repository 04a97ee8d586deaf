"""The same pieces of work as others do them, in PyTorch; needs gptjax[peers].

The one place where PyTorch is imported: nothing but `gptjax bench --peers` runs it.
"""

import importlib
from collections.abc import Callable
from typing import Any

from gptjax.bench.ours import PROMPT, SIDE, Work, random_tokens, scratch
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError

DECAY, RATE, BETAS = 0.1, 6e-4, (0.9, 0.95)
CPU = "cpu"
FIXES = {
    "torch": "pip install 'gptjax[peers]'",
    "transformers": "pip install 'gptjax[peers]'",
    "llms_from_scratch": "pip install --no-deps llms-from-scratch",
}


def needed(name: str) -> Any:
    """A module of the peers'.

    Raises:
        ConfigError: it is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"gptjax bench --peers needs {name.split('.')[0]}, which is not installed: "
            f"{FIXES[name.split('.')[0]]}"
        ) from error


def transformers_model(preset: str, context: int = 1024) -> Any:
    """GPT-2 of transformers with random parameters, without dropout."""
    transformers, shape = needed("transformers"), GPTConfig.preset(preset)
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


def trained(
    model: Any, logits_of: Callable[[Any], Any], tokens: Any, device: str = CPU
) -> Work:
    """Train steps of a PyTorch model as gptjax does them: AdamW, clipping at 1.

    On a GPU with what makes PyTorch fast there: bfloat16 where autocast has it, TF32
    elsewhere, a compiled model with its loss, and AdamW in one kernel.
    """
    torch = needed("torch")
    on_gpu, model = device != CPU, model.to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: Any = {"lr": RATE, "betas": BETAS, "weight_decay": DECAY}
    adamw = torch.optim.AdamW(groups, fused=on_gpu or None, **options)
    token_BT, target_BT = (
        torch.tensor(part, device=device) for part in (tokens[:, :-1], tokens[:, 1:])
    )

    def loss_of(token_BT: Any, target_BT: Any) -> Any:
        logits = logits_of(token_BT)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target_BT.flatten()
        )

    if on_gpu:
        torch.set_float32_matmul_precision("high")
    mean_loss = torch.compile(loss_of) if on_gpu else loss_of

    def work() -> int:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = mean_loss(token_BT, target_BT)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        finish(device)
        return target_BT.numel()

    return work


def finish(device: str) -> None:
    """Waits until a GPU has done what it was told."""
    if device != CPU:
        needed("torch").cuda.synchronize()


def transformers_train(preset: str, rows: int, context: int, device: str = CPU) -> Work:
    """Train steps; units are tokens."""
    model = transformers_model(preset, context).train()

    def logits_of(token_BT: Any) -> Any:
        return model(token_BT, use_cache=False).logits

    return trained(model, logits_of, random_tokens(rows, context + 1), device)


def book_shape(preset: str, context: int) -> dict[str, Any]:
    """What the book's GPTModel is asked for: a public size, and nothing dropped."""
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


def book_train(preset: str, rows: int, context: int) -> Work:
    """Train steps of the book's GPTModel; units are tokens."""
    shape = book_shape(preset, GPTConfig.preset(preset).context_length)
    model = needed("llms_from_scratch.ch04").GPTModel(shape).train()
    return trained(model, model, random_tokens(rows, context + 1))


def transformers_decode(
    preset: str, rows: int, new: int, device: str = CPU, cache: str = "dynamic"
) -> Work:
    """Greedy writing after a short prompt, on a GPU in bfloat16; units are tokens.

    With the `cache` "static", which does not grow, transformers compiles a step.
    """
    torch, model = needed("torch"), transformers_model(preset).eval()
    model = model.to(device, torch.float32 if device == CPU else torch.bfloat16)
    token_BT = torch.tensor(random_tokens(rows, PROMPT), device=device)
    options: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if cache != "dynamic":
        options["cache_implementation"] = cache

    def work() -> int:
        with torch.inference_mode():
            mask = torch.ones_like(token_BT)
            model.generate(token_BT, attention_mask=mask, pad_token_id=0, **options)
        finish(device)
        return rows * new

    return work


def transformers_prefill(preset: str, rows: int, context: int) -> Work:
    """Reading a prompt up to its first new token; units are tokens of the prompt."""
    torch, model = needed("torch"), transformers_model(preset).eval()
    token_BT = torch.tensor(random_tokens(rows, context))

    def work() -> int:
        with torch.inference_mode():
            model(token_BT, use_cache=True, logits_to_keep=1).logits.argmax()
        return rows * context

    return work


def transformers_load(preset: str) -> Work:
    """From a model folder to tensors; units are models."""
    folder = scratch()
    transformers_model(preset).save_pretrained(folder)
    kind = needed("transformers").GPT2LMHeadModel

    def work() -> int:
        kind.from_pretrained(folder)
        return 1

    return work


def torch_matmul() -> Work:
    """A product of large square matrices; units are floating-point operations."""
    torch = needed("torch")
    x = torch.randn(SIDE, SIDE)

    def work() -> int:
        torch.mm(x, x)
        return 2 * SIDE**3

    return work


PEERS: dict[str, Callable[..., Work]] = {
    "transformers_train": transformers_train,
    "transformers_decode": transformers_decode,
    "transformers_prefill": transformers_prefill,
    "transformers_load": transformers_load,
    "torch_matmul": torch_matmul,
    "book_train": book_train,
}
