"""What the dialogues of `data.followups` are about: questions in several wordings, answers, and what may come next.

`{a|b}` is a choice, `$name` a value of `VALUES` that stays the same through one dialogue. The three sets share
no topic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

VALUES: dict[str, tuple[str, ...]] = {
    "name": ("Tom", "Anna", "Priya", "Chen", "Maria", "Omar", "Julia", "Ivan", "Fatima", "Ben"),
    "city": ("Paris", "Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Boston", "Dublin", "Vienna", "Leeds"),
    "town": ("Madrid", "Warsaw", "Chicago", "Cairo", "Toronto", "Seoul", "Bristol", "Naples"),
    "country": ("France", "Peru", "Kenya", "Norway", "Japan", "Canada", "Turkey", "Chile", "Ghana", "Poland"),
    "language": ("Python", "Java", "Rust", "Go", "JavaScript", "C++", "Ruby", "Kotlin"),
    "tongue": ("French", "Spanish", "German", "Italian", "Polish", "Turkish"),
    "dish": ("lasagne", "ramen", "pancakes", "a lentil soup", "banana bread", "risotto", "tacos", "a curry"),
    "animal": ("an owl", "a whale", "an octopus", "a honey bee", "a wolf", "a penguin", "an ant"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "date": ("March 4th", "the 12th", "June 20th", "tomorrow", "next weekend", "the 3rd of May"),
    "hour": ("9:15", "11:30", "14:00", "18:45", "7 pm", "noon", "5:30 in the evening"),
    "few": ("two", "three", "four", "five", "six"),
    "count": ("7", "12", "18", "25", "40", "64", "150"),
    "other": ("9", "13", "20", "31", "48", "72", "1200"),
    "price": ("£20", "$35", "80 euros", "$120", "15 pounds"),
    "book": ("Dune", "Emma", "The Hobbit", "Beloved", "Dracula", "1984", "Middlemarch"),
    "element": ("iron", "neon", "gold", "helium", "carbon", "zinc", "sodium"),
    "planet": ("Mars", "Venus", "Jupiter", "Saturn", "Neptune"),
    "person": ("Ada Lovelace", "Newton", "Frida Kahlo", "Mozart", "Marie Curie", "Napoleon"),
    "food": ("Italian", "Indian", "Thai", "Mexican", "Lebanese", "Chinese"),
    "area": ("north", "south", "east", "west", "centre"),
    "error": (
        "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
        "fatal: not a git repository",
        "ModuleNotFoundError: No module named 'numpy'",
        "NullPointerException at Main.java:12",
        "segmentation fault (core dumped)",
        "error: expected ';' before 'return'",
        "404 Not Found",
        "IndexError: list index out of range",
        "Permission denied (publickey)",
        "invalid syntax on line 3",
    ),
}


@dataclass(frozen=True, slots=True)
class Topic:
    """`subject` fits into a sentence; `questions` ask the same; `fact` is what the answer claims, `other` its rival."""

    subject: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    nexts: tuple[str, ...]
    fact: str
    other: str


def _topic(subject: str, questions: str, answers: str, nexts: str, fact: str, other: str) -> Topic:
    return Topic(subject, _listed(questions), _listed(answers), _listed(nexts), fact, other)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.split(" / "))


TRAIN = (
    _topic(
        "the capital of $country",
        "What is the capital of $country? / Which city is the capital of $country?"
        " / Name the capital city of $country.",
        "The capital of $country is $city. / It is $city.",
        "How many people live there? / What is the capital of $town's country?"
        " / Which language do they speak in $country?",
        "$city",
        "$town",
    ),
    _topic(
        "the sum",
        "What is $count + $other? / Add $count and $other. / Can you compute $count plus $other for me?",
        "$count + $other = 61. / The sum is 61.",
        "And what is $count * $other? / What is half of that? / How do I add fractions?",
        "61",
        "$other",
    ),
    _topic(
        "a loop in $language",
        "How do I loop over a list in $language? / Show me a loop over a list in $language."
        " / iterate through a list, $language",
        "Use a for loop: for item in items. / You can write a for loop and print each item.",
        "How do I stop the loop early? / Is a while loop slower? / What is a list comprehension?",
        "a for loop",
        "a while loop",
    ),
    _topic(
        "the recipe",
        "How do I cook $dish? / Give me a recipe for $dish. / I want to make $dish tonight, how?",
        "Fry an onion, add the other ingredients and cook for $count minutes."
        " / Mix everything and bake it for $count minutes.",
        "How long does it keep in the fridge? / Can I freeze $dish? / Which wine goes with $dish?",
        "$count minutes",
        "$other minutes",
    ),
    _topic(
        "the restaurant",
        "I'm looking for a $food restaurant in the $area. / Can you find me a $food place in the $area of town?"
        " / Where can I eat $food food in the $area?",
        "There is one $food restaurant in the $area; shall I book it? / I found a nice place called The Lucky Star.",
        "What is the phone number? / Do they have vegetarian dishes? / Can you book a table for $few at $hour?",
        "the $area",
        "the other side of town",
    ),
    _topic(
        "the train to $city",
        "I need a train to $city on $day. / When is there a train to $city on $day?"
        " / Find me a train that goes to $city on $day.",
        "There is a train to $city at $hour, should I book it? / A train leaves at $hour and costs $price.",
        "How long is the ride? / Yes, book $few tickets. / What is the reference number?",
        "$hour",
        "$day",
    ),
    _topic(
        "the hotel",
        "Can you book a hotel in $city for $date? / I need a room in $city, $date."
        " / Please find a hotel in $city for $date.",
        "I have found $few hotels in $city. / The Grand Hotel in $city is free and costs $price a night.",
        "Does it have free parking? / Is breakfast included? / Book it for $few people please.",
        "$price",
        "$few rooms",
    ),
    _topic(
        "how $animal sleeps",
        "How does $animal sleep? / When does $animal sleep? / Tell me how $animal gets its sleep.",
        "It sleeps for short times, mostly at night. / It rests about $count hours a week.",
        "What does $animal eat? / How long does $animal live? / Do fish sleep as well?",
        "$count hours",
        "$other hours",
    ),
    _topic(
        "the translation",
        'How do you say "good morning" in $tongue? / Translate "good morning" into $tongue.'
        ' / "good morning" in $tongue?',
        "It is one word in $tongue; say it before noon. / Here it is, in the polite form.",
        'How do I say "good night"? / Is there an informal way? / Which countries speak $tongue?',
        "the polite form",
        "the informal form",
    ),
    _topic(
        "the email to $name",
        "Write a short email to $name about the meeting on $day. / Draft a mail for $name: meeting on $day."
        " / I need to write to $name that we meet on $day.",
        "Dear $name, our meeting is on $day at $hour. Kind regards. / Hello $name, see you on $day!",
        "Now write one to $name's boss. / What subject line should I use? / Can you translate it into $tongue?",
        "$day",
        "$hour",
    ),
    _topic(
        "$book",
        "What is $book about? / Can you summarise $book? / Tell me the plot of $book.",
        "$book tells of a family and what the years do to it. / It is about a journey and its end.",
        "Who wrote it? / Is there a film of it? / Which book should I read after $book?",
        "a family",
        "a war",
    ),
    _topic(
        "photosynthesis",
        "Why are leaves green? / What makes leaves green? / Explain the green of leaves.",
        "Because of chlorophyll, which reflects green light. / Leaves hold a pigment that absorbs red and blue light.",
        "Why do they turn red in autumn? / What is chlorophyll made of? / Do all plants need light?",
        "chlorophyll",
        "carotene",
    ),
    _topic(
        "the weather in $city",
        "What is the weather like in $city on $date? / Will it rain in $city on $date? / weather $city $date",
        "It should be sunny and about $count degrees. / There is a 20 percent chance of rain.",
        "How windy will it be? / What about $town? / Should I take a coat?",
        "sunny",
        "rainy",
    ),
    _topic(
        "sorting in $language",
        "How can I sort a list in $language? / Sort a list of numbers in $language."
        " / What is the way to sort a list with $language?",
        "Call sort on the list. / You can use the sort function of the standard library.",
        "How do I sort it backwards? / How fast is it? / How do I sort by the second column?",
        "sort",
        "sorted",
    ),
    _topic(
        "the year",
        "When was $person born? / In what year was $person born? / Tell me the birth year of $person.",
        "$person was born in 17$count. / In 18$count.",
        "Where did $person live? / What is $person famous for? / When did $person die?",
        "18$count",
        "17$count",
    ),
    _topic(
        "git branches",
        "How do I undo a commit in git? / Undo my last git commit, how? / What is the git command to undo a commit?",
        "Run git reset --soft HEAD~1. / Use git revert with the commit's hash.",
        "How do I delete a branch? / What does rebase do? / How do I see the history?",
        "git reset",
        "git revert",
    ),
    _topic(
        "the workout",
        "Make me a workout plan for $few days a week. / I want to train $few days a week, plan it."
        " / Workout plan, $few days a week?",
        "Day 1: legs. Day 2: arms. Rest in between. / Run on $day, lift weights on the other days.",
        "How much protein should I eat? / Can I swim instead on $day? / What shoes do I need?",
        "$few days",
        "$day",
    ),
    _topic(
        "the movie tickets",
        "Get me $few tickets for the film on $day. / I'd like to book $few cinema seats for $day."
        " / Buy $few movie tickets, $day please.",
        "Please confirm: $few tickets at $hour. / You want tickets for $day at $hour, is that right?",
        "Yes, that is right. / What does it cost? / Is there a later show?",
        "$hour",
        "$few tickets",
    ),
    _topic(
        "gravity on $planet",
        "How strong is gravity on $planet? / What is the gravity of $planet? / gravity on $planet compared with Earth?",
        "It is 0.$count of Earth's. / About $count percent of ours.",
        "How many moons does it have? / How far away is $planet? / Could humans live on $planet?",
        "0.$count",
        "0.$other",
    ),
    _topic(
        "interest",
        "How does compound interest work? / Explain compound interest. / What is compound interest?",
        "You earn interest on earlier interest as well. / The bank adds interest to the sum and then pays on both.",
        "What is a good interest rate? / How much is $count at 3 percent after $few years? / Should I buy bonds?",
        "interest on interest",
        "interest on the first sum only",
    ),
)

_ATTRIBUTES = """
price size age history weight colour meaning origin length owner population currency climate speed temperature recipe
height depth taste purpose shape name address symbol author density capital flag anthem distance value number rating
""".split()  # noqa: SIM905
_THINGS = (
    """
