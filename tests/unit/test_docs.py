"""README, its pages and the golden configs say what is so: commands, settings and names exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

import icce_ray
from icce_ray import cli
from icce_ray import config as configs
from icce_ray.config import backbones
from icce_ray.core.evaluation import labelfree
from icce_ray.pipeline import num_classes
from icce_ray.sweeps import space as spaces

GOLDEN = ("quickstart", "fashion-mnist", "cifar10", "cifar100", "stl10", "imagenet")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
KEYS = {key for key, *_ in configs.describe()}
# predict's own argument; options of an S3 address
NOT_SETTINGS = {"out", "endpoint_override", "scheme"}
MADE_BY_A_SWEEP = "runs/fashion-mnist/sweeps/ensemble/best.yaml"
WORDS = 6  # of a sentence that may not stand twice
LINES_OF_README = 115  # about two screens; what is more goes to a page in .github/docs


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


@pytest.fixture(scope="module")
def pages(repository: Path) -> dict[str, str]:
    """README and the pages of .github/docs, by name."""
    paths = (repository / "README.md", *sorted((repository / ".github" / "docs").glob("*.md")))
    return {path.stem: path.read_text() for path in paths}


@pytest.fixture(scope="module")
def docs(pages: dict[str, str]) -> str:
    """The same as one text."""
    return "\n".join(pages.values())


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of each command in the bash blocks; comments and `uv run` dropped."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                yield words[2:] if words[:2] == ["uv", "run"] else words


def chain_arguments(words: list[str]) -> list[str] | None:
    """Arguments of `icce-ray run`, given directly or through `ray job submit`; else None."""
    if words[:2] == ["icce-ray", "run"]:
        return words[2:]
    if "jobs/pipeline.py" in words:
        return words[words.index("jobs/pipeline.py") + 1 :]
    return None


# --- README and its pages ------------------------------------------------------------------------


def test_readme_is_short_and_leads_to_every_page(readme: str, pages: dict[str, str]) -> None:
    assert len(readme.splitlines()) <= LINES_OF_README
    linked = set(re.findall(r"\]\(\.github/docs/(\w+)\.md[)#]", readme))
    assert linked == set(pages) - {"README"}


def test_no_sentence_stands_twice(repository: Path) -> None:
    """A subject has one page: elsewhere is a link."""
    seen: dict[str, str] = {}
    twice = []
    for page in pages_of(repository):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        plain = re.sub(r"^[|#].*$", "\n", prose, flags=re.MULTILINE)  # tables, headings
        for sentence in re.split(r"(?<=[.:;])\s+|\n\s*\n|\n(?=- )", plain):
            words = re.findall(r"[\w.=-]+", sentence.lower())
            if len(words) >= WORDS:
                key = " ".join(words)
                twice += [f"{seen[key]}, {page.name}: {sentence}"] if key in seen else []
                seen[key] = page.name
    assert len(seen) > 200
    assert not twice, "\n".join(twice)


def test_the_two_commands_open_readme(readme: str) -> None:
    first = [" ".join(words) for words in command_lines(readme)][:2]
    assert first == ["icce-ray run quickstart", "pytest"]
    assert "pip install uv" in readme[: readme.index("uv run icce-ray run quickstart")]


def test_every_command_and_option_exists(docs: str) -> None:
    used = re.findall(r"icce-ray ((?:[a-z]+)(?: [^`\n|]*)?)", docs)
    assert {text.split()[0] for text in used} == set(COMMANDS)
    known = {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    inline = re.findall(r"`(--[a-z-]+)[^`]*`", docs)
    assert {"--plan", "--from", "--until", "--overwrite"} <= set(inline)
    assert set(inline) <= known


def test_run_commands_resolve(docs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, mine, space = blocks(docs, "yaml")
    tree = {**yaml.safe_load(mine), **yaml.safe_load(two), "data": {"path": "photos"}}
    assert len(configs.load(tree).backbone) == 2
    assert spaces.parse(yaml.safe_load(space)).trials == 30
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(mine)
    found = [arguments for words in command_lines(docs) if (arguments := chain_arguments(words))]
    found = [arguments for arguments in found if arguments[0] != MADE_BY_A_SWEEP]
    assert len(found) >= 10
    Path("photos").mkdir()
    for file in ("photos.parquet", "features.npy", "list.csv"):
        Path(file).touch()
    resolved: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(num_classes, "resolve", lambda *given, **_: resolved.append(given))
    for arguments in found:
        with pytest.raises(SystemExit):
            cli.main(["run", *arguments])
    assert len(resolved) == len(found)
    for name, overrides in resolved:
        given = configs.merge(name, overrides)["num_classes"]
        for number in filter(None, configs.parse_range(given) or [given]):
            assert configs.load(name, [*overrides, f"num_classes={number}"]).num_classes == number


def test_run_directories_of_the_examples_differ(docs: str) -> None:
    """Two examples in one run directory would end in an error about other settings."""
    seen = [a for words in command_lines(docs) if (a := chain_arguments(words))]
    mine = [
        next((word for word in arguments if word.startswith("run_dir=")), "default")
        for arguments in seen
        if arguments[0] == "mine.yaml"
    ]
    assert len(mine) > 1
    assert len(set(mine)) == len(mine)


def test_settings_named_exist(docs: str) -> None:
    named = set(re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)*)=", "\n".join(_code(docs))))
    assert len(named) > 10
    assert named - NOT_SETTINGS - _python_names(docs) <= KEYS
    dotted = set(
        re.findall(r"`((?:embed|neighbors|heads|consensus|classifier|ray)\.[a-z_.]+)`", docs)
    )
    assert len(dotted) > 4
    assert dotted <= KEYS


def _code(text: str) -> list[str]:
    return blocks(text, "bash") + re.findall(r"`([^`\n]+)`", text)


def _python_names(text: str) -> set[str]:
    return set(re.findall(r"(\w+)=", "\n".join(blocks(text, "python"))))


def test_short_names_of_backbones_are_those_there_are(pages: dict[str, str]) -> None:
    data = " ".join(pages["data"].split())
    listed = data[data.index("takes a short name (") :].split(")", maxsplit=1)[0]
    assert re.findall(r"`([\w-]+)`", listed) == list(backbones.SHORT)


def test_golden_configs_named_are_those_there_are(pages: dict[str, str]) -> None:
    listed = pages["data"][pages["data"].index("Golden configs:") :].split("\n\n", maxsplit=1)[0]
    assert tuple(re.findall(r"`([\w-]+)`", listed)) == GOLDEN


def test_python_examples_name_what_exists(docs: str) -> None:
    examples = blocks(docs, "python")
    assert len(examples) >= 4
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "icce_ray":
                assert hasattr(icce_ray, node.attr), f"icce_ray.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("icce_ray."):
                function = getattr(icce_ray, ast.unparse(node.func).removeprefix("icce_ray."))
                named = {keyword.arg or "": None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **named)  # else TypeError


def test_output_tree_is_that_of_the_stages(pages: dict[str, str]) -> None:
    from icce_ray.pipeline import STAGES

    tree = next(block for block in blocks(pages["results"], "") if block.startswith("RUN/"))
    assert re.findall(r"^  (\w+)/", tree, re.MULTILINE) == [stage.folder for stage in STAGES]


def test_stages_explained_are_those_there_are(pages: dict[str, str]) -> None:
    from icce_ray.pipeline import STAGES

    steps = re.findall(r"^\d+\. ([^\n:]*)", pages["method"], re.MULTILINE)
    named = [name for step in steps for name in re.findall(r"\*\*(\w+)\*\*", step)]
    assert named == [stage.name for stage in STAGES]


def test_columns_of_the_labels_are_those_there_are(pages: dict[str, str]) -> None:
    from icce_ray.rundir.schemas import LABELS_SCHEMA

    section = pages["results"].split("## Labels\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == LABELS_SCHEMA.names


def test_scores_explained_are_those_there_are(pages: dict[str, str]) -> None:
    section = pages["search"].split("## Scores\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(labelfree.SCORES)


def test_extras_listed_are_those_there_are(repository: Path, pages: dict[str, str]) -> None:
    text = (repository / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    rows = re.findall(r"^\| (`.*?) \|", pages["install"], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(
        re.findall(r"^(\w+) = ", section, re.MULTILINE)
    )


def pages_of(repository: Path) -> list[Path]:
    """All pages of the repository."""
    found = [*repository.glob("*.md"), *(repository / ".github").rglob("*.md")]
    return [*found, *(repository / "jobs").rglob("*.md")]


def test_links_lead_somewhere(repository: Path) -> None:
    for page in pages_of(repository):
        targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        assert targets, page
        for target in targets:
            path, _, section = target.partition("#")
            where = page.parent / path if path else page
            assert target.startswith("https://") or where.exists(), f"{page}: {target}"
            if section and not target.startswith("https://"):
                assert section in sections(where), f"{page}: {target}"


def sections(page: Path) -> set[str]:
    """Names by which links reach the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_nothing_is_left_to_fill_in(repository: Path) -> None:
    texts = [path.read_text() for path in pages_of(repository)]
    texts += [*(path.read_text() for path in configs.golden_configs().values())]
    assert not [found for text in texts for found in re.findall(r"@@\w+@@", text)]


