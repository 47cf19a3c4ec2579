"""Texts, models and a tokenizer of ours, in the shapes in which other people's functions take them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from ..backend import Array
from ..model import Config, forward, frozen, init
from .frameworks import Framework, leading

V, EOS = 101, 2  # of all texts here: so many tokens that -100 may be looked up; 0 is free to be a pad
LAYOUTS = ("labels", "labels_shifted", "mask", "prompt_lengths", "model", "strings")


@dataclass
class Texts:
    """Prompts and responses, and their padded batch; each response ends in end-of-text."""

    prompts: list[list[int]]
    responses: list[list[int]]
    pad: int  # the id that fills up the batch
    spare: int = 1  # pads beside the longest text
    left: bool = False  # whether the pads stand before the texts
    ids: Array = field(init=False)  # (B, T)
    logits: Callable[[Any], Any] = field(init=False)  # ids of any rows -> logits, in the subject's framework

    def __post_init__(self) -> None:
        rows = [x + y for x, y in zip(self.prompts, self.responses)]
        T = max(map(len, rows)) + self.spare
        pads = [[self.pad] * (T - len(row)) for row in rows]
        self.ids = numpy.array([fill + row if self.left else row + fill for row, fill in zip(rows, pads)])

    @property
    def prompt_lengths(self) -> Array:
        return numpy.array([len(x) for x in self.prompts])

    @property
    def lengths(self) -> Array:
        return self.prompt_lengths + [len(y) for y in self.responses]

    @property
    def starts(self) -> Array:
        """The place of each text's first token."""
        return (self.ids.shape[1] - self.lengths) * self.left

    @property
    def rows(self) -> list[list[int]]:
        """Each text with the pads that follow it."""
        return [row[start:].tolist() for row, start in zip(self.ids, self.starts)]

    @property
    def mask(self) -> Array:
        """1 at the tokens of the responses."""
        places = numpy.arange(self.ids.shape[1]) - self.starts[:, None]
        return ((places >= self.prompt_lengths[:, None]) & (places < self.lengths[:, None])).astype("int64")

    @property
    def labels(self) -> Array:
        """The token at each place of a response, -100 elsewhere."""
        return numpy.where(self.mask == 1, self.ids, -100)

    @property
    def prompt_ids(self) -> list[list[int]]:
        return self.prompts

    @property
    def response_ids(self) -> list[list[int]]:
        return self.responses


def random_texts(
    rng: numpy.random.Generator, sizes: Sequence[tuple[int, int]], pad: int, spare: int = 1, left: bool = False
) -> Texts:
    """Texts of (prompt, response) lengths; no token occurs twice in one, and the last is end-of-text."""
    prompts, responses = [], []
    for n, m in sizes:
        tokens = distinct(rng, n + m - 1)
        prompts.append(tokens[:n])
        responses.append([*tokens[n:], EOS])
    return Texts(prompts, responses, pad, spare, left)


def distinct(rng: numpy.random.Generator, count: int, vocabulary: int = V) -> list[int]:
    """Different tokens, none of them end-of-text nor an id that pads have."""
    return (EOS + 1 + rng.permutation(vocabulary - EOS - 2))[:count].tolist()


