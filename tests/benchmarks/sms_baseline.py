"""How well words alone tell spam: TF-IDF and logistic regression on the book's split.

    python tests/benchmarks/sms_baseline.py

Prints the accuracy on validation and test rows of what always says the most frequent
label, and of scikit-learn's defaults on words and on characters. Needs [peers].
"""

from collections import Counter

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data.classification import read_labeled_texts
from gptjax.data.splits import stratified_split

KINDS = {
    "words": {},
    "words and pairs": {"ngram_range": (1, 2), "sublinear_tf": True},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True},
}

if __name__ == "__main__":
    data, _ = read_labeled_texts("sms-spam")
    options = {"seed": 0, "balance_classes": False, "deduplicate": False}
    splits = stratified_split(data, "book", val_fraction=0.1, test_fraction=0.2, **options)
    train = splits["train"]
    frequent = Counter(train.labels).most_common(1)[0][0]
    pipes = {
        name: make_pipeline(TfidfVectorizer(**kind), LogisticRegression(max_iter=1000))
        for name, kind in KINDS.items()
    }
    for pipe in pipes.values():
        pipe.fit(train.texts, train.labels)
    for split in ("validation", "test"):
        rows = splits[split]
        share = rows.labels.count(frequent) / len(rows.labels)
        print(f"{split:11} always {data.class_names[frequent]:15} {share:.4f}")
        for name, pipe in pipes.items():
            print(f"{split:11} {name:22} {pipe.score(rows.texts, rows.labels):.4f}")
