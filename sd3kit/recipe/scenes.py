"""What nano knows: subjects, styles, colours and words, and the captions that describe them.

A `Scene` says what a picture shows. `draw` in `sd3kit.recipe.art` turns it into pixels and `caption` into words, so
that one object gives both halves of a training pair and the answer that the judge checks.
"""

import dataclasses
import hashlib
import random
import string
from pathlib import Path

HELD_OUT = Path(__file__).with_name("held_out.txt")  # what training never sees, listed
# Icon name in the art (Fluent's), then the name in captions where it differs, then synonyms (checked against the tags
# of emojibase-data 17.0.0, MIT). The order matters: training goes in waves, and wave n uses the first so many of them
# (`--subjects`).
_SUBJECTS = """
cat-face=cat|kitten|kitty dog-face=dog|puppy fox panda lion frog penguin owl octopus turtle|tortoise
tropical-fish=fish butterfly rocket automobile=car|automobile sailboat|boat|yacht house
evergreen-tree=tree|pine_tree sunflower mushroom|toadstool cactus red-apple=apple banana watermelon strawberry
pizza hamburger|burger doughnut=donut|doughnut red-heart=heart star sun robot ghost tiger-face=tiger
cow-face=cow pig-face=pig rabbit-face=rabbit|bunny mouse-face=mouse bear koala monkey-face=monkey chicken duck
parrot flamingo elephant whale dolphin shark crab lobster snail honeybee=bee|bumblebee
lady-beetle=ladybug|ladybird unicorn dragon-face=dragon t-rex=dinosaur|tyrannosaurus snake|serpent tulip rose
cherry-blossom palm-tree maple-leaf potted-plant=plant bus taxi|cab fire-engine police-car tractor
locomotive=train bicycle|bike airplane|plane helicopter flying-saucer=ufo|flying_saucer delivery-truck=truck
castle tent volcano lemon tangerine grapes cherries pineapple peach pear avocado eggplant|aubergine carrot
broccoli bread cheese-wedge=cheese french-fries=fries hot-dog|frankfurter taco sushi cookie cupcake
birthday-cake=cake soft-ice-cream=ice_cream hot-beverage=coffee soccer-ball=football basketball guitar violin
trumpet crown umbrella balloon wrapped-gift=gift|present key hammer books camera bell teddy-bear alien
jack-o-lantern=pumpkin snowman skull grinning-face=happy_face smiling-face-with-sunglasses=cool_face
clown-face=clown full-moon=moon crescent-moon rainbow cloud fire|flame anchor top-hat=hat backpack ant badger
bat beaver beetle bison|buffalo camel|dromedary crocodile deer dodo donkey|burro dove eagle
fish-cake-with-swirl=fish_cake giraffe goat goose gorilla hedgehog hippopotamus|hippo horse-face=horse
jellyfish kangaroo llama|alpaca lizard mammoth moose|elk orangutan otter ox peacock polar-bear poodle raccoon
rhinoceros|rhino rooster sauropod|brontosaurus scorpion seal sloth skunk spider squid swan turkey wolf zebra
ear-of-corn=corn|maize tomato potato onion garlic cucumber hot-pepper=chili bell-pepper|capsicum mango
melon|cantaloupe kiwi-fruit=kiwi coconut blueberries olive peanuts chestnut croissant pretzel bagel pancakes
waffle bacon egg sandwich burrito popcorn chocolate-bar=chocolate candy lollipop custard honey-pot=honey
teapot bubble-tea|boba ambulance motorcycle motor-scooter=scooter kick-scooter speedboat ferry canoe
racing-car bullet-train parachute factory hospital school church|chapel ferris-wheel hut|yurt bed chair door
bathtub bucket|pail broom basket candle telescope microscope magnet battery laptop television|tv radio
telephone mobile-phone=phone floppy-disk hourglass-done=hourglass scissors pencil crayon paperclip pushpin
lipstick ring gem-stone=diamond|jewel glasses|eyeglasses sunglasses t-shirt=shirt jeans|trousers dress socks
running-shoe=shoe|sneaker high-heeled-shoe cowboy-hat-face=cowboy axe wrench|spanner screwdriver shield drum
saxophone accordion|concertina banjo headphone=headphones microphone baseball volleyball tennis bowling trophy
kite yo-yo puzzle-piece=puzzle game-die=dice crystal-ball magic-wand compass droplet snowflake tornado
rock|boulder wood|log feather seedling|sprout four-leaf-clover=clover hibiscus lotus hyacinth blossom bouquet
leafy-green=lettuce coral shrimp oyster spiral-shell=shell|conch
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A thing that nano can draw: its icon's name in the art and its names in captions, the usual one first."""

    icon: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]


