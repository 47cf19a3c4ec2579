"""The plain algorithm in JAX, MyGrad and HIPS autograd, written once with the functions that all three have."""

import importlib
import importlib.metadata
import math

import numpy

from benchmarks.workload import BETA, LEARNING_RATE, padded


def forward(xp, params, config, inputs):
    """Logits of a batch padded on the right, where causal attention does not see the pads.  (B, T) -> (B, T, V)."""
    (B, T), C, H = inputs.shape, config.n_embd, config.n_head
    later = numpy.triu(numpy.full((T, T), -1e9, dtype="float32"), 1)

    def norm(x, name):
        c = x - xp.mean(x, axis=-1, keepdims=True)
        return (
            c / xp.sqrt(xp.mean(c * c, axis=-1, keepdims=True) + 1e-5) * params[f"{name}.weight"]
            + params[f"{name}.bias"]
        )

    def affine(x, name):
        return xp.matmul(x, params[f"{name}.weight"]) + params[f"{name}.bias"]

    x = params["wte.weight"][inputs] + params["wpe.weight"][:T]
    for i in range(config.n_layer):
        qkv = affine(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (
            xp.transpose(xp.reshape(qkv[:, :, j * C : (j + 1) * C], (B, T, H, C // H)), (0, 2, 1, 3)) for j in range(3)
        )
        s = xp.matmul(q * (C // H) ** -0.5, xp.transpose(k, (0, 1, 3, 2))) + later
        e = xp.exp(s - numpy_max(s))
        y = xp.matmul(e / xp.sum(e, axis=-1, keepdims=True), v)
        x = x + affine(xp.reshape(xp.transpose(y, (0, 2, 1, 3)), (B, T, C)), f"h.{i}.attn.c_proj")
        u = affine(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = 0.5 * u * (1 + xp.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * (u * u * u))))
        x = x + affine(y, f"h.{i}.mlp.c_proj")
    return xp.matmul(norm(x, "ln_f"), xp.transpose(params["wte.weight"]))


def numpy_max(s):
    """The largest score of each row, as a constant in HIPS autograd and MyGrad: softmax does not depend on it."""
    while hasattr(s, "_value"):  # a box of HIPS autograd
        s = s._value
    s = getattr(s, "data", s) if type(s).__module__.startswith("mygrad") else s
    return s.max(axis=-1, keepdims=True)


def logps(xp, params, config, inputs, targets, counts):
    """The log-probability of each response.  -> (2B,)."""
    (B, T), V = inputs.shape, config.vocab_size
    logits = forward(xp, params, config, inputs)
    shifted = logits - numpy_max(logits)
    logp = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
    flat = xp.reshape(logp, (B * T * V,))[numpy.arange(B * T) * V + targets.reshape(-1)]
    return xp.sum(xp.reshape(flat, (B, T)) * counts, axis=-1)


def dpo(xp, logp, ref):
    """The DPO loss, with -log sigma(z) = logaddexp(0, -z)."""
    B = len(ref) // 2
    ratio = logp - ref
    z = BETA * (ratio[:B] - ratio[B:])
    return xp.mean(xp.logaddexp(numpy.float32(0), -z))


class Dense:
    """The common part of the three: parameters as a dict of arrays, and AdamW written out."""

    def __init__(self, work):
        self.work, self.data = work, padded(work.pairs)
        self.policy, self.reference = dict(work.policy), dict(work.reference)
        self.m = {name: numpy.zeros_like(x) for name, x in self.policy.items()}
        self.v = {name: numpy.zeros_like(x) for name, x in self.policy.items()}
        self.t = 0

    def step(self):
        _, gradient = self.gradient()
        self.t += 1
        for name, g in gradient.items():
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * (g * g)
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            self.policy[name] = self.policy[name] - LEARNING_RATE * m / (numpy.sqrt(v) + 1e-8)


class HipsAutograd(Dense):
    """HIPS autograd."""

    library = "autograd"

    def __init__(self, work):
        super().__init__(work)
        self.xp = importlib.import_module("autograd.numpy")
        self.value_and_grad = importlib.import_module("autograd").value_and_grad

    def gradient(self):
        config = self.work.config
        ref = logps(numpy, self.reference, config, *self.data)
        loss, gradient = self.value_and_grad(
            lambda params: dpo(self.xp, logps(self.xp, params, config, *self.data), ref)
        )(self.policy)
        return float(loss), gradient


class MyGrad(Dense):
    """MyGrad."""

    library = "mygrad"

    def __init__(self, work):
        super().__init__(work)
        self.xp = importlib.import_module("mygrad")

    def gradient(self):
        config = self.work.config
        ref = logps(numpy, self.reference, config, *self.data)
        params = {name: self.xp.tensor(x) for name, x in self.policy.items()}
        loss = dpo(self.xp, logps(self.xp, params, config, *self.data), ref)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in params.items()}


class Jax(Dense):
    """JAX, with the whole step compiled by jit."""

    library = "jax"

    def __init__(self, work):
        super().__init__(work)
        jax = importlib.import_module("jax")
        xp, config = importlib.import_module("jax.numpy"), work.config
        self.jax = jax

        def gradient(policy, reference, data):
            ref = logps(xp, reference, config, *data)
            return jax.value_and_grad(lambda params: dpo(xp, logps(xp, params, config, *data), ref))(policy)

        def step(policy, m, v, t, reference, data):
            _, g = gradient(policy, reference, data)
            m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * (g * g), v, g)

            def updated(p, m, v):
                return p - LEARNING_RATE * (m / (1 - 0.9**t)) / (xp.sqrt(v / (1 - 0.999**t)) + 1e-8)

            return jax.tree.map(updated, policy, m, v), m, v

        self.compiled, self.compiled_gradient = jax.jit(step), jax.jit(gradient)

    def gradient(self):
        loss, gradient = self.compiled_gradient(self.policy, self.reference, self.data)
        return float(loss), {name: numpy.asarray(g) for name, g in gradient.items()}

    def step(self):
        self.t += 1
        state = self.compiled(self.policy, self.m, self.v, float(self.t), self.reference, self.data)
        self.policy, self.m, self.v = self.jax.block_until_ready(state)


CONTENDERS = {
    "step": {"JAX jit, padded": Jax, "MyGrad, padded": MyGrad, "HIPS autograd, padded": HipsAutograd},
    "sampling": {},
}


def versions():
    return {name: importlib.metadata.version(name) for name in ("jax", "mygrad", "autograd")}