class Model:
    """Logits that depend on the whole text up to each place, kept call by call."""

    def __init__(
        self, framework: Framework, seed: int, scale: float = 1.5, dtype: str = "float64", returns: Any = None,
        vocabulary: int = V,
    ):  # fmt: skip
        self.framework, self.seed, self.scale, self.dtype = framework, seed, scale, dtype
        self.vocabulary = vocabulary
        self.returns = returns or RETURNS[0]  # what `module` makes of logits and loss
        self.known: dict[int, Array] = {}
        self.calls: list[tuple[Array, Array, Any]] = []  # ids (B, T), logits (B, T, V) in NumPy and in the framework
        self.moved: list[Array] | None = None  # logits to return in place of the model's own, call by call
        self.leaves: list[Any] | None = None  # the same, in the framework

    def values(self, ids: Array) -> Array:
        """The logits of each place, (B, T) -> (B, T, V)."""
        made = numpy.empty((*ids.shape, self.vocabulary))
        for b, row in enumerate(ids.tolist()):
            key = self.seed
            for t, token in enumerate(row):
                key = (key * 1_000_003 + token + 1) % 2**61  # of the text so far
                if key not in self.known:
                    self.known[key] = numpy.random.default_rng(key).normal(size=self.vocabulary) * self.scale
                made[b, t] = self.known[key]
        return made

    def __call__(self, ids: Any = None, *rest: Any, **words: Any) -> Any:
        ids = next(iter(words.values())) if ids is None else ids
        host = numpy.asarray(self.framework.host(ids)).astype("int64")
        number = len(self.calls)
        if self.leaves is not None:
            logits = self.leaves[number]
        else:
            values = self.values(host) if self.moved is None else self.moved[number]
            logits = self.framework.array(values, self.dtype)
            if hasattr(logits, "requires_grad_"):
                logits.requires_grad_()
        shaped = self.framework.host(logits) if self.leaves is None else numpy.empty(0)
        self.calls.append((host, shaped, logits))
        return logits


class Enumerable(Model):
    """A transformer of this package over a few of the tokens: the others have probability 0, and every text is short.

    `theory.exact` numbers these tokens 0, 1, ...; its end-of-text is EOS.
    """

    tokens = (EOS, EOS + 1, EOS + 2)

    def __init__(self, framework: Framework, returns: Any):
        super().__init__(framework, 0, returns=returns)
        self.config = Config(len(self.tokens), 12, 8, 2, 1)
        self.params = frozen(init(self.config, numpy.random.default_rng(0), "float64"))
        for p in self.params.values():
            p.data *= 8.0  # a fresh model is nearly uniform

    def values(self, ids: Array) -> Array:
        made = numpy.full((*ids.shape, V), -1e4)
        own = (ids[..., None] == self.tokens).argmax(axis=-1)  # any other id stands for end-of-text: it is a pad
        made[..., self.tokens] = forward(self.params, self.config, own).data
        return made


class NeverSeen(LookupError):
    """A text that a model should have been called with."""


def located(text: list[int], model: Model) -> tuple[int, int, int]:
    """The call, the row and the place at which a text begins, with or without its last token."""
    for length in range(len(text), max(0, len(text) - 3), -1):
        for number, (ids, _, _) in enumerate(model.calls):
            for b, row in enumerate(ids.tolist()):
                for start in range(len(row) - length + 1):
                    if row[start : start + length] == text[:length]:
                        return number, b, start
    raise NeverSeen(f"the model was never called with a text, prompt and response, whole and in order: {text}")


def arguments_of(layout: Any, texts: Texts, model: Model) -> Callable[[Any], Any]:
    """How a subject of a layout is called."""
    framework, array = model.framework, model.framework.array
    if callable(layout):
        texts.logits = model

        def adapted(fn: Any) -> Any:
            given = layout(texts)
            positional, words = given if isinstance(given, tuple) and isinstance(given[-1], dict) else (given, {})
            return fn(*positional, **words)

        return adapted
    if layout in ("model", "strings"):

        def one_by_one(fn: Any) -> Any:
            return stacked(framework, [fn(*call) for call in of_models(layout, texts, model)])

        return one_by_one
    ids, labels, mask = array(texts.ids), array(texts.labels), array(texts.mask)
    if layout == "labels":
        return lambda fn: fn(model(ids), labels)
    if layout == "labels_shifted":
        return lambda fn: fn(model(ids)[:, :-1], array(texts.labels[:, 1:]))
    if layout == "mask":
        return lambda fn: fn(model(ids), ids, mask)
    if layout == "prompt_lengths":
        return lambda fn: fn(model(ids), ids, array(texts.prompt_lengths), array(texts.lengths))
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or a function, not {layout!r}")


