"""minidpo itself."""

import contextlib

import numpy

from benchmarks.workload import BETA, LEARNING_RATE
from minidpo import Tensor, generation, losses, model, optim, preferences, scoring, training, workers


def versions():
    return {"numpy": numpy.__version__}


class Padded:
    """The plain algorithm: one padded batch, the reference scored again each step; pairs shared out to workers."""

    def __init__(self, work):
        self.work = work
        self.policy = {name: Tensor(x, requires_grad=True) for name, x in work.policy.items()}
        self.reference = {name: Tensor(x) for name, x in work.reference.items()}
        self.optimizer = optim.AdamW(self.policy, LEARNING_RATE, weight_decay=0.0)
        self.prepare()

    def prepare(self):
        self.workers = workers.Workers(self.policy, self.share_gradient, workers.worker_count(self.policy))

    def share_gradient(self, policy, pairs):
        refs = [logp.data for logp in scoring.padded_logprobs(self.reference, self.work.config, pairs)]
        out = losses.dpo_loss(*scoring.padded_logprobs(policy, self.work.config, pairs), *refs, BETA)
        loss = out.loss * (len(pairs) / len(self.work.pairs))
        loss.backward()
        return loss.item()

    def gradient(self):
        self.optimizer.zero_grad()
        pairs = self.work.pairs
        parts = workers.shares([len(x) + max(len(w), len(l)) for x, w, l in pairs], len(self.workers))
        loss = sum(self.workers([[pairs[i] for i in part] for part in parts]))
        return loss, {name: p.grad for name, p in self.policy.items()}

    def step(self):
        self.gradient()
        self.optimizer.step()


class Best(Padded):
    """What `minidpo dpo` does: cached reference, prefixes shared, nothing padded, pairs shared out to workers."""

    def prepare(self):
        refs = training.reference_logprobs(self.reference, self.work.config, self.work.pairs)
        self.batch = preferences.collate(self.work.pairs, *refs)
        gradient = training.pair_gradient(self.work.config, BETA)
        self.workers = workers.Workers(self.policy, gradient, workers.worker_count(self.policy))

    def gradient(self):
        with unmoved(self.optimizer):
            metrics = self.step()
        return metrics["loss"], {name: p.grad for name, p in self.policy.items()}

    def step(self):
        return training.dpo_training_step(
            self.policy, {}, self.work.config, self.optimizer, self.batch, BETA, workers=self.workers
        )


@contextlib.contextmanager
def unmoved(optimizer):
    """A step that leaves gradients behind and weights as they were."""
    step, optimizer.step = optimizer.step, lambda: None
    yield
    optimizer.step = step


class Sampling:
    """One text, token by token, with a cache of keys and values."""

    def __init__(self, work):
        self.work = work
        self.params = model.frozen({name: Tensor(x) for name, x in work.policy.items()})

    def step(self):
        T = self.work.config.n_positions
        prompt = self.work.pairs[0][0][: T // 4]
        drawn = generation.generate(
            self.params, self.work.config, [prompt], numpy.random.default_rng(0), T - len(prompt)
        )
        return len(drawn.responses[0])


CONTENDERS = {"step": {"minidpo, padded": Padded, "minidpo": Best}, "sampling": {"minidpo": Sampling}}
