"""English names for emoji, put together from the Unicode names of their parts.

The Unicode character database that comes with Python names single characters only. An emoji is
often a sequence: a base with a skin tone, people joined by U+200D, two letters that make a flag.
Its name is put together from its parts, in the manner of Unicode's emoji charts.
"""

import unicodedata
from collections.abc import Sequence

JOINER = 0x200D
EMOJI_STYLE = 0xFE0F
KEYCAP = 0x20E3
FACING_RIGHT = 0x27A1
FIRST_REGIONAL_LETTER = 0x1F1E6
BLACK_FLAG = 0x1F3F4
FIRST_TAG = 0xE0000
LAST_TAG = 0xE007F

SKIN_TONES = {
    0x1F3FB: "light skin tone",
    0x1F3FC: "medium-light skin tone",
    0x1F3FD: "medium skin tone",
    0x1F3FE: "medium-dark skin tone",
    0x1F3FF: "dark skin tone",
}

GENDERS = {0x2640: "woman", 0x2642: "man"}

PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}

# What a person joined with a thing does or is: a woman and a rocket are a woman astronaut.
PROFESSIONS = {
    0x1F33E: "farmer",
    0x1F373: "cook",
    0x1F393: "student",
    0x1F3A4: "singer",
    0x1F3A8: "artist",
    0x1F3EB: "teacher",
    0x1F3ED: "factory worker",
    0x1F4BB: "technologist",
    0x1F4BC: "office worker",
    0x1F527: "mechanic",
    0x1F52C: "scientist",
    0x1F680: "astronaut",
    0x1F692: "firefighter",
    0x1FA70: "ballet dancer",
    0x2695: "health worker",
    0x2696: "judge",
    0x2708: "pilot",
}
APPEARANCES = {
    0x1F37C: "feeding a baby",
    0x1F384: "in a Christmas costume",
    0x1F9AF: "with a white cane",
    0x1F9B0: "with red hair",
    0x1F9B1: "with curly hair",
    0x1F9B2: "without hair",
    0x1F9B3: "with white hair",
    0x1F9BC: "in a motorised wheelchair",
    0x1F9BD: "in a manual wheelchair",
}

# Old names that say a gender, or no person, where the emoji now shows any person.
PERSON_NAMES = {
    0x1F46F: "person with bunny ears",
    0x1F470: "person with veil",
    0x1F473: "person with turban",
    0x1F482: "guard",
    0x1F486: "person getting a face massage",
    0x1F487: "person getting a haircut",
    0x1F645: "person with no good gesture",
    0x1F646: "person with ok gesture",
    0x1F6A3: "person rowing a boat",
    0x1F926: "person doing a face palm",
    0x1F935: "person in tuxedo",
    0x1F937: "person shrugging",
    0x1F93D: "person playing water polo",
    0x1F93E: "person playing handball",
}

# Python 3.11 knows Unicode 14. The same names must come out on a later Python, so that the
# names below are also those of the standard.
NEWER_THAN_UNICODE_14 = {
    0x1F6D8: "landslide",
    0x1F6DC: "wireless",
    0x1FA75: "light blue heart",
    0x1FA76: "grey heart",
    0x1FA77: "pink heart",
    0x1FA87: "maracas",
    0x1FA88: "flute",
    0x1FA89: "harp",
    0x1FA8A: "trombone",
    0x1FA8E: "treasure chest",
    0x1FA8F: "shovel",
    0x1FAAD: "folding hand fan",
    0x1FAAE: "hair pick",
    0x1FAAF: "khanda",
    0x1FABB: "hyacinth",
    0x1FABC: "jellyfish",
    0x1FABD: "wing",
    0x1FABE: "leafless tree",
    0x1FABF: "goose",
    0x1FAC6: "fingerprint",
    0x1FAC8: "hairy creature",
    0x1FACD: "orca",
    0x1FACE: "moose",
    0x1FACF: "donkey",
    0x1FADA: "ginger root",
    0x1FADB: "pea pod",
    0x1FADC: "root vegetable",
    0x1FADF: "splatter",
    0x1FAE8: "shaking face",
    0x1FAE9: "face with bags under eyes",
    0x1FAEA: "distorted face",
    0x1FAEF: "fight cloud",
    0x1FAF7: "leftwards pushing hand",
    0x1FAF8: "rightwards pushing hand",
}

