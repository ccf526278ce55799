"""Write docs/reference/settings.md and cli.md from the code that they describe."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any

from segmamba import cli, config
from segmamba.data import plan

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def field_docs(cls: type) -> dict[str, str]:
    """Give the docstring under each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for item, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            docs[ast.unparse(item.target)] = " ".join(text.split())
    return docs


def table(cls: Any) -> str:
    docs = field_docs(cls)
    lines = ["| name | default | what |", "| --- | --- | --- |"]
    for item in dataclasses.fields(cls):
        if item.default is dataclasses.MISSING:
            default = "" if item.default_factory is dataclasses.MISSING else "see below"
        else:
            default = f"`{item.default}`"
        what = docs.get(item.name, "").replace("|", "or")
        lines.append(f"| `{item.name}` | {default} | {what} |")
    return "\n".join(lines) + "\n"


def settings() -> str:
    parts = [
        "# Settings\n\nWhat the sections of a `--config` file may hold "
        "([how to use one](../how-to/train.md#settings)).\n",
        "## network\n\nNone means: as the preset. Each preset has its own values; "
        "the defaults shown are those of `segmamba`.\n",
        table(config.NetworkConfig),
        "### network, for the other networks\n\nWith the presets "
        + ", ".join(f"`{name}`" for name in config.PEER_NAMES)
        + " the section holds these instead ([the networks](networks.md)).\n",
        table(config.PeerConfig),
        "## plan\n\nNormally decided from the data; see [the plan]"
        "(../concepts/plan.md).\n",
        table(plan.Plan),
        "## train\n",
        table(config.TrainConfig),
        *map(own_defaults, config.PRESET_TRAINING),
        "### train.augmentation\n",
        table(config.AugmentationConfig),
    ]
    return "\n".join(parts)


def own_defaults(preset: str) -> str:
    """A line on the training settings that a preset has for itself."""
    found = config.training_defaults(preset).items()
    pairs = ", ".join(f"`{key}` `{value}`" for key, value in found)
    return f"`{preset}` has defaults of its own: {pairs}.\n"


def commands() -> str:
    parts = [
        "# Command line\n\nEach command is a function of `segmamba.workflow` too. "
        "Exit codes: 0 all went well, 1 an error or a problem found, 2 a wrong option, "
        "130 interrupted. `segmamba COMMAND --help` shows the same; "
        "`segmamba --version` the version.\n"
    ]
    for name, cls in cli.COMMANDS.items():
        parts += [f"## segmamba {name}\n\n{inspect.getdoc(cls)}\n", table(cls)]
    return "\n".join(parts)


def main() -> None:
    (REFERENCE / "settings.md").write_text(settings(), encoding="utf-8")
    (REFERENCE / "cli.md").write_text(commands(), encoding="utf-8")


if __name__ == "__main__":
    main()