a_piano|Mount_Everest|the_Eiffel_Tower|my_street|a_sonnet|the_euro|$country|$city|$book|$animal|$planet|$dish|the_opera
a_violin|the_Nile|the_museum|a_marathon|a_laptop|the_moon|an_atom|a_battery|the_city_bus|a_haiku|the_library|chess|Java
tea|the_stock_market|a_passport|an_elephant|a_diamond|the_castle|a_kilowatt_hour|my_flight|the_concert|the_new_phone
""".replace("_", " ")
    .strip()
    .replace("\n", "|")
    .split("|")
)
_FRAMES = (
    "What is the ATTRIBUTE of THING?",
    "Tell me the ATTRIBUTE of THING.",
    "Can you give me the ATTRIBUTE of THING?",
    "THING, ATTRIBUTE?",
    "Which ATTRIBUTE does THING have?",
    "I'd like to know the ATTRIBUTE of THING.",
    "Do you know the ATTRIBUTE of THING?",
    "Find out the ATTRIBUTE of THING, please.",
    "Could you look up THING's ATTRIBUTE?",
)


def attribute(rng: random.Random) -> Topic:
    """A topic that asks for one thing's attribute; what comes next changes the thing or the attribute."""
    one, two = rng.sample(_ATTRIBUTES, 2)
    this, that = rng.sample(_THINGS, 2)

    def asked(attribute: str, thing: str) -> str:
        return rng.choice(_FRAMES).replace("ATTRIBUTE", attribute).replace("THING", thing)

    questions = tuple(frame.replace("ATTRIBUTE", one).replace("THING", this) for frame in rng.sample(_FRAMES, 4))
    answers = (f"The {one} of {this} is $count.", "It is $count.", f"About $count, as far as I know, is the {one}.")
    nexts = (asked(two, this), asked(one, that), asked(two, that), f"And the {two}?", f"And of {that}?")
    return Topic(f"the {one} of {this}", questions, answers, nexts, "$count", "$other")


