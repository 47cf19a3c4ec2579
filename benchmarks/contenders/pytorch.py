"""The contenders of PyTorch: GPT-2 as functions, with PyTorch's fused attention, norm, GELU and optimizer."""

import numpy
import torch
import torch.nn.functional as F

from benchmarks.workload import BETA, LEARNING_RATE, beginnings, endless, padded
from minidpo.run import workers


def versions():
    return {"torch": torch.__version__}


def layers(params, config, x, attend, rows=None):
    """The blocks and the last norm; after the last attention only `rows` continue."""
    for i in range(config.n_layer):
        p = {name: params[f"h.{i}.{name}"] for name in LAYER}
        h = F.layer_norm(x, x.shape[-1:], p["ln_1.weight"], p["ln_1.bias"])
        y = attend(i, h @ p["attn.c_attn.weight"] + p["attn.c_attn.bias"])
        if rows is not None and i == config.n_layer - 1:
            x, y = x[rows], y[rows]
        x = x + y @ p["attn.c_proj.weight"] + p["attn.c_proj.bias"]
        h = F.layer_norm(x, x.shape[-1:], p["ln_2.weight"], p["ln_2.bias"])
        h = F.gelu(h @ p["mlp.c_fc.weight"] + p["mlp.c_fc.bias"], approximate="tanh")
        x = x + h @ p["mlp.c_proj.weight"] + p["mlp.c_proj.bias"]
    return F.layer_norm(x, x.shape[-1:], params["ln_f.weight"], params["ln_f.bias"])


LAYER = [
    f"{name}.{kind}"
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
]


class Padded:
    """The plain algorithm: one padded batch; each step scores the reference again, without a graph."""

    mode = None  # of torch.compile; None: not compiled
    device = "cpu"

    def __init__(self, work):
        torch.set_default_device(self.device)
        self.work = work
        self.policy = {name: torch.tensor(x, requires_grad=True) for name, x in work.policy.items()}
        self.reference = {name: torch.tensor(x) for name, x in work.reference.items()}
        self.optimizer = torch.optim.AdamW(list(self.policy.values()), LEARNING_RATE, weight_decay=0.0, fused=True)
        self.prepare()

    def prepare(self):
        self.inputs, self.targets, self.counts = map(torch.tensor, padded(self.work.pairs))
        self.logps = torch.compile(self.padded_logps, mode=self.mode) if self.mode else self.padded_logps

    def padded_logps(self, params):
        config, (B, T) = self.work.config, self.inputs.shape

        def attend(i, qkv):  # (B, T, 3C) -> (B, T, C)
            q, k, v = qkv.view(B, T, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).reshape(B, T, -1)

        x = F.embedding(self.inputs, params["wte.weight"]) + params["wpe.weight"][:T]
        logits = layers(params, config, x, attend) @ params["wte.weight"].T
        nll = F.cross_entropy(logits.view(B * T, -1), self.targets.view(-1), reduction="none").view(B, T)
        return -(nll * self.counts).sum(1)

    def references(self):
        with torch.no_grad():
            return self.logps(self.reference)

    def loss(self):
        self.optimizer.zero_grad()
        ref, logp = self.references(), self.logps(self.policy)
        B = len(self.work.pairs)
        ratio = logp - ref
        loss = -F.logsigmoid(BETA * (ratio[:B] - ratio[B:])).mean()
        loss.backward()
        return loss.item()

    def gradient(self):
        return self.loss(), {name: p.grad.cpu().numpy() for name, p in self.policy.items()}

    def step(self):
        self.loss()
        self.optimizer.step()


class Kept(Padded):
    """`Padded`, with the C library set as minidpo sets it."""

    def prepare(self):
        workers.keep_memory()
        super().prepare()


class Compiled(Padded):
    """`Padded`, compiled by torch.compile."""

    mode = "default"


