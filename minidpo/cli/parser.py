"""The registry of commands, the command line made from their signatures, and `main`."""

import argparse
import difflib
import functools
import importlib
import inspect
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import numpy

from ..audit.gates import GateError
from ..backend import device_fault
from ..run.folder import way_on
from ..run.workers import keep_memory
from ..tokenizer import printable
from .options import Default, Option, OptionError

T = TypeVar("T")
GROUPS = {"learn": "see it work", "train": "make models", "look": "inspect models", "prove": "check the mathematics",
          "verify": "check what others made"}  # fmt: skip
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class Command(NamedTuple):
    """A registered command."""

    group: str
    function: Callable[..., Any]
    options: dict[str, Parameter]  # a parameter that has no Option is not on the command line


COMMANDS: dict[str, Command] = {}


def command(group: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Register a function as a command of its name, `import_` as import, and check its arguments however it is called.

    Its docstring is the help: the first line the summary, the rest the description. A parameter whose default is a
    NamedTuple is a bundle: callers give its fields, as if they were parameters, and the function gets the tuple.
    """

    def register(function: Callable[..., T]) -> Callable[..., T]:
        own = inspect.signature(function).parameters
        bundles = {name: p.default for name, p in own.items() if hasattr(p.default, "_fields")}
        flat = inspect.Signature(list(flattened(function)))
        options = {name: p for name, p in flat.parameters.items() if option(p)}

        @functools.wraps(function)
        def checked(*positional: Any, **keywords: Any) -> T:
            values = flat.bind(*positional, **keywords).arguments
            for name in values.keys() & options.keys():
                known = option(options[name])
                try:
                    if known and not (values[name] is None and options[name].default is None):
                        values[name] = known.value(values[name])
                except OptionError as error:
                    raise OptionError(f"{function.__name__}: {name}: {error}") from error
            for name, default in bundles.items():
                values[name] = default._replace(**{f: values.pop(f) for f in default._fields if f in values})
            with numpy.errstate(all="ignore"):  # a number that is not finite is an error with its own sentence
                return function(**values)

        checked.__dict__["__signature__"] = flat
        COMMANDS[function.__name__.rstrip("_")] = Command(group, checked, options)
        return checked

    return register


def flattened(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The parameters of a function, with those of its bundles, each annotated with its resolved type."""
    hints = get_type_hints(function, include_extras=True)
    for name, p in inspect.signature(function).parameters.items():
        fields = get_type_hints(type(p.default), include_extras=True) if hasattr(p.default, "_fields") else {}
        for field, hint in fields.items():
            yield Parameter(field, p.KEYWORD_ONLY, default=getattr(p.default, field), annotation=hint)
        if not fields:
            yield p.replace(annotation=hints[name])


def parts(hint: Any) -> list[Any]:
    """The types and annotations within a type hint, from the inside to the outside."""
    return [part for inner in get_args(hint) for part in parts(inner)] or [hint]


def option(p: Parameter) -> Option | None:
    """The Option in a parameter's annotation."""
    return next((part for part in parts(p.annotation) if isinstance(part, Option)), None)


def flagged(name: str) -> str:
    """The option of a parameter."""
    return f"--{name.replace('_', '-')}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """The name that is most like another one, as a question."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    text = " ".join((inspect.getdoc(COMMANDS[name].function) or "").partition("\n")[2].split())
    made = argparse.ArgumentParser(f"minidpo {name}", description=text)
    for each, p in COMMANDS[name].options.items():
        kinds, own = parts(p.annotation), option(p)
        assert own
        default = "" if p.default is None or p.default is False or p.default is p.empty else str(p.default)
        default = next((part.text for part in reversed(kinds) if isinstance(part, Default)), default)
        metavar = own.metavar or next((METAVARS[kind] for kind in kinds if kind in METAVARS), None)
        words: dict[str, Any] = {"type": own.check, "metavar": metavar, "nargs": "+" if own.several else None}
        if p.kind is not p.KEYWORD_ONLY and p.default is None:
            words["nargs"] = "?"
        if p.default is False:
            words = {"action": "store_true"}
        if p.kind is p.KEYWORD_ONLY:
            words |= {"required": True} if p.default is p.empty else {"default": p.default}
        flag = flagged(each) if p.kind is p.KEYWORD_ONLY else each
        made.add_argument(flag, help=own.help + (f" (default: {default})" if default else ""), **words)
    return made


def overview() -> argparse.ArgumentParser:
    """The parser of `minidpo --help` and `minidpo --version`."""
    text = ""
    for group, title in GROUPS.items():
        text += f"{group}: {title}\n"
        for name, known in COMMANDS.items():
            summary = (inspect.getdoc(known.function) or "").partition(".\n")[0].removesuffix(".")
            text += f"  {name:<14}{summary[0].lower()}{summary[1:]}\n" if known.group == group else ""
        text += "\n"
    text += "minidpo COMMAND --help explains the options of a command. CPU seconds there are of an AMD EPYC at\n"
    text += "2.4 GHz (Zen 3), shared by as many processes as NumPy has BLAS threads, at most 8."
    title = "Preference optimisation from scratch, every derivative in plain sight."
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("minidpo", "minidpo COMMAND [OPTIONS]", title, text, formatter_class=raw)
    version = importlib.import_module("minidpo").__version__
    made.add_argument("--version", action="version", version=f"minidpo {version}", help="show the version and exit")
    made.add_argument("command", metavar="COMMAND", help="one of the commands below")
    return made


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command that a command line names, and its arguments."""
    top = overview()
    name = top.parse_args(argv[:1]).command
    if name not in COMMANDS:
        top.error(f"unknown command {printable(name)}{suggestion(name, COMMANDS)}")
    own = parser(name)
    names = ["--help", *(flagged(each) for each, p in COMMANDS[name].options.items() if p.kind is p.KEYWORD_ONLY)]
    for word in itertools.takewhile(lambda word: word != "--", argv[1:]):
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in names:  # said before argparse asks for what is missing
            own.error(f"unknown option {printable(flag)}{suggestion(flag, names)}")
    return name, vars(own.parse_args(argv[1:]))


def arguments(name: str, values: Mapping[str, Any]) -> list[str]:
    """The command line that gives a command these values, with absolute paths and without --out."""
    flat = dict(values)
    for value in values.values():
        flat |= value._asdict() if hasattr(value, "_fields") else {}
    words = [name]
    for each, value in ((each, flat[each]) for each in COMMANDS[name].options if each != "out"):
        if value is not None and value is not False:
            word = value.resolve() if isinstance(value, Path) else getattr(value, "__name__", value)
            words.append(flagged(each) + ("" if value is True else f"={word}"))
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; what is wrong with its input is one sentence."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    name, values = parse(sys.argv[1:] if argv is None else argv)
    keep_memory()
    run = values.get("out", values.get("folder"))
    status, resumable = 2, True
    try:
        result = COMMANDS[name].function(**values)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if run is None:
            return 141  # as `head` expects of what it reads from
        fault, status = "the reader of its output closed the pipe", 141
    except KeyboardInterrupt:
        fault, status = "interrupted", 130
    except MemoryError as error:
        fault = f"not enough memory ({error}); a smaller model, a smaller batch or shorter lines may fit"
    except RuntimeError as error:
        if not device_fault(error):
            raise
        fault = str(error)
    except FloatingPointError as error:
        fault, status, resumable = str(error), 3, False
    except GateError as error:
        fault, status, resumable = str(error), 1, False
    except (OSError, ValueError) as error:
        fault, resumable = str(error), type(error) is OSError  # a full disk, a lost worker; a missing file is not one
        if isinstance(error, OSError) and error.filename:
            fault = f"{error.filename}: {error.strerror}"
    print(printable(f"minidpo {name}: {fault}{way_on(run) if resumable else ''}"), file=sys.stderr)
    return status
