"""Write three made-up skills that ship with the package beside the facts: routing, tools and codes.

    python studies/make_skills.py selfdistill/data/bundled

``routing``: which of four teams takes a customer's message; the reply is a line "Team: X". ``tools``: a request becomes
a tool call with its arguments. ``codes``: a weather report becomes a code of signs, such as ``QX14/%%:9^//``, far from
what a model would say. Validation and test rows have phrasings and values that no training row has; only the kinds of
weather and of wind are the same in all parts.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

ROUTING = {
    "Billing": (
        [
            "I was charged twice for my {thing}.",
            "The invoice for the {thing} shows the wrong amount.",
            "Please send me a receipt for the {thing} I paid for.",
            "My card was debited for a {thing} that I never ordered.",
            "Can I pay for the {thing} in three installments?",
            "Why is there a fee of {number} dollars on my bill?",
            "The discount on the {thing} is missing from my invoice.",
            "I want my money back for the {thing}.",
        ],
        [
            "You took the payment for the {thing} two times.",
            "There is a charge of {number} dollars that I do not understand.",
            "When will the refund for my {thing} be on my card?",
        ],
        [
            "I paid for the {thing}, but the bill says that I did not.",
            "The price of the {thing} on my invoice is too high.",
            "Can you send the bill for the {thing} again?",
        ],
    ),
    "Delivery": (
        [
            "My {thing} has not arrived yet.",
            "The courier left the {thing} at the wrong door.",
            "Can you ship the {thing} to my office instead?",
            "The tracking number for the {thing} does not work.",
            "How many days until the {thing} gets here?",
            "The parcel with the {thing} was sent to my old address.",
            "I was not at home when the driver brought the {thing}.",
            "Please deliver the {thing} after {number} o'clock.",
        ],
        [
            "The {thing} should have been delivered last week.",
            "Where is the parcel with my {thing} right now?",
            "The driver could not find my house and took the {thing} back.",
        ],
        [
            "I am still waiting for the {thing} to come.",
            "On which day will you bring the {thing}?",
            "My neighbor got the package with the {thing} instead of me.",
        ],
    ),
    "Repairs": (
        [
            "The {thing} stopped working after {number} days.",
            "A button on my {thing} is broken.",
            "My {thing} makes a strange noise when it is switched on.",
            "The screen of the {thing} is cracked.",
            "The {thing} gets far too hot.",
            "Smoke came out of the {thing} this morning.",
            "The battery of my {thing} does not hold a charge.",
            "Water is leaking from the {thing}.",
        ],
        [
            "My {thing} does not switch on any more.",
            "The handle of the {thing} has come off.",
            "The {thing} is damaged and needs to be fixed.",
        ],
        [
            "The plug of the {thing} is bent.",
            "My {thing} turns itself off after {number} minutes.",
            "There are sparks when I turn on the {thing}.",
        ],
    ),
    "Accounts": (
        [
            "I forgot the password for my login.",
            "Please change the email address of my profile.",
            "I cannot sign in since {number} o'clock.",
            "Delete my account and all my data.",
            "How do I change my user name?",
            "The code for signing in never reaches my phone.",
            "Somebody else is using my login.",
            "I want to add a second user to my profile.",
        ],
        [
            "My password is not accepted any more.",
            "How can I close my account?",
            "I need to update the phone number in my profile.",
        ],
        [
            "The site says that my user name does not exist.",
            "I would like a new password.",
            "Please remove my photo from my profile.",
            "I signed up two times and have two accounts now.",
            "How do I log out on all my devices?",
            "My account was locked after {number} attempts.",
            "The link for a new password has expired.",
            "Can my son use my account, too?",
            "Please put my new surname in my profile.",
            "Why do I have to sign in again every day?",
        ],
    ),
}
THINGS = (
    ["toaster", "lamp", "camera", "kettle", "heater", "radio", "drill", "blender"],
    ["fan", "printer", "speaker", "mixer"],
    ["oven", "clock", "freezer", "scale"],
)
NUMBERS = ([3, 5, 8, 12, 15, 20], [4, 6, 9, 18], [7, 10, 14, 16])

TOOLS: dict[str, tuple[list[str], ...]] = {
    "set_timer": (
        [
            "Set a timer for {minutes} minutes.",
            "Count down {minutes} minutes.",
            "I need a timer, {minutes} minutes please.",
            "Tell me when {minutes} minutes have passed.",
            "Start a timer of {minutes} minutes for the oven.",
        ],
        ["Please start a countdown of {minutes} minutes.", "Wake me in {minutes} minutes."],
        ["Let me know after {minutes} minutes.", "Make it a timer of {minutes} minutes."],
    ),
    "send_message": (
        [
            "Tell {to} that {text}.",
            "Write to {to}: {text}.",
            "Send {to} a message saying {text}.",
            "Let {to} know that {text}.",
            "Message {to} that {text}.",
        ],
        ["Send a note to {to} that {text}.", "Text {to}: {text}."],
        ["Inform {to} that {text}.", "Please write {to} a message: {text}."],
    ),
    "get_weather": (
        [
            "What is the weather in {city} on {day}?",
            "Will it rain in {city} on {day}?",
            "How warm will {city} be on {day}?",
            "Give me the forecast for {city} on {day}.",
            "Do I need a coat in {city} on {day}?",
        ],
        ["Is it sunny in {city} on {day}?", "Tell me the weather for {day} in {city}."],
        ["Will {city} be cold on {day}?", "Show me how the weather will be in {city} on {day}."],
    ),
    "play_music": (
        [
            "Play {song} by {artist}.",
            "I want to hear {song} by {artist}.",
            "Put on {song} from {artist}.",
            "Start the song {song} by {artist}.",
            "Let us listen to {song} by {artist}.",
        ],
        ["Please play the song {song} from {artist}.", "Can you put {song} by {artist} on?"],
        ["Turn on {song} by {artist}.", "I feel like listening to {song} from {artist}."],
    ),
}
VALUES: dict[str, tuple[list[Any], ...]] = {
    "minutes": ([5, 8, 10, 15, 20, 25, 40], [7, 12, 30, 45], [6, 9, 35, 50]),
    "to": (["Anna", "Omar", "Lena", "Paul", "Mia"], ["Ida", "Noah", "Rosa"], ["Emil", "Vera", "Hugo"]),
    "text": (
        ["dinner is ready", "the train is late", "I am on my way", "the door is open", "the meeting is over"],
        ["the shop is closed", "I will call later", "the bus has left"],
        ["the keys are here", "I am at home", "lunch is at noon"],
    ),
    "city": (["Oslo", "Lima", "Cairo", "Porto", "Quito"], ["Turin", "Perth", "Dakar"], ["Leeds", "Seoul", "Tunis"]),
    "day": (["Monday", "Tuesday", "Friday", "Saturday"], ["Wednesday", "Sunday"], ["Thursday", "Sunday"]),
    "song": (
        ["Green Door", "Paper Moon", "Long Road", "Silver Rain"],
        ["Stone Garden", "Night Bus"],
        ["Red Kite", "Winter Sea"],
    ),
    "artist": (["the Larks", "Kim Dale", "Nova", "Old Harbor"], ["Fern Hill", "Rita Cole"], ["Max Lowe", "the Pilots"]),
}

SKIES = {"sun": "**", "clouds": "==", "rain": "%%", "snow": "++", "fog": "##", "storm": "!!"}
WINDS = {"north": "^", "south": "_", "east": ">", "west": "<"}
REPORTS = (
    [
        "station {station}, {sky}, {degrees} degrees, wind from the {wind}.",
        "{degrees} degrees and {sky} at station {station}, wind from the {wind}.",
        "wind from the {wind} at station {station}, {degrees} degrees, {sky}.",
        "station {station} has {sky} at {degrees} degrees, and the wind comes from the {wind}.",
    ],
    [
        "at station {station} we have {degrees} degrees, {sky} and wind from the {wind}.",
        "{sky}, {degrees} degrees, {wind} wind, says station {station}.",
    ],
    [
        "{sky} over station {station}, {degrees} degrees, {wind} wind.",
        "the wind blows from the {wind}, station {station} measures {degrees} degrees and sees {sky}.",
    ],
)
STATIONS = ([12, 15, 23, 28, 31, 38, 42, 47, 54, 60], [19, 34, 51, 66], [14, 27, 45, 62])
DEGREES = ([2, 4, 5, 8, 10, 13, 16, 18, 21, 24, 27, 30], [3, 9, 14, 22, 26], [6, 11, 17, 20, 25])


def routing(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    rows = []
    for team, phrasings in ROUTING.items():
        texts = []
        while len(texts) < count:
            text = chance.choice(phrasings[part]).format(
                thing=chance.choice(THINGS[part]), number=chance.choice(NUMBERS[part])
            )
            if text not in texts or (team == "Accounts" and len(texts) >= len(phrasings[part])):
                texts.append(text)
        rows += [(f"A customer writes: {text} Which team takes this?", f"Team: {team}") for text in texts]
    rows = list(dict.fromkeys(rows))
    chance.shuffle(rows)
    return [{"prompt": prompt, "completion": reply, "scorer": "exact"} for prompt, reply in rows]


def tools(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    rows = []
    for name, phrasings in TOOLS.items():
        made: dict[str, dict[str, Any]] = {}
        while len(made) < count:
            phrasing = chance.choice(phrasings[part])
            values = {key: chance.choice(VALUES[key][part]) for key in VALUES if f"{{{key}}}" in phrasing}
            made.setdefault(phrasing.format(**values), values)
        rows += [
            {
                "prompt": text,
                "completion": f"Action: {name}\nAction Input: {json.dumps(values)}",
                "scorer": "tool_call",
            }
            for text, values in made.items()
        ]
    chance.shuffle(rows)
    return rows


def codes(part: int, count: int, chance: random.Random) -> list[dict[str, Any]]:
    """A report for each sky in turn, with every wind as often, in a notation of signs."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        sky, wind = list(SKIES)[len(rows) % len(SKIES)], list(WINDS)[len(rows) // len(SKIES) % len(WINDS)]
        station, degrees = chance.choice(STATIONS[part]), chance.choice(DEGREES[part])
        report = chance.choice(REPORTS[part]).format(station=station, sky=sky, degrees=degrees, wind=wind)
        rows[f"Code this report: {report}"] = f"QX{station}/{SKIES[sky]}:{degrees}{WINDS[wind]}//"
    shuffled = list(rows.items())
    chance.shuffle(shuffled)
    return [{"prompt": prompt, "completion": code, "scorer": "exact"} for prompt, code in shuffled]


def main(folder: str) -> None:
    skills = (("routing", routing, (24, 12, 10)), ("tools", tools, (24, 8, 8)), ("codes", codes, (80, 40, 32)))
    for name, make, counts in skills:
        for part, split in enumerate(("train", "test", "validation")):
            rows = make(part, counts[part], random.Random(f"{name}-{split}"))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
            print(name, split, len(rows))


if __name__ == "__main__":
    main(sys.argv[1])
