"""The words that the tasks draw from, and where they come from."""


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split(
    """Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James
    Robert John Joseph Andrew Ryan Brandon Jason Justin Sarah William Jonathan Stephanie
    Brian Nicole Nicholas Anthony Heather Eric Elizabeth Adam Megan Melissa Kevin Steven
    Thomas Timothy Christina Kyle Rachel Laura Lauren Amber Brittany Danielle Richard
    Kimberly Jeffrey Amy Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles
    Rebecca Jacob Stephen Patrick Sean Erin Jamie Kelly Samantha Nathan Sara Dustin Paul
    Angela Tyler Scott Katherine Andrea Gregory Erica Mary Travis Lisa Kenneth Bryan Lindsey
    Kristen Jose Alexander Jesse Katie Lindsay Shannon Vanessa Courtney Christine Alicia
    Cody Allison Bradley Samuel"""
)
"""First names of indirect object identification, as in redwoodresearch/Easy-Transformer (MIT)."""

PLACES = _split("""store garden restaurant school hospital office house station""")
"""Where they went; of the same origin."""

GIFTS = _split("""ring kiss bone basketball computer necklace drink snack""")
"""What they got; of the same origin."""

NOUNS = _split(
    """attack campaign case contact contract deal development effect employment existence fall
    growth impact marriage operation order plan practice process program progress project
    quest riot rise rule shift study test testing tests trial trip work"""
)
"""What lasts for years, as in hannamw/EAP-IG (MIT)."""

COLORS = _split("""red orange yellow green blue purple brown black""")
"""As in jmerullo/circuit_reuse (MIT)."""

COLORED = _split(
    """pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle
    ball envelope lighter bowl"""
)
"""Things that have a color; of the same origin."""

VARIABLES = _split(
    """data name file value test result line user key default request path output node item url
    model response text version function log string field start number index error current
    context image message check create size event state row end form query label run action
    target array code num table source first required options update module status group
    content client filename results last read command base format color order count match
    tag title parent call session host date mode project info page header option task shape
    load port old root"""
)
"""Names of Python arguments; our own list."""

WORDS = _split(
    """river garden music window summer doctor kitchen market morning letter horse paper stone
    bread station winter village engine silver forest bridge picture island teacher mountain"""
)
"""Words of descriptions; our own list."""
