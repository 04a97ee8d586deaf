"""llama.cpp, through its server: tokens, rendered templates and log-probabilities."""

import json
import urllib.request

import pytest


def start_llama_cpp(path, context=256):
    """A function that sends a request to a server of this model."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = context, 1, False, 0
    # With the default, a float16 cache, log-probabilities are 3e-3 off.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(route, **content):
        request = urllib.request.Request(
            server.listening_address + route, json.dumps(content).encode()
        )
        request.add_header("Content-Type", "application/json")
        with opener.open(request) as reply:
            return json.load(reply)

    return call


def next_logprobs(call, ids, count=1):
    """Log-probabilities of the most likely next tokens by id.

    The server leaves out tokens of incomplete characters, so one request is one token,
    and returns nothing if the token that ends a text is the most likely one.
    """
    options = {"n_predict": 1, "temperature": 0, "n_probs": count, "cache_prompt": False}
    reply = call("/completion", prompt=[int(n) for n in ids], **options)
    steps = reply.get("completion_probabilities", [])
    return {x["id"]: x["logprob"] for step in steps for x in step["top_logprobs"]}