# ISO 3166-1 codes, and the further ones for which Unicode has flags.
REGIONS = """
AC Ascension Island; AD Andorra; AE United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda;
AI Anguilla; AL Albania; AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AS American Samoa;
AT Austria; AU Australia; AW Aruba; AX Åland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina;
BB Barbados; BD Bangladesh; BE Belgium; BF Burkina Faso; BG Bulgaria; BH Bahrain; BI Burundi;
BJ Benin; BL Saint Barthélemy; BM Bermuda; BN Brunei; BO Bolivia; BQ Caribbean Netherlands;
BR Brazil; BS Bahamas; BT Bhutan; BV Bouvet Island; BW Botswana; BY Belarus; BZ Belize; CA Canada;
CC Cocos Islands; CD Democratic Republic of the Congo; CF Central African Republic;
CG Republic of the Congo; CH Switzerland; CI Côte d'Ivoire; CK Cook Islands; CL Chile; CM Cameroon;
CN China; CO Colombia; CP Clipperton Island; CQ Sark; CR Costa Rica; CU Cuba; CV Cape Verde;
CW Curaçao; CX Christmas Island; CY Cyprus; CZ Czechia; DE Germany; DG Diego Garcia; DJ Djibouti;
DK Denmark; DM Dominica; DO Dominican Republic; DZ Algeria; EA Ceuta and Melilla; EC Ecuador;
EE Estonia; EG Egypt; EH Western Sahara; ER Eritrea; ES Spain; ET Ethiopia; EU European Union;
FI Finland; FJ Fiji; FK Falkland Islands; FM Micronesia; FO Faroe Islands; FR France; GA Gabon;
GB United Kingdom; GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar;
GL Greenland; GM Gambia; GN Guinea; GP Guadeloupe; GQ Equatorial Guinea; GR Greece;
GS South Georgia and the South Sandwich Islands; GT Guatemala; GU Guam; GW Guinea-Bissau;
GY Guyana; HK Hong Kong; HM Heard and McDonald Islands; HN Honduras; HR Croatia; HT Haiti;
HU Hungary; IC Canary Islands; ID Indonesia; IE Ireland; IL Israel; IM Isle of Man; IN India;
IO British Indian Ocean Territory; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey; JM Jamaica;
JO Jordan; JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KI Kiribati; KM Comoros;
KN Saint Kitts and Nevis; KP North Korea; KR South Korea; KW Kuwait; KY Cayman Islands;
KZ Kazakhstan; LA Laos; LB Lebanon; LC Saint Lucia; LI Liechtenstein; LK Sri Lanka; LR Liberia;
LS Lesotho; LT Lithuania; LU Luxembourg; LV Latvia; LY Libya; MA Morocco; MC Monaco; MD Moldova;
ME Montenegro; MF Saint Martin; MG Madagascar; MH Marshall Islands; MK North Macedonia; ML Mali;
MM Myanmar; MN Mongolia; MO Macao; MP Northern Mariana Islands; MQ Martinique; MR Mauritania;
MS Montserrat; MT Malta; MU Mauritius; MV Maldives; MW Malawi; MX Mexico; MY Malaysia;
MZ Mozambique; NA Namibia; NC New Caledonia; NE Niger; NF Norfolk Island; NG Nigeria;
NI Nicaragua; NL Netherlands; NO Norway; NP Nepal; NR Nauru; NU Niue; NZ New Zealand; OM Oman;
PA Panama; PE Peru; PF French Polynesia; PG Papua New Guinea; PH Philippines; PK Pakistan;
PL Poland; PM Saint Pierre and Miquelon; PN Pitcairn Islands; PR Puerto Rico; PS Palestine;
PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Réunion; RO Romania; RS Serbia; RU Russia;
RW Rwanda; SA Saudi Arabia; SB Solomon Islands; SC Seychelles; SD Sudan; SE Sweden; SG Singapore;
SH Saint Helena; SI Slovenia; SJ Svalbard and Jan Mayen; SK Slovakia; SL Sierra Leone;
SM San Marino; SN Senegal; SO Somalia; SR Suriname; SS South Sudan; ST São Tomé and Príncipe;
SV El Salvador; SX Sint Maarten; SY Syria; SZ Eswatini; TA Tristan da Cunha;
TC Turks and Caicos Islands; TD Chad; TF French Southern Territories; TG Togo; TH Thailand;
TJ Tajikistan; TK Tokelau; TL Timor-Leste; TM Turkmenistan; TN Tunisia; TO Tonga; TR Türkiye;
TT Trinidad and Tobago; TV Tuvalu; TW Taiwan; TZ Tanzania; UA Ukraine; UG Uganda;
UM United States Outlying Islands; UN United Nations; US United States; UY Uruguay;
UZ Uzbekistan; VA Vatican City; VC Saint Vincent and the Grenadines; VE Venezuela;
VG British Virgin Islands; VI United States Virgin Islands; VN Vietnam; VU Vanuatu;
WF Wallis and Futuna; WS Samoa; XK Kosovo; YE Yemen; YT Mayotte; ZA South Africa; ZM Zambia;
ZW Zimbabwe
"""

