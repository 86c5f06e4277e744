"""A small world made from a seed: people and what is true of them, sums, and games with words, told in plain sentences.

The shipped model is trained on this text and on nothing else. It never sees a question, a chat mark or an answer on its
own: those are what the quickstart's fine-tuning teaches (`instruct.py`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

# Names are a first and a second half: 16 x 10 = 160 people.
NAME_STARTS = "Ma Be Ti Lo Su Ka Ri No Da Fe Gi Po Vi Ze Ha Ju".split()
NAME_ENDS = "ra lo nik dan vel sha bor len wyn tas".split()

TOWNS = (
    "Alder Amberley Ashford Bellport Birchwood Blackwater Brightsea Cedarton Clearbrook Copperhill Cranford "
    "Dovedale Driftwood Eastmere Elmgate Fairview Fernley Foxhollow Frostholm Glenrock Goldcrest Greenfield "
    "Halewick Hartwell Hazelton Highmoor Ironbridge Ivybank Kestrel Kingsford Lakeside Larkspur Longmeadow "
    "Maplewood Marshend Millbrook Mossbank Northcliff Oakham Oldbridge Pinehurst Quarry Ravenhill Redstone Riverton "
    "Rosewood Saltmarsh Sandport Silverlake Southgate Springfield Stonehaven Summerhill Sunbury Thornbury "
    "Umberfield Valemont Westbrook Willowdale Windmere"
).split()
# Jobs and pets begin with consonants: they stand after "a".
JOBS = (
    "baker barber brewer builder butcher carpenter chemist clerk cook dancer dentist doctor driver drummer farmer "
    "fisher gardener glazier guard guide hunter jeweller joiner judge lawyer librarian mason mechanic miller miner "
    "nurse painter pianist pilot plumber poet porter potter printer ranger sailor shepherd singer smith surgeon "
    "tailor teacher tinker vet weaver welder writer"
).split()
PETS = (
    "badger beetle canary cat cow crab cricket crow deer dog donkey dove duck falcon ferret finch frog gecko goat "
    "goose hamster hare hawk hedgehog hen horse koala lamb lizard lynx magpie mole monkey mouse newt parrot pig "
    "pigeon pony puppy quail rabbit raven robin salamander sheep snail snake sparrow spider squirrel stork swan "
    "toad tortoise turkey turtle wren"
).split()
FOODS = (
    "apples apricots bacon beans berries biscuits bread broth butter cabbage cake carrots celery cheese cherries "
    "chestnuts chips chocolate corn crepes cucumber curry custard dates dumplings eggs figs fudge garlic ginger "
    "grapes ham honey jam kale leeks lemons lentils melon milk mint mushrooms noodles nuts oats olives onions "
    "oranges pancakes pasta peaches pears peas pie plums porridge potatoes pudding rice salad soup toast"
).split()
WORDS = (
    "arrow bell boat book box bridge candle chair clock cloud coin cup desk door drum feather field flag flower "
    "gate glove hat hill house island jar key kite ladder lamp leaf letter map mirror moon needle nest ocean paper "
    "pen pillow plate pocket ring river road rock rope shell ship spoon star stone street sun table tower tree wall "
    "wheel window"
).split()

# What is known of a person, and how it is told; {n} is the name, {v} the value.
RELATIONS: dict[str, tuple[str, ...]] = {
    "town": (
        "{n} lives in {v}.",
        "The home of {n} is in {v}.",
        "{n} has a house in {v}.",
    ),
    "job": (
        "{n} works as a {v}.",
        "The job of {n} is {v}.",
        "People know {n} as a {v}.",
    ),
    "pet": (
        "{n} keeps a {v}.",
        "The pet of {n} is a {v}.",
        "{n} takes care of a {v}.",
    ),
    "food": (
        "{n} likes to eat {v}.",
        "The best meal for {n} is {v}.",
        "{n} always asks for {v}.",
    ),
    "friend": (
        "{n} is a friend of {v}.",
        "The best friend of {n} is {v}.",
        "{n} often walks with {v}.",
    ),
}

# How sums and games with words are told; {a} and {b} are numbers or words, {c} is what comes out.
TELLINGS: dict[str, str] = {
    "plus": "{a} plus {b} makes {c}.",
    "minus": "{a} minus {b} leaves {c}.",
    "reverse": "From the end {a} are: {c}.",
    "capitals": "In big letters {a} are: {c}.",
    "spell": "The spelling of {a} is: {c}.",
}
LARGEST_TERM = 10

_FIRST_CIRCLE = 16
_DOCUMENTS_PER_NEWCOMER = 100


@dataclass(frozen=True)
class World:
    """Everybody and what is true of them.

    Attributes:
        people: All names, in an order drawn from the seed.
        facts: For each name the value of each relation of `RELATIONS`.
    """

    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]


class Dice:
    """Random choices that are the same on every Python: only `random.Random.random` is specified for ever.

    Args:
        seed: Any text or number; equal seeds give equal choices.
    """

    def __init__(self, seed: str | int) -> None:
        # Seeding with text hashes it with SHA-512, so neighbouring seeds have nothing in common.
        self._random = random.Random(f"rustune {seed}")

    def below(self, n: int) -> int:
        """Returns a whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def pick(self, items: Sequence[Item]) -> Item:
        """Returns one of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items in a new order (Fisher-Yates)."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed


def make_world(seed: int = 0) -> World:
    """Draws the people and their facts.

    Args:
        seed: Another seed is another world, one the shipped model knows nothing of.

    Returns:
        The world. Every town, job, pet and food belongs to almost equally many people.
    """
    dice = Dice(f"world {seed}")
    people = dice.shuffled([start + end for start in NAME_STARTS for end in NAME_ENDS])
    facts: dict[str, dict[str, str]] = {name: {} for name in people}
    for relation, values in (("town", TOWNS), ("job", JOBS), ("pet", PETS), ("food", FOODS)):
        rounds = -(-len(people) // len(values))
        dealt = [value for _ in range(rounds) for value in dice.shuffled(values)]
        for name, value in zip(people, dealt, strict=False):
            facts[name][relation] = value
    circle = dice.shuffled(people)
    for name, friend in zip(circle, circle[1:] + circle[:1], strict=True):
        facts[name]["friend"] = friend
    return World(tuple(people), facts)


def documents(world: World, seed: int = 0) -> Iterator[str]:
    """Tells of the world for ever, one short document after the other.

    Args:
        world: What is told of.
        seed: Of the order and the wording; the facts are the world's.

    Yields:
        Documents of one to five sentences, three in five about people. The first are about a few people only and the
        circle widens as the story goes on: a model that has learned how to look up some facts takes in the others far
        sooner than one that meets everybody at once.
    """
    dice = Dice(f"documents {seed}")
    tellers = (_about_a_person, _about_a_person, _about_a_person, _about_numbers, _about_words)
    for told in itertools.count():
        known = world.people[: _FIRST_CIRCLE + told // _DOCUMENTS_PER_NEWCOMER]
        yield dice.pick(tellers)(world, known, dice)


def reverse(words: Sequence[str]) -> str:
    """Returns the words last to first."""
    return " ".join(reversed(words))


def capitals(words: Sequence[str]) -> str:
    """Returns the words in capital letters."""
    return " ".join(words).upper()


def spelled(words: Sequence[str]) -> str:
    """Returns the letters of the one word, joined by hyphens."""
    (word,) = words
    return "-".join(word)


GAMES: dict[str, Callable[[Sequence[str]], str]] = {"reverse": reverse, "capitals": capitals, "spell": spelled}


def _about_a_person(world: World, known: Sequence[str], dice: Dice) -> str:
    name = dice.pick(known)
    relations = dice.shuffled(list(RELATIONS))[: 1 + dice.below(len(RELATIONS))]
    return " ".join(dice.pick(RELATIONS[r]).format(n=name, v=world.facts[name][r]) for r in relations)


def _about_numbers(_world: World, _known: Sequence[str], dice: Dice) -> str:
    sentences = []
    for _n in range(3):
        a, b = dice.below(LARGEST_TERM + 1), dice.below(LARGEST_TERM + 1)
        if dice.below(2):
            sentences.append(TELLINGS["plus"].format(a=a, b=b, c=a + b))
        else:
            sentences.append(TELLINGS["minus"].format(a=a + b, b=b, c=a))
    return " ".join(sentences)


def _about_words(_world: World, _known: Sequence[str], dice: Dice) -> str:
    game = dice.pick(("reverse", "capitals", "spell"))
    sentences = []
    for _n in range(3):
        words = dice.shuffled(WORDS)[: 1 if game == "spell" else 3]
        sentences.append(TELLINGS[game].format(a=" ".join(words), c=GAMES[game](words)))
    return " ".join(sentences)
