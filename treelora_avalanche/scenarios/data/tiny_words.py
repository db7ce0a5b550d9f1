"""Word lists and sentence parts of the tiny text tasks."""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


class Opinions(NamedTuple):
    """Subjects of one kind, and what reviews say of them, by the answer.

    >>> Opinions(("soup",), positive=("tasty",), negative=("cold",)).negative
    ('cold',)

    :param subjects: nouns.
    :param positive: adjectives of a good review.
    :param negative: adjectives of a bad review.
    """

    subjects: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]


RESTAURANTS = (
    Opinions(
        _words(
            "soup steak pasta bread salad curry chicken fish rice pizza dessert cake coffee burger "
            "risotto omelette"
        ),
        _words(
            "delicious tasty fresh perfect excellent superb wonderful flavourful fantastic "
            "outstanding great amazing"
        ),
        _words(
            "tasteless stale burnt greasy disgusting inedible awful bland terrible horrible soggy "
            "dreadful"
        ),
    ),
    Opinions(
        _words("waiter chef manager bartender host owner waitress cook"),
        _words("friendly polite helpful kind attentive charming welcoming cheerful"),
        _words("rude slow careless unfriendly impatient grumpy arrogant dishonest"),
    ),
)
"""Food and staff."""

FILMS = (
    Opinions(
        _words(
            "plot story script ending dialogue opening cast film sequel comedy drama thriller "
            "soundtrack photography finale romance"
        ),
        _words(
            "gripping brilliant touching clever moving excellent superb wonderful funny "
            "unforgettable great amazing"
        ),
        _words(
            "boring predictable dull silly confusing awful lifeless pointless terrible horrible "
            "tedious dreadful"
        ),
    ),
    Opinions(
        _words("actor actress director hero villain writer lead narrator"),
        _words("convincing talented impressive believable charming inspired magnificent memorable"),
        _words("unconvincing wooden annoying forgettable clumsy lazy hopeless miscast"),
    ),
)
"""Works and people."""

HEADLINES = {
    "sport": (
        _phrases(
            "Home side; National team; Young goalkeeper; Veteran striker; Marathon runner;"
            "Tennis champion; Olympic swimmer; Rugby captain; Basketball star; Cycling team"
        ),
        _phrases(
            "wins the final; scores in the last minute; misses the semi-final;"
            "breaks the world record; loses after extra time; signs for a rival club;"
            "injured before the match; celebrates third title; beaten in the derby;"
            "qualifies for the cup"
        ),
    ),
    "business": (
        _phrases(
            "Car maker; Oil company; Central bank; Airline; Supermarket chain; Insurance group;"
            "Online retailer; Steel producer; Investment fund; Shipping firm"
        ),
        _phrases(
            "reports record profits; cuts a thousand jobs; raises prices again;"
            "buys its largest competitor; shares fall sharply; warns of weak sales;"
            "plans stock market listing; borrows two billion; posts quarterly loss;"
            "pays higher dividend"
        ),
    ),
    "science": (
        _phrases(
            "Astronomers; Physicists; Marine biologists; Space telescope; Researchers;"
            "Geologists; Chemists; Mars probe; Laboratory team; Botanists"
        ),
        _phrases(
            "discover a distant planet; explain how whales sleep; find ancient fossils;"
            "measure a black hole; sequence the genome of wheat; detect water on a moon;"
            "test a new vaccine; observe rare particles; map the ocean floor;"
            "study the DNA of bees"
        ),
    ),
    "politics": (
        _phrases(
            "Prime minister; Parliament; President; Opposition leader; Senate; Mayor;"
            "Foreign minister; Coalition; Governor; Cabinet"
        ),
        _phrases(
            "calls early election; rejects the new law; signs peace treaty;"
            "loses confidence vote; promises tax reform; debates the constitution;"
            "resigns after scandal; vetoes immigration bill; visits embassy in Paris;"
            "campaigns for a second term"
        ),
    ),
}
"""Subjects and predicates of headlines by topic."""

PLURALS = _pairs(
    "book books table tables river rivers garden gardens window windows letter letters bird birds "
    "flower flowers road roads song songs teacher teachers island islands planet planets doctor "
    "doctors engine engines market markets bridge bridges castle castles forest forests village "
    "villages pencil pencils ticket tickets orange oranges horse horses nurse nurses prize prizes "
    "box boxes fox foxes church churches watch watches brush brushes dish dishes glass glasses bus "
    "buses class classes match matches bench benches peach peaches wish wishes kiss kisses dress "
    "dresses branch branches lunch lunches tax taxes coach coaches address addresses beach beaches "
    "city cities baby babies story stories party parties country countries lady ladies family "
    "families army armies berry berries body bodies copy copies duty duties enemy enemies factory "
    "factories fairy fairies hobby hobbies library libraries memory memories penny pennies puppy "
    "puppies spy spies cherry cherries diary diaries day days key keys boy boys toy toys monkey "
    "monkeys donkey donkeys valley valleys turkey turkeys leaf leaves wolf wolves knife knives "
    "wife wives life lives half halves shelf shelves thief thieves loaf loaves calf calves elf "
    "elves hero heroes potato potatoes tomato tomatoes echo echoes photo photos piano pianos radio "
    "radios man men woman women child children foot feet tooth teeth goose geese mouse mice person "
    "people ox oxen"
)
"""Plurals of nouns."""

PAST_TENSES = _pairs(
    "walk walked talk talked open opened play played help helped clean cleaned start started paint "
    "painted visit visited answer answered listen listened watch watched finish finished jump "
    "jumped climb climbed cook cooked laugh laughed wait waited want wanted need needed like liked "
    "love loved move moved dance danced smile smiled close closed arrive arrived decide decided "
    "invite invited believe believed use used hope hoped save saved stop stopped plan planned drop "
    "dropped beg begged rub rubbed clap clapped hug hugged nod nodded try tried cry cried study "
    "studied carry carried marry married worry worried hurry hurried copy copied reply replied go "
    "went come came see saw eat ate drink drank run ran write wrote read read give gave take took "
    "make made find found think thought buy bought bring brought teach taught catch caught sing "
    "sang swim swam begin began ring rang fly flew grow grew know knew throw threw draw drew break "
    "broke speak spoke steal stole choose chose drive drove ride rode rise rose sleep slept keep "
    "kept feel felt leave left meet met lose lost win won sit sat stand stood tell told sell sold "
    "hear heard build built send sent spend spent pay paid say said fall fell hold held forget "
    "forgot wear wore shake shook hide hid bite bit fight fought"
)
"""Past tenses of verbs."""

UNITS = (
    ("decades", "years", 10),
    ("centimetres", "millimetres", 10),
    ("centuries", "years", 100),
    ("metres", "centimetres", 100),
    ("euros", "cents", 100),
    ("kilograms", "grams", 1000),
    ("kilometres", "metres", 1000),
    ("litres", "millilitres", 1000),
    ("millennia", "years", 1000),
    ("seconds", "milliseconds", 1000),
    ("tonnes", "kilograms", 1000),
)
"""A unit, a smaller one, and how many of the smaller ones it holds."""
