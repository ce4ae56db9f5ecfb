"""Commands, imports and messages of the README and the site are those of the package."""

import ast
import importlib
import inspect
import re
import shlex
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import pytest
from lightning.pytorch import Trainer

from matex_pl import ClipModule, attribution, data
from matex_pl.arguments import import_all
from matex_pl.cli import main
from matex_pl.files import find_config
from matex_pl.training.lora import Lora

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Of LightningCLI, in the verbs of training.
COMMON = {"--config", "--ckpt_path", "--seed_everything", "--print_config", "--help", "--data.help", "--model.help"}
TRAINING = ("fit", "validate", "test", "predict")
# A reader's own files.
OWN = {"mine.yaml", "tuned/tuned.yaml", "FILE"}


def blocks(page, language):
    """Code blocks of a page in a language, also those within tabs and notes."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    return [dedent(code) for _, code in fence.findall(page.read_text(encoding="utf-8"))]


def commands(page):
    """Words of every `matex` command of a page."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=\S*|srun", words[0]):
                    words.pop(0)
                if words[:1] == ["matex"]:
                    yield words[1:]


def arguments(thing):
    """Arguments of a class's constructor, with those of its bases."""
    return {name for base in inspect.getmro(thing) for name in inspect.signature(base.__init__).parameters}


@pytest.fixture(scope="module")
def options_of():
    """The options that a command has, read from its help."""
    import_all(data)
    modules = [value for value in vars(data).values() if inspect.isclass(value)]
    of_data = {f"--data.{name}" for module in modules for name in arguments(module)}
    of_training = {f"--model.{name}" for name in arguments(ClipModule)}
    of_training |= {f"--model.lora.{name}" for name in arguments(Lora)}
    of_training |= {f"--trainer.{name}" for name in arguments(Trainer)} | {"--trainer.callbacks+"}
    import_all(attribution)
    methods = [value for value in vars(attribution).values() if inspect.isclass(value)]
    of_methods = {f"--method.{name}" for method in methods for name in arguments(method)}
    known = {}

    def find(words, capsys):
        verb = tuple(words[:2] if words[0] == "roar" else words[:1])
        if verb not in known:
            if verb[0] in TRAINING:
                known[verb] = COMMON | of_training | of_data
            else:
                with pytest.raises(SystemExit):
                    main([*verb, "--help"])
                known[verb] = (
                    set(re.findall(r"--[\w.+-]+", capsys.readouterr().out)) | of_data | of_methods | {"--help"}
                )
        return known[verb]

    return find


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_of_a_page_have_their_options(page, options_of, capsys):
    wrong = []
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        options = options_of(words, capsys)
        given = [word.split("=")[0] for word in words if word.startswith("--")]
        # Arguments of a callback follow its name: `--trainer.callbacks+=MapWriter --trainer.callbacks.root maps`.
        unknown = [name for name in given if re.sub(r"callbacks\..*", "callbacks", name) not in options]
        wrong += [f"{' '.join(words)}: {name}" for name in unknown]
        for name, value in pairwise(words):
            if name == "--config" and value not in OWN and find_config(value) is None:
                wrong.append(f"{' '.join(words)}: no config {value}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_imports_of_a_page_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("matex_pl"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_entries_of_the_api_reference_exist():
    entries = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)]
    assert len(entries) > 100
    missing = []
    for entry in entries:
        module, name = entry.rsplit(".", 1)
        if not hasattr(importlib.import_module(module), name):
            missing.append(entry)
    assert not missing


def test_messages_of_the_page_of_troubles_are_raised_somewhere():
    """Each heading there is a message, with `...` for its values."""
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    texts = []
    for path in [*(ROOT / "matex_pl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    assert len(messages) > 10
    for message in messages:
        parts = [part.strip(" .'") for part in message.split("...") if part.strip(" .'")]
        missing = [part for part in parts if not any(part in text for text in texts)]
        assert not missing, f"{message}: {missing}"
