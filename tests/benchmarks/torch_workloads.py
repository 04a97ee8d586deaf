"""PyTorch versions of the workloads of `gptjax.bench`, for `tests.benchmarks.peers`.

They return the same numbers of units: tokens, models, bytes or FLOPs.
"""

import statistics
import subprocess
import sys

import torch
import transformers

from gptjax.bench import workloads
from gptjax.data.datasets import read_python_help
from gptjax.tokenizer import tokenizer

STARTUP_SCRIPT = """
import sys
import transformers
from transformers import GPT2LMHeadModel, GPT2Tokenizer
folder, prompt = sys.argv[1:]
transformers.logging.set_verbosity_error()
tokenizer = GPT2Tokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder)
options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
text = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
print(tokenizer.decode(text[0]))
"""


def transformers_model(config):
    """GPT-2 in transformers with random parameters, without dropout."""
    shape = {"n_positions": config.context_length, "n_layer": config.n_layers}
    shape |= {"n_head": config.n_heads, "n_embd": config.d_model}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **drops))
    model.set_attn_implementation("sdpa")
    return model


def make_torch_train_work(model, logits_fn, tokens, device):
    """Train steps of a PyTorch model with AdamW and clipping at 1, as in gptjax.

    On a GPU with bfloat16 autocast, TF32 otherwise, torch.compile for model and loss,
    and fused AdamW.
    """
    on_gpu, model = device != "cpu", model.train().to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(groups, fused=on_gpu or None, **options)
    tokens = torch.tensor(tokens, device=device)
    token_BT, target_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_fn(token_BT, target_BT):
        logits = logits_fn(token_BT)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target_BT.flatten())

    if on_gpu:
        torch.set_float32_matmul_precision("high")
        loss_fn = torch.compile(loss_fn)

    def work():
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            loss = loss_fn(token_BT, target_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return target_BT.numel()

    return work


def transformers_train(config, rows, context, device="cpu"):
    model, tokens = transformers_model(config), workloads.random_tokens(rows, context + 1)
    logits_fn = lambda token_BT: model(token_BT, use_cache=False).logits  # noqa: E731
    return make_torch_train_work(model, logits_fn, tokens, device)


def book_model(config):
    from llms_from_scratch.ch04 import GPTModel

    same = ("vocab_size", "context_length", "n_heads", "n_layers", "qkv_bias")
    options = {name: getattr(config, name) for name in same}
    return GPTModel(options | {"emb_dim": config.d_model, "drop_rate": config.dropout})


def book_train(config, rows, context):
    model = book_model(config)
    return make_torch_train_work(model, model, workloads.random_tokens(rows, context + 1), "cpu")


def transformers_decode(config, rows, new, device="cpu", cache="dynamic"):
    """Greedy decoding after a short prompt, on a GPU in bfloat16; units are tokens.

    With the fixed-size `cache` "static", transformers compiles the decode step.
    """
    model = transformers_model(config).eval()
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    token_BT = torch.tensor(workloads.random_tokens(rows, workloads.PROMPT_LENGTH), device=device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if cache != "dynamic":
        options["cache_implementation"] = cache

    def work():
        with torch.inference_mode():
            mask = torch.ones_like(token_BT)
            model.generate(token_BT, attention_mask=mask, pad_token_id=0, **options)
        if device != "cpu":
            torch.cuda.synchronize()
        return rows * new

    return work


def transformers_prefill(config, rows, context):
    model = transformers_model(config).eval()
    token_BT = torch.tensor(workloads.random_tokens(rows, context))

    def work():
        with torch.inference_mode():
            model(token_BT, use_cache=True, logits_to_keep=1).logits.argmax()
        return rows * context

    return work


def transformers_load(config):
    folder = workloads.make_temp_dir()
    transformers_model(config).save_pretrained(folder)

    def work():
        transformers.GPT2LMHeadModel.from_pretrained(folder)
        return 1

    return work


def transformers_start(config):
    folder = workloads.make_temp_dir()
    transformers_model(config).save_pretrained(folder)
    tokenizer.load_tokenizer("gpt2").save(folder)
    command = [sys.executable, "-c", STARTUP_SCRIPT, str(folder), workloads.STARTUP_PROMPT]

    def work():
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return 1

    return work


def tiktoken_input(workers):
    """Tokenizes the text of `make_prepare_work` in memory; units are bytes of text."""
    encoding = tokenizer.load_tokenizer("gpt2").encoding
    documents = [*read_python_help()] * workloads.TEXT_REPEATS

    def work():
        encoding.encode_ordinary_batch(documents, num_threads=workers)
        return sum(len(text.encode()) for text in documents)

    return work


def torch_matmul(repeats):
    x = torch.randn(4096, 4096)

    def work():
        torch.mm(x, x)
        return 2 * 4096**3

    return statistics.median(workloads.measure_rates(work, repeats))
