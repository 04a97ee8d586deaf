"""How well words alone tell spam: TF-IDF and logistic regression on the book's split.

    python tests/benchmarks/sms_baseline.py

Prints the accuracy on validation and test rows of what always says the most frequent
label, and of scikit-learn's defaults on words and on characters. Needs [peers].
"""

from collections import Counter

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data.classification import read_labeled_texts
from gptjax.data.splits import stratified_split

KINDS = {
    "words": {},
    "words and pairs": {"ngram_range": (1, 2), "sublinear_tf": True},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5), "sublinear_tf": True},
}


def main() -> None:
    """Fits and prints."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    data, said = read_labeled_texts("sms-spam")
    splits = stratified_split(
        data,
        "book",
        val_fraction=0.1,
        test_fraction=0.2,
        seed=0,
        balance_classes=False,
        deduplicate=False,
    )
    print(said)
    train = splits["train"]
    frequent = Counter(train.labels).most_common(1)[0][0]
    for split in ("validation", "test"):
        labels = splits[split].labels
        share = labels.count(frequent) / len(labels)
        print(f"{split:11} always {data.class_names[frequent]:15} {share:.4f}")
    for name, options in KINDS.items():
        pipe = make_pipeline(TfidfVectorizer(**options), LogisticRegression(max_iter=1000))
        pipe.fit(train.texts, train.labels)
        for split in ("validation", "test"):
            rows = splits[split]
            print(f"{split:11} {name:22} {pipe.score(rows.texts, rows.labels):.4f}")


if __name__ == "__main__":
    main()
