"""The synthetic language's words.

Every word is one GPT-2 token after a space, so the same lists serve both vocabularies. Six classes are capitalised,
each with 32 words, and six or more are not. A claim about names has to beat a null: random word sets from other
classes, alike in spelling and in frequency.
"""


def _words(text: str) -> list[str]:
    return text.split()


CAPITALISED = {
    "names": _words(
        "Mary John Tom James Robert Michael William David Richard Charles Daniel Matthew Paul Andrew Peter Henry "
        "Sarah Karen Lisa Nancy Linda Susan Anna Emily Laura Rachel Kate Helen Julia Emma Alice Rose"
    ),
    "cities": _words(
        "Paris London Boston Chicago Berlin Tokyo Moscow Rome Madrid Dublin Seattle Denver Dallas Houston Miami "
        "Detroit Portland Atlanta Toronto Vienna Sydney Delhi Cairo Athens Beijing Oxford Montreal Memphis "
        "Munich Milan Prague Warsaw"
    ),
    "countries": _words(
        "France Germany Spain Italy Poland Russia China Japan India Brazil Mexico Canada Egypt Kenya Nigeria Ghana "
        "Sweden Norway Denmark Finland Greece Turkey Israel Iran Iraq Syria Cuba Peru Chile Ireland Scotland Portugal"
    ),
    "surnames": _words(
        "Smith Johnson Brown Miller Wilson Moore Taylor Anderson Harris Clark Lewis Walker Hall King Wright Hill "
        "Green Baker Nelson Carter Mitchell Roberts Turner Campbell Parker Evans Collins Murphy Cooper Reed Ward Ross"
    ),
    "companies": _words(
        "Google Apple Microsoft Amazon Facebook Twitter Intel Toyota Honda Ford Boeing Sony Samsung Nintendo Disney "
        "Netflix Pepsi Nike Tesla Oracle Dell Cisco Nokia Adobe Yahoo Uber Shell Exxon Walmart Reuters Audi Visa"
    ),
    "states": _words(
        "Texas Ohio Florida Alaska Hawaii Nevada Utah Arizona Oregon Idaho Montana Kansas Iowa Missouri Illinois "
        "Indiana Michigan Wisconsin Kentucky Tennessee Alabama Louisiana Arkansas Oklahoma Maryland Delaware Vermont "
        "Maine Colorado Nebraska Wyoming Virginia"
    ),
}

LOWER_CASE = {
    "places": _words(
        "store park school office station market garden library hospital restaurant museum theater hotel church beach "
        "farm bank airport zoo cafe gym kitchen house bar shop river lake forest village factory stadium castle"
    ),
    "objects": _words(
        "drink book ring kiss bone ball computer necklace basket letter gift card key map phone coat hat box bag cup "
        "ticket camera lamp rope blanket knife pen flower cake guitar toy bottle"
    ),
    "nouns_singular": _words(
        "cat dog boy girl doctor teacher student lawyer farmer pilot soldier driver player author singer guard judge "
        "friend bird horse manager nurse artist poet actor writer officer scientist engineer worker sailor hunter"
    ),
    "nouns_plural": _words(
        "cats dogs boys girls doctors teachers students lawyers farmers pilots soldiers drivers players authors "
        "singers guards judges friends birds horses managers nurses artists poets actors writers officers scientists "
        "engineers workers sailors hunters"
    ),
    "adjectives": _words(
        "sad tall short fresh young new big small red blue green black white cold warm fast slow quiet loud rich poor "
        "brave clean dark calm strong weak soft sweet happy famous nice"
    ),
}

AGREEMENT = {
    "verbs_singular": _words(
        "is was has runs goes looks lives works plays walks sings sleeps waits speaks stands sits"
    ),
    "verbs_plural": _words("are were have run go look live work play walk sing sleep wait speak stand sit"),
}

CLOSED = {
    "times": _words("morning afternoon evening night"),
    "transfers": _words("gave sent handed offered passed showed brought"),
    "prepositions": _words("near behind beside with above below"),
    "pasts": _words("saw liked visited helped chased admired"),
    "adverbs": _words("slowly quickly often never always again here there now today well alone"),
}

WORDS: dict[str, list[str]] = {**CAPITALISED, **LOWER_CASE, **AGREEMENT, **CLOSED}

# Words in repeated random sequences. Names and subjects are frequent in their own sentences, so the other classes come
# more often here: over the whole language the capitalised classes are about equally frequent.
SEQUENCE_WEIGHTS = {
    "names": 2, "cities": 20, "countries": 20, "surnames": 20, "companies": 20, "states": 20,
    "places": 2, "objects": 3, "nouns_singular": 3, "nouns_plural": 3, "adjectives": 3,
}  # fmt: skip