def _parse(entry: str) -> Subject:
    icon, *synonyms = entry.split("|")
    icon, _, name = icon.partition("=")
    return Subject(icon, tuple(n.replace("_", " ").replace("-", " ") for n in (name or icon, *synonyms)))


SUBJECTS = [_parse(entry) for entry in _SUBJECTS.split()]
STYLES = {"3d": ("3d", "3d style", "fluent 3d"), "flat": ("flat", "flat style"), "noto": ("noto", "noto style")}
COLOURS = {
    "red": (214, 48, 49), "orange": (243, 146, 55), "yellow": (250, 216, 80), "green": (60, 165, 85),
    "blue": (58, 110, 220), "purple": (136, 80, 190), "pink": (250, 165, 195), "brown": (130, 85, 55),
    "black": (20, 20, 22), "white": (248, 248, 248), "gray": (135, 140, 145), "teal": (40, 160, 165),
}  # fmt: skip
WORDS = """
hello world hi yes no wow love open stop go sd3 nano peace thanks happy new sale yum meow woof help good free
art sun moon star fish cake tea milk home park book bus taxi exit shop cafe fun play game win luck best nice
cool hot cold ice fire sky sea snow rain wind tree rose apple lemon jazz rock song dance sing smile dream hope
joy kind calm brave wild king queen hero magic light night day now here this is fine way up down left right
east west north south one two three four ten red blue green pink gold zoo quiz taxi vote jump quick fox lazy
dog box van kiwi exam bye boo
""".split()
COUNTS = {2: "two", 3: "three", 4: "four"}
LONGEST = 7  # letters on one line of a sign: one letter a token column, and eight columns


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture in words. `kind` is single, sign, pair, split or count.

    `subjects` holds one subject, or two for a pair and a split (left, then right). `text` is the sign's, one or two
    words. A split has a background on each side: `colour` on the left, `other` on the right.
    """

    kind: str
    subjects: tuple[Subject, ...]
    style: str
    colour: str
    text: str = ""
    count: int = 1
    other: str = ""


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination: about a tenth of each kind, by a hash of what is combined.

    single and count: subject, style and background (and the number); sign: each word with the subject;
    pair and split: the two subjects, in either order.
    """
    names = [s.icon for s in scene.subjects]
    if scene.kind == "sign":
        if scene.text == "hello world" and names[0] == "cat-face":
            return True  # the announcement's own picture is never trained
        keys = [f"sign|{names[0]}|{word}" for word in scene.text.split()]
    elif scene.kind in ("pair", "split"):
        keys = ["pair|" + "|".join(sorted(names))]
    else:
        keys = [f"{scene.kind}|{names[0]}|{scene.style}|{scene.colour}|{scene.count}"]
    return any(hashlib.sha256(key.encode()).digest()[0] < 26 for key in keys)


def held_out(subjects: list[Subject]) -> list[str]:
    """Every held-out combination of these subjects, a line each: what `HELD_OUT` lists."""
    lines = []
    for subject in subjects:
        for style in STYLES:
            for colour in COLOURS:
                if is_held_out(Scene("single", (subject,), style, colour)):
                    lines.append(f"single: {subject.name}, {style}, {colour}")
                for count, number in COUNTS.items():
                    if is_held_out(Scene("count", (subject,), style, colour, count=count)):
                        lines.append(f"count: {number} {subject.name}, {style}, {colour}")
        words = [w for w in dict.fromkeys(WORDS) if is_held_out(Scene("sign", (subject,), "3d", "red", w))]
        lines.append(f"sign: {subject.name} with {', '.join(words)}")
    for i, first in enumerate(subjects):
        with_first = [s.name for s in subjects[i + 1 :] if is_held_out(Scene("pair", (first, s), "3d", "red"))]
        lines.append(f"pair: {first.name} with {', '.join(with_first) or 'none of those after it'}")
    return ["sign: cat with hello world, together", *sorted(lines)]


