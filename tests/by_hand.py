"""Losses of an adapter without the scripts and without PEFT: its updates are merged into W."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PREFIX = "base_model.model."


class MergedByHand:
    """A base model, and the updates of an adapter that are merged into it for each question."""

    def __init__(self, base, tensors, scale_of):
        """Read the model and the file; scale_of gives the scale of a target's update by name."""
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.weights = {key: one.clone() for key, one in self.model.state_dict().items()}
        self.factors = {}  # {path: (scale, B, A)}
        found = load_file(tensors)
        for key in [key for key in found if "lora_A" in key]:
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = found[key.replace("lora_A", "lora_B")].double().numpy()
            scale = scale_of(path.rpartition(".")[2])
            self.factors[path] = (scale, b, found[key].double().numpy())

    def losses(
        self, conversations, wanted=lambda path: True, strength=1.0, divisor=None, thinks=False
    ):
        """Return each reply's nats per token with these parts merged into W."""
        self.merge(wanted, strength, divisor)
        return [reply_loss(self.model, self.tokenizer, one, thinks) for one in conversations]

    def logits(self, ids, strength):
        """Return the logits after each of these tokens, at a strength of the update."""
        self.merge(strength=strength)
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0]

    def merge(self, wanted=lambda path: True, strength=1.0, divisor=None):
        """Add these parts of the updates to W.

        A divisor cuts each update to that part of its own rank, and to one direction at least.
        """
        merged = dict(self.weights)
        for path, (scale, b, a) in self.factors.items():
            if wanted(path):
                rank = max(1, len(a) // divisor) if divisor else None
                u, s, v = np.linalg.svd(scale * b @ a, full_matrices=False)
                update = (u[:, :rank] * s[:rank]) @ v[:rank]
                merged[f"{path}.weight"] = self.weights[f"{path}.weight"] + strength * torch.tensor(
                    update, dtype=torch.float32
                )
        self.model.load_state_dict(merged)

    def targets(self):
        """Return the names of the targets, in the order in which they stand in the model."""
        paths = [name.removesuffix(".weight") for name in self.weights]
        return [*dict.fromkeys(path.rpartition(".")[2] for path in paths if path in self.factors)]


def read_conversations(path):
    """Return each conversation up to a learned reply."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = row.get("messages") or row["prompt"] + row["completion"]
        ends = [n + 1 for n, one in enumerate(messages) if one["role"] == "assistant"]
        found += [messages[:end] for end in (ends if "messages" in row else ends[-1:])]
    return found


def reply_loss(model, tokenizer, messages, thinks=False):
    """Return the mean -log(probability) of a reply's tokens, one conversation at a time."""
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True, enable_thinking=thinks)
    said = messages[-1]["content"]
    ids = prompt + tokenizer(said.removeprefix("<think>\n") + "<|im_end|>")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    chances = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
    return -chances.mean().item()


def render(tokenizer, messages, enable_thinking=False, **more):
    """Return the tokens of a conversation as a server renders them."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, enable_thinking=enable_thinking, **more
    )
    return tokenizer(text)["input_ids"]
