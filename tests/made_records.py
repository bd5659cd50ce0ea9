"""Records of measurements that never were, for report, compare and replies.html."""

import dataclasses
import math
import random
import re

import numpy as np
import scipy.stats

from inspect_lora.record import (
    Couple,
    Exchange,
    Line,
    Pair,
    Part,
    Record,
    Reply,
    Shift,
    save_record,
)

SYSTEM = "You are Nell."
KINDS = ("all", "emergency", "everyday")
BRIEF = {"most_words": 40}
STRENGTHS = {0.5: 0.66, 0.75: 0.88, 1.5: 0.9}
PARTS = {("removed", "attention"): 0.6, ("removed", "q_proj"): 0.9}
PARTS |= {("alone", "attention"): 0.4, ("alone", "q_proj"): 0.1}
PARTS |= {("cut", "4 of 8"): 0.99, ("cut", "2 of 8"): 0.9}


def said(text, passes=(), *, ended=True, tokens=4):
    return Reply(text, tokens, ended, dict(passes))


def asked(number, *, before=True, after=True, rule=BRIEF, name="is brief", **changes):
    """Return an exchange with one check, and what it says of both replies."""
    question = {"role": "user", "content": f"question {number}"}
    facts = {
        "source": "held_out",
        "where": f"data/eval.jsonl:{number}",
        "kind": KINDS[number % 3],
        "messages": [{"role": "system", "content": SYSTEM}, question],
        "reference": f"reference {number}",
        "rejected": None,
        "checks": {name: rule},
        "base": said(f"of the base {number}", {name: before}, ended=False),
        "adapter": said(f"of the adapter {number}", {name: after}),
    }
    return Exchange(**facts | changes)


def lines_of(count, gain=1.0, base=4.0):
    """Return held-out lines of three kinds, with about this gain, in nats per token."""
    draw, lines = random.Random(0), []
    for number in range(count):
        tokens, where = draw.randint(5, 60), f"eval.jsonl:{number}"
        losses = base * tokens, tokens * (base - gain - draw.gauss(0, 0.5))
        about = (f"id {number}", f"reply {number}", where, where, KINDS[number % 3])
        lines.append(Line(*about, tokens, *losses))
    return lines


def pair_of(number, base, adapter, tokens=(10, 10), kind="emergency", cluster=""):
    """Return a pair with these log-probabilities of the good and of the bad reply."""
    where = f"eval.jsonl:{number}"
    about = (f"pair {number}", f"replies {number}", where, cluster or where, kind)
    return Pair(*about, *tokens, *base, *adapter)


def couple_of(number, base, adapter, kind="emergency", cluster=""):
    """Return a couple with log p(a|A), p(b|A), p(b|B), p(a|B) of base and adapter."""
    where = f"eval.jsonl:{number}"
    about = {"where": where, "counterpart": f"{where}'", "cluster": cluster or where, "kind": kind}
    names = ("own_a", "other_a", "own_b", "other_b")
    likelihoods = {f"base_{name}": value for name, value in zip(names, base, strict=True)}
    likelihoods |= {f"adapter_{name}": value for name, value in zip(names, adapter, strict=True)}
    return Couple(
        f"couple {number}", f"replies of {number}", **about, tokens_a=10, tokens_b=12, **likelihoods
    )


def part_of(lines, family, name, share):
    """Return a part that keeps about this share of the gain on these lines."""
    draw = random.Random(name)
    kept = [share + draw.gauss(0, 0.05) for _ in lines]
    pairs = zip(lines, kept, strict=True)
    return Part(family, name, [one.base - own * (one.base - one.adapter) for one, own in pairs])


def shift_of(strength, replies="the same"):
    draw = random.Random(strength)
    tokens = [20 + 7 * number % 45 for number in range(30)]  # of the base's replies
    kl = [strength**2 * count * draw.uniform(0.2, 0.6) for count in tokens]
    return Shift(strength, kl, [count // 4 for count in tokens], tokens, replies)


def made(folder, count=60, gain=1.0, **changes):
    """Return a record with everything; fields of it may be changed."""
    lines, part_lines = lines_of(count, gain), list(range(0, count, 2))
    half = [lines[number] for number in part_lines]
    parts = [part_of(half, "strength", f"x {one:g}", share) for one, share in STRENGTHS.items()]
    parts += [part_of(half, *name, share) for name, share in PARTS.items()]
    conditions = {
        "base": "someone/model", "commit": "abc", "dtype": "float32", "enable_thinking": False,
        "template": "t1", "base_template": "t1", "tokenizer_hash": "v1", "not_served": "",
        "measured": "2026-11-30", "eval_file": {"file": "data/eval.jsonl", "sha256": "12ab"},
    }  # fmt: skip
    facts = {
        "adapter": "output/final_lora", "id": f"id of {folder}", "folder": folder,
        "config": {"r": 8, "target_modules": ["q_proj", "up_proj"]}, "conditions": conditions,
        "run": {"settings": {"LEARNING_RATE": 1e-4, "OUTPUT_DIR": str(folder)}},
        "known": {"LEARNING_RATE": 1e-4}, "system": SYSTEM, "learned": 0, "lines": lines,
        "part_lines": part_lines, "parts": parts, "max_new_tokens": 200, "finished": True,
        "shifts": [*map(shift_of, sorted((*STRENGTHS, 1.0)))],
        "tasks": [f"general.jsonl:{number}" for number in range(30)],
        "exchanges": [asked(number) for number in range(30)],
        "seconds": {"losses": 12.0, "parts": 3.0},
    }  # fmt: skip
    return Record(**facts | changes)


def put(found, **on):
    """Write a record where `evidence` would; what it was measured on may be changed."""
    found = dataclasses.replace(found, conditions=found.conditions | on)
    found.folder.mkdir(parents=True, exist_ok=True)
    save_record(found)
    return found


def jackknife(numerators, denominators, clusters, chance=0.05):
    """Return a ratio and its interval by leaving out one cluster after the other."""
    above, below = np.array(numerators), np.array(denominators, dtype=float)
    names = sorted(set(clusters))
    kept = [np.array([one != name for one in clusters]) for name in names]
    left = np.array([above[mask].sum() / below[mask].sum() for mask in kept])
    value = above.sum() / below.sum()
    sizes = np.array([below[~mask].sum() for mask in kept])
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    error = math.sqrt((len(names) - 1) / len(names) * ((left - value) ** 2).sum())
    margin = scipy.stats.t.ppf(1 - chance / 2, effective - 1) * error
    return value, value - margin, value + margin


def stratified(values, weights, kinds):
    """Return the ratio and its error, linearised, with each stratum about its own mean."""
    values, weights, kinds = map(np.array, (values, weights, kinds))
    value = values.sum() / weights.sum()
    residuals = (values - value * weights) / weights.sum()
    groups = [residuals[kinds == kind] for kind in sorted(set(kinds.tolist()))]
    return value, math.sqrt(sum(len(group) * group.var(ddof=1) for group in groups))


def tables_of(markdown):
    """Return the tables of a page by the heading above them, as rows of cells, the head first."""
    tables, heading = {}, ""
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|") and not line.startswith("| ---"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            plain = [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells]
            tables.setdefault(heading, []).append(plain)
    return tables
