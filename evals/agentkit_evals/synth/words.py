"""Words and syllables for generated names and values."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprtv" for vowel in "aeiou")

CITIES = _words("""
    Paris London Berlin Rome Madrid Vienna Prague Warsaw Dublin Lisbon Oslo Helsinki Athens Cairo Lagos Nairobi Tokyo
    Osaka Seoul Beijing Shanghai Delhi Mumbai Sydney Perth Toronto Boston Chicago Denver Austin Seattle Dallas Lima
    Bogota Quito Santiago Geneva Zurich Munich Hamburg Milan Naples Porto Kyoto Bergen Krakow Riga Tallinn
""")

FIRST_NAMES = _words("""
    Anna Ben Carla David Emma Felix Greta Hugo Ida Jonas Kira Leo Mara Nina Oscar Paula Quinn Rosa Sam Tara Uma Victor
    Wanda Yara Zoe Alice Bob Carol Dave Eve Frank Grace Henry Irene Jack Kate Liam Mia Noah Olga Peter Ruth Simon Tom
""")

THINGS = _words("""
    apple bread chair desk engine flute glove hammer island jacket kettle ladder mirror needle orange pencil quilt
    rocket saddle table umbrella violin window yarn zipper anchor basket candle dragon eagle forest garden helmet
    insect jungle kitten lemon magnet napkin oven parrot queen river spoon tiger unicorn valley whale box lamp coin
""")

NOUNS = _words("""
    weather price color owner size status stock score weight height age level rank total balance address phone title
    author capital population temperature humidity speed distance time date rate tax cost label code version language
    currency region country team role salary grade mood name type kind shape length depth width power voltage pressure
    forecast schedule menu route floor room shelf gate seat queue limit quota summary meaning translation
""")

SUBJECTS = _words("""
    city item person user product book country team room order animal plant car ship planet word key number place town
    station river student account file machine robot sensor device game song film letter topic thing
""")

SETTINGS = _words("""
    port host color size level mode user limit speed depth width height theme title region zone owner unit cache retry
    timeout delay volume brand batch format shape layer stage queue
""")

MAMMALS = _words("dog cat horse cow pig fox wolf bear lion mouse")
FRUITS = _words("apple pear plum grape lemon cherry banana peach mango fig")
COLORS = _words("red blue green yellow black white brown pink purple gray")
HAND_TOOLS = _words("hammer saw drill wrench pliers chisel shovel rake axe file")