SELECTION = (
    _topic(
        "the boiling point",
        "At what temperature does water boil? / When does water boil? / What is water's boiling point?",
        "Water boils at $count degrees. / At sea level, $other degrees Celsius.",
        "And on a mountain? / When does oil burn? / How do I measure that?",
        "$count degrees",
        "$other degrees",
    ),
    _topic(
        "the taxi",
        "Please order a taxi to the station at $hour. / I need a cab to the station, $hour."
        " / Can I get a taxi at $hour to the station?",
        "A white Toyota will pick you up at $hour. / Your taxi is booked.",
        "What is the driver's number? / How much will that be? / Make it for $few people please.",
        "$hour",
        "$day",
    ),
    _topic(
        "regular expressions",
        "How do I match an email with a regular expression? / Regex for an email address?"
        " / Write me a regex that finds emails.",
        "Use \\S+@\\S+. / Try [a-z]+@[a-z.]+ for simple ones.",
        "How do I match a phone number? / What does the plus sign mean? / Is regex fast?",
        "the plus sign",
        "the star",
    ),
    _topic(
        "the poem",
        "Write a poem about $city. / I'd like a little poem on $city. / Compose some verses about $city.",
        "O $city, your streets are bright, your river sings at night. / In $city the bells ring slow.",
        "Now one about the sea. / Who is the best poet of $country? / What is a sonnet?",
        "the river",
        "the hills",
    ),
    _topic(
        "the symptoms",
        "My throat hurts, what should I take? / What helps against a sore throat? / Sore throat, what can I do?",
        "Drink warm tea with honey and rest. / Salt water and sleep help most people.",
        "How long will it last? / When should I see a doctor? / Is ginger any good?",
        "honey",
        "lemon",
    ),
    _topic(
        "the size of $country",
        "How big is $country? / What is the area of $country? / Tell me the size of $country.",
        "About $count thousand square kilometres. / It is a bit larger than its neighbour.",
        "How many people live in $country? / What is its longest river? / Which country is the smallest?",
        "$count thousand",
        "$other thousand",
    ),
)