def random_text(rng: random.Random, spell: float = 0.5) -> str:
    """One or two short words; with probability `spell` each is made of random letters, which only spelling can draw."""

    def word() -> str:
        if rng.random() < spell:
            # mostly short: two or three letters are soon told apart, and longer words follow from them
            length = min(rng.randint(1, LONGEST), rng.randint(1, LONGEST))
            return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))
        return rng.choice(WORDS)

    return " ".join(word() for _ in range(rng.choice((1, 1, 2))))


def random_scene(
    rng: random.Random, subjects: list[Subject], kind: str, *, held_out: bool = False, spell: float = 0.5
) -> Scene:
    """A scene of that kind, drawn uniformly from those that are (or are not) held out."""
    while True:
        style, colour = rng.choice(list(STYLES)), rng.choice(list(COLOURS))
        chosen = tuple(rng.sample(subjects, 2 if kind in ("pair", "split") else 1))
        text = random_text(rng, spell) if kind == "sign" else ""
        count = rng.choice(list(COUNTS)) if kind == "count" else 1
        other = rng.choice([c for c in COLOURS if c != colour]) if kind == "split" else ""
        scene = Scene(kind, chosen, style, colour, text, count, other)
        if is_held_out(scene) == held_out:
            return scene


_ONE = ("ss", "us", "os", "tennis")  # endings of nouns that are not plural


def _a(noun: str) -> str:
    """The noun with its article; grapes and glasses have none."""
    if noun.endswith("s") and not noun.endswith(_ONE):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    irregular = {"fish": "fish", "tropical fish": "tropical fish", "mouse": "mice", "sheep": "sheep", "goose": "geese"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "sh", "ch", "x")):
        return (
            noun
            if noun.endswith("s") and not noun.endswith("ss") and noun not in ("bus", "cactus", "octopus")
            else noun + "es"
        )
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def caption(
    scene: Scene, rng: random.Random | None = None, *, with_style: bool = True, with_colour: bool = True
) -> str:
    """The scene in words. With `rng` templates and synonyms vary; without it the plainest wording is given."""
    pick = rng.choice if rng else lambda options: options[0]
    first, *rest = (pick(s.names) if rng and rng.random() < 0.3 else s.name for s in scene.subjects)
    if scene.kind == "sign":
        hold = pick(("holding a sign that says", "holding a sign that says", "with a sign that says"))
        text = pick((scene.text, scene.text, f'"{scene.text}"'))
        noun, thing = f"{first} {hold} {text}", None
    elif scene.kind == "pair":
        thing = pick((
            f"{_a(first)} next to {_a(rest[0])}", f"{_a(first)} and {_a(rest[0])}",
            f"{_a(first)} on the left and {_a(rest[0])} on the right", f"{_a(first)} to the left of {_a(rest[0])}",
        ))  # fmt: skip
        noun = thing
    elif scene.kind == "split":
        left, right = (f"{_a(what)} on {_a(colour)} background"
                       for what, colour in ((first, scene.colour), (rest[0], scene.other)))  # fmt: skip
        noun = thing = pick((
            f"{left} next to {right}", f"{left} and {right}", f"{left} on the left and {right} on the right",
            f"{_a(first)} on {scene.colour} next to {_a(rest[0])} on {scene.other}",
        ))  # fmt: skip
    elif scene.kind == "count":
        noun = thing = f"{COUNTS[scene.count]} {_plural(first)}"
    else:
        noun, thing = first, None
    thing = thing or _a(noun)
    text = thing
    if with_colour and scene.kind != "split":  # a split has said its colours
        c = scene.colour
        text = pick((f"{thing} on {_a(c)} background", f"{thing} on {_a(c)} background", f"{thing} on {c}",
                     f"{noun}, {c} background", f"{_a(c)} background with {thing}",
                     f"a picture of {thing} on {_a(c)} background"))  # fmt: skip
    if with_style:
        s = pick(STYLES[scene.style])
        text = pick((f"{text}, {s}", f"{text}, {s}", f"{s}, {text}"))
        if scene.kind == "single" and " " not in s and rng and rng.random() < 0.4:
            text = f"{_a(s)} {noun}" + (f" on {_a(scene.colour)} background" if with_colour else "")
    return text
