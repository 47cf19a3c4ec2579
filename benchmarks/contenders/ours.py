"""The contenders of minidpo."""

import contextlib
import functools

import numpy

from benchmarks.workload import BETA, LEARNING_RATE, beginnings, endless
from minidpo import Tensor, losses, model, optim, preferences, scoring, training
from minidpo.backend import device_module, to_host
from minidpo.run import workers


def versions():
    return {"numpy": numpy.__version__}


class Padded(workers.Workers):
    """The plain algorithm: padded micro-batches; each step scores the reference again. Workers share the pairs."""

    device = "cpu"

    def __init__(self, work):
        self.work = work
        self.policy = {name: Tensor(x, requires_grad=True) for name, x in work.policy.items()}
        self.policy = model.placed(self.policy, self.device)
        self.reference = model.placed({name: Tensor(x) for name, x in work.reference.items()}, self.device)
        self.optimizer = optim.AdamW(self.policy, LEARNING_RATE, weight_decay=0.0)
        super().__init__(workers.worker_count(self.policy))  # forked at the first step
        workers.keep_memory()
        self.prepare()

    def prepare(self):
        """Compute once what no step repeats."""

    def share(self, policy, pairs):
        total = 0.0
        rows = [2 * max(len(x) + len(w), len(x) + len(l)) for x, w, l in pairs]
        for part in training.micro_batches(rows, None, policy):
            refs = [logp.data for logp in scoring.padded_logprobs(self.reference, self.work.config, pairs[part])]
            out = losses.dpo_loss(*scoring.padded_logprobs(policy, self.work.config, pairs[part]), *refs, BETA)
            loss = out.loss * (len(pairs[part]) / len(self.work.pairs))
            loss.backward()
            total += loss.item()
        return total

    def loss(self):
        self.optimizer.zero_grad()
        pairs = self.work.pairs
        parts = workers.shares([len(x) + max(len(w), len(l)) for x, w, l in pairs], len(self))
        return sum(self.ask(self.policy, [[pairs[i] for i in part] for part in parts]))

    def gradient(self):
        return self.loss(), {name: to_host(p.grad) for name, p in self.policy.items()}

    def step(self):
        self.loss()
        self.optimizer.step()


class Best(Padded):
    """The step of `minidpo dpo`: a cached reference, shared prefixes, no padding. Workers share the pairs."""

    share = workers.Workers.share

    def prepare(self):
        refs = training.reference_logprobs(self.reference, self.work.config, self.work.pairs)
        self.batch, self.reference = preferences.collate(self.work.pairs, *refs), {}

    def loss(self):
        with still(self.optimizer):
            return self.step()["loss"]

    def step(self):
        return training.dpo_training_step(
            self.policy, {}, self.work.config, self.optimizer, self.batch, BETA, sweep=self.dpo_sweep
        )


@contextlib.contextmanager
def still(optimizer):
    """Within the block, steps leave gradients but move no weight."""
    step, optimizer.step = optimizer.step, lambda: None
    yield
    optimizer.step = step


class OnGPU:
    """A mixin, named first: arrays are CuPy's, and a turn ends when the GPU has finished."""

    device = "cuda"

    def finish(self):
        device_module("cuda").cuda.Device().synchronize()

    def memory(self):
        return device_module("cuda").get_default_memory_pool().total_bytes() / 2**20


class BestOnGPU(OnGPU, Best):
    """The step of `minidpo dpo --device cuda`: a cached reference, padded texts in one block."""


class Products(Best):
    """A floor: the matrix products of `Best` alone, forward and backward, on arrays that stay in a cache.

    Products with ones, which are sums, are left out.
    """

    gradient = None  # there is no loss to compare

    def prepare(self):
        self.arrays = functools.cache(numpy.random.default_rng(0).random)  # one of each shape

    def share(self, policy, pairs):
        for part in training.micro_batches([sum(map(len, pair)) for pair in pairs], None, policy):
            for times, (n, k, m) in products(self.work.config, pairs[part]):
                x, y, g = (self.arrays(shape, "float32") for shape in ((n, k), (k, m), (n, m)))
                for _ in range(times):
                    x @ y, g @ y.T, x.T @ g

    def step(self):
        pairs = self.work.pairs
        parts = workers.shares([sum(map(len, pair)) for pair in pairs], len(self))
        self.ask(self.policy, [[pairs[i] for i in part] for part in parts])


def products(config, pairs):
    """The matrix products of a forward pass, (times, (n, k, m)) for (n, k) @ (k, m); `speed.flops` counts the same."""
    C, H, layers = config.n_embd, config.n_head, config.n_layer
    rows = sum(len(x) + len(w) - 1 + len(l) - 1 for x, w, l in pairs)
    predicting = sum(len(w) - 1 + len(l) - 1 + 1 for _, w, l in pairs)
    shapes = [(layers, (rows, C, 3 * C)), (1, (predicting, C, config.vocab_size))]
    for times, N in ((layers - 1, rows), (1, predicting)):
        shapes += [(times, (N, C, C)), (times, (N, C, 4 * C)), (times, (N, 4 * C, C))]
    for x, w, l in pairs:
        X = len(x)
        for times, T, S in (
            (layers - 1, X - 1, X - 1),
            (layers, len(w) - 1, X + len(w) - 1),
            (layers, len(l), X + len(l) - 1),
        ):
            shapes += [(times * H, (T, C // H, S)), (times * H, (T, S, C // H))]
    return shapes


class Sampling:
    """Sample one text, token by token, with a key-value cache."""

    texts = 1

    def __init__(self, work):
        self.work = work
        self.params = model.frozen({name: Tensor(x) for name, x in endless(work.policy).items()})
        self.prompts = beginnings(work, self.texts)
        self.workers = workers.Workers(min(self.texts, workers.worker_count(self.params)))  # forked at the first step
        workers.keep_memory()  # as the commands do

    def step(self):
        rngs = [numpy.random.default_rng([0, b]) for b in range(self.texts)]
        config = self.work.config
        samples = self.workers.generate(self.params, config, self.prompts, rngs, config.n_positions)
        return max(map(len, samples.responses))


class ManyTexts(Sampling):
    """Sample 32 texts at once."""

    texts = 32


CONTENDERS = {
    "step": {"minidpo, padded": Padded, "minidpo": Best, "minidpo, products alone": Products},
    "sampling": {"minidpo": Sampling},
    "sampling 32": {"minidpo": ManyTexts},
    "gpu": {"minidpo": BestOnGPU},
}
