"""The documentation: its pages hold together, and what it shows to be typed runs."""

import argparse
import doctest
import importlib
import re
import runpy
import shlex
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from branchcore import docs_command
from branchcore.cli import _parser, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BENCH = ROOT / "bench"


class Page(HTMLParser):
    """Remembers what a page has and what it asks for."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.tags, self.loaded = set(), [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.anchors.add(found.get("id"))
        if tag == "a":
            self.links.append(found.get("href", ""))
        else:
            self.loaded += [found[key] for key in ("src", "href") if key in found]


def faults(site):
    """Returns what is wrong with a folder of pages, as text."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            place, _, anchor = link.partition("#")
            if link == "https://pdoc.dev":
                continue
            target = (path.parent / unquote(place)).resolve() if place else path
            if target not in pages or (anchor and anchor not in pages[target].anchors):
                found.append(f"{path.name}: link to nothing, {link}")
        found += [f"{path.name}: loads {x}" for x in page.loaded if not x.startswith("data:")]
        # text that was meant as it stands: <x> and *x*
        odd = page.tags - KNOWN_TAGS
        found += [f"{path.name}: no text but a tag, {tag}" for tag in sorted(odd)]
    return found


KNOWN_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "nav", "main", "section", "script"),
    *("div", "span", "p", "a", "ul", "ol", "li", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5"),
    *("h6", "code", "pre", "strong", "blockquote", "table", "thead", "tbody", "tr", "th", "td"),
    *("input", "label", "svg", "path", "img", "wbr", "br", "button"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("pdoc", reason="pages need the docs extra")
    folder = tmp_path_factory.mktemp("site")
    main(["docs", "--out", str(folder)])
    return folder


def test_pages_load_nothing_and_link_to_what_exists(site):
    assert faults(site) == []
    pages = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    assert pages == {"index"} | {name.replace(".", "/") for name in docs_command.public_modules()}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<a href="b.html#x">', "link to nothing, b.html#x"),
        ('<a href="c.html">', "link to nothing, c.html"),
        ('<a href="http://[:port]/x">', "link to nothing, http"),
        ('<script src="https://x.org/x.js">', "loads https://x.org/x.js"),
        ("mean of <weight dz>", "a tag, weight"),
        ("2 <em>x</em> 3", "a tag, em"),
    ],
)
def test_the_checker_sees(tmp_path, text, fault):
    (tmp_path / "b.html").write_text('<p id="y"><a href="a.html"><a href="#y">')
    assert len(faults(tmp_path)) == 1
    (tmp_path / "a.html").write_text(text)
    (found,) = faults(tmp_path)
    assert fault in found


def test_pages_are_public_modules_with_something_to_read():
    names = docs_command.public_modules()
    assert len(names) == len(set(names)) > 80
    assert not [name for name in names if "._" in name or ".kernels" in name]
    for name in ("recipes", "recipes.branch_grpo", "models.sd3", "ops", "rewards", "trainer"):
        assert f"branchcore.{name}" in names
    assert not [name for name in names if len(sys.modules[name].__doc__ or "") < 30]


def test_modules_that_are_named_have_a_page(site):
    front = (site / "branchcore.html").read_text().partition('<section id="')[0]
    linked = set(re.findall(r'<code><a href="branchcore/([\w/]+)\.html">branchcore\.', front))
    assert {"recipes", "ops", "models", "rewards", "trainer"} <= linked
    for path in site.rglob("*.html"):
        assert not re.findall(r"<code>(branchcore\.[\w.]+)<", path.read_text()), path


def test_methods_are_on_the_page_of_recipes_with_their_formulas(site):
    assert 'id="tempflow_grpo"' in (site / "branchcore" / "recipes.html").read_text()
    own = (site / "branchcore" / "recipes" / "branch_grpo.html").read_text()
    assert "xi_b = (s own_b + shared) / sqrt(1 + s^2) at splits" in own


