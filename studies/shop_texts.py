"""The hand-written part of the task ``shop``: what customers ask, by part and kind. {p} and {q} are products."""

from __future__ import annotations

ASKED: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "price": (
            "What does the {p} cost?",
            "How much is the {p}?",
            "I like the {p}. What is its price?",
            "Price of the {p}, please.",
            "Can you tell me what you charge for the {p}?",
            "How many euros do I need for the {p}?",
            "Before I buy the {p}: what is the price?",
        ),
        "stock": (
            "How many of the {p} do you have?",
            "How many pieces of the {p} are left?",
            "Is the {p} in stock? Tell me how many.",
            "What is the stock of the {p}?",
            "Count the {p} for me.",
            "Do you still have the {p}, and how many?",
            "Please check how many of the {p} there are.",
        ),
        "order": (
            "Order {n} x {p} for {c}.",
            "{c} wants {n} of the {p}. Please order.",
            "Please put down {n} of the {p} for {c}.",
            "I am {c}. I would like the {p}, {n} pieces.",
            "Buy the {p} for {c}, quantity {n}.",
            "{c} here. I take {n} of the {p}.",
            "New order: {p}, {n} pieces, customer {c}.",
        ),
        "refused": (
            "{c} needs {n} of the {p}. Order them.",
            "Please order the {p} for {c}, {n} pieces.",
            "Get {c} the {p}, {n} of it.",
            "Order for {c}: {n} of the {p}.",
            "I want {n} of the {p}, my name is {c}.",
        ),
        "left": (
            "Order {n} of the {p} for {c} and tell me how many stay.",
            "{c} takes {n} of the {p}. What is left then?",
            "Sell {n} of the {p} to {c}, then count the rest.",
            "For {c}: {n} x {p}. How many remain?",
            "Book {n} of the {p} for {c}. How many do you have afterwards?",
        ),
        "missing": (
            "How much do you want for the {p}?",
            "Do you have the {p}? How many?",
            "Please order {n} of the {p} for {c}.",
            "What is the price of your {p}?",
        ),
        "cheaper": (
            "What does the cheaper of the {p} and the {q} cost?",
            "The {p} or the {q}: give me the price of the cheaper one.",
            "I take the {p} or the {q}, whichever costs less. How much is that?",
            "Compare the {p} with the {q} and name the lower price.",
            "How much is the cheaper one, the {p} or the {q}?",
        ),
    },
    "validation": {
        "price": (
            "The {p} in your window, how expensive is it?",
            "Could you give me a price on the {p}?",
            "My aunt asks for the {p}. What would she pay?",
        ),
        "stock": (
            "Are there any of the {p} to be had? I want the number.",
            "Look up how many you hold of the {p}.",
            "The {p}: how large is your supply?",
        ),
        "order": (
            "Reserve the {p} for {c}, {n} of them.",
            "Could {c} have {n} of the {p}? Order it, please.",
            "Write up {n} x {p} on the name {c}.",
            "{c} decided on {n} of the {p}, go ahead.",
        ),
        "refused": (
            "This is {c}, I would take {n} of the {p}.",
            "{c} asks for {n} of the {p}, do it if you can.",
            "Put {n} of the {p} on {c}'s account.",
        ),
        "left": (
            "Give {c} {n} of the {p} and say what stock that leaves.",
            "Let {c} have {n} of the {p}. Then how many are there?",
            "{n} of the {p} go to {c}. Tell me the new stock.",
        ),
        "missing": (
            "Would you have a {p} and what is the cost?",
            "{c} would like {n} of the {p}, order that.",
        ),
        "cheaper": (
            "Between the {p} and the {q}, what is the smaller price?",
            "I buy the {p} if it beats the {q}, else the {q}. What do I pay?",
        ),
    },
    "test": {
        "price": (
            "If I wanted the {p}, what would I owe you?",
            "Quick one: {p}, how many euros?",
            "What are you asking for a {p} these days?",
            "Hello! My budget is small. Is the {p} costly? Say the amount.",
            "Someone told me about your {p}. At what price does it sell?",
            "Tell me the amount I pay at the till for one {p}.",
            "I forgot to note the price tag of the {p}.",
            "For a gift I think of the {p}; what sum is that?",
            "Let me know what the {p} goes for.",
            "A single {p}, please state its cost.",
        ),
        "stock": (
            "Could I still get the {p}? I am curious how many remain.",
            "How big is the pile of your {p}?",
            "Give me the inventory figure of the {p}.",
            "Our club may want the {p}. What number is available?",
            "Say, how well stocked are you with the {p}?",
            "I wonder what quantity of the {p} sits in the store room.",
            "Of the {p}, how many could somebody get today at most?",
            "Are you running out of the {p}? State the count.",
            "The {p}, available in what number?",
            "Has the {p} sold out, or what remains?",
        ),
        "order": (
            "Could you set aside {n} of the {p}? The name is {c}.",
            "My friend {c} asked me to get {n} of the {p}. Place that, please.",
            "Go ahead and sell the {p} to {c}, {n} in total.",
            "It is {c} speaking, ship me {n} of your {p}.",
            "Make it {n} of the {p}. You can put {c} on the slip.",
            "We owe {c} a present: {n} of the {p}. Arrange it.",
            "Add {n} x {p} to what {c} gets.",
            "{c} would be happy with {n} of the {p}, so purchase it.",
            "Enter a purchase by {c}: the {p}, count {n}.",
            "Yes, {c} said {n} of the {p}. Confirm once done.",
        ),
        "refused": (
            "Our office, contact {c}, requires {n} of the {p}. Purchase them all.",
            "Ship {n} of the {p} over to {c}.",
            "A big party! {c} is after {n} of the {p}.",
            "Could you fulfil {n} x {p} in the name of {c}?",
            "Try to get {c} as many as {n} of the {p}.",
            "Hi, {c} again. This time it is {n} of the {p}.",
            "The school sends {c} to pick up {n} of the {p}, arrange that.",
            "Enter {n} of the {p} as a purchase by {c}.",
        ),
        "left": (
            "Ship {c} {n} of the {p}, then report the remaining stock.",
            "Once {c} has {n} of the {p}, how many stay with you? Do the sale first.",
            "Do a sale of {n} x {p} to {c}; afterwards give me the inventory.",
            "Hand {n} of the {p} to {c} and let me know the remainder.",
            "I, {c}, buy {n} of the {p}. My sister wants the others, how many are those?",
            "Record {n} of the {p} as bought by {c}. And the number still available?",
            "Set aside {n} of the {p} for {c}, and say what others can still get.",
            "Purchase {n} of your {p} in the name of {c}, with the count that stays behind.",
        ),
        "missing": (
            "Say what I would pay for one {p}.",
            "Any chance of a {p} at your place? Which price?",
            "The number available of the {p}, please.",
            "Ship {c} {n} of the {p}.",
            "I came for the {p}. Did you sell the last?",
            "{c} hopes for {n} of the {p}; purchase it.",
        ),
        "cheaper": (
            "Either the {p} or the {q} will do. What is the least I can spend?",
            "Look at the {p} and the {q}: what is the lower amount?",
            "Say the minimum I pay if I choose among the {p} and the {q}.",
            "My budget is tight: the {p} against the {q}, at what price comes the better deal?",
            "For the less expensive of the {q} and the {p}, state the cost.",
            "One of the {p} and the {q} is easier on the purse. What does that one go for?",
            "Put the {p} beside the {q}. At which price does the less costly sell?",
            "Tell me the sum for whichever is less dear, the {p}, the {q}.",
        ),
    },
}

CUSTOMERS = {
    "train": ("Ana", "Ben", "Carla", "Dev", "Elif", "Finn", "Greta", "Hugo"),
    "validation": ("Ines", "Jonas", "Kofi"),
    "test": ("Lena", "Marek", "Nora", "Omar", "Petra", "Quinn", "Rosa", "Sven", "Tara", "Uma"),
}

UNKNOWN = {
    "train": ("silver whistle", "canvas tent", "maple tray", "bronze coin"),
    "validation": ("swim ring", "cheese grater"),
    "test": ("roller skate", "baking tin", "fire bowl", "phone case", "egg timer", "bird house"),
}
"""What the shop does not sell."""