# The ISO 3166-2 codes that OpenMoji draws, written as in the tags of a flag.
SUBDIVISIONS = """
caon Ontario; caqc Quebec; debe Berlin; deby Bavaria; esan Andalusia; esar Aragon; esas Asturias;
escb Cantabria; esce Ceuta; escl Castile and León; escm Castilla-La Mancha; escn Canary Islands;
esct Catalonia; esex Extremadura; esga Galicia; esib Balearic Islands; esmc Murcia; esmd Madrid;
esml Melilla; esnc Navarre; espv Basque Country; esri La Rioja; esvc Valencia; frbre Brittany;
gbeng England; gbsct Scotland; gbwls Wales; itba Bari; mxque Querétaro; mxyuc Yucatán;
usal Alabama; usca California; usco Colorado; usdc Washington, D.C.; ustx Texas
"""


def _table(text: str) -> dict[str, str]:
    entries = (entry.split(maxsplit=1) for entry in text.split(";"))
    return {code: " ".join(name.split()) for code, name in entries}


PLACES = _table(REGIONS) | _table(SUBDIVISIONS)
OWN_NAMES = PEOPLE | PERSON_NAMES | NEWER_THAN_UNICODE_14


def name(codepoints: Sequence[int]) -> str | None:
    """Return the English name of one emoji, or None if it has none.

    Characters of the private use areas have no names: OpenMoji's own additions, most of them
    brands. A sequence with such a part has none either.
    """
    place = _place(codepoints)
    if place is not None:
        return f"flag: {PLACES[place]}"
    tones = list(dict.fromkeys(SKIN_TONES[c] for c in codepoints if c in SKIN_TONES))
    base = [c for c in codepoints if c not in SKIN_TONES and c not in (JOINER, EMOJI_STYLE)]
    if not base:  # a skin tone alone is a colour swatch
        return tones[0]
    if not all(_character_name(c) for c in base):
        return None
    return ", ".join([_base_name(base), *([" and ".join(tones)] if tones else [])])


def _place(codepoints: Sequence[int]) -> str | None:
    """Return the region or subdivision whose flag this is: two letters, or a flag with tags."""
    letters = [c - FIRST_REGIONAL_LETTER for c in codepoints]
    if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
        return "".join(chr(ord("A") + letter) for letter in letters)
    if codepoints[0] == BLACK_FLAG and codepoints[-1] == LAST_TAG:
        return "".join(chr(c - FIRST_TAG) for c in codepoints[1:-1])
    return None


def _base_name(base: list[int]) -> str:
    match base:
        case [*rest, last] if last == FACING_RIGHT and rest:
            return f"{_base_name(rest)}, facing right"
        case [symbol, last] if last == KEYCAP:
            return f"keycap {_character_name(symbol)}"
        case [person, sign] if sign in GENDERS:
            return _with_gender(_character_name(person), GENDERS[sign])
        case [person, thing] if person in PEOPLE and thing in APPEARANCES:
            return f"{PEOPLE[person]} {APPEARANCES[thing]}"
        case [person, thing] if person in PEOPLE and thing in PROFESSIONS:
            profession = PROFESSIONS[thing]
            return profession if PEOPLE[person] == "person" else f"{PEOPLE[person]} {profession}"
        case _:
            return ", ".join(_character_name(c) for c in base)


def _with_gender(person: str, gender: str) -> str:
    if "person" in person.split():
        return " ".join(gender if word == "person" else word for word in person.split())
    return f"{gender} {person}"


def _character_name(codepoint: int) -> str:
    """Return the lower-case name of one character, "" if it has none."""
    return OWN_NAMES.get(codepoint) or unicodedata.name(chr(codepoint), "").lower()
