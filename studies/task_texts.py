"""The hand-written texts of ``make_tasks.py``: for training, validation and test, in this order."""

EXAMPLES = {
    "strings": [
        (
            "Write a Python function f(s) that returns s without white space at both ends.",
            "def f(s):\n    return s.strip()",
        ),
        (
            "Write a Python function f(s) that returns s twice with a comma between.",
            'def f(s):\n    return s + "," + s',
        ),
    ],
    "sums": [
        ("6 plus 3?", "Answer: 9"),
        ("Kim has 8 pens and loses 3. How many are left?", "Answer: 5"),
        ("2 times 7?", "Answer: 14"),
    ],
    "tickets": [
        (
            'Guest in room 140: "The door handle is broken."\nQueue: kitchen, housekeeping, repairs or reception?',
            "Queue: repairs\nRoom: 140",
        ),
        (
            'Guest in room 525: "Can I have a sandwich?"\nQueue: kitchen, housekeeping, repairs or reception?',
            "Queue: kitchen\nRoom: 525",
        ),
        (
            'Guest in room 309: "Please mop the floor."\nQueue: kitchen, housekeeping, repairs or reception?',
            "Queue: housekeeping\nRoom: 309",
        ),
        (
            'Guest in room 231: "When is check-out?"\nQueue: kitchen, housekeeping, repairs or reception?',
            "Queue: reception\nRoom: 231",
        ),
    ],
    "chains": [
        ("Start with 3. Then + 4. Then - 2. Then + 3.", "3 + 4 = 7\n7 - 2 = 5\n5 + 3 = 8\nAnswer: 8"),
        ("Start with 6. Then - 5. Then + 3. Then + 2.", "6 - 5 = 1\n1 + 3 = 4\n4 + 2 = 6\nAnswer: 6"),
        ("Start with 5. Then + 1. Then + 3. Then - 5.", "5 + 1 = 6\n6 + 3 = 9\n9 - 5 = 4\nAnswer: 4"),
    ],
}
"""Worked examples, the earlier turns of every prompt."""

STORIES = (
    [
        ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "+"),
        ("{name} had {a} {things} and gave away {b} of them. How many are left?", "-"),
        ("A box holds {a} {things}. {name} has {b} such boxes. How many {things} is that?", "*"),
        ("{name} shares {a} {things} equally among {b} friends. How many does each friend get?", "/"),
        ("On Monday {name} sold {a} {things}, on Tuesday {b}. How many were sold on both days?", "+"),
        ("There were {a} {things} on a shelf. {name} took {b}. How many {things} stayed on the shelf?", "-"),
        ("Each bag has {a} {things} in it. {name} carries {b} bags. How many {things} does {name} carry?", "*"),
        ("{name} packs {a} {things} into {b} equal parcels. How many are in one parcel?", "/"),
        ("{name} found {a} {things} in the morning and {b} in the evening. How many did {name} find?", "+"),
        ("{name} needs {a} {things} and already has {b}. How many are missing?", "-"),
        ("A ticket costs {a} dollars. {name} pays for {b} tickets. How many dollars is that?", "*"),
        ("{name} reads {a} pages in {b} days, the same number each day. How many pages is that a day?", "/"),
        ("{a} plus {b}?", "+"),
        ("{a} minus {b}?", "-"),
        ("Work out {a} + {b}.", "+"),
        ("Work out {a} - {b}.", "-"),
        ("{a} times {b}?", "*"),
        ("Add {b} to {a}.", "+"),
        ("A tree is {a} meters tall and grows {b} meters. How tall is it now?", "+"),
        ("{name} had {a} dollars and spent {b} on {things}. How many dollars remain?", "-"),
    ],
    [
        ("A basket with {a} {things} gets {b} more from {name}. How many does it hold in the end?", "+"),
        ("Of {a} {things} that {name} owned, {b} broke. How many are whole?", "-"),
        ("{name} sets {b} tables with {a} {things} each. How many {things} does that take?", "*"),
        ("{a} {things} are split into {b} heaps of one size by {name}. How big is a heap?", "/"),
        ("{name} is {a} years old. How old will {name} be in {b} years?", "+"),
        ("The sum of {a} and {b}?", "+"),
        ("Count up from {a} by {b}.", "+"),
        ("{a} less {b}?", "-"),
        ("{b} taken from {a}?", "-"),
        ("A bus with {a} people stops and {b} get out. How many people stay in the bus?", "-"),
    ],
    [
        ("{a} {things} lie on the floor and {b} in the drawer. {name} counts all. What is the count?", "+"),
        ("{name} planned to make {a} {things} and has made {b}. How many are still to be made?", "-"),
        ("{name} draws {a} {things} on every page of a book with {b} pages. How many are drawn?", "*"),
        ("{name} puts {a} {things} in {b} rows of the same length. How long is a row?", "/"),
        ("A cook uses {a} eggs for a cake and {b} for a soup. How many eggs does the cook use?", "+"),
        ("{a} and {b} make what?", "+"),
        ("{b} more than {a}?", "+"),
        ("{b} fewer than {a}?", "-"),
        ("{a} without {b}?", "-"),
        ("A rope of {a} meters is cut, and {b} meters are taken away. How many meters are left?", "-"),
        ("{name} earns {a} dollars an hour and works {b} hours. How many dollars does {name} earn?", "*"),
        ("A bill of {a} dollars is paid by {b} people in equal parts. How much does each pay?", "/"),
    ],
)
"""A story with two numbers, and what is done with them."""

