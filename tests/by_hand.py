"""Losses and gradients by other means: without the script, and mostly without PEFT."""

import copy
import json
from pathlib import Path

import numpy as np
import peft
import torch
from conftest import TOY
from safetensors.torch import load_file
from toys import PREFIX, base_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

# float32 rounds by 6e-8; sums of thousands of terms, in another order, differ by less than this.
ROUNDING = 1e-4


class MergedByHand:
    """A base model, and the updates of an adapter that numpy merges into it for each question."""

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

    def logits(self, ids, strength=1.0):
        """Return the logits after each of these tokens, at a strength of the update."""
        self.merge(strength=strength)
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0]

    def merge(self, wanted=lambda path: True, strength=1.0, divisor=None):
        """Add these parts of the updates to W, each cut to its rank by a divisor, or to 1."""
        merged = dict(self.weights)
        for path, (scale, b, a) in self.factors.items():
            if wanted(path):
                update = scale * b @ a
                if divisor:
                    rank = max(1, len(a) // divisor)
                    u, s, v = np.linalg.svd(update, full_matrices=False)
                    update = (u[:, :rank] * s[:rank]) @ v[:rank]
                update = torch.tensor(update, dtype=torch.float32)
                merged[f"{path}.weight"] = self.weights[f"{path}.weight"] + strength * update
        self.model.load_state_dict(merged)


def read_conversations(path):
    """Return each conversation of a JSONL file up to a reply that is taught."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = row.get("messages") or row["prompt"] + row["completion"]
        ends = [n + 1 for n, one in enumerate(messages) if one["role"] == "assistant"]
        found += [messages[:end] for end in (ends if "messages" in row else ends[-1:])]
    return found


def render(tokenizer, messages, enable_thinking=False, **more):
    """Return the tokens of a conversation as a server renders them."""
    more |= {"tokenize": False, "enable_thinking": enable_thinking}
    text = tokenizer.apply_chat_template(messages, **more)
    return tokenizer(text)["input_ids"]


def reply_loss(model, tokenizer, messages, thinks=False):
    """Return the mean -log(probability) of a reply's tokens, one conversation at a time."""
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True, enable_thinking=thinks)
    said = messages[-1]["content"]
    ids = prompt + tokenizer(said.removeprefix("<think>\n") + "<|im_end|>")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    chances = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
    return -chances.mean().item()


def likeliest_reply(model, ids, count):
    """Return the tokens of the greedy reply to one prompt, without generate()."""
    reply = []
    while len(reply) < count and tokenizer().eos_token_id not in reply:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + reply])).logits[0, -1]
        (best, second), (token, _) = logits.topk(2)
        assert best - second > 1e-4, "rounding could change this: take another seed"
        reply.append(token.item())
    return reply


def losses_of_peft(folder, conversations, dtype="float32", base=TOY):
    """Return the losses of base and adapter, loaded and switched off by PEFT alone."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base_model(dtype, base)), folder).eval()
    with_adapter = [reply_loss(model, tokenizer(), one) for one in conversations]
    with model.disable_adapter():
        return [reply_loss(model, tokenizer(), one) for one in conversations], with_adapter


def token_loss(model, examples):
    """Return the mean cross-entropy over the target tokens, in float64: each reply has a row."""
    total, count = 0.0, 0
    with torch.no_grad():
        for reply in [reply for example in examples for reply in example.replies]:
            n, ids = len(reply.reply_ids), torch.tensor([reply.prompt_ids + reply.reply_ids])
            logits = model(input_ids=ids).logits[0, -n - 1 : -1].double()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, -n:], reduction="sum")
            total, count = total + loss.item(), count + n
    return total / count


def assert_near(gradients, expected, share=ROUNDING):
    """Compare gradients by name, each against the size of its largest element."""
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        assert (gradient - expected[name]).abs().max().item() <= share * largest, name
