"""Writes tests/fixtures/openai-tiny: `python tests/build_openai_fixture.py`.

It needs TensorFlow (2.21 wrote it) in an environment of its own. Files and names
are those of the GPT-2 that OpenAI published, without the graph.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "openai-tiny"
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
SHAPES = {"wte": (257, 8), "wpe": (16, 8), "ln_f/g": (8,), "ln_f/b": (8,)}
LAYER_SHAPES = {
    **{"ln_1/g": (8,), "ln_1/b": (8,), "attn/c_attn/w": (1, 8, 24), "attn/c_attn/b": (24,)},
    **{"attn/c_proj/w": (1, 8, 8), "attn/c_proj/b": (8,), "ln_2/g": (8,), "ln_2/b": (8,)},
    **{"mlp/c_fc/w": (1, 8, 32), "mlp/c_fc/b": (32,)},
    **{"mlp/c_proj/w": (1, 32, 8), "mlp/c_proj/b": (8,)},
}


def arrays() -> dict[str, np.ndarray]:
    """The tensors by name, float32: always the same."""
    shapes = {f"model/{name}": shape for name, shape in SHAPES.items()}
    for layer in ("h0", "h1"):
        shapes |= {f"model/{layer}/{name}": shape for name, shape in LAYER_SHAPES.items()}
    # Raw words of PCG64, as NumPy promises no stream of its normal distribution; the
    # mask keeps each float32 finite and as large as a weight is, 2^-7 to 2 or negative.
    words, values = np.random.PCG64(2019), {}
    for name, shape in shapes.items():
        bits = words.random_raw(int(np.prod(shape))).astype(np.uint32)
        values[name] = ((bits & 0x83FFFFFF) | 0x3C000000).view(np.float32).reshape(shape)
    return values


if __name__ == "__main__":
    import tensorflow

    FOLDER.mkdir(parents=True, exist_ok=True)
    v1 = tensorflow.compat.v1
    v1.disable_eager_execution()
    with v1.Session() as session:  # as OpenAI did: variables in a graph, by a Saver
        variables = [v1.get_variable(name, initializer=array) for name, array in arrays().items()]
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver(variables, save_relative_paths=True)
        saver.save(session, str(FOLDER / "model.ckpt"))
    (FOLDER / "model.ckpt.meta").unlink()
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS, indent=2) + "\n")
