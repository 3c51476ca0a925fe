"""Episodes that a pico model can learn: which of two words belongs to which number, drawn for each episode."""

import random

from cogumi.core.types import Example, Message
from cogumi.data.episodes import Episode, write_episodes
from cogumi.data.examples import example_id


def example(question, answer):
    messages = (Message("user", question),)
    return Example(example_id("math", messages), "math", 0, messages, answer, "toy", {"check": {"kind": "exact"}})


def episode(split, number, draw=0):
    """Numbers below five have one word as the answer, all others another."""
    rng = random.Random(f"{split}/{number}/{draw}")
    low, high = rng.sample("abcdefgh" if split == "train" else "stuvwxyz", 2)
    questions = rng.sample([f"{number} {rest}" for number in range(10) for rest in ("go", "do", "it")], 14)
    questions.sort(key=lambda question: question[0] < "5")
    turns = [questions.pop(-(i % 2)) for i in range(6)]  # from both ends, so that both words are shown
    rng.shuffle(questions)
    answers = {question: low if question[0] < "5" else high for question in (*turns, *questions)}
    support, query = (tuple(example(q, answers[q]) for q in some) for some in (turns, questions))
    return Episode(f"{split}/{number}/{draw}", "toy", "rename", f"{low}, {high}", draw, support, query)


def write(folder, train=16, selection=4, heldout=3, draws=2):
    """An `episodes` artifact."""
    write_episodes(folder, "train", [episode("train", i) for i in range(train)])
    write_episodes(folder, "selection", [episode("selection", i) for i in range(selection)])
    write_episodes(folder, "heldout", [episode("heldout", i, d) for d in range(draws) for i in range(heldout)])