def test_without_pdoc_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    with pytest.raises(SystemExit, match=r"docs: pdoc must be installed.*branchcore\[docs\]"):
        main(["docs", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_docstring_that_renders_with_a_warning_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("pdoc", reason="pages need the docs extra")
    module = importlib.import_module("branchcore.schedule")
    monkeypatch.setattr(docs_command, "public_modules", lambda: ["branchcore.schedule"])
    monkeypatch.setitem(module.shifted_linear.__annotations__, "steps", "Nowhere")
    with pytest.raises(RuntimeError, match="Nowhere"):
        docs_command.write_docs(tmp_path)
    assert not list(tmp_path.iterdir())


SHOWN = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
FILES = sorted((ROOT / "branchcore").rglob("*.py"))
EXAMPLES = [path for path in FILES if ">>> " in path.read_text() or SHOWN.search(path.read_text())]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_in_docstrings_run_as_they_stand(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, ran = module_of(path), 0
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder().find(module, globs={}):
        runner.run(test)
    assert runner.failures == 0
    for indent, block in SHOWN.findall(path.read_text()):
        assert all(line.startswith(indent) for line in block.splitlines() if line)
        exec(textwrap.dedent(block), {"__name__": "example"})
        ran += 1
    assert runner.tries + ran > 0


def test_main_names_have_examples():
    assert len(EXAMPLES) >= 8


ELSEWHERE = {"Real models", "Inside your own trainer", "Add a method"}
"""Sections whose blocks tests/test_readme.py runs, with names of its own."""


def test_other_blocks_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for section in re.split(r"^##+ ", README, flags=re.MULTILINE)[1:]:
        if section.partition("\n")[0] not in ELSEWHERE:
            for _, block in SHOWN.findall(section):
                exec(block, {"__name__": "example"})


def commands(text):
    """Returns the words of every command that is shown, in its order."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^## Files\n.*?^##", "##", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    found = []
    for line in lines:
        words = [w for w in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", w)]
        starts = [i + 1 for i, word in enumerate(words) if word == "&&"]
        for start, end in zip([0, *starts], [*(i - 1 for i in starts), None], strict=True):
            found.append(words[start:end])
    return [words for words in found if words]


COMMANDS = commands(README) + commands((BENCH / "README.md").read_text())
TOOLS = {"pytest", "ruff", "tensorboard", "cibuildwheel", "torchrun"}
"""Not ours; tests/test_readme.py reads what torchrun starts."""


class Parsed(BaseException):
    """A script's arguments are what it takes."""


@pytest.fixture
def only_parsing(monkeypatch):
    """Scripts end when their arguments are read; wrong ones end them with SystemExit."""
    whole = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        whole(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.syspath_prepend(str(BENCH))

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


def check(words, run_script):
    """Holds a command against what it starts."""
    program, *rest = words
    if words[:3] == ["python", "-m", "branchcore"]:
        args, unknown = _parser().parse_known_args(words[3:])
        assert (args.command, unknown) == (words[3], [])
    elif program == "python":
        run_script(*rest)
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        for extra in ",".join(extras).split(",") if extras else []:
            declared = (ROOT / "pyproject.toml").read_text()
            assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra
    elif program == "bash" or "/" in program:
        script = ROOT / (rest[0] if program == "bash" else program)
        assert script.is_file()
        assert program == "bash" or script.stat().st_mode & 0o100
    else:
        assert program in TOOLS, f"nothing checks {words}: name its program in TOOLS, or check it"


def test_commands_start_what_exists_with_the_options_it_has(only_parsing):
    pytest.importorskip("diffusers", reason="the benchmarks need the demo extra")
    pytest.importorskip("triton", reason="bench/aot.py needs Triton")
    assert len(COMMANDS) > 30
    for words in COMMANDS:
        check(words, only_parsing)


@pytest.mark.parametrize(
    "line",
    [
        "python -m branchcore plan --leafs 4",
        "python bench/packing.py --jason x",
        "pip install '.[dmeo]'",
        "bash bench/wheel_chek.sh",
        "cargo build",
    ],
)
def test_a_command_that_would_fail_is_seen(only_parsing, line):
    (words,) = commands(f"    {line}\n")
    with pytest.raises((AssertionError, SystemExit)):
        check(words, only_parsing)


# runs are planned in tests/test_planner.py
QUICK = [
    words[3:]
    for words in COMMANDS
    if words[1:4] == ["-m", "branchcore", "plan"] and "--model" not in words
]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_quick_commands_run(words, capsys):
    main(words)
    assert "per prompt" in capsys.readouterr().out


def test_links_of_the_readme_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 8
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link
