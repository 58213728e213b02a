"""The guided reading: demo/READING.md quotes the code as it is, and its answers are what runs."""

import ast
import contextlib
import io
import re
from textwrap import dedent

import pytest
import torch
from conftest import ROOT

PAGE = ROOT / "demo" / "READING.md"
TEXT = PAGE.read_text(encoding="utf-8")
QUOTES = re.findall(r"\[`[\w.]+`\]\(([^)]+)\), `([\w.]+)`:\n\n```python\n(.*?)```", TEXT, re.S)
ANSWERS = re.findall(
    r"<summary>([^\n]*)</summary>.*?```python\n(.*?)```\n\n```text\n(.*?)```", TEXT, re.S
)


def lines_of(path, name):
    """Lines of `name`, a function, a Class.method or an assignment of a file."""
    source = path.read_text()
    node = ast.parse(source)
    for part in name.split("."):
        node = next(n for n in node.body if part in (getattr(n, "name", None), target(n)))
    return source.split("\n")[node.lineno - 1 : node.end_lineno]


def target(node):
    return getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else None


@pytest.mark.parametrize("path,name,quote", QUOTES)
def test_a_quote_is_in_its_function(path, name, quote):
    """Pieces between lines of `...` are contiguous, in the order of the file."""
    lines = lines_of(PAGE.parent / path, name)
    for piece in re.split(r"^ *\.\.\.\n", quote, flags=re.M):
        n = piece.count("\n")
        places = [i for i in range(len(lines)) if same(lines[i : i + n], piece)]
        assert places, f"not in {name}:\n{piece}"
        lines = lines[places[0] + n :]


def same(lines, piece):
    return dedent("\n".join(lines)) + "\n" == dedent(piece)


def test_the_page_is_complete():
    stops = len(re.findall(r"^## \d+\. ", TEXT, re.M))
    assert stops >= 12 and len(ANSWERS) == TEXT.count("<details>") == stops
    assert len(QUOTES) >= stops
    assert TEXT.count("```python") == len(QUOTES) + len(ANSWERS)  # each block is tested
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", TEXT):
        assert (PAGE.parent / link).exists(), link


@pytest.mark.weights
@pytest.mark.parametrize("question,program,output", ANSWERS)
def test_an_answer_is_what_its_program_prints(question, program, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        exec(program, {})
    assert printed.getvalue() == output