class Best(Padded):
    """The recipe of minidpo: a cached reference, shared prefixes, no padding; only rows that predict reach the head."""

    def prepare(self):
        workers.keep_memory()
        tokens, places, self.cuts, heads, targets, owners = [], [], [], [], [], []
        B = len(self.work.pairs)
        for b, (x, w, l) in enumerate(self.work.pairs):
            start = len(tokens)
            prompt, rejected = start + len(w) - 1, start + len(w) - 1 + len(x)
            tokens += [*w[:-1], *x, *l[:-1]]
            places += [*range(len(x), len(x) + len(w) - 1), *range(len(x) + len(l) - 1)]
            self.cuts.append((start, prompt, rejected, len(tokens)))
            for y, rows, owner in ((w, range(start, prompt), b), (l, range(rejected, len(tokens)), B + b)):
                heads += [rejected - 1, *rows]
                targets += y
                owners += [owner] * len(y)
        self.tokens, self.places = torch.tensor(tokens), torch.tensor(places)
        rows, where = numpy.unique(heads, return_inverse=True)
        self.rows, self.where = torch.tensor(rows), torch.tensor(where)
        self.targets, self.owners = torch.tensor(targets), torch.tensor(owners)
        longest = max(end - rejected for *_, rejected, end in self.cuts) + max(p - s for s, p, *_ in self.cuts)
        T = max(longest, self.work.config.n_positions)
        self.earlier = torch.ones(T, T, dtype=torch.bool).tril()
        self.logps = self.shared_logps
        with torch.no_grad():
            self.cached, self.reference = self.logps(self.reference), {}

    def shared_logps(self, params):
        config, H = self.work.config, self.work.config.n_head

        def attend(i, qkv):  # (N, 3C) -> (N, C)
            q, k, v = qkv.view(1, len(qkv), 3, H, -1).permute(2, 0, 3, 1, 4)  # (1, H, N, D) each
            parts = []
            for start, prompt, rejected, end in self.cuts:
                x, w, others, l = map(
                    slice, (prompt, start, prompt, rejected - 1), (rejected, prompt, rejected - 1, end)
                )
                for rows, *keys in ((w, x, w), (others, others), (l, slice(prompt, end))):
                    queries = q[:, :, rows]
                    if rows == others and i == config.n_layer - 1:
                        parts.append(torch.zeros_like(queries))  # nobody needs it
                        continue
                    sources = [[a[:, :, part] for part in keys] for a in (k, v)]
                    sources = [torch.cat(a, 2) if len(a) > 1 else a[0] for a in sources]
                    mask, n = None, rows.stop - rows.start
                    if rows != others:
                        earlier = sources[0].shape[2] - n
                        mask = self.earlier[earlier : earlier + n, : earlier + n]
                    parts.append(
                        F.scaled_dot_product_attention(queries, *sources, attn_mask=mask, is_causal=mask is None)
                    )
            return torch.cat(parts, 2)[0].transpose(0, 1).reshape(len(qkv), -1)

        x = F.embedding(self.tokens, params["wte.weight"]) + F.embedding(self.places, params["wpe.weight"])
        logits = layers(params, config, x, attend, self.rows) @ params["wte.weight"].T
        logp = F.log_softmax(logits, -1)[self.where, self.targets]
        return torch.zeros(2 * len(self.work.pairs)).index_add(0, self.owners, logp)

    def references(self):
        return self.cached


class Sampling:
    """Sample one text, token by token, with a key-value cache."""

    texts = 1

    def __init__(self, work):
        self.work = work
        self.params = {name: torch.tensor(x) for name, x in endless(work.policy).items()}
        self.prompts = torch.tensor(beginnings(work, self.texts))

    @torch.no_grad()
    def step(self):
        config, params, B = self.work.config, self.params, self.texts
        T, H = config.n_positions, config.n_head
        cache = torch.zeros(config.n_layer, 2, B, H, T, config.n_embd // H)
        draws = torch.Generator().manual_seed(0)
        new, start, count = self.prompts, 0, 0
        while True:
            n = new.shape[1]

            def attend(i, qkv):  # (B, n, 3C) -> (B, n, C)
                q, k, v = qkv.view(B, n, 3, H, -1).permute(2, 0, 3, 1, 4)  # noqa: B023
                cache[i, 0, :, :, start : start + n], cache[i, 1, :, :, start : start + n] = k, v  # noqa: B023
                keys, values = cache[i, :, :, :, : start + n]  # noqa: B023
                y = F.scaled_dot_product_attention(q, keys, values, is_causal=n > 1)  # noqa: B023
                return y.transpose(1, 2).reshape(B, n, -1)  # noqa: B023

            x = params["wte.weight"][new] + params["wpe.weight"][start : start + n]
            logits = layers(params, config, x, attend)[:, -1] @ params["wte.weight"].T
            tokens = torch.multinomial(torch.softmax(logits, -1), 1, generator=draws)
            start, new, count = start + n, tokens, count + 1
            if bool((tokens == 0).all()) or start == T:
                return count


class ManyTexts(Sampling):
    """Sample 32 texts at once."""

    texts = 32


class OnGPU:
    """A mixin, named first: tensors are on the GPU, and a turn ends when the GPU has finished."""

    device = "cuda"

    def finish(self):
        torch.cuda.synchronize()

    def memory(self):
        return torch.cuda.max_memory_reserved() / 2**20


class PaddedOnGPU(OnGPU, Padded):
    pass


class CompiledOnGPU(OnGPU, Padded):
    mode = "reduce-overhead"


class BestOnGPU(OnGPU, Best):
    pass


CONTENDERS = {
    "step": {
        "PyTorch eager, padded": Padded,
        "PyTorch eager, padded, memory kept": Kept,
        "PyTorch compiled, padded": Compiled,
        "PyTorch eager, our recipe": Best,
    },
    "sampling": {"PyTorch eager": Sampling},
    "sampling 32": {"PyTorch eager": ManyTexts},
    "gpu": {
        "PyTorch eager, padded": PaddedOnGPU,
        "PyTorch compiled (reduce-overhead), padded": CompiledOnGPU,
        "PyTorch eager, our recipe": BestOnGPU,
    },
}
