"""Where a model comes from: data -> base -> SFT -> DPO, every link with its hash.

`run.json` has hashes of the data and the weights that a run begins with, `result.json` of what it ends with. A hash
shows an accident or an edit. It does not show a forger who writes all of them anew: compare with a card printed before.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..run import checkpoint, report
from ..run.files import CheckpointError, json_object, read_bytes, read_text, write_whole
from ..run.folder import RESULT, description_sum, json_lines, run_description, step_name
from ..run.reference import fingerprint
from ..tokenizer import printable

FILES, MODELS = ("data", "held-out-data"), ("init", "reference")  # options that name what a run begins with
TRAINS = ("pretrain", "sft", "dpo")
ENDS_WITH = (  # and what is in model/; the report is drawn anew
    "run.json", "tokenizer.json", "set_aside.jsonl", "prompts.json", "reference.safetensors", "metrics.jsonl",
    "samples.jsonl", "test.json", "latest",
)  # fmt: skip
RECIPE = ("template", "scored", "clip", "optimizer", "samples")
MOST_LINKS = 100
NOT_RECORDED = "not recorded"


class BrokenLinkError(CheckpointError):
    """A link of the chain no longer holds; the message names it."""


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def weights_sum(folder: Path) -> str:
    """The fingerprint of a checkpoint's weights."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: is not there")
    return fingerprint(checkpoint.load(folder).params)


def seal(run: Path) -> None:
    """Write `result.json`, the hashes of what a run has ended with. It is written once."""
    if not os.path.lexists(run / "result.json"):
        paths = [run / name for name in ENDS_WITH if (run / name).exists()] + sorted((run / RESULT).iterdir())
        files = {path.relative_to(run).as_posix(): file_sum(path) for path in paths}
        content = {"model": weights_sum(run / RESULT), "files": files}
        document = json.dumps({**content, "sha256": description_sum(content)}, indent=2)
        write_whole(run / "result.json", (document + "\n").encode())


class Link(NamedTuple):
    """A run, or a model that is not known to be from one."""

    folder: Path
    description: Mapping[str, Any]  # its run.json; empty without one

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, str]:
        """The options of its command."""
        words = self.description.get("arguments", [])[1:]
        return dict(word.removeprefix("--").partition("=")[::2] for word in words)

    def inputs(self, options: Sequence[str]) -> Iterator[tuple[str, Path, Any]]:
        """Those of the options that it has, their paths as they are found now, and hashes, None if not recorded."""
        for option in options:
            if option in self.settings:
                recorded = self.description.get(f"{option.replace('-', '_')}_sha256")
                yield option, place(self.settings[option], self.folder), recorded

    def sealed(self) -> dict[str, Any] | None:
        """Its result.json; None where an older version wrote none."""
        path = self.folder / "result.json"
        if not os.path.lexists(path) and "recipe" not in self.description:
            return None
        content = json_object(read_text(path), f"{path}:")
        if content.get("sha256") != description_sum(content) or not isinstance(content.get("files"), dict):
            raise CheckpointError(f"{path}: does not match its SHA-256: it has been changed since the run ended")
        return content

    def weights(self) -> str:
        """The hash of its weights, or why there is none."""
        if self.description and checkpoint.latest(self.folder) != self.folder / RESULT:
            return "not finished"
        sealed = self.sealed() if self.description else None
        return str(sealed.get("model")) if sealed else weights_sum(self.folder) if self.folder.exists() else "not there"


def run_of(path: Path) -> Path:
    """The run that a path is the result or a checkpoint of; otherwise the path itself."""
    inside = re.fullmatch(r"model|step-\d{6,}", path.name) and (path.parent / "run.json").exists()
    return path.parent if inside else path


def place(recorded: str, run: Path) -> Path:
    """Where a recorded path is: there or, if it has moved with the run, beside the run or beside the folder above."""
    path = Path(recorded)
    if not os.path.lexists(path):
        for folder in run.resolve().parents[:2]:
            for start in range(1, len(path.parts)):
                if os.path.lexists(moved := folder.joinpath(*path.parts[start:])):
                    return moved
    return path


def chain(run: Path) -> list[Link]:
    """The runs and models that a run follows from, the first of them first, and the run itself last."""
    links: dict[Path, Link] = {}

    def visit(folder: Path, depth: int) -> None:
        key = folder.resolve()
        if depth > MOST_LINKS:
            raise CheckpointError(f"{folder}: follows from itself, or from more than {MOST_LINKS} runs")
        if key not in links:
            is_run = depth == 0 or os.path.lexists(folder / "run.json")
            link = Link(folder, run_description(folder) if is_run else {})
            if is_run and (name := link.description["arguments"][0]) not in TRAINS:
                raise CheckpointError(f"{folder}: {name!a} trains no model itself; name one of the runs in the folder")
            for _, model, _ in link.inputs(MODELS):
                visit(run_of(model), depth + 1)
            links[key] = link

    visit(run_of(run), 0)
    return list(links.values())


def run_sums(words: Sequence[str]) -> dict[str, str]:
    """The hash of the run.json behind each model that a command begins with, which makes the runs a chain."""
    link = Link(Path(), {"arguments": words})
    runs = {option: run_of(path) / "run.json" for option, path, _ in link.inputs(MODELS)}
    return {f"{option}_run_sha256": file_sum(path) for option, path in runs.items() if path.exists()}


