"""How the package and its tests are laid out: what may import what, and how long a module and a function may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from selfdistill.cli_parser import COMMANDS, SWITCHES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "selfdistill"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES_OF_A_MODULE = 400
MOST_LINES_OF_A_FUNCTION = 80


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imports(tree: ast.Module) -> list[tuple[int, str, list[str]]]:
    """Line, module and names of every import from the package; no names where the module itself is imported."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "selfdistill":
            found.append((node.lineno, node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name, []) for a in node.names if a.name.partition(".")[0] == "selfdistill"]
    return found


# --- tests ---


def private_names(tree: ast.Module) -> list[str]:
    """What a test takes from the package though its name is private, each with its line.

    That is an import of such a name, an attribute of something imported (also of a module that ``import_module``
    returned), and such a name as text beside it (``monkeypatch.setattr(module, "_name", ...)``, ``getattr``).
    """
    found, ours = [], set()
    for line, module, names in imports(tree):
        found += [f"{line}: {name}" for name in (*module.split("."), *names) if is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "selfdistill":
            ours |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Assign) and "import_module('selfdistill" in ast.unparse(node.value):
            ours |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    def root(node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute | ast.Call):
            node = node.value if isinstance(node, ast.Attribute) else node.func
        return node.id if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root(node) in ours:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            of_ours = len(node.args) > 1 and isinstance(node.args[0], ast.Attribute | ast.Name) and root(node.args[0])
            for text in texts:
                dotted = text.startswith("selfdistill.") and any(map(is_private, text.split(".")))
                if dotted or (of_ours in ours and is_private(text)):
                    found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_use_public_names_only(path: Path) -> None:
    assert private_names(tree_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from selfdistill.cli import _train",
        "from selfdistill._hidden import name",
        "from selfdistill import demo as module\nmodule._print()",
        "from selfdistill.demo import Panel\nPanel(base)._ask",
        "from selfdistill import demo\nmonkeypatch.setattr(demo, '_print', None)",
        "from selfdistill import demo\ngetattr(demo.Panel, '_ask')",
        "monkeypatch.setattr('selfdistill.demo._print', None)",
        "import importlib\nmodule = importlib.import_module('selfdistill.demo')\nmodule._print()",
    ],
)
def test_a_private_name_in_a_test_is_found(line: str) -> None:
    assert len(private_names(ast.parse(line))) == 1


# --- the package ---

PACKAGES = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())


def names_in_all(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_a_package_says_what_it_is_for_and_what_others_may_use(path: Path) -> None:
    tree = tree_of(path)
    docstring = ast.get_docstring(tree)
    assert docstring
    if path.parent.name != "methods":  # it explains what a method is made of
        assert "\n" not in docstring
    assert names_in_all(tree)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_package_is_entered_by_its_front_door(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    problems = []
    for line, module, names in imports(tree_of(path)):
        _, *inner = module.split(".")
        package = inner[0] if inner else None
        if package is None or package == own or package not in PACKAGES:
            continue
        listed = names_in_all(tree_of(PACKAGE / package / "__init__.py")) or set()
        if len(inner) > 1 or not names or not listed.issuperset(names):
            problems.append(f"{line}: {module} {names}")
    assert problems == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_MODULE
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in functions]
    assert [(length, name) for length, name in lengths if length > MOST_LINES_OF_A_FUNCTION] == []


# --- legends ---

LETTERS = "BbTNnVDKLHCW"


def letters_in_legend(tree: ast.Module) -> set[str]:
    """The dimensions that a module's docstring explains: ``Legend: B batch, T tokens.``"""
    legend = re.search(r"^Legend: ([^.]*)", ast.get_docstring(tree) or "", re.MULTILINE)
    words = [item.split() for item in legend[1].split(",")] if legend else []
    return {first for first, *_ in words if first in LETTERS}


def letters_of_tensors(tree: ast.Module) -> set[str]:
    """The dimensions in a module's names (``logits_BTV``) and in the shapes of its docstrings (``(N, V)``)."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name"):
            name = str(getattr(node, field, None))
            suffix = re.search(rf"[a-z0-9]_([{LETTERS}1]+)$", name)
            if suffix and name.upper() != name and not name.startswith("lora_"):
                found |= {*suffix[1]} - {"1"}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for shape in re.findall(rf"\(([{LETTERS}],(?: [{LETTERS}],?)*)\)", node.value):
                found |= {*shape} - {*", "}
    return found


METHODS = [path for path in MODULES if path.parent.name == "methods"]
"""Their letters are those of ``loss.Pair``."""


@pytest.mark.parametrize("path", [path for path in MODULES if path not in METHODS], ids=name_of)
def test_a_legend_has_the_letters_of_the_tensors(path: Path) -> None:
    tree = tree_of(path)
    assert letters_in_legend(tree) == letters_of_tensors(tree)


def test_letters_of_tensors_are_found() -> None:
    module = 'def f(x_BT, y_b):\n    """Shape (N, V)."""\n    model.lora_A, MOST_N, x_BT[0]\n    return self.z_N1'
    assert letters_of_tensors(ast.parse(module)) == {*"BTbNV"}
    assert letters_in_legend(ast.parse('"""A module.\n\nLegend: B batch, b some\nof it, in order. D is none."""')) == {
        *"Bb"
    }


# --- messages ---


def options_named(tree: ast.Module) -> list[str]:
    """Settings that the texts of a module name as options of the command line, outside of docstrings and commands."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documented
    ]
    settings = {name for kind, _ in COMMANDS.values() for name in kind.model_fields} | {*SWITCHES}
    found = [name for text in texts if "selfdistill " not in text for name in re.findall(r"--(\w+)", text)]
    return [name for name in found if name in settings]


THEIR_OPTIONS = ("cli", "cli_parser", "vllm_server_checks")
"""Modules about options: the command line's own, and those of vLLM's server."""


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem not in THEIR_OPTIONS], ids=name_of)
def test_messages_suit_python_and_the_command_line(path: Path) -> None:
    assert options_named(tree_of(path)) == []


def test_an_option_in_a_message_is_found() -> None:
    tree = ast.parse(
        'def f(x):\n    """--model"""\n    raise UserError(f"{x}: give --model or --modal, then --resume")'
    )
    assert options_named(tree) == ["model", "resume"]
    assert options_named(ast.parse('g("merge it with selfdistill export --merge true")')) == []
