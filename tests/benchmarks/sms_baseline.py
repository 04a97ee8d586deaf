"""How well words alone tell spam: TF-IDF and logistic regression on the book's split.

    python tests/benchmarks/sms_baseline.py

Prints the accuracy on validation and test rows. Needs [peers].
"""

from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data.classification import read_labeled_texts
from gptjax.data.splits import stratified_split

KINDS = {
    "words": {},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True},
}

if __name__ == "__main__":
    data, _ = read_labeled_texts("sms-spam")
    options = {"seed": 0, "balance_classes": False}
    splits = stratified_split(data, "book", val_fraction=0.1, test_fraction=0.2, **options)
    train = splits["train"]
    models = {"the most frequent label": DummyClassifier()}
    for name, options in KINDS.items():
        vectorizer, regression = TfidfVectorizer(**options), LogisticRegression(max_iter=1000)
        models[name] = make_pipeline(vectorizer, regression)
    for name, model in models.items():
        model.fit(train.texts, train.labels)
        for split in ("validation", "test"):
            rows = splits[split]
            print(f"{split:11} {name:24} {model.score(rows.texts, rows.labels):.4f}")
