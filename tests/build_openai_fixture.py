"""Writes tests/fixtures/openai-tiny: `python tests/build_openai_fixture.py`.

It needs TensorFlow (2.21 wrote what is there), which is no dependency of anything here:
install it in an environment of its own. The folder has the files and the names of the
GPT-2 that OpenAI published; the numbers are random, from a seed that
test_weights_openai.py shares. The graph (model.ckpt.meta) is left out, nobody reads it.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "openai-tiny"
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}


def arrays() -> dict[str, np.ndarray]:
    """The tensors by name, float32: always the same."""
    width = HPARAMS["n_embd"]
    layer = {
        **{"ln_1/g": (width,), "ln_1/b": (width,)},
        **{"attn/c_attn/w": (1, width, 3 * width), "attn/c_attn/b": (3 * width,)},
        **{"attn/c_proj/w": (1, width, width), "attn/c_proj/b": (width,)},
        **{"ln_2/g": (width,), "ln_2/b": (width,)},
        **{"mlp/c_fc/w": (1, width, 4 * width), "mlp/c_fc/b": (4 * width,)},
        **{"mlp/c_proj/w": (1, 4 * width, width), "mlp/c_proj/b": (width,)},
    }
    shapes = {
        **{"model/wte": (HPARAMS["n_vocab"], width), "model/wpe": (HPARAMS["n_ctx"], width)},
        **{"model/ln_f/g": (width,), "model/ln_f/b": (width,)},
    }
    for number in range(HPARAMS["n_layer"]):
        shapes |= {f"model/h{number}/{name}": shape for name, shape in layer.items()}
    # Raw words of PCG64, as numpy promises no stream of its normal distribution; the
    # mask keeps each float32 finite and as large as a weight is, 2^-7 to 2 or negative.
    words = np.random.PCG64(2019)

    def array(shape: tuple[int, ...]) -> np.ndarray:
        bits = words.random_raw(int(np.prod(shape))).astype(np.uint32)
        return ((bits & 0x83FFFFFF) | 0x3C000000).view(np.float32).reshape(shape)

    return {name: array(shape) for name, shape in shapes.items()}


def write() -> None:
    """Saves the tensors as OpenAI did: variables in a graph, by a Saver."""
    import tensorflow

    v1 = tensorflow.compat.v1
    v1.disable_eager_execution()
    with v1.Session() as session:
        variables = [v1.get_variable(name, initializer=array) for name, array in arrays().items()]
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver(variables, save_relative_paths=True)
        saver.save(session, str(FOLDER / "model.ckpt"))
    (FOLDER / "model.ckpt.meta").unlink()
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS, indent=2) + "\n")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write()
    print(f"wrote {FOLDER}")