def of_models(layout: str, texts: Texts, model: Model) -> list[tuple[Any, ...]]:
    """The arguments of one call for each text."""
    array = model.framework.array
    if layout == "model":
        body = module(model)
        return [(body, array([x]), array([y])) for x, y in zip(texts.prompts, texts.responses)]
    words = [chr(0x4E00 + i) for i in range(V)]  # letters without upper case, none of them white space
    tokenizer = Characters(words, model.framework)
    model.returns = Output
    body, spelled = module(model), tokenizer.decode
    return [(body, tokenizer, spelled(x), spelled(y[:-1])) for x, y in zip(texts.prompts, texts.responses)]


class Output:
    """What a model of Hugging Face returns, as far as a scorer needs it."""

    def __init__(self, logits: Any, loss: Any):
        self.logits, self.loss = logits, loss

    def __getitem__(self, key: Any) -> Any:
        if key not in (0, "logits"):
            raise IndexError(key)
        return self.logits


def bare(logits: Any, loss: Any) -> Any:
    return logits


def pair(logits: Any, loss: Any) -> Any:
    return logits, loss


RETURNS: tuple[Callable[[Any, Any], Any], ...] = (bare, Output, pair)


def settle(call: Callable[[], Any], models: Sequence[Model]) -> None:
    """Find what a subject takes for a model's output: logits, an object that has `.logits`, or (logits, loss)."""
    failure = None
    for returns in RETURNS:
        for model in models:
            model.returns = returns
        try:
            call()
            return
        except Exception as error:  # whatever somebody's code raises
            failure = failure or error
    assert failure is not None
    raise failure


def module(model: Model) -> Any:
    """The model as a torch.nn.Module in PyTorch, else as a function."""

    def call(ids: Any = None, *rest: Any, **words: Any) -> Any:
        logits, loss = model(words.pop("input_ids", None) if ids is None else ids), None
        if model.framework.name == "torch" and words.get("labels") is not None:  # the mean, -100 left out
            pairs = logits[:, :-1].reshape(-1, model.vocabulary), words["labels"][:, 1:].reshape(-1)
            loss = model.framework.xp.nn.functional.cross_entropy(*pairs)
        return model.returns(logits, loss)

    if model.framework.name != "torch":
        return call
    torch: Any = model.framework.xp

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.device = torch.device("cpu")

        def forward(self, *ids: Any, **words: Any) -> Any:
            return call(*ids, **words)

    return Module()


class Characters:
    """A tokenizer of characters with the call of Hugging Face's."""

    def __init__(self, words: list[str], framework: Framework):
        self.words, self.framework = words, framework
        self.eos_token, self.pad_token = words[EOS], words[EOS]
        self.eos_token_id = self.pad_token_id = EOS

    def encode(self, text: str, add_special_tokens: bool = True, return_tensors: Any = None) -> Any:
        ids = [self.words.index(letter) for letter in text]
        return self.framework.array([ids]) if return_tensors else ids

    def __call__(self, text: Any, return_tensors: Any = None, **options: Any) -> Any:
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        longest = max(map(len, rows))
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        rows = [row + [EOS] * (longest - len(row)) for row in rows]
        if return_tensors:
            return Encoding(input_ids=self.framework.array(rows), attention_mask=self.framework.array(mask))
        first = isinstance(text, str)
        return Encoding(input_ids=rows[0] if first else rows, attention_mask=mask[0] if first else mask)

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(self.words[int(i)] for i in ids)


class Encoding(dict[str, Any]):
    """Entries that are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, *device: Any) -> "Encoding":
        return self


def stacked(framework: Framework, scores: list[Any]) -> Any:
    """Scores of single texts as one array."""
    xp = framework.xp
    make = framework.host if framework.name == "numpy" else getattr(xp, "as_tensor", xp.asarray)
    scores = [numpy.float64(score) if isinstance(score, float) else score for score in map(leading, scores)]
    return xp.stack([make(score).reshape(-1)[0] for score in scores])