def test_no_path_of_one_machine(docs: str) -> None:
    assert not re.findall(r"(?<![\w.~])/(?:home|root|tmp|work|usr|opt|mnt)/\S*", docs)


# --- golden configs ------------------------------------------------------------------------------


def test_golden_configs_are_complete() -> None:
    assert set(configs.golden_configs()) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_config_loads_and_keeps_the_defaults_of_the_method(name: str) -> None:
    config = configs.load(name)
    assert config.run_dir == f"runs/{name}"
    tree = yaml.safe_load(configs.golden_configs()[name].read_text())
    assert tree.get("consensus") is None
    assert set(tree.get("heads", {})) <= {"count", "num_workers"}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_config_opens_with_what_a_reader_needs(name: str) -> None:
    text = configs.golden_configs()[name].read_text()
    head = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in head.splitlines())
    title = head.splitlines()[0]
    assert 20 < len(title) < 92, "the first line is the description that `icce-ray config` lists"
    for label in ("paper:", "command:", "data:", "cost:", "published:", "measured:"):
        assert re.search(rf"^# {label} +\S", head, re.MULTILINE), label
    assert "https://arxiv.org/abs/2511.16213" in head
    for key in re.findall(r"([a-z_]+(?:\.[a-z_]+)+)=", head):
        assert key in KEYS, key


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_config_names_a_command_that_runs_it(name: str) -> None:
    text = configs.golden_configs()[name].read_text().replace("\\\n#", " ")
    assert re.search(rf"(icce-ray run|jobs/pipeline\.py) {name}\b", text)
    for arguments in re.findall(rf"(?:icce-ray run|jobs/pipeline\.py) ({name}[^\n]*)", text):
        first, *overrides = shlex.split(arguments)
        configs.load(first, overrides)