def checks(links: Sequence[Link]) -> Iterator[tuple[str, Any, Callable[[], str]]]:
    """Every link's name, its recorded hash (None: not recorded), and a function that computes it again."""
    weights = functools.cache(weights_sum)
    for link in links:
        if not link.description:
            continue  # the run that begins with it has its hash
        folder = link.folder
        with named(f"{folder / 'result.json'}"):
            sealed = link.sealed()
        for option, path, recorded in link.inputs(FILES):
            yield f"{folder}: --{option} {path}", recorded, functools.partial(file_sum, path)
        for option, path, recorded in link.inputs(MODELS):
            yield f"{folder}: --{option} {path}", recorded, functools.partial(weights, path)
            if recorded := link.description.get(f"{option}_run_sha256"):
                run = run_of(path) / "run.json"
                yield f"{folder}: --{option} {run}", recorded, functools.partial(file_sum, run)
        if sealed is None:
            own = functools.partial(description_sum, link.description)
            yield f"{folder / 'run.json'}", link.description.get("sha256"), own
            yield f"{folder / 'result.json'}", None, str
            with named(f"{folder}: the result's weights"):
                if not checkpoint.load(folder).verified:
                    raise CheckpointError("the weights have lost their checksums")
        else:
            for name, recorded in sealed["files"].items():
                yield f"{folder / name}", recorded, functools.partial(file_sum, folder / name)
            yield f"{folder}: the result's weights", str(sealed.get("model")), functools.partial(weights, folder)
        with named(f"{folder / 'metrics.jsonl'}"):
            best = folder / step_name(report.best(json_lines(folder / "metrics.jsonl"))["step"])
        if best.exists():
            with named(f"{folder / RESULT}"):
                result = weights(folder / RESULT)
            yield f"{folder}: the result, which is {best.name}", result, functools.partial(weights, best)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Let what is raised name this link."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BrokenLinkError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def verified(run: Path) -> Iterator[str]:
    """Compute every hash of the chain again: a line for each that holds, and one for all.

    Raises BrokenLinkError for the first that does not hold. Each run.json is read before, from this run back.
    """
    held, missing = 0, []
    with named(str(run)):
        links = chain(run)
    for name, recorded, actual in checks(links):
        if recorded is None:
            missing.append(name)
            continue
        with named(name):
            if (found := actual()) != recorded:
                raise CheckpointError(f"its SHA-256 was {recorded}, and is {found}")
        held += 1
        yield f"{found[:12]}  {name}"
    yield from (f"{NOT_RECORDED}  {name}" for name in missing)
    yield f"every link holds: {held} hashes"


def code(text: object) -> str:
    """A text from anywhere as code in Markdown, which nothing in it can end."""
    return f"`{printable(str(text)).replace('`', chr(92) + 'x60').replace('|', chr(92) + 'x7c')}`"


def words(value: Any) -> str:
    """A JSON value in words; what is not a plain word is code."""
    if isinstance(value, dict):
        pairs = ((words(name), words(each), isinstance(each, dict)) for name, each in value.items())
        return ", ".join(f"{name} ({each})" if nested else f"{name} {each}" for name, each, nested in pairs)
    text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if re.fullmatch(r"-?[A-Za-z0-9]+([ _.-][A-Za-z0-9]+)*", text) else code(text)


def short(path: str | Path) -> str:
    """A path without what is above the run or the file, so that a card is the same wherever the chain is."""
    run, path = run_of(Path(path)), Path(path)
    return path.name if run == path else f"{run.name}/{path.name}"


def card(run: Path) -> str:
    """The chain behind a run as Markdown: a table of the links, and what is known of each."""
    links = chain(run)
    rows, sections = [], []
    for number, link in enumerate(links, 1):
        cells = [f"{number}. {code(link.name)}", words(link.description.get("arguments", ["unknown"])[0])]
        for options in (FILES, MODELS):
            inputs = (f"{code(short(path))} {words(str(recorded)[:12])}" for _, path, recorded in link.inputs(options))
            cells.append(", ".join(inputs) or "-")
        rows.append("| " + " | ".join([*cells, words(link.weights()[:12])]) + " |")
        sections.append("\n".join([f"## {number}. {code(link.name)}\n", *(f"- {a}: {b}" for a, b in facts(link))]))
    table = ["| link | made by | data | begins with | weights |", "|---|---|---|---|---|", *rows]
    return "\n\n".join([f"# Where {code(links[-1].name)} comes from", "\n".join(table), *sections]) + "\n"


def facts(link: Link) -> Iterator[tuple[str, str]]:
    """What is known of a link, by name."""
    description, settings = link.description, link.settings
    recipe = x if isinstance(x := description.get("recipe"), dict) else {}
    if description:
        command = ["minidpo"]
        for word in description["arguments"]:
            option, _, value = word.partition("=")
            command.append(f"{option}={short(value)}" if option[2:] in (*FILES, *MODELS) else word)
        yield "command", code(shlex.join(command))
        for option, path, recorded in link.inputs((*FILES, *MODELS)):
            sums = {"weights" if option in MODELS else "SHA-256": recorded or NOT_RECORDED}
            sums |= {"run.json": run} if (run := description.get(f"{option}_run_sha256")) else {}
            yield option, f"{code(short(path))}, {words(sums)}"
        yield "rows", words(description.get("counts", NOT_RECORDED))
        yield from ((name, words(settings[name])) for name in ("steps", "loss", "beta") if name in settings)
        yield from ((name, words(recipe.get(name, NOT_RECORDED))) for name in RECIPE)
        metrics = json_lines(link.folder / "metrics.jsonl")
        if any("eval_loss" in line for line in metrics):
            best = report.best(metrics)
            yield "best", words({title: best[key] for key, title in report.COLUMNS.items() if key in best})
            yield from (("**warning**", sentence) for sentence in report.warnings(metrics))
        if os.path.lexists(link.folder / "test.json"):
            yield "on the test rows", words(json_object(read_text(link.folder / "test.json"), "test.json:"))
        yield "environment", words(description["environment"])
    yield "weights", words(link.weights())
