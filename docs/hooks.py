"""Pages of the documentation site that are made from the code, so that they cannot be out of date."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from shared.config import knobs, toml_scalar

PACKAGES = ("shared", "client", "server", "simulations", "consilium")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of the job's settings and of the public modules."""
    pages = {"job": job_page()} | {package: modules_page(package) for package in PACKAGES}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def job_page() -> str:
    """Every setting of a job: its default, what is allowed, what it means."""
    lines = ["# The settings of a job", "", "`consilium job --keys` prints the same list.", ""]
    table = None
    for key, item in knobs().items():
        head = key.rpartition(".")[0]
        if head != table:
            table = head
            lines += ["", f"## {f'[{head}]' if head else 'At the top of the file'}", ""]
            lines += ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
        meta = item.metadata
        low, high = meta["low"], meta["high"]
        allowed = ", ".join(f"`{choice}`" for choice in meta["choices"])
        if not allowed and low is not None:
            allowed = f"at least {low:.15g}" if high is None else f"{low:.15g} to {high:.15g}"
        cells = [f"`{key.rpartition('.')[2]}`", f"`{toml_scalar(item.default)}`", allowed, meta["help"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def modules_page(package: str) -> str:
    """What the docstrings of a package say, module by module."""
    lines = [f"# {package}/", ""]
    for module in pkgutil.walk_packages(import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            lines += [f"::: {module.name}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)
