"""Example rows for the fields that heads usually read."""

from __future__ import annotations

from typing import Any

CONTEXTS = [
    "Ann is in Rome.",
    "Bob is in Oslo.",
    "Ann Lee sleeps. Bob does not sleep, he reads a book about foxes. The lazy dog is in the garden. It sleeps too.",
    "我爱北京。",
    "The dog sleeps.",
]
FIELDS: dict[str, list[Any]] = {
    "text": ["a [MASK]", "b [MASK]", "one [MASK] step", "Zwölf 狐 [MASK]", "one text, longer than all [MASK] others"],
    "label": ["neg", "pos", "neg", "meh", "pos"],
    "labels": [["neg", "short"], ["pos"], ["neg"], [], ["short", "meh", "pos"]],
    "score": [0.5, -1.25, 3, "2.5", 0.5],
    "source": ["a b", "c d", "ein Schritt", "我爱学习", "ein Satz, länger als alle anderen"],
    "target": ["A B", "C D", "a step", "I love to learn", "one sentence, longer than all others"],
    "prompt": ["a b", "c d", "Zähle: eins", "我爱", "a prompt that is longer than all the others are"],
    "completion": ["A B", "C D", " zwei", "学习", " and its completion"],
    "document": [
        "a b. c",
        "d e. f",
        "The fox jumps. It is quick.",
        "我爱学习。狐狸。",
        "A text of three. Sentences. All short.",
    ],
    "summary": ["a b", "d e", "A fox jumps", "学习", "three short sentences"],
    "tokens": [
        ["Ann"],
        ["Bob"],
        ["Ann", "Lee", "is", "in", "Rome"],
        ["我", "爱", "北", "京"],
        ["the", "dog", "of", "Bob", "Stone", "barks", "at", "us", "in", "Oslo"],
    ],
    "tags": [
        ["B-PER"],
        ["B-PER"],
        ["B-PER", "I-PER", "O", "O", "B-LOC"],
        ["O", "O", "B-LOC", "I-LOC"],
        ["O", "O", "O", "B-PER", "I-PER", "O", "O", "O", "O", "B-LOC"],
    ],
    "symbols": ["a b", "b a", "c d e", "a b a b", "a b c d e f a"],
    "expected": ["- c", "- d", "- b -", "- - - b", "- - - a - - b"],
    "question": ["Where is Ann?", "Where is Bob?", "What sleeps in the garden?", "哪里？", "Who sleeps?"],
    "context": CONTEXTS,
    "answers": [
        {"text": [answer], "answer_start": [text.index(answer)]}
        for text, answer in zip(CONTEXTS, ["Rome", "Oslo", "The lazy dog", "北京", "The dog"], strict=True)
    ],
}
"""Rows for the fields that heads usually have, the smallest first; the first two are equally long."""
