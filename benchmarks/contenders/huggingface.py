"""The contender of transformers: our weights as its GPT-2, sampled by `model.generate`."""

import torch
import transformers

from benchmarks.workload import beginnings, endless


def versions():
    return {"transformers": transformers.__version__}


class Sampling:
    """Sample one text with `model.generate`, with its key-value cache."""

    texts = 1

    def __init__(self, work):
        config = work.config
        names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        self.model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{name: getattr(config, name) for name in names}, eos_token_id=0, bos_token_id=0)
        ).eval()
        weights = {f"transformer.{name}": torch.tensor(x) for name, x in endless(work.policy).items()}
        missing = self.model.load_state_dict(weights, strict=False)
        assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # it is tied to wte.weight
        self.prompts = torch.tensor(beginnings(work, self.texts))
        self.new = config.n_positions - self.prompts.shape[1]

    def step(self):
        out = self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.new,
            pad_token_id=0,
        )
        return out.shape[1] - self.prompts.shape[1]


class ManyTexts(Sampling):
    """Sample 32 texts at once."""

    texts = 32


CONTENDERS = {
    "sampling": {"transformers": Sampling},
    "sampling 32": {"transformers": ManyTexts},
}
