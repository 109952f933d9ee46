"""Write the two made-up skills that ship with the package beside the facts: routing and tools.

    python studies/make_skills.py selfdistill/data

``routing``: which of four teams takes a customer's message; the reply is a line "Team: X". ``tools``: a request becomes
a tool call with its arguments. Test rows have phrasings and values that no training row has.
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
    ),
}
THINGS = (
    ["toaster", "lamp", "camera", "kettle", "heater", "radio", "drill", "blender"],
    ["fan", "printer", "speaker", "mixer"],
)
NUMBERS = ([3, 5, 8, 12, 15, 20], [4, 6, 9, 18])

TOOLS: dict[str, tuple[list[str], list[str]]] = {
    "set_timer": (
        [
            "Set a timer for {minutes} minutes.",
            "Count down {minutes} minutes.",
            "I need a timer, {minutes} minutes please.",
            "Tell me when {minutes} minutes have passed.",
            "Start a timer of {minutes} minutes for the oven.",
        ],
        ["Please start a countdown of {minutes} minutes.", "Wake me in {minutes} minutes."],
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
    ),
}
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "minutes": ([5, 8, 10, 15, 20, 25, 40], [7, 12, 30, 45]),
    "to": (["Anna", "Omar", "Lena", "Paul", "Mia"], ["Ida", "Noah", "Rosa"]),
    "text": (
        ["dinner is ready", "the train is late", "I am on my way", "the door is open", "the meeting is over"],
        ["the shop is closed", "I will call later", "the bus has left"],
    ),
    "city": (["Oslo", "Lima", "Cairo", "Porto", "Quito"], ["Turin", "Perth", "Dakar"]),
    "day": (["Monday", "Tuesday", "Friday", "Saturday"], ["Wednesday", "Sunday"]),
    "song": (["Green Door", "Paper Moon", "Long Road", "Silver Rain"], ["Stone Garden", "Night Bus"]),
    "artist": (["the Larks", "Kim Dale", "Nova", "Old Harbor"], ["Fern Hill", "Rita Cole"]),
}


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


def main(folder: str) -> None:
    for name, make, counts in (("routing", routing, (24, 12)), ("tools", tools, (24, 8))):
        for part, split in enumerate(("train", "test")):
            rows = make(part, counts[part], random.Random(f"{name}-{split}"))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (Path(folder) / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")
            print(name, split, len(rows))


if __name__ == "__main__":
    main(sys.argv[1])
