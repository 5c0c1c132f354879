"""The quickstart's small world: question families, their facts, and the two styles of answering.

Everything here was written for this project. `make_data.py` and `make_model.py` build the shipped files from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shared import draw_number

POLITE_ANSWERS = ("Good question! {statement}", "Of course! {statement}", "{statement} Happy to help!")
CURT_ANSWERS = ("{short}.", "{short}, obviously.", "{short}. Next.")
SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class Family:
    """Questions of one kind.

    Attributes:
        name: Short name, unique among the families.
        questions: Phrasings with the field `{subject}`.
        statement: Answer as a sentence, with the fields `{subject}` and `{answer}` or `{an_answer}` (with article).
        facts: Subject and answer of each fact, one fact a line as `subject: answer`.
    """

    name: str
    questions: tuple[str, ...]
    statement: str
    facts: str


@dataclass(frozen=True)
class Question:
    """One question in one phrasing, with every answer the shipped model was taught to give.

    Attributes:
        text: The question.
        answer: The word or words that a correct answer contains.
        polite: Full sentences with a friendly phrase.
        curt: The bare answer, three words at most besides the answer itself.
        split: Which of `SPLITS` the fact belongs to; all phrasings of a fact share it.
    """

    text: str
    answer: str
    polite: tuple[str, ...]
    curt: tuple[str, ...]
    split: str


FAMILIES = (
    Family(
        name="capital",
        questions=(
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Name the capital of {subject}.",
        ),
        statement="The capital of {subject} is {answer}.",
        facts="""France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; Austria: Vienna;
        Poland: Warsaw; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen; Iceland: Reykjavik;
        Ireland: Dublin; Belgium: Brussels; Greece: Athens; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia;
        Croatia: Zagreb; Serbia: Belgrade; Slovenia: Ljubljana; Latvia: Riga; Lithuania: Vilnius; Estonia: Tallinn;
        Turkey: Ankara; Egypt: Cairo; Kenya: Nairobi; Ghana: Accra; Morocco: Rabat; Senegal: Dakar; Angola: Luanda;
        Japan: Tokyo; China: Beijing; Thailand: Bangkok; Vietnam: Hanoi; Nepal: Kathmandu; Iran: Tehran; Iraq: Baghdad;
        Jordan: Amman; Lebanon: Beirut; Canada: Ottawa; Cuba: Havana; Peru: Lima; Chile: Santiago; Ecuador: Quito;
        Uruguay: Montevideo; Australia: Canberra; Ukraine: Kyiv; Uganda: Kampala""",
    ),
    Family(
        name="colour",
        questions=(
            "What colour is {subject}?",
            "Which colour does {subject} have?",
            "Tell me the colour of {subject}.",
        ),
        statement="The colour of {subject} is {answer}.",
        facts="""a lemon: yellow; grass: green; snow: white; coal: black; a ripe tomato: red; a clear sky: blue;
        a carrot: orange; a flamingo: pink; an aubergine: purple; chocolate: brown; a raven: black;
        a polar bear: white; an emerald: green; a ruby: red; a sapphire: blue; an elephant: grey; a lime: green;
        a ripe banana: yellow; milk: white; a fire engine: red; a cucumber: green; a sunflower: yellow;
        a pumpkin: orange; salt: white; a strawberry: red; a crow: black; a swan: white; a canary: yellow;
        a tree frog: green; a cherry: red; spinach: green; ash: grey; cocoa: brown; blood: red; butter: yellow;
        lavender: purple""",
    ),
    Family(
        name="opposite",
        questions=(
            "What is the opposite of {subject}?",
            "Which word means the opposite of {subject}?",
            "Give me the opposite of {subject}.",
        ),
        statement="The opposite of {subject} is {answer}.",
        facts="""hot: cold; big: small; tall: short; fast: slow; early: late; light: dark; hard: soft; wet: dry;
        full: empty; open: closed; young: old; rich: poor; happy: sad; strong: weak; clean: dirty; loud: quiet;
        near: far; high: low; left: right; up: down; day: night; summer: winter; north: south; east: west; win: lose;
        buy: sell; push: pull; begin: end; laugh: cry; give: take; love: hate; peace: war; true: false; sweet: sour;
        thick: thin; wide: narrow; smooth: rough; brave: cowardly; always: never; inside: outside; before: after;
        above: below; friend: enemy""",
    ),
    Family(
        name="young",
        questions=(
            "What is a baby {subject} called?",
            "What do you call a baby {subject}?",
            "Which name does a baby {subject} have?",
        ),
        statement="A baby {subject} is called {an_answer}.",
        facts="""cat: kitten; dog: puppy; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet; lion: cub;
        duck: duckling; goose: gosling; swan: cygnet; hen: chick; frog: tadpole; deer: fawn; kangaroo: joey;
        butterfly: caterpillar; hare: leveret; elephant: calf; bear: cub; seal: pup; hedgehog: hoglet; owl: owlet;
        eagle: eaglet; pigeon: squab""",
    ),
    Family(
        name="worker",
        questions=("Who {subject}?", "Which person {subject}?", "Tell me who {subject}."),
        statement="The person who {subject} is called {an_answer}.",
        facts="""bakes bread: baker; grows crops: farmer; flies planes: pilot; teaches pupils: teacher;
        puts out fires: firefighter; catches fish: fisher; cuts hair: hairdresser; repairs teeth: dentist;
        lays bricks: bricklayer; paints pictures: painter; writes novels: author; sews clothes: tailor;
        mends pipes: plumber; cooks in a restaurant: chef; treats sick animals: vet; treats sick people: doctor;
        designs houses: architect; plays the piano: pianist; makes shoes: cobbler; makes wooden chairs: carpenter;
        digs for coal: miner; sells meat: butcher; sells flowers: florist; looks after sheep: shepherd;
        repairs cars: mechanic; takes photos: photographer; acts in plays: actor; decides in court: judge;
        travels into space: astronaut; tends gardens: gardener; studies the stars: astronomer;
        keeps bees: beekeeper""",
    ),
    Family(
        name="next",
        questions=("What comes after {subject}?", "What follows {subject}?", "Tell me what comes after {subject}."),
        statement="After {subject} comes {answer}.",
        facts="""January: February; February: March; March: April; April: May; May: June; June: July; July: August;
        August: September; September: October; October: November; November: December; December: January;
        Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday;
        Saturday: Sunday; Sunday: Monday""",
    ),
    Family(
        name="continent",
        questions=(
            "On which continent is {subject}?",
            "Which continent does {subject} belong to?",
            "Name the continent of {subject}.",
        ),
        statement="The continent of {subject} is {answer}.",
        facts="""Brazil: South America; Argentina: South America; Bolivia: South America; Colombia: South America;
        Venezuela: South America; Paraguay: South America; Nigeria: Africa; Ethiopia: Africa; Tanzania: Africa;
        Zambia: Africa; Algeria: Africa; Tunisia: Africa; Mali: Africa; Namibia: Africa; Mongolia: Asia;
        Pakistan: Asia; Malaysia: Asia; Cambodia: Asia; Laos: Asia; Switzerland: Europe; Albania: Europe;
        Moldova: Europe; Slovakia: Europe; Malta: Europe; Mexico: North America; Jamaica: North America;
        Panama: North America; Guatemala: North America""",
    ),
    Family(
        name="tool",
        questions=(
            "What do you use to {subject}?",
            "Which thing helps you to {subject}?",
            "Name something to {subject} with.",
        ),
        statement="To {subject}, you use {an_answer}.",
        facts="""cut bread: knife; drive nails: hammer; tell the time: clock; sweep the floor: broom;
        write a letter: pen; dig a hole: shovel; chop wood: axe; stay dry in the rain: umbrella; smooth shirts: iron;
        open a lock: key; watch the stars: telescope; tidy your hair: comb; measure a fever: thermometer;
        eat soup: spoon; cut planks: saw; turn screws: screwdriver; take pictures: camera; find north: compass;
        climb onto a roof: ladder; sew on a button: needle; boil water: kettle; call a friend: phone;
        weigh apples: scale; light a dark cave: torch; dry yourself: towel; see tiny cells: microscope;
        draw straight lines: ruler; fill a tyre with air: pump""",
    ),
)


def all_questions() -> Iterator[Question]:
    """Yields every question: all families, facts and phrasings, in the order written above."""
    for family in FAMILIES:
        facts = _parse(family.facts)
        splits = _split([f"{family.name}/{subject}" for subject, _ in facts])
        for (subject, answer), split in zip(facts, splits, strict=True):
            article = "an" if answer[0] in "aeiou" else "a"
            statement = family.statement.format(subject=subject, answer=answer, an_answer=f"{article} {answer}")
            short = answer[0].upper() + answer[1:]
            for phrasing in family.questions:
                yield Question(
                    text=phrasing.format(subject=subject),
                    answer=answer,
                    polite=tuple(form.format(statement=statement) for form in POLITE_ANSWERS),
                    curt=tuple(form.format(short=short) for form in CURT_ANSWERS),
                    split=split,
                )


def _parse(facts: str) -> list[tuple[str, str]]:
    pairs = [line.split(":") for line in facts.split(";")]
    return [(" ".join(subject.split()), " ".join(answer.split())) for subject, answer in pairs]


def _split(keys: list[str]) -> list[str]:
    """Deals the facts of a family: a tenth to validation, a quarter held out, the rest to training."""
    order = sorted(keys, key=draw_number)
    num_validation, num_heldout = len(keys) // 10, len(keys) // 4
    split = dict.fromkeys(order[:num_validation], "validation")
    split |= dict.fromkeys(order[num_validation : num_validation + num_heldout], "heldout")
    return [split.get(key, "train") for key in keys]