NAMES = (["Mia", "Omar", "Lena", "Paul", "Ivy", "Noor"], ["Rosa", "Finn", "Ada"], ["Hugo", "Vera", "Tariq", "Elsa"])
THINGS = (
    ["pencils", "shells", "stamps", "plums", "coins", "books"],
    ["cups", "marbles", "buttons"],
    ["stars", "candles", "cards", "beads"],
)

MESSAGES = {
    "kitchen": (
        [
            "Please bring me a pot of tea and some toast.",
            "The soup that was sent up is cold.",
            "I ordered two sandwiches an hour ago.",
            "Can I have breakfast in bed at seven?",
            "My son is allergic to nuts. Which desserts are safe?",
            "There is a hair in my salad.",
            "I would like a vegetarian dinner tonight.",
            "Please send up a bottle of water and a bowl of fruit.",
            "The steak was burnt. I want another one.",
            "Is there anything to eat after midnight?",
            "We got the pizza, but not the drinks.",
            "Could you warm up the milk for my baby?",
        ],
        [
            "I am hungry. What can you cook for me now?",
            "The eggs are too salty.",
            "Two coffees and a piece of cake, please.",
            "Please leave the onions out of my meal.",
        ],
        [
            "Where is the lunch that we ordered?",
            "I would like fish in place of the chicken.",
            "A plate of cheese and bread, please.",
            "The ice cream had melted when it came.",
            "Do you have porridge for breakfast?",
        ],
    ),
    "housekeeping": (
        [
            "I need two more towels.",
            "Please change the sheets on my bed.",
            "Nobody has cleaned here today.",
            "There is no soap left in the bathroom.",
            "Could somebody take the rubbish out?",
            "I spilled juice on the carpet.",
            "May I have another pillow and a blanket?",
            "Please do not clean before noon.",
            "The toilet paper has run out.",
            "My shirts need to be washed and ironed.",
            "The floor of the bathroom is dirty.",
            "We need fresh towels for the pool.",
        ],
        [
            "The bed was not made this morning.",
            "Please dust the shelves.",
            "Could I get a clean bathrobe?",
            "There is sand all over the floor.",
        ],
        [
            "We have no clean sheets.",
            "My dress has to be ironed by six.",
            "The bin is full.",
            "Please vacuum the rug.",
            "The shampoo is empty.",
        ],
    ),
    "repairs": (
        [
            "The shower is dripping all night.",
            "The light above the bed does not work.",
            "My window cannot be closed.",
            "The television shows no picture.",
            "The heating is broken.",
            "The air conditioning makes a loud noise.",
            "Water is running out of the sink.",
            "The lock of the balcony door is stuck.",
            "A leg of the chair has come off.",
            "The socket by the desk gives no power.",
            "The toilet does not flush.",
            "The curtain rail fell down.",
        ],
        [
            "The lamp on the desk keeps flickering.",
            "The tap cannot be turned off.",
            "The door of the wardrobe has fallen off.",
            "There is no hot water in the shower.",
        ],
        [
            "The fridge does not get cold.",
            "A bulb in the bathroom is broken.",
            "The handle of the window is loose.",
            "The pipe under the sink leaks.",
            "The remote control is dead.",
        ],
    ),
    "reception": (
        [
            "I want to stay one night longer.",
            "Please call me a taxi to the airport.",
            "At what time do I have to check out?",
            "My key card was lost.",
            "Can I pay the bill now?",
            "Please wake me by phone at six.",
            "Is there a parcel for me?",
            "My bill lists a night too many.",
            "Which bus goes to the museum?",
            "My neighbors are too loud. I want another room.",
            "Can I leave my suitcase with you after I check out?",
            "I would like to book a tour for tomorrow.",
        ],
        [
            "Please print my invoice.",
            "I need a second key card.",
            "When does the last train leave?",
            "May I check out two hours later?",
        ],
        [
            "I would like to pay by card.",
            "Order a cab for eight o'clock, please.",
            "Has anybody left a letter for me?",
            "Can we move to a room with a view?",
            "I am leaving a day earlier.",
        ],
    ),
}
"""What guests write, by the queue that takes it."""

PLANS = {"+": "Add {b} to {a}.", "-": "Subtract {b} from {a}."}
"""A step of a plan, by the sign of its operation."""