@pytest.mark.parametrize("name", [n for n in GOLDEN if n not in ("quickstart", "imagenet")])
def test_public_data_sets_can_be_written_where_the_config_says(name: str) -> None:
    from icce_ray.data import datasets

    data = configs.load(name).data
    assert data.dataset == name and data.path
    datasets.check(data.dataset, data.path)


# --- words ---------------------------------------------------------------------------------------

# Words that the docs and the messages once used in a sense of their own, and what to say instead.
FORBIDDEN = {
    r"go(?:es)? on (?:from|after|with)|gone on with": "resume",
    r"take (?:it )?in turn|takes? in turn": "cycle through",
    r"\btold\b": "report, notify",
    r"\bso many of\b|of so many\b": "that many",
    r"\bprint_\b": "fingerprint",
}


def texts(repository: Path) -> Iterator[Path]:
    """Pages, golden configs, templates, and the code with its messages and comments."""
    yield from pages_of(repository)
    for folder in ("jobs", "icce_ray"):
        for kind in ("*.yaml", "*.j2", "*.py"):
            yield from (repository / folder).rglob(kind)


def test_old_words_do_not_come_back(repository: Path) -> None:
    used = []
    for path in texts(repository):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            place = f"{path.relative_to(repository).as_posix()}:{number}"
            for pattern, instead in FORBIDDEN.items():
                found = re.search(pattern, line, re.I)
                used += [f"{place}: {found[0]!r}, say: {instead}"] if found else []
    assert not used, "\n".join(used)


# --- CI ------------------------------------------------------------------------------------------


def test_ci_runs_what_contributors_read(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    ran = [line.strip() for line in script.read_text().splitlines() if line.startswith("uv run ")]
    page = (repository / ".github" / "CONTRIBUTING.md").read_text()
    checks = page[page.index("## Checks") :]
    said = [f"uv run {' '.join(words)}" for words in command_lines(checks)]
    assert ran[-1] == "uv run pytest", "its closing line comes last"
    assert set(ran) <= set(said)
