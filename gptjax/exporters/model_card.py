"""Model card: the README.md of an exported model.

Its metadata are those of the Hugging Face hub, https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Sequence

from gptjax.tree import num_params
from gptjax.weights.model_folder import Model

TRANSFORMERS_USAGE = """```python
from transformers import AutoTokenizer, {auto_class}

model = {auto_class}.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")
```
"""
GPTJAX_USAGE = """```bash
gptjax {command} {location}
```
"""
GGUF_USAGE = """```bash
llama-cli -hf {location}
ollama run hf.co/{location}
```
"""


def model_card(
    model: Model,
    *,
    architecture: str = "",
    model_type: str = "",
    location: str = "THIS FOLDER",
    license_id: str = "",
    base_model: str = "",
    sections: Sequence[str] = (),
    has_gguf: bool = False,
) -> str:
    """Returns the model card (README.md) of an exported folder.

    `architecture` and `model_type` are those of transformers, if it can load the model;
    `location` is the name that users load it by; `sections` are lines of Markdown.
    """
    c, labels = model.config, ", ".join(model.labels)
    task, auto_class = "text-generation", "AutoModelForCausalLM"
    if model.labels:
        task, auto_class = "text-classification", "AutoModelForSequenceClassification"
    title = f"{architecture or 'GPT'} with {num_params(model.params):,} parameters"
    metadata = {
        "library_name": "transformers" if architecture else "gptjax",
        "pipeline_tag": task,
        "license": license_id,
        "base_model": base_model,
        "tags": f"[{', '.join(filter(None, [model_type, 'gptjax']))}]",
    }
    command = "classify" if model.labels else "chat" if model.chat_template else "generate"
    usage = GPTJAX_USAGE.format(command=command, location=location)
    if architecture:
        usage = TRANSFORMERS_USAGE.format(auto_class=auto_class, location=location) + usage
    lines = [
        "---",
        *(f"{name}: {value}" for name, value in metadata.items() if value),
        "---\n",
        f"# {f'Classifier ({labels}): ' if labels else ''}{title}\n",
        f"{c.n_layers} layers, {c.n_heads} heads, width {c.d_model}, context {c.context_length},",
        f"{c.vocab_size:,} tokens. Written by gptjax.\n",
        *sections,
        "## Usage\n",
        usage + (GGUF_USAGE.format(location=location) if has_gguf else ""),
    ]
    return "\n".join(lines)
