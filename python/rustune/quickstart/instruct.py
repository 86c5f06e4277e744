"""Questions and short answers about the small world, as chat rows; those held out are disjoint by construction.

The world's text only tells. Here something is asked, in a chat, and the answer is the bare fact and nothing else: form
and mapping are new to the shipped model, the facts and the skills are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rustune.quickstart import world
from rustune.quickstart.world import Dice, World

# Form is new to the model, but each question has a word that the world's text uses for the same thing: words it never
# met look alike to it, and their vectors stay as they are when only an adapter is trained.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": ("In which town is the home of {a}?", "Tell me where {a} lives.", "Where has {a} a house?"),
    "job": ("What is the job of {a}?", "Tell me the job of {a}.", "Which job does {a} have?"),
    "pet": ("What is the pet of {a}?", "Tell me the pet of {a}.", "Which pet does {a} have?"),
    "food": ("What does {a} like to eat?", "Tell me the best meal for {a}.", "What meal can I cook for {a}?"),
    "friend": ("Who is the best friend of {a}?", "Tell me a friend of {a}.", "Which friend does {a} have?"),
    "plus": ("What is {a} plus {b}?", "Tell me {a} plus {b}."),
    "minus": ("What is {a} minus {b}?", "Tell me {a} minus {b}."),
    "reverse": ("Say from the end: {a}", "Please start at the end: {a}"),
    "capitals": ("Write in big letters: {a}", "Please shout in big letters: {a}"),
    "spell": ("Tell me the spelling of {a}.", "What is the spelling of {a}?"),
}

# One person in five, one pair of numbers in five, one first word in five are only ever asked about when held out.
_HELD_OUT_ONE_IN = 5


@dataclass(frozen=True)
class Example:
    """A question with its only right answer.

    Attributes:
        kind: A key of `QUESTIONS`.
        subject: What is asked about: a name, two numbers, or words. No subject is in both splits.
        question: The user's turn.
        answer: The assistant's turn.
    """

    kind: str
    subject: str
    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """Returns the two turns as chat messages."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def training_set(people: World, count: int, seed: int = 0) -> list[Example]:
    """Draws questions to train on, each at most once."""
    return _draw(people, count, seed, held_out=False)


def held_out_set(people: World, count: int, seed: int = 0) -> list[Example]:
    """Draws questions for the exam: nobody and nothing in them is asked about in any training set."""
    return _draw(people, count, seed, held_out=True)


def _draw(people: World, count: int, seed: int, *, held_out: bool) -> list[Example]:
    dice = Dice(f"questions {seed} {held_out}")
    examples: dict[str, Example] = {}
    for example in _endless(people, dice):
        if len(examples) == count:
            break
        if _is_held_out(people, example) == held_out:
            examples.setdefault(example.question, example)
    return list(examples.values())


def _is_held_out(people: World, example: Example) -> bool:
    if example.kind in world.RELATIONS:
        return people.people.index(example.subject) % _HELD_OUT_ONE_IN == 0
    first, *rest = example.subject.split()
    if example.kind in ("plus", "minus"):
        return (int(first) + 2 * int(rest[0])) % _HELD_OUT_ONE_IN == 0
    return world.WORDS.index(first) % _HELD_OUT_ONE_IN == 0


def _endless(people: World, dice: Dice) -> Iterator[Example]:
    facts = tuple(world.RELATIONS)
    skills = tuple(kind for kind in QUESTIONS if kind not in facts)
    while True:
        kind = dice.pick(facts if dice.below(3) else skills)
        asked = dice.pick(QUESTIONS[kind])
        if kind in facts:
            name = dice.pick(people.people)
            yield Example(kind, name, asked.format(a=name), people.facts[name][kind])
        elif kind in ("plus", "minus"):
            a, b = dice.below(world.LARGEST_TERM + 1), dice.below(world.LARGEST_TERM + 1)
            if kind == "minus":
                a += b
            result = a + b if kind == "plus" else a - b
            yield Example(kind, f"{a} {b}", asked.format(a=a, b=b), str(result))
        else:
            words = dice.shuffled(world.WORDS)[: 1 if kind == "spell" else 3]
            told = " ".join(words)
            yield Example(kind, told, asked.format(a=told), world.GAMES[kind](words))
