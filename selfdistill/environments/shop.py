"""A small shop: a database of products and orders, three tools, and a checker of its final contents.

The database is SQLite in memory; every episode starts with an identical new one. Values reach it only as parameters.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any

PRODUCTS = tuple(
    """
    copper kettle, blue mug, wool scarf, tin lantern, oak stool, paper kite, clay pot, silk ribbon, glass jar,
    steel ruler, linen apron, brass bell, cork mat, straw hat, leather belt, wax candle, rubber boot, cotton towel,
    iron skillet, pine shelf, felt slipper, wicker basket, marble bowl, denim bag, chalk board, bamboo flute,
    velvet cushion, garden rake, soup ladle, travel pillow, desk lamp, picnic rug, bread knife, wall clock, puzzle box,
    rain coat,
    bicycle pump, camping stove, tea strainer, fountain pen, wooden spoon, snow shovel, chess set, pepper mill,
    fishing rod, sewing kit, hand mirror, shoe brush, flower vase, salad fork, music stand, bath sponge, letter opener,
    toy train, spice rack, wine glass, piggy bank, coat hook, garden hose, magnet tray, tennis racket, ice bucket,
    book end, hair dryer
    """.replace("\n    ", " ")
    .strip()
    .split(", ")
)
"""The names of the products: 26 for demonstrations, 10 for validation, 28 for the test."""

_REFUSAL = re.compile(r"\b(no|not|none|only|sorry|unfortunately|cannot|unable)\b|n't\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


def price_of(number: int) -> int:
    """Price in euros of the product at this index of ``PRODUCTS``."""
    return 13 + (7 * number**3 + 31 * number) % 47


def stock_of(number: int) -> int:
    """Stock of the product at this index of ``PRODUCTS``."""
    return 2 + (5 * number**3 + 17 * number) % 11


def id_of(number: int) -> int:
    """The id of the product at this index of ``PRODUCTS``."""
    return 101 + 37 * number % 97


class Shop:
    """The shop in one episode; its methods are the tools."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(":memory:")
        self._answer: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._looked = False

    def reset(self, prompt: Any = "", answer: Any = None) -> None:
        """Fill the database.

        Args:
            prompt: the question; a reply may repeat its numbers.
            answer: the expected outcome: ``orders``, each as customer, product and count; the ``number`` that the reply
                must give; ``refused`` if the reply must say that something cannot be done.
        """
        text = prompt if isinstance(prompt, str) else " ".join(str(turn.get("content")) for turn in prompt)
        self._asked = set(_NUMBER.findall(text))
        self._answer = answer if isinstance(answer, dict) else {}
        self._looked = False
        self._database.executescript(
            """
            DROP TABLE IF EXISTS products; DROP TABLE IF EXISTS orders;
            CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT UNIQUE, price INTEGER, stock INTEGER);
            CREATE TABLE orders (customer TEXT, product TEXT, count INTEGER);
            """
        )
        rows = [(id_of(at), name, price_of(at), stock_of(at)) for at, name in enumerate(PRODUCTS)]
        self._database.executemany("INSERT INTO products VALUES (?, ?, ?, ?)", rows)

    def find(self, name: str) -> str:
        """Find a product's id and price.

        Args:
            name: the product's name
        """
        self._looked = True
        wanted = " ".join(name.lower().split())
        found = self._database.execute(
            "SELECT id, price FROM products WHERE ? IN (name, name || 's', name || 'es')", (wanted,)
        ).fetchone()
        return f"id {found[0]}, {found[1]} euros" if found else "no such product"

    def stock(self, id: int) -> str:
        """Count what is left of a product.

        Args:
            id: the product's id
        """
        found = self._product(id)
        return f"{found[1]} left" if found else "no such id"

    def order(self, id: int, count: int, customer: str) -> str:
        """Order a product for a customer.

        Args:
            id: the product's id
            count: how many
            customer: the customer's name
        """
        found = self._product(id)
        if found is None:
            return "no such id"
        name, left = found
        if count < 1:
            return "not ordered, count must be at least 1"
        if count > left:
            return f"not ordered, only {left} left"
        self._database.execute("UPDATE products SET stock = stock - ? WHERE id = ?", (count, id))
        self._database.execute("INSERT INTO orders VALUES (?, ?, ?)", (customer.strip(), name, count))
        return "ordered"

    def reward(self, reply: str) -> tuple[bool, str]:
        """Whether the orders match the answer and the reply is right, and if not, what is wrong."""
        problem = self._problem_of_orders() or self._problem_of_reply(reply)
        return not problem, problem

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _product(self, id: int) -> tuple[str, int] | None:
        found: tuple[str, int] | None = self._database.execute(
            "SELECT name, stock FROM products WHERE id = ?", (id,)
        ).fetchone()
        return found

    def _problem_of_orders(self) -> str:
        rows = self._database.execute("SELECT customer, product, count FROM orders").fetchall()
        found = sorted((customer.casefold(), product, count) for customer, product, count in rows)
        wanted = self._answer.get("orders", [])
        if found == sorted((customer.casefold(), product, count) for customer, product, count in wanted):
            return ""
        return f"expected {_listed(wanted)}, found {_listed(rows)}"

    def _problem_of_reply(self, reply: str) -> str:
        """What is wrong with the final reply. Guesses earn nothing: neither a list of numbers nor a refusal without a
        look-up."""
        if not reply.strip():
            return "the reply is empty"
        number = self._answer.get("number")
        if number is not None:
            said = set(_NUMBER.findall(reply))
            if str(number) not in said:
                return f"the reply does not say {number}"
            if others := sorted(said - self._asked - {str(number)}):
                return f"the reply says {others[0]}, expected only {number}"
        refuses = bool(_REFUSAL.search(reply))
        if self._answer.get("refused") and not refuses:
            return "the reply does not say that it is not possible"
        if self._answer.get("refused") and not self._looked:
            return "the reply says that it is not possible, but no product was looked up"
        if self._answer.get("orders") and refuses:
            return "the reply says that it was not possible"
        return ""


def _listed(orders: list[Any]) -> str:
    written = [f"{count} x {product} for {customer}" for customer, product, count in orders]
    return f"the orders {', '.join(written)}" if written else "no orders"