HELDOUT = (
    _topic(
        "the symbol of $element",
        "What is the chemical symbol of $element? / Which symbol does $element have?"
        " / Give me the symbol for $element.",
        "It is a two letter symbol. / The symbol is X.",
        "What is its atomic number? / Is $element a metal? / Where is $element mined?",
        "X",
        "Y",
    ),
    _topic(
        "the flight to $city",
        "Find me a flight to $city on $date. / I want to fly to $city, leaving $date."
        " / Are there flights to $city on $date?",
        "A flight with Delta leaves at $hour and costs $price. / I have found one with a stop, $price.",
        "How much luggage can I take? / Book it, please. / When does it land?",
        "$hour",
        "$price",
    ),
    _topic(
        "SQL joins",
        "What is the difference between a left join and an inner join? / left join vs inner join?"
        " / Explain how left and inner joins differ.",
        "A left join keeps all rows of the first table. / An inner join keeps only rows that match.",
        "Which one is faster? / What is an outer join? / How do I join three tables?",
        "the first table",
        "the second table",
    ),
    _topic(
        "the garden",
        "When should I plant tomatoes? / Which month is best to plant tomatoes? / Planting tomatoes: when?",
        "After the last frost, usually in May. / Start them indoors in March.",
        "How often do I water them? / Do they need sun? / What about basil?",
        "May",
        "March",
    ),
    _topic(
        "the percentage",
        "What is $count percent of $other? / Calculate $count% of $other. / How much is $count percent of $other?",
        "That is 4.5. / $count percent of $other is 4.5.",
        "How do I work out a discount? / What is a percentile? / And as a fraction?",
        "4.5",
        "45",
    ),
    _topic(
        "the phone",
        "How can I free up space on my phone? / My phone is full, what can I delete?"
        " / Ways to get more storage on a phone?",
        "Delete old photos and apps that you do not use. / Clear the cache in the settings.",
        "Does that delete my contacts? / How do I back it up? / Which phone has most storage?",
        "the settings",
        "the photos",
    ),
    _topic(
        "the speech",
        "Write a toast for the wedding of $name. / I need a wedding toast for $name."
        " / Help me with a toast, $name is getting married.",
        "Dear $name, may your days be merry and your coffee strong. / Friends, raise your glass to $name!",
        "Can you add a joke? / How long should a toast be? / What should I wear?",
        "the coffee",
        "the champagne",
    ),
    _topic(
        "the battle",
        "Who won the battle of Waterloo? / Which side won at Waterloo? / Waterloo: who was the winner?",
        "Wellington and Blücher won it. / The allied armies did, in 1815.",
        "How many soldiers fought? / Where is Waterloo? / What happened to Napoleon afterwards?",
        "Wellington",
        "Napoleon",
    ),
)
