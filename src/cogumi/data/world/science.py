"""Physics and chemistry by formula, with the constants that a question gives.

1  distance from speed and time               2  density from mass and volume
3  voltage, current or resistance             4  kinetic or potential energy
5  molar mass of a molecule from given atomic masses
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from cogumi.data.world.task import Maker, Task, Wording, no_answer, openings

_THINGS = ("car", "train", "bike", "boat", "horse", "drone", "bus", "runner")
_STUFF = ("block", "stone", "cube", "bar", "ball", "coin")
_MASSES = {"H": 1, "C": 12, "N": 14, "O": 16, "Na": 23, "S": 32, "Cl": 35, "Fe": 56}


def make(difficulty: int, rng: random.Random, wording: Wording = "terse") -> Task:
    """A question of natural science whose answer is a number."""
    question, value = (_motion, _density, _circuit, _energy, _molecule)[difficulty - 1](rng)
    return Task(rng.choice(openings(wording)) + question, value, {"kind": "numeric"})


def _motion(rng: random.Random) -> tuple[str, str]:
    thing, speed, hours = rng.choice(_THINGS), rng.randrange(4, 90), rng.randrange(2, 10)
    return f"A {thing} moves at {speed} km/h for {hours} hours. How many km does it cover?", str(speed * hours)


def _density(rng: random.Random) -> tuple[str, str]:
    thing, volume, density = rng.choice(_STUFF), rng.randrange(2, 40), rng.randrange(2, 20)
    mass = volume * density
    return f"A {thing} has a mass of {mass} g and a volume of {volume} cm^3. What is its density in g/cm^3?", str(
        density
    )


def _circuit(rng: random.Random) -> tuple[str, str]:
    amperes, ohms = rng.randrange(2, 13), rng.randrange(2, 30)
    volts = amperes * ohms
    return rng.choice(
        [
            (f"A current of {amperes} A flows through {ohms} ohm. What is the voltage in V?", str(volts)),
            (f"At {volts} V a current of {amperes} A flows. What is the resistance in ohm?", str(ohms)),
            (f"A resistance of {ohms} ohm is connected to {volts} V. What is the current in A?", str(amperes)),
        ]
    )


def _energy(rng: random.Random) -> tuple[str, str]:
    thing, mass = rng.choice(_STUFF), 2 * rng.randrange(1, 30)
    if rng.random() < 0.5:
        speed = rng.randrange(2, 20)
        question = f"A {thing} of {mass} kg moves at {speed} m/s. What is its kinetic energy in J?"
        return question, str(mass * speed * speed // 2)
    height = rng.randrange(2, 40)
    question = (
        f"A {thing} of {mass} kg is lifted by {height} m, with g = 10 m/s^2. How many J of potential energy is that?"
    )
    return question, str(mass * height * 10)


def _molecule(rng: random.Random) -> tuple[str, str]:
    atoms = {name: rng.randrange(1, 7) for name in rng.sample(list(_MASSES), rng.choice((2, 3)))}
    formula = "".join(f"{name}{count if count > 1 else ''}" for name, count in atoms.items())
    given = ", ".join(f"{name} {_MASSES[name]}" for name in atoms)
    mass = sum(_MASSES[name] * count for name, count in atoms.items())
    return f"Atomic masses: {given}. What is the mass of one molecule {formula}?", str(mass)


def _missing_quantity(rng: random.Random, wording: Wording = "terse") -> Task:
    """A quantity that needs one that is not given."""
    return no_answer(f"A {rng.choice(_THINGS)} moves at {rng.randrange(4, 90)} km/h. How many km did it cover in all?")


UNANSWERABLE: Mapping[str, Maker] = {"missing_quantity": _missing_quantity}
